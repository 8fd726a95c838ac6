"""Training stream of source images, instructions and rewrites for the editing miniature's refiner."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import partial
from typing import Any

from PIL import Image

from miniature.edits.wording import CATEGORIES, EDIT_LEXICONS, SIDES, Edit, EditStyle, write_edit, write_edit_loosely
from miniature.edits.world import EditExample, example, source_scene
from miniature.scenes.wording import LEXICONS
from miniature.scenes.world import COLORS, GRID, QUADRANTS, SHAPES, Scene, quadrant_of, render
from miniature.streams import Batch, StreamData, completion

NAMING: tuple[EditStyle, ...] = ("explicit", "gallery", "terse")
"""Styles of rewrites, which name the object by shape and colour."""


def edit_rewrite_pair(rng: random.Random) -> tuple[EditExample, str, str]:
    """Draws an edit, an instruction for it, and the completion that the refiner should learn to give.

    Instructions are half canonical, the others in random wordings or in known ones that name the object already.
    Rewrites name it, in one of three vocabularies, mixed now and then. A tenth name another object of the image and
    one in twenty breaks the answer format, so that RL has something to teach.
    """
    drawn = example(rng, rng.choice(CATEGORIES), "train")
    asked = rng.choices(("canonical", "loose", "named"), (0.5, 0.3, 0.2))[0]
    if asked == "loose":
        instruction = write_edit_loosely(drawn.edit, rng)
    else:
        style: EditStyle = "canonical" if asked == "canonical" else rng.choice(NAMING)
        instruction = write_edit(drawn.edit, drawn.source, style, rng)
    said = misnamed(drawn.edit, drawn.source, rng) if rng.random() < 0.1 else drawn.edit
    rewrite = write_edit(said, drawn.source, rng.choice(NAMING), rng, mix=rng.choice((0.0, 0.3)))
    return drawn, instruction, completion(rewrite, rng)


def caption_pair(scene: Scene, rng: random.Random) -> tuple[str, str]:
    """Returns a prompt with one of the four sides, and the names of a scene's objects from that side on.

    Names have quadrants, and objects as far from the side as each other come in reading order. Prompt and names have
    one vocabulary each.
    """
    side = rng.randrange(len(SIDES))
    items = sorted(scene.items, key=lambda item: item.cell)
    items.sort(key=lambda item: (item.cell % GRID, -(item.cell % GRID), item.cell // GRID, -(item.cell // GRID))[side])
    lexicon = rng.choice(tuple(LEXICONS))
    shapes = dict(zip(SHAPES, LEXICONS[lexicon].shapes, strict=True))
    colors = dict(zip(COLORS, LEXICONS[lexicon].colors, strict=True))
    quadrants = dict(zip(QUADRANTS, EDIT_LEXICONS[lexicon].quadrants, strict=True))
    names = (f"the {colors[i.color]} {shapes[i.shape]} at the {quadrants[quadrant_of(i.cell)]}" for i in items)
    return f"see {rng.choice(tuple(EDIT_LEXICONS.values())).sides[side]}", " , ".join(names)


def misnamed(edit: Edit, scene: Scene, rng: random.Random) -> Edit:
    """Returns the edit with another of the scene's objects taken for the one that is meant."""
    return replace(edit, index=rng.choice([index for index in range(len(scene.items)) if index != edit.index]))


def _batch(size: int, captioned_batches: int, hidden: float, rng: random.Random, number: int) -> Batch:
    """Makes a batch of `size` images, prompts and completions; see `ShapesEditRewrites`."""
    if number < captioned_batches:
        scenes = [source_scene(rng) for _ in range(size)]
        prompts, completions = zip(*(caption_pair(scene, rng) for scene in scenes), strict=True)
        images: list[Any] = [Image.fromarray(render(scene)) for scene in scenes]
    else:
        drawn, prompts, completions = zip(*(edit_rewrite_pair(rng) for _ in range(size)), strict=True)
        images = [None if rng.random() < hidden else Image.fromarray(render(one.source)) for one in drawn]
    return {"images": images, "prompts": list(prompts), "completions": list(completions)}


class ShapesEditRewrites(StreamData):
    """Training stream of the editing miniature's refiner.

    Args:
        batch_size: examples a step.
        captioned_batches: number of first batches that ask for the names of all objects of the image, from one side
            on. A model this small does not find out what it sees from instructions alone.
        hidden: share of the examples whose image is not shown. There the refiner can but guess, which makes
            `see_source: false` a fair comparison: it then still writes as it was taught.
        seed: seed of the stream; null follows `seed_everything`.
        num_workers: number of processes that make batches.
    """

    def __init__(
        self,
        batch_size: int = 64,
        captioned_batches: int = 0,
        hidden: float = 0.1,
        seed: int | None = None,
        num_workers: int = 0,
    ) -> None:
        super().__init__(partial(_batch, batch_size, captioned_batches, hidden), "edit-rewrites", seed, num_workers)
