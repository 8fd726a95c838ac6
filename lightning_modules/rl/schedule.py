"""The shift of a sigma table for an image size, and the choice of a rollout's stochastic steps."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Window:
    """SDE steps at a place in the schedule that is random, or moves on (Flow-GRPO-Fast, MixGRPO arXiv 2507.21802).

    Args:
        size: number of steps.
        start: first step that the window may cover.
        stop: end (exclusive) of the steps that it may cover; null is the end of the schedule.
        contiguous: false draws each of the steps by itself from those that the window may cover.
        every: optimizer steps after which the window moves on, from `start` until it has reached `stop`, then from
            `start` again (MixGRPO's progressive strategy, Alg. 1); null places it at random.
        stride: steps by which it moves on.
    """

    size: int
    start: int = 0
    stop: int | None = None
    contiguous: bool = True
    every: int | None = None
    stride: int = 1


def dynamic_mu(
    seq_len: int,
    *,
    base_seq_len: int = 256,
    max_seq_len: int = 4096,
    base_shift: float = 0.5,
    max_shift: float = 1.15,
) -> float:
    """Computes FLUX.1's shift for an image size, on the line through `base_shift` and `max_shift`.

    Args:
        seq_len: number of image tokens (1024 at 512 x 512, 4096 at 1024 x 1024).
        base_seq_len, max_seq_len, base_shift, max_shift: number of tokens and `mu` at the two points; the defaults are
            FLUX.1-dev's.

    Returns:
        `mu`, log of the shift: `sigma = e^mu / (e^mu + 1 / s - 1)` in a scheduler with `use_dynamic_shifting`, where s
        is the share of noise without a shift.
    """
    slope = (max_shift - base_shift) / (max_seq_len - base_seq_len)
    return seq_len * slope + (base_shift - slope * base_seq_len)


def sde_step_indices(
    spec: int | list[int] | Window,
    num_steps: int,
    *,
    generator: torch.Generator | None = None,
    optimizer_step: int = 0,
) -> tuple[int, ...]:
    """Chooses the SDE steps of a rollout; the others are Euler steps.

    Args:
        spec: K for the first K steps, a list for just those steps, or a window that is drawn here (draw once per
            rollout: every sample of a group needs the same steps).
        num_steps: number of sampler steps.
        generator: CPU generator for the window's place; null is torch's global one.
        optimizer_step: number of optimizer steps taken so far, for a window that moves on.

    Returns:
        Step indices, rising.
    """
    if isinstance(spec, Window):
        return _draw_window(spec, num_steps, generator, optimizer_step)
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


def _draw_window(
    window: Window, num_steps: int, generator: torch.Generator | None, optimizer_step: int
) -> tuple[int, ...]:
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
    if window.every is not None:
        if min(window.every, window.stride) < 1 or not window.contiguous:
            raise ValueError(
                f"`sde_steps` is a window with every {window.every} and stride {window.stride}; use at least 1 of "
                "both, and `contiguous: true`."
            )
        places = range(window.start, stop - window.size + 1, window.stride)
        first = places[optimizer_step // window.every % len(places)]
        return tuple(range(first, first + window.size))
    if not window.contiguous:
        drawn = torch.randperm(stop - window.start, generator=generator)[: window.size]
        return tuple(sorted(window.start + step for step in drawn.tolist()))
    first = window.start + int(torch.randint(stop - window.start - window.size + 1, (), generator=generator))
    return tuple(range(first, first + window.size))
