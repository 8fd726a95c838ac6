"""`VisionLanguagePolicy`: a refiner that also sees the source image of an edit (Qwen2.5-VL and Qwen3-VL)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from torch import Tensor
from torch.nn import functional as F
from transformers import Qwen2VLImageProcessorPil

from datamodules.base import PromptSample
from datamodules.jsonl import read_json
from lightning_modules.policies.language import LanguagePolicy
from lightning_modules.policies.templates import fill
from lightning_modules.rollout import SeenImages
from rewards.pretrained import load_processor, one_line_errors

EDITING = """Rewrite the following instruction for an image editor that gets it with this image. Keep everything that \
it asks for, say which part of the image is meant and what stays as it is, and add concrete visual detail that helps.
Instruction: {prompt}
Give only the rewritten instruction, inside <answer> </answer>."""

MODEL_TYPES = ("qwen2_5_vl", "qwen3_vl")


class VisionLanguagePolicy(LanguagePolicy):
    """Rewrites editing instructions with their source image in view; a sample without an image is read as text.

    The vision tower is frozen in full fine-tuning too. It looks at every image once per rollout, and all completions
    of a sample, replays and the reference read what it saw.

    Args:
        model: folder or hub id of a Qwen2.5-VL or Qwen3-VL.
        template: the user's message beside the image, with `{prompt}` where the instruction goes.
        max_pixels: larger images are scaled down to this area before the vision tower (256 x 28 x 28 are 256 tokens of
            Qwen2.5-VL).
        see_source: false hides the images, to measure how much the refiner owes to them.
        **kwargs: as for `LanguagePolicy`.
    """

    def __init__(
        self,
        model: str,
        template: str = EDITING,
        max_pixels: int = 200_704,
        see_source: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, template, **kwargs)
        if max_pixels < 32 * 32:
            raise ValueError(f"`language.max_pixels` is {max_pixels}, less than one token; use 1024 or more.")
        self.max_pixels = max_pixels
        self.see_source = see_source
        self.processor: Any = None
        self.image_token = ""

    def _check_chat(self, config: Any) -> None:
        if config.model_type not in MODEL_TYPES:
            raise ValueError(
                f"{self.model} is a {config.model_type}, which VisionLanguagePolicy cannot show images to; use one of "
                f"{', '.join(MODEL_TYPES)}, or LanguagePolicy for text alone."
            )
        self.processor = load_processor(Qwen2VLImageProcessorPil, self.model)
        self.image_token = self.tokenizer.convert_ids_to_tokens(config.image_token_id)
        # The template that knows images is the processor's; the tokenizer's own may know text alone.
        self.tokenizer.chat_template = _processor_template(self.model) or self.tokenizer.chat_template
        super()._check_chat(config)
        found = self._chat(_content("", image=True)).count(self.image_token)
        if found != 1:
            raise ValueError(
                f"the chat template of {self.model} puts {found} images into a message with one; use a folder that "
                "holds the processor's chat_template file."
            )

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes the policy, its image processor, and the chat template that knows images."""
        super().save_pretrained(directory)
        self.processor.save_pretrained(directory)

    def _encode(self, samples: Sequence[PromptSample]) -> tuple[Tensor, Tensor, SeenImages | None]:
        if not self.see_source:
            samples = [replace(sample, image=None) for sample in samples]
        images = [sample.image.convert("RGB") for sample in samples if sample.image is not None]
        prompts = [fill(self.template, sample.asked).replace(self.image_token, "") for sample in samples]
        chats = [
            self._chat(_content(prompt, image=sample.image is not None))
            for prompt, sample in zip(prompts, samples, strict=True)
        ]
        if not images:
            return *self._tokenize(chats), None
        features, grid = self._look(images)
        shown = iter(features)
        parts = [features[0][:0] if sample.image is None else next(shown) for sample in samples]
        pairs = zip(chats, parts, strict=True)
        texts = [chat.replace(self.image_token, self.image_token * len(part)) for chat, part in pairs]
        ids, attention = self._tokenize(texts)
        mask = ids == self.causal_lm.config.image_token_id
        positions, _ = self.causal_lm.base_model.get_rope_index(
            ids, mm_token_type_ids=mask.int(), image_grid_thw=grid, attention_mask=attention
        )
        return ids, attention, SeenImages(tuple(parts), tuple(range(len(parts))), mask, positions.transpose(0, 1))

    def _look(self, images: Sequence[Any]) -> tuple[list[Tensor], Tensor]:
        """Computes features [tokens, 1 + layers, hidden] of D images, and their grids of patches [D, 3]."""
        size = {"shortest_edge": min(self.processor.size["shortest_edge"], self.max_pixels)}
        pixels = self.processor(list(images), size=size | {"longest_edge": self.max_pixels}, return_tensors="pt")
        grid: Tensor = pixels["image_grid_thw"].to(self.device)
        output = self.causal_lm.base_model.get_image_features(pixels["pixel_values"].to(self.device), grid)
        layers = [output.pooler_output, *(getattr(output, "deepstack_features", None) or [])]
        features = torch.stack([torch.cat(layer) for layer in layers], 1)
        return list(features.split([len(image) for image in output.pooler_output])), grid

    def _hidden(self, ids: Tensor, attention: Tensor, seen: SeenImages | None, **kwargs: Any) -> Tensor:
        if seen is None:
            return super()._hidden(ids, attention, seen, **kwargs)
        # Not by the model's own forward pass, which would look for an image at every image token: a completion may
        # hold one as well, drawn by chance, and there it is a token like any other.
        decoder = self.causal_lm.get_decoder()
        mask = F.pad(seen.mask, (0, ids.shape[1] - seen.mask.shape[1]))
        features = torch.cat([seen.features[image] for image in seen.index])
        embeds = decoder.get_input_embeddings()(ids)
        embeds = embeds.masked_scatter(mask[..., None], features[:, 0].to(embeds.dtype))
        if features.shape[1] > 1:
            kwargs |= {"visual_pos_masks": mask, "deepstack_visual_embeds": list(features[:, 1:].unbind(1))}
        positions = self._positions(attention, seen)
        output = decoder(inputs_embeds=embeds, attention_mask=attention, position_ids=positions, **kwargs)
        hidden: Tensor = output.last_hidden_state
        return hidden

    def _positions(self, attention: Tensor, seen: SeenImages | None) -> Tensor:
        """Positions [3, B, L] in time, height and width; text after an image goes on behind its longer side."""
        if seen is None:
            return super()._positions(attention, seen)
        length = attention.shape[1]
        written = torch.arange(1, 1 + max(0, length - seen.mask.shape[1]), device=attention.device)
        positions = torch.cat([seen.positions, seen.positions[..., -1:] + written], 2)
        return positions[..., :length].transpose(0, 1)


def _content(prompt: str, *, image: bool) -> list[dict[str, str]]:
    return [{"type": "image"}] * image + [{"type": "text", "text": prompt}]


def _processor_template(model: str) -> str | None:
    """Reads the chat template of a model's processor, which older folders keep apart from the tokenizer's."""
    path = Path(model) / "chat_template.json"
    if not Path(model).is_dir():
        with one_line_errors(model):
            try:
                path = Path(hf_hub_download(model, path.name))
            except EntryNotFoundError:
                return None
    return str(read_json(path)["chat_template"]) if path.is_file() else None
