"""Estimate of the memory that a run's agents take on a device, from configuration files alone.

Networks are built on the meta device, and one micro-batch of each phase runs on shapes alone (`peak_memory.py`). What
is held for the whole run is known to the byte; activations are measured on shapes, so within a few percent of PyTorch's
own tensors, but kernels' workspaces and the allocator's gaps are not seen, and the lengths of texts are guesses.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from lightning_modules.distributed import CHUNK
from lightning_modules.policies.base import Policy
from lightning_modules.policies.conditioning import NEGATIVE
from lightning_modules.policies.language import LanguagePolicy
from lightning_modules.policies.pipeline import PipelinePolicy
from lightning_modules.policies.sharding import repeated_layers
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
    quantized_layers,
)
from lightning_modules.preflight.peak_memory import peak_bytes
from lightning_modules.prompt_rl import PromptRL
from lightning_modules.rl.sampling import are_neighbours
from lightning_modules.rl.schedule import Window
from lightning_modules.rollout import Trajectory

CUDA_CONTEXT = 600 * 2**20
"""Bytes of a process's context, kernels and cuBLAS workspaces; rough."""

CHAT_TOKENS = 64
"""Tokens of a chat beside the refiner's template: the user's prompt and the roles; rough."""

PIXELS_PER_TOKEN = 28**2
"""Area of a source image that is one token to the refiner (Qwen2.5-VL)."""

LEARNERS = ("flow.transformer", "language")
"""Names of the networks that learn, if their agent does."""

LOGITS_COPIES = 5
"""fp32 copies of one step's logits in drawing: raw, over temperature, log-softmax, softmax, random numbers; rough."""


@dataclass(frozen=True)
class Setting:
    """Settings of a run, beside its agents' own, that its memory depends on.

    Args:
        batch_size: prompts a step on each device.
        source: height and width of source images; None draws from text alone.
        cuda: True if the device is a GPU.
        num_devices: data-parallel devices.
        shards: devices that share one copy of everything that learns out, under the strategy `sharded`.
        autocast: type of products with `trainer.precision: bf16-mixed` or `16-mixed`.
    """

    batch_size: int = 1
    source: tuple[int, int] | None = None
    cuda: bool = True
    num_devices: int = 1
    shards: int = 1
    autocast: torch.dtype | None = None


@dataclass(frozen=True)
class NetworkSize:
    """Size of one network of an agent.

    Attributes:
        name: `flow.transformer`, `flow.vae`, `language`, ...
        parameters: number of its parameters, adapters included.
        trained: number of its trained parameters.
        bytes: bytes of its weights and buffers.
        offloaded: True if it is on the CPU between uses (`offload`).
    """

    name: str
    parameters: int
    trained: int
    bytes: int
    offloaded: bool = False


@dataclass(frozen=True)
class Estimate:
    """Memory of one device in bytes; with data parallelism every device holds all of it, or its part of shards.

    Attributes:
        networks: all networks of the agents.
        persistent: name -> bytes held for the whole run: weights, gradients, optimizer state, reference. Exact.
        per_step: name -> bytes held through a step (trajectories, encoded prompts); exact but for the texts' lengths.
        transient: phase -> bytes at its peak, one phase at a time; None if a network does not run on shapes. Rough.
        notes: names of what is not counted.
        memory: bytes that the device has; None if unknown.
        gathered: bytes of the largest agent whose shards are gathered to draw or to write; exact.
    """

    networks: tuple[NetworkSize, ...] = ()
    persistent: dict[str, int] = field(default_factory=dict)
    per_step: dict[str, int] = field(default_factory=dict)
    transient: dict[str, int | None] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    memory: int | None = None
    gathered: int = 0

    @property
    def persistent_total(self) -> int:
        """Bytes held for the whole run, which no size of a batch changes."""
        return sum(self.persistent.values())

    @property
    def total(self) -> int:
        """Bytes at the peak, in the phase that needs most; rough."""
        largest = max((size or 0 for size in self.transient.values()), default=0)
        return self.persistent_total + sum(self.per_step.values()) + largest

    def __add__(self, other: Estimate) -> Estimate:
        """Combines two agents on one device: what they hold adds up, and their phases take turns."""
        transient = dict(self.transient)
        for name, size in other.transient.items():
            transient[name] = max(size or 0, transient[name] or 0) if name in transient else size
        return replace(
            self,
            networks=self.networks + other.networks,
            persistent=_summed(self.persistent, other.persistent),
            per_step=_summed(self.per_step, other.per_step),
            transient=transient,
            notes=self.notes + other.notes,
            gathered=max(self.gathered, other.gathered),
        )


def estimate(module: PromptRL, setting: Setting | None = None, memory: int | None = None) -> Estimate:
    """Estimates the memory of a run from its configuration alone.

    Args:
        module: its agents need not be loaded; if they are, their weights are not looked at.
        setting: settings that are not the agents' own.
        memory: bytes of the device.

    Raises:
        ValueError: for models that loading would refuse, in the same words.
    """
    setting = setting or Setting()
    found = agent_estimate(module, "flow", setting)
    if module.language is not None:
        found += agent_estimate(module, "language", setting)
    if setting.cuda:
        found.per_step["CUDA context"] = CUDA_CONTEXT
    return replace(found, memory=memory, notes=(*found.notes, "scorers in this process", "what callbacks hold"))


def agent_estimate(
    module: PromptRL, name: str, setting: Setting, policy: Policy | None = None, *, persistent_only: bool = False
) -> Estimate:
    """Estimates the memory of one agent.

    Args:
        module: as for `estimate`.
        name: "flow" or "language".
        setting: settings that are not the agents' own.
        policy: stands in for the module's own.
        persistent_only: leaves out `per_step` and `transient`, which take longer to find.
    """
    policy = policy or getattr(module, name)
    # Layers draw their first weights from the global generator: a run must not depend on having been estimated.
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings(action="ignore"):
        if isinstance(policy, LanguagePolicy):
            return _language(module, policy, setting, persistent_only)
        if isinstance(policy, PipelinePolicy):
            return _flow(module, policy, setting, persistent_only)
    return Estimate(notes=(f"the {name} model ({type(policy).__name__} is not known here)",))


def _flow(module: PromptRL, policy: PipelinePolicy, setting: Setting, persistent_only: bool) -> Estimate:
    meta = flow_on_meta(policy)
    found = _persistent(module, policy, meta, setting)
    if persistent_only:
        return found
    images = setting.batch_size * module.group_size * module.images_per_prompt
    rows = min(policy.micro_batch_size or images, images)
    refined = 0 if module.language is None else module.group_size - module.num_retained
    trajectory = meta_trajectory(meta, rows, setting.source)
    drawn = meta_trajectory(meta, min(policy.drawn_together or images, images), setting.source)
    steps, window = trajectory.sde_steps, policy.sampling.sde_steps
    neighbours = are_neighbours(steps) and not (isinstance(window, Window) and not window.contiguous)
    found.per_step["trajectories"] = trajectory_bytes(meta.latent_shape, len(steps), images, neighbours)
    num_prompts = setting.batch_size * (1 + refined)
    found.per_step["encoded prompts"] = _conditioning_bytes(trajectory, setting.batch_size, num_prompts)
    if policy.texts is not None and not setting.cuda:
        found.per_step["text cache, at most"] = policy.texts.max_bytes

    @torch.no_grad()
    def draw() -> None:
        meta.transition(drawn.final, drawn.sigmas, 0, drawn.conditioning)

    @torch.no_grad()
    def decode() -> None:
        meta.decode(drawn.final)

    def update() -> None:
        module.objective.loss(meta, meta_batch(module.objective, trajectory), 0, None).loss.mean().backward()

    peak = _Peaks(meta, setting)
    beside = gathered_bytes(meta, setting)
    waiting = sum(network.bytes for network in found.networks if network.offloaded)
    decoder = sum(network.bytes for network in found.networks if network.offloaded and network.name == "flow.vae")
    if waiting:
        found.transient["encoding"] = waiting - decoder
    found.transient["drawing"] = peak.of(draw, beside)
    found.transient["decoding"] = peak.of(decode, decoder + beside)
    if policy.trained:
        found.transient["updating flow"] = peak.of(update, layer_bytes(meta, setting))
    return found


def _language(module: PromptRL, policy: LanguagePolicy, setting: Setting, persistent_only: bool) -> Estimate:
    meta = language_on_meta(policy)
    found = _persistent(module, policy, meta, setting)
    total = setting.batch_size * (module.group_size - module.num_retained)
    if persistent_only or not total:
        return found
    config, itemsize = meta.causal_lm.config, policy.dtype.itemsize
    prompt = CHAT_TOKENS + len(policy.template) // 4
    if setting.source is not None:
        prompt += getattr(policy, "max_pixels", 0) // PIXELS_PER_TOKEN
    rows = min(policy.micro_batch_size or total, total)
    completions = meta_completions(rows, prompt, policy.max_new_tokens)

    def update() -> None:
        advantages = torch.empty(rows, device="meta")
        module.language_objective.loss(meta, completions, advantages).loss.mean().backward()

    written = min(policy.rollout_batch_size or total, total)
    logits = written * config.get_text_config().vocab_size * (itemsize + 4 * LOGITS_COPIES)
    cache = cache_bytes(config, written, prompt + policy.max_new_tokens, itemsize)
    found.transient["refining"] = logits + cache + gathered_bytes(meta, setting)
    if policy.trained:
        found.transient["updating language"] = _Peaks(meta, setting).of(update, layer_bytes(meta, setting))
    return found


def _persistent(module: PromptRL, policy: Policy, meta: Policy, setting: Setting) -> Estimate:
    """Estimates what an agent holds for the whole run, and what its optimizer step needs beside."""
    saved = quantized_savings(quantized_layers(meta), policy.quantization) if policy.quantization else 0
    networks = []
    for name, child in meta.named_children():
        own = child is meta.network
        if child is meta._frozen_copy:
            continue
        networks.append(
            NetworkSize(
                "language" if isinstance(policy, LanguagePolicy) else "flow.transformer" if own else f"flow.{name}",
                parameters=sum(parameter.numel() for parameter in child.parameters()),
                trained=sum(parameter.numel() for parameter in child.parameters() if parameter.requires_grad),
                bytes=weight_bytes(child) - (saved if own else 0),
                offloaded=getattr(policy, "offload", False) and setting.cuda and not own,
            )
        )
    shards = setting.shards if policy.trained else 1

    def held(network: NetworkSize) -> int:
        return 0 if network.offloaded else network.bytes // (shards if network.name in LEARNERS else 1)

    weights = {"weights": sum(map(held, networks))}
    found = Estimate(tuple(networks), weights, gathered=gathered_bytes(meta, setting))
    if policy.trained:
        gradients = sum(parameter.nbytes for parameter in meta.parameters() if parameter.requires_grad) // shards
        state = optimizer_state(module.optimizer, meta)
        found.persistent["gradients"] = gradients
        name = f"optimizer state ({state.name})"
        (found.per_step if state.paged else found.persistent)[name] = state.bytes // shards
        if meta._frozen_copy is not None:
            found.persistent["reference"] = weight_bytes(meta._frozen_copy) // shards
        # In fp32; weights of another dtype are put aside while a copy is in use.
        sizes = [(p.numel(), p.itemsize) for p in meta.parameters() if p.requires_grad]
        learned = sum(number * (size if size >= 4 else 4 + size) for number, size in sizes)
        names = {"old": "old policy", "reference": "reference"}
        found.persistent.update({names[copy]: learned // shards for copy in policy.decays})
        averaging = min(gradients, 4 * CHUNK) if setting.num_devices > setting.shards else 0
        stepping = gradients if state.foreach and setting.cuda else 0
        if averaging or stepping:
            found.transient["stepping"] = max(averaging, stepping)
    return found


def gathered_bytes(meta: Policy, setting: Setting) -> int:
    """Bytes of an agent's whole network in the dtype that it computes in, for which its shards are gathered; else 0."""
    return _in_use(meta, setting, meta.network) if setting.shards > 1 else 0


def layer_bytes(meta: Policy, setting: Setting) -> int:
    """Bytes that an update of shards gathers at a time: what is outside the layers, two layers and their gradients."""
    if setting.shards == 1:
        return 0
    layers = [_in_use(meta, setting, layer) for layer in repeated_layers(meta.network)]
    outside = _in_use(meta, setting, meta.network) - sum(layers)
    return outside + 4 * max(layers, default=0)


def _in_use(meta: Policy, setting: Setting, network: nn.Module) -> int:
    """Bytes of a network's parameters as `fully_shard` gathers them; 0 for an agent that is not sharded."""
    compute = _compute_dtype(meta, setting)
    sizes = (p.numel() * (p if compute is None else compute).itemsize for p in network.parameters())
    return sum(sizes) if meta.trained else 0


def _compute_dtype(meta: Policy, setting: Setting) -> torch.dtype | None:
    """Dtype in which gathered weights compute; None is their own."""
    return setting.autocast if setting.shards > 1 and meta.trained and meta.lora is None else None


class _Peaks:
    """Measures an agent's phases on shapes, beside its weights and the gradients of earlier micro-batches."""

    def __init__(self, meta: Policy, setting: Setting) -> None:
        compute = _compute_dtype(meta, setting)
        for parameter in () if compute is None else meta.parameters():  # so that nothing is cast in the passes
            parameter.data = parameter.data.to(compute)
        trained = [parameter for parameter in meta.parameters() if parameter.requires_grad]
        for parameter in trained:
            parameter.grad = torch.empty_like(parameter)
        gradients = [parameter.grad for parameter in trained if parameter.grad is not None]
        self.known = [*meta.parameters(), *meta.buffers(), *gradients]
        self.autocast = setting.autocast

    def of(self, phase: Callable[[], None], beside: int = 0) -> int | None:
        """Bytes at the phase's peak, `beside` others that are there anyway; None if it does not run on shapes."""
        try:
            return beside + peak_bytes(self.known, phase, self.autocast)
        except Exception:  # a network that needs values, say: an estimate must not end a run that would work
            return None


def _conditioning_bytes(trajectory: Trajectory, num_sources: int, num_prompts: int) -> int:
    """Bytes of the conditioning of a step's distinct prompts and source images, from a trajectory's rows."""
    total = 0
    for name, value in trajectory.conditioning.tensors.items():
        distinct = 1 if name.startswith(NEGATIVE) else num_sources if name.startswith("source") else num_prompts
        total += distinct * value[:1].numel() * value.itemsize
    return total


def _summed(one: dict[str, int], other: dict[str, int]) -> dict[str, int]:
    return {name: one.get(name, 0) + other.get(name, 0) for name in [*one, *other]}
