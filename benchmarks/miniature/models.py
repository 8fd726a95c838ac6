"""Command-line options and models that the measurements of the miniature's base models share."""

from __future__ import annotations

import argparse
from typing import Any, TypeVar

from lightning_modules.policies.flow import Sampling
from lightning_modules.policies.flux1 import Flux1Policy

F = TypeVar("F", bound=Flux1Policy)


def parse(about: str | None, model: str, num: str = "prompts", **others: str) -> argparse.Namespace:
    """Parses the options `--model`, `--<num>`, `--device` and others.

    Args:
        about: the module's docstring, shown by `--help`.
        model: default of `--model`, a folder.
        num: name of the option for how many prompts are drawn.
        **others: further options and their defaults.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=model)
    parser.add_argument(f"--{num}", type=int, default=384)
    parser.add_argument("--device", default="cpu")
    for name, default in others.items():
        parser.add_argument(f"--{name}", default=default)
    return parser.parse_args()


def load_flow(cls: type[F], options: argparse.Namespace, **settings: Any) -> F:
    """Loads a frozen flow policy of the miniature: 32 x 32 pixels, 8 sampler steps without noise, float32."""
    policy = cls(
        options.model,
        Sampling(8, 0),
        height=32,
        width=32,
        max_sequence_length=18,
        learning_rate=None,
        dtype="float32",
        **settings,
    )
    policy.load()
    policy.to(options.device)
    return policy
