"""Steps against hand-computed numbers, torch.distributions, and the exact velocity of a Gaussian."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from lightning_modules.rl.sde import SDE, SDEType, Transition, cps, dance_sde, euler, flow_sde, sde_by_name

SDE_TYPES: tuple[SDEType, ...] = ("flow_sde", "dance_sde", "cps")
DIFFUSIONS: tuple[SDEType, ...] = ("flow_sde", "dance_sde")


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _sigmas(num_steps: int, shift: float = 1.0) -> Tensor:
    """[num_steps + 1] from 1 to 0, as stock pipelines have them."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / num_steps, num_steps))
    return scheduler.sigmas


def _scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


# x = 2, v = 1, from sigma 0.5 to 0.25: x0 = 1.5, x1 = 2.5, dt = -0.25, Euler 1.75.
@pytest.mark.parametrize(
    ("sde", "noise_level", "mean", "std"),
    [
        # s = 0.8; s^2 / (2 sigma) dt = -0.16; 2 (1 - 0.16) + 1 (1 + 0.32) (-0.25) = 1.68 - 0.33
        (flow_sde, 0.8, 1.35, 0.4),
        # score = -(2 - 0.75) / 0.25 = -5; 1.75 - 0.5 * 0.36 * (-5) * (-0.25) = 1.75 - 0.225
        (dance_sde, 0.6, 1.525, 0.3),
        # a third of a right angle: std 0.25 / 2, mean 0.75 * 1.5 + 0.25 * sqrt(3) / 2 * 2.5
        (cps, 1 / 3, 1.125 + 0.3125 * math.sqrt(3), 0.125),
    ],
)
def test_step_by_hand(sde: SDE, noise_level: float, mean: float, std: float) -> None:
    x, v = torch.full((1, 2), 2.0).double(), torch.full((1, 2), 1.0).double()
    step = sde(x, v, _scalar(0.5), _scalar(0.25), noise_level=noise_level, sigma_max=0.9)
    torch.testing.assert_close(step.mean, torch.full_like(x, mean), rtol=0, atol=1e-14)
    torch.testing.assert_close(step.std.expand_as(x), torch.full_like(x, std), rtol=0, atol=1e-14)


def test_euler_by_hand() -> None:
    assert euler(torch.tensor([[2.0]]), torch.tensor([[4.0]]), torch.tensor(0.5), torch.tensor(0.25)).item() == 1.0


@pytest.mark.parametrize("shape", [(3,), (3, 5), (3, 4, 5), (3, 2, 4, 5), (3, 2, 2, 4, 5)])
@pytest.mark.parametrize("name", SDE_TYPES)
def test_step_matches_the_formula_at_any_rank(name: SDEType, shape: tuple[int, ...]) -> None:
    x, v = _normal(*shape), _normal(*shape, seed=1)
    sigma, sigma_next = torch.tensor([0.9, 0.6, 0.2]).double(), torch.tensor([0.7, 0.5, 0.1]).double()
    step = sde_by_name(name)(x, v, sigma, sigma_next, noise_level=0.7, sigma_max=0.95)
    for row in range(3):
        mean, std = _reference_step(name, x[row], v[row], sigma[row].item(), sigma_next[row].item(), 0.7)
        torch.testing.assert_close(step.mean[row], mean, rtol=1e-12, atol=1e-12)
        assert step.std[row].unique().tolist() == pytest.approx([std], rel=1e-12)


def _reference_step(name: str, x: Tensor, v: Tensor, s: float, s_next: float, level: float) -> tuple[Tensor, float]:
    dt, x0, x1 = s_next - s, x - s * v, x + (1 - s) * v
    if name == "cps":
        std = s_next * math.sin(level * math.pi / 2)
        return (1 - s_next) * x0 + math.sqrt(s_next**2 - std**2) * x1, std
    if name == "dance_sde":
        score = -(x - (1 - s) * x0) / s**2
        return x + v * dt - 0.5 * level**2 * score * dt, level * math.sqrt(-dt)
    g = level * math.sqrt(s / (1 - s))
    return x * (1 + g**2 / (2 * s) * dt) + v * (1 + g**2 * (1 - s) / (2 * s)) * dt, g * math.sqrt(-dt)


@pytest.mark.parametrize("first_sigma", [1.0, 1 - 3e-7, 1 + 3e-7])
def test_flow_sde_replaces_sigma_one_in_the_denominator_only(first_sigma: float) -> None:
    """The values next to 1 are what fp32 makes of the start of a shifted schedule."""
    x, v = torch.tensor([[2.0]]), torch.tensor([[1.0]])
    step = flow_sde(x, v, torch.tensor(first_sigma), torch.tensor(0.8), noise_level=0.5, sigma_max=torch.tensor(0.8))
    # s^2 = 0.25 * 1 / (1 - 0.8) = 1.25, and elsewhere sigma is 1: mean = 2 (1 - 1.25 / 2 * 0.2) + 1 (1 + 0) (-0.2)
    assert step.mean.item() == pytest.approx(1.55, abs=2e-6)
    assert step.std.item() == pytest.approx(math.sqrt(1.25 * 0.2), rel=2e-6)


def test_flow_sde_replaces_no_other_sigma() -> None:
    x, v = torch.tensor([[2.0], [2.0]]), torch.tensor([[1.0], [1.0]])
    step = flow_sde(x, v, torch.tensor([1.0, 0.9]), torch.tensor([0.8, 0.7]), noise_level=0.5, sigma_max=0.8)
    assert step.std.flatten().tolist() == pytest.approx([0.5, 0.5 * math.sqrt(9 * 0.2)], rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", SDE_TYPES)
def test_noise_level_zero_is_the_euler_step_bit_for_bit(name: SDEType, dtype: torch.dtype) -> None:
    x, v = _normal(4, 3, 8).to(dtype), _normal(4, 3, 8, seed=1).to(dtype)
    grid = _sigmas(7, shift=3.0)
    for sigma, sigma_next in itertools.pairwise(grid):
        step = sde_by_name(name)(x, v, sigma, sigma_next, noise_level=0.0, sigma_max=grid[1])
        assert torch.equal(step.mean, euler(x, v, sigma, sigma_next))
        assert not step.std.any()
        assert torch.equal(step.sample(torch.ones_like(step.mean)), step.mean)


@pytest.mark.parametrize("name", SDE_TYPES)
def test_half_precision_latents_are_stepped_in_fp32(name: SDEType) -> None:
    """In bf16 the same step is wrong by 1e-2, a hundred times the usual clip range."""
    x, v = _normal(2, 6).bfloat16(), _normal(2, 6, seed=1).bfloat16()
    sigma, sigma_next = torch.tensor(0.7), torch.tensor(0.6)
    step = sde_by_name(name)(x, v, sigma, sigma_next, noise_level=0.7, sigma_max=0.9)
    exact = sde_by_name(name)(x.double(), v.double(), sigma, sigma_next, noise_level=0.7, sigma_max=0.9)
    assert step.mean.dtype == step.std.dtype == torch.float32
    torch.testing.assert_close(step.mean.double(), exact.mean, rtol=1e-5, atol=1e-6)


def test_log_prob_and_kl_of_half_precision_tensors_are_fp32() -> None:
    mean, other_mean, draw = (_normal(2, 64, seed=seed).bfloat16() for seed in range(3))
    std = torch.tensor([[0.3]]).bfloat16()
    step, other = Transition(mean, std), Transition(other_mean, std)
    exact, exact_other = Transition(mean.double(), std.double()), Transition(other_mean.double(), std.double())
    assert step.log_prob(draw).dtype == step.kl(other).dtype == torch.float32
    torch.testing.assert_close(step.log_prob(draw).double(), exact.log_prob(draw.double()), rtol=1e-6, atol=0)
    torch.testing.assert_close(step.kl(other).double(), exact.kl(exact_other), rtol=1e-6, atol=0)


@pytest.mark.parametrize("std_shape", [(), (1, 1, 1), (3, 1, 1), (3, 4, 5)])
def test_log_prob_and_kl_match_torch_distributions(std_shape: tuple[int, ...]) -> None:
    mean, other_mean, draw = _normal(3, 4, 5), _normal(3, 4, 5, seed=1), _normal(3, 4, 5, seed=2)
    std = 0.3 + _normal(*std_shape, seed=3).square()
    step, other = Transition(mean, std), Transition(other_mean, std)
    log_prob = Normal(mean, std).log_prob(draw).mean(dim=(1, 2))
    kl = kl_divergence(Normal(mean, std), Normal(other_mean, std)).mean(dim=(1, 2))
    torch.testing.assert_close(step.log_prob(draw), log_prob, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(step.kl(other), kl, rtol=1e-12, atol=1e-12)


def test_sample_is_mean_plus_scaled_noise() -> None:
    step = Transition(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[0.5], [2.0]]))
    noise = torch.tensor([[1.0, -1.0], [1.0, -2.0]])
    assert step.sample(noise).tolist() == [[1.5, 1.5], [5.0, 0.0]]


def test_log_ratio_of_a_replayed_step_is_exactly_zero() -> None:
    x, v = _normal(2, 16).float(), _normal(2, 16, seed=1).float()
    steps = [flow_sde(x, v, torch.tensor(0.7), torch.tensor(0.6), noise_level=0.7, sigma_max=0.9) for _ in range(2)]
    draw = steps[0].sample(_normal(2, 16, seed=2).float())
    assert torch.equal(steps[0].log_prob(draw), steps[1].log_prob(draw))


@pytest.mark.parametrize("name", SDE_TYPES)
def test_kl_is_zero_at_the_reference_and_has_a_gradient_off_it(name: SDEType) -> None:
    x, v, sigma, sigma_next = _normal(2, 6), _normal(2, 6, seed=1), _scalar(0.7), _scalar(0.5)
    offset = 0.1 * _normal(2, 6, seed=2)

    def kl(velocity: Tensor) -> Tensor:
        steps = [
            sde_by_name(name)(x, u, sigma, sigma_next, noise_level=0.7, sigma_max=0.9) for u in (velocity, v.detach())
        ]
        return steps[0].kl(steps[1])

    at, off = v.clone().requires_grad_(), (v + offset).requires_grad_()
    assert kl(at).tolist() == [0.0, 0.0]
    assert torch.autograd.grad(kl(at).sum(), at)[0].abs().max() == 0
    assert torch.autograd.grad(kl(off).sum(), off)[0].abs().min() > 1e-5
    assert torch.autograd.gradcheck(kl, off)


@pytest.mark.parametrize("name", SDE_TYPES)
def test_log_prob_has_the_gradient_of_finite_differences(name: SDEType) -> None:
    x, v, draw = _normal(2, 6), _normal(2, 6, seed=1).requires_grad_(), _normal(2, 6, seed=2)

    def log_prob(velocity: Tensor) -> Tensor:
        step = sde_by_name(name)(x, velocity, _scalar(0.7), _scalar(0.5), noise_level=0.7, sigma_max=0.9)
        return step.log_prob(draw)

    assert torch.autograd.gradcheck(log_prob, v)


def test_step_without_noise_has_no_log_prob() -> None:
    last = cps(
        _normal(2, 3), _normal(2, 3), _scalar(0.1), torch.tensor([0.05, 0.0]).double(), noise_level=0.8, sigma_max=0.9
    )
    with pytest.raises(ValueError, match=r"last step of cps.*leave it out of `sde_steps`"):
        last.log_prob(_normal(2, 3))
    with pytest.raises(ValueError, match="leave it out of `sde_steps`"):
        last.kl(last)


def test_sde_by_name() -> None:
    assert [sde_by_name(name) for name in SDE_TYPES] == [flow_sde, dance_sde, cps]
    with pytest.raises(ValueError, match="choose one of"):
        sde_by_name("ddim")  # type: ignore[arg-type]


# A Gaussian world: data N(MEAN, spread^2), so that E[x1 - x0 | x_sigma], the velocity, is known exactly.
MEAN = 2.0


def _velocity(x: Tensor, sigma: Tensor, spread: float) -> Tensor:
    scaled = (x - (1 - sigma) * MEAN) / (((1 - sigma) * spread) ** 2 + sigma**2)
    return sigma * scaled - (MEAN + (1 - sigma) * spread**2 * scaled)


def _spread_path(sde: SDE, num_steps: int, noise_level: float, spread: float) -> tuple[Tensor, Tensor, Tensor]:
    """Sigmas, means and stds of infinitely many particles: a step is affine here, so two points of it say all."""
    grid = _sigmas(num_steps).double()
    means, stds = [_scalar(0.0)], [_scalar(1.0)]
    probe = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    for sigma, sigma_next in itertools.pairwise(grid):
        velocity = _velocity(probe, sigma, spread)
        step = sde(probe, velocity, sigma, sigma_next, noise_level=noise_level, sigma_max=grid[1])
        slope = step.mean[1, 0] - step.mean[0, 0]
        means.append(step.mean[0, 0] + slope * means[-1])
        stds.append(((slope * stds[-1]).square() + step.std.flatten()[0].square()).sqrt())
    return grid, torch.stack(means), torch.stack(stds)


@pytest.mark.parametrize("noise_level", [0.3, 0.7])
@pytest.mark.parametrize("name", DIFFUSIONS)
def test_sde_keeps_the_marginals_of_the_ode(name: SDEType, noise_level: float) -> None:
    """Marginals agree all the way, not only at the end; with the score's sign turned, end stds are 0.84 to 7.4."""
    grid, means, stds = _spread_path(sde_by_name(name), 800, noise_level, spread=0.7)
    torch.testing.assert_close(means, (1 - grid) * MEAN, rtol=0, atol=1e-9)
    exact = (((1 - grid) * 0.7).square() + grid.square()).sqrt()
    # next to sigma 1 the noise s^2 dt of flow_sde does not shrink with dt; what it does there is forgotten later.
    torch.testing.assert_close(stds[400:], exact[400:], rtol=0, atol=0.006)
    assert stds[-1].item() == pytest.approx(0.7, abs=0.003)


@pytest.mark.parametrize("num_steps", [1, 5, 50])
@pytest.mark.parametrize("noise_level", [0.3, 0.8, 1.0])
def test_cps_keeps_the_coefficients_exactly(num_steps: int, noise_level: float) -> None:
    """With one image in the data set x_sigma has the std sigma at every step, for any number of steps."""
    grid, means, stds = _spread_path(cps, num_steps, noise_level, spread=0.0)
    torch.testing.assert_close(means, (1 - grid) * MEAN, rtol=0, atol=1e-12)
    torch.testing.assert_close(stds, grid, rtol=0, atol=1e-12)


@pytest.mark.parametrize("noise_level", [0.3, 0.5, 0.8])
def test_cps_narrows_the_data_by_a_known_factor(noise_level: float) -> None:
    """The factor of the docstring is a property of the method, not of the number of steps."""
    _, means, stds = _spread_path(cps, 3200, noise_level, spread=0.7)
    assert means[-1].item() == pytest.approx(MEAN, abs=1e-9)
    assert stds[-1].item() == pytest.approx(0.7 * math.cos(noise_level * math.pi / 4), rel=0.006)


@pytest.mark.parametrize("name", SDE_TYPES)
def test_particles_end_at_the_data(name: SDEType) -> None:
    """Drawn particles have the data's mean and std, in fp32 and few steps; the std's standard error is 0.3 %."""
    generator = torch.Generator().manual_seed(0)
    grid, x = _sigmas(100), torch.randn(50_000, 1, generator=generator)
    for sigma, sigma_next in itertools.pairwise(grid):
        velocity = _velocity(x, sigma, 0.7)
        step = sde_by_name(name)(x, velocity, sigma, sigma_next, noise_level=0.3, sigma_max=grid[1])
        x = step.sample(torch.randn(50_000, 1, generator=generator))
    narrowed = 0.7 * math.cos(0.3 * math.pi / 4) if name == "cps" else 0.7
    assert x.mean().item() == pytest.approx(MEAN, abs=0.012)
    assert x.std().item() == pytest.approx(narrowed, rel=0.025)
