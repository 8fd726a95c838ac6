"""Training streams of scenes and signs for the base models of the world of words."""

from __future__ import annotations

import random
from functools import partial
from typing import Literal

import numpy as np

from miniature.scenes.interpretation import Habits
from miniature.scenes.pretraining import scene_part
from miniature.signs.world import (
    LENGTHS,
    WordHabits,
    WordStyle,
    captioned_signs,
    random_sign,
    render_sign,
    words,
    write_word,
    write_word_loosely,
)
from miniature.streams import Captioned, Example, Part, StreamData, completion, mixed_batch

REWRITE_STYLES: tuple[WordStyle, ...] = ("gallery", "terse")
"""Styles of rewrites: never the canonical wording (greedy rewrites would be copies) nor the "unseen" templates."""


def word_rewrite_pair(rng: random.Random) -> tuple[str, str]:
    """Draws a prompt for a sign and the completion that the refiner should learn to give.

    Prompts are half canonical, the others in known or in random wordings. A tenth of the rewrites asks for another word
    and one in twenty breaks the answer format, so that RL has something to teach.
    """
    word = rng.choice(words(rng.choice(LENGTHS), "train"))
    asked = rng.choices(("canonical", "gallery", "terse", "loose"), (0.5, 0.15, 0.15, 0.2))[0]
    prompt = write_word_loosely(word, rng) if asked == "loose" else write_word(word, asked, rng)  # type: ignore[arg-type]
    said = rng.choice(words(len(word), "train")) if rng.random() < 0.1 else word
    rewrite = write_word(said, rng.choice(REWRITE_STYLES), rng, mix=rng.choice((0.0, 0.3)))
    return prompt, completion(rewrite, rng)


def _draw(rng: random.Random) -> np.ndarray:
    return render_sign(random_sign(rng))


def _captioned(habits: WordHabits, rng: random.Random, faithful: bool) -> Captioned:
    for text, sign in captioned_signs(rng, habits.faithful if faithful else habits):
        yield Example(text, render_sign(sign))


class WordsPretraining(StreamData):
    """Training streams for the models that know scenes and words.

    Args:
        what: "images" (nothing else), "captions" (captions and images) or "rewrites" (prompts and completions).
        batch_size: examples a step.
        scene_share: share of scenes among them; the others are signs.
        faithful_batches: "captions" only: number of first batches whose signs always match their captions. The scenes
            have their habits from the start: they are known to the model that training starts from.
        habits: "captions" only: rates at which images of scenes depart from their captions.
        word_habits: "captions" only: rates at which signs depart from their captions after `faithful_batches`.
        seed: seed of the stream; null follows `seed_everything`.
        num_workers: number of processes that make batches.
    """

    def __init__(
        self,
        what: Literal["images", "captions", "rewrites"],
        batch_size: int = 64,
        scene_share: float = 0.5,
        faithful_batches: int = 0,
        habits: Habits = Habits(),  # noqa: B008 (frozen)
        word_habits: WordHabits = WordHabits(),  # noqa: B008 (frozen)
        seed: int | None = None,
        num_workers: int = 0,
    ) -> None:
        if not 0 <= scene_share <= 1:
            raise ValueError(f"WordsPretraining has scene_share={scene_share}, use 0 to 1.")
        scenes = round(scene_share * batch_size)
        signs = Part(batch_size - scenes, _draw, word_rewrite_pair, partial(_captioned, word_habits), faithful_batches)
        batch = partial(mixed_batch, what, [scene_part(scenes, habits), signs])
        super().__init__(batch, f"words-{what}", seed, num_workers)
