"""MARIO-Eval's numbers: against literal answers, a slow loop on random marks, and the real engine."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from callbacks.ocr import OCRWordsBenchmark
from callbacks.scores.prompt_scores import PromptScores
from datamodules.sample import PromptSample
from rewards.ocr_engines import Line


class Reader:
    """Reads what it was told by the image's red value; 255 breaks it."""

    version = "told"

    def __init__(self, *pages: list[str]) -> None:
        self.pages = pages

    def read(self, images: Sequence[Image.Image]) -> list[list[Line]]:
        (image,) = images
        red = image.getpixel((0, 0))[0]
        if red == 255:
            raise RuntimeError("engine broke")
        return [[(text, 0.9) for text in self.pages[red]]]


def make_image(red: int) -> Image.Image:
    return Image.new("RGB", (4, 4), (red, 0, 0))


def sample(name: str, *text: str) -> PromptSample:
    return PromptSample(name, f"a sign {text}", "ocr", {"text": list(text)})


def test_literal_scores() -> None:
    """P 1, 1/2, 0 and R 1/3, 1, 0: means 1/2 and 4/9, F of the means 8/17 (the images' own would average 7/18)."""
    benchmark = OCRWordsBenchmark(Reader(["A"], ["a x"], []))
    samples = [sample("0", "a b", "C"), sample("1", "a"), sample("2", "b"), sample("3", "b")]
    values = benchmark.score(samples, [make_image(0), make_image(1), make_image(2), make_image(255)])
    assert values == [
        {"precision": 1.0, "recall": 1 / 3, "accuracy": 0.0},
        {"precision": 0.5, "recall": 1.0, "accuracy": 0.0},
        {"precision": 0.0, "recall": 0.0, "accuracy": 0.0},
        {},  # the engine broke: not a 0
    ]
    metric = PromptScores([s.id for s in samples], ["ocr"] * 4, benchmark.columns)
    metric.update([s.id for s in samples], values)
    expected = {"precision": 0.5, "recall": 4 / 9, "f": 8 / 17, "accuracy": 0.0, "invalid_share": 0.25, "images": 4.0}
    assert benchmark.scores(metric.table()) == pytest.approx(expected, abs=1e-12)
    assert benchmark.headline in expected and benchmark.key("tmdb") == "tmdb/words"


def test_nothing_right_is_0_and_nothing_read_is_missing() -> None:
    benchmark = OCRWordsBenchmark(Reader(["x"]))
    for image, f in ((make_image(0), 0.0), (make_image(255), math.nan)):
        metric = PromptScores(["0"], ["ocr"], benchmark.columns)
        metric.update(["0"], benchmark.score([sample("0", "a")], [image]))
        assert benchmark.scores(metric.table())["f"] == pytest.approx(f, nan_ok=True)


def test_summary_equals_a_slow_loop_for_every_weighting() -> None:
    rng = np.random.default_rng(0)
    benchmark = OCRWordsBenchmark(Reader())
    prompts = [f"p{i}" for i in range(9)]
    images = [
        (str(prompt), None if rng.random() < 0.2 else {c: float(rng.random()) for c in benchmark.columns})
        for prompt in rng.choice(prompts, 40)
    ]
    metric = PromptScores(prompts, ["ocr"] * 9, benchmark.columns)
    metric.update([name for name, _ in images], [values or {} for _, values in images])
    weights = rng.integers(0, 4, (25, 9)).astype(float)
    found = benchmark.summarize(metric.table(), torch.from_numpy(weights))
    for replicate, weight in enumerate(weights):
        # each image as often as its prompt was drawn
        drawn = [values for name, values in images for _ in range(int(weight[prompts.index(name)]))]
        read = [values for values in drawn if values is not None]
        p, r, a = (np.mean([values[column] for values in read]) for column in benchmark.columns)
        expected = {"precision": p, "recall": r, "accuracy": a, "f": 2 / (1 / p + 1 / r)}
        expected["invalid_share"] = (len(drawn) - len(read)) / len(drawn)
        for name, value in expected.items():
            assert float(found[name][replicate]) == pytest.approx(value, abs=1e-12), name


@pytest.mark.slow
def test_the_real_engine_reads_a_drawn_sign() -> None:
    pytest.importorskip("rapidocr")
    sign = Image.new("RGB", (512, 256), "white")
    ImageDraw.Draw(sign).text((256, 128), "HARBOUR", fill="black", anchor="mm", font_size=72)
    (values,) = OCRWordsBenchmark().score([sample("0", "Harbour")], [sign])
    assert values == {"precision": 1.0, "recall": 1.0, "accuracy": 1.0}


def test_a_prompt_without_text_is_named() -> None:
    with pytest.raises(ValueError, match=r"the prompt '7' has the metadata text=None"):
        OCRWordsBenchmark(Reader(["a"])).score([PromptSample("7", "p", "t", {})], [make_image(0)])
