"""Copies of an agent's trained weights that follow them in time: old policies, and references that move."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_modules.distributed import whole
from lightning_modules.policies.sharding import copy_part
from lightning_modules.rl.transition import at_least_fp32
from rewards.arguments import check_minimum


@dataclass(frozen=True)
class Decay:
    """How a copy follows the weights: after each optimizer step, `copy = d copy + (1 - d) weights`.

    Args:
        limit: largest d; 0 keeps the copy equal to the weights, 1 as they were.
        slope: d rises by this in each step, from 0; null starts at `limit`.
        start: number of the first step in which d rises; before it, d is 0.
        every: optimizer steps between two times that the copy follows.
    """

    limit: float = 0.999
    slope: float | None = None
    start: int = 0
    every: int = 1

    def __post_init__(self) -> None:
        own = "`old_policy` or `reference_decay`"
        check_minimum(own, 0, limit=self.limit, slope=self.slope, start=self.start)
        check_minimum(own, 1, every=self.every)
        if self.limit > 1:
            raise ValueError(f"{own} has limit={self.limit}, use at most 1: a copy that does not move.")

    def at(self, step: int) -> float:
        """Returns d after optimizer step number `step`, from 1."""
        if step % self.every:
            return 1.0
        if self.slope is None:
            return self.limit if step >= self.start else 0.0
        return min(self.limit, self.slope * max(0, step - self.start))


class KeptWeights:
    """A copy of the weights that a network learns, in fp32 at least: in bf16 a slow one would not move.

    Args:
        parameters: name -> trained parameter.
        decay: how the copy follows them.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: Decay) -> None:
        self.parameters = parameters
        self.decay = decay
        self.values = {name: at_least_fp32(parameter.detach()).clone() for name, parameter in parameters.items()}
        self._aside: dict[str, Tensor] = {}

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Context manager: the network computes with the copy; no gradient may be taken of it."""
        with torch.no_grad():
            self._swap()
            try:
                yield
            finally:
                self._swap()

    def _swap(self) -> None:
        """Changes places with the weights; a copy in another dtype stays, and the weights are put aside."""
        for name, parameter in self.parameters.items():
            now, value = parameter.detach().clone(), self._aside.pop(name, None)
            parameter.copy_(self.values[name] if value is None else value)
            if now.dtype == self.values[name].dtype:
                self.values[name].copy_(now)
            elif value is None:
                self._aside[name] = now
        torch.clear_autocast_cache()

    @torch.no_grad()
    def follow(self, step: int) -> None:
        """Lets the copy follow the weights after optimizer step number `step`, from 1."""
        share = 1 - self.decay.at(step)
        for name, parameter in self.parameters.items() if share else ():
            self.values[name].lerp_(parameter.detach().to(self.values[name].dtype), share)

    def whole(self) -> dict[str, Tensor]:
        """Returns the values on the CPU; if they are shared out over processes, this is a collective."""
        return {name: whole(value).cpu() for name, value in self.values.items()}

    @torch.no_grad()
    def load(self, values: Mapping[str, Tensor]) -> None:
        """Takes over saved values; raises ValueError if they are of another network, and does nothing without any."""
        if values and {name: value.shape for name, value in values.items()} != {
            name: parameter.shape for name, parameter in self.parameters.items()
        }:
            raise ValueError(
                "the checkpoint's copies of the weights (an old policy's, or a reference's) are of another network: "
                "use the agents and LoRA settings that it was trained with."
            )
        for name, value in values.items():
            copy_part(self.values[name], value)
