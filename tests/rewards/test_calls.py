"""Faults of scorers: what they raise, and what they change of the process."""

from __future__ import annotations

import math
import os
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules.sample import PromptSample
from lightning_modules.cli.preemption import Preempted
from rewards.base import Reward, RewardBatch, RewardUnavailable, Score
from rewards.calls import ScorerFailed, guarded, score_each
from rewards.tagged import TaggedReward, WeightedSum

SKIPPED = pytest.mark.filterwarnings("ignore:.*are left out")


class Faulty(Reward):
    """Scores an image by its width, after a fault at those of width 3."""

    name = "faulty"

    def __init__(self, fault: Callable[[], object], on_failure: Any = "fail") -> None:
        self.fault = fault
        self.on_failure = on_failure
        self.calls: list[int] = []

    def __call__(self, batch: RewardBatch) -> Sequence[Score | float]:
        self.calls.append(len(batch))
        if any(image.width == 3 for image in batch.images):
            self.fault()
        return [image.width for image in batch.images]


def batch_of(*widths: int, tag: str = "") -> RewardBatch:
    samples = [PromptSample(str(width), "a", tag, {}) for width in widths]
    return RewardBatch(samples, [Image.new("RGB", (width, 1)) for width in widths])


def raises(error: BaseException) -> Callable[[], object]:
    def fault() -> None:
        raise error

    return fault


class Panic(BaseException):
    """As Rust extensions raise: no Exception."""


ERRORS: list[tuple[Callable[[], object], str]] = [
    (lambda: {}["x"], r"faulty failed with KeyError: 'x' \(.*test_calls.py:\d+\): correct it there"),  # type: ignore[index]
    (lambda: sys.exit(0), r"faulty failed with SystemExit: 0 \("),
    (lambda: int("x"), r"faulty failed with ValueError: invalid literal .* \("),
    (raises(Panic("in\nRust")), r"faulty failed with Panic: in Rust \("),
    (raises(MemoryError()), r"faulty failed with MemoryError \("),
    (lambda: Score(math.nan, 0, 0), r"^A valid Score must be finite"),
]


@pytest.mark.parametrize(("fault", "said"), ERRORS)
def test_what_a_scorer_raises_is_one_sentence(fault: Callable[[], object], said: str) -> None:
    with pytest.raises(ScorerFailed, match=said) as failed:
        score_each(Faulty(fault), batch_of(1, 2, 3))
    assert "\n" not in str(failed.value)


@SKIPPED
@pytest.mark.parametrize(("fault", "said"), ERRORS)
def test_skip_leaves_out_the_image_alone(fault: Callable[[], object], said: str) -> None:
    reward = Faulty(fault, "skip")
    scores = score_each(reward, batch_of(1, 2, 3, 4))
    assert [score.valid for score in scores] == [True, True, False, True] and reward.calls == [4, 1, 1, 1, 1]
    with pytest.raises(AssertionError, match=said):
        raise AssertionError(scores[2].detail["reason"])


def test_skip_warns() -> None:
    with pytest.warns(UserWarning, match="KeyError: 'x' .*Its images are left out"):
        score_each(Faulty(raises(KeyError("x")), "skip"), batch_of(3))


@SKIPPED
def test_groups_are_not_split() -> None:
    reward = Faulty(raises(KeyError("x")), "skip")
    reward.groupwise = True
    assert not any(score.valid for score in score_each(reward, batch_of(1, 3))) and reward.calls == [2]


@pytest.mark.parametrize("error", [RewardUnavailable("gone."), KeyboardInterrupt(), Preempted(15)])
@pytest.mark.parametrize("on_failure", ["skip", "fail"])
def test_what_is_no_fault_of_the_scorer_passes(error: BaseException, on_failure: str) -> None:
    """A server that is gone, and signals that arrive while a scorer works."""
    with pytest.raises(type(error)):
        score_each(Faulty(raises(error), on_failure), batch_of(3))


@SKIPPED
def test_a_part_fails_for_itself_alone() -> None:
    """Of a tagged reward; a sum names the part that failed."""
    faulty, sound = Faulty(raises(KeyError("x")), "skip"), Faulty(lambda: None)
    tagged, other = batch_of(1, 3, tag="a"), batch_of(3, tag="b")
    both = RewardBatch([*tagged.samples, *other.samples], [*tagged.images, *other.images])
    scores = score_each(TaggedReward({"a": faulty, "b": sound}), both)
    assert [score.valid for score in scores] == [True, False, True]
    one, three = score_each(WeightedSum({"a": faulty, "b": sound}), batch_of(1, 3))
    assert one.rl == 2 and not three.valid and three.detail["reason"].startswith("a: faulty failed with KeyError")
    faulty.on_failure = "fail"
    with pytest.raises(ScorerFailed, match="^faulty failed with KeyError"):
        score_each(TaggedReward({"a": faulty, "b": sound}), both)


def reseed() -> None:
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)


def change_and_raise() -> None:
    torch.set_default_dtype(torch.float64)
    raise KeyError


QUIET: dict[str, Callable[[], object]] = {
    "generators": reseed,
    "gradients": lambda: torch.set_grad_enabled(False),
    "threads": lambda: torch.set_num_threads(3),
    "folder": lambda: os.chdir("/"),
}
LOUD: dict[str, tuple[Callable[[], object], str]] = {
    "dtype": (
        lambda: torch.set_default_dtype(torch.float64),
        "torch's default dtype from torch.float32 to torch.float64",
    ),
    "determinism": (lambda: torch.use_deterministic_algorithms(True), "torch's deterministic mode from 0 to 2"),
    "precision": (
        lambda: torch.set_float32_matmul_precision("medium"),
        "fp32 matrix products from highest to medium",
    ),
    "cuDNN": (lambda: setattr(torch.backends.cudnn, "benchmark", True), "cuDNN's benchmark flag from False to True"),
    "a change and an error": (change_and_raise, "KeyError"),
}


def state() -> list[Any]:
    return [
        torch.get_rng_state().tolist(),
        np.random.get_state()[1].tolist(),  # type: ignore[index,union-attr]
        random.getstate(),
        torch.is_grad_enabled(),
        torch.get_num_threads(),
        torch.get_default_dtype(),
        torch.get_deterministic_debug_mode(),
        torch.get_float32_matmul_precision(),
        torch.backends.cudnn.benchmark,
        os.getcwd(),
    ]


@pytest.mark.parametrize("fault", QUIET.values(), ids=QUIET)
def test_what_a_scorer_changes_is_put_back(fault: Callable[[], object]) -> None:
    torch.manual_seed(5)
    before = state()
    assert [score.rl for score in score_each(Faulty(fault), batch_of(1, 3))] == [1, 3]
    assert state() == before


@SKIPPED
@pytest.mark.parametrize(("fault", "said"), LOUD.values(), ids=LOUD)
def test_a_setting_that_drawing_may_have_seen_is_a_failure(fault: Callable[[], object], said: str) -> None:
    before = state()
    with pytest.raises(ScorerFailed, match=said):
        score_each(Faulty(fault), batch_of(1, 3))
    reward = Faulty(fault, "skip")
    scores = score_each(reward, batch_of(1, 3))
    assert not any(score.valid for score in scores) and said in scores[0].detail["reason"] and reward.calls == [2]
    assert state() == before


def test_a_folder_that_is_gone_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with guarded("x"):
        os.chdir(tmp_path)
