"""Measures the miniature's base models before any RL against the properties that they were chosen by.

python -m benchmarks.miniature.scenes_base [--model miniature/flow] [--language miniature/language] [--prompts 384]

What it takes is mostly the ten times as many training scenes that tell which words are luckiest.

With `--faithful FOLDER`, the flow model after `pretrain_flow.yaml`, it also says if every ability is there.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from statistics import fmean

import torch

from benchmarks.miniature.models import load_flow, parse
from benchmarks.miniature.signs_refiner import kept
from datamodules.chunks import chunks
from datamodules.sample import PromptSample
from lightning_modules.policies.flow import to_pil
from lightning_modules.policies.flux1 import Flux1Policy
from lightning_modules.policies.language import LanguagePolicy
from lightning_modules.seeding import seed_of
from miniature.scenes.detector import ShapesDetector
from miniature.scenes.paraphrases import content_of
from miniature.scenes.prompts import shapes_prompts
from miniature.scenes.wording import LEXICONS, PREFIXES, STYLES, Lexicon, Style, write, write_with
from miniature.scenes.world import COLORS, RELATIONS, SHAPES, TAGS, Content, elaborate
from rewards.geneval.rules import Detection, judge

DETECTOR = ShapesDetector()
REQUIRED = {
    "least tag after faithful captions": (0.85, 1.0),
    "canonical": (0.4, 0.55),
    "gallery - canonical": (-0.05, 0.05),
    "terse - canonical": (-0.05, 0.05),
    "unseen - canonical": (-0.05, 0.05),
    "detailed - canonical": (-0.05, 0.15),
    "distinct contents of 8 seeds": (1.0, 3.0),
    "greedy rewrites that keep the scene": (0.95, 1.0),
    "wordings among drawn rewrites, of 3": (3.0, 3.0),
    "greedy rewrites - canonical": (-1.0, 0.03),
}
"""Property -> the least and the most that it may be, fixed before the first RL run."""


def main() -> None:
    """Prints the share of correct images by wording and tag, the images' variety, and the properties."""
    args = parse(__doc__, "miniature/flow", language="miniature/language", faithful="")
    policy = load_flow(Flux1Policy, args)
    samples = shapes_prompts("val", "val", ("canonical",), args.prompts, 0)
    asked = [content_of(sample.metadata) for sample in samples]
    rng = random.Random(7)
    print(f"| correct on {args.prompts} prompts | overall | " + " | ".join(TAGS) + " |")
    print("|---" * 8 + "|")
    found: dict[str, float] = {}
    if args.faithful:
        args.model = args.faithful
        by_tag = _row("faithful, canonical", load_flow(Flux1Policy, args), asked, [s.prompt for s in samples])
        found["least tag after faithful captions"] = min(by_tag)
    for style in STYLES:
        words = [s.prompt for s in samples] if style == "canonical" else [_word(c, style, rng) for c in asked]
        share = fmean(_row(style, policy, asked, words))
        found |= {style: share} if style == "canonical" else {f"{style} - canonical": share - found["canonical"]}
    refiner = LanguagePolicy(args.language, "{prompt}", max_new_tokens=32, eval_max_new_tokens=32, dtype="float32")
    refiner.load()
    refiner.to(args.device)
    rewrites = refiner.rewrite(samples)
    found["greedy rewrites - canonical"] = fmean(_row("greedy rewrites", policy, asked, rewrites)) - found["canonical"]
    found["greedy rewrites that keep the scene"] = kept(samples, rewrites)
    lucky = luckiest(policy, 10 * args.prompts)
    in_lucky = [write_with(content, lucky) for content in asked]
    found["luckiest words - canonical"] = fmean(_row("luckiest words", policy, asked, in_lucky)) - found["canonical"]
    found["wordings among drawn rewrites, of 3"] = _reached(refiner, samples[:48])
    few = asked[:48]
    one = [[write(content, "canonical", rng)] * 8 for content in few]
    many = [[_word(content, STYLES[1 + i % 3], rng) for i in range(8)] for content in few]
    for name, prompts in (("eight seeds of one wording", one), ("eight wordings", many)):
        varied = diversity(_draw(policy, [prompt for group in prompts for prompt in group]), few)
        print(f"{name}: " + ", ".join(f"{k} {v:.2f}" for k, v in varied.items()))
        found.setdefault("distinct contents of 8 seeds", varied["distinct contents of 8"])
    print("\n| property | wanted | found | |\n|---|---|---|---|")
    for name, value in found.items():
        wanted = verdict = ""
        if name in REQUIRED:
            least, most = REQUIRED[name]
            wanted, verdict = f"{least:g} to {most:g}", "holds" if least <= value <= most else "FAILS"
        print(f"| {name} | {wanted} | {value:.3f} | {verdict} |")


def _word(content: Content, style: Style, rng: random.Random) -> str:
    return write(elaborate(content, rng) if style == "detailed" else content, style, rng)


def luckiest(policy: Flux1Policy, num: int) -> Lexicon:
    """Finds, for every shape, colour, number and relation, the word in which training scenes succeed most often.

    A word's plural counts as the word, though the world's rule takes it for another one.

    Args:
        policy: flow model that draws.
        num: number of training scenes, each in words that are drawn from the vocabularies of gallery and terse.
    """
    rng = random.Random(11)
    samples = shapes_prompts("train", "train", ("canonical",), num, 0)
    asked = [content_of(sample.metadata) for sample in samples]
    lexicons = [_mixed(rng.choice) for _ in asked]
    prompts = [write_with(content, lexicon) for content, lexicon in zip(asked, lexicons, strict=True)]
    detections = DETECTOR.detect(to_pil(_draw(policy, prompts)))
    right = [judge(d, content.metadata).correct for d, content in zip(detections, asked, strict=True)]
    mean = {tag: fmean(r for r, c in zip(right, asked, strict=True) if c.tag == tag) for tag in TAGS}
    gains: defaultdict[str, list[float]] = defaultdict(list)
    for content, lexicon, success in zip(asked, lexicons, right, strict=True):
        for word in _used(content, lexicon):
            gains[word].append(success - mean[content.tag])
    return _mixed(lambda words: max(words, key=lambda word: fmean(gains[word] or [0.0])))


def _mixed(choose: Callable[[Sequence[str]], str]) -> Lexicon:
    """Makes a vocabulary by choosing between the words that gallery and terse, which are taught mixed, have."""
    known = [LEXICONS["gallery"], LEXICONS["terse"]]

    def each(kind: str) -> tuple[str, ...]:
        return tuple(choose(words) for words in zip(*(getattr(one, kind) for one in known), strict=True))

    return Lexicon(each("shapes"), each("colors"), each("numbers"), each("relations"), known[0].one)


def _used(content: Content, lexicon: Lexicon) -> list[str]:
    words = [lexicon.shapes[SHAPES.index(ask.shape)] for ask in content.asks]
    words += [lexicon.colors[tuple(COLORS).index(ask.color)] for ask in content.asks if ask.color is not None]
    words += [lexicon.numbers[ask.count - 2] for ask in content.asks if ask.count > 1]
    return words + ([lexicon.relations[RELATIONS.index(content.relation)]] if content.relation else [])


def _row(name: str, policy: Flux1Policy, asked: Sequence[Content], prompts: Sequence[str]) -> list[float]:
    """Prints a row of the table and returns its shares by tag; contents are of the six tags in turn."""
    found = DETECTOR.detect(to_pil(_draw(policy, prompts)))
    right = [judge(d, content.metadata).correct for d, content in zip(found, asked, strict=True)]
    by_tag = [fmean(right[i :: len(TAGS)]) for i in range(len(TAGS))]
    print(f"| {name} | {fmean(by_tag):.3f} | " + " | ".join(f"{share:.2f}" for share in by_tag) + " |", flush=True)
    return by_tag


def _reached(refiner: LanguagePolicy, samples: Sequence[PromptSample]) -> float:
    """Counts the wordings, of those that the refiner was taught, which are at least a tenth of 8 drawn rewrites."""
    torch.manual_seed(0)
    drawn = refiner.refine(samples, 8).rewrites
    styles: tuple[Style, ...] = ("gallery", "terse", "detailed")
    return sum(fmean(text.startswith(PREFIXES[style]) for text in drawn) >= 0.1 for style in styles)


def _draw(policy: Flux1Policy, prompts: Sequence[str]) -> torch.Tensor:
    seeds = [seed_of("miniature base", i) for i in range(len(prompts))]
    return policy.generate(list(prompts), seeds).cpu()


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
