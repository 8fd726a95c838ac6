"""Losses by hand, and their gradients against policy gradients and finite differences."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, kl_divergence

from lightning_modules.rl.losses import clipped_surrogate, guard_log_ratio, k3_kl, masked_sequence_mean
from lightning_modules.rl.sde import Transition


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_surrogate_by_hand() -> None:
    ratios = torch.tensor([1.3, 1.3, 0.7, 0.7, 1.1, 0.9], dtype=torch.float64)
    advantages = torch.tensor([2.0, -2.0, 2.0, -2.0, 2.0, -2.0]).double()
    old = _normal(6)
    log_probs = (old + ratios.log()).requires_grad_()
    surrogate = clipped_surrogate(log_probs, advantages, clip_range=0.2, old_log_probs=old)
    loss, stats = surrogate.loss, surrogate.stats
    # clipped where the step has already gone far enough in the advantage's direction
    assert loss.tolist() == pytest.approx([-2.4, 2.6, -1.4, 1.6, -2.2, 1.8], rel=1e-12)
    (gradient,) = torch.autograd.grad(loss.sum(), log_probs)
    assert gradient.tolist() == pytest.approx([0, 2.6, -1.4, 0, -2.2, 1.8], rel=1e-12)
    assert {name: value.item() for name, value in stats.items()} == pytest.approx(
        {
            "ratio_mean": 1.0,
            "clip_fraction": 4 / 6,
            "max_abs_log_ratio": -math.log(0.7),
            "approx_kl": -math.log(1.3 * 1.3 * 0.7 * 0.7 * 1.1 * 0.9) / 6,
        }
    )
    assert not any(value.requires_grad or value.ndim for value in stats.values())


@pytest.mark.parametrize("old", ["none", "equal"])
@pytest.mark.parametrize("clip_range", [1e-5, 0.2])
def test_on_policy_gradient_is_the_policy_gradient(old: str, clip_range: float) -> None:
    """Bit for bit: the ratio is exactly 1, and a tie between the two sides of the max must not halve the gradient."""
    parameter, features, advantages = _normal(3).requires_grad_(), _normal(5, 3, seed=1), _normal(5, seed=2)
    log_probs = -(features @ parameter).square()
    old_log_probs = log_probs.detach() if old == "equal" else None
    surrogate = clipped_surrogate(log_probs, advantages, clip_range=clip_range, old_log_probs=old_log_probs)
    loss, stats = surrogate.loss, surrogate.stats
    assert torch.equal(loss, -advantages)
    assert stats["ratio_mean"] == 1
    assert stats["clip_fraction"] == stats["max_abs_log_ratio"] == stats["approx_kl"] == 0
    (gradient,) = torch.autograd.grad(loss.mean(), parameter, retain_graph=True)
    (policy_gradient,) = torch.autograd.grad((-advantages * log_probs).mean(), parameter)
    torch.testing.assert_close(gradient, policy_gradient, rtol=1e-14, atol=0)
    assert policy_gradient.abs().min() > 1e-3


def test_advantages_of_samples_are_expanded_over_their_tokens() -> None:
    """Square on purpose: plain broadcasting would lay [B] along the tokens, and nobody would notice."""
    advantages, log_probs = torch.tensor([1.0, -2.0, 3.0]), torch.zeros(3, 3)
    rows = [[-1.0] * 3, [2.0] * 3, [-3.0] * 3]
    assert clipped_surrogate(log_probs, advantages, clip_range=0.2).loss.tolist() == rows
    assert clipped_surrogate(log_probs, advantages.unsqueeze(1), clip_range=0.2).loss.tolist() == rows
    columns = clipped_surrogate(log_probs, advantages.unsqueeze(0), clip_range=0.2).loss
    assert columns.tolist() == [[-1.0, 2.0, -3.0]] * 3
    deep = clipped_surrogate(torch.zeros(3, 2, 4), advantages, clip_range=0.2).loss
    assert torch.equal(deep, -advantages.view(3, 1, 1).expand(3, 2, 4))


def test_ready_made_log_ratio() -> None:
    log_ratio = torch.tensor([math.log(1.3), 0.0]).requires_grad_()
    loss = clipped_surrogate(torch.zeros(2), torch.tensor([1.0, -1.0]), clip_range=0.2, log_ratio=log_ratio).loss
    assert loss.tolist() == pytest.approx([-1.2, 1.0])
    assert torch.autograd.grad(loss.sum(), log_ratio)[0].tolist() == [0.0, 1.0]
    with pytest.raises(AssertionError):
        clipped_surrogate(
            torch.zeros(2), torch.ones(2), clip_range=0.2, log_ratio=log_ratio, old_log_probs=torch.zeros(2)
        )


@pytest.mark.parametrize("std_shape", [(), (4, 1, 1)])
def test_guarded_log_ratio_is_the_noise_along_the_change(std_shape: tuple[int, ...]) -> None:
    """The identity behind GRPO-Guard: linear in the change of the mean, without bias and without 1 / std."""
    old_mean, change, noise = _normal(4, 3, 5), 0.1 * _normal(4, 3, 5, seed=1), _normal(4, 3, 5, seed=2)
    std = 0.05 + _normal(*std_shape, seed=3).square()
    old, current = Transition(old_mean, std), Transition(old_mean + change, std)
    draw = old.sample(noise)
    log_ratio = current.log_prob(draw) - old.log_prob(draw)
    guarded = guard_log_ratio(log_ratio, current.mean, old.mean, std)
    torch.testing.assert_close(guarded, (noise * change).mean(dim=(1, 2)), rtol=1e-9, atol=1e-12)


def test_guarded_log_ratio_by_hand_and_its_gradient() -> None:
    log_ratio, std = torch.tensor([-0.5, 0.1]), torch.tensor([[0.5], [2.0]])
    mean, old_mean = torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[0.0, 2.0], [0.0, 2.0]])
    # 0.5 (-0.5 + mean(1, 0) / 0.5) and 2 (0.1 + mean(0, 4) / 8)
    assert guard_log_ratio(log_ratio, mean, old_mean, std).tolist() == pytest.approx([0.25, 0.7])
    mean.requires_grad_()
    old_mean.requires_grad_()
    gradients = torch.autograd.grad(
        guard_log_ratio(log_ratio, mean, old_mean, std).sum(), (mean, old_mean), allow_unused=True
    )
    # (mean - old_mean) / (2 std)
    torch.testing.assert_close(gradients[0], torch.tensor([[1.0, 0.0], [0.0, -0.5]]))
    assert gradients[1] is None


def test_k3_by_hand() -> None:
    log_probs = torch.tensor([[0.5, 0.25, 0.5]]).double().log()
    reference = torch.tensor([[0.25, 0.5, 0.5]]).double().log()
    expected = [[0.5 - 1 + math.log(2), 2 - 1 - math.log(2), 0.0]]
    expected_kl = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(k3_kl(log_probs, reference), expected_kl, rtol=1e-14, atol=1e-16)


def test_k3_is_never_negative_and_accurate_near_the_reference() -> None:
    difference = torch.cat([torch.logspace(-12, 1.2, 2000), -torch.logspace(-12, 1.2, 2000)]).unsqueeze(0)
    assert k3_kl(torch.zeros_like(difference), difference).min() >= 0
    # d^2 / 2, which exp(d) - 1 - d in fp32 would round to 0 or to 1e-7
    assert k3_kl(torch.zeros(1, 1), torch.full((1, 1), 1e-3)).item() == pytest.approx(5.00167e-7, rel=1e-3)


def test_k3_gradient() -> None:
    reference = _normal(2, 4)
    at, off = reference.clone().requires_grad_(), (reference + _normal(2, 4, seed=1)).requires_grad_()
    assert not k3_kl(at, reference).any()
    assert not torch.autograd.grad(k3_kl(at, reference).sum(), at)[0].any()
    (gradient,) = torch.autograd.grad(k3_kl(off, reference).sum(), off)
    torch.testing.assert_close(gradient, 1 - (reference - off.detach()).exp(), rtol=1e-12, atol=1e-12)
    assert gradient.abs().min() > 1e-2
    assert torch.autograd.gradcheck(lambda x: k3_kl(x, reference), off)
    assert not k3_kl(reference, off).requires_grad


def test_k3_is_an_unbiased_estimate_of_the_kl() -> None:
    current, reference = Categorical(logits=_normal(1, 6)), Categorical(logits=_normal(1, 6, seed=1))
    tokens = torch.arange(6)
    estimate = current.probs[0] @ k3_kl(current.log_prob(tokens)[None], reference.log_prob(tokens)[None])[0]
    assert estimate.item() == pytest.approx(kl_divergence(current, reference).item(), rel=1e-12)


def test_masked_mean_by_hand() -> None:
    values = torch.tensor([[1.0, 2.0, math.nan], [4.0, 5.0, 9.0], [math.inf, math.nan, 1.0]]).requires_grad_()
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [0, 0, 0]]).bool()
    means = masked_sequence_mean(values, mask)
    assert means.tolist() == [1.5, 6.0, 0.0]
    (gradient,) = torch.autograd.grad(means.sum(), values)
    torch.testing.assert_close(gradient, torch.tensor([[0.5, 0.5, 0], [1 / 3, 1 / 3, 1 / 3], [0, 0, 0]]))


def test_accumulated_micro_batches_have_the_full_batch_gradient() -> None:
    parameter, features = _normal(4).requires_grad_(), _normal(8, 6, 4, seed=1)
    advantages, reference = _normal(8, seed=2), _normal(8, 6, seed=3)
    mask = torch.arange(6) < torch.tensor([6, 1, 3, 4, 2, 6, 5, 1]).unsqueeze(1)

    def gradient_of(rows: slice) -> Tensor:
        log_probs = -(features[rows] @ parameter).square()
        surrogate = clipped_surrogate(log_probs, advantages[rows], clip_range=0.2)
        tokens = surrogate.loss + 0.01 * k3_kl(log_probs, reference[rows])
        # each row is averaged alone, so the sum over rows can be cut anywhere
        loss = masked_sequence_mean(tokens, mask[rows]).sum() / len(features)
        return torch.autograd.grad(loss, parameter)[0]

    full = gradient_of(slice(None))
    parts = sum(gradient_of(slice(start, stop)) for start, stop in ((0, 1), (1, 4), (4, 8)))
    torch.testing.assert_close(parts, full, rtol=1e-12, atol=1e-12)
    assert full.abs().min() > 1e-3
