"""The objectives' losses in float64, written from their papers' equations, to compare `lightning_modules` with.

It imports nothing of this repository: velocities, steps of the sampler and losses are formulas of their own, of
flattened latents. Autograd differentiates them; what a paper takes as constant is detached.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class State:
    """Weights of the policies that a loss names: the one that learns, the one that drew, the old one, the reference."""

    now: Weights
    drew: Weights
    old: Weights
    reference: Weights


@dataclass(frozen=True)
class Drawn:
    """B images in groups of equal size, and the noise that they were drawn with and get again.

    Attributes:
        advantages, counted, prompts: [B] advantages, whether an image has a score, the number of its prompt.
        size: images of a group.
        images: [B, D].
        levels: sigma and noise [B, D] of each level.
        steps: sigma, next sigma, latents before and after [B, D] of each SDE step.
        first: the schedule's second sigma.
    """

    advantages: Tensor
    counted: Tensor
    prompts: Tensor
    size: int
    images: Tensor
    levels: Sequence[tuple[float, Tensor]]
    steps: Sequence[tuple[float, float, Tensor, Tensor]]
    first: float

    def mean(self, terms: Sequence[Tensor]) -> Tensor:
        """Mean over terms and images; those without a score count as 0."""
        return (torch.stack(list(terms)) * self.counted).mean()

    def by_level(self, weights: Sequence[Weights]) -> list[tuple[float, Tensor, Sequence[Tensor]]]:
        """Lists sigma, target, and the velocities of some policies, level by level."""
        found = []
        for sigma, noise in self.levels:
            x = (1 - sigma) * self.images + sigma * noise
            found.append((sigma, noise - self.images, [velocity(w, x, sigma, self.prompts) for w in weights]))
        return found


Loss = Callable[[Drawn, State], Tensor]


def velocity(w: Weights, x: Tensor, sigma: float, prompts: Tensor) -> Tensor:
    """The linear model's."""
    return x @ w["W"].T + sigma * w["b"] + prompts[:, None] * w["e"]


def square(a: Tensor, b: Tensor) -> Tensor:
    """|a - b|^2 / D of each row."""
    return ((a - b) ** 2).mean(1)


def kl_of_velocity(drawn: Drawn, state: State) -> Tensor:
    """Mean squared difference to the reference's velocities at the noised images."""
    return drawn.mean([square(v, r.detach()) for _, _, (v, r) in drawn.by_level([state.now, state.reference])])


def nft(drawn: Drawn, state: State, *, beta: float, largest: float, adaptive: bool) -> Tensor:
    """DiffusionNFT, arXiv 2509.16117, Eq. 5, over beta and times the largest advantage as in its code.

    Adaptive: the square of the predicted image's error over that error's mean absolute value.
    """
    r = 0.5 + (drawn.advantages / largest).clamp(-1, 1) / 2
    losses = []
    for sigma, target, (v, before) in drawn.by_level([state.now, state.old]):
        good = (1 - beta) * before.detach() + beta * v
        bad = (1 + beta) * before.detach() - beta * v
        if adaptive:  # x - sigma v+ - x0 = sigma (target - v+)
            far = [sigma * (one - target) for one in (good, bad)]
            errors = [(one**2).mean(1) / one.detach().abs().mean(1) for one in far]
        else:
            errors = [square(one, target) for one in (good, bad)]
        losses.append(largest * (r * errors[0] + (1 - r) * errors[1]) / beta)
    return drawn.mean(losses)


def clipped(log_ratio: Tensor, advantages: Tensor, low: float, high: float) -> Tensor:
    """PPO's max(-A r, -A clip(r, 1 - low, 1 + high))."""
    r = log_ratio.exp()
    return torch.max(-advantages * r, -advantages * r.clamp(1 - low, 1 + high))


def awm(drawn: Drawn, state: State, *, power: int, clip: float) -> Tensor:
    """AWM, arXiv 2509.25050: -sigma^power |v - target|^2 as log-prob."""
    return drawn.mean(
        [
            clipped(sigma**power * (square(d, target).detach() - square(v, target)), drawn.advantages, clip, clip)
            for sigma, target, (v, d) in drawn.by_level([state.now, state.drew])
        ]
    )


def best_of_groups(drawn: Drawn, state: State, *, best: int) -> Tensor:
    """Flow matching, averaged over the best images above the mean of each group, then over groups."""
    total = torch.zeros((), dtype=torch.float64)
    for _, target, (v,) in drawn.by_level([state.now]):
        errors = square(v, target)
        for start in range(0, len(errors), drawn.size):
            rows = [row for row in range(start, start + drawn.size) if drawn.counted[row]]
            rows = sorted(rows, key=lambda row: (-float(drawn.advantages[row]), row))[:best]
            chosen = [row for row in rows if drawn.advantages[row] > 0]
            if chosen:
                total = total + errors[chosen].mean()
    return total / (len(drawn.levels) * len(drawn.images) // drawn.size)


def preference(drawn: Drawn, state: State, *, beta: float, pair: bool) -> Tensor:
    """Diffusion-DPO, arXiv 2311.12908, Eq. 14, of best and worst; or DGPO, arXiv 2510.08425, of all by A / n."""
    total = torch.zeros((), dtype=torch.float64)
    for _, target, (v, r) in drawn.by_level([state.now, state.reference]):
        gain = square(r, target).detach() - square(v, target)
        for start in range(0, len(gain), drawn.size):
            rows = [row for row in range(start, start + drawn.size) if drawn.counted[row]]
            ordered = sorted(rows, key=lambda row: float(drawn.advantages[row]))
            if pair and (not rows or drawn.advantages[ordered[0]] == drawn.advantages[ordered[-1]]):
                continue
            if pair:
                margin = gain[ordered[-1]] - gain[ordered[0]]
            else:
                margin = sum((drawn.advantages[row] / drawn.size * gain[row] for row in rows), 0 * gain.sum())
            total = total + torch.log1p((-beta * margin).exp())
    return total / (len(drawn.levels) * len(drawn.images) // drawn.size)


def flow_sde(drawn: Drawn, w: Weights, step: int, noise: float) -> tuple[Tensor, float]:
    """Mean and std of Flow-GRPO's step, arXiv 2505.05470, Eq. 9; sigmas[1] stands in for 1 in the denominator."""
    sigma, following, x, _ = drawn.steps[step]
    s = noise * math.sqrt(sigma / (1 - (drawn.first if sigma == 1 else sigma)))
    dt = following - sigma
    v = velocity(w, x, sigma, drawn.prompts)
    mean = x * (1 + s**2 / (2 * sigma) * dt) + v * (1 + s**2 * (1 - sigma) / (2 * sigma)) * dt
    return mean, s * math.sqrt(-dt)


def grpo(
    drawn: Drawn,
    state: State,
    *,
    noise: float,
    clip: tuple[float, float],
    trust: float | None = None,
    by_noise: bool = False,
    whole: bool = False,
    kl_velocity: float = 0.0,
) -> Tensor:
    """Flow-GRPO, arXiv 2505.05470, Eq. 5, and its variants.

    Args:
        drawn: the images.
        state: the policies.
        noise: level of the SDE's noise.
        clip: how far below and above 1 the ratio may be.
        trust: Flow-DPPO's (arXiv 2606.11025) largest KL to the policy that drew, in place of `clip`.
        by_noise: TempFlow-GRPO's (arXiv 2508.04324) weights, std over the mean std.
        whole: GSPO's (arXiv 2507.18071) ratio, of the mean log ratio of all steps.
        kl_velocity: weight of the mean squared difference to the reference's velocities.
    """
    A, count = drawn.advantages, len(drawn.steps)
    log_ratios, stds, moved, kls = [], [], [], []
    for step, (sigma, _, x, after) in enumerate(drawn.steps):
        (mean, std), (before, _) = (flow_sde(drawn, w, step, noise) for w in (state.now, state.drew))
        log_ratios.append(((after - before.detach()) ** 2 - (after - mean) ** 2).mean(1) / (2 * std**2))
        stds.append(std)
        moved.append((square(mean, before) / (2 * std**2)).detach())
        now, reference = (velocity(w, x, sigma, drawn.prompts) for w in (state.now, state.reference))
        kls.append(square(now, reference.detach()))
    if whole:
        losses = [clipped(sum(log_ratios) / count, A, *clip)] * count
    elif trust is not None:
        losses = []
        for log_ratio, kl in zip(log_ratios, moved, strict=True):
            r = log_ratio.exp()
            away = (kl > trust) & (A * (r - 1) > 0)
            losses.append(torch.where(away, (-A * r).detach(), -A * r))
    else:
        losses = [clipped(log_ratio, A, *clip) for log_ratio in log_ratios]
    if by_noise:
        losses = [loss * std * count / sum(stds) for loss, std in zip(losses, stds, strict=True)]
    return drawn.mean(losses) + kl_velocity * drawn.mean(kls)


@dataclass(frozen=True)
class Written:
    """Completions of a refiner: of each the tokens, the one before each, the advantage, and if it counts.

    They were drawn at a temperature, which divides the table of logits.
    """

    tokens: list[list[int]]
    before: list[list[int]]
    advantages: list[float]
    counted: list[bool]
    temperature: float


def refiner(
    written: Written,
    state: State,
    *,
    clip: tuple[float, float],
    sequence: bool = False,
    by_token: bool = False,
    entropy: float = 0.0,
    kl: float = 0.0,
) -> Tensor:
    """GRPO on tokens (arXiv 2402.03300), with GSPO's sequence ratio, DAPO's token mean, an entropy bonus and k3.

    The bonus is the gradient of each token's entropy, E[log p d log p], estimated from the drawn token.
    """
    total, tokens = torch.zeros((), dtype=torch.float64), sum(map(len, written.tokens))
    for row, ids in enumerate(written.tokens):
        if not written.counted[row]:
            continue
        pairs = list(zip(written.before[row], ids, strict=True))
        log_p, drew, reference = (
            torch.stack([(w["weight"][a] / written.temperature).log_softmax(0)[b] for a, b in pairs])
            for w in (state.now, state.drew, state.reference)
        )
        change = log_p - drew.detach()
        log_ratio = change.mean().expand(len(ids)) if sequence else change
        losses = clipped(log_ratio, torch.tensor(written.advantages[row]), *clip)
        losses = losses + entropy * change.exp() * log_p.detach()
        d = reference.detach() - log_p
        losses = losses + kl * (d.exp() - 1 - d)
        total = total + (losses.sum() / tokens if by_token else losses.mean() / len(written.tokens))
    return total


def descend(
    losses: Sequence[Callable[[State], Tensor]],
    start: Weights,
    before: Weights,
    rate: float,
    keep_old: float = 0.0,
    keep_reference: float | None = None,
) -> list[tuple[float, Weights]]:
    """Takes gradient steps on a rollout; returns the loss and the gradient of each.

    Args:
        losses: that of each step, of the policies.
        start: weights that drew.
        before: the reference, where it does not move.
        rate: learning rate.
        keep_old: d of `old = d old + (1 - d) now` after each step.
        keep_reference: the same of a reference that moves from `start` on.
    """
    now, old, reference = start, start, before if keep_reference is None else start
    found = []
    for loss in losses:
        leaves = {name: value.clone().requires_grad_() for name, value in now.items()}
        value = loss(State(leaves, start, old if keep_old else leaves, reference))
        gradients = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
        named = {
            name: torch.zeros_like(now[name]) if one is None else one for name, one in zip(now, gradients, strict=True)
        }
        found.append((value.item(), named))
        now = {name: now[name] - rate * named[name] for name in now}
        old = {name: keep_old * old[name] + (1 - keep_old) * now[name] for name in now}
        if keep_reference is not None:
            reference = {name: keep_reference * reference[name] + (1 - keep_reference) * now[name] for name in now}
    return found
