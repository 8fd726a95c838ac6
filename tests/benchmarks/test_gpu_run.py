"""The prepared GPU run: what fails is a row and the rest goes on; published sizes; a tiny case from end to end."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import diffusers
import pytest
import torch

from benchmarks.system.gpu import __main__ as gpu
from benchmarks.system.gpu.cases import Case, Constant, Options, Row
from benchmarks.system.published import MODELS
from datamodules.sample import PromptSample
from rewards.base import RewardBatch

pytestmark = pytest.mark.slow


def two_rows(case: Case, options: Options) -> Iterator[Row]:
    print("said by a case")
    yield {"setting": "one", "figures": {"n": 1}}
    yield {"setting": "two", "figures": {"n": 2.5}}


def fails_behind_a_row(case: Case, options: Options) -> Iterator[Row]:
    yield {"setting": "one", "figures": {"n": 1}}
    raise RuntimeError("CUDA error:\n  an illegal memory access")


def hangs(case: Case, options: Options) -> Iterator[Row]:
    yield {"setting": "one"}
    time.sleep(600)


def crashes(case: Case, options: Options) -> Iterator[Row]:
    os.kill(os.getpid(), signal.SIGKILL)
    yield {}


@pytest.fixture
def options(tmp_path: Path) -> Options:
    return Options(torch.device("cpu"), tmp_path, tiny=True, log=tmp_path / "log.txt")


def test_what_fails_is_a_row_and_the_rest_goes_on(options: Options) -> None:
    cases = [Case("fails", 1, fails_behind_a_row), Case("crashes", 1, crashes), Case("good", 1, two_rows)]
    rows = [{key: value for key, value in row.items() if key != "after"} for row in gpu.run(cases, options, 1)]
    assert rows == [
        {"case": "fails", "setting": "one", "figures": {"n": 1}},
        {"case": "fails", "error": "RuntimeError: CUDA error: an illegal memory access"},
        {"case": "crashes", "error": f"its process ended with status {-signal.SIGKILL}"},
        {"case": "good", "setting": "one", "figures": {"n": 1}},
        {"case": "good", "setting": "two", "figures": {"n": 2.5}},
    ]
    said = options.log.read_text()
    assert "said by a case" in said and "an illegal memory access" in said


def test_what_hangs_is_ended_and_what_no_longer_fits_is_skipped(options: Options) -> None:
    options = Options(options.device, options.folder, tiny=False, log=options.log)
    start = time.monotonic()
    rows = list(gpu.run([Case("hangs", 1, hangs), Case("long", 5, two_rows)], options, 2 / 60))
    assert time.monotonic() - start < 10
    assert [row["case"] for row in rows] == ["hangs", "hangs", "long"]
    assert rows[1]["error"] == "ended after 2 s" and rows[2]["error"].startswith("skipped: about 5 s")


def test_table() -> None:
    seconds = {"refine": 1.0, "rollout": 2.0, "flow_update": 3.0, "step": 6.25}
    step = {"case": "x", "setting": "micro-batch 4", "seconds": seconds, "log_ratio": {"flow": 0.0, "language": 0.002}}
    step |= {"peak": 3 * 2**30, "reserved": 4 * 2**30, "estimate": 2 * 2**30, "flops": 2e14}
    card = {"case": "card", "setting": "H100", "figures": {"TFLOP/s": 800.0, "torch": "2.13.0"}}
    lines = gpu.table([card, step, {"case": "y", "error": "OutOfMemoryError: no"}]).splitlines()
    (row,) = [line for line in lines if line.startswith("| x")]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[2:] == ["0.0e+00", "2.0e-03", "1.00", "2.00", "", "", "3.00", "6.25", "3 (4)", "2", "200", "25%"]
    assert "| card | H100 | TFLOP/s | 800 |" in lines and "- y : OutOfMemoryError: no" in lines
    header = next(line for line in lines if line.startswith("| case | setting | log"))
    assert header.count("|") == row.count("|") == lines[lines.index(header) + 1].count("|")


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("FLUX.1-dev", 11.90),
        ("FLUX.2-klein-base-4B", 3.88),
        ("SD3.5-medium", 2.24),
        ("Qwen-Image", 20.43),
        ("Z-Image", 6.15),
        ("Sana-1600M", 1.60),
    ],
)
def test_networks_have_the_published_sizes(name: str, billions: float) -> None:
    ((kind, settings),) = MODELS["pipelines"][name]["parts"]["transformer"].items()
    with torch.device("meta"):
        network = getattr(diffusers, kind)(**settings)
    assert sum(parameter.numel() for parameter in network.parameters()) / 1e9 == pytest.approx(billions, abs=0.01)


def test_a_tiny_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Both agents learn, the source image is seen, log-ratios are those of the guard; every file is written."""
    cases = ["card", "klein edits, 1024 px", "sharded"]
    monkeypatch.setattr("sys.argv", ["gpu", "--tiny", "--out", str(tmp_path), "--cases", *cases])
    with pytest.raises(SystemExit) as ended:
        gpu.main()
    assert ended.value.code == 0, (tmp_path / "log.txt").read_text()[-2000:]
    _, row, *sharded = (json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines())
    assert row["log_ratio"]["flow"] == 0 and 0 <= row["log_ratio"]["language"] < 0.1
    assert {"refine", "rollout", "reward", "language_update", "flow_update", "step"} == set(row["seconds"])
    assert row["flops"] > 0 and row["estimate"] > 0 and row["silent"] == 0
    assert [one["setting"] for one in sharded[:2]] == ["ddp", "sharded"]
    apart, moved = sharded[2]["figures"].values()
    assert apart < 1e-3 * moved
    assert (tmp_path / "table.md").read_text() in capsys.readouterr().out


def test_the_reward_prefers_every_second_image_whatever_the_batches() -> None:
    reward, sample = Constant(), PromptSample("0", "x", "", {})
    batches = [RewardBatch([sample] * num, [None] * num) for num in (1, 1, 3, 1)]  # type: ignore[list-item]
    assert [score.rl for batch in batches for score in reward(batch)] == [0, 1, 0, 1, 0, 1]


def test_every_case_is_of_a_published_model() -> None:
    assert len({case.name for case in gpu.CASES}) == len(gpu.CASES)
    assert {case.flow for case in gpu.CASES} - {""} == set(MODELS["pipelines"])  # every adapter
