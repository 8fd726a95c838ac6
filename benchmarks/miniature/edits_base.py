"""Measures the editing miniature's base flow model: how often each wording of an edit is followed, by category.

python -m benchmarks.miniature.edits_base [--model miniature/edit_flow] [--edits 384]
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence

from PIL import Image

from datamodules.sample import PromptSample
from lightning_modules.policies.flow import Sampling, to_pil
from lightning_modules.policies.flux1_kontext import KontextPolicy
from lightning_modules.seeding import seed_of
from miniature.edits.reward import ShapesEditReward
from miniature.edits.wording import CATEGORIES, EDIT_STYLES, write_edit
from miniature.edits.world import EditExample, example
from miniature.scenes.world import render
from rewards.base import RewardBatch, Score


def main() -> None:
    """Prints one table: strict / native."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="miniature/edit_flow")
    parser.add_argument("--edits", type=int, default=384)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    policy = KontextPolicy(
        args.model,
        Sampling(8, 0),
        auto_resize=False,
        height=32,
        width=32,
        max_sequence_length=18,
        learning_rate=None,
        dtype="float32",
    )
    policy.load()
    policy.to(args.device)
    rng = random.Random(7)
    asked = [example(rng, CATEGORIES[i % 6], "val") for i in range(args.edits)]
    texts: dict[str, list[str]] = {}
    for style in EDIT_STYLES:
        texts[style] = [write_edit(one.edit, one.source, style, rng) for one in asked]
    texts["another edit's"] = rng.sample(texts["canonical"], len(asked))
    texts["no text"] = [""] * len(asked)
    print(f"| strict / native, {args.edits} edits | overall | followed | kept | " + " | ".join(CATEGORIES) + " |")
    print("|---" * 10 + "|")
    for name, told in texts.items():
        scores = measure(policy, asked, told)
        followed, kept = (sum(s.detail[key] for s in scores) / len(scores) for key in ("followed", "kept"))
        marks = " | ".join(_mean(scores[i::6]) for i in range(6))
        print(f"| {name} | {_mean(scores)} | {followed:.2f} | {kept:.2f} | {marks} |", flush=True)
    groups = measure(
        policy,
        [one for one in asked[:48] for _ in range(8)],
        [text for text in texts["canonical"][:48] for _ in range(8)],
    )
    rights = [sum(score.detail["strict"] for score in groups[i : i + 8]) for i in range(0, len(groups), 8)]
    print(f"groups of 8 seeds (canonical) with right and wrong ones: {sum(0 < r < 8 for r in rights) / 48:.2f}")


def measure(policy: KontextPolicy, asked: Sequence[EditExample], texts: Sequence[str]) -> list[Score]:
    """Marks of the images that the policy draws when told these texts."""
    sources = [Image.fromarray(render(one.source)) for one in asked]
    samples = [
        PromptSample(one.id, one.instruction, one.category, one.metadata, image)
        for one, image in zip(asked, sources, strict=True)
    ]
    seeds = [seed_of("miniature edit base", i) for i in range(len(asked))]
    images = []
    for i in range(0, len(asked), 96):
        part = slice(i, i + 96)
        images += to_pil(policy.generate(texts[part], seeds[part], images=sources[part]).cpu())
    return ShapesEditReward()(RewardBatch(samples, images))


def _mean(scores: Sequence[Score]) -> str:
    strict = sum(score.detail["strict"] for score in scores) / len(scores)
    return f"{strict:.2f} / {sum(score.native for score in scores) / len(scores):.2f}"


if __name__ == "__main__":
    main()
