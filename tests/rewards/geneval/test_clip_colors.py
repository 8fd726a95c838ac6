"""The colour classifier on a tiny random CLIP, loaded through the real path; images checked pixel by pixel."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from datamodules.geneval_names import COLORS
from rewards.geneval.clip_colors import TEMPLATES, ClipColors, clip_pixels, cut_out

SIZE = 32
MEAN, STD = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])


def make_image(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture
def classifier(tiny_clip: Path) -> ClipColors:
    return ClipColors(str(tiny_clip), device="cpu")


def test_text_ensemble_against_prompts_one_by_one(classifier: ClipColors, tiny_clip: Path) -> None:
    """Normalise, average three templates, normalise again: in numpy, from unpadded prompts of one row each."""
    model, tokenizer = (
        CLIPModel.from_pretrained(tiny_clip).eval().requires_grad_(False),
        CLIPTokenizer.from_pretrained(tiny_clip),
    )
    expected = []
    for color in ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white"):
        units = []
        for text in (
            f"a photo of a {color} hot dog",
            f"a photo of a {color}-colored hot dog",
            f"a photo of a {color} object",
        ):
            hidden = model.text_model(**tokenizer([text], return_tensors="pt")).pooler_output
            embedding = (hidden @ model.text_projection.weight.T).double().numpy()[0]
            units.append(embedding / np.sqrt((embedding**2).sum()))
        mean = sum(units) / 3
        expected.append(mean / np.sqrt((mean**2).sum()))
    ours = classifier.text_embeddings("hot dog").numpy()
    np.testing.assert_allclose(ours, expected, atol=1e-6)
    assert np.abs(ours - classifier.text_embeddings("bus").numpy()).max() > 1e-3  # the label matters
    assert len(COLORS) == 10 and len(TEMPLATES) == 3


def test_cut_out_pixel_by_pixel() -> None:
    """A 5 x 4 image, an L-shaped mask; outside it #999999 = 153, inside untouched; the far edge is exclusive."""
    image = Image.fromarray(np.arange(60, dtype=np.uint8).reshape(4, 5, 3))
    mask = np.zeros((4, 5), dtype=bool)
    mask[1, 2] = mask[2, 2] = mask[2, 3] = True
    crop = np.asarray(cut_out(image, mask, (2.0, 1.0, 4.0, 3.0), "#999999"))
    grey = [153, 153, 153]
    # Pixel (row, column) holds 15 * row + 3 * column and the next two numbers.
    assert crop.tolist() == [[[21, 22, 23], grey], [[36, 37, 38], [39, 40, 41]]]


def test_cut_out_takes_any_mode() -> None:
    image = Image.new("RGBA", (3, 2), (10, 20, 30, 0))
    mask = np.array([[True, False, True], [False, True, False]])
    assert np.asarray(cut_out(image, mask, (0, 0, 3, 2), "#ff0000")).tolist() == [
        [[10, 20, 30], [255, 0, 0], [10, 20, 30]],
        [[255, 0, 0], [10, 20, 30], [255, 0, 0]],
    ]


@pytest.mark.parametrize("size", [(224, 224), (300, 224), (100, 53), (59, 400), (10, 10), (640, 480)])
def test_transform_against_transformers(size: tuple[int, int]) -> None:
    """The library's CLIP image processor, where the surplus over the crop is even (see the test below)."""
    image = make_image(*size)
    expected = CLIPImageProcessorPil()(image, return_tensors="pt").pixel_values[0]
    torch.testing.assert_close(clip_pixels(image, 224), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("size", "left", "top"), [((35, 32), 2, 0), ((32, 33), 0, 0), ((39, 32), 4, 0), ((32, 37), 0, 2)]
)
def test_crop_rounds_half_to_even(size: tuple[int, int], left: int, top: int) -> None:
    """Surpluses of 3, 1, 7 and 5 pixels: 1.5 -> 2, 0.5 -> 0, 3.5 -> 4, 2.5 -> 2, as Python (and torchvision) rounds."""
    image = make_image(*size)
    array = np.asarray(image)[top : top + SIZE, left : left + SIZE] / 255
    expected = ((array - MEAN) / STD).transpose(2, 0, 1)
    np.testing.assert_allclose(clip_pixels(image, SIZE).numpy(), expected, atol=1e-5)


def test_longer_edge_is_cut_not_rounded() -> None:
    """47 x 64 to the short edge 32: 64 * 32 / 47 = 43.57, so 43 rows, of which rows round(5.5) = 6 .. 37 stay."""
    image = make_image(47, 64)
    resized = np.asarray(image.resize((32, 43), Image.Resampling.BICUBIC))[6:38] / 255
    np.testing.assert_allclose(clip_pixels(image, 32).numpy(), ((resized - MEAN) / STD).transpose(2, 0, 1), atol=1e-5)


def test_what_the_network_sees(classifier: ClipColors) -> None:
    """Two objects of 32 x 32 and 16 x 16 pixels: the first reaches the network unscaled, masked and normalised."""
    image = make_image(80, 60)
    circle = np.hypot(*np.mgrid[-15.5:16, -15.5:16]) < 14
    masks = [np.zeros((60, 80), dtype=bool), np.zeros((60, 80), dtype=bool)]
    masks[0][20:52, 40:72] = circle
    masks[1][4:20, 8:24] = True
    classifier.load()
    seen: list[torch.Tensor] = []
    hook = classifier._network.vision_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["pixel_values"]), with_kwargs=True
    )
    classifier.classify(image, masks, [(40.0, 20.0, 72.0, 52.0), (8.0, 4.0, 24.0, 20.0)], "dog")
    hook.remove()
    (pixels,) = seen
    assert pixels.shape == (2, 3, SIZE, SIZE)
    first = np.where(circle[..., None], np.asarray(image)[20:52, 40:72], 153) / 255
    np.testing.assert_allclose(pixels[0].numpy(), ((first - MEAN) / STD).transpose(2, 0, 1), atol=1e-5)
    second = np.asarray(image.crop((8, 4, 24, 20)).resize((32, 32), Image.Resampling.BICUBIC)) / 255
    np.testing.assert_allclose(pixels[1].numpy(), ((second - MEAN) / STD).transpose(2, 0, 1), atol=1e-5)


def test_nearest_text_wins_in_every_batch_size(classifier: ClipColors, tiny_clip: Path) -> None:
    """Argmax of the cosine, from the model's parts; batches of 16 and of 2 agree; the names are not all the same."""
    image = make_image(60, 40, seed=1)
    rng = np.random.default_rng(2)
    masks = [np.zeros((40, 60), dtype=bool) for _ in range(7)]
    boxes = []
    for index, mask in enumerate(masks):
        mask[5 : 12 + 3 * index, 4 * index : 4 * index + 20] = rng.random((7 + 3 * index, 20)) < 0.9 - 0.1 * index
        rows, columns = np.nonzero(mask)
        boxes.append((columns.min(), rows.min(), columns.max() + 1.0, rows.max() + 1.0))
    model = CLIPModel.from_pretrained(tiny_clip).eval().requires_grad_(False)
    texts = classifier.text_embeddings("tie").double().numpy()
    expected = []
    for mask, box in zip(masks, boxes, strict=True):
        painted = np.where(mask[..., None], np.asarray(image), 153).astype(np.uint8)
        crop = clip_pixels(Image.fromarray(painted).crop(tuple(int(edge) for edge in box)), SIZE)  # type: ignore[arg-type]
        hidden = model.vision_model(pixel_values=crop[None]).pooler_output
        features = (hidden @ model.visual_projection.weight.T).double().numpy()[0]
        cosines = [features @ text / np.linalg.norm(features) for text in texts]
        expected.append(COLORS[int(np.argmax(cosines))])
    assert classifier.classify(image, masks, boxes, "tie") == expected
    assert ClipColors(str(tiny_clip), batch_size=2, device="cpu").classify(image, masks, boxes, "tie") == expected
    assert len(set(expected)) > 1


def test_no_objects(classifier: ClipColors) -> None:
    assert classifier.classify(make_image(8, 8), [], [], "dog") == []


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"background": "greyish"}, "background='greyish', use a colour such as '#999999'"),
        ({"batch_size": 0}, "batch_size=0, use at least 1"),
    ],
)
def test_configuration_is_checked_at_construction(kwargs: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClipColors(**kwargs)  # type: ignore[arg-type]


def test_missing_folder_is_named() -> None:
    with pytest.raises(ValueError, match="there is no folder tests/no_such_model"):
        ClipColors("tests/no_such_model").load()
