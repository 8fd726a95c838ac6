"""Fixtures: written studies that several tests read."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.paper.runs import Studies
from tests.benchmarks.paper.folders import fitted, score_test, studies_in


@pytest.fixture
def studies(tmp_path: Path) -> Studies:
    """Joint training is right wherever flow-only is, and on three of ten more; flow-only loses half elsewhere."""
    joint, alone = "1111111100", "1111100000"
    for seed in (42, 43, 44):
        run = fitted(tmp_path / "geneval", "promptrl", seed, [0.4, 0.6, 0.8])
        ratings = {("geneval", "with_pe"): joint, ("geneval", "without_pe"): alone, ("unseen", "with_pe"): joint}
        score_test(run, ratings | {("unseen", "without_pe"): "1110000000"})
        run = fitted(tmp_path / "geneval", "flow_only", seed, [0.4, 0.45, 0.5])
        score_test(run, {("geneval", "without_pe"): alone, ("unseen", "without_pe"): "1100000000"})
        for m, ratings in ((0, "1110000000"), (1, "1111111000"), (4, alone)):
            run = fitted(tmp_path / "retention", "promptrl", seed, [0.4, 0.5])
            job = run.parents[1].rename(tmp_path / "retention" / f"promptrl-num_retained{m}-s{seed}")
            score_test(job / "x" / "version_0", {("geneval", mode): ratings for mode in ("with_pe", "without_pe")})
    return studies_in(tmp_path, "geneval", "retention")
