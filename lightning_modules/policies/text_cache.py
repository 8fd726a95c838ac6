"""`TextCache`: keeps encoded texts on the CPU from step to step."""

from __future__ import annotations

from collections.abc import Callable, Hashable

from torch import Tensor

Encoded = dict[str, Tensor]


class TextCache:
    """Keeps encoded texts in the CPU's memory; those that were not asked for the longest go first.

    Args:
        max_bytes: bytes of all texts together.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.bytes = 0
        self._kept: dict[Hashable, Encoded] = {}

    def __contains__(self, key: Hashable) -> bool:
        return key in self._kept

    def __call__(self, key: Hashable, encode: Callable[[], Encoded]) -> Encoded:
        """Returns the tensors kept under a key, on the CPU; `encode` makes those that are not there yet."""
        tensors = self._kept.pop(key, None)
        if tensors is None:
            tensors = {name: value.to("cpu", copy=True) for name, value in encode().items()}
            self.bytes += _bytes(tensors)
        self._kept[key] = tensors  # the end of the dictionary is what was asked for last
        while self.bytes > self.max_bytes:
            self.bytes -= _bytes(self._kept.pop(next(iter(self._kept))))
        return tensors


def _bytes(tensors: Encoded) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())
