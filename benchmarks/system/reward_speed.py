"""Seconds per image of every scorer that runs without downloads: full-size networks with random weights.

python -m benchmarks.system.reward_speed [--images 4] [--size 512]

Times say nothing of quality. Scorers of 7B parameters and those behind an endpoint are left out.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.table import Table
from transformers import CLIPConfig, CLIPModel, Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

from datamodules.sample import PromptSample
from miniature.scenes.detector import ShapesDetector
from rewards.aesthetic import AestheticHead, AestheticReward
from rewards.base import Reward, RewardBatch
from rewards.clip import CLIPScoreReward
from rewards.geneval.mask2former import Mask2FormerDetector
from rewards.geneval.reward import GenEvalReward
from rewards.ocr import OCRReward
from rewards.ocr_engines import RapidOCRReader
from rewards.pickscore import PickScoreReward

LETTERS = [*"abcdefghijklmnopqrstuvwxyz"]
TOKENS = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]


def clip_folder(folder: Path, vision: dict[str, int], text: dict[str, int], projection: int) -> str:
    """Writes a CLIP folder with the published sizes, random weights and a letter tokenizer."""
    folder.mkdir()
    vocab = {token: index for index, token in enumerate(TOKENS)}
    ids = {"bos_token_id": len(vocab) - 2, "eos_token_id": len(vocab) - 1, "pad_token_id": len(vocab) - 1}
    config = CLIPConfig(text_config=text | ids, vision_config=vision, projection_dim=projection)
    CLIPModel(config).save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer"}))
    settings = {"feature_extractor_type": "CLIPFeatureExtractor", "size": 224, "crop_size": 224, "resample": 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return str(folder)


def mask2former_folder(folder: Path) -> str:
    """Writes a folder of Mask2Former Swin-S for 80 classes with random weights."""
    swin = SwinConfig(  # type: ignore[call-arg]
        depths=[2, 2, 18, 2],
        embed_dim=96,
        num_heads=[3, 6, 12, 24],
        window_size=7,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = Mask2FormerConfig(backbone_config=swin, num_labels=80, num_queries=100)  # type: ignore[call-arg]
    Mask2FormerForUniversalSegmentation(config).save_pretrained(folder)
    return str(folder)


def sign(words: str, size: int) -> Image.Image:
    """Draws text on noise."""
    generator = np.random.default_rng(len(words))
    image = Image.fromarray(generator.integers(180, 255, (size, size, 3)).astype(np.uint8))
    ImageDraw.Draw(image).text((size // 10, size // 2), words, fill="black", font=ImageFont.load_default(size // 10))
    return image


def main() -> None:
    """Prints the seconds that each scorer takes for an image."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--size", type=int, default=512)
    options = parser.parse_args()
    torch.set_num_threads(1)
    metadata = {"tag": "single_object", "include": [{"class": "dog", "count": 1}], "text": ["no parking"]}
    sample = PromptSample("0", "a sign", "single_object", metadata)
    batch = RewardBatch(
        [sample] * options.images, [sign(f"no parking {i}", options.size) for i in range(options.images)]
    )

    table = Table(title=f"{options.images} images of {options.size} x {options.size}, one CPU thread, fp32")
    for column in ("scorer", "parameters", "seconds an image"):
        table.add_column(column, justify="left" if column == "scorer" else "right")

    def measure(name: str, make: Callable[[], Reward], parameters: str) -> None:
        reward = make()
        reward.load()
        reward(RewardBatch(batch.samples[:1], batch.images[:1]))  # warms up
        start = time.perf_counter()
        reward(batch)
        table.add_row(name, parameters, f"{(time.perf_counter() - start) / options.images:.3f}")

    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        large: dict[str, Any] = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24}
        text_large = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
        vision_large = large | {"num_attention_heads": 16, "patch_size": 14, "image_size": 224}
        vit_l = clip_folder(root / "vit_l", vision_large, text_large, 768)
        measure("miniature detector", lambda: GenEvalReward(ShapesDetector()), "0")
        measure("OCR (RapidOCR, side 512)", lambda: OCRReward(RapidOCRReader(limit_side_len=512)), "ONNX")
        measure("OCR (RapidOCR, side 320)", lambda: OCRReward(RapidOCRReader(limit_side_len=320)), "ONNX")
        measure("CLIPScore (ViT-L/14)", lambda: CLIPScoreReward(vit_l), "428M")
        torch.save(AestheticHead().state_dict(), root / "head.pth")
        measure("aesthetic (ViT-L/14)", lambda: AestheticReward(str(root / "head.pth"), model=vit_l), "428M")
        vision_huge = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32}
        vision_huge |= {"num_attention_heads": 16, "patch_size": 14, "image_size": 224}
        text_huge = large | {"num_attention_heads": 16}
        vit_h = clip_folder(root / "vit_h", vision_huge, text_huge, 1024)
        measure("PickScore, HPSv2.1 (ViT-H/14)", lambda: PickScoreReward(vit_h, vit_h), "986M")
        swin = mask2former_folder(root / "swin")
        detector = Mask2FormerDetector(swin, colors=False)
        measure("GenEval (Mask2Former Swin-S), no colours", lambda: GenEvalReward(detector), "69M")
    Console().print(table)


if __name__ == "__main__":
    main()
