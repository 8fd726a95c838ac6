"""The same proofs for every family: stock diffusers draws the same, replay is on-policy, exports load.

`objectives/test_learning.py` has what RL does to each.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from diffusers import DiffusionPipeline

from lightning_modules.policies.base import LoRA
from lightning_modules.policies.flow import Sampling
from lightning_modules.rl.sde import SDEType
from lightning_modules.seeding import generators_for
from tests.lightning_modules.policies.family import PROMPTS, Family, assert_ratio_is_one
from tests.lightning_modules.policies.test_flux1 import perturb
from tests.lightning_modules.policies.tiny_flux1 import FLUX1
from tests.lightning_modules.policies.tiny_flux1_kontext import FLUX1_KONTEXT
from tests.lightning_modules.policies.tiny_flux2 import FLUX2_KLEIN, FLUX2_KLEIN_EDIT
from tests.lightning_modules.policies.tiny_qwen_image import QWEN_IMAGE
from tests.lightning_modules.policies.tiny_qwen_image_edit import QWEN_IMAGE_EDIT
from tests.lightning_modules.policies.tiny_sana import SANA
from tests.lightning_modules.policies.tiny_sd3 import SD3
from tests.lightning_modules.policies.tiny_z_image import Z_IMAGE

pytestmark = pytest.mark.slow

FAMILIES = [FLUX1, FLUX1_KONTEXT, FLUX2_KLEIN, FLUX2_KLEIN_EDIT, SD3, SANA, Z_IMAGE, QWEN_IMAGE, QWEN_IMAGE_EDIT]
LORA = LoRA(rank=4, alpha=8)

every_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every family's tiny pipeline, saved once."""
    return {family.name: family.save(tmp_path_factory.mktemp(family.name)) for family in FAMILIES}


def stock(family: Family, folder: Path) -> DiffusionPipeline:
    pipe = family.policy.pipeline_class.from_pretrained(folder, **family.parts(folder))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@every_family
@pytest.mark.parametrize(("size", "num"), [(0, 1), (1, 3)])
def test_images_equal_the_stock_pipelines(family: Family, folders: dict[str, Path], size: int, num: int) -> None:
    """No SDE steps, the same noise: max difference in fp32 pixels under 1e-4, guidance included."""
    policy = family.load(folders[family.name], Sampling(4, 0), family.sizes[size])
    seeds, images = list(range(num)), family.images(num)
    ours = policy.generate(PROMPTS[:num], seeds, images=images).clamp(0, 1)
    latents = policy.prepare_latents(generators_for(seeds))
    theirs = family.draw(stock(family, folders[family.name]), policy, PROMPTS[:num], latents, 4, images)
    assert ours.shape == theirs.shape and theirs.std() > 0.01  # not one flat colour
    assert (ours - theirs).abs().max() < 1e-4


@every_family
@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_the_ratio_is_exactly_one(family: Family, folders: dict[str, Path], lora: LoRA | None) -> None:
    """Replayed log-probs are the sampled ones bit for bit, in uneven micro-batches, with weights that moved."""
    policy = family.load(folders[family.name], Sampling(4, 2), lora=lora, micro_batch_size=2)
    perturb(policy)
    for sde_type in get_args(SDEType):
        policy.sampling = Sampling(4, [0, 2], sde_type=sde_type, noise_level=0.7)
        trajectory = policy.rollout(PROMPTS, [1, 2, 3], images=family.images(3))
        for rows in (slice(0, 2), slice(2, 3)):
            assert_ratio_is_one(policy, trajectory.rows(rows))


@every_family
@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_kl_is_zero_at_the_start_and_has_a_gradient(
    family: Family, folders: dict[str, Path], lora: LoRA | None
) -> None:
    policy = family.load(folders[family.name], Sampling(4, 2), lora=lora, kl_weight=0.1)
    trajectory = policy.rollout(PROMPTS[:2], [1, 2], images=family.images(2))
    with torch.no_grad(), policy.reference():
        reference = policy.replay(trajectory, 0)
    assert policy.replay(trajectory, 0).kl(reference).abs().max() == 0
    perturb(policy)
    kl = policy.replay(trajectory, 0).kl(reference)
    assert kl.min() > 0
    kl.sum().backward()
    trained = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    assert sum(p.grad.abs().sum() for p in trained.values() if p.grad is not None) > 0
    assert all(name.startswith("network.") and ("lora" in name) == (lora is not None) for name in trained)


@every_family
def test_two_passes_batched_or_apart(family: Family, folders: dict[str, Path]) -> None:
    policy = family.load(folders[family.name], Sampling(4, 2))
    if not policy.guided:
        pytest.skip("draws without classifier-free guidance")
    conditioning = policy.encode(PROMPTS, family.images(3))
    latents, sigma = policy.prepare_latents(generators_for([1, 2, 3])), torch.tensor(0.7)
    with torch.no_grad():
        apart = policy.velocity(latents, sigma, conditioning)
        policy.batch_guidance = True
        batched = policy.velocity(latents, sigma, conditioning)
        policy.guidance_scale = 1.0
        alone = policy.velocity(latents, sigma, conditioning)
    torch.testing.assert_close(batched, apart, atol=1e-5, rtol=1e-5)
    assert (apart - alone).abs().max() > 1e-3  # guidance does something


@every_family
def test_prompts_that_are_cut_off_are_known(
    family: Family, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reference: what the pipeline's own call of the tokenizer that reads the most leaves out."""
    length = family.options.get("max_sequence_length", 24)
    policy = family.load(folders[family.name], Sampling(4, 2), max_sequence_length=length)
    policy.pipe.tokenizer_max_length = length  # Qwen-Image's own is 1024; what is beyond `length` it cuts off later
    longest, left_out = policy.reading([""])[0], []
    call = type(longest).__call__

    def record(tokenizer: Any, *args: Any, **kwargs: Any) -> Any:
        encoded = call(tokenizer, *args, **kwargs)
        if tokenizer is longest and kwargs.get("truncation"):
            left_out.append(bool(encoded.encodings[0].overflowing))
        return encoded

    monkeypatch.setattr(type(longest), "__call__", record)
    prompts = [" ".join(["Circle"] * words) for words in range(40)]
    expected = []
    for prompt in prompts:
        left_out.clear()
        policy.encode_texts([prompt], family.images(1))
        expected.append(any(left_out))
    assert policy.cut(prompts) == expected and policy.cut([]) == []
    assert not expected[0] and expected[-1] == (family is not QWEN_IMAGE_EDIT)


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_an_export_draws_the_same_in_the_stock_pipeline(
    folders: dict[str, Path], lora: LoRA | None, tmp_path: Path
) -> None:
    """The one family that stock diffusers cannot load by itself here; `callbacks/test_export.py` has the others."""
    family = QWEN_IMAGE_EDIT
    policy = family.load(folders[family.name], Sampling(4, 0), lora=lora)
    images = family.images(2)
    untrained = policy.generate(PROMPTS[:2], [5, 6], images=images)
    perturb(policy, 0.2 if lora else 0.05)
    ours = policy.generate(PROMPTS[:2], [5, 6], images=images).clamp(0, 1)
    assert (ours - untrained.clamp(0, 1)).abs().max() > 0.01
    policy.save_pretrained(tmp_path)
    pipe = stock(family, folders[family.name] if lora else tmp_path)
    if lora:
        pipe.load_lora_weights(tmp_path)
    latents = policy.prepare_latents(generators_for([5, 6]))
    theirs = family.draw(pipe, policy, PROMPTS[:2], latents, 4, images)
    assert (ours - theirs).abs().max() < 1e-4


@every_family
@pytest.mark.parametrize(
    "more",
    [
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": "selective"},
        {"gradient_checkpointing": "selective", "quantization": "nf4"},
        {"quantization": "int8"},
        {"quantization": "nf4"},
    ],
)
def test_savings_keep_the_ratio_at_one(family: Family, folders: dict[str, Path], more: dict[str, object]) -> None:
    """With adapters, offloaded encoders and other frozen types, in bf16 as on a GPU; gradients reach the adapters."""
    options = {"lora": LORA, "offload": True, "dtype": "bfloat16", "frozen_dtype": "float32"} | more
    policy = family.load(folders[family.name], Sampling(4, [0, 2]), **options)
    perturb(policy)
    trajectory = policy.rollout(PROMPTS[:2], [1, 2], images=family.images(2))
    replayed = policy.replay(trajectory, 1).log_prob(trajectory.next_latents[:, 1])
    assert (replayed - trajectory.log_probs[:, 1]).abs().max() < 1e-5
    replayed.sum().backward()
    trained = [p for p in policy.parameters() if p.requires_grad]
    assert sum(p.grad.abs().sum() for p in trained if p.grad is not None) > 0
    assert {p.dtype for p in trained} == {torch.float32} == {trajectory.latents.dtype}


@every_family
def test_there_are_blocks_to_compile(family: Family, folders: dict[str, Path]) -> None:
    policy = family.load(folders[family.name], Sampling(4, 2), compile=True, kl_weight=0.1)
    for network in (policy.network, policy._frozen_copy):
        assert network is not None
        assert sum(module._compiled_call_impl is not None for module in network.modules()) >= 1


@every_family
def test_bad_settings_are_refused_before_weights_are_loaded(family: Family, folders: dict[str, Path]) -> None:
    folder = folders[family.name]
    height, width = family.sizes[0]
    for options, message in (
        ({"height": height + 1, "width": width}, rf"`height` and `width` are {height + 1} x {width}; .* multiples of"),
        ({"lora": LoRA(targets=["to_q", "nope"])}, r"`flow\.lora\.targets` names nope, which matches no module"),
    ):
        options = {"height": height, "width": width, "dtype": "float32"} | family.options | options
        policy = family.policy(str(folder), Sampling(4, 2), **options)
        with pytest.raises(ValueError, match=message):
            policy.load()
        assert policy.pipe is None
    others = [other for other in FAMILIES if other.policy is not family.policy]
    for other in others:
        policy = other.policy(str(folder), Sampling(4, 2), height=height, width=width, dtype="float32", **other.options)
        with pytest.raises(
            ValueError, match=rf"is a {family.policy.pipeline_class.__name__}, .*{family.policy.__name__}"
        ):
            policy.load()
