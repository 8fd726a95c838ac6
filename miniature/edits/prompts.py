"""Data module of the miniature's edits: ambiguous instructions to train on, held-out edits to evaluate."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Literal

from PIL import Image

from datamodules.base import PromptSample
from miniature.edits.wording import CATEGORIES, EditStyle, write_edit
from miniature.edits.world import Split, example
from miniature.scenes.prompts import MiniaturePrompts
from miniature.scenes.world import render


def shapes_edits(name: str, split: Split, style: EditStyle, num: int, seed: int) -> list[PromptSample]:
    """Draws edits over the six categories alike, with their source images (32 x 32 pixels, 3 kB each).

    Args:
        name: start of the samples' ids. Ids key the evaluation noise: sets of one name get the same noise, so an edit
            in other words is compared with its original at equal noise.
        split: split that the edits come from.
        style: wording of the instructions.
        num: number of edits.
        seed: seed of edits and words.
    """
    pick, words = random.Random(f"{split}-{seed}"), random.Random(f"{split}-{seed}-{style}")
    samples = []
    for i in range(num):
        asked = example(pick, CATEGORIES[i % len(CATEGORIES)], split)
        prompt = write_edit(asked.edit, asked.source, style, words)
        source = Image.fromarray(render(asked.source))
        samples.append(PromptSample(f"{name}-{i:05}", prompt, asked.category, asked.metadata, source))
    return samples


class ShapesEdits(MiniaturePrompts):
    """Instructions of the editing miniature, which say "the left one" and leave the rest to the image.

    Training uses the canonical wording of the training edits only. Evaluation has two sets of the same held-out edits
    with the same noise: `edit` (canonical) and `unseen` (a wording, as ambiguous, that neither RL nor the refiner's
    training ever uses). `lightning test` takes other edits.
    """

    rewordings: Mapping[str, str] = {"unseen": "edit"}

    def train_samples(self) -> list[PromptSample]:
        """Draws canonical instructions for training edits."""
        return shapes_edits("train", "train", "canonical", self.train_prompts, self.seed)

    def held_out(self, split: Literal["val", "test"]) -> dict[str, list[PromptSample]]:
        """Draws two wordings of the same edits."""
        # The evaluation edits are the same for every run, so their seed is fixed.
        sets: dict[str, EditStyle] = {"edit": "canonical", "unseen": "unseen"}
        return {name: shapes_edits(split, split, style, self.eval_prompts, 0) for name, style in sets.items()}
