"""The mixed SDE-ODE sampler of a rectified flow, as a function of a velocity callable; it knows no network."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_modules.rl.sde import SDE, Transition, euler

Velocity = Callable[[Tensor, Tensor], Tensor]
"""`(latents [B, ...], sigma scalar) -> [B, ...] velocity`, noise minus image."""


@dataclass(frozen=True)
class SampledPath:
    """B paths from noise to images, of which the K SDE steps are kept.

    Attributes:
        latents: [B, K, ...] before each SDE step, exactly as the velocity callable got them.
        next_latents: [B, K, ...] after each SDE step, exactly as the following step got them.
        log_probs: [B, K] log-density of each SDE step in nats, averaged over the latents' dims.
        final: [B, ...] latents at the last sigma.
    """

    latents: Tensor
    next_latents: Tensor
    log_probs: Tensor
    final: Tensor


def sample(
    velocity: Velocity,
    latents: Tensor,
    sigmas: Tensor,
    *,
    sde_steps: Collection[int],
    sde: SDE,
    noise_level: float,
    draw_noise: Callable[[], Tensor],
) -> SampledPath:
    """Walks down a sigma table by SDE steps where they are asked for, and by Euler steps elsewhere.

        x_{i+1} ~ N(mean, std^2) = sde(x_i, v(x_i, sigma_i), sigma_i, sigma_{i+1})     if i in sde_steps
        x_{i+1} = x_i + v(x_i, sigma_i) (sigma_{i+1} - sigma_i)                        otherwise

    With all steps in `sde_steps` this is Flow-GRPO's sampler (arXiv 2505.05470), with a few of them MixGRPO's (arXiv
    2507.21802), with none the ODE that stock pipelines solve.

    Args:
        velocity: the model, called once a step.
        latents: [B, ...] noise to start from, of any rank.
        sigmas: [N + 1] noise shares, falling.
        sde_steps: K step numbers, 0..N-1.
        sde: step function, such as `flow_sde`.
        noise_level: noise of the SDE steps, as `sde` takes it; 0 gives the Euler step, which has no log-prob.
        draw_noise: gives standard normal noise [B, ...], called once per SDE step, in their order.
    """
    before, after, log_probs = [], [], []
    for step in range(len(sigmas) - 1):
        if step in sde_steps:
            transition = sde_transition(velocity, latents, sigmas, step, sde=sde, noise_level=noise_level)
            before.append(latents)
            latents = transition.sample(draw_noise())
            after.append(latents)
            log_probs.append(transition.log_prob(latents))
        else:
            latents = euler(latents, velocity(latents, sigmas[step]), sigmas[step], sigmas[step + 1])
    return SampledPath(
        latents=_stack(before, latents),
        next_latents=_stack(after, latents),
        log_probs=_stack(log_probs, latents.new_empty(len(latents))),
        final=latents,
    )


def sde_transition(
    velocity: Velocity, latents: Tensor, sigmas: Tensor, step: int, *, sde: SDE, noise_level: float
) -> Transition:
    """The distribution from which one SDE step draws: the sampler's own, and a replay's.

    Args:
        velocity: the model, called once.
        latents: [B, ...] before the step.
        sigmas: [N + 1] noise shares, falling; the second one stands in for sigma 1 where an SDE has no value there.
        step: number of the step, 0..N-1.
        sde: step function, such as `flow_sde`.
        noise_level: noise of the step, as `sde` takes it.
    """
    sigma, sigma_next = sigmas[step], sigmas[step + 1]
    drift = velocity(latents, sigma)
    return sde(latents, drift, sigma, sigma_next, noise_level=noise_level, sigma_max=sigmas[1])


def _stack(values: Sequence[Tensor], one: Tensor) -> Tensor:
    """Stacks K tensors [B, ...], each of the shape of `one`, to [B, K, ...]; K may be 0."""
    return torch.stack(list(values), 1) if values else one.unsqueeze(1)[:, :0]
