"""`score_each`: the one place where a run calls its rewards, so that no fault of one ends, spoils or alters it."""

from __future__ import annotations

import math
import os
import random
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

from rewards.base import Reward, RewardBatch, RewardUnavailable, Score, as_score, checked_list

OUR_PACKAGES = ("lightning_modules", "datamodules", "rewards", "callbacks", "miniature")
LARGEST = 1e15
"""Largest absolute value of a score; squares of far larger ones, as in a group's std, are no fp32 numbers."""

Access = tuple[Callable[[], Any], Callable[[Any], object]]
"""Reads a value, and sets it."""


class ScorerFailed(ValueError):
    """Raised if a scorer failed on a batch; the message says how and where.

    Args:
        problem: the message.
        altered: True if the scorer changed settings that other threads may have seen, though they were put back.
    """

    def __init__(self, problem: str, altered: bool) -> None:
        super().__init__(problem)
        self.altered = altered


def score_each(reward: Reward, batch: RewardBatch) -> list[Score]:
    """Scores a batch, one score per image; a number is a score in all three units.

    A score that is not finite, or beyond `LARGEST`, is invalid.

    Raises:
        ScorerFailed: if the reward's `on_failure` is `fail` and it raises (or calls `sys.exit`), returns fewer or more
            scores, of which none could be told whose it is, or values that are none. If it is `skip`, the images that
            it fails on are invalid.
        RewardUnavailable: if the reward does, whatever its `on_failure` is.
    """
    name = type(reward).__name__
    try:
        with guarded(reward.name):
            scores = [as_score(score, name) for score in checked_list(reward(batch), name, len(batch))]
        return [_within_range(score, name) for score in scores]
    except ScorerFailed as failure:
        if reward.on_failure == "fail":
            raise
        if len(batch) == 1 or reward.groupwise or failure.altered:
            warnings.warn(f"{failure} Its images are left out (`on_failure`).", stacklevel=2)
            return [Score.invalid(str(failure), fault="altered" if failure.altered else "raised")] * len(batch)
    rows = range(len(batch))  # each image alone, so that one costs no other its score
    return [s for row in rows for s in score_each(reward, RewardBatch([batch.samples[row]], [batch.images[row]]))]


def faults(score: Score) -> set[str]:
    """Returns why `score_each` made a score, or parts of it, invalid that the reward did not call so itself.

    `raised` and `value` are faults of the call and of what it returned; `altered` is a call that changed settings of
    the process, which whatever ran meanwhile may have seen.
    """
    return {str(part.detail["fault"]) for _, part in score.leaves("") if "fault" in part.detail}


@contextmanager
def guarded(name: str) -> Iterator[None]:
    """Context manager: runs a scorer, and puts back what it changed of the process.

    Random generators, the gradient mode, the number of threads and the working folder are put back silently. Settings
    that change what other threads compute meanwhile are an error.

    Args:
        name: name of the scorer, for errors.

    Raises:
        ScorerFailed: if the scorer raises anything, calls `sys.exit` or changes such a setting.
    """
    kept, settings = _kept(), _settings()
    states = {what: read() for what, (read, _) in (kept | settings).items()}
    failure: BaseException | None = None
    changed: list[str] = []
    try:
        yield
    except (KeyboardInterrupt, RewardUnavailable, ScorerFailed):
        raise
    except BaseException as error:  # SystemExit, and panics of libraries in Rust, which are no Exceptions
        if type(error).__module__.startswith("lightning_modules."):  # a signal handler's, not the scorer's
            raise
        failure = error
    finally:
        for what, (read, put_back) in settings.items():
            if (now := read()) != states[what]:
                changed.append(f"{what} from {states[what]} to {now}")
                put_back(states[what])
        for what, (_, put_back) in kept.items():
            put_back(states[what])
    if failure is not None:
        raise ScorerFailed(_described(name, failure), bool(changed)) from failure
    if changed:
        said = f"{name} changed {' and '.join(changed)}, which was put back: let it put back itself what it changes."
        raise ScorerFailed(said, True)


def _settings() -> dict[str, Access]:
    """Settings of the process that change what is computed, by name."""
    torch = sys.modules.get("torch")  # a server without it does not load it for this
    if torch is None:
        return {}
    deterministic = (torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode)
    precision = (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision)
    settings = {
        "torch's default dtype": (torch.get_default_dtype, torch.set_default_dtype),
        "torch's deterministic mode": deterministic,
        "torch's precision of fp32 matrix products": precision,
    }
    for flag in ("benchmark", "deterministic"):
        settings[f"cuDNN's {flag} flag"] = _attribute(torch.backends.cudnn, flag)
    return settings


def _kept() -> dict[str, Access]:
    """What else a scorer may have changed, by name: putting it back undoes it."""
    kept: dict[str, Access] = {"random": (random.getstate, random.setstate), "folder": (_folder, _enter)}
    if (numpy := sys.modules.get("numpy")) is not None:
        kept["numpy"] = (numpy.random.get_state, numpy.random.set_state)
    if (torch := sys.modules.get("torch")) is not None:
        kept["torch"] = (torch.get_rng_state, torch.set_rng_state)
        kept["gradient"] = (torch.is_grad_enabled, torch.set_grad_enabled)
        kept["threads"] = (torch.get_num_threads, torch.set_num_threads)
        if torch.cuda.is_initialized():
            kept["cuda"] = (torch.cuda.get_rng_state, torch.cuda.set_rng_state)
    return kept


def _attribute(owner: Any, name: str) -> Access:
    return lambda: getattr(owner, name), lambda value: setattr(owner, name, value)


def _folder() -> str:
    with suppress(FileNotFoundError):  # it was deleted
        return os.getcwd()
    return ""


def _enter(folder: str) -> None:
    if folder != _folder():
        with suppress(FileNotFoundError):
            os.chdir(folder)


def _described(name: str, error: BaseException) -> str:
    """Says how and where a scorer failed; a ValueError of our own code says so itself."""
    frames = list(traceback.walk_tb(error.__traceback__))
    modules = [frame.f_globals.get("__name__", "").split(".")[0] for frame, _ in frames]
    places = [(m in OUR_PACKAGES, f.f_code.co_filename, line) for m, (f, line) in zip(modules, frames, strict=True)]
    if isinstance(error, ValueError) and places[-1][0]:
        return str(error)
    # The innermost line of the file that we called, which is the user's, rather than one of a library below it.
    called = next((file for ours, file, _ in places if not ours), places[-1][1])
    line = [line for _, file, line in places if file == called][-1]
    text = " ".join(str(error).split())[:300]
    said = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return f"{name} failed with {said} ({os.path.relpath(called)}:{line}): correct it there."


def _within_range(score: Score, name: str) -> Score:
    """Returns an invalid score for one that cannot be trained on; an invalid one is NaN in every unit."""
    if not score.valid:
        return replace(score, native=math.nan, table=math.nan, rl=math.nan)
    for unit, value in (("native", score.native), ("table", score.table), ("rl", score.rl)):
        if not abs(value) <= LARGEST:
            return Score.invalid(f"{name} returned {unit}={value:g}, use at most {LARGEST:g}", fault="value")
    return score
