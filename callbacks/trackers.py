"""Images and tables for every logger of a run that takes some: TensorBoard, Weights & Biases and their like."""

from __future__ import annotations

from collections.abc import Sequence

import lightning as L
import numpy as np
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image


def log_image(trainer: L.Trainer, tag: str, image: Image.Image) -> None:
    """Gives an image to TensorBoard, and to loggers that have a `log_image` as Lightning's for W&B has."""
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image(tag, np.asarray(image), trainer.global_step, dataformats="HWC")
        elif hasattr(logger, "log_image"):
            logger.log_image(key=tag, images=[image], step=trainer.global_step)


def log_table(
    trainer: L.Trainer,
    tag: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    markdown: str | None = None,
) -> None:
    """Gives a table of texts to TensorBoard, as Markdown, and to loggers that have a `log_text`.

    Args:
        trainer: has the loggers.
        tag: name of the table.
        columns: their headings.
        rows: for each column a text.
        markdown: the same table for TensorBoard; None writes it.
    """
    if markdown is None:
        lines = [f"| {' | '.join(line)} |" for line in (columns, *rows)]
        markdown = "\n".join([lines[0], "|" + "---|" * len(columns), *lines[1:]])
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_text(tag, markdown, trainer.global_step)
        elif hasattr(logger, "log_text"):
            logger.log_text(key=tag, columns=list(columns), data=[list(row) for row in rows], step=trainer.global_step)
