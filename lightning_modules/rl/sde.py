"""Single sampler steps of a rectified flow: the Euler ODE step, and three SDE steps as Gaussian distributions.

Everywhere `x_sigma = (1 - sigma) x0 + sigma x1` with data x0 and noise x1, so sigma runs from 1 (noise) to 0 (image),
the velocity is `v = E[x1 - x0 | x_sigma]`, and `dt = sigma_next - sigma < 0`. The math is done in fp32 (float64 stays
float64) whatever the latents' dtype: in bf16 the rounding of a log-prob is larger than the usual clip ranges.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from lightning_modules.rl.transition import Transition, at_least_fp32

__all__ = ["SDE", "SDEType", "Transition", "cps", "dance_sde", "euler", "flow_sde", "sde_by_name"]

SDE = Callable[..., Transition]
"""`(latents, velocity, sigma, sigma_next, *, noise_level, sigma_max) -> Transition`, as `flow_sde` documents it."""

SDEType = Literal["flow_sde", "dance_sde", "cps"]


def euler(latents: Tensor, velocity: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """Takes the ODE step `x' = x + v dt` to the next latents [B, ...]; arguments as in `flow_sde`."""
    assert latents.shape == velocity.shape
    x, v = at_least_fp32(latents), at_least_fp32(velocity)
    return x + v * (_expand(sigma_next, x) - _expand(sigma, x))


def flow_sde(
    latents: Tensor,
    velocity: Tensor,
    sigma: Tensor,
    sigma_next: Tensor,
    *,
    noise_level: float,
    sigma_max: Tensor | float,
) -> Transition:
    """Flow-GRPO's SDE step (arXiv 2505.05470, Eq. 9): noise that grows with sigma.

        s    = noise_level sqrt(sigma / (1 - sigma)),  at sigma 1 noise_level sqrt(1 / (1 - sigma_max))
        mean = x (1 + s^2 / (2 sigma) dt) + v (1 + s^2 (1 - sigma) / (2 sigma)) dt
        std  = s sqrt(-dt)

    Args:
        latents: [B, ...] x, of any rank.
        velocity: [B, ...] v, the model's output at x and sigma.
        sigma: scalar or [B], noise share of x, in (0, 1].
        sigma_next: scalar or [B], noise share of x', in [0, sigma).
        noise_level: the paper's `a`; 0 gives the Euler step.
        sigma_max: stands in for a sigma of 1 in the root's denominator, which would be 0; pass the schedule's
            `sigmas[1]` (as the codes of Flow-GRPO and PromptRL do).

    Returns:
        The distribution of x'.
    """
    assert latents.shape == velocity.shape
    sigma_x = _expand(sigma, latents)
    # "Is 1" with a margin: in fp32 some shifts make a schedule start one rounding error off 1, where the root would
    # explode.
    below_one = torch.where(1 - sigma_x < 1e-6, torch.as_tensor(sigma_max).to(sigma_x), sigma_x)
    diffusion = noise_level * (sigma_x / (1 - below_one)).sqrt()
    return _score_sde(latents, velocity, sigma, sigma_next, diffusion)


def dance_sde(
    latents: Tensor,
    velocity: Tensor,
    sigma: Tensor,
    sigma_next: Tensor,
    *,
    noise_level: float,
    sigma_max: Tensor | float,
) -> Transition:
    """DanceGRPO's SDE step (arXiv 2505.07818, Sec. 3): the same noise at every sigma.

        score = -(x - (1 - sigma) x0) / sigma^2,  x0 = x - sigma v
        mean  = x + v dt - noise_level^2 / 2 score dt
        std   = noise_level sqrt(-dt)

    Args:
        latents, velocity, sigma, sigma_next: as in `flow_sde`.
        noise_level: the paper's `eta`; 0 gives the Euler step.
        sigma_max: not used, the step is defined at sigma 1.

    Returns:
        The distribution of x'.
    """
    assert latents.shape == velocity.shape
    del sigma_max
    return _score_sde(latents, velocity, sigma, sigma_next, torch.full_like(_expand(sigma, latents), noise_level))


def cps(
    latents: Tensor,
    velocity: Tensor,
    sigma: Tensor,
    sigma_next: Tensor,
    *,
    noise_level: float,
    sigma_max: Tensor | float,
) -> Transition:
    """Coefficient-preserving step (Flow-CPS, arXiv 2509.05952): old and new noise together have the share sigma_next.

        std  = sigma_next sin(noise_level pi / 2)
        mean = (1 - sigma_next) x0 + sqrt(sigma_next^2 - std^2) x1,  x0 = x - sigma v,  x1 = x + (1 - sigma) v

    The last step (sigma_next 0) is deterministic and has no log-prob. The step keeps the coefficients, not the
    marginals: it takes the posterior mean x0 for the sample itself, so what is drawn is too narrow wherever x0 is still
    uncertain, however many steps are taken (for Gaussian data by a factor of about `cos(noise_level pi / 4)`).

    Args:
        latents, velocity, sigma, sigma_next: as in `flow_sde`.
        noise_level: the paper's `eta`, in [0, 1], share of a quarter turn from old noise to new; 0 gives the Euler
            step.
        sigma_max: not used, the step is defined at sigma 1.

    Returns:
        The distribution of x'.
    """
    assert latents.shape == velocity.shape
    del sigma_max
    x, v, angle = at_least_fp32(latents), at_least_fp32(velocity), noise_level * math.pi / 2
    sigma_x, sigma_next_x = _expand(sigma, x), _expand(sigma_next, x)
    # sqrt(sigma_next^2 - std^2) = sigma_next cos(angle), written as a correction of the Euler step, so that it is 0
    # bit for bit at angle 0.
    lost_noise = sigma_next_x * (1 - math.cos(angle)) * (x + (1 - sigma_x) * v)
    return Transition(mean=euler(x, v, sigma, sigma_next) - lost_noise, std=sigma_next_x * math.sin(angle))


def sde_by_name(name: SDEType) -> SDE:
    """Returns the step function with a name of the configuration."""
    found: dict[str, SDE] = {"flow_sde": flow_sde, "dance_sde": dance_sde, "cps": cps}
    if name in found:
        return found[name]
    raise ValueError(f"`sde_type` is {name!r}; choose one of 'flow_sde', 'dance_sde' and 'cps'.")


def _score_sde(latents: Tensor, velocity: Tensor, sigma: Tensor, sigma_next: Tensor, diffusion: Tensor) -> Transition:
    """Euler-Maruyama step of the reverse SDE `dx = (v - g^2 / 2 score) dt + g dw`, with the marginals of `dx = v dt`.

    Time runs backwards (dt < 0), hence the minus: it adds `g^2 / 2 score |dt|`, the pull to high density that the
    noise needs as a balance. The score is `-x1 / sigma` with the noise estimate `x1 = x + (1 - sigma) v`. `diffusion`
    is g, expanded to the latents' rank.
    """
    x, v = at_least_fp32(latents), at_least_fp32(velocity)
    sigma_x = _expand(sigma, x)
    dt = _expand(sigma_next, x) - sigma_x
    score = -(x + (1 - sigma_x) * v) / sigma_x
    mean = euler(x, v, sigma, sigma_next) - 0.5 * diffusion.square() * dt * score
    return Transition(mean=mean, std=diffusion * (-dt).sqrt())


def _expand(sigma: Tensor, latents: Tensor) -> Tensor:
    """Gives `sigma`, scalar or [B], the rank and device of `latents` [B, ...] and the dtype of the math."""
    assert sigma.ndim <= 1 and sigma.numel() in (1, latents.shape[0])
    dtype = torch.promote_types(latents.dtype, torch.float32)
    return sigma.to(device=latents.device, dtype=dtype).reshape(-1, *[1] * (latents.ndim - 1))
