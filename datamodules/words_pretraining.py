"""Endless streams of scenes and signs, half of each, that the base models of the world of words are made from."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal

import lightning as L
import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset

from datamodules.shapes_pretraining import rewrite_pair, to_tensor
from datamodules.shapes_world import FAITHFUL, STYLES, Habits, captioned_scenes, random_scene, render
from datamodules.words_world import (
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
    if rng.random() < 0.05:
        return prompt, rng.choice((rewrite, f"<answer> {rewrite}"))
    return prompt, f"<answer> {rewrite} </answer>"


class _Stream(IterableDataset[dict[str, Any]]):
    """Batches made on the fly, scenes first, then signs; every worker has a stream of its own."""

    def __init__(
        self, what: str, batch_size: int, seed: int, faithful_batches: int, scenes: Habits, signs: WordHabits
    ) -> None:
        self.what, self.batch_size, self.seed = what, batch_size, seed
        self.faithful_batches, self.scenes, self.signs = faithful_batches, scenes, signs

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = torch.utils.data.get_worker_info()
        workers, index = (worker.num_workers, worker.id) if worker else (1, 0)
        rng = random.Random(f"words-{self.what}-{self.seed}-{index}")
        half = self.batch_size // 2
        rest = self.batch_size - half
        if self.what == "pictures":
            while True:
                drawn = [render(random_scene(rng)) for _ in range(half)]
                yield {"pictures": to_tensor(np.stack(drawn + [render_sign(random_sign(rng)) for _ in range(rest)]))}
        elif self.what == "rewrites":
            while True:
                pairs = [rewrite_pair(rng) for _ in range(half)] + [word_rewrite_pair(rng) for _ in range(rest)]
                prompts, completions = zip(*pairs, strict=True)
                yield {"prompts": list(prompts), "completions": list(completions)}
        scene_styles = [(style, 1.5 if style == "canonical" else 1.0) for style in STYLES]
        sign_styles = [(style, 1.5 if style == "canonical" else 1.0) for style in WORD_STYLES]
        faithful = replace(FAITHFUL, freedom=self.scenes.freedom), replace(FAITHFUL_WORDS, freedom=self.signs.freedom)
        streams = [
            (captioned_scenes(rng, scenes, scene_styles), captioned_signs(rng, signs, sign_styles))
            for scenes, signs in (faithful, (self.scenes, self.signs))
        ]
        done = 0
        while True:
            scenes, signs = streams[done * workers >= self.faithful_batches]
            pairs = [(caption, render(scene)) for caption, scene in (next(scenes) for _ in range(half))]
            pairs += [(caption, render_sign(sign)) for caption, sign in (next(signs) for _ in range(rest))]
            done += 1
            captions, pictures = zip(*pairs, strict=True)
            yield {"captions": list(captions), "pictures": to_tensor(np.stack(pictures))}


class WordsPretraining(L.LightningDataModule):
    """Training streams for the models that know scenes and words.

    Args:
        what: "pictures" (nothing else), "captions" (captions and pictures) or "rewrites" (prompts and completions).
        batch_size: examples a step, half of them scenes.
        faithful_batches: "captions" only: number of first batches whose pictures always match their captions.
        habits: "captions" only: how pictures of scenes depart from their captions after that.
        word_habits: likewise for signs.
        seed: of the stream.
        num_workers: processes that make batches.
    """

    def __init__(
        self,
        what: Literal["pictures", "captions", "rewrites"],
        batch_size: int = 64,
        faithful_batches: int = 0,
        habits: Habits = Habits(),  # noqa: B008 (frozen)
        word_habits: WordHabits = WordHabits(),  # noqa: B008 (frozen)
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        self.stream = _Stream(what, batch_size, seed, faithful_batches, habits, word_habits)
        self.num_workers = num_workers

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Endless: give the trainer `max_steps`."""
        return DataLoader(self.stream, batch_size=None, num_workers=self.num_workers)
