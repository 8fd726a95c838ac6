"""`Export`: the trained agents in the formats of diffusers, transformers and peft, with a model card."""

from __future__ import annotations

import re
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import lightning as L
import yaml
from huggingface_hub import HfApi, get_token
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from callbacks.reporting.model_card import model_card
from callbacks.run_config import resolved_config
from datamodules.atomic_write import replaced_folder
from datamodules.jsonl import read_json
from datamodules.local_path import local_path
from lightning_modules.agents import check_finite
from lightning_modules.evaluation import EvaluatedAgents, EvaluationBatch

OURS = {"flow", "language", "samples", "README.md", "config.yaml"}
_NUM_SAMPLES = 4


class Export(L.Callback):
    """Writes `flow/` and `language/` (agents that learn or have a LoRA), a model card (`README.md`) and `config.yaml`.

    `flow/` is a LoRA for the stock pipeline's `load_lora_weights`, or a whole pipeline folder; `language/` an adapter
    for `PeftModel.from_pretrained`, or a transformers model folder. Both, or the folder around them, serve as
    `flow.model`, `language.model` or `lora.path`. The card has code that loads both and draws, from any folder of this
    machine or, with `hub_id`, of any; images of the last evaluation; and the numbers of `results.json`.

    Args:
        directory: folder to write; null is `export/` beside the run's logs. An earlier export there is replaced.
        every_n_train_steps: optimizer steps between exports during training, each in place of the last; null is none.
        on_train_end: export after training and its last validation.
        on_test_end: export after `lightning test`, which exports a checkpoint without training.
        hub_id: repository on the Hugging Face hub, `owner/name`, to push the export after training or a test to; null
            pushes nothing.
        private: a repository that is made for it is private.
    """

    def __init__(
        self,
        directory: str | None = None,
        every_n_train_steps: int | None = None,
        on_train_end: bool = True,
        on_test_end: bool = False,
        hub_id: str | None = None,
        private: bool = True,
    ) -> None:
        if every_n_train_steps is not None and every_n_train_steps < 1:
            raise ValueError(f"Export's `every_n_train_steps` is {every_n_train_steps}; use at least 1, or null.")
        self.directory = None if directory is None else local_path(directory, "Export's `directory`")
        self.every_n_train_steps = every_n_train_steps
        # Under other names than the arguments', which are those of hooks.
        self._after_training = on_train_end
        self._after_test = on_test_end
        self.hub_id = hub_id
        self.private = private
        self._samples: EvaluationBatch | None = None
        self._logs = Path()
        self._step = 0

    # --- hooks ------------------------------------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Raises ValueError now for what would fail after hours of training."""
        if not isinstance(pl_module, EvaluatedAgents):
            raise ValueError(f"callbacks.export.Export exports PromptRL, not {type(pl_module).__name__}: leave it out.")
        if self.directory is not None:
            _refuse_foreign(self.directory)
        if self.hub_id is None or not {"fit": self._after_training, "test": self._after_test}.get(stage):
            return
        if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", self.hub_id):
            raise ValueError(f"Export's `hub_id` is {self.hub_id}: give `owner/name`.")
        if get_token() is None:
            raise ValueError(
                f"Export's `hub_id` is {self.hub_id}, but there is no token to push with: run `hf auth login`, set "
                "HF_TOKEN, or leave `hub_id` out."
            )

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

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keeps a few images for the card."""
        if batch_idx == dataloader_idx == 0 and isinstance(outputs, EvaluationBatch) and outputs.samples:
            self._samples = _first(outputs, _NUM_SAMPLES)

    on_test_batch_end = on_validation_batch_end

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Exports after training; the last validation, in the module's `on_train_end`, is in `results.json` by now."""
        if self._after_training:
            self._export(trainer, pl_module, push=True)

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Exports the agents that were tested."""
        if self._after_test:
            self._export(trainer, pl_module, push=True)

    # --- files ------------------------------------------------------------------------------------------------------

    def _export(self, trainer: L.Trainer, pl_module: L.LightningModule, *, push: bool = False) -> None:
        assert isinstance(pl_module, EvaluatedAgents)
        check_finite({name: weight for name, weight in pl_module.named_parameters() if weight.requires_grad})
        if self.directory is None and trainer.fast_dev_run:  # type: ignore[attr-defined]
            return  # a trial run has no folder of its own
        with ExitStack() as stack:
            for agent in (pl_module.flow, pl_module.language):
                if agent is not None:
                    stack.enter_context(agent.saved_whole())
            if trainer.is_global_zero:
                self._write(trainer, pl_module, push=push)

    def _write(self, trainer: L.Trainer, pl_module: EvaluatedAgents, *, push: bool) -> None:
        folder = self._logs / "export" if self.directory is None else self.directory
        _refuse_foreign(folder)
        path = self._logs / "results.json"
        results = read_json(path) if path.is_file() else None
        config = resolved_config(trainer)
        with replaced_folder(folder) as new:
            for name, agent in (("flow", pl_module.flow), ("language", pl_module.language)):
                if agent is not None and (agent.trained or agent.adapted):
                    agent.save_pretrained(new / name)
            (new / "language" / "README.md").unlink(missing_ok=True)  # peft's empty form; ours says more
            if config:
                text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
                (new / "config.yaml").write_text(text, encoding="utf-8")
            if self._samples is not None:
                (new / "samples").mkdir()
                for mode, images in self._samples.images.items():
                    for number, image in enumerate(images[0]):
                        image.save(new / "samples" / f"{number}_{mode}.png")
            card = model_card(
                pl_module,
                trainer.global_step,
                where=repr(str(folder.resolve())) if self.hub_id is None else f"snapshot_download({self.hub_id!r})",
                results=results,
                configured=bool(config),
                samples=self._samples,
            )
            (new / "README.md").write_text(card, encoding="utf-8")
        if push and self.hub_id is not None:
            self._push(folder, self.hub_id)

    def _push(self, folder: Path, hub_id: str) -> None:
        """Uploads an export; warns if that fails, as the folder is there all the same."""
        api = HfApi()
        try:
            api.create_repo(hub_id, private=self.private, exist_ok=True)
            address = api.upload_folder(repo_id=hub_id, folder_path=folder, commit_message="PromptRL export")
        except (OSError, httpx.HTTPError) as error:
            reason = str(error).strip().splitlines()[0]
            rank_zero_warn(f"{folder} could not be pushed to {hub_id}: {reason}; try `hf upload {hub_id} {folder}`.")
        else:
            rank_zero_info(f"Pushed to {address}.")


def _first(batch: EvaluationBatch, num: int) -> EvaluationBatch:
    """Returns the first prompts of a batch with the first image of each."""
    return replace(
        batch,
        samples=batch.samples[:num],
        prompts={mode: prompts[:num] for mode, prompts in batch.prompts.items()},
        seeds=[seeds[:num] for seeds in batch.seeds[:1]],
        images={mode: [images[0][:num]] for mode, images in batch.images.items()},
    )


def _refuse_foreign(folder: Path) -> None:
    """Raises ValueError if replacing a folder would delete anything but an export."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"Export's `directory` is {folder}, a file: give a folder.")
    foreign = sorted({path.name for path in folder.iterdir()} - OURS) if folder.exists() else []
    if foreign:
        raise ValueError(
            f"Export's `directory` is {folder}, which holds {foreign[0]} and would be replaced: give a new folder."
        )
