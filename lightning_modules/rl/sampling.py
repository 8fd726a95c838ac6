"""The mixed SDE-ODE sampler of a rectified flow, as a function of a velocity callable; it knows no network."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

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

    @classmethod
    def empty(cls, start: Tensor, num: int, sde_steps: Collection[int]) -> SampledPath:
        """Makes room for paths; those of neighbouring SDE steps keep each of their latents once.

        Args:
            start: [...] latents of one path, for shape and dtype.
            num: B.
            sde_steps: K step numbers.
        """
        steps = len(sde_steps)
        if are_neighbours(sde_steps):
            states = start.new_empty(num, steps + 1, *start.shape)
            before, after = states[:, :-1], states[:, 1:]
        else:
            before, after = start.new_empty(2, num, steps, *start.shape)
        return cls(before, after, start.new_empty(num, steps), start.new_empty(num, *start.shape))

    def rows(self, rows: slice) -> SampledPath:
        """Selects some of the paths, without a copy."""
        return SampledPath(self.latents[rows], self.next_latents[rows], self.log_probs[rows], self.final[rows])


def are_neighbours(sde_steps: Collection[int]) -> bool:
    """Returns True if there are several steps, each of which leads to the next one."""
    return len(sde_steps) > 1 and max(sde_steps) - min(sde_steps) == len(sde_steps) - 1


def sample(
    velocity: Velocity,
    latents: Tensor,
    sigmas: Tensor,
    *,
    sde_steps: Collection[int],
    sde: SDE,
    noise_level: float,
    draw_noise: Callable[[], Tensor],
    first: int = 0,
    second_order: bool = False,
    out: SampledPath | None = None,
) -> SampledPath:
    """Walks down a sigma table by SDE steps where they are asked for, and by Euler steps elsewhere.

        x_{i+1} ~ N(mean, std^2) = sde(x_i, v(x_i, sigma_i), sigma_i, sigma_{i+1})     if i in sde_steps
        x_{i+1} = x_i + v(x_i, sigma_i) (sigma_{i+1} - sigma_i)                        otherwise

    With all steps in `sde_steps` this is Flow-GRPO's sampler (arXiv 2505.05470), with a few of them MixGRPO's (arXiv
    2507.21802), with none the ODE that stock pipelines solve.

    Args:
        velocity: the model, called once a step.
        latents: [B, ...] noise to start from, of any rank, or what step `first` starts from.
        sigmas: [N + 1] noise shares, falling.
        sde_steps: K step numbers, 0..N-1.
        sde: step function, such as `flow_sde`.
        noise_level: noise of the SDE steps, as `sde` takes it; 0 gives the Euler step, which has no log-prob.
        draw_noise: gives standard normal noise [B, ...], called once per SDE step, in their order.
        first: number of the first step.
        second_order: takes the other steps by the two-step Adams-Bashforth rule, with the velocity of the step before
            in place of a second call: `x + dt (v + dt / (2 dt') (v - v'))`; the first, and one after an SDE step, is
            an Euler step.
        out: room for the paths, which is returned; None makes it.
    """
    path = SampledPath.empty(latents[0], len(latents), sde_steps) if out is None else out
    places = {step: place for place, step in enumerate(sorted(sde_steps))}
    before: tuple[Tensor, Tensor] | None = None  # velocity and length of the last step, if that was not an SDE step
    for step in range(first, len(sigmas) - 1):
        if step in places:
            before = None
            place = places[step]
            transition = sde_transition(velocity, latents, sigmas, step, sde=sde, noise_level=noise_level)
            path.latents[:, place] = latents
            latents = transition.sample(draw_noise())
            path.next_latents[:, place] = latents
            path.log_probs[:, place] = transition.log_prob(latents)
        elif second_order:
            drift, dt = velocity(latents, sigmas[step]), sigmas[step + 1] - sigmas[step]
            bent = drift if before is None else drift + dt / (2 * before[1]) * (drift - before[0])
            latents, before = euler(latents, bent, sigmas[step], sigmas[step + 1]), (drift, dt)
        else:
            latents = euler(latents, velocity(latents, sigmas[step]), sigmas[step], sigmas[step + 1])
    path.final.copy_(latents)
    return path


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
