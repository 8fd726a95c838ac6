"""The estimate before weights load: counts against loaded models, peaks against PyTorch's own measurements."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import lightning as L
import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from lightning.pytorch.cli import OptimizerCallable
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, Qwen3Config, Qwen3ForCausalLM

from benchmarks.system.step.__main__ import measured_peak
from datamodules.sample import PromptSample
from lightning_modules.objectives import DiffusionNFT, FlowGRPO, RefinerGRPO
from lightning_modules.policies import memory
from lightning_modules.policies.base import LoRA, Policy
from lightning_modules.policies.flow import Sampling
from lightning_modules.policies.flux1 import Flux1Policy
from lightning_modules.policies.kept import Decay
from lightning_modules.policies.language import LanguagePolicy
from lightning_modules.policies.memory import quantize_linears
from lightning_modules.policies.vision_language import VisionLanguagePolicy
from lightning_modules.preflight import check as preflight
from lightning_modules.preflight.check import Estimate, suggestions
from lightning_modules.preflight.estimate import Setting, agent_estimate, estimate
from lightning_modules.preflight.formulas import (
    cache_bytes,
    optimizer_state,
    quantized_savings,
    trajectory_bytes,
    weight_bytes,
)
from lightning_modules.preflight.meta_models import (
    flow_on_meta,
    language_on_meta,
    meta_batch,
    meta_completions,
    meta_trajectory,
)
from lightning_modules.preflight.peak_memory import count_memory, peak_bytes
from lightning_modules.prompt_rl import PromptRL
from lightning_modules.rl.schedule import Window
from miniature.scenes.detector import ShapesDetector
from rewards.geneval.reward import GenEvalReward
from tests.lightning_modules.cli.test_command import FLOW, LANGUAGE, complaint, fit
from tests.lightning_modules.objectives.batches import batch_of
from tests.lightning_modules.policies.family import Family
from tests.lightning_modules.policies.test_families import FAMILIES
from tests.lightning_modules.policies.test_memory import saved_bytes
from tests.lightning_modules.policies.tiny_vision_language import KINDS
from tests.lightning_modules.policies.tiny_vision_language import build as build_vision_language

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*torch_dtype.*", "ignore:.*gradient_checkpointing.*"),
]

LORA = LoRA(rank=4, alpha=8)
KIB, MIB = 2**10, 2**20


def flow(model: str | Path = "miniature/flow", **kwargs: Any) -> Flux1Policy:
    small: dict[str, Any] = {
        "height": 32,
        "width": 32,
        "max_sequence_length": 18,
        "dtype": "float32",
        "learning_rate": 1e-4,
    }
    return Flux1Policy(str(model), **({"sampling": Sampling(8, 3)} | small | kwargs))


def language(**kwargs: Any) -> LanguagePolicy:
    small: dict[str, Any] = {"template": "{prompt}", "max_new_tokens": 32, "dtype": "float32", "learning_rate": 1e-4}
    return LanguagePolicy("miniature/language", **(small | kwargs))


def agents(flow_settings: dict[str, Any] | None = None, language_settings: dict[str, Any] | None = None) -> PromptRL:
    reward = GenEvalReward(ShapesDetector())
    return PromptRL(flow(**(flow_settings or {})), reward, language(**(language_settings or {})))


def held(policy: Policy) -> dict[str, tuple[int, int, int]]:
    """Parameters, trained ones and bytes of each network of a loaded policy."""
    return {
        name: (
            sum(p.numel() for p in network.parameters()),
            sum(p.numel() for p in network.parameters() if p.requires_grad),
            sum(t.numel() * t.element_size() for t in (*network.parameters(), *network.buffers())),
        )
        for name, network in policy.named_children()
    }


# --- counts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("lora", [None, LORA, LoRA(3, 6, targets=["ff.net.0.proj"])], ids=["full", "lora", "targets"])
def test_flow_counts_are_the_loaded_models(dtype: str, lora: LoRA | None) -> None:
    module = PromptRL(flow(dtype=dtype, lora=lora), GenEvalReward(ShapesDetector()), num_retained=8)
    parts = agent_estimate(module, "flow", Setting(), persistent_only=True).networks
    module.flow.load()
    loaded = held(module.flow)
    loaded["transformer"] = loaded.pop("network")
    assert {part.name for part in parts} == {f"flow.{name}" for name in loaded}
    for part in parts:
        parameters, trained, size = loaded[part.name.removeprefix("flow.")]
        assert (part.parameters, part.trained) == (parameters, trained)
        assert part.bytes == pytest.approx(size, abs=KIB)  # some buffers stay in fp32


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_language_counts_are_the_loaded_models(dtype: str, lora: LoRA | None) -> None:
    module = agents(language_settings={"dtype": dtype, "lora": lora, "kl_weight": 0.1})
    found = agent_estimate(module, "language", Setting(), persistent_only=True)
    assert module.language is not None
    module.language.load()
    networks = held(module.language)
    (part,) = found.networks
    parameters, trained, size = networks["network"]
    assert (part.parameters, part.trained) == (parameters, trained)
    assert part.bytes == pytest.approx(size, abs=KIB)
    assert ("reference" in found.persistent) == ("_frozen_copy" in networks) == (lora is None)
    if lora is None:
        assert found.persistent["reference"] == part.bytes


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cls", [LanguagePolicy, VisionLanguagePolicy])
@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_vision_language_counts_are_the_loaded_models(kind: str, cls: Any, lora: LoRA | None, tmp_path: Path) -> None:
    policy = cls(str(build_vision_language(kind, tmp_path)), "{prompt}", dtype="float32", lora=lora)
    module = PromptRL(flow(), GenEvalReward(ShapesDetector()), policy)
    found = agent_estimate(module, "language", Setting(2, source=(64, 64)))
    (part,) = found.networks
    assert None not in found.transient.values()
    policy.load()
    parameters, trained, _ = held(policy)["network"]
    assert (part.parameters, part.trained) == (parameters, trained) and trained < parameters


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_family_is_counted_and_runs_on_shapes(family: Family, tmp_path: Path) -> None:
    folder = family.save(tmp_path / "flow")
    settings = {"height": 32, "width": 32, "dtype": "float32", "learning_rate": 1e-3, **family.options}
    policy = family.policy(str(folder), Sampling(4, 2), lora=LORA, **settings)
    module = PromptRL(policy, GenEvalReward(ShapesDetector()), num_retained=8)
    found = agent_estimate(module, "flow", Setting(source=(64, 64) if family.sources else None))
    assert {"drawing", "decoding", "updating flow"} <= set(found.transient)
    assert None not in found.transient.values()
    loaded = family.load(folder, Sampling(4, 2), lora=LORA)
    counts = {name: count for name, (*count, _) in held(loaded).items()}
    counts["transformer"] = counts.pop("network")
    assert {part.name: [part.parameters, part.trained] for part in found.networks} == {
        f"flow.{name}": count for name, count in counts.items()
    }
    for steps, neighbours in ((2, True), ([0, 2], False)):
        loaded.sampling = Sampling(4, steps)
        drawn = loaded.rollout(["a red circle"], [0], images=family.images(1))
        kept = [
            tensor.untyped_storage() for tensor in (drawn.latents, drawn.next_latents, drawn.log_probs, drawn.final)
        ]
        once = {storage.data_ptr(): storage.nbytes() for storage in kept}
        assert trajectory_bytes(loaded.latent_shape, 2, 1, neighbours) == sum(once.values())


def test_an_estimate_touches_neither_the_agents_nor_the_generator() -> None:
    module = agents({"lora": LORA}, {"lora": LORA})
    before = torch.get_rng_state()
    estimate(module)
    assert torch.equal(before, torch.get_rng_state())
    assert not list(module.parameters()) and module.flow.network is None


# --- bytes by hand ----------------------------------------------------------------------------------------------------


def test_the_miniatures_persistent_bytes_by_hand() -> None:
    """926,672 of transformer and 287,551 frozen beside it; 235,104 of refiner; all fp32."""
    found = estimate(agents(language_settings={"kl_weight": 0.1}), Setting(2))
    assert {part.name: part.parameters for part in found.networks} == {
        "flow.transformer": 926_672,
        "flow.vae": 137_919,
        "flow.text_encoder": 58_624,
        "flow.text_encoder_2": 91_008,
        "language": 235_104,
    }
    trained = 926_672 + 235_104
    assert found.persistent["gradients"] == 4 * trained
    assert found.persistent["optimizer state (AdamW)"] == 8 * trained
    assert 4 * 235_104 <= found.persistent["reference"] <= 4 * 235_104 + KIB
    weights = 4 * (trained + 287_551)
    assert weights <= found.persistent["weights"] <= weights + 2 * KIB  # buffers
    assert found.persistent_total == sum(found.persistent.values())
    # 2 prompts x 8 images; 16 tokens of 48 numbers, before 3 SDE steps, after the last and at the end; 3 log-probs.
    assert found.per_step["trajectories"] == 16 * 4 * (5 * 16 * 48 + 3)
    for window, states in ((Window(3), 5), (Window(3, contiguous=False), 7)):
        module = PromptRL(flow(sampling=Sampling(8, window)), GenEvalReward(ShapesDetector()), num_retained=8)
        assert estimate(module, Setting(2)).per_step["trajectories"] == 16 * 4 * (states * 16 * 48 + 3)
    # 2 originals and 12 rewrites; T5's 18 x 64 and CLIP's 64 numbers, and a mask of 18 longs.
    assert found.per_step["encoded prompts"] == 14 * (4 * (18 * 64 + 64) + 8 * 18)


def test_lora_by_hand() -> None:
    """Rank x (in + out) of every target: 2 double blocks with 8 of 96 x 96, 1 single block with 3, 8 bytes of Adam."""
    found = estimate(agents({"lora": LORA, "dtype": "bfloat16"}, {"learning_rate": None}), Setting(2))
    adapters = 4 * (96 + 96) * (2 * 8 + 3)
    (transformer,) = (part for part in found.networks if part.name == "flow.transformer")
    assert transformer.trained == adapters and transformer.parameters == 926_672 + adapters
    assert transformer.bytes == 2 * 926_672 + 4 * adapters  # adapters stay in fp32
    assert found.persistent["gradients"] == 4 * adapters
    assert found.persistent["optimizer state (AdamW)"] == 8 * adapters


def test_weight_bytes_by_hand() -> None:
    network = nn.Sequential(nn.Linear(64, 128, dtype=torch.bfloat16), nn.LayerNorm(128), nn.Linear(128, 10))
    network[0].requires_grad_(False)
    assert weight_bytes(network) == 2 * (64 * 128 + 128) + 4 * 2 * 128 + 4 * (128 * 10 + 10)
    layers = [nn.Linear(64, 128, dtype=torch.bfloat16)]
    assert quantized_savings(layers, "nf4") == 2 * 64 * 128 - (64 * 128 // 2 + 128 + 2)  # 128 blocks of 64
    assert quantized_savings(layers, "int8") == 64 * 128


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_quantized_bytes_are_bitsandbytes(quantization: str) -> None:
    """Within 1 %: nf4 also keeps a table of 16 numbers for each layer, int8 a scale for each row."""
    policy = flow(quantization=quantization, lora=LORA)
    module = PromptRL(policy, GenEvalReward(ShapesDetector()), num_retained=8)
    found = agent_estimate(module, "flow", Setting(), persistent_only=True)
    (transformer,) = (part for part in found.networks if part.name == "flow.transformer")
    policy.load()
    size = 0
    for parameter in policy.network.parameters():
        size += parameter.nbytes
        if (state := getattr(parameter, "quant_state", None)) is not None:
            size += state.absmax.nbytes
    assert transformer.bytes == pytest.approx(size, rel=0.01)


def test_bytes_of_one_large_nf4_layer_are_bitsandbytes() -> None:
    """The scales are most of what a formula can get wrong: here they are not lost among other weights."""
    network = nn.Sequential(nn.Linear(512, 1024, bias=False).requires_grad_(False))
    expected = weight_bytes(network) - quantized_savings(list(network.children()), "nf4")  # type: ignore[arg-type]
    quantize_linears(network, "nf4", torch.float32)
    state = network[0].weight.quant_state
    size = network[0].weight.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes
    assert expected == pytest.approx(size, rel=1e-4)


def test_key_value_cache_bytes_are_the_caches() -> None:
    config = Qwen3Config(
        vocab_size=32,
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
    )
    cache = DynamicCache(config=config)
    Qwen3ForCausalLM(config)(torch.zeros(5, 7, dtype=torch.long), past_key_values=cache, use_cache=True)
    layers: list[Any] = cache.layers
    made = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
    assert cache_bytes(config, 5, 7, 4) == made == 2 * 3 * 2 * 8 * 5 * 7 * 4


@pytest.mark.parametrize(
    ("optimizer", "name", "numbers"),
    [
        (torch.optim.AdamW, "AdamW", 2.0),
        (lambda groups: torch.optim.AdamW(groups, amsgrad=True), "AdamW", 3.0),
        (lambda groups: torch.optim.AdamW(groups, fused=True), "AdamW", 2.0),
        (torch.optim.SGD, "SGD", 0.0),
        (lambda groups: torch.optim.SGD(groups, momentum=0.9), "SGD", 1.0),
        (bnb.optim.AdamW, "AdamW", 2.0),
        (bnb.optim.AdamW8bit, "AdamW8bit", 2.03125 / 4),
    ],
)
def test_optimizer_state(optimizer: OptimizerCallable, name: str, numbers: float) -> None:
    state = optimizer_state(optimizer, flow_on_meta(flow()))
    assert (state.name, state.bytes) == (name, int(numbers * 4 * 926_672))


def test_optimizer_state_is_what_an_optimizer_keeps() -> None:
    policy = flow(dtype="bfloat16")
    expected = optimizer_state(torch.optim.AdamW, flow_on_meta(policy)).bytes
    policy.load()
    optimizer = torch.optim.AdamW([policy.parameter_group()])
    for parameter in policy.network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    tensors = [value for state in optimizer.state.values() for value in state.values()]
    assert sum(tensor.nbytes for tensor in tensors if tensor.ndim) == expected


def test_an_optimizer_that_cannot_be_tried_counts_two_numbers_a_weight() -> None:
    def refuses(groups: Any) -> Any:
        raise RuntimeError("this optimizer needs a GPU")

    state = optimizer_state(refuses, flow_on_meta(flow()))
    assert (state.name, state.bytes) == ("unknown", 2 * 4 * 926_672)


# --- what passes, against PyTorch -------------------------------------------------------------------------------------


def with_gradients(policy: Policy) -> list[torch.Tensor]:
    """Weights and their gradients, as before a micro-batch that is not the first."""
    for parameter in policy.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    gradients = [parameter.grad for parameter in policy.parameters() if parameter.grad is not None]
    return [*policy.parameters(), *policy.buffers(), *gradients]


def compare(
    policy: Policy,
    meta: Policy,
    real: Callable[[], torch.Tensor],
    on_meta: Callable[[], torch.Tensor],
    autocast: torch.dtype | None,
    within: float,
) -> None:
    """Saved bytes and peak of a loss with its backward pass, on shapes and for real."""

    def mixed() -> AbstractContextManager[Any]:
        if autocast is None:
            return nullcontext()
        return torch.autocast("cpu", autocast, cache_enabled=False)  # as Lightning's precision plugin has it

    def step() -> torch.Tensor:
        with mixed():
            return real()

    with_gradients(policy)
    saved, peak = saved_bytes(step, [*policy.parameters(), *policy.buffers()]), measured_peak(lambda: step().backward())
    with count_memory(with_gradients(meta), autocast) as counter:
        loss = on_meta()
        kept = counter.now
        loss.backward()
    print(f"saved {kept / saved:.3f} of {saved / MIB:.1f} MiB, peak {counter.peak / peak:.3f} of {peak / MIB:.1f} MiB")
    assert counter.peak == pytest.approx(peak, rel=within)
    if not policy.gradient_checkpointing:  # whose blocks' inputs autograd keeps without a hook
        assert kept == pytest.approx(saved, rel=within)


SETTINGS: list[dict[str, Any]] = [
    {},
    {"lora": LORA},
    {"dtype": "bfloat16"},
    {"gradient_checkpointing": True},
    {"gradient_checkpointing": "selective"},
]
AUTOCAST = pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["full", "mixed"])


@AUTOCAST
@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: ",".join(settings) or "plain")
def test_flow_update_takes_what_the_profiler_measures(
    settings: dict[str, Any], autocast: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "SMALL", 8)  # the tiny networks' own products are as small as adapters'
    policy, rows = flow(**settings), 4
    meta = flow_on_meta(policy)
    policy.load()
    drawn = policy.rollout([f"{n} red circles" for n in range(rows)], range(rows))
    shapes = meta_trajectory(meta, rows, None)
    compare(
        policy,
        meta,
        lambda: FlowGRPO().loss(policy, batch_of(drawn, torch.ones(rows)), 0, None).loss.mean(),
        lambda: FlowGRPO().loss(meta, meta_batch(FlowGRPO(), shapes), 0, None).loss.mean(),
        autocast,
        within=0.06,
    )


@AUTOCAST
@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: ",".join(settings) or "plain")
def test_language_update_takes_what_the_profiler_measures(
    settings: dict[str, Any],
    autocast: torch.dtype | None,
    samples: list[PromptSample],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(memory, "SMALL", 8)
    policy = language(**settings)
    meta = language_on_meta(policy)
    policy.load()
    written = policy.refine(samples[:3], 4)
    rows = len(written)
    shapes = meta_completions(rows, written.prompt_ids.shape[1], written.tokens.shape[1])
    compare(
        policy,
        meta,
        lambda: RefinerGRPO().loss(policy, written, torch.ones(rows)).loss.mean(),
        lambda: RefinerGRPO().loss(meta, shapes, torch.empty(rows, device="meta")).loss.mean(),
        autocast,
        within=0.06,
    )


@pytest.fixture(scope="module")
def larger_flux(tmp_path_factory: pytest.TempPathFactory, random_flux: Path) -> Path:
    """The tiny pipeline with a transformer of 9M parameters and a VAE that makes 512 pixels of 32 x 32 tokens."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("larger_flux")
    pipe = FluxPipeline.from_pretrained(random_flux)
    pipe.transformer = FluxTransformer2DModel(
        in_channels=48,
        num_layers=3,
        num_single_layers=6,
        attention_head_dim=64,
        num_attention_heads=4,
        joint_attention_dim=64,
        pooled_projection_dim=64,
        axes_dims_rope=(16, 24, 24),
    )
    pipe.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("settings", [{}, {"gradient_checkpointing": True, "lora": LORA}], ids=["full", "small"])
def test_a_larger_flux_takes_what_the_profiler_measures(larger_flux: Path, settings: dict[str, Any]) -> None:
    """16 x 16 tokens, 256 wide: activations, not weights, fill the memory."""
    policy = flow(larger_flux, height=128, width=128, **settings)
    meta = flow_on_meta(policy)
    policy.load()
    drawn = policy.rollout(["a red circle"], [0])
    shapes = meta_trajectory(meta, 1, None)
    compare(
        policy,
        meta,
        lambda: FlowGRPO().loss(policy, batch_of(drawn, torch.ones(1)), 0, None).loss.mean(),
        lambda: FlowGRPO().loss(meta, meta_batch(FlowGRPO(), shapes), 0, None).loss.mean(),
        None,
        within=0.05,
    )


def test_decoding_takes_what_the_profiler_measures() -> None:
    policy = flow(height=64, width=64)
    meta = flow_on_meta(policy)
    policy.load()
    final = torch.randn(2, *policy.latent_shape)
    measured = measured_peak(lambda: policy.decode(final))
    with torch.no_grad():
        found = peak_bytes(
            [*meta.parameters(), *meta.buffers()],
            lambda: meta.decode(torch.empty_like(final, device="meta")),
        )
    assert found <= 1.05 * measured <= 1.05 * 1.5 * found, "convolutions on a CPU have workspaces"


@pytest.mark.parametrize(("steps", "rows"), [(20, 4), (20, None), ([0, 2, 4], 4)])
def test_a_rollout_holds_its_trajectories_once(steps: Any, rows: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside them there is a micro-batch's Euler or SDE step alone: at most eight tensors of its latents."""
    policy = flow(height=128, width=128, sampling=Sampling(20, steps), micro_batch_size=rows)
    policy.load()
    monkeypatch.setattr(policy, "velocity", lambda latents, sigma, conditioning: latents * 0.5)
    num, one = 32, 4 * torch.Size(policy.latent_shape).numel()
    sde_steps = tuple(range(steps)) if isinstance(steps, int) else tuple(steps)
    trajectories = trajectory_bytes(policy.latent_shape, len(sde_steps), num, isinstance(steps, int))
    conditioning, sigmas = policy.encode(["a red circle"] * num), policy.sigmas(20)
    with torch.no_grad():
        peak = measured_peak(lambda: policy._sample(conditioning, range(num), sigmas, sde_steps))
    assert trajectories <= peak <= trajectories + 8 * (rows or num) * one + 32 * KIB


# --- counting ---------------------------------------------------------------------------------------------------------


def test_counted_bytes_by_hand() -> None:
    weight = torch.empty(256, device="meta")  # 1 KiB
    with count_memory([weight]) as counter:
        one = weight + 1
        assert (counter.now, counter.peak) == (KIB, KIB)
        view = one.view(16, 16)[:4]
        view += 1
        assert counter.now == KIB, "a view, or a change in place, takes nothing"
        del one
        assert counter.now == KIB, "the view holds it"
        other = view * 2  # 4 x 16
        assert counter.now == KIB + 256
        del view
        assert counter.now == 256
        again = [weight + 1 for _ in range(3)]  # not worked out anew, but counted
        assert (counter.now, counter.peak) == (256 + 3 * KIB, 256 + 3 * KIB)
        del again, other
        assert counter.now == 0


def test_what_backward_needs_stays_and_checkpointing_drops_it() -> None:
    layers = nn.ModuleList([nn.Linear(256, 256, bias=False, device="meta") for _ in range(8)])
    known = [weight for layer in layers for weight in layer.parameters()]
    inputs = torch.empty(4, 256, device="meta")  # 4 KiB, as every hidden state

    def forward(*, recompute: bool) -> torch.Tensor:
        hidden = inputs
        for layer in layers:
            hidden = checkpoint(_block, layer, hidden, use_reentrant=False) if recompute else _block(layer, hidden)
        return hidden

    def kept(*, recompute: bool) -> int:
        with count_memory([*known, inputs]) as counter:
            hidden = forward(recompute=recompute)
            assert hidden.shape == (4, 256)
            return counter.now

    assert kept(recompute=False) == 8 * 2 * 4 * KIB  # sigmoid's output, and the product's factor
    assert kept(recompute=True) == 8 * 4 * KIB  # the blocks' inputs, the last one's output


def _block(layer: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    outputs: torch.Tensor = torch.sigmoid(layer(hidden)) * 2
    return outputs


def test_attention_keeps_no_scores_and_autocast_halves_products() -> None:
    query = torch.empty(1, 2, 1024, 16, device="meta", requires_grad=True)  # scores would take 8 MiB
    attend = nn.functional.scaled_dot_product_attention
    assert peak_bytes([query], lambda: attend(query, query, query)) < 300 * KIB  # output and 2 x 1024 sums
    weight, inputs = torch.empty(64, 32, device="meta"), torch.empty(8, 32, device="meta")
    with count_memory([weight, inputs], torch.bfloat16) as counter:
        product = nn.functional.linear(inputs, weight)
        assert product.dtype == torch.bfloat16
        assert counter.now == 2 * 8 * 64, "the casts are gone without a backward pass"
        assert counter.peak == 2 * (8 * 64 + 64 * 32 + 8 * 32)
        stacked = torch.empty(3, 8, 32, device="meta") @ torch.empty(32, 5, device="meta")
        assert (stacked.dtype, stacked.shape) == (torch.bfloat16, (3, 8, 5))
    assert nn.functional.linear(inputs, weight).dtype == torch.float32, "outside, all is as before"


# --- what helps -------------------------------------------------------------------------------------------------------


def totals(setting: Setting | None = None, **settings: Any) -> Estimate:
    return estimate(agents(settings, {"learning_rate": None}), setting or Setting(4))


def held_by_flow(setting: Setting | None = None, **settings: Any) -> int:
    return agent_estimate(agents(settings), "flow", setting or Setting(4), persistent_only=True).persistent_total


def test_estimates_are_ordered() -> None:
    full, held_by_full = totals(), held_by_flow()
    nf4, int8, lora = (held_by_flow(lora=LORA, quantization=kind) for kind in ("nf4", "int8", None))
    assert nf4 < int8 < lora < held_by_full
    assert held_by_flow(dtype="bfloat16") < held_by_full < held_by_flow(kl_weight=0.1)
    assert held_by_flow(offload=True) < held_by_full
    on_cpu = held_by_flow(Setting(4, cuda=False))
    assert held_by_flow(Setting(4, cuda=False), offload=True) == on_cpu, "CPU to CPU"
    checkpointing = totals(gradient_checkpointing=True)
    assert checkpointing.total < full.total and checkpointing.persistent_total == full.persistent_total
    peaks = [totals(micro_batch_size=size).transient["updating flow"] or 0 for size in (1, 4, 16)]
    assert 0 < peaks[0] < peaks[1] < peaks[2] < (full.transient["updating flow"] or 0)
    assert totals(Setting(4, autocast=torch.bfloat16)).total < full.total
    more = totals(Setting(8))
    assert more.total > full.total and more.persistent_total == full.persistent_total
    larger = totals(height=64, width=64)
    assert larger.per_step["trajectories"] > 3.9 * full.per_step["trajectories"] and larger.total > full.total
    replicas = totals(Setting(4, num_devices=2))  # nothing but a piece of the gradients, to average it
    assert replicas.persistent == full.persistent and replicas.transient["stepping"] == full.persistent["gradients"]
    assert replicas.gathered == 0


def test_shards_divide_what_learns() -> None:
    """Of two devices each has half, and gathers a whole network in the dtype that it computes in; frozen parts stay."""
    module = agents({"kl_weight": 0.1}, {"kl_weight": 0.1, "lora": LORA})
    whole = estimate(module, Setting(4, num_devices=2))
    half = estimate(module, Setting(4, num_devices=2, shards=2, autocast=torch.bfloat16))
    for name in ("gradients", "optimizer state (AdamW)", "reference"):
        assert half.persistent[name] == pytest.approx(whole.persistent[name] / 2, abs=1)
    learners = {one.name: one for one in whole.networks if one.trained}
    frozen = sum(one.bytes for one in whole.networks if not one.trained)
    assert half.persistent["weights"] == frozen + sum(one.bytes // 2 for one in learners.values())
    adapted = 4 * learners["language"].parameters  # adapters and base as they are, in fp32 here
    assert half.gathered == max(2 * learners["flow.transformer"].parameters, adapted)
    assert suggestions(module, Setting(4, num_devices=2), whole)[0] == (
        "`trainer.strategy: sharded`",
        whole.persistent_total - half.persistent_total,
    )


def test_copies_that_follow_the_weights_are_counted() -> None:
    """An old policy is as large as what is trained; a moving reference takes the place of the fixed one."""
    plain = estimate(agents({"kl_weight": 0.1, "kl_units": "velocity"}), Setting(4))
    moving = agents({"kl_weight": 0.1, "kl_units": "velocity", "reference_decay": Decay(0.9)})
    nft = PromptRL(moving.flow, moving.reward, moving.language, objective=DiffusionNFT(old_policy=Decay(0.5)))
    found = estimate(nft, Setting(4))
    (trained,) = (one.trained for one in found.networks if one.name == "flow.transformer")
    assert found.persistent["old policy"] == 4 * trained
    assert found.persistent["reference"] == plain.persistent["reference"] > 4 * trained, "the refiner's too"
    small = agents({"lora": LORA})
    nft = PromptRL(small.flow, small.reward, small.language, objective=DiffusionNFT(old_policy=Decay(0.5)))
    assert 0 < estimate(nft, Setting(4)).persistent["old policy"] < 4 * trained / 10


def test_suggestions_save_what_they_say() -> None:
    module = agents({"kl_weight": 0.1}, {"kl_weight": 0.1, "lora": LORA})
    setting = Setting(4)
    found = estimate(module, setting)
    saved = dict(suggestions(module, setting, found))
    kinds = ["lora`", "nf4", "AdamW8bit", "gradient_checkpointing", "micro_batch_size", "offload", "kl_weight"]
    order = [next(i for i, kind in enumerate(kinds) if kind in name) for name in saved]
    assert order == sorted(order) and set(order) == set(range(7))
    changes: dict[str, dict[str, Any]] = {
        "`flow.lora`": {"lora": LoRA()},
        "`flow.quantization: nf4` with `flow.lora`": {"quantization": "nf4", "lora": LoRA()},
        "`flow.offload: true`": {"offload": True},
        "`flow.kl_weight: 0`": {"kl_weight": 0.0},
    }
    held_by_found = held_by_flow(setting, kl_weight=0.1)
    for name, settings in changes.items():
        assert saved[name] == held_by_found - held_by_flow(setting, **{"kl_weight": 0.1} | settings)
    assert "`language.lora`" not in saved, "it has them"
    assert "`flow.kl_weight: 0`" in saved and "`language.kl_weight: 0`" not in saved, "adapters need no copy"
    trained = sum(part.trained for part in found.networks)
    assert saved["`optimizer: bitsandbytes.optim.AdamW8bit`"] == pytest.approx((8 - 2.03125) * trained, abs=2)


def test_nothing_is_suggested_that_is_on() -> None:
    small: dict[str, Any] = {"lora": LORA, "quantization": "nf4", "gradient_checkpointing": True, "micro_batch_size": 1}
    module = agents({**small, "offload": True}, small)
    module.optimizer = bnb.optim.AdamW8bit
    assert suggestions(module, Setting(), estimate(module)) == []


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("safetensors.torch.load_file", refuse)
    monkeypatch.setattr(FluxPipeline, "from_pretrained", refuse)
    monkeypatch.setattr("lightning_modules.policies.language.AutoModelForCausalLM.from_pretrained", refuse)


def device_of(size: int) -> Callable[..., int]:
    return lambda *args: size


def test_a_run_that_cannot_fit_stops_before_weights_load(
    no_weights: None, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(preflight, "device_memory", device_of(MIB))
    line = complaint(capfd, tmp_path)
    assert re.search(
        r"reference alone need 19\.7 MiB, but cpu has 1\.0 MiB; each of these would save some: "
        r"`flow\.lora` \([\d.]+ MiB\), .*`flow\.quantization: nf4` with `flow\.lora`.*AdamW8bit.*"
        r"gradient_checkpointing.*micro_batch_size: 1`.*"
        r"`language\.kl_weight: 0` \(0\.9 MiB\); or try all the same with --preflight=warn\.$",
        line,
    )
    assert ". " not in line.removeprefix("lightning: error: "), "one sentence"


def test_full_fit_warns_where_only_the_peak_is_too_large(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(preflight, "device_memory", device_of(25 * MIB))
    with pytest.warns(UserWarning, match=r"may need about 3\d\.\d MiB at its peak, but cpu has 25\.0 MiB; each of"):
        fit(tmp_path / "runs")
    assert list((tmp_path / "runs").rglob("last.ckpt"))
    printed = capfd.readouterr().out
    assert re.search(r"flow\.transformer\s*│\s*926,672 │ 926,672", printed)
    assert re.search(r"peak, rough\s*│\s*3\d\.\d MiB │ of 25\.0 MiB on cpu", printed)


@pytest.mark.parametrize("option", ["--preflight=off", "off in a file", "--preflight=warn"])
def test_the_stop_can_be_overruled(
    option: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(preflight, "device_memory", device_of(MIB))
    if option == "off in a file":
        (tmp_path / "off.yaml").write_text("preflight: off\n")  # YAML reads it as false
        option = f"--config={tmp_path / 'off.yaml'}"
    loud = pytest.warns(UserWarning, match="need 19.7 MiB, but cpu has 1.0 MiB") if "warn" in option else nullcontext()
    with loud:
        fit(tmp_path / "runs", option)
    assert list((tmp_path / "runs").rglob("last.ckpt"))
    assert ("Preflight" in capfd.readouterr().out) == ("warn" in option)


def test_models_are_refused_in_the_words_of_loading(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """The error is the same with and without the estimate."""
    for option in (f"--{LANGUAGE}.model=miniature/lang", f"--{FLOW}.height=30"):
        assert complaint(capfd, tmp_path, option) == complaint(capfd, tmp_path, option, "--preflight=off")


def test_other_modules_are_left_alone(capfd: pytest.CaptureFixture[str]) -> None:
    preflight.check(L.LightningModule(), None, L.Trainer(accelerator="cpu", logger=False), "stop")
    assert "Preflight" not in capfd.readouterr().out


def test_a_policy_that_shapes_do_not_suffice_is_unknown_not_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    def value_dependent(self: Flux1Policy, latents: torch.Tensor) -> torch.Tensor:
        return latents[latents > 0]

    monkeypatch.setattr(Flux1Policy, "decode", value_dependent)
    found = estimate(agents(), Setting())
    assert found.transient["decoding"] is None and found.total > found.persistent_total
    preflight.report(found, "cpu")


def test_device_memory_of_a_cpu_is_shared_by_its_processes() -> None:
    whole = preflight.device_memory(torch.device("cpu"))
    assert whole is not None and whole > 2**30
    assert preflight.device_memory(torch.device("cpu"), 2) == whole // 2
