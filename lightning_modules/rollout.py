"""Frozen records of a rollout: completions, conditioning, trajectories, and the step's whole experience."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from datamodules.base import PromptSample
from datamodules.chunks import chunks
from lightning_modules.rl.log_probs import position_ids
from rewards.base import Score


def _selected(values: Any, rows: slice | list[int]) -> Any:
    """Selects rows of a tensor or a sequence."""
    return values[rows] if isinstance(rows, slice) or isinstance(values, Tensor) else [values[row] for row in rows]


@dataclass(frozen=True)
class SeenImages:
    """Features of D source images, computed once by the refiner's frozen vision tower and read by every replay.

    Attributes:
        features: D tensors [tokens, 1 + layers, hidden]: the embeddings of an image's tokens, then what is added after
            the first decoder layers (Qwen3-VL's DeepStack). No tokens for a prompt without an image.
        index: B numbers, the image of each row.
        mask: [B, P] bool, True at the prompts' image tokens.
        positions: [B, 3, P] positions (time, height, width) of the prompts' tokens.
    """

    features: tuple[Tensor, ...]
    index: tuple[int, ...]
    mask: Tensor
    positions: Tensor

    @classmethod
    def absent(cls, none: Tensor, prompt_mask: Tensor) -> SeenImages:
        """Makes the record of B prompts without images.

        Args:
            none: features [0, 1 + layers, hidden] of no image.
            prompt_mask: [B, P] 1 for tokens, 0 for padding.
        """
        positions = position_ids(prompt_mask)[:, None].expand(-1, 3, -1)
        return cls((none,), (0,) * len(prompt_mask), torch.zeros_like(prompt_mask, dtype=torch.bool), positions)

    def rows(self, rows: slice | list[int]) -> SeenImages:
        """Selects some rows."""
        index = tuple(_selected(self.index, rows))
        return replace(self, index=index, mask=self.mask[rows], positions=self.positions[rows])

    def repeat(self, num: int) -> SeenImages:
        """Repeats each row `num` times, side by side."""
        return SeenImages(
            self.features,
            tuple(image for image in self.index for _ in range(num)),
            self.mask.repeat_interleave(num, 0),
            self.positions.repeat_interleave(num, 0),
        )


@dataclass(frozen=True)
class Completions:
    """B completions of the language policy, those of one prompt side by side.

    Attributes:
        prompt_ids: [B, P] tokens of the chat so far, padded on the left.
        prompt_mask: [B, P] 1 for tokens, 0 for padding.
        tokens: [B, T] tokens of the completions, padded on the right.
        mask: [B, T] bool, True up to and including the first end-of-sequence token.
        log_probs: [B, T] fp32, of the tokens when they were drawn; zeros where they were chosen greedily.
        texts: B decoded completions.
        rewrites: B prompts to draw, taken from the texts.
        formatted: [B] 1.0 where the text held a well-formed answer, else 0.0.
        truncated: [B] bool, cut off before its end of sequence.
        seen: the source images as the refiner sees them, or None if it reads text alone.
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    tokens: Tensor
    mask: Tensor
    log_probs: Tensor
    texts: list[str]
    rewrites: list[str]
    formatted: Tensor
    truncated: Tensor
    seen: SeenImages | None = None

    def __len__(self) -> int:
        return len(self.texts)

    @classmethod
    def joined(cls, parts: Sequence[Completions], pad_token_id: int) -> Completions:
        """Joins completions that were written apart, padded to the longest prompt and completion."""
        if len(parts) == 1:
            return parts[0]
        prompt = max(part.prompt_ids.shape[1] for part in parts)
        length = max(part.tokens.shape[1] for part in parts)

        def right(value: Tensor, fill: float = 0) -> Tensor:
            return F.pad(value, (0, length - value.shape[1]), value=fill)

        def left(value: Tensor, fill: float = 0) -> Tensor:
            return F.pad(value, (prompt - value.shape[-1], 0), value=fill)

        seen = None
        if shown := [part.seen for part in parts if part.seen is not None]:
            none = shown[0].features[0][:0]
            every = [part.seen or SeenImages.absent(none, part.prompt_mask) for part in parts]
            first = [sum(len(other.features) for other in every[:number]) for number in range(len(every))]
            seen = SeenImages(
                features=tuple(image for one in every for image in one.features),
                index=tuple(start + image for start, one in zip(first, every, strict=True) for image in one.index),
                mask=torch.cat([left(one.mask) for one in every]),
                positions=torch.cat([left(one.positions) for one in every]),
            )
        return cls(
            prompt_ids=torch.cat([left(part.prompt_ids, pad_token_id) for part in parts]),
            prompt_mask=torch.cat([left(part.prompt_mask) for part in parts]),
            tokens=torch.cat([right(part.tokens, pad_token_id) for part in parts]),
            mask=torch.cat([right(part.mask) for part in parts]),
            log_probs=torch.cat([right(part.log_probs) for part in parts]),
            texts=[text for part in parts for text in part.texts],
            rewrites=[text for part in parts for text in part.rewrites],
            formatted=torch.cat([part.formatted for part in parts]),
            truncated=torch.cat([part.truncated for part in parts]),
            seen=seen,
        )

    def rows(self, rows: slice | list[int]) -> Completions:
        """Selects the completions of some rows."""
        selected = {one.name: _selected(getattr(self, one.name), rows) for one in fields(self) if one.name != "seen"}
        return Completions(**selected, seen=None if self.seen is None else self.seen.rows(rows))

    def micro_batches(self, size: int | None) -> list[list[int]]:
        """Lists the rows of micro-batches of up to `size` rows of similar length, the longest first."""
        lengths = (self.prompt_mask.sum(1) + self.mask.sum(1)).tolist()
        order = sorted(range(len(self)), key=lambda row: -lengths[row])
        return [order[part] for part in chunks(len(order), size)]

    def trimmed(self) -> Completions:
        """Cuts the columns that are padding in all rows, on the left of prompts and on the right of completions."""
        prompt, length = int(self.prompt_mask.sum(1).max()), int(self.mask.sum(1).max())
        seen = self.seen
        return replace(
            self,
            prompt_ids=self.prompt_ids[:, -prompt:],
            prompt_mask=self.prompt_mask[:, -prompt:],
            tokens=self.tokens[:, :length],
            mask=self.mask[:, :length],
            log_probs=self.log_probs[:, :length],
            seen=seen and replace(seen, mask=seen.mask[:, -prompt:], positions=seen.positions[..., -prompt:]),
        )


@dataclass(frozen=True)
class Conditioning:
    """Encoded prompts: every distinct text (or source image) once, and which of them each sample uses.

    Attributes:
        tensors: name -> [D, ...] for D distinct prompts; the names are the family's own.
        index: [B] long, row of `tensors` for each sample.
        own_index: name -> [B] long, for tensors whose rows are something else than prompts (source images).
    """

    tensors: dict[str, Tensor]
    index: Tensor
    own_index: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.index)

    def rows(self, rows: slice | list[int]) -> Conditioning:
        """Selects the conditioning of some samples."""
        own_index = {name: index[rows] for name, index in self.own_index.items()}
        return replace(self, index=self.index[rows], own_index=own_index)

    def __getitem__(self, name: str) -> Tensor:
        """Expands one of the tensors to [B, ...], a row for each sample."""
        return self.tensors[name][self.own_index.get(name, self.index)]


@dataclass(frozen=True)
class Trajectory:
    """B paths of the sampler, with all that a replay needs to find the same log-probs again.

    Attributes:
        latents: [B, K, ...] fp32, exactly what the network was given before each of the K SDE steps.
        next_latents: [B, K, ...] fp32, exactly what each SDE step led to.
        log_probs: [B, K] fp32, of the SDE steps when they were drawn.
        final: [B, ...] fp32 latents at sigma 0.
        sigmas: [N + 1] fp32, the schedule.
        sde_steps: K indices into the schedule.
        conditioning: conditioning of the B samples.
    """

    latents: Tensor
    next_latents: Tensor
    log_probs: Tensor
    final: Tensor
    sigmas: Tensor
    sde_steps: tuple[int, ...]
    conditioning: Conditioning

    def __len__(self) -> int:
        return len(self.final)

    def rows(self, rows: slice) -> Trajectory:
        """Selects the trajectories of some samples."""
        return replace(
            self,
            latents=self.latents[rows],
            next_latents=self.next_latents[rows],
            log_probs=self.log_probs[rows],
            final=self.final[rows],
            conditioning=self.conditioning.rows(rows),
        )


@dataclass(frozen=True)
class Rollout:
    """Experience of one step: G groups of N images, group by group; in a group the retained prompts come first.

    Where several processes share a group, N and all but `whole` are of this process's part of it.

    Attributes:
        samples: G original prompts.
        prompts: G * N prompts as drawn.
        completions: the rewrites, or None without a refiner.
        trajectory: the G * N paths of the sampler.
        images: G * N images.
        scores: G * N task scores, given against the original prompts.
        rewards: [G, N] total reward.
        valid: [G, N] bool, False where scoring failed.
        advantages: [G, N] for the flow policy.
        language_advantages: [G * rewrites], the mean advantage of each rewrite's counted images, or None.
        language_counted: [G * rewrites] bool, True where any of a rewrite's images counts; None: all do.
        whole: rewards and `valid` of whole groups, if processes share them.
        seeds: G * N seeds of the samples' noise.
        step: number of the optimizer step before which it was collected.
        written_ahead: True if the rewrites are older than the last update (`RewritesAhead`).
    """

    samples: Sequence[PromptSample]
    prompts: list[str]
    completions: Completions | None
    trajectory: Trajectory
    images: list[Image.Image]
    scores: list[Score]
    rewards: Tensor
    valid: Tensor
    advantages: Tensor
    language_advantages: Tensor | None
    language_counted: Tensor | None = None
    whole: tuple[Tensor, Tensor] | None = None
    seeds: Sequence[int] = ()
    step: int = 0
    written_ahead: bool = False

    def groups(self, rows: slice) -> Rollout:
        """Selects some of the G groups; those of a whole rollout in parts are its mini-batches."""
        size = self.rewards.shape[1]
        images = slice(rows.start * size, rows.stop * size)
        written = 0 if self.completions is None else len(self.completions) // len(self.samples)
        texts = slice(rows.start * written, rows.stop * written)
        completions, advantages, counted = self.completions, self.language_advantages, self.language_counted
        return replace(
            self,
            samples=self.samples[rows],
            prompts=self.prompts[images],
            completions=None if completions is None else completions.rows(texts),
            trajectory=self.trajectory.rows(images),
            images=self.images[images],
            scores=self.scores[images],
            rewards=self.rewards[rows],
            valid=self.valid[rows],
            advantages=self.advantages[rows],
            language_advantages=None if advantages is None else advantages[texts],
            language_counted=None if counted is None else counted[texts],
            whole=None if self.whole is None else (self.whole[0][rows], self.whole[1][rows]),
            seeds=self.seeds[images],
        )

    @property
    def counted(self) -> Tensor:
        """[G, N] bool, True for samples that take part in the update: valid, with another valid one in their group."""
        valid = self.valid if self.whole is None else self.whole[1]
        return self.valid & (valid.sum(1, keepdim=True) >= 2)
