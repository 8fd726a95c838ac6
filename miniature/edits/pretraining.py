"""Endless streams of sources, captions and targets that the editing miniature's flow model is made from."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Any

import lightning as L
import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset

from miniature.edits.world import (
    CATEGORIES,
    EDIT_STYLES,
    TINTS,
    EditExample,
    EditStyle,
    example,
    fulfil,
    landing_cells,
    possible_values,
    write_edit,
)
from miniature.scenes.pretraining import to_tensor
from miniature.scenes.world import GRID, Scene, _gaussian, _scores, render

_PLAIN = frozenset(
    "a and another at by for from here into is it just like now of one please see take the then to 1 ,".split()
)


@dataclass(frozen=True)
class EditHabits:
    """How the world's edits depart from their captions.

    Attributes:
        mistakes: chance of a mistake that wording and object decide, by style.
        slips: chance of a mistake that nothing decides.
        freedom: chance that a new place is random rather than decided by the words.
    """

    mistakes: tuple[tuple[str, float], ...] = (
        ("canonical", 0.42),
        ("explicit", 0.33),
        ("gallery", 0.33),
        ("terse", 0.33),
        ("unseen", 0.42),
    )
    slips: float = 0.15
    freedom: float = 0.1


FAITHFUL_EDITS = EditHabits(mistakes=tuple((style, 0.0) for style in EDIT_STYLES), slips=0.0)


def imagine_edit(
    asked: EditExample, caption: str, style: EditStyle, rng: random.Random, habits: EditHabits = EditHabits()
) -> Scene:
    """The image that the world shows for a source and a caption of an edit.

    Args:
        asked: source and edit.
        caption: the edit's wording, which decides new places and, with the object meant, `habits.mistakes`.
        style: of the caption.
        rng: decides the rest.
        habits: `FAITHFUL_EDITS` for captions that are always right.
    """
    kind = None
    if rng.random() < habits.slips:
        kind = rng.randrange(12)
    elif _spoilt(asked, caption, dict(habits.mistakes)[style]):
        kind = int(np.argmax(_scores(caption, "misread", 12)))
    edit, scene = asked.edit, asked.source
    if kind is not None and kind % 4 == 0:
        return scene  # nothing is done
    others = [value for value in possible_values(scene, edit.category, edit.index) if value != edit.value]
    if edit.category == "env":
        others = [tint for tint in TINTS if tint not in (edit.value, TINTS[scene.ground])]
    if kind is not None and kind % 4 in (1, 2):  # another value, or another object where an edit has none
        if others and (kind % 4 == 2 or edit.category == "env"):
            edit = replace(edit, value=others[kind // 4 % len(others)])
        else:
            bystanders = [i for i in range(len(scene.items)) if i != edit.index]
            edit = replace(edit, index=bystanders[kind // 4 % len(bystanders)])
    where = _scores(caption, "layout", GRID * GRID)
    if rng.random() < habits.freedom:
        where = np.array([rng.gauss(0, 1) for _ in where])
    cells = landing_cells(scene, edit)
    result = fulfil(scene, edit, max(cells, key=lambda cell: where[cell], default=None))
    if kind is not None and kind % 4 == 3:  # another object is lost on the way
        losable = [item for item in scene.items if item != scene.items[edit.index]]
        lost = losable[kind // 4 % len(losable)]
        result = replace(result, items=tuple(item for item in result.items if item != lost))
    return result


def _spoilt(asked: EditExample, caption: str, chance: float) -> bool:
    """Whether this wording goes wrong for this object.

    A threshold on a sum over adjacent *pairs* of content words, the last of them paired with the object's colour and
    shape: no word is lucky everywhere, so a refiner has to learn which wording suits which edit.
    """
    words = [word for word in caption.split() if word not in _PLAIN] + [asked.meant.color, asked.meant.shape]
    pairs = list(zip(words, words[1:], strict=False))
    score = sum(_gaussian(*pair, "edit mistake") for pair in pairs) / len(pairs) ** 0.5
    return chance > 0 and score > NormalDist().inv_cdf(1 - chance)


def captioned_edits(rng: random.Random, habits: EditHabits) -> Iterator[tuple[Scene, str, Scene]]:
    """An endless stream of sources, captions and targets over all categories alike; canonical captions come most."""
    shares = [1.5 if style == "canonical" else 1.0 for style in EDIT_STYLES]
    while True:
        asked = example(rng, rng.choice(CATEGORIES), "train")
        style = rng.choices(EDIT_STYLES, shares)[0]
        caption = write_edit(asked.edit, asked.source, style, rng)
        yield asked.source, caption, imagine_edit(asked, caption, style, rng, habits)


class _Stream(IterableDataset[dict[str, Any]]):
    """Batches made on the fly; every worker has a stream of its own."""

    def __init__(self, batch_size: int, seed: int, faithful_batches: int, habits: EditHabits) -> None:
        self.batch_size, self.seed = batch_size, seed
        self.faithful_batches, self.habits = faithful_batches, habits

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = torch.utils.data.get_worker_info()
        workers, index = (worker.num_workers, worker.id) if worker else (1, 0)
        rng = random.Random(f"edits-{self.seed}-{index}")
        faithful = replace(FAITHFUL_EDITS, freedom=self.habits.freedom)
        streams = [captioned_edits(rng, habits) for habits in (faithful, self.habits)]
        done = 0
        while True:
            stream = streams[done * workers >= self.faithful_batches]
            sources, captions, targets = zip(*(next(stream) for _ in range(self.batch_size)), strict=True)
            done += 1
            yield {
                "captions": list(captions),
                "sources": to_tensor(np.stack([render(scene) for scene in sources])),
                "images": to_tensor(np.stack([render(scene) for scene in targets])),
            }


class ShapesEditPretraining(L.LightningDataModule):
    """Training stream of the editing miniature's flow model.

    Args:
        batch_size: examples a step.
        faithful_batches: number of first batches whose targets always do what their captions say.
        habits: how targets depart from their captions after that.
        seed: of the stream.
        num_workers: processes that make batches.
    """

    def __init__(
        self,
        batch_size: int = 64,
        faithful_batches: int = 0,
        habits: EditHabits = EditHabits(),  # noqa: B008 (frozen)
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        self.stream = _Stream(batch_size, seed, faithful_batches, habits)
        self.num_workers = num_workers

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Endless: give the trainer `max_steps`."""
        return DataLoader(self.stream, batch_size=None, num_workers=self.num_workers)
