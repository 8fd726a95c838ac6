"""Formulas for bytes: weights, quantized weights, trajectories, key-value caches, optimizer state."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn

from lightning_modules.policies.base import Policy

BYTES_PER_WEIGHT = {"nf4": 0.5 + 1 / 64 + 4 / (64 * 256), "int8": 1.0}
"""Bytes per weight of quantized linear layers.

nf4 has an 8-bit scale for each block of 64 weights and an fp32 one for each 256 of those (double quantization), int8
one for each row.
"""


def weight_bytes(network: nn.Module) -> int:
    """Bytes of a network's weights and buffers, each once."""
    return sum(tensor.nbytes for tensor in (*network.parameters(), *network.buffers()))


def quantized_savings(layers: Iterable[nn.Linear], quantization: str) -> int:
    """Bytes that the weights of linear layers save once they are quantized."""
    return sum(x.weight.nbytes - int(x.weight.numel() * BYTES_PER_WEIGHT[quantization]) for x in layers)


def trajectory_bytes(latent_shape: tuple[int, ...], num_sde_steps: int, rows: int, neighbours: bool) -> int:
    """Bytes of `rows` trajectories: fp32 latents before and after each SDE step, final latents, a log-prob a step.

    Args:
        latent_shape: shape of one sample's latents.
        num_sde_steps: K.
        rows: B.
        neighbours: each SDE step leads to the next one, whose latents are kept once.
    """
    numbers = torch.Size(latent_shape).numel()
    states = num_sde_steps + 1 if neighbours else 2 * num_sde_steps
    return 4 * rows * ((states + 1) * numbers + num_sde_steps)


def cache_bytes(config: Any, rows: int, tokens: int, itemsize: int) -> int:
    """Bytes of the keys and values of `rows` sequences of `tokens` tokens, in all layers of a transformers model."""
    config = config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * heads * width * rows * tokens * itemsize)


@dataclass(frozen=True)
class OptimizerState:
    """Memory of an optimizer's state for one agent.

    Attributes:
        name: name of its class; "unknown" if it cannot take a step on the CPU, which counts as two numbers a weight.
        bytes: bytes of the state.
        foreach: True if its steps make a list as large as the gradients on a GPU.
        paged: True if its state may move to the CPU.
    """

    name: str = "unknown"
    bytes: int = 0
    foreach: bool = False
    paged: bool = False


def optimizer_state(optimizer: OptimizerCallable, policy: Policy) -> OptimizerState:
    """Finds the state for a policy's trained weights, by an optimizer step on a small weight of the same dtype."""
    numbers: dict[torch.dtype, int] = {}
    for parameter in policy.parameters():
        if parameter.requires_grad:
            numbers[parameter.dtype] = numbers.get(parameter.dtype, 0) + parameter.numel()
    found = OptimizerState()
    for dtype, number in numbers.items():
        weight = nn.Parameter(torch.zeros(64, 64, dtype=dtype))
        weight.grad = torch.zeros_like(weight)
        try:
            made: Any = optimizer([policy.parameter_group() | {"params": [weight]}])
            made.step()
        except Exception:  # whatever it says to a CPU: the run itself may be on a GPU
            found = replace(found, bytes=found.bytes + 2 * weight.itemsize * number)
            continue
        # Per weight: no counters, and not bitsandbytes' tables of 8-bit values, which all weights share.
        state = {k: v for k, v in made.state[weight].items() if isinstance(v, Tensor) and v.ndim and "qmap" not in k}
        each = sum(value.nbytes for value in state.values()) / weight.numel()
        found = OptimizerState(
            name=type(made).__name__,
            bytes=found.bytes + int(each * number),
            foreach=made.defaults.get("foreach", False) is not False and not made.defaults.get("fused"),
            paged=getattr(made, "is_paged", False),
        )
    return found
