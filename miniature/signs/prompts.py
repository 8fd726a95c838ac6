"""Data modules of the miniature's other rewards: words to draw, scenes to draw well, and all three kinds by tags."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

from datamodules.base import PromptSample
from miniature.scenes.prompts import MiniaturePrompts, shapes_prompts
from miniature.scenes.wording import Style
from miniature.signs.world import LENGTHS, Split, WordStyle, words, write_word


def word_prompts(name: str, split: Split, style: WordStyle, num: int, seed: int) -> list[PromptSample]:
    """Draws prompts for signs, of two, three and four letters in turn, with the tag `ocr`.

    Args:
        name: start of the prompts' ids. Ids key the evaluation noise: sets of one name get the same noise, so a
            paraphrase is compared with its original at equal noise.
        split: split that the words come from.
        style: style of the wordings.
        num: number of prompts.
        seed: seed of words and wordings.
    """
    pick, wording = random.Random(f"words-{split}-{seed}"), random.Random(f"words-{split}-{seed}-{style}")
    samples = []
    for i in range(num):
        word = pick.choice(words(LENGTHS[i % len(LENGTHS)], split))
        samples.append(PromptSample(f"{name}-{i:05}", write_word(word, style, wording), "ocr", {"text": [word]}))
    return samples


def tagged_scenes(tag: str, name: str, split: Split, style: Style, num: int, seed: int) -> list[PromptSample]:
    """Draws prompts for scenes whose tag names their reward; GenEval's own tag stays in the metadata."""
    return [replace(sample, tag=tag) for sample in shapes_prompts(name, split, (style,), num, seed, few=True)]


class WordsPrompts(MiniaturePrompts):
    """Prompts for signs: `a sign that says " s h o p "`.

    Training uses the canonical wording of the training words only. Evaluation has two sets of the same held-out words
    with the same noise: `ocr` (canonical) and `unseen` (templates that neither RL nor the refiner's training ever
    uses). `lightning test` takes other words.
    """

    rewordings: Mapping[str, str] = {"unseen": "ocr"}

    def train_samples(self) -> list[PromptSample]:
        """Draws canonical prompts of training words."""
        return word_prompts("train", "train", "canonical", self.train_prompts, self.seed)

    def held_out(self, split: Literal["val", "test"]) -> dict[str, list[PromptSample]]:
        """Draws two wordings of the same words."""
        styles: dict[str, WordStyle] = {"ocr": "canonical", "unseen": "unseen"}
        return {name: word_prompts(split, split, style, self.eval_prompts, 0) for name, style in styles.items()}


class PreferencePrompts(MiniaturePrompts):
    """Prompts for scenes, to be scored by `miniature.scenes.preference.ShapesPreference`; their tag is `preference`.

    Training uses the canonical wording of the training scenes only. Evaluation has two sets of the same held-out scenes
    with the same noise: `preference` (canonical) and `unseen` (a style that neither RL nor the refiner's training ever
    uses). `lightning test` takes other scenes.
    """

    rewordings: Mapping[str, str] = {"unseen": "preference"}

    def train_samples(self) -> list[PromptSample]:
        """Draws canonical prompts of training scenes."""
        return tagged_scenes("preference", "train", "train", "canonical", self.train_prompts, self.seed)

    def held_out(self, split: Literal["val", "test"]) -> dict[str, list[PromptSample]]:
        """Draws two wordings of the same scenes."""
        styles: dict[str, Style] = {"preference": "canonical", "unseen": "unseen"}
        return {
            name: tagged_scenes("preference", split, split, style, self.eval_prompts, 0)
            for name, style in styles.items()
        }


class MultiRewardPrompts(MiniaturePrompts):
    """Prompts of three kinds, each with the tag of the one reward that judges it: `geneval`, `ocr`, `preference`.

    Training has as many of each (a third of `train_prompts`), in canonical wordings only. The evaluation sets are
    called as the tags; `lightning test` takes other scenes and words.
    """

    def train_samples(self) -> list[PromptSample]:
        """Draws canonical prompts, the three kinds in turn."""
        by_tag = self._by_tag("train", -(-self.train_prompts // 3), self.seed).values()
        return [sample for three in zip(*by_tag, strict=True) for sample in three][: self.train_prompts]

    def held_out(self, split: Literal["val", "test"]) -> dict[str, list[PromptSample]]:
        """Draws the evaluation prompts of each tag."""
        return self._by_tag(split, self.eval_prompts, 0)

    def _by_tag(self, split: Split, num: int, seed: int) -> dict[str, list[PromptSample]]:
        return {
            "geneval": tagged_scenes("geneval", f"{split}-geneval", split, "canonical", num, seed),
            "ocr": word_prompts(f"{split}-ocr", split, "canonical", num, seed),
            # Other scenes than GenEval's, where there are others.
            "preference": tagged_scenes("preference", f"{split}-preference", split, "canonical", num, seed + 1),
        }
