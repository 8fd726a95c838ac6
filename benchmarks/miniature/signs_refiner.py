"""Measures the refiner for scenes and words: how often a rewrite keeps what was asked for.

python -m benchmarks.miniature.signs_refiner [--model miniature/words_language] [--prompts 384]
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from benchmarks.miniature.models import parse
from datamodules.sample import PromptSample
from lightning_modules.policies.language import LanguagePolicy
from miniature.scenes.paraphrases import ShapesContent
from miniature.scenes.prompts import shapes_prompts
from miniature.signs.prompts import word_prompts
from miniature.signs.world import read_caption


def main() -> None:
    """Prints the shares of greedy and drawn rewrites that keep what was asked for, by set of prompts."""
    args = parse(__doc__, "miniature/words_language")
    refiner = LanguagePolicy(args.model, "{prompt}", max_new_tokens=32, eval_max_new_tokens=32, dtype="float32")
    refiner.load()
    refiner.to(args.device)
    torch.manual_seed(0)
    print("| prompts | kept, greedy | kept, drawn | well-formed, drawn | different of 8 drawn |")
    print("|---" * 5 + "|")
    sets = {
        "words, canonical": word_prompts("val", "val", "canonical", args.prompts, 0),
        "words, unseen": word_prompts("val", "val", "unseen", args.prompts, 0),
        "scenes, canonical": shapes_prompts("val", "val", ("canonical",), args.prompts, 0),
        "scenes, unseen": shapes_prompts("val", "val", ("unseen",), args.prompts, 0),
    }
    for name, samples in sets.items():
        greedy = kept(samples, refiner.rewrite(samples))
        drawn = refiner.refine(samples[:96], 8)
        again = kept([sample for sample in samples[:96] for _ in range(8)], drawn.rewrites)
        different = sum(len(set(drawn.rewrites[i : i + 8])) for i in range(0, 768, 8)) / 96
        formed = sum(map(float, drawn.formatted)) / len(drawn.formatted)
        print(f"| {name} | {greedy:.3f} | {again:.3f} | {formed:.3f} | {different:.1f} |", flush=True)


def kept(samples: Sequence[PromptSample], rewrites: Sequence[str]) -> float:
    """Returns the share of rewrites that ask for the same word, or the same scene, as their prompt."""
    check = ShapesContent()
    right = [
        read_caption(text) == sample.metadata["text"][0] if "text" in sample.metadata else not check.lost(sample, text)
        for sample, text in zip(samples, rewrites, strict=True)
    ]
    return sum(right) / len(right)


if __name__ == "__main__":
    main()
