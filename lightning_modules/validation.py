"""Validation outside the trainer's own rhythm."""

from __future__ import annotations

import lightning as L


def validate_now(trainer: L.Trainer) -> None:
    """Runs the validation loop inside a fit; Lightning itself does so only between training batches.

    Nothing happens where validation is switched off (`limit_val_batches: 0`) or the data module has none.
    """
    loop = trainer.fit_loop.epoch_loop.val_loop
    loop.setup_data()
    if not trainer.enable_validation or not loop.max_batches:
        return
    trainer.validating = True
    loop.run()
    trainer.training = True
