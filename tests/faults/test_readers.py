"""Hostile files, requests and answers: the short form of `python -m benchmarks.system.faults --only fuzz`."""

from __future__ import annotations

import time
from contextlib import nullcontext
from pathlib import Path

import pytest
from hypothesis import strategies as st

from benchmarks.system.faults import fuzz, readers
from benchmarks.system.faults.outcome import table

pytestmark = pytest.mark.slow

CASES = 500
NAMES = (
    "prompts, .jsonl",
    "prompts, .txt",
    "prompts, .parquet",
    "configuration (YAML)",
    "run folder (config.yaml, results.json, metrics.csv)",
    "checkpoint",
    "reward server's requests",
    "reward server's socket",
    "client's answers",
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a fit, whose files are damaged."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("callbacks.reporting.page.line_chart", lambda *_, **__: "data:,")
        patch.chdir(Path(__file__).parents[2])
        return readers.finished_run(tmp_path_factory.mktemp("readers"))


def test_all_readers_are_named(run: Path, tmp_path: Path) -> None:
    assert tuple(readers.surfaces(run, tmp_path)) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_lost(name: str, run: Path, tmp_path: Path) -> None:
    outcome = readers.read_all(name, run, tmp_path, CASES, lambda: None)
    assert outcome.times >= 0.9 * CASES
    assert outcome.lost == 0, table([outcome])


def test_losses_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader that raises, exits, hangs, is wrong or runs code has lost; one of our own errors has not."""
    monkeypatch.setattr(fuzz, "LIMIT", 0.2)
    marker = tmp_path / "marker"

    def read(case: bytes) -> None:
        if case == b"raise":
            raise KeyError(case)
        if case == b"exit":
            raise SystemExit(0)
        if case == b"hang":
            time.sleep(5)
        if case == b"wrong":
            raise fuzz.Wrong("other numbers")
        if case == b"run":
            marker.mkdir()
        if case == b"refuse":
            fuzz_ours()

    def fuzz_ours() -> None:
        from datamodules.parsing import parse_json

        parse_json("{", "x.json")

    cases = st.sampled_from([b"raise", b"exit", b"hang", b"wrong", b"run", b"refuse", b"right"])
    outcome = fuzz.fuzz("all", cases, nullcontext(read), 7, lambda: None, marker=marker)
    assert (outcome.times, outcome.survived, outcome.lost) == (7, 2, 5)
    found = sorted(outcome.notes)
    assert [text.split()[0] for text in found] == ["Hang:", "KeyError", "SystemExit", "Wrong:", "code"]
    assert "a message without" in str(fuzz.loss(read, b"refuse", "other.json"))
