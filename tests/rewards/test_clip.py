"""The CLIP wrapper and CLIPScore against CLIPModel's own forward pass, on random weights."""

from __future__ import annotations

import io
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPModel, T5Config, T5EncoderModel

from rewards.clip import ClipEncoder, CLIPScoreReward
from tests.rewards.tiny_clip import (
    END,
    VOCAB,
    batch,
    noise,
    reference_ids,
    reference_logits,
    reference_pixels,
    save_model,
    save_processor,
)

PROMPTS = ["a cat", "two red cats on a mat", "a cat", "blue"]
SIZES = [(28, 28), (56, 28), (28, 84), (64, 64)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    save_model(folder)
    save_processor(folder)
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> CLIPModel:
    return CLIPModel.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    return [noise(width, height, seed) for seed, (width, height) in enumerate(SIZES)]


@torch.no_grad()
def text_embedding(model: CLIPModel, ids: list[int]) -> torch.Tensor:
    features = model.get_text_features(torch.tensor([ids])).pooler_output[0]
    return features / features.norm()


@torch.no_grad()
def test_embeddings_are_clips(folder: Path, model: CLIPModel, images: list[Image.Image]) -> None:
    """Own preprocessing and own token ids, through the model's features, scaled to length 1."""
    encoder = ClipEncoder(str(folder), batch_size=3)
    for embedding, text in zip(encoder.texts(PROMPTS), PROMPTS, strict=True):
        torch.testing.assert_close(embedding, text_embedding(model, reference_ids(text)), atol=1e-6, rtol=0)
    for embedding, image in zip(encoder.images(images), images, strict=True):
        features = model.get_image_features(reference_pixels(image)[None]).pooler_output[0]
        torch.testing.assert_close(embedding, features / features.norm(), atol=1e-6, rtol=0)
    assert encoder.logit_scale == pytest.approx(60.0)


def test_a_merge_is_used(folder: Path) -> None:
    encoder = ClipEncoder(str(folder))
    encoder.load()
    assert encoder.tokenizer("a Cat")["input_ids"] == [len(VOCAB) - 2, VOCAB["a</w>"], VOCAB["cat</w>"], END]


def test_alone_as_in_a_batch(folder: Path, images: list[Image.Image]) -> None:
    together = ClipEncoder(str(folder))
    alone = ClipEncoder(str(folder), batch_size=1)
    torch.testing.assert_close(together.images(images), alone.images(images), atol=1e-6, rtol=0)
    torch.testing.assert_close(together.texts(PROMPTS), alone.texts(PROMPTS), atol=1e-6, rtol=0)
    assert (together.texts(PROMPTS) @ together.texts(PROMPTS).T).min() < 0.9  # so that a mix-up would show


def test_each_distinct_text_is_encoded_once(folder: Path) -> None:
    encoder = ClipEncoder(str(folder), batch_size=2)
    encoder.load()
    seen: list[int] = []
    encoder.network.text_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    embeddings = encoder.texts(["a", "b", "a", "c", "b", "a"])
    assert seen == [2, 1]
    assert torch.equal(embeddings[[0, 1, 3]][[0, 1, 0, 2, 1, 0]], embeddings)
    assert not torch.equal(embeddings[0], embeddings[1])


def test_cut_at_77_tokens(folder: Path, model: CLIPModel) -> None:
    """75 letters between the start and the end of a text count; the 76th does not."""
    texts = ["a " * 75, "a " * 75 + "b", "a " * 200, "a " * 74 + "b", "a " * 74]
    full, longer, longest, other, shorter = ClipEncoder(str(folder), batch_size=1).texts(texts)
    assert torch.equal(full, longer)
    assert torch.equal(full, longest)
    assert (full - other).abs().max() > 1e-3
    assert (full - shorter).abs().max() > 1e-3
    ids = [len(VOCAB) - 2, *[VOCAB["a</w>"]] * 75, END]
    assert len(ids) == 77
    torch.testing.assert_close(full, text_embedding(model, ids), atol=1e-6, rtol=0)


def test_old_configurations_pool_at_the_end_too(folder: Path, tmp_path: Path) -> None:
    """CLIP's first configurations say that the end of text is token 2."""
    save_model(tmp_path, eos_token_id=2)
    old = ClipEncoder(str(tmp_path), processor=str(folder))
    torch.testing.assert_close(old.texts(PROMPTS), ClipEncoder(str(folder)).texts(PROMPTS), atol=1e-6, rtol=0)


def test_empty_lists(folder: Path) -> None:
    encoder = ClipEncoder(str(folder))
    assert encoder.images([]).shape == encoder.texts([]).shape == (0, 24)


def test_other_modes_are_seen_as_rgb(folder: Path) -> None:
    image = noise(28, 28, 5)
    grey, transparent = image.convert("L"), image.convert("RGBA")
    plain = ClipEncoder(str(folder)).images([grey.convert("RGB"), image])
    assert torch.equal(ClipEncoder(str(folder)).images([grey, transparent]), plain)


def test_autocast_of_the_caller_changes_nothing(folder: Path, images: list[Image.Image]) -> None:
    encoder = ClipEncoder(str(folder))
    plain = encoder.images(images)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(encoder.images(images), plain)
    assert not plain.requires_grad


def test_bfloat16_weights_give_unit_fp32_embeddings(folder: Path, images: list[Image.Image]) -> None:
    exact = ClipEncoder(str(folder)).images(images)
    rounded = ClipEncoder(str(folder), dtype="bfloat16").images(images)
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded.norm(dim=-1), torch.ones(4), atol=1e-6, rtol=0)
    assert 1e-5 < (rounded - exact).abs().max() < 0.05


def test_clipscore_is_the_logit_over_the_conventions_divisor(
    folder: Path, model: CLIPModel, images: list[Image.Image]
) -> None:
    """Against logits_per_image of one pair at a time; the model's logit scale is 60."""
    logits = reference_logits(model, PROMPTS, images)
    assert max(logits) - min(logits) > 1
    for convention, divisor in (("flow_grpo", 30), ("diffusion_nft", 100)):
        scores = CLIPScoreReward(str(folder), convention=convention)(batch(PROMPTS, images))  # type: ignore[arg-type]
        np.testing.assert_allclose([s.rl for s in scores], [x / divisor for x in logits], atol=2e-5)
        np.testing.assert_allclose([s.native for s in scores], [x / 60 for x in logits], atol=1e-6)
        np.testing.assert_allclose([s.table for s in scores], [100 * x / 60 for x in logits], atol=1e-4)


def test_worth_by_hand(folder: Path) -> None:
    score = CLIPScoreReward(str(folder)).score_of(0.25)
    assert (score.native, score.table) == (0.25, 25.0)
    assert score.rl == pytest.approx(0.5)  # 60 * 0.25 / 30
    score = CLIPScoreReward(str(folder), convention="diffusion_nft").score_of(-0.25)
    assert (score.native, score.table) == (-0.25, -25.0)  # not clipped: torchmetrics clips the mean only
    assert score.rl == pytest.approx(-0.15)


def test_what_cannot_be_decoded_is_invalid(folder: Path) -> None:
    """An image of no size, a truncated PNG and one with a wrong chunk length; their neighbours keep their scores."""
    file = io.BytesIO()
    noise(64, 64, 1).save(file, "PNG")
    data = file.getvalue()
    truncated = Image.open(io.BytesIO(data[: len(data) // 2]))
    length = int.from_bytes(data[33:37], "big")  # of the pixels' chunk, which follows the header
    broken = Image.open(io.BytesIO(data[:33] + (length - 500).to_bytes(4, "big") + data[37:]))
    images = [noise(28, 28, 1), Image.new("RGB", (0, 5)), truncated, broken, noise(28, 28, 2)]
    reward = CLIPScoreReward(str(folder))
    scores = reward(batch(["a"] * 5, images))
    assert [score.valid for score in scores] == [True, False, False, False, True]
    assert scores[1].detail["reason"] == "the image has 0 x 5 pixels"
    assert scores[2].detail["reason"].startswith("the image cannot be decoded: image file is truncated")
    assert scores[3].detail["reason"].startswith("the image cannot be decoded: broken PNG file")
    alone = reward(batch(["a"] * 2, [images[0], images[4]]))
    assert scores[0].native == pytest.approx(alone[0].native, abs=1e-6)
    assert scores[4].native == pytest.approx(alone[1].native, abs=1e-6)
    assert abs(alone[0].native - alone[1].native) > 1e-3
    assert [s.valid for s in reward(batch(["a"], [Image.new("L", (3, 0))]))] == [False]
    assert reward(batch([], [])) == []


def test_no_finite_cosine_is_invalid(folder: Path) -> None:
    reward = CLIPScoreReward(str(folder))
    reward.load()
    reward.encoder.network.visual_projection.weight.fill_(math.nan)
    (score,) = reward(batch(["a"], [noise(28, 28, 1)]))
    assert not score.valid
    assert score.detail == {"reason": "the cosine is not finite"}


def test_versions_tell_settings_apart(folder: Path) -> None:
    settings: list[dict[str, Any]] = [{}, {"convention": "diffusion_nft"}, {"dtype": "bfloat16"}, {"processor": "x/y"}]
    versions = {CLIPScoreReward(str(folder), **kwargs).version for kwargs in settings}
    assert len(versions) == 4
    assert all(str(folder) in version for version in versions)


@pytest.mark.parametrize(
    ("kwargs", "sentence"),
    [
        ({"convention": "x"}, "convention='x', use flow_grpo or diffusion_nft"),
        ({"dtype": "float64"}, "dtype='float64', use one of float32, bfloat16, float16"),
        ({"batch_size": 0}, "batch_size=0, use at least 1"),
    ],
)
def test_wrong_arguments_fail_at_construction(kwargs: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        CLIPScoreReward(**kwargs)


def test_no_such_folder() -> None:
    with pytest.raises(ValueError, match="there is no folder tests/none"):
        CLIPScoreReward("tests/none").load()


def test_a_processor_without_weights(folder: Path, tmp_path: Path) -> None:
    save_processor(tmp_path)
    with pytest.raises(ValueError, match=f"cannot load {tmp_path}"):
        ClipEncoder(str(tmp_path)).load()


def test_a_model_without_processor(folder: Path, tmp_path: Path) -> None:
    save_model(tmp_path)
    with pytest.raises(ValueError, match=f"cannot load {tmp_path}"):
        ClipEncoder(str(tmp_path)).load()


def test_another_kind_of_model(folder: Path, tmp_path: Path) -> None:
    """Transformers would warn and draw a random CLIP."""
    tiny = T5Config(d_model=8, d_ff=8, num_layers=1, num_heads=1, d_kv=8, vocab_size=10)
    T5EncoderModel(tiny).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a model of type 't5': give a whole CLIP model"):
        ClipEncoder(str(tmp_path), processor=str(folder)).load()


def test_missing_weights(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks 1 weights of its CLIP model, such as visual_projection.weight"):
        ClipEncoder(str(tmp_path)).load()


@pytest.mark.parametrize("eos_token_id", [END, 2])
def test_a_tokenizer_of_another_model(folder: Path, tmp_path: Path, eos_token_id: int) -> None:
    """Its end of text is another token: the text tower would read every text out at its start."""
    save_model(tmp_path, eos_token_id=eos_token_id)
    save_processor(tmp_path / "other", vocab={token: (index + 1) % len(VOCAB) for token, index in VOCAB.items()})
    with pytest.raises(ValueError, match="give the `processor` that belongs to this CLIP model"):
        ClipEncoder(str(tmp_path), processor=str(tmp_path / "other")).load()
