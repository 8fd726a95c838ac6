"""`SampleImages`: images for the trackers, of the same prompts and noise every time, captioned by prompt or rewrite."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

import lightning as L
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image, ImageDraw, ImageFont

from callbacks.trackers import log_image, log_table
from lightning_modules.evaluation import EvaluationBatch
from lightning_modules.rollout import Rollout
from rewards.arguments import check_minimum

_SIDE = 160
_CAPTION = 78


class SampleImages(L.Callback):
    """Draws sheets of captioned images at every validation.

    `samples/<set>`: the first `num` prompts of each evaluation set, without prompt enhancement above and with it
    below. `samples/group`: one group of the latest rollout, with rewards and advantages, retained prompts first.

    Args:
        num: images per row.
    """

    def __init__(self, num: int = 6) -> None:
        check_minimum("SampleImages", 1, num=num)
        self.num = num

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Logs images and rewrites of the first batch of every set."""
        assert isinstance(outputs, EvaluationBatch)
        if batch_idx > 0 or not trainer.is_global_zero or not outputs.samples:
            return
        rows = [
            [captioned(image, text) for image, text in zip(images[0][: self.num], outputs.prompts[mode], strict=False)]
            for mode, images in outputs.images.items()
        ]
        log_image(trainer, f"samples/{outputs.name}", sheet(rows))
        if "with_pe" in outputs.prompts:
            asked = [sample.asked for sample in outputs.samples[: self.num]]
            pairs = list(zip(asked, outputs.prompts["with_pe"], strict=False))
            log_table(trainer, f"rewrites/{outputs.name}", ("prompt", "rewrite"), pairs)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Logs one group of the latest rollout."""
        rollout: Rollout | None = getattr(pl_module, "latest", None)
        if rollout is None or not trainer.is_global_zero:
            return
        size = rollout.rewards.shape[1]
        numbers = zip(rollout.rewards[0].tolist(), rollout.advantages[0].tolist(), strict=True)
        tiles = [
            captioned(image, f"{prompt} | reward {reward:.2f}, advantage {advantage:+.2f}")
            for image, prompt, (reward, advantage) in zip(
                rollout.images[:size], rollout.prompts[:size], numbers, strict=True
            )
        ]
        half = (len(tiles) + 1) // 2
        log_image(trainer, "samples/group", sheet([tiles[:half], tiles[half:]]))


def captioned(image: Image.Image, text: str) -> Image.Image:
    """Returns an image with its caption below; small images are enlarged without smoothing."""
    tile = Image.new("RGB", (_SIDE, _SIDE + _CAPTION), "white")
    resample = Image.Resampling.NEAREST if image.width < _SIDE else Image.Resampling.LANCZOS
    tile.paste(image.resize((_SIDE - 8, _SIDE - 8), resample), (4, 4))
    wrapped = "\n".join(textwrap.wrap(text, 26)[:5])
    ImageDraw.Draw(tile).multiline_text((4, _SIDE), wrapped, fill="black", font=ImageFont.load_default(11))
    return tile


def sheet(rows: Sequence[Sequence[Image.Image]]) -> Image.Image:
    """Pastes rows of captioned images into one."""
    whole = Image.new("RGB", (max(map(len, rows)) * _SIDE, len(rows) * (_SIDE + _CAPTION)), "white")
    for y, row in enumerate(rows):
        for x, tile in enumerate(row):
            whole.paste(tile, (x * _SIDE, y * (_SIDE + _CAPTION)))
    return whole


def tensorboards(trainer: L.Trainer) -> list[TensorBoardLogger]:
    """Returns a run's loggers that write for TensorBoard."""
    return [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
