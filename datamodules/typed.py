"""Data module of prompts that were typed, not read from a file, with the source images that they edit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL.Image import Image

from datamodules.base import PromptDataModule, PromptSample
from datamodules.editing.images import ImageRules, read_image


class TypedPrompts(PromptDataModule):
    """Prompts for `lightning predict`; they get the ids, and so the noise, of the lines of a `predict_file`.

    Args:
        prompts: texts as they were typed; equal ones are drawn each with noise of its own.
        images: paths of the source images that editing models start from: none, one for all prompts, or one each.
        first: number of the first prompt, which keys its noise; the others count on from it.
        **kwargs: as for `PromptDataModule`.

    Raises:
        ValueError: if the numbers do not match, or an image cannot be read.
    """

    def __init__(self, prompts: Sequence[str], images: Sequence[str] = (), first: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if len(images) not in (0, 1, len(prompts)):
            raise ValueError(
                f"`--image` is given {len(images)} times and `--prompt` {len(prompts)} times: give one image for all "
                "prompts, or one for each."
            )
        sources: list[Image | None] = [_source(name) for name in images] or [None]
        if len({image.size for image in sources if image is not None}) > 1:
            self.eval_batch_size = 1  # sources of one batch have one size
        if len(sources) == 1:
            sources *= len(prompts)
        self._samples = [
            PromptSample(f"{number:05d}", prompt, "text", {}, source)
            for number, (prompt, source) in enumerate(zip(prompts, sources, strict=True), start=first)
        ]

    def train_samples(self) -> list[PromptSample]:
        """Returns no prompts: nothing is trained."""
        return []

    def eval_samples(self) -> dict[str, list[PromptSample]]:
        """Returns the prompts as the set `prompts`."""
        return {"prompts": self._samples}


def _source(name: str) -> Image:
    try:
        return read_image(Path(name), ImageRules())
    except ValueError as error:
        raise ValueError(f"`--image` {name} {error}: give the path of an image file.") from None
