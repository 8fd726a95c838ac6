"""The reader of the pixel font: clean signs, noise, autoencoders, scenes, and the OCR reward on top of it."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from datamodules.sample import PromptSample
from lightning_modules.policies.flow import to_pil
from miniature.scenes.world import FEW_SHAPES, GROUNDS, Item, Scene, random_scene, render
from miniature.signs.font import ALPHABET
from miniature.signs.reader import PixelFontReader, ink, letter_fits
from miniature.signs.world import Sign, all_words, random_sign, render_sign
from miniature.streams import to_tensor
from rewards.base import RewardBatch
from rewards.ocr import OCRReward
from rewards.ocr_engines import TextReader

ROOT = Path(__file__).parents[3]


def make_image(*signs: Sign) -> Image.Image:
    """The signs, one over the other, on the first one's ground."""
    array = render_sign(signs[0]).copy()
    for sign in signs[1:]:
        array[sign.row * 8 : sign.row * 8 + 8] = render_sign(sign)[sign.row * 8 : sign.row * 8 + 8]
    return Image.fromarray(array)


def test_every_sign_is_read() -> None:
    """All pairs, and a sample of the longer words; each in one line, sure of a letter whose pixels all agree."""
    rng = random.Random(0)
    drawn = [*all_words(2), *rng.sample(all_words(3), 200), *rng.sample(all_words(4), 200)]
    colors = ("red", "green", "blue", "yellow", "purple", "black")
    signs = [Sign(word, i % 4, colors[i % 6], i // 6 % 4) for i, word in enumerate(drawn)]
    reader = PixelFontReader()
    assert isinstance(reader, TextReader)
    for sign, lines in zip(signs, reader.read([make_image(sign) for sign in signs]), strict=True):
        assert lines == [(sign.letters, pytest.approx(1.0))]


def test_rows_are_lines_from_top_to_bottom() -> None:
    (lines,) = PixelFontReader().read(
        [make_image(Sign("stop", 2, "red"), Sign("ly", 0, "blue"), Sign("c", 3, "black"))]
    )
    assert [text for text, _ in lines] == ["ly", "stop", "c"]


def test_ink_is_the_share_of_paint() -> None:
    """Seven eighths of the way from the ground (244, 244, 240) to black (30, 30, 34) are that much ink."""
    array = np.full((32, 32, 3), GROUNDS[0], dtype=np.float64)
    array[0, 0] = (56.75, 56.75, 59.75)
    array[0, 1] = (30, 30, 34)
    array[0, 2] = (214, 40, 40)
    covered = ink(array)
    assert covered[0, :3] == pytest.approx([0.875, 1, 1], abs=1e-6) and covered.sum() == pytest.approx(2.875)


def test_fit_is_intersection_over_union() -> None:
    """'t' has 18 pixels. Its two lowest rows gone, 14 of 18 are left; a 't' a pixel too low fits as well as one."""
    array = render_sign(Sign("t", 0, "black")).astype(np.float64)
    t = ALPHABET.index("t")
    assert letter_fits(array)[0, 1, t] == pytest.approx(1)
    moved = np.roll(array, 1, axis=0)
    assert letter_fits(moved)[0, 1, t] == pytest.approx(1)
    array[5:7, 8:16] = GROUNDS[0]
    assert letter_fits(array)[0, 1, t] == pytest.approx(14 / 18)
    assert letter_fits(np.full((32, 32, 3), 244.0)).max() == 0


def test_unsure_letters_are_left_out() -> None:
    """Of the same 't' a fit of 14 / 18 = 0.78 is enough at 0.75 and not at 0.8."""
    array = render_sign(Sign("to", 1, "blue")).copy()
    array[13:15, 8:16] = GROUNDS[0]
    image = Image.fromarray(array)
    assert PixelFontReader(0.75).read([image]) == [[("to", pytest.approx((14 / 18 + 1) / 2))]]
    assert PixelFontReader(0.8).read([image]) == [[("o", pytest.approx(1))]]


def test_noise() -> None:
    """Gaussian noise of 25 of 255 harms nothing; at 200 hardly a word is left."""
    rng, noise = random.Random(1), np.random.default_rng(0)
    signs = [random_sign(rng) for _ in range(100)]

    def read_at(level: float) -> int:
        arrays = [(render_sign(sign) + noise.normal(0, level, (32, 32, 3))).clip(0, 255) for sign in signs]
        pages = PixelFontReader().read([Image.fromarray(array.astype(np.uint8)) for array in arrays])
        return sum([text for text, _ in lines] == [sign.letters] for sign, lines in zip(signs, pages, strict=True))

    assert read_at(25) == 100
    assert read_at(200) < 10


def test_scenes_and_blank_images_have_no_text() -> None:
    rng = random.Random(0)
    scenes = [random_scene(rng) for _ in range(2000)]  # a ring is an o, but these models have not seen one
    few = [scene for scene in scenes if all(item.shape in FEW_SHAPES for item in scene.items)]
    images = [Image.fromarray(render(scene)) for scene in few[:300]]
    images += [Image.fromarray(render(Scene((), ground))) for ground in range(4)]
    images += [Image.fromarray(render(Scene((Item("square", "black", cell),)))) for cell in range(16)]
    assert PixelFontReader().read(images) == [[]] * 320


def test_the_shipped_autoencoder_keeps_letters() -> None:
    vae = AutoencoderKL.from_pretrained(ROOT / "miniature/words_flow/vae").eval()
    rng = random.Random(2)
    signs = [random_sign(rng) for _ in range(100)]
    with torch.no_grad():
        latents = vae.encode(to_tensor([render_sign(sign) for sign in signs])).latent_dist.mode()
        back = to_pil(vae.decode(latents).sample / 2 + 0.5)
    pages = PixelFontReader().read(back)
    assert sum([t for t, _ in lines] == [sign.letters] for sign, lines in zip(signs, pages, strict=True)) >= 99


@pytest.mark.parametrize(
    ("letters", "published", "exact"),
    [("cup", 1.0, 1.0), ("cu", 2 / 3, 2 / 3), ("cep", 2 / 3, 2 / 3), ("cupp", 1.0, 2 / 3), ("ucp", 1 / 3, 1 / 3)],
)
def test_the_ocr_reward_reads_with_it(letters: str, published: float, exact: float) -> None:
    """Wanted: cup. One letter missing, wrong or doubled is one edit of three; two swapped are two."""
    pytest.importorskip("rapidfuzz")
    sample = PromptSample("0", 'a sign that says " c u p "', "ocr", {"text": ["cup"]})
    batch = RewardBatch([sample], [make_image(Sign(letters, 1, "green"))])
    (score,) = OCRReward(PixelFontReader())(batch)
    assert score.native == pytest.approx(published) and score.detail["recognized"] == [letters]
    (score,) = OCRReward(PixelFontReader(), max_extra=0)(batch)
    assert score.rl == pytest.approx(exact)


def test_settings() -> None:
    assert PixelFontReader(0.6).version != PixelFontReader(0.7).version
    with pytest.raises(ValueError, match=r"min_confidence=1\.5, use 0 to 1"):
        PixelFontReader(1.5)
    with pytest.raises(ValueError, match=r"image of \(64, 32\) pixels, it reads 32 x 32 alone"):
        PixelFontReader().read([Image.new("RGB", (64, 32))])
