"""Endless streams of scenes and signs that the base models of the world of words are made from."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any, Literal, TypeVar

import lightning as L
import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset

from miniature.scenes.pretraining import completion, rewrite_pair, to_tensor
from miniature.scenes.world import STYLES, Habits, captioned_scenes, random_scene, render
from miniature.signs.world import (
    FAITHFUL_WORDS,
    LENGTHS,
    WORD_STYLES,
    WordHabits,
    WordStyle,
    captioned_signs,
    random_sign,
    render_sign,
    words,
    write_word,
    write_word_loosely,
)

_Style = TypeVar("_Style", bound=str)

REWRITE_STYLES: tuple[WordStyle, ...] = ("gallery", "terse")
"""The styles of rewrites: never the canonical wording (greedy rewrites would be copies) nor the "unseen" templates."""


def word_rewrite_pair(rng: random.Random) -> tuple[str, str]:
    """One example for the refiner: a prompt for a sign and the completion that it should learn to give.

    Prompts are half canonical, the others in known or in random wordings. A tenth of the rewrites asks for another word
    and one in twenty breaks the answer format, so that RL has something to teach.
    """
    word = rng.choice(words(rng.choice(LENGTHS), "train"))
    asked = rng.choices(("canonical", "gallery", "terse", "loose"), (0.5, 0.15, 0.15, 0.2))[0]
    prompt = write_word_loosely(word, rng) if asked == "loose" else write_word(word, asked, rng)  # type: ignore[arg-type]
    said = rng.choice(words(len(word), "train")) if rng.random() < 0.1 else word
    rewrite = write_word(said, rng.choice(REWRITE_STYLES), rng, mix=rng.choice((0.0, 0.3)))
    return prompt, completion(rewrite, rng)


class _Stream(IterableDataset[dict[str, Any]]):
    """Batches made on the fly, scenes first, then signs; every worker has a stream of its own."""

    def __init__(
        self,
        what: str,
        scenes: int,
        signs: int,
        seed: int,
        faithful_batches: int,
        habits: Habits,
        word_habits: WordHabits,
    ) -> None:
        self.what, self.scenes, self.signs, self.seed = what, scenes, signs, seed
        self.faithful_batches, self.habits, self.word_habits = faithful_batches, habits, word_habits

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = torch.utils.data.get_worker_info()
        workers, index = (worker.num_workers, worker.id) if worker else (1, 0)
        rng = random.Random(f"words-{self.what}-{self.seed}-{index}")
        if self.what == "images":
            while True:
                drawn = [render(random_scene(rng)) for _ in range(self.scenes)]
                drawn += [render_sign(random_sign(rng)) for _ in range(self.signs)]
                yield {"images": to_tensor(np.stack(drawn))}
        elif self.what == "rewrites":
            while True:
                pairs = [rewrite_pair(rng) for _ in range(self.scenes)]
                pairs += [word_rewrite_pair(rng) for _ in range(self.signs)]
                prompts, completions = zip(*pairs, strict=True)
                yield {"prompts": list(prompts), "completions": list(completions)}
        scenes = captioned_scenes(rng, self.habits, _shares(STYLES))
        faithful = replace(FAITHFUL_WORDS, freedom=self.word_habits.freedom)
        streams = [captioned_signs(rng, habits, _shares(WORD_STYLES)) for habits in (faithful, self.word_habits)]
        done = 0
        while True:
            signs = streams[done * workers >= self.faithful_batches]
            examples = [(caption, render(scene)) for caption, scene in islice(scenes, self.scenes)]
            examples += [(caption, render_sign(sign)) for caption, sign in islice(signs, self.signs)]
            done += 1
            captions, images = zip(*examples, strict=True)
            yield {"captions": list(captions), "images": to_tensor(np.stack(images))}


def _shares(styles: Sequence[_Style]) -> list[tuple[_Style, float]]:
    """The canonical style comes most."""
    return [(style, 1.5 if style == "canonical" else 1.0) for style in styles]


class WordsPretraining(L.LightningDataModule):
    """Training streams for the models that know scenes and words.

    Args:
        what: "images" (nothing else), "captions" (captions and images) or "rewrites" (prompts and completions).
        batch_size: examples a step.
        scene_share: share of scenes among them; the others are signs.
        faithful_batches: "captions" only: number of first batches whose signs always match their captions. The scenes
            have their habits from the start: they are known to the model that training starts from.
        habits: "captions" only: how images of scenes depart from their captions.
        word_habits: likewise for signs, after `faithful_batches`.
        seed: of the stream.
        num_workers: processes that make batches.
    """

    def __init__(
        self,
        what: Literal["images", "captions", "rewrites"],
        batch_size: int = 64,
        scene_share: float = 0.5,
        faithful_batches: int = 0,
        habits: Habits = Habits(),  # noqa: B008 (frozen)
        word_habits: WordHabits = WordHabits(),  # noqa: B008 (frozen)
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        if not 0 <= scene_share <= 1:
            raise ValueError(f"WordsPretraining has scene_share={scene_share}, use 0 to 1.")
        scenes = round(scene_share * batch_size)
        self.stream = _Stream(what, scenes, batch_size - scenes, seed, faithful_batches, habits, word_habits)
        self.num_workers = num_workers

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Endless: give the trainer `max_steps`."""
        return DataLoader(self.stream, batch_size=None, num_workers=self.num_workers)
