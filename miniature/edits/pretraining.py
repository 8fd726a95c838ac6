"""Training stream of source images, captions and target images for the editing miniature's flow model."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from statistics import NormalDist

import numpy as np

from miniature.edits.wording import CATEGORIES, EDIT_STYLES, TINTS, EditStyle, write_edit
from miniature.edits.world import EditExample, example, fulfil, landing_cells, possible_values
from miniature.scenes.interpretation import Habits, fixed_gaussian, preferences
from miniature.scenes.world import GRID, Scene, render
from miniature.streams import Batch, StreamData, to_tensor

_PLAIN = frozenset(
    "a and another at by for from here into is it just like now of one please see take the then to 1 ,".split()
)


@dataclass(frozen=True)
class EditHabits(Habits):
    """Rates at which the world's edits depart from their captions.

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


FAITHFUL_EDITS = EditHabits().faithful


def imagine_edit(
    asked: EditExample, caption: str, style: EditStyle, rng: random.Random, habits: EditHabits = EditHabits()
) -> Scene:
    """Returns the scene that the world shows for a source and a caption of an edit.

    Args:
        asked: source and edit.
        caption: wording of the edit, which decides new places and, with the object meant, `habits.mistakes`.
        style: style of the caption.
        rng: random numbers, which decide the rest.
        habits: rates of mistakes; `FAITHFUL_EDITS` has none.
    """
    kind = None
    if rng.random() < habits.slips:
        kind = rng.randrange(12)
    elif _spoilt(asked, caption, dict(habits.mistakes)[style]):
        kind = int(np.argmax(preferences(caption, "misread", 12)))
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
    where = preferences(caption, "layout", GRID * GRID)
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
    """Returns True if the world misdraws this wording for this object.

    It is a threshold on a sum over adjacent *pairs* of content words, the last of them paired with the object's colour
    and shape: no word is lucky everywhere, so a refiner has to learn which wording suits which edit.
    """
    words = [word for word in caption.split() if word not in _PLAIN] + [asked.meant.color, asked.meant.shape]
    pairs = list(zip(words, words[1:], strict=False))
    score = sum(fixed_gaussian(*pair, "edit mistake") for pair in pairs) / len(pairs) ** 0.5
    return chance > 0 and score > NormalDist().inv_cdf(1 - chance)


def captioned_edits(rng: random.Random, habits: EditHabits) -> Iterator[tuple[Scene, str, Scene]]:
    """Yields sources, captions and targets without end, over all categories alike; canonical captions come most."""
    shares = [1.5 if style == "canonical" else 1.0 for style in EDIT_STYLES]
    while True:
        asked = example(rng, rng.choice(CATEGORIES), "train")
        style = rng.choices(EDIT_STYLES, shares)[0]
        caption = write_edit(asked.edit, asked.source, style, rng)
        yield asked.source, caption, imagine_edit(asked, caption, style, rng, habits)


def _batch(size: int, faithful_batches: int, habits: EditHabits, rng: random.Random, number: int) -> Batch:
    """Makes a batch of `size` captions with their source and target images."""
    edits = captioned_edits(rng, habits.faithful if number < faithful_batches else habits)
    sources, captions, targets = zip(*islice(edits, size), strict=True)
    return {
        "captions": list(captions),
        "sources": to_tensor([render(scene) for scene in sources]),
        "images": to_tensor([render(scene) for scene in targets]),
    }


class ShapesEditPretraining(StreamData):
    """Training stream of the editing miniature's flow model.

    Args:
        batch_size: examples a step.
        faithful_batches: number of first batches whose targets always do what their captions say.
        habits: rates at which targets depart from their captions after that.
        seed: seed of the stream; null follows `seed_everything`.
        num_workers: number of processes that make batches.
    """

    def __init__(
        self,
        batch_size: int = 64,
        faithful_batches: int = 0,
        habits: EditHabits = EditHabits(),  # noqa: B008 (frozen)
        seed: int | None = None,
        num_workers: int = 0,
    ) -> None:
        super().__init__(partial(_batch, batch_size, faithful_batches, habits), "edits", seed, num_workers)
