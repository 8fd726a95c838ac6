"""HPSv3: a Qwen2-VL-7B tuned on people's choices between two images (arXiv 2508.03789)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from PIL.Image import Image

from rewards.arguments import check_minimum
from rewards.packages import installed
from rewards.pretrained import one_line_errors, pick_device
from rewards.served import ServedReward

SPECIAL_TOKEN = re.compile(r"<\|\w+\|>")
MAX_ASPECT_RATIO = 200.0
"""Longest aspect ratio of an image that the package's `smart_resize` takes."""


class HPSv3Reward(ServedReward):
    """HPSv3: native = table = rl = mu, the mean of the preference that it predicts; unbounded. Sigma is not used.

    The score is read at a special token of the text. A prompt that holds that token itself (or another of Qwen's,
    written `<|...|>`) would shift every score of its batch, so such a prompt is invalid.

    If the package flash-attn is installed, hpsv3 uses it; scores then differ in the bf16 rounding.

    Args:
        checkpoint_path: `HPSv3.safetensors`; null fetches it from the hub (`MizzenAI/HPSv3`, 16.5 GB).
        config_path: YAML in hpsv3's format; null is the package's own, which first loads the base model
            `Qwen/Qwen2-VL-7B-Instruct` from the hub in bf16 and so needs a GPU.
        batch_size: images per forward pass.
        device: null is this process's GPU if there is one, else the CPU.
    """

    name = "hpsv3"
    requirements = "rewards/served/requirements/hpsv3.txt"

    def __init__(
        self,
        checkpoint_path: str | None = None,
        config_path: str | None = None,
        batch_size: int = 8,
        device: str | None = None,
    ) -> None:
        if checkpoint_path is not None and not checkpoint_path.endswith(".safetensors"):
            raise ValueError(
                f"HPSv3Reward has checkpoint_path={checkpoint_path}, use a .safetensors file: others are unpickled."
            )
        check_minimum("HPSv3Reward", 1, batch_size=batch_size)
        self.checkpoint_path = checkpoint_path
        self.config_path = config_path
        self.batch_size = batch_size
        self.device = device
        self._inferencer: Any = None

    @property
    def version(self) -> str:
        """Version of the scores: the weights, the configuration and the package."""
        weights = self.checkpoint_path or "MizzenAI/HPSv3"
        return f"hpsv3 {weights} config={self.config_path or 'HPSv3_7B'} by {installed('hpsv3')}"

    def load(self) -> None:
        """Loads Qwen2-VL and puts HPSv3's weights in it."""
        if self._inferencer is not None:
            return
        with self.environment():
            from hpsv3 import HPSv3RewardInferencer
        device = pick_device(self.device)
        if self.config_path is None and device.type == "cpu":
            raise ValueError(
                "HPSv3Reward has no GPU, which hpsv3's own configuration needs for bf16: "
                "give a device, or a config_path with bf16: false and torch_dtype: float32."
            )
        with one_line_errors(self.checkpoint_path or "MizzenAI/HPSv3"):
            self._inferencer = HPSv3RewardInferencer(
                config_path=self.config_path, checkpoint_path=self.checkpoint_path, device=str(device)
            )
        self._inferencer.model.requires_grad_(False)

    def fault(self, prompt: str, image: Image) -> str | None:
        """Returns the reason why a pair is refused: special tokens in the prompt, or an image too long; else None."""
        token = SPECIAL_TOKEN.search(prompt)
        if token:
            return f"the prompt holds the special token {token.group()}"
        if max(image.size) > MAX_ASPECT_RATIO * min(image.size):
            return f"the image of {image.width} x {image.height} pixels is longer than {MAX_ASPECT_RATIO:.0f} to 1"
        return None

    def native(self, prompts: Sequence[str], images: Sequence[Image]) -> list[float]:
        """Returns the mu of each pair."""
        with torch.inference_mode():
            # By keyword: release 1.0.0 takes the images first, the repository since then last.
            out = self._inferencer.reward(prompts=list(prompts), image_paths=list(images))  # [B, 2]: mu, sigma
        return [float(mu) for mu in out[:, 0]]
