"""Training with a bad reward server, and many clients of a good one: the short form of the long benchmark."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from benchmarks.system.faults import clients, training
from benchmarks.system.faults.outcome import table
from benchmarks.system.faults.serving import KINDS
from rewards.base import Score

pytestmark = pytest.mark.slow

STEPS = 30


def test_bad_answers_spoil_nothing(tmp_path: Path) -> None:
    """Of two requests a step, a fifth is answered badly, in every way."""
    (outcome,) = training.attack(tmp_path, lambda: None, steps=STEPS, seed=1)
    assert outcome.times >= len(KINDS) and all(kind in outcome.extra[0] for kind in KINDS), outcome.extra
    assert outcome.lost == 0, table([outcome])


def test_mistakes_are_seen() -> None:
    """Two colours whose scores were swapped, one of 51 red (a fifth of 255) that has its own, one without."""
    images = [Image.new("RGB", (2, 2), colour) for colour in ("red", "blue", (51, 0, 0), "red")]
    scores = [Score(red, red, red) for red in (0.0, 1.0, 0.2)]
    assert training.mistakes([*scores, Score.invalid("no answer")], images) == (2, 1)


def test_a_soak_ends_by_a_signal_and_measures(tmp_path: Path) -> None:
    outcome, flat = training.attack(tmp_path, lambda: None, hours=4 / 3600)
    assert "exit status" not in outcome.notes, table([outcome])
    assert flat.times == 6 and all("an hour" in line for line in flat.extra), table([flat])


def test_clients_beside_unfinished_headers(tmp_path: Path) -> None:
    alone, beside = clients.attack(tmp_path, 20, lambda: None)
    assert alone.times == beside.times == 20 * clients.CALLS
    assert alone.lost == beside.lost == 0, table([alone, beside])
