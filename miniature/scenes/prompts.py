"""Data module of the miniature's scenes: canonical prompts to train on, held-out scenes to evaluate."""

from __future__ import annotations

import random
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, Literal

from datamodules.base import PromptDataModule, PromptSample
from miniature.scenes.wording import Style, write
from miniature.scenes.world import TAGS, Content, contents
from rewards.arguments import check_minimum


def shapes_prompts(
    name: str,
    split: Literal["train", "val", "test"],
    styles: tuple[Style, ...],
    num: int,
    seed: int,
    few: bool = False,
) -> list[PromptSample]:
    """Draws prompts over the six tags alike, their contents from one split, their styles in turn.

    No scene of a tag comes again before all others of the split have come.

    Args:
        name: start of the prompts' ids. Ids key the evaluation noise: sets of one name get the same noise, so a
            paraphrase is compared with its original at equal noise.
        split: split that the contents come from.
        styles: wordings to use.
        num: number of prompts.
        seed: seed of contents and words.
        few: true leaves out the shapes and colours that the models of the signs' world have not seen.
    """
    pick, words = random.Random(f"{split}-{seed}"), random.Random(f"{split}-{seed}-{styles}")
    scenes: dict[str, list[tuple[Content, ...]]] = {}
    for tag in TAGS:
        scenes[tag] = list(contents(tag, split, few))
        pick.shuffle(scenes[tag])
    samples = []
    for i in range(num):
        scene = scenes[TAGS[i % len(TAGS)]]
        content = pick.choice(scene[i // len(TAGS) % len(scene)])
        prompt = write(content, styles[i // len(TAGS) % len(styles)], words)
        samples.append(PromptSample(f"{name}-{i:05}", prompt, content.tag, content.metadata))
    return samples


class MiniaturePrompts(PromptDataModule):
    """Base class of the miniature world's data modules.

    Args:
        train_prompts: number of training prompts.
        eval_prompts: number of prompts of each evaluation set.
        batch_size: prompts per process and step (each becomes a group of images).
        eval_batch_size: prompts per process in a validation or test step.
        seed: seed of the training order and of the choice of training prompts; null follows `seed_everything`.
        **kwargs: as for `PromptDataModule`.
    """

    rewordings: Mapping[str, str] = {}
    """Name of an evaluation set of other wordings -> name of the set that it rewords."""

    def __init__(
        self,
        train_prompts: int = 1920,
        eval_prompts: int = 96,
        batch_size: int = 8,
        eval_batch_size: int = 96,
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(batch_size=batch_size, eval_batch_size=eval_batch_size, seed=seed, **kwargs)
        check_minimum("data", 1, train_prompts=train_prompts, eval_prompts=eval_prompts)
        self.train_prompts = train_prompts
        self.eval_prompts = eval_prompts
        self.originals = dict(self.rewordings)

    @abstractmethod
    def held_out(self, split: Literal["val", "test"]) -> dict[str, list[PromptSample]]:
        """Draws the evaluation sets of a split; no setting is chosen by those of the test split."""

    def eval_samples(self) -> dict[str, list[PromptSample]]:
        """Draws the validation sets."""
        return self.held_out("val")

    def test_samples(self) -> dict[str, list[PromptSample]]:
        """Draws the test sets."""
        return self.held_out("test")


class ShapesPrompts(MiniaturePrompts):
    """Prompts for scenes of shapes, the miniature's GenEval.

    Training uses the canonical wording of the training scenes only. Evaluation has three sets on held-out scenes,
    with the same scenes and noise: `geneval` (canonical), `paraphrase` (two styles that the refiner knows) and
    `unseen` (a style that neither RL nor the refiner's training ever uses). `lightning test` takes other scenes.
    """

    rewordings: Mapping[str, str] = {"paraphrase": "geneval", "unseen": "geneval"}

    def train_samples(self) -> list[PromptSample]:
        """Draws canonical prompts of training scenes."""
        return shapes_prompts("train", "train", ("canonical",), self.train_prompts, self.seed)

    def held_out(self, split: Literal["val", "test"]) -> dict[str, list[PromptSample]]:
        """Draws three wordings of the same scenes."""
        # The evaluation prompts are the same for every run, so their seed is fixed.
        sets: dict[str, tuple[Style, ...]] = {
            "geneval": ("canonical",),
            "paraphrase": ("gallery", "terse"),
            "unseen": ("unseen",),
        }
        return {name: shapes_prompts(split, split, styles, self.eval_prompts, 0) for name, styles in sets.items()}
