"""SD3 beyond what all families share: a third text encoder that may be absent, and a table of positions."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from lightning_modules.policies.base import LoRA
from lightning_modules.policies.flow import Sampling
from lightning_modules.policies.sd3 import SD3Policy
from lightning_modules.seeding import generators_for
from tests.lightning_modules.policies.family import PROMPTS, assert_ratio_is_one
from tests.lightning_modules.policies.test_flux1 import perturb
from tests.lightning_modules.policies.tiny_sd3 import SD3, build, draw


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return SD3.save(tmp_path_factory.mktemp("sd3"))


@pytest.fixture(scope="module")
def without_t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return replace(SD3, build=partial(build, t5=False)).save(tmp_path_factory.mktemp("sd3_without_t5"))


def stock(folder: Path, t5: bool = True) -> StableDiffusion3Pipeline:
    options = {} if t5 else {"text_encoder_3": None, "tokenizer_3": None}
    pipe = StableDiffusion3Pipeline.from_pretrained(folder, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_a_folder_without_t5_draws_as_the_stock_pipeline_told_so(without_t5: Path, tmp_path: Path) -> None:
    """T5 may be absent in the folder, and in what training wrote."""
    policy = SD3.load(without_t5, Sampling(4, 0))
    assert policy.pipe.text_encoder_3 is None
    embeds = policy.encode(PROMPTS)["embeds"]
    assert embeds.shape == (3, 48 + 16, 48) and embeds[:, 48:].abs().max() == 0  # zeros where T5's tokens would be
    assert policy.cut(["a" * letters for letters in (46, 47)]) == [False, True]  # between CLIP's two ends
    perturb(policy)
    policy.save_pretrained(tmp_path)
    ours = policy.generate(PROMPTS, [0, 1, 2]).clamp(0, 1)
    theirs = draw(
        stock(tmp_path, t5=False), policy, PROMPTS, policy.prepare_latents(generators_for([0, 1, 2])), 4, None
    )
    assert theirs.std() > 0.01 and (ours - theirs).abs().max() < 1e-4
    assert torch.equal(SD3.load(tmp_path, Sampling(4, 0)).generate(PROMPTS, [0, 1, 2]).clamp(0, 1), ours)


def test_t5_has_a_say(folder: Path) -> None:
    """Two prompts that the CLIPs see alike, since they cut after 48 letters, differ by what T5 reads."""
    prompts = [f"{PROMPTS[1]} {PROMPTS[1]} {ending}" for ending in ("circle", "cross")]
    policy = SD3.load(folder, Sampling(4, 0), max_sequence_length=24)
    conditioning = policy.encode(prompts)
    assert torch.equal(conditioning["embeds"][0, :48], conditioning["embeds"][1, :48])
    assert torch.equal(conditioning["pooled"][0], conditioning["pooled"][1])
    one, other = policy.generate(prompts, [3, 3])
    assert (one - other).abs().max() > 1e-3


def test_constant_shift_by_hand(folder: Path) -> None:
    """Shift 3 twice at the low end, as diffusers has it: 3 s / (1 + 2 s) of 0.001 is 1 / 334, of that 1 / 112."""
    mid = (1 + 1 / 334) / 2
    expected = torch.tensor([1.0, 3 * mid / (1 + 2 * mid), 1 / 112, 0.0])
    torch.testing.assert_close(SD3.load(folder, Sampling(4, 0)).sigmas(3), expected, atol=1e-6, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("size", [(32, 32), (64, 48)])
def test_dynamic_shift_is_the_stock_pipelines(tmp_path: Path, size: tuple[int, int]) -> None:
    settings = {"use_dynamic_shifting": True, "base_image_seq_len": 4, "max_image_seq_len": 64, "max_shift": 1.6}
    folder = replace(SD3, build=partial(build, **settings)).save(tmp_path)
    policy, pipe = SD3.load(folder, Sampling(4, 0), size), stock(folder)
    latents = policy.prepare_latents(generators_for([4]))
    theirs = draw(pipe, policy, PROMPTS[:1], latents, 4, None)
    torch.testing.assert_close(policy.sigmas(4), pipe.scheduler.sigmas, atol=1e-6, rtol=0)
    assert (policy.generate(PROMPTS[:1], [4]).clamp(0, 1) - theirs).abs().max() < 1e-4


def test_images_larger_than_the_table_of_positions_are_refused(folder: Path) -> None:
    policy = SD3Policy(str(folder), Sampling(4, 0), height=64, width=72)
    with pytest.raises(ValueError, match=r"`height` and `width` are 64 x 72; .* draws at most 64 pixels a side"):
        policy.load()
    assert policy.pipe is None


@pytest.mark.parametrize("lora", [None, LoRA(4, 8)], ids=["full", "lora"])
def test_the_ratio_is_exactly_one_in_bf16(folder: Path, lora: LoRA | None) -> None:
    policy = SD3.load(folder, Sampling(4, [0, 2], noise_level=0.7), lora=lora, dtype="bfloat16")
    perturb(policy)
    assert_ratio_is_one(policy, policy.rollout(PROMPTS, [1, 2, 3]))


def test_adapters_reach_both_streams_and_the_second_attention(folder: Path) -> None:
    policy = SD3.load(folder, Sampling(4, 0), lora=LoRA(4, 8))
    reached = {name.split(".lora_A")[0] for name, p in policy.network.named_parameters() if "lora_A" in name}
    first = "transformer_blocks.0"
    own = {f"{first}.{attn}.{part}" for attn in ("attn", "attn2") for part in ("to_q", "to_k", "to_v", "to_out.0")}
    text = {f"{first}.attn.{part}" for part in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")}
    assert {name for name in reached if name.startswith(first)} == own | text
