"""FLUX.2-klein: base and distilled, the text encoder's layers, the layers that adapters go into."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lightning_modules.policies.base import LoRA
from lightning_modules.policies.flow import Sampling
from lightning_modules.policies.flux2 import Flux2KleinPolicy
from lightning_modules.seeding import generators_for
from tests.lightning_modules.policies import tiny_flux2
from tests.lightning_modules.policies.family import PROMPTS
from tests.lightning_modules.policies.tiny_flux2 import FLUX2_KLEIN, OPTIONS


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return FLUX2_KLEIN.save(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def distilled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distilled")
    torch.manual_seed(1)
    tiny_flux2.build(is_distilled=True).save_pretrained(folder)
    return folder


def refused(folder: Path, message: str, **options: object) -> None:
    fixed = {"height": 32, "width": 32, "dtype": "float32"}
    policy = Flux2KleinPolicy(str(folder), Sampling(4, 0), **(fixed | OPTIONS | options))
    with pytest.raises(ValueError, match=message):
        policy.load()
    assert policy.pipe is None  # no weights were read


def test_the_guidance_scale_is_the_models_own_unless_given(base: Path, distilled: Path) -> None:
    assert FLUX2_KLEIN.load(base, Sampling(4, 0)).guidance_scale == 4.0
    assert FLUX2_KLEIN.load(base, Sampling(4, 0), guidance_scale=2.5).guidance_scale == 2.5
    policy = FLUX2_KLEIN.load(distilled, Sampling(4, 0))
    assert policy.guidance_scale == 1.0 and not policy.guided
    assert FLUX2_KLEIN.load(distilled, Sampling(4, 0), guidance_scale=1.0).guidance_scale == 1.0
    refused(
        distilled, "`guidance_scale` is 4.0, but .* is distilled .*: leave `guidance_scale` out", guidance_scale=4.0
    )


@pytest.mark.parametrize("steps", [1, 4])
def test_a_distilled_model_draws_as_stock_does(distilled: Path, steps: int) -> None:
    policy = FLUX2_KLEIN.load(distilled, Sampling(steps, 0))
    pipe = Flux2KleinPolicy.pipeline_class.from_pretrained(distilled)
    pipe.set_progress_bar_config(disable=True)
    ours = policy.generate(PROMPTS, [1, 2, 3]).clamp(0, 1)
    assert set(policy.encode(PROMPTS).tensors) == {"embeds"}  # nothing for a second pass
    latents = policy.prepare_latents(generators_for([1, 2, 3]))
    theirs = FLUX2_KLEIN.draw(pipe, policy, PROMPTS, latents, steps, None)
    assert (ours - theirs).abs().max() < 1e-4


def test_a_seed_is_the_stock_pipelines_seed(base: Path) -> None:
    """Latents have the stock shape, so a CPU generator's noise is the same too."""
    policy = FLUX2_KLEIN.load(base, Sampling(4, 0))
    pipe = Flux2KleinPolicy.pipeline_class.from_pretrained(base)
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(
        prompt=PROMPTS[0],
        generator=torch.Generator().manual_seed(7),
        num_inference_steps=4,
        height=32,
        width=32,
        output_type="pt",
        **OPTIONS,
    ).images
    assert (policy.generate(PROMPTS[:1], [7]).clamp(0, 1) - theirs).abs().max() < 1e-4


@pytest.mark.parametrize("num_steps", [1, 4, 28, 50])
@pytest.mark.parametrize("size", [(32, 32), (1024, 1024), (1536, 1024)])
def test_sigmas_equal_the_stock_schedulers(base: Path, size: tuple[int, int], num_steps: int) -> None:
    """The shift depends on tokens and steps, with another formula above 4300 tokens (the last size)."""
    policy = FLUX2_KLEIN.load(base, Sampling(4, 0), size)
    tokens = size[0] * size[1] // 256
    if tokens > 4300:
        mu = 0.00016927 * tokens + 0.45666666
    else:
        at_200, at_10 = 0.00016927 * tokens + 0.45666666, 8.73809524e-05 * tokens + 1.89833333
        mu = at_10 + (at_200 - at_10) * (num_steps - 10) / 190
    s = 1 - torch.arange(num_steps, dtype=torch.float64) / num_steps
    expected = torch.cat([1 / (1 + torch.exp(torch.tensor(-mu, dtype=torch.float64)) * (1 / s - 1)), torch.zeros(1)])
    torch.testing.assert_close(policy.sigmas(num_steps).double(), expected, atol=1e-6, rtol=0)


def test_text_encoder_layers_that_do_not_fit_are_refused(base: Path) -> None:
    needs = r"needs 2 layers between 0 and 3"
    refused(base, r"`text_encoder_out_layers` is \[9, 18, 27\]; .* " + needs, text_encoder_out_layers=(9, 18, 27))
    refused(base, r"`text_encoder_out_layers` is \[1\]; .* " + needs, text_encoder_out_layers=(1,))
    refused(base, r"`text_encoder_out_layers` is \[1, 4\]; .* " + needs, text_encoder_out_layers=(1, 4))


def test_adapters_go_into_all_projections_of_attention(base: Path) -> None:
    policy = FLUX2_KLEIN.load(base, Sampling(4, 0), lora=LoRA(rank=2, alpha=2))
    names = {name.removesuffix(".lora_A.default.weight") for name, _ in policy.network.named_parameters()}
    double = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
    expected = {f"transformer_blocks.0.attn.{name}" for name in double}
    expected |= {f"single_transformer_blocks.0.attn.{name}" for name in ("to_qkv_mlp_proj", "to_out")}
    assert {name for name in names if not name.endswith((".weight", ".bias"))} == expected
