"""Measures the editing miniature's refiner: whether it names the right object, and what it owes to the image.

python -m benchmarks.miniature.edits_refiner [--model miniature/edit_language] [--prompts 384]
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence

import torch
from PIL import Image

from datamodules.base import PromptSample
from lightning_modules.policies.vision_language import VisionLanguagePolicy
from miniature.edits.naming import named_correctly
from miniature.edits.wording import CATEGORIES, EDIT_LEXICONS, TINTS, EditStyle, write_edit
from miniature.edits.world import EditExample, example
from miniature.scenes.wording import LEXICONS
from miniature.scenes.world import COLORS, QUADRANTS, SHAPES, render


def main() -> None:
    """Prints two tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="miniature/edit_language")
    parser.add_argument("--prompts", type=int, default=384)
    args = parser.parse_args()
    refiner = VisionLanguagePolicy(
        args.model, "{prompt}", max_pixels=1024, max_new_tokens=24, eval_max_new_tokens=24, dtype="float32"
    )
    refiner.load()
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
            rewrites = [
                text for start in range(0, len(samples), 96) for text in refiner.rewrite(samples[start : start + 96])
            ]
            right = [named_correctly(text, one.metadata) is True for text, one in zip(rewrites, asked, strict=True)]
            kept = [value_kept(text, one) for text, one in zip(rewrites, asked, strict=True)]
            by_category = [share(right[start :: len(CATEGORIES)]) for start in range(len(CATEGORIES))]
            print(f"| {style} | {name} | {share(right)} | {share(kept)} | " + " | ".join(by_category) + " |")
    drawn(refiner, asked[:96], worded(asked[:96], "canonical", sources[:96]))


def worded(asked: Sequence[EditExample], style: EditStyle, images: Sequence[Image.Image | None]) -> list[PromptSample]:
    """The instructions in a style, beside given images."""
    words = random.Random(style)
    return [
        PromptSample(str(i), write_edit(one.edit, one.source, style, words), one.category, one.metadata, image)
        for i, (one, image) in enumerate(zip(asked, images, strict=True))
    ]


@torch.no_grad()
def drawn(refiner: VisionLanguagePolicy, asked: Sequence[EditExample], samples: Sequence[PromptSample]) -> None:
    """Prints the same of rewrites drawn at temperature 1, eight to an instruction, as in training."""
    torch.manual_seed(0)
    completions = refiner.refine(samples, 8)
    texts = completions.rewrites
    right = [named_correctly(text, asked[i // 8].metadata) is True for i, text in enumerate(texts)]
    kept = [value_kept(text, asked[i // 8]) for i, text in enumerate(texts)]
    distinct = [len({*texts[start : start + 8]}) for start in range(0, len(texts), 8)]
    print(f"\n| {len(samples)} x 8 drawn | names the object | value kept | formatted | distinct of 8 |")
    print("|---" * 5 + "|")
    formatted = float(completions.formatted.mean())
    print(f"| | {share(right)} | {share(kept)} | {formatted:.3f} | {sum(distinct) / len(distinct):.2f} |")


def value_kept(rewrite: str, asked: EditExample) -> bool:
    """Whether a rewrite says the new shape, colour, quadrant or ground in some vocabulary, where the style puts it."""
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
    """Of true ones."""
    return f"{sum(values) / len(values):.3f}"


if __name__ == "__main__":
    main()
