"""Training streams of scenes, captions and rewrites for the miniature's base models."""

from __future__ import annotations

import random
from functools import partial
from typing import Literal

import numpy as np

from miniature.scenes.interpretation import Habits, captioned_scenes
from miniature.scenes.wording import Style, write, write_loosely
from miniature.scenes.world import TAGS, Content, all_contents, elaborate, random_scene, render
from miniature.streams import Captioned, Part, Stream, StreamData, completion, faithful_first, mixed_batches


def rewrite_pair(rng: random.Random) -> tuple[str, str]:
    """Draws a prompt and the completion that the refiner should learn to give.

    Prompts are half canonical, the others in known or in random wordings. Rewrites are "gallery", "terse" and
    "detailed" wordings, vocabularies mixed now and then, never the canonical wording (greedy rewrites would be copies)
    nor the "unseen" templates. A tenth misrepresent the prompt and one in twenty breaks the answer format, so that RL
    has something to teach.
    """
    content = rng.choice(all_contents(rng.choice(TAGS)))
    asked = rng.choices(("canonical", "gallery", "terse", "loose"), (0.5, 0.15, 0.15, 0.2))[0]
    prompt = write_loosely(content, rng) if asked == "loose" else write(content, asked, rng)  # type: ignore[arg-type]
    style: Style = rng.choices(("gallery", "terse", "detailed"), (0.35, 0.35, 0.3))[0]
    said: Content = content
    if rng.random() < 0.1:
        said = rng.choice(all_contents(content.tag))
    said = elaborate(said, rng) if style == "detailed" else said
    return prompt, completion(write(said, style, rng, mix=rng.choice((0.0, 0.3))), rng)


def scene_part(size: int, habits: Habits, faithful_batches: int = 0) -> Part:
    """Makes the scenes of a mixed stream.

    Args:
        size: number of scenes in a batch.
        habits: rates at which images depart from their captions.
        faithful_batches: number of first batches whose images always match their captions.
    """
    return Part(size, _draw, rewrite_pair, partial(_captioned, habits), faithful_batches)


def _draw(rng: random.Random) -> np.ndarray:
    return render(random_scene(rng))


def _captioned(habits: Habits, rng: random.Random, faithful: int) -> Captioned:
    return ((text, render(scene)) for text, scene in faithful_first(captioned_scenes, habits, rng, faithful))


class ShapesPretraining(StreamData):
    """Training streams for the miniature's base models.

    Args:
        what: "scenes" (images only), "captions" (captions and images) or "rewrites" (prompts and completions).
        batch_size: examples a step.
        faithful_batches: "captions" only: number of first batches whose images always match their captions. With
            mistakes from the start a model this small never learns prompts of two objects.
        habits: "captions" only: rates at which images depart from their captions after that.
        seed: seed of the stream.
        num_workers: number of processes that make batches.
    """

    def __init__(
        self,
        what: Literal["scenes", "captions", "rewrites"],
        batch_size: int = 64,
        faithful_batches: int = 0,
        habits: Habits = Habits(),  # noqa: B008 (frozen)
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        parts = [scene_part(batch_size, habits, faithful_batches)]
        batches = partial(mixed_batches, "images" if what == "scenes" else what, parts)
        super().__init__(Stream(batches, f"{what}-{seed}"), num_workers)
