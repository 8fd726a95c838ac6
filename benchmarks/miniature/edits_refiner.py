"""Measures the editing miniature's refiner: how often it names the right object, and how much the image helps it.

python -m benchmarks.miniature.edits_refiner [--model miniature/edit_language] [--prompts 384]
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from PIL import Image

from benchmarks.miniature.models import parse
from datamodules.base import PromptSample
from datamodules.chunks import chunks
from lightning_modules.policies.vision_language import VisionLanguagePolicy
from miniature.edits.naming import named_correctly
from miniature.edits.wording import CATEGORIES, EDIT_LEXICONS, TINTS, EditStyle, write_edit
from miniature.edits.world import EditExample, example
from miniature.scenes.wording import LEXICONS
from miniature.scenes.world import COLORS, QUADRANTS, SHAPES, render


def main() -> None:
    """Prints a table of greedy rewrites by wording and image shown, and one of rewrites drawn as in training."""
    args = parse(__doc__, "miniature/edit_language")
    refiner = VisionLanguagePolicy(
        args.model, "{prompt}", max_pixels=1024, max_new_tokens=24, eval_max_new_tokens=24, dtype="float32"
    )
    refiner.load()
    refiner.to(args.device)
    rng = random.Random(7)
    asked = [example(rng, CATEGORIES[i % 6], "val") for i in range(args.prompts)]
    sources: list[Image.Image | None] = [Image.fromarray(render(one.source)) for one in asked]
    shown: dict[str, list[Image.Image | None]] = {
        "the source": sources,
        "hidden": [None] * len(asked),
        "another one": [*sources[6:], *sources[:6]],
    }
    print(
        f"| {args.prompts} greedy rewrites | image | names the object | value kept | " + " | ".join(CATEGORIES) + " |"
    )
    print("|---" * 10 + "|")
    styles: tuple[EditStyle, ...] = ("canonical", "unseen")
    for style in styles:
        for name, images in shown.items():
            samples = worded(asked, style, images)
            rewrites = [text for rows in chunks(len(samples), 96) for text in refiner.rewrite(samples[rows])]
            right = [named_correctly(text, one.metadata) is True for text, one in zip(rewrites, asked, strict=True)]
            kept = [value_kept(text, one) for text, one in zip(rewrites, asked, strict=True)]
            by_category = [share(right[start :: len(CATEGORIES)]) for start in range(len(CATEGORIES))]
            print(f"| {style} | {name} | {share(right)} | {share(kept)} | " + " | ".join(by_category) + " |")
    drawn(refiner, asked[:96], worded(asked[:96], "canonical", sources[:96]))


def worded(asked: Sequence[EditExample], style: EditStyle, images: Sequence[Image.Image | None]) -> list[PromptSample]:
    """Returns samples of the instructions, worded in a style, with these images."""
    words = random.Random(style)
    return [
        PromptSample(str(i), write_edit(one.edit, one.source, style, words), one.category, one.metadata, image)
        for i, (one, image) in enumerate(zip(asked, images, strict=True))
    ]


@torch.no_grad()
def drawn(refiner: VisionLanguagePolicy, asked: Sequence[EditExample], samples: Sequence[PromptSample]) -> None:
    """Prints a table of rewrites drawn at temperature 1, eight to an instruction, as in training."""
    torch.manual_seed(0)
    completions = refiner.refine(samples, 8)
    texts = completions.rewrites
    right = [named_correctly(text, asked[i // 8].metadata) is True for i, text in enumerate(texts)]
    kept = [value_kept(text, asked[i // 8]) for i, text in enumerate(texts)]
    distinct = [len({*texts[rows]}) for rows in chunks(len(texts), 8)]
    print(f"\n| {len(samples)} x 8 drawn | names the object | value kept | formatted | distinct of 8 |")
    print("|---" * 5 + "|")
    formatted = float(completions.formatted.mean())
    print(f"| | {share(right)} | {share(kept)} | {formatted:.3f} | {sum(distinct) / len(distinct):.2f} |")


def value_kept(rewrite: str, asked: EditExample) -> bool:
    """Returns True if a rewrite states the edit's new shape, colour, quadrant or ground, in any vocabulary."""
    category, value = asked.category, asked.edit.value
    if category in ("addition", "removal") or value is None:
        return True
    if category == "env":
        words = [lexicon.tints[TINTS.index(value)] for lexicon in EDIT_LEXICONS.values()]
        return any(word in rewrite.split() for word in words)
    if category == "move":
        words = [lexicon.quadrants[QUADRANTS.index(value)] for lexicon in EDIT_LEXICONS.values()]
    elif category == "swap":
        words = [lexicon.shapes[SHAPES.index(value)] for lexicon in LEXICONS.values()]
    else:
        words = [lexicon.colors[tuple(COLORS).index(value)] for lexicon in LEXICONS.values()]
    return rewrite.endswith(tuple(words))


def share(values: Sequence[bool]) -> str:
    """Formats the share of true values."""
    return f"{sum(values) / len(values):.3f}"


if __name__ == "__main__":
    main()
