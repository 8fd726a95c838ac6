"""`Sharded`: Lightning strategy that shares weights, gradients and optimizer state out over processes (FSDP2)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.strategies.registry import _StrategyRegistry
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy, ParallelStrategy, StrategyRegistry
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_modules import checkpoints
from lightning_modules.distributed import whole
from lightning_modules.policies.sharding import copy_part


class Sharded(ModelParallelStrategy):
    """FSDP2 over all processes, or over each `shard_size` of them (HSDP), in `lightning fit`.

    Evaluation commands keep whole models on every process. `trainer.strategy: sharded` is this class with its defaults.

    Args:
        shard_size: number of neighbouring processes that share one copy of everything out, such as those of a node; a
            step then has one all-reduce over the copies. Null is all processes: one copy.
        save_distributed_checkpoint: a checkpoint is a folder that all processes write and read at the same time,
            instead of one file, for which the first process collects everything in its host's memory.
        **kwargs: `process_group_backend` and `timeout`, as for `ModelParallelStrategy`.
    """

    def __init__(self, shard_size: int | None = None, save_distributed_checkpoint: bool = False, **kwargs: Any) -> None:
        if shard_size is not None and shard_size < 1:
            raise ValueError(f"`trainer.strategy` has shard_size={shard_size}, use at least 1.")
        super().__init__(save_distributed_checkpoint=save_distributed_checkpoint, **kwargs)
        self.shard_size = shard_size

    # --- processes ----------------------------------------------------------------------------------------------------

    def setup_environment(self) -> None:
        """Arranges the processes in copies x shards.

        Raises:
            ValueError: if `shard_size` does not divide the number of processes.
        """
        world = self.num_nodes * self.num_processes
        size = self.shard_size or world
        if world % size:
            raise ValueError(
                f"`trainer.strategy` has shard_size={size}, which does not divide {world} processes: use one that does."
            )
        self._data_parallel_size, self._tensor_parallel_size = world // size, size  # Lightning's names for a 2-D mesh
        super().setup_environment()

    @property
    def shards(self) -> DeviceMesh:
        """The processes, this one among them, that hold one copy of the weights."""
        return self.device_mesh["tensor_parallel"]

    @property
    def replicas(self) -> dist.ProcessGroup:
        """The processes, this one among them, that hold the same part of each copy."""
        return self.device_mesh["data_parallel"].get_group()

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Every process has prompts of its own."""
        return {"num_replicas": self.world_size, "rank": self.global_rank}

    # --- checkpoints: trained weights, in the layout of any other strategy --------------------------------------------

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Lightning hands the optimizer's state to `load_optimizer_state_dict`, as for strategies without shards."""
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Returns the trained weights: shards for a folder; for a file all of them, on the first process alone."""
        assert self.lightning_module is not None
        trained = {n: p.detach() for n, p in self.lightning_module.named_parameters() if p.requires_grad}
        return {name: self._saved(weight) for name, weight in trained.items()}

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Returns an optimizer's state, like `lightning_module_state_dict`."""
        optimizer = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        state = optimizer.state_dict()
        return state | {
            "state": {number: {k: self._saved(v) for k, v in own.items()} for number, own in state["state"].items()}
        }

    def _saved(self, value: Any) -> Any:
        if not isinstance(value, DTensor) or self._save_distributed_checkpoint:
            return value
        gathered = whole(value)
        return gathered.cpu() if self.is_global_zero else gathered.new_empty(0)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """Writes a file, or a folder that every process writes its own part of."""
        path = Path(self.broadcast(filepath))
        for kind in checkpoints.WEIGHTS:
            if kind in checkpoint:  # a moving average is still in shards
                checkpoint[kind] = {name: self._saved(weight) for name, weight in checkpoint[kind].items()}
        if self._save_distributed_checkpoint:
            checkpoints.write_folder(checkpoint, path)
        else:
            ParallelStrategy.save_checkpoint(self, checkpoint, path, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Reads a file or a folder, of whatever strategy and number of processes; of a folder this process's part."""
        assert self.lightning_module is not None
        named = self.lightning_module.named_parameters()
        like = {f"{kind}/{name}": parameter for name, parameter in named for kind in checkpoints.WEIGHTS}
        for number, optimizer in enumerate(self.optimizers):
            like |= {f"optimizer/{number}/{n}": parameter for n, parameter in enumerate(_parameters(optimizer))}
        return checkpoints.read(self.broadcast(checkpoint_path), like)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Copies this process's part of the trained weights."""
        assert self.lightning_module is not None
        with torch.no_grad():
            for name, parameter in self.lightning_module.named_parameters():
                if name in checkpoint["state_dict"]:
                    copy_part(parameter, checkpoint["state_dict"][name])

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Copies this process's part of the optimizers' state."""
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = _parameters(optimizer)
            state = {
                number: {name: _part(parameters[number], value) for name, value in own.items()}
                for number, own in saved["state"].items()
            }
            optimizer.load_state_dict({"state": state, "param_groups": saved["param_groups"]})


def _parameters(optimizer: Optimizer) -> list[nn.Parameter]:
    """Lists an optimizer's parameters in the order of their numbers in its state."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _part(parameter: Tensor, value: Any) -> Any:
    """Returns this process's part of an optimizer's number for each weight of a parameter; anything else as it is."""
    if not isinstance(parameter, DTensor) or not isinstance(value, Tensor) or value.shape != parameter.shape:
        return value
    part = torch.empty_like(parameter, dtype=value.dtype)
    copy_part(part, value)
    return part


if "sharded" not in StrategyRegistry:
    registry: _StrategyRegistry = StrategyRegistry
    registry.register("sharded", Sharded, description="FSDP2 of both agents")
