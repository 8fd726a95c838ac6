"""The prompt record. Imports nothing heavy, so that a reward server can do without Lightning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class PromptSample:
    """One original prompt.

    Args:
        id: unique within its file; names images and rows of results.
        prompt: the text as the user wrote it. Rewards see this one, never a rewrite.
        tag: category of the prompt (GenEval's six, or the name of the reward in tagged data).
        metadata: what the reward needs: GenEval's `include`, OCR's target text.
        image: the source image of an editing prompt.
        wording: what the models are given in place of `prompt`: a paraphrase whose robustness is probed.
    """

    id: str
    prompt: str
    tag: str
    metadata: dict[str, Any]
    image: Image | None = None
    wording: str | None = None

    @property
    def asked(self) -> str:
        """What the models are given."""
        return self.prompt if self.wording is None else self.wording
