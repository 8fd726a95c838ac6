"""`SampleImages`: images for the trackers, of the same prompts and noise every time, captioned by prompt or rewrite."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.loggers import TensorBoardLogger

from callbacks.reporting.sheets import ROWS, sheet
from callbacks.trackers import log_image, log_table
from lightning_modules.evaluation import EvaluationBatch
from lightning_modules.rollout import Rollout
from rewards.arguments import check_minimum


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
            ROWS[mode]: list(zip(images[0][: self.num], outputs.prompts[mode], strict=False))
            for mode, images in outputs.images.items()
        }
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
            (image, f"reward {reward:.2f}, advantage {advantage:+.2f}\n{prompt}")
            for image, prompt, (reward, advantage) in zip(
                rollout.images[:size], rollout.prompts[:size], numbers, strict=True
            )
        ]
        half = (size + 1) // 2
        title = f"one group: {rollout.samples[0].prompt}"
        whole = sheet({title: tiles[:half], "the same group, continued": tiles[half:]})
        log_image(trainer, "samples/group", whole)


def tensorboards(trainer: L.Trainer) -> list[TensorBoardLogger]:
    """Returns a run's loggers that write for TensorBoard."""
    return [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
