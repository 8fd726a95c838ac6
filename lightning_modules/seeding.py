"""Seeds that are fixed functions of what the noise is for, and generators from them."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence

import numpy as np
import torch


def seed_of(*key: object) -> int:
    """Computes a 63-bit seed from a key, always the same for the same key.

    Noise is keyed by what it is for (run seed, step, prompt id, place in the group), never by rank or batch
    position, so that the same sample gets the same noise however the work is divided.
    """
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generators_for(seeds: Sequence[int]) -> list[torch.Generator]:
    """Makes one CPU generator per sample, since CPU noise is the same whatever the device."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seeds the global generators by step and rank, so that a resumed run draws what an unbroken one would."""
    key = seed_of("step", seed, step, rank)
    random.seed(key)
    np.random.seed(key % 2**32)
    torch.manual_seed(key)
