"""Qwen-Image and Qwen-Image-Edit beyond what all families share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from lightning_modules.policies.base import LoRA
from lightning_modules.policies.flow import Sampling
from lightning_modules.policies.pipeline import PipelinePolicy
from lightning_modules.policies.qwen_image_edit import ImageProcessor, image_processor
from lightning_modules.seeding import generators_for
from tests.lightning_modules.policies.family import PROMPTS, Family, assert_ratio_is_one
from tests.lightning_modules.policies.test_flux1 import perturb
from tests.lightning_modules.policies.tiny_qwen_image import QWEN_IMAGE
from tests.lightning_modules.policies.tiny_qwen_image_edit import QWEN_IMAGE_EDIT, build

BOTH = pytest.mark.parametrize("family", [QWEN_IMAGE, QWEN_IMAGE_EDIT], ids=lambda family: family.name)
EDIT_2511 = Family("2511", QWEN_IMAGE_EDIT.policy, lambda: build(zero_cond_t=True), QWEN_IMAGE_EDIT.draw, sources=True)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {f.name: f.save(tmp_path_factory.mktemp(f.name)) for f in (QWEN_IMAGE, QWEN_IMAGE_EDIT, EDIT_2511)}


def stock(policy: PipelinePolicy) -> Any:
    pipe = policy.pipeline_class.from_pretrained(policy.model, **policy.passed_parts())
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.slow
@pytest.mark.parametrize("batch_guidance", [False, True])
@pytest.mark.parametrize("micro_batch_size", [None, 2])
def test_padding_changes_nothing(folders: dict[str, Path], micro_batch_size: int | None, batch_guidance: bool) -> None:
    """Prompts of 3, 10 and 5 tokens drawn together are what the stock pipeline draws of each alone."""
    options = {"micro_batch_size": micro_batch_size, "batch_guidance": batch_guidance}
    policy = QWEN_IMAGE.load(folders["qwen_image"], Sampling(4, 0), **options)
    # The template's 34 tokens are dropped; its end has 5. The negative prompt is one space.
    conditioning = policy.encode(PROMPTS)
    assert conditioning["mask"].sum(1).tolist() == [8, 15, 10]
    assert conditioning["negative_mask"].tolist() == [[1] * 6] * 3
    ours = policy.generate(PROMPTS, [1, 2, 3]).clamp(0, 1)
    for i, prompt in enumerate(PROMPTS):
        latents = policy.prepare_latents(generators_for([i + 1]))
        theirs = QWEN_IMAGE.draw(stock(policy), policy, [prompt], latents, 4, None)
        assert (ours[i : i + 1] - theirs).abs().max() < 1e-4


@BOTH
def test_sigmas_equal_the_stock_schedulers(family: Family, folders: dict[str, Path]) -> None:
    policy = family.load(folders[family.name], Sampling(4, 0), family.sizes[1])
    pipe = stock(policy)
    family.draw(pipe, policy, PROMPTS[:1], policy.prepare_latents(generators_for([1])), 7, family.images(1))
    assert torch.equal(policy.sigmas(7), pipe.scheduler.sigmas)
    assert policy.sigmas(7)[-2].item() == pytest.approx(0.02)  # `shift_terminal`


@BOTH
@pytest.mark.parametrize("lora", [None, LoRA(4, 8)], ids=["full", "lora"])
def test_the_ratio_is_exactly_one_in_bf16(family: Family, folders: dict[str, Path], lora: LoRA | None) -> None:
    policy = family.load(folders[family.name], Sampling(4, 2), lora=lora, dtype="bfloat16", micro_batch_size=2)
    perturb(policy)
    trajectory = policy.rollout(PROMPTS, [1, 2, 3], images=family.images(3))
    for rows in (slice(0, 2), slice(2, 3)):
        assert_ratio_is_one(policy, trajectory.rows(rows))


def test_2511_draws_as_the_stock_pipeline(folders: dict[str, Path]) -> None:
    """The network of 2511 gives the source's tokens the time 0; `img_shapes` says which they are."""
    images = EDIT_2511.images(3)
    policy = EDIT_2511.load(folders["2511"], Sampling(4, 0), (48, 32), **QWEN_IMAGE_EDIT.options)
    assert policy.network.zero_cond_t
    ours = policy.generate(PROMPTS, [1, 2, 3], images=images).clamp(0, 1)
    latents = policy.prepare_latents(generators_for([1, 2, 3]))
    assert (ours - EDIT_2511.draw(stock(policy), policy, PROMPTS, latents, 4, images)).abs().max() < 1e-4
    policy.network.zero_cond_t = False
    for block in policy.network.transformer_blocks:
        block.zero_cond_t = False
    assert (ours - policy.generate(PROMPTS, [1, 2, 3], images=images)).abs().max() > 1e-2


def test_rows_and_columns_of_a_source_count(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """`mrope` draws what the stock pipeline draws once its text encoder gets all that its processor has for it."""
    images, latents = QWEN_IMAGE_EDIT.images(2), torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(0))
    policy = QWEN_IMAGE_EDIT.load(folders["qwen_image_edit"], Sampling(4, 0), positions="mrope")
    monkeypatch.setattr(policy, "prepare_latents", lambda generators: latents)
    ours = policy.generate(PROMPTS[:2], [0, 1], images=images).clamp(0, 1)
    pipe = stock(policy)
    sequential = QWEN_IMAGE_EDIT.draw(pipe, policy, PROMPTS[:2], latents, 4, images)
    processed: dict[str, Any] = {}
    process, forward = ImageProcessor.__call__, pipe.text_encoder.forward

    def record(self: Any, *args: Any, **kwargs: Any) -> Any:
        processed.update(output := process(self, *args, **kwargs))
        return output

    monkeypatch.setattr(ImageProcessor, "__call__", record)
    types = "mm_token_type_ids"
    monkeypatch.setattr(pipe.text_encoder, "forward", lambda **kwargs: forward(**kwargs, **{types: processed[types]}))
    fixed = QWEN_IMAGE_EDIT.draw(pipe, policy, PROMPTS[:2], latents, 4, images)
    assert (ours - fixed).abs().max() < 1e-4
    assert (ours - sequential).abs().max() > 1e-2


def test_sources_of_other_sizes_are_cropped_or_refused(folders: dict[str, Path]) -> None:
    load, noise = QWEN_IMAGE_EDIT.load, [1, 2]
    wide, square = (Image.effect_noise(size, 60).convert("RGB") for size in ((96, 32), (64, 64)))
    policy = load(folders["qwen_image_edit"], Sampling(4, 0), source_area=64 * 32, condition_area=64 * 32)
    with pytest.raises(ValueError, match=r"would be encoded as 32 x 32, 32 x 64 pixels.*set `source_size`"):
        policy.generate(PROMPTS[:2], noise, images=[square.resize((32, 32)), wide])
    with pytest.raises(ValueError, match="the prompts come without: give samples an image, or draw with"):
        policy.generate(PROMPTS[:2], noise)
    # One network for both shapes: what it draws of a wide source is what the stock pipeline draws of it.
    ours = policy.generate(PROMPTS[:1], noise[:1], images=[wide]).clamp(0, 1)
    latents = policy.prepare_latents(generators_for(noise))
    theirs = QWEN_IMAGE_EDIT.draw(stock(policy), policy, PROMPTS[:1], latents[:1], 4, [wide])
    assert (ours - theirs).abs().max() < 1e-4
    policy.source_size = (32, 32)
    cropped = [wide.crop((32, 0, 64, 32)), square.resize((32, 32), Image.Resampling.LANCZOS)]
    ours = policy.generate(PROMPTS[:2], noise, images=[wide, square]).clamp(0, 1)
    theirs = QWEN_IMAGE_EDIT.draw(stock(policy), policy, PROMPTS[:2], latents, 4, cropped)
    assert (ours - theirs).abs().max() < 1e-4


def test_an_export_names_the_stock_processor(folders: dict[str, Path], tmp_path: Path) -> None:
    QWEN_IMAGE_EDIT.load(folders["qwen_image_edit"], Sampling(4, 0)).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["processor"] == ["transformers", "Qwen2VLProcessor"]
    found, original = (image_processor(str(f))["processor"] for f in (tmp_path, folders["qwen_image_edit"]))
    assert found.image_processor.to_dict() == original.image_processor.to_dict()
    assert found.tokenizer.get_vocab() == original.tokenizer.get_vocab()


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"guidance_embeds": True}, {}, "sets `guidance_embeds`, which diffusers' Qwen-Image transformer cannot run"),
        ({}, {"max_sequence_length": 1025}, "`max_sequence_length` is 1025; .* takes 1 to 1024 tokens"),
    ],
)
def test_what_the_model_cannot_take_is_refused_before_weights_are_loaded(
    folders: dict[str, Path], tmp_path: Path, change: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    for source in folders["qwen_image"].rglob("*.json"):
        copy = tmp_path / source.relative_to(folders["qwen_image"])
        copy.parent.mkdir(exist_ok=True)
        copy.write_text(source.read_text())
    config = tmp_path / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        QWEN_IMAGE.load(tmp_path, Sampling(4, 2), **options)  # a folder without weights
