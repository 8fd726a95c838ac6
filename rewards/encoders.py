"""Image encoders, and the similarity scores of the images of one prompt; see also `rewards.clip.ClipEncoder`."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from statistics import fmean
from typing import Protocol, runtime_checkable

import torch
from PIL.Image import Image
from torch import Tensor
from torch.nn.functional import normalize

from datamodules.chunks import chunks
from datamodules.sample import PromptSample
from rewards.base import Reward, RewardBatch
from rewards.calls import score_each


class Encoder(Protocol):
    """Protocol of image encoders: the cosine of two embeddings says how alike the images are."""

    @property
    def version(self) -> str:
        """Names what similarities depend on (model, settings): those of different versions are not comparable."""
        ...

    def load(self) -> None:
        """Loads the model now rather than on first use; later calls do nothing."""
        ...

    def images(self, images: Sequence[Image]) -> Tensor:
        """Embeds B images as [B, D] rows of length 1; an image with nothing to compare may be zeros."""
        ...


@runtime_checkable
class TextEncoder(Encoder, Protocol):
    """Protocol of encoders that embed texts beside images, so that a cosine of the two says how well they fit."""

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Embeds B texts as [B, D] rows of length 1."""
        ...


@runtime_checkable
class ContentEncoder(Encoder, Protocol):
    """Protocol of encoders that can also tell which images have the same content."""

    def contents(self, images: Sequence[Image]) -> list[Hashable]:
        """Returns the contents of B images as hashable values; equal values mean the same content."""
        ...


def image_similarity(embeddings: Tensor) -> Tensor:
    """Computes the mean cosine of two different images of a group (the paper's II-Sim for one prompt).

    Args:
        embeddings: [..., K, D] rows of length 1 (or 0), K >= 2 images a group.

    Returns:
        [...] float64, -1/(K - 1)..1.

    >>> image_similarity(torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])).item()  # pairs: 1, 0, 0
    0.3333333333333333
    """
    embeddings = embeddings.double()
    cosines, num = embeddings @ embeddings.mT, embeddings.shape[-2]
    # The diagonal itself and not K: an embedding of zeros has cosine 0 with itself, too.
    others = cosines.sum((-2, -1)) - cosines.diagonal(dim1=-2, dim2=-1).sum(-1)
    return others / (num * (num - 1))


def text_similarity(embeddings: Tensor, texts: Tensor) -> Tensor:
    """Computes the mean cosine of a group's images with their text (the paper's TI-Sim for one prompt).

    Args:
        embeddings: [..., K, D] images.
        texts: [..., D] each group's text.

    Returns:
        [...] float64, -1..1.
    """
    return (embeddings.double() @ texts.double()[..., None]).mean((-2, -1))


def group_columns(encoder: Encoder, reward: Reward | None) -> list[str]:
    """Returns the names of the scores that `group_scores` gives."""
    columns = ["image_similarity"]
    columns += ["text_similarity"] if isinstance(encoder, TextEncoder) else []
    columns += ["distinct_contents"] if isinstance(encoder, ContentEncoder) else []
    return columns if reward is None else [*columns, reward.name]


def group_scores(
    encoder: Encoder, reward: Reward | None, samples: Sequence[PromptSample], images: Sequence[Sequence[Image]]
) -> list[dict[str, float]]:
    """Scores the K images of each of B prompts as a group: their similarity and, if asked, their mean reward.

    Args:
        encoder: compares the images with one another and, if it can, with the original prompt.
        reward: if given, the mean table value of the images that it can score is added under its name.
        samples: B original prompts.
        images: K lists of B.

    Returns:
        B dictionaries, name of the score -> value; scores that are not finite are left out.
    """
    num = len(images)
    flat = [drawn[row] for row in range(len(samples)) for drawn in images]
    groups = list(chunks(len(flat), num))
    embeddings = encoder.images(flat).cpu()
    if embeddings.shape[:-1] != (len(flat),):
        raise ValueError(
            f"{type(encoder).__name__}.images returned {list(embeddings.shape)} for {len(flat)} images: it must return "
            "one row for each."
        )
    embeddings = embeddings.reshape(len(samples), num, -1)
    values: dict[str, list[float]] = {"image_similarity": image_similarity(embeddings).tolist()}
    if isinstance(encoder, TextEncoder):
        texts = encoder.texts([sample.prompt for sample in samples]).cpu()
        values["text_similarity"] = text_similarity(embeddings, texts).tolist()
    if isinstance(encoder, ContentEncoder):
        shown = encoder.contents(flat)
        values["distinct_contents"] = [float(len(set(shown[rows]))) for rows in groups]
    if reward is not None:
        scores = score_each(reward, RewardBatch([sample for sample in samples for _ in range(num)], flat))
        tables = [[score.table for score in scores[rows] if score.valid] for rows in groups]
        values[reward.name] = [fmean(table) if table else math.nan for table in tables]
    return [{name: v[row] for name, v in values.items() if math.isfinite(v[row])} for row in range(len(samples))]


class PixelEncoder:
    """Encoder without weights: an image's 32 x 32 pixels less their mean, which hold its layout and colours.

    The training log's `group/image_similarity` uses it. The embedding of an image of one grey is zeros.
    """

    version = "32 x 32 pixels"

    def load(self) -> None:
        """Does nothing: there are no weights."""

    def images(self, images: Sequence[Image]) -> Tensor:
        """Embeds B images as [B, 3072] fp32 rows of length 1 (or 0)."""
        small = [bytearray(image.convert("RGB").resize((32, 32)).tobytes()) for image in images]
        flat = torch.stack([torch.frombuffer(pixels, dtype=torch.uint8) for pixels in small]).double()
        return normalize(flat - flat.mean(-1, keepdim=True), dim=-1).float()
