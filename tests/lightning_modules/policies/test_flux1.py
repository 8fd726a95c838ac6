"""The FLUX.1 policy against the stock pipeline, and against itself in replay."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline

from lightning_modules.policies.base import LoRA
from lightning_modules.policies.flow import Sampling
from lightning_modules.policies.flux1 import Flux1Policy
from lightning_modules.rl.schedule import Window
from lightning_modules.rl.sde import SDEType, flow_sde
from lightning_modules.seeding import generators_for
from tests.lightning_modules.policies.family import assert_ratio_is_one

MakeFlow = Callable[..., Flux1Policy]
PROMPTS = ["a photo of a circle", "draw 1 scarlet ball + 1 navy cone", "a photo of a circle", "a photo of four crosses"]
LORA = LoRA(rank=4, alpha=8)


def perturb(module: torch.nn.Module, scale: float = 0.05) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter += scale * torch.randn(parameter.shape, generator=generator).to(parameter)


@pytest.mark.parametrize("prompts", [PROMPTS[:1], PROMPTS[:3]])
@pytest.mark.parametrize(("height", "width"), [(32, 32), (48, 32)])
def test_images_equal_the_stock_pipelines(
    random_flux: Path, make_flow: MakeFlow, prompts: list[str], height: int, width: int
) -> None:
    """No SDE steps: our sampler is `FluxPipeline.__call__` with the same latents and embeddings."""
    policy = make_flow(random_flux, Sampling(6, 0), height=height, width=width)
    seeds = list(range(len(prompts)))
    ours = policy.generate(prompts, seeds)
    conditioning = policy.encode(prompts)
    stock = FluxPipeline.from_pretrained(random_flux)
    stock.set_progress_bar_config(disable=True)
    theirs = stock(
        prompt_embeds=conditioning["embeds"],
        pooled_prompt_embeds=conditioning["pooled"],
        latents=policy.prepare_latents(generators_for(seeds)),
        num_inference_steps=6,
        guidance_scale=3.5,
        height=height,
        width=width,
        output_type="pt",
    ).images
    assert theirs.std() > 0.01  # not one flat colour
    assert (ours.clamp(0, 1) - theirs).abs().max() < 1e-5


def test_text_embeddings_equal_the_stock_pipelines_and_are_made_once_per_text(
    make_flow: MakeFlow, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = make_flow()
    stock = FluxPipeline.from_pretrained("miniature/flow")
    embeds, pooled, _ = stock.encode_prompt(PROMPTS, None, max_sequence_length=18)
    seen: list[str] = []
    encode_prompt = policy.pipe.encode_prompt
    monkeypatch.setattr(
        policy.pipe,
        "encode_prompt",
        lambda texts, *args, **kwargs: (seen.extend(texts), encode_prompt(texts, *args, **kwargs))[1],
    )
    conditioning = policy.encode(PROMPTS)
    assert seen == [PROMPTS[0], PROMPTS[1], PROMPTS[3]]
    torch.testing.assert_close(conditioning["embeds"], embeds, atol=1e-5, rtol=0)
    torch.testing.assert_close(conditioning["pooled"], pooled, atol=1e-5, rtol=0)


@pytest.mark.parametrize("num_steps", [1, 4, 20])
def test_sigmas_equal_the_stock_schedulers(make_flow: MakeFlow, num_steps: int) -> None:
    policy = make_flow()
    stock = FluxPipeline.from_pretrained("miniature/flow")
    stock.set_progress_bar_config(disable=True)
    stock("a photo of a circle", num_inference_steps=num_steps, height=32, width=32, max_sequence_length=18)
    assert torch.equal(policy.sigmas(num_steps), stock.scheduler.sigmas)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("sde_type", ["flow_sde", "dance_sde", "cps"])
def test_replayed_log_probs_are_the_sampled_ones(
    make_flow: MakeFlow, sde_type: SDEType, lora: LoRA | None, dtype: str
) -> None:
    """The on-policy ratio is exactly 1, bit for bit, also in bf16 and with adapters that are not zero."""
    sampling = Sampling(6, [0, 2, 3], sde_type=sde_type, noise_level=0.7)
    policy = make_flow(sampling=sampling, lora=lora, dtype=dtype, micro_batch_size=3)
    perturb(policy)
    trajectory = policy.rollout(PROMPTS, [1, 2, 3, 4])
    for rows in (slice(0, 3), slice(3, 4)):
        assert_ratio_is_one(policy, trajectory.rows(rows))


def test_mixed_sampler_is_a_plain_loop(make_flow: MakeFlow) -> None:
    """SDE steps where asked, Euler elsewhere, the tail continuing from where the SDE step ended."""
    policy = make_flow(sampling=Sampling(5, [1, 2], noise_level=0.6))
    trajectory = policy.rollout(PROMPTS[:2], [7, 8])
    conditioning, sigmas = policy.encode(PROMPTS[:2]), policy.sigmas(5)
    generators = generators_for([7, 8])
    x = policy.prepare_latents(generators)
    with torch.no_grad():
        for i in range(5):
            velocity = policy.velocity(x, sigmas[i], conditioning)
            if i in (1, 2):
                step = flow_sde(x, velocity, sigmas[i], sigmas[i + 1], noise_level=0.6, sigma_max=sigmas[1])
                assert torch.equal(trajectory.latents[:, i - 1], x)
                x = step.mean + step.std * policy.prepare_latents(generators)
                assert torch.equal(trajectory.next_latents[:, i - 1], x)
            else:
                x = x + velocity * (sigmas[i + 1] - sigmas[i])
    torch.testing.assert_close(trajectory.final, x, atol=1e-6, rtol=0)
    assert trajectory.sde_steps == (1, 2)


def test_noise_belongs_to_the_sample_not_to_its_place(make_flow: MakeFlow) -> None:
    policy = make_flow()
    together = policy.rollout(PROMPTS, [1, 2, 3, 4])
    policy.micro_batch_size = 1
    alone = policy.rollout([PROMPTS[3], PROMPTS[1]], [4, 2])
    torch.testing.assert_close(alone.final, together.final[[3, 1]], atol=1e-4, rtol=0)
    assert not torch.allclose(together.final[0], together.final[2], atol=0.1)  # same prompt, other noise


@pytest.mark.slow
def test_a_window_is_one_for_the_whole_batch_and_moves_with_its_seed(make_flow: MakeFlow) -> None:
    policy = make_flow(sampling=Sampling(6, Window(2, 0, 5)))
    places = {policy.rollout(PROMPTS[:1], [1], window_seed=seed).sde_steps for seed in range(12)}
    assert places <= {(0, 1), (1, 2), (2, 3), (3, 4)} and len(places) > 1
    assert (
        policy.rollout(PROMPTS[:1], [1], window_seed=3).sde_steps
        == policy.rollout(PROMPTS[:1], [2], window_seed=3).sde_steps
    )


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_reference_is_the_model_before_training(make_flow: MakeFlow, lora: LoRA | None) -> None:
    """KL is 0 at the start, has a gradient once the policy moved, and the reference stays what it was."""
    policy = make_flow(lora=lora, kl_weight=0.1)
    trajectory = policy.rollout(PROMPTS[:2], [1, 2])
    with torch.no_grad(), policy.reference():
        before = policy.replay(trajectory, 0)
    assert policy.replay(trajectory, 0).kl(before).abs().max() == 0
    perturb(policy)
    with torch.no_grad(), policy.reference():
        after = policy.replay(trajectory, 0)
    assert torch.equal(after.mean, before.mean)
    kl = policy.replay(trajectory, 0).kl(after)
    assert kl.min() > 0
    kl.sum().backward()
    gradients = [p.grad for p in policy.parameters() if p.requires_grad]
    assert gradients and sum(g.abs().sum() for g in gradients if g is not None) > 0
    trainable = {name for name, p in policy.named_parameters() if p.requires_grad}
    assert trainable and all(("lora" in name) == (lora is not None) for name in trainable)
    assert not any(name.startswith(("vae", "clip", "t5", "_frozen")) for name in trainable)


def test_full_fine_tuning_without_kl_keeps_no_reference(make_flow: MakeFlow) -> None:
    policy = make_flow(kl_weight=0.0)
    with pytest.raises(ValueError, match="kl_weight"), policy.reference():
        pass


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_saved_weights_draw_the_same_in_the_stock_pipeline(
    make_flow: MakeFlow, lora: LoRA | None, tmp_path: Path
) -> None:
    policy = make_flow(lora=lora, sampling=Sampling(4, 0))
    untrained = policy.generate(PROMPTS[:2], [5, 6])
    perturb(policy, 0.2 if lora else 0.05)
    ours = policy.generate(PROMPTS[:2], [5, 6])
    assert (ours - untrained).abs().max() > 0.05
    policy.save_pretrained(tmp_path)
    stock = FluxPipeline.from_pretrained("miniature/flow" if lora else tmp_path)
    if lora:
        stock.load_lora_weights(tmp_path)
    stock.set_progress_bar_config(disable=True)
    latents = policy.prepare_latents(generators_for([5, 6]))
    theirs = stock(
        PROMPTS[:2],
        latents=latents,
        num_inference_steps=4,
        height=32,
        width=32,
        max_sequence_length=18,
        output_type="pt",
    ).images
    assert (ours.clamp(0, 1) - theirs).abs().max() < 1e-4


def test_bad_settings_say_what_to_do(make_flow: MakeFlow, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`height` and `width` are 36 x 32; .* multiples of 8 pixels"):
        make_flow(height=36)
    with pytest.raises(ValueError, match="there is no folder nowhere: give an existing folder or a hub id"):
        make_flow("nowhere")
    with pytest.raises(ValueError, match=r"`flow\.lora\.targets` names nope, which matches no module"):
        make_flow(lora=LoRA(targets=["to_q", "nope"]))
    with pytest.raises(ValueError, match="the last of 4 steps has no noise with sde_type cps"):
        Sampling(4, 4, sde_type="cps")
    with pytest.raises(ValueError, match="`sde_steps` is 9, but there are 8 sampler steps"):
        Sampling(8, 9)
