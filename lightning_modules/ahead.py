"""`RewritesAhead`: rewrites of the next step's prompts, written while the last images of a step are being scored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from datamodules.resumable import ResumableLoader
from datamodules.sample import PromptSample
from lightning_modules.policies.language import LanguagePolicy
from lightning_modules.rollout import Completions


class RewritesAhead:
    """Keeps the rewrites of one batch, which the refiner wrote before its last update, until that batch comes."""

    def __init__(self) -> None:
        self._kept: tuple[list[str], Completions] | None = None

    def write(
        self, language: LanguagePolicy, loader: Any, samples: Sequence[PromptSample], num: int, seed: int
    ) -> None:
        """Writes `num` rewrites of each prompt of the next batch; nothing where the loader's epoch ends.

        Args:
            language: the refiner.
            loader: the training's loader; one that cannot tell the next batch is left alone.
            samples: prompts of this step.
            num: rewrites of each prompt.
            seed: seed of the draws, which leave the global generators as they are.
        """
        found = loader.batch_after(samples) if isinstance(loader, ResumableLoader) else []
        if not found:
            return
        with torch.random.fork_rng([language.device] if language.device.type == "cuda" else []):
            torch.manual_seed(seed)
            with language.gathered():
                self._kept = [sample.id for sample in found], language.refine(found, num)

    def take(self, samples: Sequence[PromptSample]) -> Completions | None:
        """Returns the rewrites of these prompts if they were written ahead, once; others are forgotten."""
        kept, self._kept = self._kept, None
        return kept[1] if kept is not None and kept[0] == [sample.id for sample in samples] else None
