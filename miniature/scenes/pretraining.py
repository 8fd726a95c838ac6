"""Training streams of scenes, captions and rewrites for the miniature's base models."""

from __future__ import annotations

import random
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import DataLoader

from datamodules.base import PromptSample
from miniature.scenes.interpretation import Habits, captioned_scenes
from miniature.scenes.prompts import shapes_prompts
from miniature.scenes.wording import Style, write, write_loosely
from miniature.scenes.world import TAGS, Content, all_contents, elaborate, random_scene, render
from miniature.streams import Captioned, Example, Part, StreamData, completion, mixed_batch


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


def _captioned(habits: Habits, rng: random.Random, faithful: bool) -> Captioned:
    for one in captioned_scenes(rng, habits.faithful if faithful else habits):
        yield Example(one.caption, render(one.scene), one.asked.things, one.heeded)


class ShapesPretraining(StreamData):
    """Training streams for the miniature's base models.

    Args:
        what: "scenes" (images only), "captions" (captions and images) or "rewrites" (prompts and completions).
        batch_size: examples a step.
        faithful_batches: "captions" only: number of first batches whose images always match their captions. With
            mistakes from the start a model this small never learns prompts of two objects.
        habits: "captions" only: rates at which images depart from their captions after that.
        seed: seed of the stream; null follows `seed_everything`.
        num_workers: number of processes that make batches.
        eval_prompts: "captions" only: number of held-out prompts that a validation draws.
    """

    def __init__(
        self,
        what: Literal["scenes", "captions", "rewrites"],
        batch_size: int = 64,
        faithful_batches: int = 0,
        habits: Habits = Habits(),  # noqa: B008 (frozen)
        seed: int | None = None,
        num_workers: int = 0,
        eval_prompts: int = 0,
    ) -> None:
        parts = [scene_part(batch_size, habits, faithful_batches)]
        batch = partial(mixed_batch, "images" if what == "scenes" else what, parts)
        super().__init__(batch, what, seed, num_workers)
        self.eval_prompts = eval_prompts if what == "captions" else 0

    def val_dataloader(self) -> list[DataLoader[PromptSample]]:
        """Makes the loader of canonical prompts of the validation split, in lists of at most 96, if there are any."""
        prompts: Any = shapes_prompts("val", "val", ("canonical",), self.eval_prompts, 0)
        return [DataLoader(prompts, batch_size=96, collate_fn=list)] if prompts else []

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Leaves prompts where they are; Lightning would look for tensors in them."""
        return batch if isinstance(batch, list) else super().transfer_batch_to_device(batch, device, dataloader_idx)
