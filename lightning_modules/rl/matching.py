"""Flow matching on drawn images: what the objectives of the forward process have in common, as pure functions.

An image x0 is noised again, `x = (1 - sigma) x0 + sigma noise`, and a velocity at x is compared with `noise - x0`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_modules.rl.transition import mean_per_sample


def noised(images: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """Mixes B latents x0 with noise, `(1 - sigma) x0 + sigma noise`.

    Args:
        images: [B, ...] latents at sigma 0.
        noise: [B, ...] standard normal.
        sigma: scalar share of noise, 0..1.
    """
    assert images.shape == noise.shape
    return torch.lerp(images, noise, sigma.to(images))


def matching_error(velocity: Tensor, target: Tensor) -> Tensor:
    """Computes the flow-matching loss [B], `mean_d (v_d - target_d)^2`, of velocities [B, ...]."""
    assert velocity.shape == target.shape
    return mean_per_sample((velocity - target).square())


def negative_aware_loss(
    velocity: Tensor,
    old_velocity: Tensor,
    target: Tensor,
    goodness: Tensor,
    *,
    beta: float,
    sigma: Tensor | None = None,
) -> Tensor:
    """DiffusionNFT's loss (arXiv 2509.16117, Eq. 5), divided by beta as in the published code.

        L = [ r |v+ - target|^2 + (1 - r) |v- - target|^2 ] / beta
        v+ = (1 - beta) v_old + beta v,   v- = (1 + beta) v_old - beta v

    With `sigma`, each of the two squares is taken of the image that the velocity predicts, `x - sigma v`, and divided
    by that prediction's mean absolute error, without gradient (the paper's adaptive weighting).

    Args:
        velocity: [B, ...] v, of the policy that learns.
        old_velocity: [B, ...] of the policy that drew the images, without gradient.
        target: [B, ...] noise minus image.
        goodness: [B] r in 0..1, the probability that an image is a good one.
        beta: how far v+ and v- lie from v_old, above 0.
        sigma: scalar share of noise; None leaves the squares unweighted.

    Returns:
        [B] loss. At v = v_old its gradient is `2 (2r - 1) (v - target)`: that of flow matching weighted by 2r - 1.
    """
    assert velocity.shape == old_velocity.shape == target.shape and goodness.shape == velocity.shape[:1] and beta > 0

    def distance(implied: Tensor) -> Tensor:
        square = matching_error(implied, target)
        if sigma is None:
            return square
        away = sigma.to(square) * mean_per_sample((implied.detach() - target).abs())
        return sigma.to(square).square() * square / away.clamp(min=1e-5)

    moved = beta * (velocity - old_velocity)
    return (goodness * distance(old_velocity + moved) + (1 - goodness) * distance(old_velocity - moved)) / beta


def preference_weights(
    errors: Tensor, reference_errors: Tensor, sides: Tensor, groups: Tensor, *, beta: float
) -> tuple[Tensor, Tensor]:
    """Finds the weights of matching errors whose gradient is that of a preference within each group.

        L_g = -log sigmoid(S_g),   S_g = beta sum_{i in g} a_i (reference_error_i - error_i)
        dL_g = sum_i w_i d error_i,   w_i = beta (1 - sigmoid(S_g)) a_i

    With a = 1 for the best image of a group and -1 for the worst it is Diffusion-DPO (arXiv 2311.12908, Eq. 14, with
    beta for its beta T omega), with a = A / n for all images DGPO (arXiv 2510.08425).

    Args:
        errors: [B] matching errors of the policy.
        reference_errors: [B] those of the reference, at the same noise.
        sides: [B] a; 0 for images that take no part.
        groups: [B] number of each image's group, from 0.
        beta: temperature.

    Returns:
        The weights w [B], without gradient, and the losses L_g [number of groups].
    """
    assert errors.shape == reference_errors.shape == sides.shape == groups.shape
    margins = (beta * sides * (reference_errors - errors)).detach()
    by_group = margins.new_zeros(int(groups.max()) + 1).index_add(0, groups, margins)
    return (beta * torch.sigmoid(-by_group)[groups] * sides), -torch.nn.functional.logsigmoid(by_group)
