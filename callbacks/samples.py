"""`SampleImages`: images in TensorBoard, of the same prompts and noise every time, captioned by prompt or rewrite."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import lightning as L
import numpy as np
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image, ImageDraw, ImageFont

from lightning_modules.evaluation import EvaluationBatch
from lightning_modules.rollout import Rollout
from rewards.arguments import check_minimum

_WIDTH, _GAP = 208, 12
"""Width of an image in a sheet, and the space between two, in pixels."""
_FONT = ImageFont.load_default(13)
_ROWS = {"without_pe": "prompts as written", "with_pe": "rewritten by the refiner (with PE)"}


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
        rows = {
            _ROWS[mode]: list(zip(images[0][: self.num], outputs.prompts[mode], strict=False))
            for mode, images in outputs.images.items()
        }
        _log(trainer, f"samples/{outputs.name}", sheet(rows))
        if "with_pe" in outputs.prompts:
            asked = [sample.asked for sample in outputs.samples[: self.num]]
            pairs = zip(asked, outputs.prompts["with_pe"], strict=False)
            lines = [f"| {prompt} | {rewrite} |" for prompt, rewrite in pairs]
            table = "\n".join(["| prompt | rewrite |", "|---|---|", *lines])
            for logger in tensorboards(trainer):
                logger.experiment.add_text(f"rewrites/{outputs.name}", table, trainer.global_step)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Logs one group of the latest rollout."""
        rollout: Rollout | None = getattr(pl_module, "latest", None)
        if rollout is None or not trainer.is_global_zero:
            return
        size = rollout.rewards.shape[1]
        numbers = zip(rollout.rewards[0].tolist(), rollout.advantages[0].tolist(), strict=True)
        tiles = [
            (image, f"reward {reward:.2f}, advantage {advantage:+.2f}\n{prompt}")
            for image, prompt, (reward, advantage) in zip(
                rollout.images[:size], rollout.prompts[:size], numbers, strict=True
            )
        ]
        half = (size + 1) // 2
        title = f"one group: {rollout.samples[0].prompt}"
        _log(trainer, "samples/group", sheet({title: tiles[:half], "the same group, continued": tiles[half:]}))


def sheet(rows: Mapping[str, Sequence[tuple[Image.Image, str]]]) -> Image.Image:
    """Pastes rows of images into one, each with its whole caption below.

    Args:
        rows: label of a row -> its images and captions. Images keep their aspect ratio; small ones are enlarged
            without smoothing.
    """
    width = max(map(len, rows.values())) * (_WIDTH + _GAP) + _GAP
    parts: list[tuple[int, int, Image.Image | str]] = []
    y = 0
    for label, tiles in rows.items():
        title = _wrapped(label, width - 2 * _GAP)
        parts.append((_GAP, y + _GAP, title))
        y += _GAP + _height(title) + _GAP
        shown = [
            image.resize((_WIDTH, round(image.height * _WIDTH / image.width)), _filter(image)) for image, _ in tiles
        ]
        captions = [_wrapped(text, _WIDTH) for _, text in tiles]
        below = max((image.height for image in shown), default=0) + _GAP // 2
        for column, (image, caption) in enumerate(zip(shown, captions, strict=True)):
            x = _GAP + column * (_WIDTH + _GAP)
            parts += [(x, y, image), (x, y + below, caption)]
        y += below + max(map(_height, captions), default=0) + _GAP
    whole = Image.new("RGB", (width, y), "white")
    draw = ImageDraw.Draw(whole)
    for left, top, part in parts:
        if isinstance(part, str):
            draw.multiline_text((left, top), part, fill="black", font=_FONT)
        else:
            whole.paste(part, (left, top))
    return whole


def _filter(image: Image.Image) -> Image.Resampling:
    return Image.Resampling.NEAREST if image.width < _WIDTH else Image.Resampling.LANCZOS


def _wrapped(text: str, width: int) -> str:
    """Breaks a text into lines of at most `width` pixels; a word that is longer is broken too."""
    lines: list[str] = []
    for paragraph in text.splitlines():
        letters = max(1, int(width / max(_FONT.getlength(paragraph) / max(len(paragraph), 1), 1)))
        tried = textwrap.wrap(paragraph, letters)
        while letters > 1 and any(_FONT.getlength(line) > width for line in tried):
            letters -= 1
            tried = textwrap.wrap(paragraph, letters)
        lines += tried
    return "\n".join(lines)


def _height(text: str) -> int:
    return round(ImageDraw.Draw(Image.new("L", (1, 1))).multiline_textbbox((0, 0), text, font=_FONT)[3])


def _log(trainer: L.Trainer, tag: str, image: Image.Image) -> None:
    for logger in tensorboards(trainer):
        logger.experiment.add_image(tag, np.asarray(image), trainer.global_step, dataformats="HWC")


def tensorboards(trainer: L.Trainer) -> list[TensorBoardLogger]:
    """Returns a run's loggers that write for TensorBoard."""
    return [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
