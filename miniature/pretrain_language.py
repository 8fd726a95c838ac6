"""Lightning modules that train the miniature's refiners: a small Qwen3, and a small Qwen2.5-VL that sees the image."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from miniature.architectures import build_language, build_vision_language, carry_over_words
from miniature.edits.wording import edit_vocabulary
from miniature.pretrain import Pretraining
from miniature.scenes.wording import vocabulary
from miniature.signs.world import words_vocabulary


class LanguagePretraining(Pretraining):
    """Supervised fine-tuning of a small Qwen3 on prompt-rewrite pairs, through its own chat template.

    Args:
        output: folder to write.
        learning_rate: peak learning rate.
        signs: true adds the words of signs to the vocabulary of scenes.
        init: folder of a refiner to start from, the embeddings of the words that it has included; null is random
            weights.
    """

    def __init__(
        self,
        output: str = "miniature/language",
        learning_rate: float = 3e-3,
        signs: bool = False,
        init: str | None = None,
    ) -> None:
        super().__init__(output, learning_rate)
        self.signs = signs
        self.init = init
        self.model: Any

    def configure_model(self) -> None:
        """Builds the model and its tokenizer."""
        if hasattr(self, "model"):
            return
        self.model, self.tokenizer = build_language(words_vocabulary() if self.signs else vocabulary())
        if self.init is not None:
            old, words = AutoModelForCausalLM.from_pretrained(self.init), AutoTokenizer.from_pretrained(self.init)
            carry_over_words(old, words.get_vocab(), self.model, self.tokenizer.get_vocab())
        self.model.train()

    def training_step(self, batch: dict[str, list[str]], batch_idx: int) -> Tensor:
        """Returns the cross-entropy of the completion's tokens, given the prompt."""
        encoded = self._encode([self._head(prompt) for prompt in batch["prompts"]], batch["completions"])
        loss: Tensor = self.model(**encoded).loss
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def _head(self, content: Any) -> str:
        """Renders the chat up to where the completion begins."""
        chat = [{"role": "user", "content": content}]
        return str(self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))

    def _encode(self, heads: list[str], completions: list[str]) -> dict[str, Tensor]:
        texts = [f"{head}{completion} <end>" for head, completion in zip(heads, completions, strict=True)]
        encoded = self.tokenizer(texts, padding=True, padding_side="right", return_tensors="pt").to(self.device)
        ids, attention = encoded["input_ids"], encoded["attention_mask"]
        lengths = torch.tensor([len(head) for head in self.tokenizer(heads)["input_ids"]], device=self.device)
        columns = torch.arange(ids.shape[1], device=self.device)
        labels = ids.masked_fill((columns < lengths[:, None]) | (attention == 0), -100)
        return {"input_ids": ids, "attention_mask": attention, "labels": labels}

    def on_train_end(self) -> None:
        """Saves model and tokenizer."""
        self.model.save_pretrained(self.output)
        self.tokenizer.save_pretrained(self.output)


class VisionLanguagePretraining(LanguagePretraining):
    """Supervised fine-tuning of a small Qwen2.5-VL, vision tower included, on images, instructions and rewrites."""

    def __init__(self, output: str = "miniature/edit_language", learning_rate: float = 3e-3) -> None:
        super().__init__(output, learning_rate)
        self.processor: Any = None

    def configure_model(self) -> None:
        """Builds the model, its tokenizer and its image processor."""
        if hasattr(self, "model"):
            return
        self.model, self.tokenizer, self.processor = build_vision_language(edit_vocabulary())
        self.model.train()

    def training_step(self, batch: dict[str, list[Any]], batch_idx: int) -> Tensor:
        """Returns the cross-entropy of the completion's tokens, given the image and the prompt.

        Args:
            batch: B `prompts`, `completions` and `images` (of one size, or None where the refiner is to see none).
            batch_idx: unused.
        """
        pixels = self.processor([image for image in batch["images"] if image is not None], return_tensors="pt")
        tokens = int(pixels["image_grid_thw"][0].prod()) // self.processor.merge_size**2
        heads = [
            self._head([{"type": "image"}] * (image is not None) + [{"type": "text", "text": prompt}])
            for image, prompt in zip(batch["images"], batch["prompts"], strict=True)
        ]
        encoded = self._encode([head.replace("<image>", "<image>" * tokens) for head in heads], batch["completions"])
        kinds = (encoded["input_ids"] == self.model.config.image_token_id).int()
        loss: Tensor = self.model(**encoded, mm_token_type_ids=kinds, **pixels.to(self.device)).loss
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def on_train_end(self) -> None:
        """Saves model, tokenizer and image processor."""
        super().on_train_end()
        self.processor.save_pretrained(self.output)
