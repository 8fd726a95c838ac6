"""Sana beyond what all families share: a multistep scheduler to replace, an instruction, a learned variance."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, SanaPipeline

from lightning_modules.policies.base import LoRA
from lightning_modules.policies.flow import Sampling
from lightning_modules.policies.sana import SanaPolicy
from lightning_modules.seeding import generators_for
from tests.lightning_modules.policies.family import PROMPTS, assert_ratio_is_one
from tests.lightning_modules.policies.test_flux1 import perturb
from tests.lightning_modules.policies.tiny_sana import SANA, build, draw

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return SANA.save(tmp_path_factory.mktemp("sana"))


def stock(folder: Path) -> SanaPipeline:
    pipe = SanaPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_euler_steps_with_the_published_shift_by_hand(folder: Path) -> None:
    """Shift 3 twice at the low end, as diffusers has it: 3 s / (1 + 2 s) of 0.001 is 1 / 334, of that 1 / 112."""
    mid = (1 + 1 / 334) / 2
    expected = torch.tensor([1.0, 3 * mid / (1 + 2 * mid), 1 / 112, 0.0])
    torch.testing.assert_close(SANA.load(folder, Sampling(4, 0)).sigmas(3), expected, atol=1e-6, rtol=0)


def test_euler_steps_lead_where_the_published_solver_does(folder: Path) -> None:
    """Both solve one differential equation: with more steps our images come closer to the untouched pipeline's."""
    pipe, policy = stock(folder), SANA.load(folder, Sampling(4, 0))
    assert isinstance(pipe.scheduler, DPMSolverMultistepScheduler)
    theirs = pipe(
        PROMPTS[0],
        latents=policy.prepare_latents(generators_for([0])),
        num_inference_steps=100,
        height=32,
        width=32,
        max_sequence_length=24,
        use_resolution_binning=False,
        output_type="pt",
    ).images
    errors = [float((policy.generate(PROMPTS[:1], [0], n).clamp(0, 1) - theirs).abs().mean()) for n in (4, 32, 128)]
    assert errors[0] > 2 * errors[1] > 4 * errors[2]


def test_an_euler_scheduler_learned_variance_and_timestep_scale(tmp_path: Path) -> None:
    """A folder's own flow-match scheduler is used as it is; half of the channels are no velocity."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=7.0)
    variant = replace(SANA, build=partial(build, scheduler, out_channels=8, timestep_scale=0.001))
    policy, pipe = variant.load(variant.save(tmp_path), Sampling(4, 0)), stock(tmp_path)
    latents = policy.prepare_latents(generators_for([0, 1, 2]))
    theirs = draw(pipe, policy, PROMPTS, latents, 4, None)
    assert torch.equal(policy.sigmas(4), pipe.scheduler.sigmas)
    assert (policy.generate(PROMPTS, [0, 1, 2]).clamp(0, 1) - theirs).abs().max() < 1e-4


@pytest.mark.parametrize("instruction", [True, False, ["Say it again: "]])
def test_the_instruction_stands_before_prompts_but_not_before_the_negative_one(
    folder: Path, instruction: bool | list[str]
) -> None:
    policy = SANA.load(
        folder, Sampling(4, 0), complex_human_instruction=instruction, negative_prompt="one red", micro_batch_size=2
    )
    conditioning = policy.encode(PROMPTS)
    pipe = stock(folder)
    seen = {}
    pipe.transformer.register_forward_pre_hook(lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True)
    options = {} if instruction is True else {"complex_human_instruction": instruction or None}
    pipe(
        PROMPTS,
        negative_prompt="one red",
        num_inference_steps=1,
        height=32,
        width=32,
        max_sequence_length=24,
        use_resolution_binning=False,
        output_type="latent",
        **options,
    )
    for name, stocks in (("embeds", "encoder_hidden_states"), ("mask", "encoder_attention_mask")):
        ours = torch.cat([conditioning[f"negative_{name}"], conditioning[name]])
        torch.testing.assert_close(ours, seen[stocks], atol=1e-5, rtol=1e-5)


def test_exports_keep_the_folders_scheduler(folder: Path, tmp_path: Path) -> None:
    policy = SANA.load(folder, Sampling(4, 0))
    policy.generate(PROMPTS[:1], [0])
    policy.save_pretrained(tmp_path)
    name = Path("scheduler") / "scheduler_config.json"
    assert json.loads((tmp_path / name).read_text()) == json.loads((folder / name).read_text())


def test_a_scheduler_of_another_kind_of_diffusion_is_refused(tmp_path: Path) -> None:
    replace(SANA, build=partial(build, DPMSolverMultistepScheduler())).save(tmp_path)
    policy = SanaPolicy(str(tmp_path), Sampling(4, 0), height=32, width=32)
    with pytest.raises(ValueError, match="DPMSolverMultistepScheduler without `use_flow_sigmas`; put a FlowMatchEuler"):
        policy.load()
    assert policy.pipe is None


def test_float16_is_for_the_transformer_alone(folder: Path) -> None:
    policy = SANA.load(folder, Sampling(4, 0), dtype="float16")
    parts = (policy.network, policy.pipe.text_encoder, policy.pipe.vae)
    assert [part.dtype for part in parts] == [torch.float16, torch.bfloat16, torch.bfloat16]
    exact = SANA.load(folder, Sampling(4, 0)).generate(PROMPTS, [0, 1, 2])
    assert (policy.generate(PROMPTS, [0, 1, 2]) - exact).abs().mean() < 0.02


@pytest.mark.parametrize("lora", [None, LoRA(4, 8)], ids=["full", "lora"])
def test_the_ratio_is_exactly_one_in_bf16(folder: Path, lora: LoRA | None) -> None:
    policy = SANA.load(folder, Sampling(4, [0, 2], noise_level=0.7), lora=lora, dtype="bfloat16")
    perturb(policy)
    assert_ratio_is_one(policy, policy.rollout(PROMPTS, [1, 2, 3]))
