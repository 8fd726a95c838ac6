"""Record of a prompt; this module imports nothing heavy, so that a reward server can do without Lightning."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class PromptSample:
    """A prompt as the user wrote it, with everything that models and rewards need to know about it.

    Args:
        id: unique within its file; names images and rows of results.
        prompt: the text as the user wrote it. Rewards see this one, never a rewrite.
        tag: category of the prompt (GenEval's six, or the name of the reward in tagged data).
        metadata: data that the reward needs, such as GenEval's `include`, OCR's target text.
        image: the source image of an editing prompt.
        wording: text that the models get in place of `prompt`: a paraphrase, to probe how robust they are.
        repeats: number of times that its evaluation file lists the prompt.
    """

    id: str
    prompt: str
    tag: str
    metadata: dict[str, Any]
    image: Image | None = None
    wording: str | None = None
    repeats: int = 1

    @property
    def asked(self) -> str:
        """The text that the models get: `wording` if there is one, else `prompt`."""
        return self.prompt if self.wording is None else self.wording

    @property
    def content(self) -> str:
        """Digest of prompt, tag, metadata and source image: equal for samples that are the same prompt."""
        asked = json.dumps([self.prompt, self.tag, self.metadata], sort_keys=True, default=repr)
        image = b"" if self.image is None else repr((self.image.mode, self.image.size)).encode() + self.image.tobytes()
        return hashlib.blake2b(asked.encode() + image, digest_size=8).hexdigest()
