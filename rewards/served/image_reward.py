"""ImageReward: a BLIP tuned on people's rankings of images by prompt (arXiv 2304.05977)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image

from rewards.packages import installed
from rewards.pretrained import check_hub_id, one_line_errors, pick_device, read_tensors
from rewards.served import ServedReward

UNUSED = ("blip.vision_proj.", "blip.text_proj.")
"""Prefixes of BLIP's weights that scores do not depend on."""


class ImageRewardReward(ServedReward):
    """ImageReward: native = table = rl = a z-score (mean 0, deviation 1 over its training images), unbounded.

    The text is cut at 35 tokens, so what a longer prompt says last is not scored. Besides `model`, the package
    fetches the tokenizer of `bert-base-uncased` from the hub.

    The network is built here rather than by the package's own `load`, which ignores weights that are missing from
    the file: a wrong file would score at random without a word.

    Args:
        model: folder or hub id with `ImageReward.pt` and `med_config.json`.
        device: null is this process's GPU if there is one, else the CPU.
    """

    name = "image_reward"
    requirements = "rewards/served/requirements/image_reward.txt"
    batch_size = 32  # of no consequence: the package scores images one by one

    def __init__(self, model: str = "THUDM/ImageReward", device: str | None = None) -> None:
        self.model = model
        self.device = device
        self._network: Any = None

    @property
    def version(self) -> str:
        """Version of the scores: the weights and the package."""
        return f"image_reward {self.model} by {installed('image-reward')}"

    def load(self) -> None:
        """Builds BLIP-large and loads its weights."""
        if self._network is not None:
            return
        with self.environment():
            from ImageReward.ImageReward import ImageReward
        device = pick_device(self.device)
        with one_line_errors(self.model):
            network = ImageReward(med_config=self._file("med_config.json"), device=device)
            path = self._file("ImageReward.pt")
        weights = read_tensors(path, "download it again")
        found = network.load_state_dict(weights, strict=False)  # old files also hold tables that are computed today
        missing = [key for key in found.missing_keys if not key.startswith(UNUSED)]
        if missing:
            raise ValueError(
                f"ImageReward.pt of {self.model} lacks {len(missing)} weights, the first is {missing[0]}: "
                "give the file of THUDM/ImageReward."
            )
        self._network = network.to(device).eval().requires_grad_(False)

    def _file(self, name: str) -> str:
        if Path(self.model).is_dir():
            return str(Path(self.model) / name)
        check_hub_id(self.model)
        from huggingface_hub import hf_hub_download

        return hf_hub_download(self.model, name)

    def native(self, prompts: Sequence[str], images: Sequence[Image]) -> list[float]:
        """Returns the score of each pair."""
        with torch.inference_mode():
            # One call per image: for a list of a single image, the package returns a number in place of a list.
            return [float(self._network.score(prompt, image)) for prompt, image in zip(prompts, images, strict=True)]
