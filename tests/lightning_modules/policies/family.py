"""`Family`: a family of flow models to the tests, with a tiny random pipeline and how stock diffusers draws; `Red`."""

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
from transformers import (
    CLIPTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen3Config,
    T5TokenizerFast,
)

from lightning_modules.policies.flow import FlowPolicy, Sampling
from lightning_modules.policies.pipeline import PipelinePolicy
from lightning_modules.rollout import Trajectory
from rewards.base import Reward, RewardBatch, Score

PROMPTS = ["a red circle", "two blue squares left of a very large green triangle", "one cross above three circles"]
"""Prompts of different lengths in tokens."""


@dataclass(frozen=True)
class Family:
    """A family of flow models, as the tests of `test_families.py` use it.

    Args:
        name: name of the test cases.
        policy: the adapter.
        build: makes a tiny pipeline with random weights, every class a stock one (under a second, under 5 MB).
        draw: (pipe, policy, prompts, latents, steps, images) -> stock images [B, 3, height, width] in [0, 1], clamped.
        sizes: two resolutions (height, width).
        options: arguments of the policy besides model, sampling and size.
        sources: True if it takes source images.
        learning_rate: learning rate of LoRA for the toy reward.
        parts: folder -> parts for `from_pretrained` that stock diffusers cannot load here by itself.
    """

    name: str
    policy: type[PipelinePolicy]
    build: Callable[[], DiffusionPipeline]
    draw: Callable[[Any, Any, list[str], Tensor, int, list[Image.Image] | None], Tensor]
    sizes: tuple[tuple[int, int], tuple[int, int]] = ((32, 32), (48, 32))
    options: dict[str, Any] = field(default_factory=dict)
    sources: bool = False
    learning_rate: float = 1e-2
    parts: Callable[[Path], dict[str, Any]] = lambda folder: {}

    def save(self, folder: Path) -> Path:
        """Saves the tiny pipeline, without the training mode (dropout) of models made from a configuration."""
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
        """Loads the adapter on a saved folder, in fp32."""
        height, width = size or self.sizes[0]
        defaults = {"height": height, "width": width, "dtype": "float32", "learning_rate": 1e-3}
        policy = self.policy(str(folder), sampling, **(defaults | self.options | more))
        policy.load()
        return policy

    def images(self, num: int) -> list[Image.Image] | None:
        """Makes `num` source images of one size and different content; None for a family without sources."""
        if not self.sources:
            return None
        height, width = self.sizes[0]
        generator = torch.Generator().manual_seed(5)
        pixels = torch.randint(0, 256, (num, height, width, 3), generator=generator, dtype=torch.uint8)
        return [Image.fromarray(image.numpy()) for image in pixels]


def draw_stock(
    pipe: Any, policy: Any, prompts: str | list[str], latents: Tensor, steps: int, **arguments: Any
) -> Tensor:
    """Draws images [B, 3, height, width] in [0, 1] with a stock pipeline; `arguments` are the family's own."""
    drawn: Tensor = pipe(
        prompt=prompts,
        latents=latents,
        num_inference_steps=steps,
        height=policy.height,
        width=policy.width,
        output_type="pt",
        **arguments,
    ).images
    return drawn


def guided_arguments(policy: Any) -> dict[str, Any]:
    """Arguments of most pipelines with classifier-free guidance."""
    return {name: getattr(policy, name) for name in ("negative_prompt", "guidance_scale", "max_sequence_length")}


def assert_ratio_is_one(policy: FlowPolicy, trajectory: Trajectory) -> None:
    """Asserts that replayed log-probs have a gradient and are the sampled ones bit for bit."""
    for step in range(len(trajectory.sde_steps)):
        transition = policy.replay(trajectory, step)
        assert transition.mean.requires_grad
        assert torch.equal(transition.log_prob(trajectory.next_latents[:, step]), trajectory.log_probs[:, step])


def byte_tokenizer(
    specials: Sequence[str] = (), texts: Sequence[str] = PROMPTS, vocab_size: int = 400, **roles: Any
) -> PreTrainedTokenizerFast:
    """Makes a byte-level BPE tokenizer (Qwen's and Gemma's kind) over a few words.

    Args:
        specials: special tokens, first in the vocabulary.
        texts: texts whose words get tokens.
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


def chat_tokenizer(chat_template: str) -> PreTrainedTokenizerFast:
    """Makes a byte-level tokenizer with Qwen3's special tokens."""
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    return byte_tokenizer(specials, pad_token="<|endoftext|>", eos_token="<|im_end|>", chat_template=chat_template)


def qwen3_config(tokenizer: PreTrainedTokenizerFast) -> Qwen3Config:
    """Makes the configuration of a tiny Qwen3 of three layers, 32 wide."""
    return Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=128,
    )


def qwen2_5_vl_config(tokenizer: PreTrainedTokenizerBase, **text: Any) -> Qwen2_5_VLConfig:
    """Makes the configuration of a tiny Qwen2.5-VL of two layers, 32 wide.

    Args:
        tokenizer: has tokens of its own for images; its length is the vocabulary's size unless `text` says otherwise.
        text: further settings of the language model.
    """
    shared = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    language = shared | {"vocab_size": len(tokenizer), "num_key_value_heads": 2, "rope_parameters": rope}
    vision = {"depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 32}
    names = {"image": "image_pad", "video": "video_pad", "vision_start": "vision_start", "vision_end": "vision_end"}
    known = tokenizer.get_vocab()
    return Qwen2_5_VLConfig(
        text_config=language | {"initializer_range": 0.25} | text,
        vision_config=vision | {"fullatt_block_indexes": [1], "initializer_range": 0.25},
        **{f"{key}_token_id": known[f"<|{name}|>"] for key, name in names.items() if f"<|{name}|>" in known},
    )


def clip_tokenizer(max_length: int = 24) -> CLIPTokenizer:
    """Makes a CLIP tokenizer without merges: a token a letter."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=max_length)


def t5_tokenizer() -> T5TokenizerFast:
    """Makes a T5 tokenizer over the test prompts' words."""
    words = sorted({word for prompt in PROMPTS for word in prompt.split()})
    pieces = ["<pad>", "</s>", "<unk>", *(f"\u2581{word}" for word in words)]
    return T5TokenizerFast(vocab=[(piece, -float(i)) for i, piece in enumerate(pieces)], extra_ids=0)


class Red(Reward):
    """Mean of the red channel, 0..1."""

    name = "red"

    def __call__(self, batch: RewardBatch) -> list[Score]:
        values = [torch.frombuffer(bytearray(i.tobytes()), dtype=torch.uint8)[::3] for i in batch.images]
        return [Score(v, v, v) for v in (float(value.float().mean()) / 255 for value in values)]
