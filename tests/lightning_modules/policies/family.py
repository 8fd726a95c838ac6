"""A family of flow models as the tests see it: a tiny random pipeline built in code, and how stock diffusers draws."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import CLIPTokenizer, PreTrainedTokenizerFast, T5TokenizerFast

from lightning_modules.policies.flow import Sampling
from lightning_modules.policies.pipeline import PipelinePolicy

PROMPTS = ["a red circle", "two blue squares left of a very large green triangle", "one cross above three circles"]
"""Of different lengths in tokens."""


@dataclass(frozen=True)
class Family:
    """What the proofs of `test_families.py` need to know of a family.

    Args:
        name: of the test cases.
        policy: the adapter.
        build: a tiny pipeline with random weights, every class a stock one (under a second, under 5 MB).
        draw: stock images [B, 3, height, width] in [0, 1], clamped: (pipe, policy, prompts, latents, steps, images).
        sizes: two resolutions (height, width).
        options: arguments of the policy besides model, sampling and size.
        sources: takes source images.
        learning_rates: of full fine-tuning and LoRA for the toy reward.
        parts: of a folder, what stock diffusers cannot load here by itself: name -> part for `from_pretrained`.
    """

    name: str
    policy: type[PipelinePolicy]
    build: Callable[[], DiffusionPipeline]
    draw: Callable[[Any, Any, list[str], Tensor, int, list[Image.Image] | None], Tensor]
    sizes: tuple[tuple[int, int], tuple[int, int]] = ((32, 32), (48, 32))
    options: dict[str, Any] = field(default_factory=dict)
    sources: bool = False
    learning_rates: tuple[float, float] = (1e-3, 1e-2)
    parts: Callable[[Path], dict[str, Any]] = lambda folder: {}

    def save(self, folder: Path) -> Path:
        """The tiny pipeline's folder. Models made from a configuration are in training mode: dropout goes off."""
        torch.manual_seed(1)
        pipe = self.build()
        for part in pipe.components.values():
            if isinstance(part, torch.nn.Module):
                part.eval()
        pipe.save_pretrained(folder)
        return folder

    def load(
        self, folder: Path, sampling: Sampling, size: tuple[int, int] | None = None, **more: Any
    ) -> PipelinePolicy:
        """The adapter on that folder, in fp32."""
        height, width = size or self.sizes[0]
        defaults = {"height": height, "width": width, "dtype": "float32", "learning_rate": 1e-3}
        policy = self.policy(str(folder), sampling, **(defaults | self.options | more))
        policy.load()
        return policy

    def images(self, num: int) -> list[Image.Image] | None:
        """`num` source images of one size and different content, or None for a family without."""
        if not self.sources:
            return None
        height, width = self.sizes[0]
        generator = torch.Generator().manual_seed(5)
        pixels = torch.randint(0, 256, (num, height, width, 3), generator=generator, dtype=torch.uint8)
        return [Image.fromarray(image.numpy()) for image in pixels]


def byte_tokenizer(
    specials: Sequence[str] = (), texts: Sequence[str] = PROMPTS, vocab_size: int = 400, **roles: Any
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer (Qwen's and Gemma's kind) over a few words.

    Args:
        specials: special tokens, first in the vocabulary.
        texts: whose words get tokens.
        vocab_size: at most this many tokens, the 256 bytes among them.
        **roles: `eos_token`, `pad_token`, `chat_template` and so on for the fast tokenizer.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(specials),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, **roles)


def clip_tokenizer(max_length: int = 24) -> CLIPTokenizer:
    """A CLIP tokenizer without merges: a token a letter."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=max_length)


def t5_tokenizer() -> T5TokenizerFast:
    """A T5 tokenizer over the test prompts' words and letters."""
    words = sorted({word for prompt in PROMPTS for word in prompt.split()})
    pieces = ["<pad>", "</s>", "<unk>", *(f"\u2581{word}" for word in words)]
    return T5TokenizerFast(vocab=[(piece, -float(i)) for i, piece in enumerate(pieces)], extra_ids=0)
