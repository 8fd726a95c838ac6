"""Seeds as fixed functions of what the noise is for."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch


def seed_of(*key: object) -> int:
    """A 63-bit seed that is a fixed function of the key.

    Noise is keyed by what it is for (run seed, step, prompt id, place in the group), never by rank or batch
    position, so that the same sample gets the same noise however the work is divided.
    """
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generators_for(seeds: Sequence[int]) -> list[torch.Generator]:
    """One CPU generator for each sample: the same numbers on every kind of device."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]
