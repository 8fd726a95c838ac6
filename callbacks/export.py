"""`Export`: the trained agents in the formats of diffusers, transformers and peft, with a model card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning as L
import yaml

from callbacks.reporting.model_card import model_card
from callbacks.run_config import resolved_config
from datamodules.atomic_write import replaced_folder
from datamodules.local_path import local_path
from lightning_modules.agents import check_finite
from lightning_modules.evaluation import EvaluatedAgents

OURS = {"flow", "language", "README.md", "config.yaml"}


class Export(L.Callback):
    """Writes `flow/` and `language/` (agents that learn or have a LoRA), a model card (`README.md`) and `config.yaml`.

    `flow/` is a LoRA for the stock pipeline's `load_lora_weights`, or a whole pipeline folder; `language/` an adapter
    for `PeftModel.from_pretrained`, or a transformers model folder. Both, or the folder around them, serve as
    `flow.model`, `language.model` or `lora.path`. The card tells how to load and use both, and has the numbers of
    `results.json` where there is a benchmark.

    Args:
        directory: folder to write; null is `export/` beside the run's logs. An earlier export there is replaced.
        every_n_train_steps: optimizer steps between exports during training, each in place of the last; null is none.
        on_train_end: export after training and its last validation.
        on_test_end: export after `lightning test`, which exports a checkpoint without training.
    """

    def __init__(
        self,
        directory: str | None = None,
        every_n_train_steps: int | None = None,
        on_train_end: bool = True,
        on_test_end: bool = False,
    ) -> None:
        if every_n_train_steps is not None and every_n_train_steps < 1:
            raise ValueError(f"Export's `every_n_train_steps` is {every_n_train_steps}; use at least 1, or null.")
        self.directory = None if directory is None else local_path(directory, "Export's `directory`")
        self.every_n_train_steps = every_n_train_steps
        # Under other names than the arguments', which are those of hooks.
        self._after_training = on_train_end
        self._after_test = on_test_end
        self._logs = Path()
        self._step = 0

    # --- hooks ------------------------------------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Raises ValueError now for what would fail after hours of training."""
        if not isinstance(pl_module, EvaluatedAgents):
            raise ValueError(f"callbacks.export.Export exports PromptRL, not {type(pl_module).__name__}: leave it out.")
        if self.directory is not None:
            _refuse_foreign(self.directory)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Notes where the logs are: Lightning broadcasts it, so every rank has to ask."""
        self._logs = Path(trainer.log_dir or trainer.default_root_dir)

    on_test_start = on_fit_start

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Counts steps from where a resumed run goes on."""
        self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Exports every so many optimizer steps, of which a rollout may have several."""
        every, step = self.every_n_train_steps, trainer.global_step
        if every is not None and step // every > self._step // every:
            self._export(trainer, pl_module)
            trainer.strategy.barrier("exported")  # nobody goes on to change or wait for what is being written
        self._step = step

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Exports after training; the last validation, in the module's `on_train_end`, is in `results.json` by now."""
        if self._after_training:
            self._export(trainer, pl_module)

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Exports the agents that were tested."""
        if self._after_test:
            self._export(trainer, pl_module)

    # --- files ------------------------------------------------------------------------------------------------------

    def _export(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, EvaluatedAgents)
        check_finite({name: weight for name, weight in pl_module.named_parameters() if weight.requires_grad})
        # A trial run has no folder of its own.
        if not trainer.is_global_zero or (self.directory is None and trainer.fast_dev_run):  # type: ignore[attr-defined]
            return
        folder = self._logs / "export" if self.directory is None else self.directory
        _refuse_foreign(folder)
        path = self._logs / "results.json"
        results = json.loads(path.read_text()) if path.is_file() else None
        config = resolved_config(trainer)
        with replaced_folder(folder) as new:
            for name, agent in (("flow", pl_module.flow), ("language", pl_module.language)):
                if agent is not None and (agent.trained or agent.adapted):
                    agent.save_pretrained(new / name)
            (new / "language" / "README.md").unlink(missing_ok=True)  # peft's empty form; ours says more
            if config:
                text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
                (new / "config.yaml").write_text(text, encoding="utf-8")
            card = model_card(pl_module, trainer.global_step, results=results, configured=bool(config))
            (new / "README.md").write_text(card, encoding="utf-8")


def _refuse_foreign(folder: Path) -> None:
    """Raises ValueError if replacing a folder would delete anything but an export."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"Export's `directory` is {folder}, a file: give a folder.")
    foreign = sorted({path.name for path in folder.iterdir()} - OURS) if folder.exists() else []
    if foreign:
        raise ValueError(
            f"Export's `directory` is {folder}, which holds {foreign[0]} and would be replaced: give a new folder."
        )
