"""Fits that are killed go on and end as unbroken ones: the short form of `python -m benchmarks.system.faults`."""

from __future__ import annotations

import json
import shutil
import signal
from itertools import pairwise
from pathlib import Path

import pytest

from benchmarks.system.faults import kills
from benchmarks.system.faults.outcome import Outcome, table

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def attacked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Outcome]]:
    """The folder and the outcomes of an attack."""
    folder = tmp_path_factory.mktemp("kills")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("callbacks.reporting.page.line_chart", lambda *_, **__: "data:,")
        patch.chdir(Path(__file__).parents[2])
        return folder, list(kills.attack(folder, 6, lambda: None))


def test_nothing_is_lost(attacked: tuple[Path, list[Outcome]]) -> None:
    outcomes = attacked[1]
    assert [outcome.times for outcome in outcomes] == [1] * 6
    assert not any(outcome.lost for outcome in outcomes), table(outcomes)


def test_the_long_form_spreads_its_kills() -> None:
    """Of 40, each part has six to eight, each signal comes in most parts, and a run's steps only grow."""
    chains = kills.plan(40, 0)
    planned = [kill for chain in chains for kill in chain]
    assert len(planned) == 40
    for part in kills.PLACES:
        signals = [kill.number for kill in planned if kill.part == part]
        assert 6 <= len(signals) <= 8 and len(set(signals)) >= 2
    assert all(10 <= sum(kill.number == number for kill in planned) <= 20 for number in [signal.SIGKILL])
    assert all(one.step < other.step for chain in chains for one, other in pairwise(chain))
    assert chains == kills.plan(40, 0) != kills.plan(40, 1)


def test_losses_are_seen(attacked: tuple[Path, list[Outcome]], tmp_path: Path) -> None:
    """A run less rows of metrics, the last validation and some bytes of its checkpoint."""
    whole = attacked[0] / "unbroken"
    root = tmp_path / "root"
    shutil.copytree(whole, root)
    assert kills.differences(whole, root) == [] and kills.damaged(root) == []
    (folder,) = root.glob("*/version_0")
    rows = (folder / "metrics.csv").read_text().split("\n")
    (folder / "metrics.csv").write_text("\n".join(rows[:3]))
    results = json.loads((folder / "results.json").read_text())
    for entries in results["history"].values():
        entries.pop()
    (folder / "results.json").write_text(json.dumps(results))
    kinds = [kind for kind, _ in kills.differences(whole, root)]
    assert kinds.count("validation") == 1 and kinds.count("row of metrics") >= 2
    (path,) = root.rglob("last.ckpt")
    path.write_bytes(path.read_bytes()[:-100])
    (torn,) = kills.damaged(root)
    assert torn.startswith(str(path))
