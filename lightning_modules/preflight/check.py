"""The check before weights load: prints a run's networks and memory, and stops if that cannot fit the device."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from rich.console import Console
from rich.table import Table

from datamodules.base import PromptDataModule
from lightning_modules.policies.base import LoRA, Policy
from lightning_modules.policies.pipeline import PipelinePolicy
from lightning_modules.preflight.estimate import Estimate as Estimate
from lightning_modules.preflight.estimate import NetworkSize as NetworkSize
from lightning_modules.preflight.estimate import Setting, agent_estimate
from lightning_modules.preflight.estimate import estimate as estimate
from lightning_modules.preflight.meta_models import with_settings
from lightning_modules.prompt_rl import PromptRL
from lightning_modules.sharded import Sharded

Mode = Literal["stop", "warn", "off", False]
"""False is how YAML reads a bare `off`."""

EIGHT_BIT_ADAM = 2 * (1 + 4 / 256)
"""Bytes of state per trained weight with bitsandbytes' AdamW8bit: two bytes, and two fp32 scales per block of 256."""


def check(module: L.LightningModule, datamodule: Any, trainer: L.Trainer, mode: Mode) -> None:
    """Prints the estimate, and stops or warns if the device is too small.

    Args:
        module: only `PromptRL` is estimated.
        datamodule: says how many prompts a step has.
        trainer: knows the device.
        mode: `stop` where what is held for the whole run does not fit, only `warn`, or `off`.

    Raises:
        ValueError: in mode `stop`, if weights, gradients, optimizer state and reference do not fit; in modes other than
            `off` for models that loading would refuse, in the same words.
    """
    if mode in ("off", False) or not isinstance(module, PromptRL):
        return
    device = trainer.strategy.root_device
    setting = Setting(
        batch_size=datamodule.batch_size if isinstance(datamodule, PromptDataModule) else 1,
        source=_source(module, datamodule),
        cuda=device.type == "cuda",
        num_devices=trainer.world_size,
        shards=_shards(trainer),
        autocast={"bf16-mixed": torch.bfloat16}.get(str(trainer.precision)),
    )
    found = estimate(module, setting, device_memory(device, trainer.num_devices))
    report(found, str(device), setting.shards)
    if found.memory is None or found.total <= found.memory:
        return
    helps = ", ".join(f"{name} ({size_text(size)})" for name, size in suggestions(module, setting, found))
    helps = f"; each of these would save some: {helps}" if helps else ""
    have = f"{device} has {size_text(found.memory)}"
    surely = found.persistent_total + found.gathered
    if surely <= found.memory:
        rank_zero_warn(f"the run may need about {size_text(found.total)} at its peak, but {have}{helps}.")
        return
    shares = ""
    if found.gathered:
        helps = f"; take more devices, or a larger shard_size{helps}"
        shares = f", with {size_text(found.gathered)} to gather an agent's shards on every device to draw,"
    message = (
        f"weights, gradients, optimizer state and reference alone{shares} need {size_text(surely)}, but "
        f"{have}{helps}; or try all the same with --preflight=warn."
    )
    if mode == "stop":
        raise ValueError(message)
    rank_zero_warn(message)


def suggestions(module: PromptRL, setting: Setting, found: Estimate) -> list[tuple[str, int]]:
    """Lists settings that would save memory, in the order to try them, with the bytes that each would save alone."""
    agents: dict[str, Policy] = {"flow": module.flow} | ({"language": module.language} if module.language else {})
    learners = {name: policy for name, policy in agents.items() if policy.trained}
    full = [name for name, policy in learners.items() if policy.lora is None]
    held = {name: agent_estimate(module, name, setting, persistent_only=True).persistent_total for name in agents}

    def saved_for_good(name: str, **settings: Any) -> int:
        changed = with_settings(agents[name], **settings)
        return held[name] - agent_estimate(module, name, setting, changed, persistent_only=True).persistent_total

    def saved_at_peak(name: str, **settings: Any) -> int:
        changed = agent_estimate(module, name, setting, with_settings(agents[name], **settings)).transient
        now = {phase: size for phase, size in found.transient.items() if phase not in changed or phase == "stepping"}
        smaller = Estimate(found.networks, found.persistent, found.per_step, changed | now)
        return found.total - smaller.total

    saved = [(f"`{name}.lora`", saved_for_good(name, lora=LoRA())) for name in full]
    if setting.num_devices > setting.shards == 1 and learners:
        shared = replace(setting, shards=setting.num_devices)
        left = [agent_estimate(module, name, shared, persistent_only=True).persistent_total for name in learners]
        saved.insert(0, ("`trainer.strategy: sharded`", sum(held[name] for name in learners) - sum(left)))
    for name, policy in agents.items():
        if policy.quantization is None:
            more = {"lora": LoRA()} if name in full else {}
            what = f"`{name}.quantization: nf4`" + (f" with `{name}.lora`" if more else "")
            saved.append((what, saved_for_good(name, quantization="nf4", **more)))
    state = sum(size for row, size in found.persistent.items() if row.startswith("optimizer"))
    eight_bit = int(EIGHT_BIT_ADAM * sum(network.trained for network in found.networks))
    saved.append(("`optimizer: bitsandbytes.optim.AdamW8bit`", state - eight_bit))
    for name, policy in learners.items():
        if policy.gradient_checkpointing is not True:
            saved.append((f"`{name}.gradient_checkpointing: true`", saved_at_peak(name, gradient_checkpointing=True)))
    for name, policy in learners.items():
        if policy.micro_batch_size != 1:
            saved.append((f"`{name}.micro_batch_size: 1`", saved_at_peak(name, micro_batch_size=1)))
    if getattr(module.flow, "offload", None) is False:
        saved.append(("`flow.offload: true`", saved_for_good("flow", offload=True)))
    saved += [(f"`{name}.kl_weight: 0`", saved_for_good(name, kl_weight=0.0)) for name in full]
    return [(name, size) for name, size in saved if size > 0]


@rank_zero_only
def report(found: Estimate, device: str, shards: int = 1) -> None:
    """Prints the estimate as two tables.

    Args:
        found: the estimate.
        device: name of the device.
        shards: devices that share out what learns.
    """
    networks = Table("part", title="Preflight: parameters", title_justify="left")
    for column in ("parameters", "trained", "weights"):
        networks.add_column(column, justify="right")
    for network in found.networks:
        trained = f"{network.trained:,}" if network.trained else "frozen"
        weights = size_text(network.bytes) + (" (CPU)" if network.offloaded else "")
        networks.add_row(network.name, f"{network.parameters:,}", trained, weights)
    shared = f", {shards} share what learns" if shards > 1 else ""
    memory = Table("", title=f"Preflight: memory per device{shared}", title_justify="left")
    memory.add_column("size", justify="right")
    memory.add_column("")
    for row, size in found.persistent.items():
        memory.add_row(row, size_text(size), "")
    memory.add_row("sum, sure", size_text(found.persistent_total), "", end_section=True)
    for row, size in found.per_step.items():
        memory.add_row(row, size_text(size), "")
    for row, peak in found.transient.items():
        memory.add_row(f"at most, {row}", "unknown" if peak is None else size_text(peak), "rough, passes")
    have = "" if found.memory is None else f"of {size_text(found.memory)} on {device}"
    memory.add_section()
    memory.add_row("peak, rough", size_text(found.total), have)
    console = Console()
    console.print(networks)
    console.print(memory)
    console.print(f"Not counted: {', '.join(found.notes)}.")


def device_memory(device: torch.device, num_processes: int = 1) -> int | None:
    """Memory of a GPU in bytes, or this process's share of the machine's; None where the system does not say."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    if not hasattr(os, "sysconf"):
        return None
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // num_processes


def size_text(size: int) -> str:
    """Formats a number of bytes, in GiB from 1 GiB on, else in MiB."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def _shards(trainer: L.Trainer) -> int:
    strategy = trainer.strategy
    return strategy.shard_size or trainer.world_size if isinstance(strategy, Sharded) else 1


def _source(module: PromptRL, datamodule: Any) -> tuple[int, int] | None:
    """Size of the first training prompt's source image, if there is one and the flow model can take it."""
    flow = type(module.flow)
    edits = issubclass(flow, PipelinePolicy) and flow.encode_sources is not PipelinePolicy.encode_sources
    if not edits or not isinstance(datamodule, PromptDataModule):
        return None
    image = next((sample.image for sample in datamodule.training_set), None)
    return None if image is None else (image.height, image.width)
