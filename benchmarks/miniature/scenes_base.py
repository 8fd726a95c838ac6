"""Measures the miniature's base flow model: how often each wording is drawn right, and how varied its images are.

python -m benchmarks.miniature.scenes_base [--model miniature/flow] [--prompts 384]
"""

from __future__ import annotations

import random
from collections import Counter

import torch

from benchmarks.miniature.models import load_flow, parse
from datamodules.chunks import chunks
from lightning_modules.policies.flow import to_pil
from lightning_modules.policies.flux1 import Flux1Policy
from lightning_modules.seeding import seed_of
from miniature.scenes.detector import ShapesDetector
from miniature.scenes.wording import STYLES, Style, write
from miniature.scenes.world import TAGS, Content, contents, elaborate
from rewards.geneval.rules import Detection, judge

DETECTOR = ShapesDetector()


def main() -> None:
    """Prints the share of correct images by wording and tag, and how varied the images of a prompt are."""
    args = parse(__doc__, "miniature/flow")
    policy = load_flow(Flux1Policy, args)
    rng = random.Random(7)
    asked = [rng.choice(contents(TAGS[i % 6], "val")) for i in range(args.prompts)]
    print(f"| correct on {args.prompts} prompts | overall | " + " | ".join(TAGS) + " |")
    print("|---" * 8 + "|")
    for style in STYLES:
        right = _right(policy, asked, [_word(content, style, rng) for content in asked])
        by_tag = [sum(right[i::6]) / len(right[i::6]) for i in range(6)]
        print(f"| {style} | {sum(by_tag) / 6:.3f} | " + " | ".join(f"{share:.2f}" for share in by_tag) + " |")
    few = asked[:48]
    one = [[write(content, "canonical", rng)] * 8 for content in few]
    many = [[_word(content, STYLES[1 + i % 3], rng) for i in range(8)] for content in few]
    for name, prompts in (("eight seeds of one wording", one), ("eight wordings", many)):
        images = _draw(policy, [prompt for group in prompts for prompt in group])
        print(f"{name}: " + ", ".join(f"{k} {v:.2f}" for k, v in diversity(images, few).items()))


def _word(content: Content, style: Style, rng: random.Random) -> str:
    return write(elaborate(content, rng) if style == "detailed" else content, style, rng)


def _draw(policy: Flux1Policy, prompts: list[str]) -> torch.Tensor:
    seeds = [seed_of("miniature base", i) for i in range(len(prompts))]
    return policy.generate(prompts, seeds).cpu()


def _right(policy: Flux1Policy, asked: list[Content], prompts: list[str]) -> list[bool]:
    found = DETECTOR.detect(to_pil(_draw(policy, prompts)))
    return [judge(d, content.metadata).correct for d, content in zip(found, asked, strict=True)]


def diversity(images: torch.Tensor, asked: list[Content]) -> dict[str, float]:
    """Measures how varied the images within groups of 8 are.

    Args:
        images: [8 G, 3, H, W], G groups one after another.
        asked: G contents, one for each group.

    Returns:
        Mean number of distinct contents in a group, mean cosine of two of its mean-free images, and share of groups
        with both right and wrong ones.
    """
    detections = DETECTOR.detect(to_pil(images))
    groups = [detections[rows] for rows in chunks(len(detections), 8)]
    distinct = [len({_contents(found) for found in group}) for group in groups]
    right = [[judge(f, content.metadata).correct for f in g] for g, content in zip(groups, asked, strict=True)]
    flat = images.reshape(len(groups), 8, -1)
    flat = torch.nn.functional.normalize(flat - flat.mean(-1, keepdim=True), dim=-1)
    cosine = (flat @ flat.transpose(1, 2)).sum((1, 2)).sub(8).div(56)
    return {
        "distinct contents of 8": sum(distinct) / len(distinct),
        "cosine": cosine.mean().item(),
        "groups with mixed success": sum(0 < sum(r) < 8 for r in right) / len(right),
    }


def _contents(found: list[Detection]) -> frozenset[tuple[tuple[str, str | None], int]]:
    return frozenset(Counter((d.label, d.color) for d in found if d.score > 0.3).items())


if __name__ == "__main__":
    main()
