"""The joint step in float64 numpy, written from the papers' equations (docs/method.md), to compare `PromptRL` with.

It imports nothing of this repository. The networks are the stock ones of diffusers and transformers in float64, called
directly. The gradient of the loss in their outputs is derived by hand; autograd only pulls it through a network. What
was drawn (latents, tokens and texts of completions, scores) is data.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

Array = NDArray[np.float64]


class Learner:
    """An agent as it learns.

    Args:
        settings: has the settings of a policy as attributes.
        network: float64, with the weights that drew the rollout; every step moves it.
        before: float64, the network before training, for the KL.
        eps: AdamW's.
    """

    def __init__(self, settings: Any, network: nn.Module, before: nn.Module, eps: float) -> None:
        self.settings, self.network, self.before, self.eps = settings, network, before, eps
        self.moments: dict[str, tuple[Array, Array]] = {}

    def pull(self, output: Tensor, slope: Array, gradients: dict[str, Array]) -> None:
        """Adds the gradient in the weights to `gradients`, given the one in the network's output."""
        names, weights = zip(*self.network.named_parameters(), strict=True)
        pulled = torch.autograd.grad(output, weights, torch.from_numpy(slope), allow_unused=True)
        for name, gradient in zip(names, pulled, strict=True):
            if gradient is not None:
                gradients[name] = gradients.get(name, 0.0) + gradient.numpy()

    def clip(self, gradients: dict[str, Array]) -> float:
        """Shortens the whole gradient to `max_grad_norm`, as PyTorch does; returns its length before."""
        norm = float(np.sqrt(sum(np.square(gradient).sum() for gradient in gradients.values())))
        for gradient in gradients.values():
            gradient *= min(1.0, self.settings.max_grad_norm / (norm + 1e-6))
        return norm

    def step(self, gradients: dict[str, Array], number: int) -> None:
        """Takes AdamW's step (arXiv 1711.05101, Alg. 2), the first one with `number` 1."""
        first, second = self.settings.betas
        weights = dict(self.network.named_parameters())
        for name, gradient in gradients.items():
            mean, square = self.moments.get(name, (0.0, 0.0))
            mean = first * mean + (1 - first) * gradient
            square = second * square + (1 - second) * gradient**2
            self.moments[name] = mean, square
            unbiased, root = mean / (1 - first**number), np.sqrt(square / (1 - second**number))
            weight = weights[name].detach().numpy()
            change = unbiased / (root + self.eps) + self.settings.weight_decay * weight
            weights[name].data.copy_(torch.from_numpy(weight - self.settings.learning_rate * change))


class Flow(Learner):
    """The image model, a FLUX.1 transformer."""

    def texts(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Encodes prompts by the stock pipeline: T5's tokens [B, L, C] and CLIP's vector [B, C]."""
        with torch.no_grad():
            tokens, vector, _ = self.settings.pipe.encode_prompt(
                prompts, None, max_sequence_length=self.settings.max_sequence_length
            )
        return tokens.double(), vector.double()

    def velocity(self, network: nn.Module, x: Array, sigma: float, texts: tuple[Tensor, Tensor]) -> Tensor:
        """Calls the transformer on latents [B, tokens, C] of square images; a token is at its row and column."""
        batch, tokens, _ = x.shape
        side = round(tokens**0.5)
        places = torch.tensor([[0, row, column] for row in range(side) for column in range(side)]).double()
        velocity: Tensor = network(
            hidden_states=torch.from_numpy(x),
            timestep=torch.full((batch,), sigma).double(),
            guidance=torch.full((batch,), self.settings.guidance).double(),
            encoder_hidden_states=texts[0],
            pooled_projections=texts[1],
            txt_ids=torch.zeros(texts[0].shape[1], 3).double(),
            img_ids=places,
            return_dict=False,
        )[0]
        return velocity

    def transition(self, x: Any, v: Any, sigma: float, sigma_next: float, first: float) -> tuple[Any, float]:
        """Mean and standard deviation of an SDE step; the mean is linear in v, and `first` is sigmas[1].

        Flow-GRPO (arXiv 2505.05470), DanceGRPO (arXiv 2505.07818) or Flow-CPS (arXiv 2509.05952).
        """
        a, dt, x0, x1 = self.settings.sampling.noise_level, sigma_next - sigma, x - sigma * v, x + (1 - sigma) * v
        if self.settings.sampling.sde_type == "cps":
            std = sigma_next * np.sin(a * np.pi / 2)
            return (1 - sigma_next) * x0 + np.sqrt(sigma_next**2 - std**2) * x1, std
        if self.settings.sampling.sde_type == "dance_sde":
            score = -(x - (1 - sigma) * x0) / sigma**2
            return x + v * dt - a**2 / 2 * score * dt, a * np.sqrt(-dt)
        # sigmas[1] stands in for a sigma of 1 in the denominator alone.
        s = a * np.sqrt(sigma / (1 - (first if sigma == 1 else sigma)))
        mean = x * (1 + s**2 / (2 * sigma) * dt) + v * (1 + s**2 * (1 - sigma) / (2 * sigma)) * dt
        return mean, s * np.sqrt(-dt)


class Language(Learner):
    """The refiner, a causal language model."""

    def prompt(self, text: str) -> list[int]:
        """Tokens of the chat that asks for a rewrite of `text`."""
        chat = [{"role": "user", "content": self.settings.template.replace("{prompt}", text)}]
        asked = self.settings.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        ids: list[int] = self.settings.tokenizer(asked, add_special_tokens=False)["input_ids"]
        return ids

    def written(self, tokens: Array) -> list[int]:
        """The tokens that the refiner chose: up to the first end of sequence, which is one of them."""
        ids = tokens.tolist()
        end = self.settings.tokenizer.eos_token_id
        return ids[: ids.index(end) + 1] if end in ids else ids

    def logits(self, network: nn.Module, prompt: list[int], written: list[int]) -> Tensor:
        """Calls the network on one completion alone, without padding: [tokens, vocabulary]."""
        ids = torch.tensor([prompt + written])
        logits: Tensor = network(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
        return logits


@dataclass
class Update:
    """What one optimizer step saw and did.

    Attributes:
        loss: the agents' losses together.
        outside: agent -> share of the ratios that were outside the clip range.
        norms: agent -> length of its gradient before clipping.
        gradients: weight -> gradient after clipping; names begin with the agent's.
        weights: weight -> value after the step.
    """

    loss: float = 0.0
    outside: dict[str, float] = field(default_factory=dict)
    norms: dict[str, float] = field(default_factory=dict)
    gradients: dict[str, Array] = field(default_factory=dict)
    weights: dict[str, Array] = field(default_factory=dict)


@dataclass(frozen=True)
class Experience:
    """What the agents learn from: G * n * M images and G * (n - m) rewrites; one that is not counted has no loss.

    Attributes:
        prompts: the images' prompts.
        advantages, counted: of images.
        language_advantages, language_counted: of rewrites.
    """

    prompts: list[str]
    advantages: Array
    counted: NDArray[np.bool_]
    language_advantages: Array
    language_counted: NDArray[np.bool_]


def answer(text: str) -> str:
    """The text inside the last well-formed answer tag; empty if there is none."""
    found = re.findall(r"<answer>(.*?)</answer>", text, re.DOTALL)
    return found[-1].rpartition("<answer>")[2].strip() if found else ""


def group_advantages(
    rewards: Array, valid: NDArray[np.bool_], scale: str, tags: list[str]
) -> tuple[Array, NDArray[np.bool_]]:
    """Compares rewards [G, N] within groups; also returns which of them count.

    A_i = (R_i - mean) / (std + 1e-4), clamped to +-5, over the group's valid samples, of which one alone has nothing to
    be compared with. The std is the group's, or one over all groups of its tag, or 1.
    """
    counted = valid & (valid.sum(1, keepdims=True) >= 2)
    advantages = np.zeros_like(rewards)
    for row, chosen in enumerate(counted):
        if chosen.any():
            advantages[row, chosen] = rewards[row, chosen] - rewards[row, chosen].mean()
    pools = [[row for row, tag in enumerate(tags) if tag == one] for one in set(tags)]
    if scale == "group":
        pools = [[row] for row in range(len(rewards))]
    for rows in pools if scale != "none" else []:
        if counted[rows].any():
            advantages[rows] /= np.sqrt(np.mean(advantages[rows][counted[rows]] ** 2)) + 1e-4
    return np.clip(advantages, -5, 5), counted


def experience(rollout: Any, settings: Any) -> Experience:
    """Takes rewards and advantages from a rollout's completions and scores."""
    groups, images = len(rollout.samples), settings.images_per_prompt
    refined = settings.group_size - settings.num_retained
    texts = [] if rollout.completions is None else rollout.completions.texts
    formats, prompts = [], []
    for group, sample in enumerate(rollout.samples):
        written = [answer(text) for text in texts[group * refined : (group + 1) * refined]]
        well_formed = [float(text != "") for text in written]
        retained = [np.mean(well_formed) if written else 0.0] * settings.num_retained
        formats.append(np.repeat([*retained, *well_formed], images))
        prompts += [one for one in [sample.prompt] * settings.num_retained + written for _ in range(images)]
    # What is drawn of a completion without an answer is data.
    prompts = [one or drawn for one, drawn in zip(prompts, rollout.prompts, strict=True)]
    scores = np.array([score.rl if score.valid else 0.0 for score in rollout.scores]).reshape(groups, -1)
    valid = np.array([score.valid for score in rollout.scores]).reshape(groups, -1)
    rewards = settings.format_weight * np.array(formats) + settings.task_weight * scores
    tags = [sample.tag for sample in rollout.samples]
    advantages, counted = group_advantages(rewards, valid, settings.advantage_scale, tags)
    slots = (groups, settings.group_size, images)
    numbers = counted.reshape(slots).sum(2)[:, settings.num_retained :].ravel()
    sums = advantages.reshape(slots).sum(2)[:, settings.num_retained :].ravel()
    return Experience(prompts, advantages.ravel(), counted.ravel(), sums / np.maximum(numbers, 1), numbers > 0)


def surrogate(log_ratio: Array, advantages: Array, clip_range: float) -> tuple[Array, Array, Array]:
    """Computes max(-A r, -A clip(r, 1 - c, 1 + c)), its derivative in log r, and where r is outside the clip range."""
    ratio = np.exp(log_ratio)
    free, clipped = -advantages * ratio, -advantages * np.clip(ratio, 1 - clip_range, 1 + clip_range)
    return np.maximum(free, clipped), np.where(free >= clipped, free, 0.0), np.abs(ratio - 1) > clip_range


def mean_per_sample(values: Array) -> Array:
    """Means over all dims but the first."""
    return values.reshape(len(values), -1).mean(1)


def chosen(output: Tensor, written: list[int], temperature: float) -> tuple[Array, Array]:
    """Log-probs [T] of the written tokens and the softmax [T, V], of logits [T, V]."""
    logits = output.detach().numpy() / temperature
    logits = logits - logits.max(1, keepdims=True)
    log_softmax = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    return log_softmax[np.arange(len(written)), written], np.exp(log_softmax)


class JointStep:
    """The optimizer steps on one rollout.

    Args:
        settings: has the settings of `PromptRL` as attributes.
        rollout: what was drawn.
        flow: the image model, or None if it is frozen.
        language: the refiner, or None if there is none or it is frozen.
    """

    def __init__(self, settings: Any, rollout: Any, flow: Flow | None, language: Language | None) -> None:
        self.settings, self.rollout, self.flow, self.language = settings, rollout, flow, language
        self.experience = experience(rollout, settings)
        self.part = np.arange(len(rollout.samples))  # groups of the mini-batch
        # Of the policies that drew the rollout: by SDE step [B] and [B, tokens, C], by completion [T].
        self.flow_log_probs: list[Array] = []
        self.flow_means: list[Array] = []
        self.token_log_probs: list[Array] = []

    def updates(self) -> list[Update]:
        """Takes all steps: passes over the rollout, each in mini-batches of whole groups, of nearly equal numbers."""
        groups, parts = len(self.rollout.samples), self.settings.num_minibatches
        bounds = [groups * number // parts for number in range(parts + 1)]
        taken: list[Update] = []
        for _ in range(self.settings.updates_per_rollout):
            for first, end in zip(bounds, bounds[1:], strict=False):
                self.part = np.arange(groups)[first:end]
                taken.append(self._update(len(taken) + 1))
        return taken

    def inside(self, total: int) -> NDArray[np.bool_]:
        """Finds which of `total` images, or rewrites, are in the mini-batch."""
        per_group = total // len(self.rollout.samples)
        return np.isin(np.arange(total) // per_group, self.part)

    def _update(self, number: int) -> Update:
        update = Update()
        for name, agent, objective in (("flow", self.flow, self._flow), ("language", self.language, self._language)):
            if agent is None:
                continue
            gradients: dict[str, Array] = {}
            loss, update.outside[name] = objective(agent, gradients)
            update.loss += loss
            update.norms[name] = agent.clip(gradients)
            agent.step(gradients, number)
            update.gradients |= {f"{name}.{key}": gradient for key, gradient in gradients.items()}
            weights = agent.network.named_parameters()
            update.weights |= {f"{name}.{key}": weight.detach().numpy().copy() for key, weight in weights}
        return update

    def _flow(self, flow: Flow, gradients: dict[str, Array]) -> tuple[float, float]:
        """Clipped surrogate of the SDE steps plus the KL of each: its value and the share outside the clip range."""
        path, settings, loss, outside = self.rollout.trajectory, flow.settings, 0.0, []
        texts, sigmas = flow.texts(self.experience.prompts), path.sigmas.double().tolist()
        inside = self.inside(len(self.experience.counted))
        counted = self.experience.counted & inside
        share = counted / (inside.sum() * len(path.sde_steps))
        for place, step in enumerate(path.sde_steps):
            x, drawn = (part[:, place].double().numpy() for part in (path.latents, path.next_latents))
            span, dims = (sigmas[step], sigmas[step + 1], sigmas[1]), x[0].size
            output = flow.velocity(flow.network, x, sigmas[step], texts)
            mean, std = flow.transition(x, output.detach().numpy(), *span)
            density = -((drawn - mean) ** 2) / (2 * std**2) - np.log(std) - np.log(2 * np.pi) / 2
            log_probs = mean_per_sample(density)
            if len(self.flow_means) == place:
                self.flow_means.append(mean)
                self.flow_log_probs.append(log_probs)
            log_ratio = log_probs - self.flow_log_probs[place]
            slope = (drawn - mean) / (std**2 * dims)  # d log_ratio / d mean
            weight, variance = 1.0, std**2
            if self.settings.objective.ratio_normalization:  # GRPO-Guard, arXiv 2510.22319
                moved = mean - self.flow_means[place]
                log_ratio = std * (log_ratio + mean_per_sample(moved**2 / (2 * std**2)))
                slope = std * (slope + moved / (std**2 * dims))
            if self.settings.objective.ratio_normalization == "over_dt":
                weight = 1 / (sigmas[step] - sigmas[step + 1])
            if settings.kl_units == "flow_grpo" and settings.sampling.sde_type != "cps":
                variance = std**2 / (sigmas[step] - sigmas[step + 1])
            losses, by_ratio, beyond = surrogate(log_ratio, weight * self.experience.advantages, settings.clip_range)
            with torch.no_grad():
                velocity_before = flow.velocity(flow.before, x, sigmas[step], texts).numpy()
            away = mean - flow.transition(x, velocity_before, *span)[0]
            losses = losses + settings.kl_weight * mean_per_sample(away**2 / (2 * variance))
            by_mean = by_ratio[:, None, None] * slope + settings.kl_weight * away / (variance * dims)
            loss += float((share * losses).sum())
            outside.append(beyond[counted].mean())
            by_velocity = by_mean * flow.transition(0.0, 1.0, *span)[0]
            flow.pull(output, share[:, None, None] * by_velocity, gradients)
        return loss, float(np.mean(outside))

    def _language(self, language: Language, gradients: dict[str, Array]) -> tuple[float, float]:
        """Clipped surrogate of the rewrites' tokens plus k3: its value and the share outside the clip range."""
        samples, tokens, loss, outside = self.rollout.samples, self.rollout.completions.tokens.numpy(), 0.0, []
        settings, inside = language.settings, self.inside(len(tokens))
        total = inside.sum()
        for row in range(len(tokens)):
            prompt = language.prompt(samples[row * len(samples) // len(tokens)].prompt)
            written = language.written(tokens[row])
            output = language.logits(language.network, prompt, written)
            log_probs, softmax = chosen(output, written, settings.temperature)
            if len(self.token_log_probs) == row:
                self.token_log_probs.append(log_probs)
            if not (self.experience.language_counted[row] and inside[row]):
                continue
            with torch.no_grad():
                output_before = language.logits(language.before, prompt, written)
            d = chosen(output_before, written, settings.temperature)[0] - log_probs
            advantages = np.full(len(written), self.experience.language_advantages[row])
            log_ratio = log_probs - self.token_log_probs[row]
            losses, by_log_prob, beyond = surrogate(log_ratio, advantages, settings.clip_range)
            losses = losses + settings.kl_weight * (np.exp(d) - 1 - d)
            by_log_prob = by_log_prob + settings.kl_weight * (1 - np.exp(d))
            loss += float(losses.mean() / total)
            outside.append(beyond.mean())
            by_logits = by_log_prob[:, None] * (np.eye(softmax.shape[1])[written] - softmax) / settings.temperature
            language.pull(output, by_logits / (len(written) * total), gradients)
        return loss, float(np.mean(outside))
