"""How much memory a run's agents take on a device, from configuration files alone.

Networks are built without memory, and one micro-batch of each phase runs on shapes alone (`live_bytes`). What lasts the
whole run is known to the byte; activations are measured on shapes, so within a few percent of PyTorch's own tensors,
but kernels' workspaces and the allocator's gaps are not seen, and the lengths of texts are guesses.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

from lightning_modules.objectives import flow_objective, language_objective
from lightning_modules.policies.base import Policy
from lightning_modules.policies.language import LanguagePolicy
from lightning_modules.policies.pipeline import NEGATIVE, PipelinePolicy
from lightning_modules.preflight.formulas import (
    cache_bytes,
    optimizer_state,
    quantized_savings,
    trajectory_bytes,
    weight_bytes,
)
from lightning_modules.preflight.meta_models import (
    blank_completions,
    blank_trajectory,
    flow_skeleton,
    language_skeleton,
    quantized_layers,
)
from lightning_modules.preflight.peak_memory import peak_bytes
from lightning_modules.prompt_rl import PromptRL
from lightning_modules.rollout import Trajectory

CUDA_CONTEXT = 600 * 2**20
"""Of a process's context, kernels and cuBLAS workspaces; rough."""

CHAT_TOKENS = 64
"""Of a chat beside the refiner's template: the user's prompt and the roles; rough."""

PIXELS_PER_TOKEN = 28**2
"""Of a source image that the refiner sees (Qwen2.5-VL)."""

LOGITS_COPIES = 5
"""fp32 copies of one step's logits in `generate`: raw, over temperature, log-softmax, softmax, sampled; rough."""


@dataclass(frozen=True)
class Setting:
    """What a run's memory depends on beside its agents.

    Args:
        batch_size: prompts a step on each device.
        source: height and width of source images; None draws from text alone.
        cuda: the device is a GPU.
        num_devices: data-parallel devices.
        autocast: type of products with `trainer.precision: bf16-mixed` or `16-mixed`.
    """

    batch_size: int = 1
    source: tuple[int, int] | None = None
    cuda: bool = True
    num_devices: int = 1
    autocast: torch.dtype | None = None


@dataclass(frozen=True)
class Part:
    """One network.

    Attributes:
        name: `flow.transformer`, `flow.vae`, `language`, ...
        parameters: number of its parameters, adapters included.
        trained: how many of them are trained.
        bytes: of its weights and buffers.
        waits: lives on the CPU between uses (`offload`).
    """

    name: str
    parameters: int
    trained: int
    bytes: int
    waits: bool = False


@dataclass(frozen=True)
class Estimate:
    """Memory of one device in bytes; with data parallelism every device holds all of it.

    Attributes:
        parts: the networks.
        lasting: what is there for the whole run, exact: weights, gradients, optimizer state, reference.
        kept: what else stays through a step (trajectories, encoded prompts); exact but for the lengths of texts.
        passing: what comes and goes, each phase at its peak; None where a network does not run without weights. Rough.
        notes: what is not counted.
        memory: what the device has; None if unknown.
    """

    parts: tuple[Part, ...] = ()
    lasting: dict[str, int] = field(default_factory=dict)
    kept: dict[str, int] = field(default_factory=dict)
    passing: dict[str, int | None] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    memory: int | None = None

    @property
    def sure(self) -> int:
        """The part that no size of a batch changes."""
        return sum(self.lasting.values())

    @property
    def total(self) -> int:
        """With the phase that needs most; rough."""
        return self.sure + sum(self.kept.values()) + max((size or 0 for size in self.passing.values()), default=0)

    def __add__(self, other: Estimate) -> Estimate:
        """Two agents on one device: what they hold adds up, and they work in turns."""
        passing = dict(self.passing)
        for name, size in other.passing.items():
            passing[name] = max(size or 0, passing[name] or 0) if name in passing else size
        return replace(
            self,
            parts=self.parts + other.parts,
            lasting=_summed(self.lasting, other.lasting),
            kept=_summed(self.kept, other.kept),
            passing=passing,
            notes=self.notes + other.notes,
        )


def estimate(module: PromptRL, setting: Setting | None = None, memory: int | None = None) -> Estimate:
    """The memory of a run, from its configuration alone.

    Args:
        module: with agents as they were constructed; if they are loaded, their weights are not looked at.
        setting: what the agents do not say.
        memory: bytes of the device.

    Raises:
        ValueError: for models that loading would refuse, in the same words.
    """
    setting = setting or Setting()
    found = agent_estimate(module, "flow", setting)
    if module.language is not None:
        found += agent_estimate(module, "language", setting)
    if setting.cuda:
        found.kept["CUDA context"] = CUDA_CONTEXT
    return replace(found, memory=memory, notes=(*found.notes, "scorers in this process", "what callbacks hold"))


def agent_estimate(
    module: PromptRL, name: str, setting: Setting, policy: Policy | None = None, *, lasting_only: bool = False
) -> Estimate:
    """One agent's share.

    Args:
        module: as for `estimate`.
        name: "flow" or "language".
        setting: what the agents do not say.
        policy: stands in for the module's own.
        lasting_only: leave out what comes and goes, which takes longer to find.
    """
    policy = policy or getattr(module, name)
    # Layers draw their first weights from the global generator: a run must not depend on having been estimated.
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings(action="ignore"):
        if isinstance(policy, LanguagePolicy):
            return _language(module, policy, setting, lasting_only)
        if isinstance(policy, PipelinePolicy):
            return _flow(module, policy, setting, lasting_only)
    return Estimate(notes=(f"the {name} model ({type(policy).__name__} is not known here)",))


def _flow(module: PromptRL, policy: PipelinePolicy, setting: Setting, lasting_only: bool) -> Estimate:
    skeleton = flow_skeleton(policy)
    found = _lasting(module, policy, skeleton, setting)
    if lasting_only:
        return found
    images = setting.batch_size * module.group_size * module.images_per_prompt
    rows = min(policy.micro_batch_size or images, images)
    refined = 0 if module.language is None else module.group_size - module.num_retained
    trajectory = blank_trajectory(skeleton, rows, setting.source)
    trajectories = trajectory_bytes(skeleton.latent_shape, len(trajectory.sde_steps), images)
    found.kept["trajectories"] = trajectories
    found.kept["encoded prompts"] = _told_bytes(trajectory, setting.batch_size, setting.batch_size * (1 + refined))

    @torch.no_grad()
    def draw() -> None:
        skeleton.transition(trajectory.final, trajectory.sigmas, 0, trajectory.conditioning)

    @torch.no_grad()
    def decode() -> None:
        skeleton.decode(trajectory.final)

    def update() -> None:
        flow_objective(skeleton, trajectory, 0, torch.empty(rows, device="meta")).loss.mean().backward()

    peak = _Peaks(skeleton, setting)
    waiting = sum(part.bytes for part in found.parts if part.waits)
    decoder = sum(part.bytes for part in found.parts if part.waits and part.name == "flow.vae")
    # `PromptRL.latest` keeps the last step's trajectories for callbacks until the new ones are there.
    if waiting:
        found.passing["encoding"] = waiting + trajectories
    found.passing["drawing"] = peak.of(draw, trajectories)
    found.passing["decoding"] = peak.of(decode, trajectories + decoder)
    if policy.trained and trajectory.sde_steps:
        found.passing["updating flow"] = peak.of(update)
    return found


def _language(module: PromptRL, policy: LanguagePolicy, setting: Setting, lasting_only: bool) -> Estimate:
    skeleton = language_skeleton(policy)
    found = _lasting(module, policy, skeleton, setting)
    total = setting.batch_size * (module.group_size - module.num_retained)
    if lasting_only or not total:
        return found
    config, itemsize = skeleton.causal_lm.config, policy.dtype.itemsize
    prompt = CHAT_TOKENS + len(policy.template) // 4
    if setting.source is not None:
        prompt += getattr(policy, "max_pixels", 0) // PIXELS_PER_TOKEN
    rows = min(policy.micro_batch_size or total, total)
    completions = blank_completions(rows, prompt, policy.max_new_tokens)

    def update() -> None:
        language_objective(skeleton, completions, torch.empty(rows, device="meta")).loss.mean().backward()

    logits = total * config.get_text_config().vocab_size * (itemsize + 4 * LOGITS_COPIES)
    found.passing["refining"] = logits + cache_bytes(config, total, prompt + policy.max_new_tokens, itemsize)
    if policy.trained:
        found.passing["updating language"] = _Peaks(skeleton, setting).of(update)
    return found


def _lasting(module: PromptRL, policy: Policy, skeleton: Policy, setting: Setting) -> Estimate:
    """What an agent holds for the whole run, and what its optimizer step needs beside."""
    saved = quantized_savings(quantized_layers(skeleton), policy.quantization) if policy.quantization else 0
    parts = []
    for name, child in skeleton.named_children():
        own = child is skeleton.network
        if child is skeleton._frozen_copy:
            continue
        parts.append(
            Part(
                "language" if isinstance(policy, LanguagePolicy) else "flow.transformer" if own else f"flow.{name}",
                parameters=sum(parameter.numel() for parameter in child.parameters()),
                trained=sum(parameter.numel() for parameter in child.parameters() if parameter.requires_grad),
                bytes=weight_bytes(child) - (saved if own else 0),
                waits=getattr(policy, "offload", False) and setting.cuda and not own,
            )
        )
    found = Estimate(tuple(parts), {"weights": sum(part.bytes for part in parts if not part.waits)})
    if policy.trained:
        gradients = sum(parameter.nbytes for parameter in skeleton.parameters() if parameter.requires_grad)
        state = optimizer_state(module.optimizer, skeleton)
        found.lasting["gradients"] = gradients
        if setting.num_devices > 1:
            found.lasting["buckets of DDP"] = gradients  # made at the start, although its reduction is never used
        (found.kept if state.paged else found.lasting)[f"optimizer state ({state.name})"] = state.bytes
        if skeleton._frozen_copy is not None:
            found.lasting["reference"] = weight_bytes(skeleton._frozen_copy)
        # `average_gradients` makes one flat copy of an agent's gradients to sum up, and one of their mean.
        if setting.num_devices > 1 or (state.foreach and setting.cuda):
            found.passing["stepping"] = gradients * (2 if setting.num_devices > 1 else 1)
    return found


class _Peaks:
    """Runs an agent's phases on shapes, beside its weights and the gradients of earlier micro-batches."""

    def __init__(self, skeleton: Policy, setting: Setting) -> None:
        trained = [parameter for parameter in skeleton.parameters() if parameter.requires_grad]
        for parameter in trained:
            parameter.grad = torch.empty_like(parameter)
        gradients = [parameter.grad for parameter in trained if parameter.grad is not None]
        self.known = [*skeleton.parameters(), *skeleton.buffers(), *gradients]
        self.autocast = setting.autocast

    def of(self, phase: Callable[[], None], beside: int = 0) -> int | None:
        """Bytes at the phase's peak and those that are there beside, or None if it does not run on shapes."""
        try:
            return beside + peak_bytes(self.known, phase, self.autocast)
        except Exception:  # a network that needs values, say: an estimate must not end a run that would work
            return None


def _told_bytes(trajectory: Trajectory, num_sources: int, num_prompts: int) -> int:
    total = 0
    for name, value in trajectory.conditioning.tensors.items():
        distinct = 1 if name.startswith(NEGATIVE) else num_sources if name.startswith("source") else num_prompts
        total += distinct * value[:1].numel() * value.itemsize
    return total


def _summed(one: dict[str, int], other: dict[str, int]) -> dict[str, int]:
    return {name: one.get(name, 0) + other.get(name, 0) for name in [*one, *other]}
