"""`ConditionedPolicy`: base class of flow policies whose network is told what to draw by texts, and source images."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from datamodules.chunks import chunks
from lightning_modules.policies.flow import FlowPolicy, Sampling
from lightning_modules.policies.text_cache import TextCache
from lightning_modules.rollout import Conditioning
from rewards.arguments import check_minimum

NEGATIVE = "negative_"
EncodeTexts = Callable[[Sequence[str], Sequence[Image.Image] | None], dict[str, Tensor]]


class ConditionedPolicy(FlowPolicy):
    """Encodes every distinct prompt and source image once, and guides the network by them.

    Families with classifier-free guidance set `guidance_scale` above 1: `velocity` then asks `predict` twice, for the
    prompt and for the negative prompt.

    Args:
        model: pipeline folder or hub id, or a LoRA's folder that names its pipeline.
        sampling: settings of the sampler.
        batch_guidance: runs the two passes of classifier-free guidance as one batch; faster on a GPU that is not full.
        text_cache_gib: GiB of CPU memory in each process for encoded texts, so that prompts that come again (retained
            ones in each step, all in the next epoch or evaluation) are not encoded again, nor with `offload` their
            encoders moved. Texts are then encoded one at a time, so that nothing depends on what is kept; 0 keeps none.
        **kwargs: as for `FlowPolicy`.
    """

    guidance_scale: float = 1.0
    negative_prompt: str = ""

    def __init__(
        self,
        model: str,
        sampling: Sampling,
        batch_guidance: bool = False,
        text_cache_gib: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, sampling, **kwargs)
        check_minimum("model.flow", 0, text_cache_gib=text_cache_gib)
        self.batch_guidance = batch_guidance
        self.texts = TextCache(int(text_cache_gib * 2**30)) if text_cache_gib else None

    # --- what a family implements -----------------------------------------------------------------------------------

    @abstractmethod
    def encode_texts(self, texts: Sequence[str], images: Sequence[Image.Image] | None = None) -> dict[str, Tensor]:
        """Encodes D texts into conditioning tensors: name -> [D, ...], names of the adapter's choice.

        A tensor whose second dimension depends on the texts' lengths needs a mask beside it: rows of other calls are
        padded with zeros on the right.

        Args:
            texts: D texts.
            images: D source images where the family's text encoder sees them, else None.
        """

    def encode_negatives(self, texts: Sequence[str], images: Sequence[Image.Image] | None = None) -> dict[str, Tensor]:
        """Encodes the negative prompt, like `encode_texts`; some pipelines word it differently."""
        return self.encode_texts(texts, images)

    @abstractmethod
    def predict(self, latents: Tensor, sigma: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
        """Runs one pass of `self.active`; returns the velocity (noise minus image), [B, ...].

        Args:
            latents: [B, ...] fp32.
            sigma: scalar, share of noise.
            conditioning: name -> [B, ...], the tensors of `encode_texts` (and `encode_sources`).
        """

    def encode_sources(self, images: Sequence[Image.Image]) -> dict[str, Tensor]:
        """Encodes S source images into conditioning tensors: name -> [S, ...]."""
        raise ValueError(f"{type(self).__name__} draws from text alone; take an editing model for source images.")

    @property
    def edits(self) -> bool:
        """True if the family can start from a source image."""
        return type(self).encode_sources is not ConditionedPolicy.encode_sources

    def guide(self, positive: Tensor, negative: Tensor) -> Tensor:
        """Combines two fp32 velocities [B, ...] by classifier-free guidance (arXiv 2207.12598)."""
        return negative + self.guidance_scale * (positive - negative)

    def encoding(self) -> AbstractContextManager[None]:
        """Context manager: the networks that `encode_texts` needs are on the policy's device."""
        return nullcontext()

    # --- what all families share ----------------------------------------------------------------------------------

    @property
    def guided(self) -> bool:
        """True if each velocity takes two passes (classifier-free guidance)."""
        return self.guidance_scale > 1

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], images: Sequence[Image.Image] | None = None) -> Conditioning:
        """Encodes every distinct prompt, and every distinct source image, once."""
        assert images is None or len(images) == len(prompts)
        # Sources are told apart by object, which the samples of a group share, not by pixels.
        source_of = [0] * len(prompts) if images is None else [id(image) for image in images]
        sources = list(dict.fromkeys(source_of))
        source_index = [sources.index(source) for source in source_of]
        pairs = list(dict.fromkeys(zip(prompts, source_index, strict=True)))
        place = {pair: row for row, pair in enumerate(pairs)}
        index = [place[pair] for pair in zip(prompts, source_index, strict=True)]
        distinct = None if images is None else [images[source_index.index(row)] for row in range(len(sources))]

        tensors, own_index = self._encode_distinct(pairs, distinct, source_index)
        device = self.device
        return Conditioning(
            {name: self.placed(value) for name, value in tensors.items()},
            torch.tensor(index, device=device),
            {name: torch.tensor(rows, device=device) for name, rows in own_index.items()},
        )

    def _encode_distinct(
        self, pairs: Sequence[tuple[str, int]], distinct: Sequence[Image.Image] | None, source_index: list[int]
    ) -> tuple[dict[str, Tensor], dict[str, list[int]]]:
        """Encodes distinct texts and sources; also returns the samples' rows in tensors that do not go by prompt.

        Args:
            pairs: D texts, each with the number of its source image (0 without).
            distinct: S source images, or None.
            source_index: [B] numbers of the samples' source images (zeros without).
        """
        asked: dict[str, tuple[EncodeTexts, Sequence[tuple[str, int]]]] = {"": (self.encode_texts, pairs)}
        if self.guided:
            # The negative prompt is the same for all; a text encoder that sees the source makes one per source.
            negatives = [(self.negative_prompt, source) for source in range(max(source_index) + 1)]
            asked[NEGATIVE] = (self.encode_negatives, negatives)
        keys: dict[str, list[Hashable]] = {}
        if self.texts is not None:
            seen = [None] if distinct is None else [_digest(image) for image in distinct]
            # Evaluations may run in another precision than training.
            autocast = torch.is_autocast_enabled(self.device.type) and torch.get_autocast_dtype(self.device.type)
            keys = {
                kind: [(kind, text, seen[source], autocast) for text, source in texts]
                for kind, (_, texts) in asked.items()
            }
        known = self.texts is not None and all(key in self.texts for some in keys.values() for key in some)
        tensors: dict[str, Tensor] = {}
        with nullcontext() if known else self.encoding():
            for kind, (encode, texts) in asked.items():
                encoded = self._encode_texts(encode, texts, distinct, keys.get(kind))
                tensors |= {kind + name: value for name, value in encoded.items()}
        own_index = {name: source_index for name in tensors if name.startswith(NEGATIVE)}
        if distinct is not None:
            with self.decoding():
                encoded = self.encode_sources(distinct)
            tensors |= encoded
            own_index |= dict.fromkeys(encoded, source_index)
        return tensors, own_index

    def placed(self, value: Tensor) -> Tensor:
        """Moves a tensor to the network's device and, where the frozen parts compute in another dtype, to its dtype."""
        other = value.is_floating_point() and self.frozen_dtype != self.dtype
        return value.to(self.device, self.dtype if other else value.dtype)

    def velocity(self, latents: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """Returns the velocity [B, ...] fp32, with classifier-free guidance where the family uses it."""
        tensors = {name: conditioning[name] for name in conditioning.tensors}
        negative = {name[len(NEGATIVE) :]: tensors.pop(name) for name in list(tensors) if name.startswith(NEGATIVE)}
        if not self.guided:
            return self.predict(latents, sigma, tensors).float()
        negative = tensors | negative  # a source's tensors condition both passes
        if self.batch_guidance:
            joined = {name: torch.cat(same_length([tensors[name], negative[name]])) for name in tensors}
            both = self.predict(torch.cat([latents, latents]), sigma, joined).float()
            return self.guide(*both.chunk(2))
        positive = self.predict(latents, sigma, tensors).float()
        return self.guide(positive, self.predict(latents, sigma, negative).float())

    def _encode_texts(
        self,
        encode: EncodeTexts,
        pairs: Sequence[tuple[str, int]],
        distinct: Sequence[Image.Image] | None,
        keys: Sequence[Hashable] | None,
    ) -> dict[str, Tensor]:
        def encode_rows(rows: slice) -> dict[str, Tensor]:
            images = None if distinct is None else [distinct[source] for _, source in pairs[rows]]
            return encode([text for text, _ in pairs[rows]], images)

        if self.texts is None or keys is None:
            parts = [encode_rows(rows) for rows in chunks(len(pairs), self.micro_batch_size)]
        else:
            # One text a call: it is rounded alike whatever else is encoded or kept, in resumed runs for one.
            parts = [self.texts(key, partial(encode_rows, slice(row, row + 1))) for row, key in enumerate(keys)]
        return {name: torch.cat(same_length([part[name] for part in parts])) for name in parts[0]}


def _digest(image: Image.Image) -> tuple[object, ...]:
    return image.mode, image.size, hashlib.blake2b(image.tobytes()).digest()


def same_length(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Pads tensors [b, L, ...] with zeros on the right to the longest L."""
    if tensors[0].ndim < 2:
        return list(tensors)
    longest = max(tensor.shape[1] for tensor in tensors)
    return [F.pad(t, (0, 0) * (t.ndim - 2) + (0, longest - t.shape[1])) for t in tensors]
