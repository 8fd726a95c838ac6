"""The GenEval reward: an object detector's detections, judged by `rewards.geneval.rules`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Literal, Protocol, get_args, runtime_checkable

from PIL.Image import Image

from rewards.base import Reward, RewardBatch, Score
from rewards.geneval.rules import Detection, judge

RewardKind = Literal["soft", "strict", "correct"]


@runtime_checkable
class Detector(Protocol):
    """Protocol of object detectors for GenEval's rules."""

    def detect(self, images: Sequence[Image]) -> list[list[Detection]]:
        """Finds the objects in images.

        Args:
            images: B images.

        Returns:
            B lists of detections, with the labels and colours that the metadata uses.
        """
        ...


@runtime_checkable
class AskedDetector(Detector, Protocol):
    """Protocol of detectors that also take what is asked, to leave out costly work that no rule would use."""

    def detect_asked(self, images: Sequence[Image], metadata: Sequence[Mapping[str, Any]]) -> list[list[Detection]]:
        """Finds the objects in images; may leave out the colours that the image's GenEval record does not ask for."""
        ...


def detect_for(
    detector: Detector, images: Sequence[Image], metadata: Sequence[Mapping[str, Any]]
) -> list[list[Detection]]:
    """Finds the objects in B images to judge against B GenEval records; uses `detect_asked` if there is one."""
    if isinstance(detector, AskedDetector):
        found = detector.detect_asked(images, metadata)
    else:
        found = detector.detect(images)
    if len(found) != len(images):
        raise ValueError(
            f"{type(detector).__name__}.detect returned {len(found)} lists for {len(images)} images: "
            "it must return one list per image, empty where nothing is found."
        )
    return found


class GenEvalReward(Reward):
    """Scores images by GenEval's rules. native = table = 1 if officially correct, else 0.

    The soft score ignores `exclude`, as Flow-GRPO's does: it depends only on the classes asked for. Where an image has
    room for every object at once, as in the miniature, a policy that draws everything gets a high soft score whatever
    the prompt says. `exclude_penalty` takes that profit away.

    An error of the detector is not caught: a reward that turns failures into scores trains on them unnoticed.

    Args:
        detector: finds the objects.
        reward: what the trainer optimises: `soft` partial credit, `strict` exact match, or `correct`, the benchmark.
        compat: `flow_grpo` reproduces the published soft score with its defects (see `judge`).
        exclude_penalty: taken from the soft score when the image shows what `exclude` forbids; may make it negative.
    """

    name = "geneval"
    needs = ("tag", "include")
    native_range = (0.0, 1.0)

    def __init__(
        self,
        detector: Detector,
        reward: RewardKind = "soft",
        compat: Literal["flow_grpo"] | None = None,
        exclude_penalty: float = 0.0,
    ) -> None:
        if reward not in get_args(RewardKind):
            raise ValueError(f"GenEvalReward has reward={reward!r}, use one of {', '.join(get_args(RewardKind))}.")
        if compat not in (None, "flow_grpo"):
            raise ValueError(f"GenEvalReward has compat={compat!r}, use null or flow_grpo.")
        if not 0 <= exclude_penalty < math.inf:
            raise ValueError(f"GenEvalReward has exclude_penalty={exclude_penalty}, use 0 or more: it is subtracted.")
        self.detector = detector
        self.reward: RewardKind = reward
        self.compat: Literal["flow_grpo"] | None = compat
        self.exclude_penalty = exclude_penalty

    @property
    def version(self) -> str:
        """Version of the scores: the detector and the settings of the rl value."""
        detector = getattr(self.detector, "version", type(self.detector).__name__)
        return f"geneval {self.reward} compat={self.compat} exclude_penalty={self.exclude_penalty} by {detector}"

    def load(self) -> None:
        """Loads the detector if it has a `load`."""
        if hasattr(self.detector, "load"):
            self.detector.load()

    def __call__(self, batch: RewardBatch) -> list[Score]:
        """Scores B images against their samples' GenEval metadata; `detail` holds the verdict's fields and the tag."""
        found = detect_for(self.detector, batch.images, [sample.metadata for sample in batch.samples])
        return [
            self._score(detections, sample.metadata) for detections, sample in zip(found, batch.samples, strict=True)
        ]

    def _score(self, detections: Sequence[Detection], metadata: dict[str, object]) -> Score:
        verdict = judge(detections, metadata, compat=self.compat)
        rl = float(getattr(verdict, self.reward))
        if self.reward == "soft" and verdict.excluded_found:
            rl -= self.exclude_penalty
        correct = float(verdict.correct)
        return Score(native=correct, table=correct, rl=rl, detail={"tag": metadata["tag"], **asdict(verdict)})
