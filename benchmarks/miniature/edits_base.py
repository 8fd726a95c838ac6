"""Measures the editing miniature's base flow model: how often each wording of an edit is followed, by category.

python -m benchmarks.miniature.edits_base [--model miniature/edit_flow] [--edits 384]
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from PIL import Image

from benchmarks.miniature.models import load_flow, parse
from datamodules.chunks import chunks
from datamodules.sample import PromptSample
from lightning_modules.policies.flow import to_pil
from lightning_modules.policies.flux1_kontext import KontextPolicy
from lightning_modules.seeding import seed_of
from miniature.edits.reward import ShapesEditReward
from miniature.edits.wording import CATEGORIES, EDIT_STYLES, write_edit
from miniature.edits.world import EditExample, example
from miniature.scenes.world import render
from rewards.base import RewardBatch, Score


def main() -> None:
    """Prints a table of strict and native scores by wording and category, and the share of groups that can teach."""
    args = parse(__doc__, "miniature/edit_flow", "edits")
    policy = load_flow(KontextPolicy, args, auto_resize=False)
    rng = random.Random(7)
    asked = [example(rng, CATEGORIES[i % 6], "val") for i in range(args.edits)]
    texts: dict[str, list[str]] = {}
    for style in EDIT_STYLES:
        texts[style] = [write_edit(one.edit, one.source, style, rng) for one in asked]
    texts["another edit's"] = rng.sample(texts["canonical"], len(asked))
    texts["no text"] = [""] * len(asked)
    print(f"| strict / native, {args.edits} edits | overall | followed | kept | " + " | ".join(CATEGORIES) + " |")
    print("|---" * 10 + "|")
    for name, instructions in texts.items():
        scores = measure(policy, asked, instructions)
        followed, kept = (sum(s.detail[key] for s in scores) / len(scores) for key in ("followed", "kept"))
        by_category = " | ".join(_mean(scores[i::6]) for i in range(6))
        print(f"| {name} | {_mean(scores)} | {followed:.2f} | {kept:.2f} | {by_category} |", flush=True)
    groups = measure(
        policy,
        [one for one in asked[:48] for _ in range(8)],
        [text for text in texts["canonical"][:48] for _ in range(8)],
    )
    rights = [sum(score.detail["strict"] for score in groups[rows]) for rows in chunks(len(groups), 8)]
    print(f"groups of 8 seeds (canonical) with right and wrong ones: {sum(0 < r < 8 for r in rights) / 48:.2f}")


def measure(policy: KontextPolicy, asked: Sequence[EditExample], texts: Sequence[str]) -> list[Score]:
    """Scores the images that the policy draws from these texts and the edits' source images."""
    sources = [Image.fromarray(render(one.source)) for one in asked]
    samples = [
        PromptSample(one.id, one.instruction, one.category, one.metadata, image)
        for one, image in zip(asked, sources, strict=True)
    ]
    seeds = [seed_of("miniature edit base", i) for i in range(len(asked))]
    images = []
    for part in chunks(len(asked), 96):
        images += to_pil(policy.generate(texts[part], seeds[part], images=sources[part]).cpu())
    return ShapesEditReward()(RewardBatch(samples, images))


def _mean(scores: Sequence[Score]) -> str:
    strict = sum(score.detail["strict"] for score in scores) / len(scores)
    return f"{strict:.2f} / {sum(score.native for score in scores) / len(scores):.2f}"


if __name__ == "__main__":
    main()
