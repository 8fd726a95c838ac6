"""The sigma table of a rollout and the choice of its stochastic steps."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Window:
    """A run of consecutive SDE steps at a random place (Flow-GRPO-Fast, MixGRPO arXiv 2507.21802).

    Args:
        size: number of consecutive steps.
        start: first step that the window may cover.
        stop: end (exclusive) of the steps that it may cover; null is the end of the schedule.
    """

    size: int
    start: int = 0
    stop: int | None = None


def sigma_grid(num_steps: int, *, shift: float = 1.0, mu: float | None = None) -> Tensor:
    """The table of noise shares that diffusers' flow-matching pipelines use, bit for bit.

        s_i = 1 - i / n                                  (numpy's linspace(1, 1/n, n), rounded to fp32)
        sigma_i = exp(mu) / (exp(mu) + 1 / s_i - 1)      dynamic shift (`use_dynamic_shifting`, FLUX), if `mu` is given
        sigma_i = shift s_i / (1 + (shift - 1) s_i)      constant shift (SD3, arXiv 2403.03206, Eq. 23), otherwise

    Args:
        num_steps: n, number of sampler steps.
        shift: constant shift towards noise; like diffusers, not used when `mu` is given.
        mu: log of the dynamic shift, see `dynamic_mu`.

    Returns:
        [n + 1] fp32 on the CPU, falling from 1 to 0.
    """
    if num_steps < 1:
        raise ValueError(f"`num_steps` is {num_steps}; a schedule needs at least 1 step.")
    # In float64 and then rounded, like numpy's: torch.linspace in fp32 differs in the last bit.
    sigmas = (1 - torch.arange(num_steps, dtype=torch.float64) / num_steps).float()
    if mu is not None:
        # A tensor divided by a tensor: `float / tensor` is a reciprocal and a product in torch, which rounds twice.
        scale = torch.tensor(math.exp(mu))
        sigmas = scale / (scale + (1 / sigmas - 1))
    else:
        sigmas = shift * sigmas / (1 + (shift - 1) * sigmas)
    return torch.cat([sigmas, torch.zeros(1)])


def dynamic_mu(
    seq_len: int,
    *,
    base_seq_len: int = 256,
    max_seq_len: int = 4096,
    base_shift: float = 0.5,
    max_shift: float = 1.15,
) -> float:
    """FLUX.1's shift for an image size: the line through two points, `base_shift` and `max_shift`.

    Args:
        seq_len: number of image tokens (1024 at 512 x 512, 4096 at 1024 x 1024).
        base_seq_len, max_seq_len, base_shift, max_shift: number of tokens and `mu` at the two points; the defaults are
            FLUX.1-dev's.

    Returns:
        `mu` for `sigma_grid`.
    """
    slope = (max_shift - base_shift) / (max_seq_len - base_seq_len)
    return seq_len * slope + (base_shift - slope * base_seq_len)


def sde_step_indices(
    spec: int | list[int] | Window,
    num_steps: int,
    *,
    generator: torch.Generator | None = None,
) -> tuple[int, ...]:
    """Which steps of a rollout are SDE steps; the others are Euler steps.

    Args:
        spec: K for the first K steps, a list for just those steps, or a window that is drawn here (draw once per
            rollout: every sample of a group needs the same steps).
        num_steps: number of sampler steps.
        generator: CPU generator for the window's place; null is torch's global one.

    Returns:
        Step indices, rising.
    """
    if isinstance(spec, Window):
        return _draw_window(spec, num_steps, generator)
    if isinstance(spec, int):
        if spec < 0 or spec > num_steps:
            raise ValueError(
                f"`sde_steps` is {spec}, but there are {num_steps} sampler steps; set it from 0 to {num_steps}."
            )
        return tuple(range(spec))
    if len(set(spec)) < len(spec):
        raise ValueError(f"`sde_steps` is {spec}, which names a step twice; list each step once.")
    if spec and not 0 <= min(spec) <= max(spec) < num_steps:
        raise ValueError(
            f"`sde_steps` is {spec}, but there are {num_steps} sampler steps; list steps from 0 to {num_steps - 1}."
        )
    return tuple(sorted(spec))


def _draw_window(window: Window, num_steps: int, generator: torch.Generator | None) -> tuple[int, ...]:
    stop = num_steps if window.stop is None else window.stop
    if window.size < 1:
        raise ValueError(f"`sde_steps` is a window of size {window.size}; give it a `size` of at least 1.")
    if window.start < 0 or stop > num_steps:
        raise ValueError(
            f"`sde_steps` is a window in the steps [{window.start}, {stop}), but there are {num_steps} sampler steps; "
            f"keep `start` and `stop` from 0 to {num_steps}."
        )
    if window.size > stop - window.start:
        raise ValueError(
            f"`sde_steps` is a window of {window.size} steps, which does not fit into [{window.start}, {stop}); "
            "lower `size` or widen `start` and `stop`."
        )
    first = window.start + int(torch.randint(stop - window.start - window.size + 1, (), generator=generator))
    return tuple(range(first, first + window.size))
