"""Measures the flow model that draws words: how well each wording is spelt, and how varied its images are.

python -m benchmarks.miniature.signs_base [--model miniature/words_flow] [--prompts 384]

Scenes, by the same model: `python -m benchmarks.miniature.scenes_base --model miniature/words_flow`.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from PIL import Image

from benchmarks.miniature.models import load_flow, parse
from datamodules.chunks import chunks
from datamodules.sample import PromptSample
from lightning_modules.policies.flow import to_pil
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
    """Prints what the autoencoder loses, a table of rewards by wording, and how varied the images of a word are."""
    args = parse(__doc__, "miniature/words_flow")
    policy = load_flow(Flux1Policy, args)
    for noise in (0.0, 0.1):
        signs, scenes = reconstructed(policy, noise, 1000)
        print(f"of 1000 reconstructions with {noise} noise on the latents: {signs} signs and {scenes} scenes are read")
    rng = random.Random(7)
    asked = [rng.choice(words(LENGTHS[i % 3], "val")) for i in range(args.prompts)]
    print(f"| {args.prompts} words | mean reward | exact | 2 letters | 3 letters | 4 letters |")
    print("|---" * 6 + "|")
    for style in WORD_STYLES:
        rewards = measure(policy, asked, [write_word(word, style, rng) for word in asked])
        by_length = " | ".join(f"{_mean(rewards[i::3]):.2f} / {_exact(rewards[i::3]):.2f}" for i in range(3))
        print(f"| {style} | {_mean(rewards):.3f} | {_exact(rewards):.3f} | {by_length} |", flush=True)
    few = [word for word in asked[:48] for _ in range(8)]
    one = [write_word(word, "canonical", random.Random(i)) for i, word in enumerate(few)]
    many = [write_word(word, KNOWN[i % 2], rng, mix=0.3) for i, word in enumerate(few)]
    for name, prompts in (("eight seeds of one wording", one), ("eight wordings", many)):
        rewards = measure(policy, few, prompts)
        groups = [rewards[rows] for rows in chunks(len(rewards), 8)]
        mixed = sum(len(set(group)) > 1 for group in groups) / len(groups)
        right = sum(0 < sum(reward == 1 for reward in group) < 8 for group in groups) / len(groups)
        print(f"{name}: groups with different rewards {mixed:.2f}, with right and wrong ones {right:.2f}")


def measure(policy: Flux1Policy, asked: Sequence[str], prompts: Sequence[str]) -> list[float]:
    """Returns the OCR rewards, 0..1, of the images that the policy draws from these prompts."""
    seeds = [seed_of("miniature words base", i) for i in range(len(prompts))]
    samples = [PromptSample(str(i), prompts[i], "ocr", {"text": [word]}) for i, word in enumerate(asked)]
    images = to_pil(policy.generate(list(prompts), seeds).cpu())
    return [score.native for score in OCRReward(PixelFontReader(), max_extra=0)(RewardBatch(samples, images))]


@torch.no_grad()
def reconstructed(policy: Flux1Policy, noise: float, num: int) -> tuple[int, int]:
    """Counts the signs, and the scenes, that are read without a fault after a pass through the autoencoder.

    Args:
        policy: whose autoencoder.
        noise: added to the latents, as a share of their standard deviation.
        num: how many signs, and how many scenes, are tried.

    Returns:
        How many signs, and how many scenes, were read right.
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
    read_right = sum([text for text, _ in read] == [sign.letters] for read, sign in zip(lines, signs, strict=True))
    found = [sorted((d.label, d.color) for d in one if d.score > 0.9) for one in ShapesDetector().detect(back[num:])]
    wanted = [sorted((item.shape, item.color) for item in scene.items) for scene in scenes]
    return read_right, sum(a == b for a, b in zip(found, wanted, strict=True))


def _mean(rewards: Sequence[float]) -> float:
    return sum(rewards) / len(rewards)


def _exact(rewards: Sequence[float]) -> float:
    return sum(reward == 1 for reward in rewards) / len(rewards)


if __name__ == "__main__":
    main()
