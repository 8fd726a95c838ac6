"""Source images of FLUX.1-Kontext and FLUX.2-klein: sizes, sharing, and images without a source."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from lightning_modules.policies.flow import Sampling
from lightning_modules.policies.pipeline import PipelinePolicy
from lightning_modules.seeding import generators_for
from tests.lightning_modules.policies import tiny_flux1_kontext, tiny_flux2
from tests.lightning_modules.policies.family import PROMPTS, Family
from tests.lightning_modules.policies.tiny_flux1_kontext import FLUX1_KONTEXT
from tests.lightning_modules.policies.tiny_flux2 import FLUX2_KLEIN_EDIT

EDITORS = [FLUX1_KONTEXT, FLUX2_KLEIN_EDIT]
every_editor = pytest.mark.parametrize("family", EDITORS, ids=lambda family: family.name)


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family.name: family.save(tmp_path_factory.mktemp(family.name)) for family in EDITORS}


def noise_image(width: int, height: int, seed: int = 1) -> Image.Image:
    """Coarse noise: a wrong resize or crop changes it a lot."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (height // 4 + 1, width // 4 + 1, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy()).resize((width, height))


def assert_drawn_as_stock(
    family: Family, policy: PipelinePolicy, num: int, images: list[Image.Image] | None, steps: int = 4
) -> None:
    pipe = policy.pipeline_class.from_pretrained(policy.model)
    pipe.set_progress_bar_config(disable=True)
    seeds = list(range(num))
    ours = policy.generate(PROMPTS[:num], seeds, steps, images=images).clamp(0, 1)
    latents = policy.prepare_latents(generators_for(seeds))
    theirs = family.draw(pipe, policy, PROMPTS[:num], latents, steps, images)
    assert theirs.std() > 0.01
    assert (ours - theirs).abs().max() < 1e-4


@every_editor
def test_an_editor_draws_from_text_alone_as_stock_does(family: Family, folders: dict[str, Path]) -> None:
    policy = family.load(folders[family.name], Sampling(4, 0))
    assert_drawn_as_stock(family, policy, 3, None)


@every_editor
def test_a_source_of_any_size_is_rounded_as_stock_does(family: Family, folders: dict[str, Path]) -> None:
    policy = family.load(folders[family.name], Sampling(4, 0))
    assert_drawn_as_stock(family, policy, 1, [noise_image(101, 75)])


@every_editor
def test_prompt_and_source_are_listened_to(family: Family, folders: dict[str, Path]) -> None:
    """Without an effect of the source, equal images would prove little."""
    policy = family.load(folders[family.name], Sampling(4, 0))
    images = [noise_image(64, 64, seed) for seed in (1, 2)]
    base = policy.generate(PROMPTS[:1], [3], images=images[:1])
    assert (policy.generate(PROMPTS[1:2], [3], images=images[:1]) - base).abs().max() > 1e-3
    assert (policy.generate(PROMPTS[:1], [3], images=images[1:]) - base).abs().max() > 1e-3
    assert (policy.generate(PROMPTS[:1], [3]) - base).abs().max() > 1e-3


@every_editor
def test_a_shared_source_is_encoded_once(
    family: Family, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = family.load(folders[family.name], Sampling(4, 0), micro_batch_size=2)
    first, second = noise_image(64, 64, 1), noise_image(64, 64, 2)
    seen: list[int] = []
    encode: Callable[..., Any] = policy.pipe.vae.encode
    monkeypatch.setattr(policy.pipe.vae, "encode", lambda x, *args: (seen.append(len(x)), encode(x, *args))[1])
    conditioning = policy.encode([PROMPTS[0]] * 4, [first, second, first, second])
    assert seen == [1, 1]
    assert conditioning.tensors["source"].shape[0] == 2
    assert torch.equal(conditioning["source"][0], conditioning["source"][2])
    assert not torch.equal(conditioning["source"][0], conditioning["source"][1])


@every_editor
def test_sources_of_one_batch_need_one_size(family: Family, folders: dict[str, Path]) -> None:
    images = [noise_image(96, 64), noise_image(64, 64)]
    policy = family.load(folders[family.name], Sampling(4, 0))
    with pytest.raises(ValueError, match="encoded as 64 x 64, 64 x 96 pixels; .* set `source_size`"):
        policy.generate(PROMPTS[:2], [1, 2], images=images)
    policy = family.load(folders[family.name], Sampling(4, 0), source_size=(64, 64))
    ours = policy.generate(PROMPTS[:2], [1, 2], images=images)
    # 96 x 64 covers 64 x 64 without scaling: the crop takes 16 columns away on each side.
    cropped = [images[0].crop((16, 0, 80, 64)), images[1]]
    torch.testing.assert_close(ours, policy.generate(PROMPTS[:2], [1, 2], images=cropped))


@pytest.mark.slow
def test_kontext_resizes_to_its_training_sizes_as_stock_does(tmp_path: Path) -> None:
    """The source has a million pixels; an autoencoder of 64 pixels a token keeps the sequence short."""

    def build() -> Any:
        pipe = tiny_flux1_kontext.build()
        vae = AutoencoderKL(
            block_out_channels=(4,) * 6,
            down_block_types=("DownEncoderBlock2D",) * 6,
            up_block_types=("UpDecoderBlock2D",) * 6,
            latent_channels=12,
            norm_num_groups=1,
            mid_block_add_attention=False,
        )
        vae.register_to_config(scaling_factor=0.9, shift_factor=0.1)
        return type(pipe)(**(pipe.components | {"vae": vae}))

    family = replace(FLUX1_KONTEXT, build=build, options={"max_sequence_length": 18})
    policy = family.load(family.save(tmp_path), Sampling(2, 0), (64, 128))
    image = noise_image(270, 130)  # in whole tokens 256 x 128: the nearest of the 17 sizes is 1456 x 720
    assert policy.encode_sources([image])["source"].shape[1] == (1456 // 64) * (720 // 64)
    assert_drawn_as_stock(family, policy, 1, [image], steps=2)


@pytest.mark.slow
def test_klein_scales_big_sources_down_as_stock_does(tmp_path: Path) -> None:
    """1400 x 1000 is above a million pixels: 1211 x 865, then cropped to tokens of 128 pixels."""
    family = replace(FLUX2_KLEIN_EDIT, build=lambda: tiny_flux2.build(is_distilled=True, levels=7))
    policy = family.load(family.save(tmp_path), Sampling(2, 0), (128, 256))
    image = noise_image(1400, 1000)
    assert policy.encode_sources([image])["source"].shape[1] == (1211 // 128) * (865 // 128)
    assert_drawn_as_stock(family, policy, 1, [image], steps=2)


def test_klein_refuses_tiny_sources(folders: dict[str, Path]) -> None:
    policy = FLUX2_KLEIN_EDIT.load(folders["flux2_klein_edit"], Sampling(4, 0))
    with pytest.raises(ValueError, match="Image too small: 32×64"):
        policy.generate(PROMPTS[:1], [1], images=[noise_image(32, 64)])
