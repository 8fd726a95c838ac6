"""Z-Image beyond what all families share: its guidance and its captions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ZImagePipeline

from lightning_modules.policies.flow import Sampling
from lightning_modules.seeding import generators_for
from tests.lightning_modules.policies.family import PROMPTS
from tests.lightning_modules.policies.tiny_z_image import Z_IMAGE, draw


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Z_IMAGE.save(tmp_path_factory.mktemp("z_image"))


@pytest.mark.parametrize(
    "options",
    [
        {"guidance_scale": 0.0},  # Turbo
        {"guidance_scale": 0.5},
        {"guidance_scale": 5.0, "negative_prompt": "a blurred and badly drawn image of nothing that was asked for"},
        {"guidance_scale": 5.0, "cfg_normalization": 1.0},
        {"guidance_scale": 5.0, "cfg_normalization": 0.7, "negative_prompt": "grey"},
    ],
)
def test_guidance_equals_the_stock_pipelines(folder: Path, options: dict[str, Any]) -> None:
    pipe = ZImagePipeline.from_pretrained(folder)
    policy = Z_IMAGE.load(folder, Sampling(4, 0), **options)
    ours = policy.generate(PROMPTS, [1, 2, 3]).clamp(0, 1)
    theirs = draw(pipe, policy, PROMPTS, policy.prepare_latents(generators_for([1, 2, 3])), 4, None)
    assert (ours - theirs).abs().max() < 1e-5
    plain = Z_IMAGE.load(folder, Sampling(4, 0)).generate(PROMPTS, [1, 2, 3]).clamp(0, 1)
    assert (ours - plain).abs().max() > 1e-3  # the option does something


def test_normalization_limits_each_image_for_itself(folder: Path) -> None:
    policy = Z_IMAGE.load(folder, Sampling(4, 0), guidance_scale=1.0, cfg_normalization=1.5)
    positive = torch.tensor([[3.0, 4.0], [3.0, 4.0]]).view(2, 1, 1, 2)  # length 5
    negative = torch.tensor([[0.0, 0.0], [3.0, 2.0]]).view(2, 1, 1, 2)
    # 2 * (3, 4) is cut from length 10 to 7.5; (3, 6) has length 6.7 and stays.
    expected = torch.tensor([[4.5, 6.0], [3.0, 6.0]]).view(2, 1, 1, 2)
    torch.testing.assert_close(policy.guide(positive, negative), expected)


def test_captions_of_any_length_are_encoded_alike(folder: Path) -> None:
    """The features do not depend on the captions beside them, and the mask counts the tokens."""
    policy = Z_IMAGE.load(folder, Sampling(4, 0), micro_batch_size=2)
    together = policy.encode(PROMPTS)
    lengths = together["mask"].sum(1).tolist()
    assert len({-(-length // 32) for length in lengths}) == 2  # one or two times 32 tokens
    for row, prompt in enumerate(PROMPTS):
        alone, _ = policy.pipe.encode_prompt([prompt], do_classifier_free_guidance=False, max_sequence_length=64)
        torch.testing.assert_close(together["embeds"][row, : lengths[row]], alone[0])


def test_a_dynamic_shift_depends_on_the_resolution(folder: Path) -> None:
    policy = Z_IMAGE.load(folder, Sampling(4, 0), (48, 32))
    assert torch.equal(policy.sigmas(2), torch.tensor([1.0, 0.75, 0.0]))  # 3 s / (1 + 2 s), the published form
    policy.pipe.scheduler.register_to_config(use_dynamic_shifting=True)
    scheduler = policy.scheduler()
    slope = (1.15 - 0.5) / (4096 - 256)  # 48 x 32 pixels are 6 x 4 tokens here
    scheduler.set_timesteps(sigmas=[1.0, 0.5], mu=0.5 + slope * (24 - 256))
    torch.testing.assert_close(policy.sigmas(2), scheduler.sigmas)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"height": 72, "width": 64}, r"are 72 x 64; .* draws at most 64 x 64 pixels"),
        ({"max_sequence_length": 128}, r"`max_sequence_length` is 128; .* takes at most 96 tokens"),
    ],
)
def test_what_has_no_position_is_refused_before_weights(folder: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Z_IMAGE.load(folder, Sampling(4, 0), **options)
    Z_IMAGE.load(folder, Sampling(1, 0), (64, 64), max_sequence_length=96).generate(["word " * 80], [1])
