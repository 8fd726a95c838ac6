"""The contract of all rewards: `Reward` takes a `RewardBatch` and returns one `Score` per image."""

from __future__ import annotations

import math
import reprlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rewards.arguments import OnFailure

if TYPE_CHECKING:  # keeps scorers, and the server that hosts them, free of Lightning
    from PIL.Image import Image

    from datamodules.sample import PromptSample


@dataclass(frozen=True)
class Score:
    """One image's score, in three units that must never be mixed.

    Args:
        native: what the scorer itself puts out (a cosine, a bool as 0/1, a rating from 1 to 5).
        table: what papers print; averages of it are compared with published numbers.
        rl: what the trainer maximises.
        valid: False when the scorer failed. A failure is never a 0: it is masked before a group is normalised.
        detail: the raw breakdown, for logs and images.
        parts: scorer name -> its own score, where a reward only routes to or sums up others.
        weights: scorer name -> its weight, where `rl` is the weighted sum of `parts`.
    """

    native: float
    table: float
    rl: float
    valid: bool = True
    detail: dict[str, Any] = field(default_factory=dict)
    parts: dict[str, Score] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.valid and not all(map(_finite, (self.native, self.table, self.rl))):
            raise ValueError(
                f"A valid Score must be finite, got native={self.native}, table={self.table}, rl={self.rl}: "
                "return Score.invalid(reason) for an image that could not be scored."
            )

    @classmethod
    def invalid(cls, reason: str, **detail: Any) -> Score:
        """Makes a failed score: NaN in every unit, so that forgetting to mask it cannot go unnoticed.

        Args:
            reason: what went wrong, kept in `detail["reason"]`.
            detail: further entries of `detail`.
        """
        return cls(math.nan, math.nan, math.nan, valid=False, detail={"reason": reason, **detail})

    def leaves(self, name: str) -> Iterator[tuple[str, Score]]:
        """Yields the scorers' names and own scores, in place of those that only route or sum up.

        Args:
            name: name of the reward that gave this score.
        """
        if not self.parts:
            yield name, self
        for part, score in self.parts.items():
            yield from score.leaves(part)


@dataclass(frozen=True)
class RewardBatch:
    """Images with the samples they are scored against.

    Args:
        samples: B samples, one per image. They hold the *original* prompt and its metadata, never a rewrite:
            a reward that sees the rewrite can be raised by asking for something easier.
        images: B images.
    """

    samples: Sequence[PromptSample]
    images: Sequence[Image]

    def __post_init__(self) -> None:
        if len(self.samples) != len(self.images):
            raise ValueError(
                f"A RewardBatch needs one sample per image, got {len(self.samples)} samples and "
                f"{len(self.images)} images: repeat the sample for every image of its group."
            )

    def __len__(self) -> int:
        return len(self.images)


class RewardUnavailable(ValueError):
    """Raised if a scorer can score no image now; training saves a checkpoint and stops."""


class Reward(ABC):
    """A callable that scores images. Constructors check and store their arguments; models load on first use."""

    name: str
    """The key of this reward in logs (`reward/<name>`) and results; the class's name unless it sets another."""
    needs: tuple[str, ...] = ()
    """What a sample must hold beside its prompt: keys of its metadata, and "image" for a source image."""
    native_range: tuple[float, float] = (-math.inf, math.inf)
    """Lowest and highest native score."""
    groupwise: bool = False
    """True if in training a batch holds whole groups, whose images stand side by side: scores that compare them."""
    on_failure: OnFailure = "fail"
    """What is done if it raises or returns no scores: `fail` stops the run with a checkpoint, `skip` leaves out the
    images that it fails on."""

    def __init_subclass__(cls) -> None:
        if not hasattr(cls, "name"):
            cls.name = cls.__name__

    @property
    def version(self) -> str:
        """Names what scores depend on (scorer, models, settings): scores of different versions are not comparable."""
        return type(self).__name__

    def load(self) -> None:  # noqa: B027 (a hook that most rewards leave empty)
        """Loads the models now rather than on first use; later calls do nothing."""

    @abstractmethod
    def __call__(self, batch: RewardBatch) -> Sequence[Score | float]:
        """Scores a batch of images.

        Args:
            batch: B images with their samples.

        Returns:
            B scores in the order of the images. An image that cannot be scored gets `Score.invalid(reason)`. A number
            stands for a score whose three values are the same, and NaN and infinity for one that is invalid.

        Raises:
            RewardUnavailable: if no image can be scored now and the reward is configured not to go on without.
        """


def checked_list(scores: Any, name: str, images: int) -> list[Any]:
    """Returns what a reward returned as a list.

    Args:
        scores: what it returned.
        name: name of the reward, for the error.
        images: number of images that it got.

    Raises:
        ValueError: if it is no sequence of that length.
    """
    listed = isinstance(scores, Iterable) and getattr(scores, "shape", None) != ()
    if not listed or isinstance(scores, str | bytes | Mapping | Set):
        raise ValueError(f"{name} returned {_shown(scores)} for {images} images: it must return a list, {_ONE}.")
    values: list[Any] = list(scores)
    if len(values) != images:
        raise ValueError(
            f"{name} returned {len(values)} scores for {images} images: it must return one per image, "
            "`Score.invalid(reason)` where it failed."
        )
    return values


def as_score(value: Any, name: str) -> Score:
    """Returns a reward's value for one image as a `Score`; a number is the native, the table and the rl value.

    Args:
        value: a `Score`, or a number: Python's, NumPy's, or a tensor with a single one; True is 1. One that is not
            finite is an invalid score.
        name: name of the reward, for the error.

    Raises:
        ValueError: if it is anything else.
    """
    if isinstance(value, Score):
        return value
    finite = _finite(value)
    if finite is None:
        raise ValueError(f"{name} returned {_shown(value)} for an image: it must return a list, {_ONE}.")
    if not finite:
        return Score.invalid(f"{name} returned {_shown(value)}", fault="value")
    number = float(value)
    return Score(number, number, number)


_ONE = "with a finite number or a `Score` for each image, `Score.invalid(reason)` where it failed"


def _shown(value: Any) -> str:
    return "None" if value is None else f"the {type(value).__name__} {reprlib.repr(value)}"


def _finite(value: Any) -> bool | None:
    """Returns True for what `float` turns into a finite number, False for other numbers, None for no number."""
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer of hundreds of digits
        return False
    except (TypeError, ValueError, RuntimeError):  # text; RuntimeError is torch's, for a tensor of several
        return None
