"""A CLIP folder with random weights, a letter tokenizer and a processor in the form of the hub's older files."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from transformers import CLIPConfig, CLIPModel

from datamodules.sample import PromptSample
from rewards.base import RewardBatch

SIZE = 28
MERGES = ("c a", "ca t</w>")
LETTERS = list(string.ascii_lowercase + string.digits + ",.'")
TOKENS = [*LETTERS, *(letter + "</w>" for letter in LETTERS), "ca", "cat</w>", "<|startoftext|>", "<|endoftext|>"]
VOCAB = {token: index for index, token in enumerate(TOKENS)}
START, END = VOCAB["<|startoftext|>"], VOCAB["<|endoftext|>"]


def config(**text: Any) -> CLIPConfig:
    """Two layers a tower; spread-out weights, so that other inputs give clearly other cosines."""
    tower: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 4, "initializer_factor": 3.0}
    tokens = {"vocab_size": len(VOCAB), "bos_token_id": START, "eos_token_id": END, "pad_token_id": END}
    return CLIPConfig(
        text_config=tower | tokens | {"hidden_size": 32, "intermediate_size": 64} | text,
        vision_config=tower | {"hidden_size": 48, "intermediate_size": 96, "image_size": SIZE, "patch_size": 14},
        projection_dim=24,
    )


def save_model(folder: Path, logit_scale: float = 60.0, seed: int = 0, **text: Any) -> CLIPModel:
    """Random weights in `folder`, by `seed`."""
    torch.manual_seed(seed)
    model = CLIPModel(config(**text)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.2)
        model.logit_scale.fill_(np.log(logit_scale))
    model.save_pretrained(folder)
    return model


def save_processor(folder: Path, vocab: dict[str, int] = VOCAB) -> None:
    """vocab.json, merges.txt and a preprocessor_config.json with plain numbers for sizes."""
    folder.mkdir(exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("\n".join(("#version: 0.2", *MERGES)) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer"}))
    settings = {"feature_extractor_type": "CLIPFeatureExtractor", "size": SIZE, "crop_size": SIZE, "resample": 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))


def noise(width: int, height: int, seed: int) -> Image.Image:
    """Coloured noise over a coloured ground, another for every seed."""
    generator = np.random.default_rng(seed)
    ground = generator.integers(0, 200, 3)
    return Image.fromarray((ground + generator.integers(0, 56, (height, width, 3))).astype(np.uint8))


def batch(prompts: list[str], images: list[Image.Image]) -> RewardBatch:
    return RewardBatch([PromptSample(str(i), text, "", {}) for i, text in enumerate(prompts)], images)


def normalised(pixels: NDArray[np.uint8]) -> torch.Tensor:
    """[3, H, W] by CLIP's mean and deviation, from [H, W, 3]."""
    mean = np.array([0.48145466, 0.4578275, 0.40821073])
    std = np.array([0.26862954, 0.26130258, 0.27577711])
    return torch.from_numpy(((pixels / 255.0 - mean) / std).transpose(2, 0, 1)).float()


def reference_pixels(image: Image.Image) -> torch.Tensor:
    """[3, 28, 28] the shorter side resized to 28, the middle cut out."""
    width, height = image.size
    short = min(width, height)
    resized = image.resize((width * SIZE // short, height * SIZE // short), Image.Resampling.BICUBIC)
    left, top = (resized.width - SIZE) // 2, (resized.height - SIZE) // 2
    return normalised(np.asarray(resized)[top : top + SIZE, left : left + SIZE])


def reference_ids(text: str) -> list[int]:
    """Letters of lower-cased words without punctuation, the two merges applied, cut at 77 with start and end."""
    ids = []
    for word in text.lower().split():
        tokens = [*word[:-1], word[-1] + "</w>"]
        for merge in MERGES:
            left, right = merge.split()
            for at in reversed(range(len(tokens) - 1)):
                if tokens[at : at + 2] == [left, right]:
                    tokens[at : at + 2] = [left + right]
        ids += [VOCAB[token] for token in tokens]
    return [START, *ids[:75], END]


@torch.no_grad()
def reference_logits(model: CLIPModel, prompts: list[str], images: list[Image.Image]) -> list[float]:
    """CLIP's own logit of each image with its own prompt, one pair at a time."""
    return [
        model(
            input_ids=torch.tensor([reference_ids(text)]), pixel_values=reference_pixels(image)[None]
        ).logits_per_image.item()
        for text, image in zip(prompts, images, strict=True)
    ]
