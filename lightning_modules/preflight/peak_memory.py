"""Peak memory of a computation, from a run on the meta device: shapes only, no weights, no arithmetic."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

Layout = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]


@contextmanager
def count_memory(known: Iterable[Tensor] = (), autocast: torch.dtype | None = None) -> Iterator[MemoryCounter]:
    """Context manager: counts the bytes of all meta tensors made inside, each for as long as it lives.

    Attention counts as a fused kernel, which keeps its inputs, its output and one number a row, not the score matrix.

    Args:
        known: tensors that are there anyway (weights, gradients), which do not count.
        autocast: products are taken in this type, and weights cast for it each time, as under `torch.autocast`.
    """
    # Registered with the dispatcher rather than a mode of Python's, which would be off in the backward pass, where
    # checkpointed blocks run forward again. There is neither fused attention nor autocast for the meta device.
    with torch.library._scoped_library("aten", "IMPL") as library, MemoryCounter(known) as counter:
        library.impl("scaled_dot_product_attention", partial(_attention, autocast), "AutogradMeta")
        if autocast is not None:
            library.impl("linear", partial(_linear, autocast), "AutogradMeta")
            library.impl("matmul", partial(_matmul, autocast), "AutogradMeta")
        yield counter


def peak_bytes(known: Iterable[Tensor], run: Callable[[], object], autocast: torch.dtype | None = None) -> int:
    """Measures the most bytes beside `known` that are alive at one time while `run` runs on the meta device."""
    with count_memory(known, autocast) as counter:
        run()
        return counter.peak


class MemoryCounter(TorchDispatchMode):
    """Follows the storages of meta tensors from their making to their end, in forward and backward passes.

    Three things let code that was written for real tensors run: small CPU tensors (masks, sigmas) keep their values
    until they meet a meta tensor; a meta tensor's value, where code asks for it, is 0; and an operation seen before
    with the same shapes is not worked out again, which makes a model of many equal blocks cheap.

    What it does not see: workspaces inside of kernels, and the allocator's rounding and gaps.

    Args:
        known: as for `count_memory`.

    Attributes:
        now: bytes alive.
        peak: the most that `now` has been.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._known = list(known)  # kept: the address of a tensor that is gone may be given to another
        self._counted = {_address(tensor) for tensor in self._known}
        self._layouts: dict[Any, tuple[bool, list[Layout | None]]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs one operation and counts what it makes."""
        kwargs = kwargs or {}
        tensors = list(_tensors((args, tuple(kwargs.values()))))
        if not any(tensor.is_meta for tensor in tensors):
            return self._count(func(*args, **kwargs))  # it makes a tensor from nothing, or all is on the CPU
        if func is torch.ops.aten._local_scalar_dense.default:
            return torch.zeros((), dtype=tensors[0].dtype).item()
        if not all(tensor.is_meta or tensor.ndim == 0 for tensor in tensors):
            args, kwargs = _to_meta(args), {name: _to_meta(value) for name, value in kwargs.items()}
        if not _functional(func):
            return self._count(func(*args, **kwargs))
        key = (func, _described(args), tuple((name, _described(value)) for name, value in kwargs.items()))
        if key not in self._layouts:
            made = func(*args, **kwargs)
            single = isinstance(made, Tensor)
            if single or (isinstance(made, tuple | list) and all(m is None or isinstance(m, Tensor) for m in made)):
                self._layouts[key] = single, [_layout(m) for m in ([made] if single else made)]
            return self._count(made)
        single, layouts = self._layouts[key]
        outputs = tuple(
            None if layout is None else torch.empty_strided(layout[0], layout[1], dtype=layout[2], device="meta")
            for layout in layouts
        )
        return self._count(outputs[0] if single else outputs)

    def _count(self, made: Any) -> Any:
        for tensor in _tensors(made):
            address = _address(tensor)
            if not tensor.is_meta or address in self._counted:
                continue
            storage = tensor.untyped_storage()
            size = storage.nbytes()
            self._counted.add(address)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._free, address, size)
        return made

    def _free(self, address: int, size: int) -> None:
        self._counted.discard(address)
        self.now -= size


def _attention(
    autocast: torch.dtype | None, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    if autocast is not None:
        query, key, value = query.to(autocast), key.to(autocast), value.to(autocast)
    output: Tensor = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value)[0]
    return output


def _linear(autocast: torch.dtype, inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    rows, matrix = inputs.to(autocast).flatten(0, -2), weight.to(autocast).t()
    output = rows @ matrix if bias is None else torch.addmm(bias.to(autocast), rows, matrix)
    return output.unflatten(0, inputs.shape[:-1]) if inputs.ndim != 2 else output


def _matmul(autocast: torch.dtype, one: Tensor, other: Tensor) -> Tensor:
    one, other = one.to(autocast), other.to(autocast)
    if one.ndim == other.ndim == 2:
        return torch.mm(one, other)
    batch = torch.broadcast_shapes(one.shape[:-2], other.shape[:-2])
    stacks = (x.expand(*batch, *x.shape[-2:]).flatten(0, -3) for x in (one, other))
    return torch.bmm(*stacks).unflatten(0, batch)


def _address(tensor: Tensor) -> int:
    address: int = tensor.untyped_storage()._cdata
    return address


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for element in value:
            yield from _tensors(element)


def _to_meta(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value if value.ndim == 0 else value.to("meta")
    return type(value)(map(_to_meta, value)) if isinstance(value, list | tuple) else value


def _described(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype
    if isinstance(value, list | tuple):
        return tuple(map(_described, value))
    return type(value), value  # 1, 1.0 and True are equal, but not their results' types


def _layout(tensor: Tensor | None) -> Layout | None:
    return None if tensor is None else (tuple(tensor.shape), tensor.stride(), tensor.dtype)


def _functional(func: Any) -> bool:
    """Returns True if an operation makes new tensors only: neither views nor changes in place."""
    schema = func._schema
    return not any(value.alias_info for value in (*schema.arguments, *schema.returns))
