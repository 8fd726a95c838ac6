"""Measures the flow model that draws words: how well each wording is spelt, and how varied its images are.

python -m benchmarks.miniature.signs_base [--model miniature/words_flow] [--prompts 384]

Scenes, by the same model: `python -m benchmarks.miniature.scenes_base --model miniature/words_flow`.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence

import torch
from PIL import Image

from datamodules.chunks import chunks
from datamodules.sample import PromptSample
from lightning_modules.policies.flow import Sampling, to_pil
from lightning_modules.policies.flux1 import Flux1Policy
from lightning_modules.seeding import seed_of
from miniature.scenes.detector import ShapesDetector
from miniature.scenes.world import random_scene, render
from miniature.signs.reader import PixelFontReader
from miniature.signs.world import LENGTHS, WORD_STYLES, WordStyle, random_sign, render_sign, words, write_word
from rewards.base import RewardBatch
from rewards.ocr import OCRReward

KNOWN: tuple[WordStyle, ...] = ("gallery", "terse")


def main() -> None:
    """Prints two tables and two lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="miniature/words_flow")
    parser.add_argument("--prompts", type=int, default=384)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    policy = Flux1Policy(
        args.model, Sampling(8, 0), height=32, width=32, max_sequence_length=18, learning_rate=None, dtype="float32"
    )
    policy.load()
    policy.to(args.device)
    for noise in (0.0, 0.1):
        signs, scenes = reconstructed(policy, noise, 1000)
        print(f"of 1000 reconstructions with {noise} noise on the latents: {signs} signs and {scenes} scenes are read")
    rng = random.Random(7)
    asked = [rng.choice(words(LENGTHS[i % 3], "val")) for i in range(args.prompts)]
    print(f"| {args.prompts} words | mean reward | exact | 2 letters | 3 letters | 4 letters |")
    print("|---" * 6 + "|")
    for style in WORD_STYLES:
        marks = measure(policy, asked, [write_word(word, style, rng) for word in asked])
        by_length = " | ".join(f"{_mean(marks[i::3]):.2f} / {_exact(marks[i::3]):.2f}" for i in range(3))
        print(f"| {style} | {_mean(marks):.3f} | {_exact(marks):.3f} | {by_length} |", flush=True)
    few = [word for word in asked[:48] for _ in range(8)]
    one = [write_word(word, "canonical", random.Random(i)) for i, word in enumerate(few)]
    many = [write_word(word, KNOWN[i % 2], rng, mix=0.3) for i, word in enumerate(few)]
    for name, prompts in (("eight seeds of one wording", one), ("eight wordings", many)):
        marks = measure(policy, few, prompts)
        groups = [marks[rows] for rows in chunks(len(marks), 8)]
        mixed = sum(len(set(group)) > 1 for group in groups) / len(groups)
        right = sum(0 < sum(mark == 1 for mark in group) < 8 for group in groups) / len(groups)
        print(f"{name}: groups with different rewards {mixed:.2f}, with right and wrong ones {right:.2f}")


def measure(policy: Flux1Policy, asked: Sequence[str], prompts: Sequence[str]) -> list[float]:
    """OCR rewards of the images that the policy draws."""
    seeds = [seed_of("miniature words base", i) for i in range(len(prompts))]
    samples = [PromptSample(str(i), prompts[i], "ocr", {"text": [word]}) for i, word in enumerate(asked)]
    images = to_pil(policy.generate(list(prompts), seeds).cpu())
    return [score.native for score in OCRReward(PixelFontReader(), max_extra=0)(RewardBatch(samples, images))]


@torch.no_grad()
def reconstructed(policy: Flux1Policy, noise: float, num: int) -> tuple[int, int]:
    """How many signs, and how many scenes, are read without a fault after a pass through the autoencoder.

    Args:
        policy: whose autoencoder.
        noise: added to the latents, as a share of their standard deviation.
        num: of each.
    """
    rng, generator = random.Random(3), torch.Generator().manual_seed(3)
    signs, scenes = [random_sign(rng) for _ in range(num)], [random_scene(rng) for _ in range(num)]
    drawn = [render_sign(sign) for sign in signs] + [render(scene) for scene in scenes]
    images = torch.stack([torch.from_numpy(one.copy()).permute(2, 0, 1).float() / 127.5 - 1 for one in drawn])
    vae = policy.pipe.vae
    back: list[Image.Image] = []
    for part in images.split(200):
        latents = vae.encode(part.to(vae.device)).latent_dist.mode().cpu()
        latents += noise * torch.randn(latents.shape, generator=generator) * latents.std()
        back += to_pil(vae.decode(latents.to(vae.device)).sample.cpu() / 2 + 0.5)
    lines = PixelFontReader().read(back[:num])
    told = sum([text for text, _ in read] == [sign.letters] for read, sign in zip(lines, signs, strict=True))
    found = [sorted((d.label, d.color) for d in one if d.score > 0.9) for one in ShapesDetector().detect(back[num:])]
    wanted = [sorted((item.shape, item.color) for item in scene.items) for scene in scenes]
    return told, sum(a == b for a, b in zip(found, wanted, strict=True))


def _mean(marks: Sequence[float]) -> float:
    return sum(marks) / len(marks)


def _exact(marks: Sequence[float]) -> float:
    return sum(mark == 1 for mark in marks) / len(marks)


if __name__ == "__main__":
    main()
