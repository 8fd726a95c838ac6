"""Similarities against loops in numpy, pixels against the training log's number, shapes against what was asked."""

from __future__ import annotations

import random
from pathlib import Path

import jsonargparse
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from lightning_modules.step_metrics import group_similarity
from miniature.scenes.encoder import ShapesEncoder
from miniature.scenes.wording import STYLES, write, write_loosely
from miniature.scenes.world import (
    COLORS,
    SHAPES,
    TAGS,
    Content,
    Item,
    Scene,
    all_contents,
    elaborate,
    random_scene,
    render,
)
from rewards.clip import ClipEncoder
from rewards.encoders import ContentEncoder, Encoder, PixelEncoder, TextEncoder, image_similarity, text_similarity
from tests.rewards.tiny_clip import noise, save_model, save_processor

THINGS = [(shape, color) for shape in SHAPES for color in COLORS]


def test_cosines_by_hand() -> None:
    same, across = torch.tensor([[0.6, 0.8]] * 3), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert image_similarity(same).item() == pytest.approx(1)
    assert image_similarity(across).item() == 0
    # Pairs: 0.6, 0 and 0.8.
    three = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
    assert image_similarity(three).item() == pytest.approx((0.6 + 0 + 0.8) / 3)
    opposite = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    assert image_similarity(torch.stack([across, opposite])).tolist() == [0, -1]
    assert text_similarity(three, torch.tensor([1.0, 0.0])).item() == pytest.approx((1 + 0.6 + 0) / 3)
    assert text_similarity(torch.stack([across, opposite]), across).tolist() == [0.5, 0]


def test_an_embedding_of_zeros_has_no_likeness() -> None:
    """It must not count as one less than the group's size on the diagonal."""
    assert image_similarity(torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 0.0]])).item() == pytest.approx(1 / 3)


@given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.integers(2, 6), st.integers(1, 5))
def test_random_embeddings_against_loops(seed: int, groups: int, num: int, size: int) -> None:
    rng = np.random.default_rng(seed)
    images = rng.normal(size=(groups, num, size))
    images /= np.linalg.norm(images, axis=-1, keepdims=True)
    texts = rng.normal(size=(groups, size))
    texts /= np.linalg.norm(texts, axis=-1, keepdims=True)
    within = [np.mean([a @ b for i, a in enumerate(group) for j, b in enumerate(group) if i != j]) for group in images]
    to_text = [np.mean([image @ text for image in group]) for group, text in zip(images, texts, strict=True)]
    assert image_similarity(torch.from_numpy(images)).numpy() == pytest.approx(within, abs=1e-12)
    assert text_similarity(torch.from_numpy(images), torch.from_numpy(texts)).numpy() == pytest.approx(
        to_text, abs=1e-12
    )


def test_pixels_give_the_training_logs_number() -> None:
    images = [noise(40, 32, seed) for seed in range(6)] + [Image.new("RGB", (8, 8), (9, 9, 9))] * 2
    embeddings = PixelEncoder().images(images)
    assert embeddings.shape == (8, 3072)
    assert embeddings.norm(dim=-1).tolist() == pytest.approx([1] * 6 + [0, 0], abs=1e-6)
    for size in (2, 4, 8):
        own = image_similarity(embeddings.view(-1, size, 3072)).mean().item()
        assert own == pytest.approx(group_similarity(images, 8 // size), abs=1e-6)


def test_pixels_of_other_modes() -> None:
    image = noise(32, 32, 0)
    grey, clear = image.convert("L"), image.convert("RGBA")
    plain, of_grey, of_clear = PixelEncoder().images([image, grey, clear])
    assert torch.equal(plain, of_clear)
    assert torch.equal(of_grey, PixelEncoder().images([grey.convert("RGB")])[0])


def make_image(*items: tuple[str, str, int]) -> Image.Image:
    return Image.fromarray(render(Scene(tuple(Item(*item) for item in items))))


def test_a_image_is_the_bag_of_its_things() -> None:
    encoder = ShapesEncoder()
    images = [
        make_image(("circle", "red", 0)),
        make_image(("circle", "red", 15)),  # another place
        make_image(("circle", "red", 0), ("circle", "red", 5), ("square", "blue", 10)),
        make_image(("circle", "blue", 0)),
        make_image(),
        make_image(),
    ]
    rows = encoder.images(images)
    cosines = (rows @ rows.T).tolist()
    assert rows.norm(dim=-1).tolist() == pytest.approx([1] * 6)
    # (1), (1), (2, 1) / sqrt 5, another thing, nothing, nothing.
    assert cosines[0] == pytest.approx([1, 1, 2 / 5**0.5, 0, 0, 0])
    assert cosines[4] == pytest.approx([0, 0, 0, 0, 1, 1])
    shown = encoder.contents(images)
    assert [shown.index(content) for content in shown] == [0, 0, 2, 3, 4, 4]
    assert shown[2] == {(("circle", "red"), 2), (("square", "blue"), 1)} and shown[4] == frozenset()


@pytest.mark.parametrize("seed", range(5))
def test_random_scenes(seed: int) -> None:
    """Every thing that a scene holds is counted, unless two of a colour touch: those images are left out."""
    rng = random.Random(seed)
    scenes = [random_scene(rng) for _ in range(40)]
    apart = [scene for scene in scenes if len({item.color for item in scene.items}) == len(scene.items)]
    assert len(apart) > 10
    rows = ShapesEncoder().images([Image.fromarray(render(scene)) for scene in apart])
    for row, scene in zip(rows, apart, strict=True):
        held = [float((item.shape, item.color) == thing) for thing in THINGS for item in scene.items]
        counts = np.array(held).reshape(len(THINGS), -1).sum(1)
        assert row[:64].numpy() == pytest.approx(counts / np.linalg.norm(counts), abs=1e-6) and row[64] == 0


def asked(content: Content) -> np.ndarray:
    """Counts of what a content asks for, free colours as eighths; of length 1."""
    numbers = np.zeros(65)
    for ask in content.asks:
        for color in (ask.color,) if ask.color else COLORS:
            numbers[THINGS.index((ask.shape, color))] += ask.count / (1 if ask.color else 8)
    return numbers / np.linalg.norm(numbers)


@given(st.integers(0, 2**32 - 1))
def test_texts_of_every_style_say_what_their_content_asks(seed: int) -> None:
    rng = random.Random(seed)
    content = rng.choice(all_contents(rng.choice(TAGS)))
    texts = [write(content, style, rng, mix=0.5) for style in STYLES if style != "detailed"]
    texts.append(write_loosely(content, rng))
    for row, text in zip(ShapesEncoder().texts(texts), texts, strict=True):
        assert row.numpy() == pytest.approx(asked(content), abs=1e-6), text
    settled = elaborate(content, rng)
    (row,) = ShapesEncoder().texts([write(settled, "detailed", rng)])
    assert row.numpy() == pytest.approx(asked(settled), abs=1e-6)


def test_a_text_and_its_image() -> None:
    encoder = ShapesEncoder()
    texts = encoder.texts(["a photo of a circle", "draw 2 scarlet balls", "a trio of azure boxes", "nothing at all"])
    images = encoder.images(
        [make_image(("circle", "red", 0)), make_image(("circle", "red", 0), ("square", "blue", 5)), make_image()]
    )
    cosines = images @ texts.T
    free, both = 8**-0.5, 2**-0.5
    assert cosines[0].tolist() == pytest.approx([free, 1, 0, 0])
    assert cosines[1].tolist() == pytest.approx([free * both, both, both, 0])
    assert cosines[2].tolist() == pytest.approx([0, 0, 0, 1])


def test_clip_is_an_encoder(tmp_path: Path) -> None:
    """Its similarities are those of plain transformers calls."""
    model = save_model(tmp_path / "clip")
    save_processor(tmp_path / "clip")
    encoder = ClipEncoder(str(tmp_path / "clip"))
    images = [noise(28, 28, seed) for seed in range(4)]
    embeddings, texts = encoder.images(images), encoder.texts(["cat", "a dog"])
    groups = embeddings.view(2, 2, -1)
    pixels = torch.stack([encoder.pixels([image])[0] for image in images])
    tokens = [torch.tensor([encoder.tokenizer(text)["input_ids"]]) for text in ("cat", "a dog")]
    with torch.no_grad():
        vision = model.get_image_features(pixels).pooler_output.double().numpy()
        language = np.concatenate([model.get_text_features(ids).pooler_output.double().numpy() for ids in tokens])

    def cosine(a: np.ndarray, b: np.ndarray) -> float:
        return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))

    pairs = [cosine(vision[0], vision[1]), cosine(vision[2], vision[3])]
    assert image_similarity(groups).tolist() == pytest.approx(pairs, abs=1e-5)
    fits = [np.mean([cosine(image, language[i]) for image in vision[2 * i : 2 * i + 2]]) for i in range(2)]
    assert text_similarity(groups, texts).tolist() == pytest.approx(fits, abs=1e-5)
    assert abs(pairs[0]) < 0.999 and len({round(fit, 3) for fit in fits}) == 2


@pytest.mark.parametrize(
    ("path", "reads", "counts"),
    [
        ("rewards.encoders.PixelEncoder", False, False),
        ("miniature.scenes.encoder.ShapesEncoder", True, True),
        ("rewards.clip.ClipEncoder", True, False),
    ],
)
def test_every_encoder_can_be_configured(path: str, reads: bool, counts: bool) -> None:
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--encoder", type=Encoder | None)
    arguments = {"init_args": {"model": "owner/name"}} if "clip" in path else {}
    config = parser.parse_object({"encoder": {"class_path": path, **arguments}})
    encoder = parser.instantiate(config).encoder
    assert f"{type(encoder).__module__}.{type(encoder).__qualname__}" == path
    assert (isinstance(encoder, TextEncoder), isinstance(encoder, ContentEncoder)) == (reads, counts)
    assert encoder.version


def test_no_other_class_passes_for_an_encoder() -> None:
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--encoder", type=Encoder)
    with pytest.raises(jsonargparse.ArgumentError, match="Encoder"):
        parser.parse_object({"encoder": {"class_path": "miniature.scenes.detector.ShapesDetector"}})
