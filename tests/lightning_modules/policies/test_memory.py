"""Settings that save memory change no number that they should not, or by no more than their rounding."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from torch.utils.checkpoint import CheckpointPolicy
from torch.utils.flop_counter import FlopCounterMode

from datamodules.sample import PromptSample
from lightning_modules.policies import memory
from lightning_modules.policies.base import LoRA, rounded_away
from lightning_modules.policies.flow import Sampling
from lightning_modules.policies.flux1 import Flux1Policy
from lightning_modules.policies.language import LanguagePolicy
from lightning_modules.prompt_rl import PromptRL
from tests.lightning_modules.policies.test_flux1 import PROMPTS, perturb
from tests.lightning_modules.test_prompt_rl import Listed, attach, gradients

pytestmark = pytest.mark.slow

MakeFlow = Callable[..., Flux1Policy]
MakeLanguage = Callable[..., LanguagePolicy]
LORA = LoRA(rank=4, alpha=8)


def saved_bytes(compute: Callable[[], torch.Tensor], beside: Iterable[torch.Tensor] = ()) -> int:
    """Bytes that autograd keeps for the backward pass beside some tensors, each storage once."""
    known = {tensor.untyped_storage().data_ptr() for tensor in beside}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = compute()
    del result
    return sum(size for address, size in kept.items() if address not in known)


def test_quantized_products_are_kept_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of bitsandbytes' products every second one, of others' by their size; what adapters multiply is made again."""
    policies: list[Any] = []
    monkeypatch.setattr(memory, "create_selective_checkpoint_contexts", policies.append)
    memory.selective_contexts()
    (policy,) = policies
    large, small = torch.empty(512, 512, device="meta"), torch.empty(512, 16, device="meta")
    for recompute in (False, True):
        context = SimpleNamespace(is_recompute=recompute)
        for name in ("bitsandbytes.gemm_4bit.default", "bitsandbytes.int8_scaled_mm.default", "aten.mm.default"):
            kept = [policy(context, name, large, matrix) for matrix in (large, large)]
            assert kept == [CheckpointPolicy.MUST_SAVE, CheckpointPolicy.PREFER_RECOMPUTE], name
        assert policy(context, "aten.mm.default", large, small) == CheckpointPolicy.PREFER_RECOMPUTE
        assert policy(context, "aten.gelu.default", large) == CheckpointPolicy.PREFER_RECOMPUTE


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_recomputed_activations_give_the_same_gradients(
    make_flow: MakeFlow,
    make_language: MakeLanguage,
    samples: list[PromptSample],
    lora: LoRA | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Gradients of a whole RL step are the same to the bit; less is kept for the backward pass, and more computed."""
    monkeypatch.setattr(memory, "SMALL", 8)  # the tiny networks' own layers are as small as adapters
    found, operations, kept = [], [], []
    for how in (False, "selective", True):
        torch.manual_seed(0)  # of the adapters' start
        flow, language = (make(lora=lora, gradient_checkpointing=how) for make in (make_flow, make_language))
        perturb(flow)
        module = attach(PromptRL(flow, Listed([0.0, 1.0, 3.0, 1.0]), language, 4, 2))
        torch.manual_seed(0)
        rollout = module.collect(samples[:1])
        assert rollout.completions is not None
        kept.append(
            (
                saved_bytes(lambda flow=flow, rollout=rollout: flow.replay(rollout.trajectory, 0).mean),
                saved_bytes(lambda language=language, rollout=rollout: language.log_probs(rollout.completions)),
            )
        )
        with FlopCounterMode(display=False) as counter:
            module.update(rollout)
        found.append(gradients(module))
        operations.append(counter.get_total_flops())
    assert sum(g.abs().sum() for g in found[0].values()) > 0
    for one in found[1:]:
        assert found[0].keys() == one.keys() and all(torch.equal(found[0][name], one[name]) for name in one)
    plain, selective, whole = operations
    assert plain < selective < whole and (selective - plain) / (whole - plain) < 0.75
    assert kept[2][0] < kept[0][0] and kept[2][1] < kept[0][1]


@pytest.mark.parametrize(("quantization", "error"), [("nf4", 0.25), ("int8", 0.02)])
def test_quantized_policies_roll_out_replay_and_learn(
    make_flow: MakeFlow, make_language: MakeLanguage, samples: list[PromptSample], quantization: str, error: float
) -> None:
    """The ratio is 1 on quantized weights too, gradients reach the adapters, and velocities are near the full ones."""
    flow = make_flow(lora=LORA, quantization=quantization)
    language = make_language(lora=LORA, quantization=quantization)
    rounded = {name for name, p in flow.network.named_parameters() if p.dtype in (torch.uint8, torch.int8)}
    assert rounded and not any("lora" in name for name in rounded)
    module = attach(PromptRL(flow, Listed([0.0, 1.0, 3.0, 1.0]), language, 4, 2))
    rollout = module.collect(samples[:1])
    ratios = module.check_ratio(rollout)
    assert ratios["flow"] < 1e-5 and ratios["language"] < 1e-4
    before = {n: p.detach().clone() for n, p in module.named_parameters() if p.requires_grad}
    module.update(rollout)
    moved = [name for name, p in module.named_parameters() if p.requires_grad and not torch.equal(before[name], p)]
    assert any("flow" in name for name in moved) and any("language" in name for name in moved)

    full = make_flow()
    conditioning, latents = full.encode(PROMPTS[:2]), torch.randn(2, *full.latent_shape)
    with torch.no_grad(), flow.reference():
        ours = flow.velocity(latents, torch.tensor(0.6), conditioning)
        exact = full.velocity(latents, torch.tensor(0.6), conditioning)
    assert 0 < (ours - exact).norm() / exact.norm() < error


@pytest.mark.parametrize("targets", [["to_q"], ["ff.net.2", "proj_out"]], ids=["beside adapters", "inside adapters"])
def test_int8_keeps_its_scales_beside_its_weights(make_flow: MakeFlow, targets: list[str]) -> None:
    """Moving a module copies its weights; what bitsandbytes keeps of them has to follow.

    peft's wrapper around such a layer is a class of the same name, without what bitsandbytes keeps.
    """
    policy = make_flow(lora=LoRA(4, 8, targets), quantization="int8")
    policy._apply(lambda tensor: tensor.clone())
    layers = [module for module in policy.modules() if isinstance(module, bnb.nn.Linear8bitLt)]
    wrappers = [
        module for module in policy.modules() if isinstance(getattr(module, "base_layer", None), bnb.nn.Linear8bitLt)
    ]
    assert layers and bool(wrappers) == (targets != ["to_q"])
    for layer in layers:
        kept = [holder.CB for holder in (layer.weight, layer.state) if getattr(holder, "CB", None) is not None]
        assert kept and all(each.data_ptr() == layer.weight.data.data_ptr() for each in kept)
    assert policy.generate(PROMPTS[:1], [1]).isfinite().all()


def test_parts_that_wait_on_the_cpu_are_lent_and_returned(make_flow: MakeFlow) -> None:
    """Offloaded parts are no submodules, so nothing moves them for good; images are the same."""
    policy, plain = make_flow(offload=True), make_flow()
    assert not any(name.startswith(("vae", "text_encoder")) for name, _ in policy.named_parameters())
    images, others = policy.generate(PROMPTS[:2], [1, 2]), plain.generate(PROMPTS[:2], [1, 2])
    assert torch.equal(images, others)
    meta_free = [p.device.type for part in policy._frozen_parts().values() for p in part.parameters()]
    assert set(meta_free) == {"cpu"}
    assert not any(p.requires_grad for part in policy._frozen_parts().values() for p in part.parameters())


def test_parts_return_without_a_copy(make_flow: MakeFlow, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy on the CPU stands in for a GPU's: it is in use inside, and gone with the tensors back after it."""
    policy, plain = make_flow(offload=True), make_flow()
    encoder, vae = policy.pipe.text_encoder_2, policy.pipe.vae
    encoder.register_buffer("scale", torch.ones(3))
    assert encoder.shared.weight is encoder.encoder.embed_tokens.weight
    copies: list[torch.Tensor] = []

    def copied(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        assert device.type == "cpu"
        copies.append(tensor.clone())
        return copies[-1]

    def places(*parts: torch.nn.Module) -> list[int]:
        return [tensor.data_ptr() for part in parts for tensor in (*part.parameters(), *part.buffers())]

    monkeypatch.setattr(memory, "_copied", copied)
    before = places(encoder, vae)
    with policy.encoding():
        inside = places(encoder)
        assert set(inside).isdisjoint(before) and places(vae) == before[len(inside) :]
        assert encoder.shared.weight is encoder.encoder.embed_tokens.weight
        encoder.register_buffer("made", torch.zeros(2))
    assert places(vae) == before[len(inside) :] and set(before) < set(places(encoder, vae))
    assert encoder.made.device.type == "cpu"
    del encoder.made
    assert places(encoder, vae) == before
    copies.clear()
    images = policy.generate(PROMPTS[:2], [1, 2])
    assert torch.equal(images, plain.generate(PROMPTS[:2], [1, 2])) and places(encoder, vae) == before
    parts = policy._frozen_parts().values()
    assert len(copies) == sum(1 for part in parts for _ in (*part.parameters(), *part.buffers())), "each once"


def test_frozen_parts_in_another_type(make_flow: MakeFlow) -> None:
    """fp32 weights to train beside bf16 encoders: the network gets fp32, and images stay close."""
    policy, plain = make_flow(frozen_dtype="bfloat16"), make_flow()
    assert policy.pipe.vae.dtype == policy.pipe.text_encoder_2.dtype == torch.bfloat16
    assert policy.network.dtype == torch.float32
    conditioning = policy.encode(PROMPTS)
    assert {tensor.dtype for tensor in conditioning.tensors.values()} == {torch.float32}
    images, others = policy.generate(PROMPTS[:2], [1, 2]), plain.generate(PROMPTS[:2], [1, 2])
    assert 0 < (images - others).abs().mean() < 0.02


@pytest.mark.parametrize(
    ("backend", "lora"),
    [("inductor", LORA), ("aot_eager", None), ("aot_eager", LORA)],
    ids=["generated code", "graphs, full", "graphs, lora"],
)
def test_compiled_blocks_keep_the_ratio_at_one(
    make_flow: MakeFlow, backend: str, lora: LoRA | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The KL is 0 before training, since the reference is compiled as well: seen in graphs and guards alone.

    Generating code for everything takes a minute: with it, drawing and replay are compared, with adapters.
    """
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    policy = make_flow(compile=True, sampling=Sampling(4, 2), lora=lora, kl_weight=0.1 * (backend == "aot_eager"))
    if policy.kl_weight:
        trajectory = policy.rollout(PROMPTS[:2], [1, 2])
        with torch.no_grad(), policy.reference():
            reference = policy.replay(trajectory, 0)
        assert policy.replay(trajectory, 0).kl(reference).max() < 1e-9
    perturb(policy)
    trajectory = policy.rollout(PROMPTS[:2], [1, 2])
    for step in range(2):
        replayed = policy.replay(trajectory, step)
        assert replayed.mean.requires_grad
        difference = replayed.log_prob(trajectory.next_latents[:, step]) - trajectory.log_probs[:, step]
        assert difference.abs().max() < 1e-6


def test_attention_backends_are_checked(make_flow: MakeFlow) -> None:
    policy = make_flow(attention_backend="_native_math")
    assert policy.generate(PROMPTS[:1], [1]).isfinite().all()
    policy.network.set_attention_backend("native")  # diffusers keeps the choice for the whole process
    with pytest.raises(ValueError, match="no_such_backend.* must be one of"):
        make_flow(attention_backend="no_such_backend")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantization": "nf4"}, r"`flow\.quantization` is nf4, whose weights cannot be trained; add `flow\.lora`"),
        (
            {"dtype": "bfloat16", "frozen_dtype": "float32", "kl_weight": 0.1},
            r"frozen_dtype torch.float32, but its reference takes inputs of its `dtype`, torch.bfloat16: use that",
        ),
    ],
)
def test_settings_that_cannot_train_are_refused(make_flow: MakeFlow, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_flow(**options)


@pytest.mark.parametrize("rate", [3e-7, 1e-5, 1e-3])
def test_updates_that_are_rounded_away_are_warned_of(make_flow: MakeFlow, rate: float) -> None:
    """Twenty steps of AdamW move bf16 weights as far as fp32 ones along their way, or a warning says otherwise."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        network = make_flow(dtype="bfloat16", learning_rate=rate).network
    start = [weight.detach().clone() for weight in network.parameters()]
    moved = []
    for weights in (list(network.parameters()), [torch.nn.Parameter(weight.float()) for weight in start]):
        optimizer, generator = torch.optim.AdamW(weights, lr=rate, weight_decay=0.0), torch.Generator().manual_seed(0)
        slopes = [torch.randn(weight.shape, generator=generator) for weight in weights]
        for _ in range(20):
            for weight, slope in zip(weights, slopes, strict=True):
                weight.grad = (slope + torch.randn(weight.shape, generator=generator)).to(weight.dtype)
            optimizer.step()
        ways = [(weight.detach().float() - old.float()).flatten() for weight, old in zip(weights, start, strict=True)]
        moved.append(torch.cat(ways))
    share = float(moved[0] @ moved[1] / moved[1].square().sum())
    warned = [str(one.message) for one in said if "rounded away" in str(one.message)]
    if rate > 1e-4:
        assert share > 0.97 and not warned
    else:
        assert share < 0.1 and re.search(r"Flux1Policy trains all weights in torch.bfloat16 .* 9\d%|100%", warned[0])


def test_weights_that_rounding_holds_are_counted() -> None:
    """Next to 1 bf16 numbers are 2^-7 apart, next to .01 2^-14, so that .001 moves the second alone."""
    network = torch.nn.Linear(4, 1, bias=False).bfloat16()
    network.weight.data = torch.tensor([[1.0, -1.0, 0.01, 1.0]]).bfloat16()
    assert rounded_away(network, 1e-3) == 0.75
    assert rounded_away(network, 0.1) == 0 and rounded_away(network.float(), 1e-3) == 0


def test_what_never_learns_is_kept_in_its_own_type(make_flow: MakeFlow, make_language: MakeLanguage) -> None:
    """A frozen agent; and the reference, to which the agent's KL is 0 at the start under bf16-mixed precision."""
    for make in (make_flow, make_language):
        frozen = make(learning_rate=None, frozen_dtype="bfloat16")
        assert {p.dtype for p in frozen.network.parameters()} == {torch.bfloat16}
    policy = make_flow(frozen_dtype="bfloat16", kl_weight=0.1, sampling=Sampling(4, 2))
    assert {p.dtype for p in policy.network.parameters()} == {torch.float32}
    assert {p.dtype for p in policy.active.parameters()} == {torch.float32}
    for weight in policy.network.parameters():
        weight.data = weight.data.bfloat16().float()  # as published ones are
    trajectory = policy.rollout(PROMPTS[:2], [1, 2])
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad(), policy.reference():
            assert {p.dtype for p in policy.active.parameters()} == {torch.bfloat16}
            reference = policy.replay(trajectory, 0)
        assert policy.replay(trajectory, 0).kl(reference).max() == 0
    perturb(policy, 0.02)
    with torch.autocast("cpu", torch.bfloat16):  # another one, since autocast keeps the weights that it has cast
        assert policy.replay(trajectory, 0).kl(reference).min() > 1e-3
    with torch.no_grad(), policy.reference():  # given fp32 inputs
        assert policy.replay(trajectory, 0).mean.isfinite().all()


def test_eight_bit_adamw_keeps_an_agent_a_group(
    make_flow: MakeFlow, make_language: MakeLanguage, samples: list[PromptSample], tmp_path: Path
) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")

    def optimizer(groups: list[dict[str, Any]]) -> Any:
        return bitsandbytes.optim.AdamW8bit(groups)

    flow, language = make_flow(learning_rate=1e-3), make_language(learning_rate=2e-3)
    module = attach(PromptRL(flow, Listed([0.0, 1.0, 3.0, 1.0]), language, 4, 2, optimizer=optimizer))
    module.update(module.collect(samples[:1]))
    used = module.optimizers().optimizer  # type: ignore[union-attr]
    assert [(group["name"], group["lr"]) for group in used.param_groups] == [("flow", 1e-3), ("language", 2e-3)]
    assert any(state["state1"].dtype == torch.uint8 for state in used.state.values())


def test_attention_that_fails_in_the_backward_pass_is_off(make_language: MakeLanguage) -> None:
    """Of all kernels that PyTorch may choose: cuDNN's gives NaN or crashes on H100 and H200."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(True)
    try:
        make_language()
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        assert torch.backends.cuda.flash_sdp_enabled() and torch.backends.cuda.mem_efficient_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
