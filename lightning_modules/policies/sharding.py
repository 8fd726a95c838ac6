"""Networks whose weights, gradients and optimizer state are shared out over processes (PyTorch's FSDP2).

Only an update works on shards, layer by layer. To write, draw, check and evaluate, a network is gathered once and then
runs without any collective, so that processes may take different numbers of forward passes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from lightning_modules.distributed import whole

T = TypeVar("T")


def shard_network(network: nn.Module, mesh: DeviceMesh, device: torch.device, compute: torch.dtype | None) -> None:
    """Shards a network whose weights the first process has; the others' may be on the meta device.

    Every element of the outermost lists of modules is gathered by itself in an update, and the rest together.

    Args:
        network: the same on every process, but for its weights.
        mesh: one dimension, the processes that share the weights out.
        device: where the shards go.
        compute: dtype in which gathered weights compute, with fp32 reduction; None is the weights' own.

    Raises:
        ValueError: on every process, if processes have built other networks.
    """
    state = dict([*network.named_parameters(), *network.named_buffers()])
    names: dict[int, str] = {}
    tied = {
        name: names[id(parameter)]
        for name, parameter in network.named_parameters(remove_duplicate=False)
        if names.setdefault(id(parameter), name) != name
    }
    shapes = {name: tensor.shape for name, tensor in state.items()}
    first: list[Any] = [shapes, {name: tensor.dtype for name, tensor in state.items()}]
    dist.broadcast_object_list(first, 0)
    if shapes != first[0]:
        raise ValueError(f"{type(network).__name__} is another network on process {dist.get_rank()} than on the first.")
    for name, tensor in state.items():  # adapters, and layers that a library keeps in fp32
        tensor.data = tensor.data.to(first[1][name])
    values = {name: tensor.detach() for name, tensor in state.items()} if dist.get_rank() == 0 else {}
    policy = MixedPrecisionPolicy(
        param_dtype=compute, reduce_dtype=None if compute is None else torch.float32, cast_forward_inputs=False
    )
    for layer in repeated_layers(network):
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(network, mesh=mesh, mp_policy=policy)
    network.to_empty(device=device)
    for name, twin in tied.items():  # which `to_empty` has torn apart
        module, _, own = name.rpartition(".")
        setattr(network.get_submodule(module), own, network.get_parameter(twin))
    with torch.no_grad():
        for name, tensor in [*network.named_parameters(), *network.named_buffers()]:
            value = values.pop(name, None)
            value = torch.empty(tensor.shape, dtype=tensor.dtype, device=device) if value is None else value.to(device)
            dist.broadcast(value, 0)
            copy_part(tensor, value)
    network.run_inside = MethodType(_run, network)  # type: ignore[assignment]
    register_fsdp_forward_method(network, "run_inside")


def repeated_layers(network: nn.Module) -> Iterator[nn.Module]:
    """Yields the elements of the outermost lists of modules."""
    for child in network.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield from repeated_layers(child)


def _run(self: nn.Module, call: Callable[[], T]) -> T:
    return call()


def run_inside(network: nn.Module, call: Callable[[], T]) -> T:
    """Runs a call as the network's own forward pass, so that weights that belong to no layer are gathered too."""
    own: Any = network
    result: T = own.run_inside(call) if isinstance(network, FSDPModule) else call()
    return result


@contextmanager
def gathered(network: nn.Module) -> Iterator[None]:
    """Context manager: every process has the whole network, and may use it as often as it likes.

    To enter it is a collective; without sharding, or inside another one, it does nothing.
    """
    parts = [module for module in network.modules() if isinstance(module, FSDPModule)]
    own: Any = network
    if not parts or getattr(own, "is_gathered", False):
        yield
        return
    run_inside(network, lambda: None)  # before a layer is used by itself, the root has to have been
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    own.is_gathered = True
    try:
        yield
    finally:
        own.is_gathered = False
        for part in parts:
            part.set_reshard_after_forward(True, recurse=False)
            part.reshard()


def copy_part(to: Tensor, value: Tensor) -> None:
    """Copies this process's part of a whole tensor into a sharded one; without sharding, all of it."""
    if isinstance(to, DTensor) and not isinstance(value, DTensor):
        value = distribute_tensor(value.to(to.device), to.device_mesh, to.placements, src_data_rank=None)
    to.copy_(value)


@contextmanager
def saved_whole(network: Any) -> Iterator[None]:
    """Context manager: on the first process `network.save_pretrained` writes all weights, as the class it was.

    To enter it is a collective; without sharding it does nothing.
    """
    parts = [module for module in network.modules() if isinstance(module, FSDPModule)]
    if not parts:
        yield
        return
    state: dict[str, Tensor] = {}
    for name, tensor in [*network.named_parameters(remove_duplicate=False), *network.named_buffers()]:
        value = whole(tensor.detach())
        if dist.get_rank() == 0:
            state[name] = value.cpu()
    kept = network.state_dict().keys() & state.keys()  # without buffers that are not persistent
    classes = [type(part) for part in parts]
    try:
        for part, sharded in zip(parts, classes, strict=True):
            part.__class__ = sharded.__mro__[2]
        network.state_dict = lambda *_, **__: {name: value for name, value in state.items() if name in kept}
        yield
    finally:
        del network.state_dict
        for part, sharded in zip(parts, classes, strict=True):
            part.__class__ = sharded
