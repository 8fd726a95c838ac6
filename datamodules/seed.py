"""The seed of a run."""

from __future__ import annotations

import os


def run_seed(seed: int | None) -> int:
    """Returns the seed that was given, else that of `seed_everything`, which Lightning keeps here, else 42."""
    return int(os.environ.get("PL_GLOBAL_SEED", 42)) if seed is None else seed
