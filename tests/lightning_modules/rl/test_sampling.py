"""The sampler on velocity fields whose paths are known, and its log-probs against torch.distributions."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal

from lightning_modules.rl.sampling import SampledPath, Velocity, sample, sde_transition
from lightning_modules.rl.sde import SDE, cps, dance_sde, flow_sde

SDES = [flow_sde, dance_sde, cps]
SIGMAS = torch.tensor([1.0, 0.5, 0.25, 0.0], dtype=torch.float64)


def _constant(latents: Tensor, sigma: Tensor) -> Tensor:
    return torch.ones_like(latents)


def _linear(latents: Tensor, sigma: Tensor) -> Tensor:
    return latents


def _bent(latents: Tensor, sigma: Tensor) -> Tensor:
    return sigma * latents.sin() + latents.flip(1)


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _no_noise() -> Tensor:
    raise AssertionError("an Euler step draws no noise")


def _noises(*shape: int) -> Iterator[Tensor]:
    for seed in range(1, 100):
        yield _normal(*shape, seed=seed)


def _euler_path(velocity: Velocity, latents: Tensor) -> SampledPath:
    return sample(velocity, latents, SIGMAS, sde_steps=(), sde=cps, noise_level=0.7, draw_noise=_no_noise)


def test_euler_steps_by_hand() -> None:
    start = torch.tensor([[2.0, -1.0]], dtype=torch.float64)
    # dx / dsigma = 1 from sigma 1 to 0
    assert _euler_path(_constant, start).final.tolist() == [[1.0, -2.0]]
    # x_{i+1} = x_i (1 + dt): 2 (1 - 0.5) (1 - 0.25) (1 - 0.25)
    assert _euler_path(_linear, start).final.tolist() == [[0.5625, -0.28125]]


def test_second_order_steps() -> None:
    """By hand on `dx / dsigma = x`; on a bent field the error falls to a quarter where the steps are half as long."""
    start, options = (
        torch.tensor([[2.0]], dtype=torch.float64),
        {"sde": cps, "noise_level": 0.7, "draw_noise": _no_noise},
    )
    found = sample(_linear, start, SIGMAS, sde_steps=(), second_order=True, **options).final
    second = 1 - 0.25 * (1 + 0.25 * (1 - 2))  # 2 -> 1 -> 1 - .25 (1 + .25 (1 - 2)) = .8125
    assert found.item() == pytest.approx(second - 0.25 * (second + 0.5 * (second - 1)))
    start, finals = _normal(4, 6), {}
    for steps in (20, 40, 2000):
        for second_order in (False, True):
            sigmas = torch.linspace(1, 0, steps + 1, dtype=torch.float64) ** 1.5
            path = sample(_bent, start, sigmas, sde_steps=(), second_order=second_order, **options)
            finals[steps, second_order] = path.final
    errors = {key: (final - finals[2000, True]).norm().item() for key, final in finals.items()}
    assert errors[20, False] / errors[40, False] == pytest.approx(2, abs=0.3)
    assert errors[20, True] / errors[40, True] == pytest.approx(4, abs=1) and errors[20, True] < errors[40, False]


@pytest.mark.parametrize("shape", [(3,), (3, 5), (3, 2, 4, 4)])
def test_without_sde_steps_nothing_is_kept(shape: tuple[int, ...]) -> None:
    path = _euler_path(_constant, torch.zeros(shape))
    assert path.latents.shape == path.next_latents.shape == (3, 0, *shape[1:])
    assert path.log_probs.shape == (3, 0)
    assert path.final.shape == shape


# x = 2.5 and v = 1: 2.0 at sigma 0.5 by Euler, then an SDE step to 0.25, then 0.25 less by Euler.
@pytest.mark.parametrize(
    ("sde", "noise_level", "mean", "std"),
    [
        # s = 0.8; s^2 / (2 sigma) dt = -0.16; 2 (1 - 0.16) + 1 (1 + 0.32) (-0.25)
        (flow_sde, 0.8, 1.35, 0.4),
        # score = -(2 - 0.75) / 0.25 = -5; 1.75 - 0.5 * 0.36 * 5 * 0.25
        (dance_sde, 0.6, 1.525, 0.3),
        # std 0.25 / 2; 0.75 * 1.5 + 0.25 * sqrt(3) / 2 * 2.5
        (cps, 1 / 3, 1.125 + 0.3125 * math.sqrt(3), 0.125),
    ],
)
def test_a_mixed_path_by_hand(sde: SDE, noise_level: float, mean: float, std: float) -> None:
    start = torch.full((1, 2), 2.5, dtype=torch.float64)
    noise = torch.tensor([[1.0, -2.0]], dtype=torch.float64)
    path = sample(_constant, start, SIGMAS, sde_steps=(1,), sde=sde, noise_level=noise_level, draw_noise=lambda: noise)
    following = [mean + std, mean - 2 * std]
    assert path.latents.tolist() == [[[2.0, 2.0]]]
    assert path.next_latents[0, 0].tolist() == pytest.approx(following, rel=1e-12)
    assert path.final[0].tolist() == pytest.approx([value - 0.25 for value in following], rel=1e-12)
    # the mean of -1/2 and -4/2
    log_prob = -1.25 - math.log(std) - 0.5 * math.log(2 * math.pi)
    assert path.log_probs.item() == pytest.approx(log_prob, rel=1e-12)


def test_a_first_step_from_sigma_1_takes_the_second_sigma_for_its_noise() -> None:
    sigmas = torch.tensor([1.0, 0.8, 0.0], dtype=torch.float64)
    noise = torch.ones(1, 1, dtype=torch.float64)
    path = sample(
        lambda latents, sigma: torch.zeros_like(latents),
        torch.full((1, 1), 2.0, dtype=torch.float64),
        sigmas,
        sde_steps=(0,),
        sde=flow_sde,
        noise_level=0.5,
        draw_noise=lambda: noise,
    )
    # s^2 = 0.25 * 0.8 / 0.2 = 1: mean 2 (1 - 0.1), std sqrt(0.2)
    assert path.final.item() == pytest.approx(1.75 + 0.5, rel=1e-12)


@pytest.mark.parametrize("sde", SDES)
@pytest.mark.parametrize("shape", [(3, 5), (3, 2, 4, 4)])
def test_log_probs_are_those_of_normal_distributions(sde: SDE, shape: tuple[int, ...]) -> None:
    sde_steps, noise_level = (0, 1), 0.6
    path = sample(
        _bent,
        _normal(*shape),
        SIGMAS,
        sde_steps=sde_steps,
        sde=sde,
        noise_level=noise_level,
        draw_noise=_noises(*shape).__next__,
    )
    noises = _noises(*shape)
    for k, step in enumerate(sde_steps):
        latents, following = path.latents[:, k], path.next_latents[:, k]
        sigma, sigma_next = SIGMAS[step], SIGMAS[step + 1]
        expected = sde(latents, _bent(latents, sigma), sigma, sigma_next, noise_level=noise_level, sigma_max=SIGMAS[1])
        normal = Normal(expected.mean, expected.std.expand_as(expected.mean))
        assert path.log_probs[:, k].tolist() == pytest.approx(normal.log_prob(following).flatten(1).mean(1).tolist())
        torch.testing.assert_close((following - normal.mean) / normal.stddev, next(noises), rtol=1e-9, atol=1e-9)
        # A replay of what was kept finds the same log-prob to the last bit, so that the first ratio is exactly 1.
        replayed = sde_transition(_bent, latents, SIGMAS, step, sde=sde, noise_level=noise_level)
        assert torch.equal(replayed.log_prob(following), path.log_probs[:, k])
    assert torch.equal(path.latents[:, 0], _normal(*shape)) and torch.equal(path.latents[:, 1], path.next_latents[:, 0])
    last = path.next_latents[:, 1]
    assert torch.equal(path.final, last + _bent(last, SIGMAS[2]) * (SIGMAS[3] - SIGMAS[2]))


@pytest.mark.parametrize(("sde_steps", "states"), [((), 0), ((1,), 2), ((0, 1), 3), ((0, 2), 4), ((2, 0, 1), 4)])
def test_paths_are_written_where_there_is_room(sde_steps: tuple[int, ...], states: int) -> None:
    """In two parts as in one; what is between two neighbouring SDE steps is there once."""

    def draw(rows: slice, out: SampledPath | None = None) -> SampledPath:
        noises = iter([_normal(5, 6, seed=k)[rows] for k in (1, 2, 3)])
        kwargs: Any = {"sde_steps": sde_steps, "sde": flow_sde, "noise_level": 0.6, "draw_noise": noises.__next__}
        return sample(_bent, _normal(5, 6)[rows], SIGMAS, out=out, **kwargs)

    whole, out = draw(slice(0, 5)), SampledPath.empty(_normal(5, 6)[0], 5, sde_steps)
    for rows in (slice(0, 3), slice(3, 5)):
        part = draw(rows, out.rows(rows))
        assert part.final.data_ptr() == out.final[rows].data_ptr()
    for name in ("latents", "next_latents", "log_probs", "final"):
        assert torch.equal(getattr(out, name), getattr(whole, name)), name
    assert out.latents.untyped_storage().data_ptr() == out.next_latents.untyped_storage().data_ptr()
    assert out.latents.untyped_storage().nbytes() == states * _normal(5, 6).nbytes


@pytest.mark.parametrize("sde", SDES)
def test_noise_that_vanishes_leaves_the_euler_path(sde: SDE) -> None:
    start = _normal(2, 6)
    drawn = sample(_bent, start, SIGMAS, sde_steps=(0, 1), sde=sde, noise_level=1e-9, draw_noise=_noises(2, 6).__next__)
    torch.testing.assert_close(drawn.final, _euler_path(_bent, start).final, rtol=0, atol=1e-7)
    assert not torch.equal(drawn.final, _euler_path(_bent, start).final)


@pytest.mark.parametrize("sde", SDES)
def test_a_step_without_noise_has_no_log_prob(sde: SDE) -> None:
    step = sde_transition(_bent, _normal(2, 6), SIGMAS, 1, sde=sde, noise_level=0.0)
    latents = _normal(2, 6)
    assert torch.equal(step.mean, latents + _bent(latents, SIGMAS[1]) * (SIGMAS[2] - SIGMAS[1]))
    with pytest.raises(ValueError, match="leave it out of `sde_steps`"):
        sample(_bent, latents, SIGMAS, sde_steps=(1,), sde=sde, noise_level=0.0, draw_noise=_noises(2, 6).__next__)
