"""Agents in float64 whose networks are a formula: a linear velocity, and a table of the next token's logits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor, nn

from datamodules.base import PromptSample
from lightning_modules.policies.base import LoRA, Policy
from lightning_modules.policies.flow import FlowPolicy
from lightning_modules.policies.language import LanguagePolicy
from lightning_modules.rollout import Completions, Conditioning

SHAPE, DIMS = (2, 3), 6
"""Latents of one image."""
VOCABULARY, LONGEST = 7, 5


def feature(prompt: str) -> float:
    """The number that stands for a prompt."""
    return (sum(prompt.encode()) % 17) / 17 - 0.5


class LinearVelocity(nn.Module):
    """v = W x + sigma b + h e, of flattened latents x [B, 6] and a number h [B] a prompt."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(11)
        for name, shape in {"W": (DIMS, DIMS), "b": (DIMS,), "e": (DIMS,)}.items():
            value = 0.3 * torch.randn(shape, generator=generator, dtype=torch.float64)
            self.register_parameter(name, nn.Parameter(value))

    def forward(self, x: Tensor, sigma: Tensor, h: Tensor) -> Tensor:
        """Computes the velocity [B, 6]."""
        return x @ self.W.T + sigma * self.b + h[:, None] * self.e


class LinearPolicy(FlowPolicy):
    """A flow model with latents [2, 3] and a linear velocity; an image has the sigmoids of its latents as colour."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__("linear", *args, **({"height": 8, "width": 8, "max_grad_norm": float("inf")} | kwargs))

    def load(self, *, weights: bool = True) -> None:
        """Makes the network."""
        if self.network is None:
            self.network = LinearVelocity()
            self._prepare()

    def _add_adapters(self, lora: LoRA) -> None:
        raise NotImplementedError

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes nothing."""

    def sigmas(self, num_steps: int) -> Tensor:
        """Levels of a schedule that is shifted to more noise."""
        even = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)
        return 1.5 * even / (1 + 0.5 * even)

    def encode(self, prompts: Sequence[str], images: Sequence[Image] | None = None) -> Conditioning:
        """Takes each distinct prompt's number."""
        distinct = list(dict.fromkeys(prompts))
        numbers = torch.tensor([feature(prompt) for prompt in distinct], dtype=torch.float64)
        return Conditioning({"h": numbers}, torch.tensor([distinct.index(prompt) for prompt in prompts]))

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Shape of an image's latents."""
        return SHAPE

    def prepare_latents(self, generators: Sequence[torch.Generator]) -> Tensor:
        """Draws noise in float64."""
        return super().prepare_latents(generators).double()

    def velocity(self, latents: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """Calls the network."""
        velocity: Tensor = self.active(latents.flatten(1), sigma, conditioning["h"])
        return velocity.view_as(latents)

    def decode(self, latents: Tensor) -> Tensor:
        """Paints an image in one colour."""
        colour = latents.mean(1).sigmoid().float()
        return colour[:, :, None, None].expand(-1, -1, self.height, self.width)


class TablePolicy(LanguagePolicy):
    """A refiner whose next token depends on the last one alone, with a table [7, 7] of logits; writes what it is told.

    Args:
        lengths: number of tokens of each completion in turn.
        formatted: format reward of each completion in turn.
        **kwargs: as for `LanguagePolicy`.
    """

    def __init__(self, lengths: Sequence[int], formatted: Sequence[float], **kwargs: Any) -> None:
        super().__init__("table", "{prompt}", **({"max_grad_norm": float("inf")} | kwargs))
        self.lengths, self.formatted = lengths, formatted

    def load(self, *, weights: bool = True) -> None:
        """Makes the table."""
        if self.network is None:
            generator = torch.Generator().manual_seed(12)
            table = torch.randn(VOCABULARY, VOCABULARY, generator=generator, dtype=torch.float64)
            self.network = nn.Embedding.from_pretrained(table, freeze=False)
            Policy._prepare(self)

    def _prepare(self) -> None:
        Policy._prepare(self)

    def refine(self, samples: Sequence[PromptSample], num: int) -> Completions:
        """Writes completions of the given lengths."""
        rows = len(samples) * num
        generator = torch.Generator().manual_seed(13)
        tokens = torch.randint(VOCABULARY, (rows, LONGEST), generator=generator)
        lengths = torch.tensor([self.lengths[row % len(self.lengths)] for row in range(rows)])
        texts = [f"{samples[row // num].prompt} {row}" for row in range(rows)]
        return Completions(
            prompt_ids=torch.arange(rows)[:, None] % VOCABULARY,
            prompt_mask=torch.ones(rows, 1, dtype=torch.long),
            tokens=tokens,
            mask=torch.arange(LONGEST) < lengths[:, None],
            log_probs=torch.zeros(rows, LONGEST),
            texts=texts,
            rewrites=texts,
            formatted=torch.tensor([self.formatted[row % len(self.formatted)] for row in range(rows)]),
            truncated=torch.zeros(rows, dtype=torch.bool),
        )

    def log_probs(self, completions: Completions) -> Tensor:
        """Looks the tokens up in the table."""
        before = torch.cat([completions.prompt_ids[:, -1:], completions.tokens[:, :-1]], 1)
        logits: Tensor = self.active(before) / self.temperature
        return logits.log_softmax(-1).gather(2, completions.tokens[..., None])[..., 0]
