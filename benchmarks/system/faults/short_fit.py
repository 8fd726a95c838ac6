"""Command of a fit of small steps that has every part of a real one: rewrites, images, validations, checkpoints."""

from __future__ import annotations

from pathlib import Path

from tests.short_runs import quick

EVERY = 1
"""Steps between two checkpoints."""
VALIDATE_EVERY = 2
"""Steps between two validations."""


def short_fit(root: Path, steps: int, *more: str) -> list[str]:
    """Returns the command of a fit of four images a step.

    Args:
        root: folder below which the run's folder is made.
        steps: number of steps; -1 goes on until a signal comes.
        more: further options.
    """
    model = {"group_size": 4, "num_retained": 1}
    sampling = {"num_steps": 4, "sde_steps": 2}
    return quick(
        "fit", root, f"--trainer.max_steps={steps}", f"--trainer.val_check_interval={VALIDATE_EVERY}",
        f"--checkpoint.every_n_train_steps={EVERY}",
        *(f"--model.init_args.{name}={value}" for name, value in model.items()),
        *(f"--model.init_args.flow.init_args.sampling.{name}={value}" for name, value in sampling.items()), *more,
    )  # fmt: skip
