"""Rewrites under a real Trainer: shares by hand, in the logs, in `results.json` and across a resume."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from datamodules.base import PromptDataModule, PromptSample
from lightning_modules.evaluation import EvaluationBatch, validate_now
from miniature.edits.naming_benchmark import RewriteNaming
from miniature.edits.wording import Edit
from miniature.edits.world import EditExample
from miniature.scenes.world import Item, Scene

pytestmark = pytest.mark.filterwarnings("ignore:Experiment logs directory", "ignore:The dirpath has changed")

SCENE = Scene((Item("circle", "red", 0), Item("square", "blue", 6)))
REMOVAL, RECOLOUR = (
    EditExample(SCENE, Edit("removal", 0, "left")),
    EditExample(SCENE, Edit("attribute_modification", 1, "right", "green")),
)
# Three removals of the red circle and one recolouring of the blue square.
PROMPTS = [PromptSample(str(i), one.instruction, one.category, one.metadata) for i, one in enumerate(3 * [REMOVAL])]
PROMPTS.append(PromptSample("3", RECOLOUR.instruction, RECOLOUR.category, RECOLOUR.metadata))
SAID = {
    0: ["remove the left one", "delete the scarlet ball", "erase the azure box", "make the right one green"],
    2: ["remove the red circle", "delete the scarlet ball", "erase the azure box", "paint the azure box emerald"],
}


class Prompts(PromptDataModule):
    """One set that the refiner rewrites, and one that it does not."""

    def __init__(self) -> None:
        super().__init__(batch_size=1, eval_batch_size=3)
        self.unrefined = {"plain"}

    def train_samples(self) -> list[PromptSample]:
        return PROMPTS

    def eval_samples(self) -> dict[str, list[PromptSample]]:
        return {"edits": PROMPTS, "plain": PROMPTS}


class Writer(L.LightningModule):
    """Writes `SAID[step]`, draws nothing; its steps change nothing else."""

    def __init__(self, language: object | None = "a refiner") -> None:
        super().__init__()
        self.automatic_optimization = False
        self.language = language
        self.num_rollouts = 0
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch: list[PromptSample], batch_idx: int) -> None:
        self.optimizers().step()  # type: ignore[union-attr]
        self.num_rollouts += 8

    def on_train_start(self) -> None:
        if self.global_step == 0:
            validate_now(self.trainer)

    def validation_step(self, batch: list[PromptSample], batch_idx: int, dataloader_idx: int) -> Any:
        prompts = {"without_pe": [sample.prompt for sample in batch]}
        name = self.trainer.datamodule.eval_names[dataloader_idx]  # type: ignore[attr-defined]
        if self.language is not None and name == "edits":
            prompts["with_pe"] = [SAID[self.global_step][int(sample.id)] for sample in batch]
        return EvaluationBatch(name, batch, prompts, [[0] * len(batch)], {})

    test_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(root: Path, callback: RewriteNaming) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu", max_steps=2, val_check_interval=2, check_val_every_n_epoch=None, num_sanity_val_steps=0,
        log_every_n_steps=1, enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
        logger=CSVLogger(root, name="run", version=0), callbacks=[callback],
    )  # fmt: skip


BEFORE = {
    "names_source": {"mean": 0.25, "removal": pytest.approx(1 / 3), "attribute_modification": 0.0},
    "names_object": {"mean": 0.5, "removal": pytest.approx(2 / 3), "attribute_modification": 0.0},
}
AFTER = {
    "names_source": {"mean": 0.75, "removal": pytest.approx(2 / 3), "attribute_modification": 1.0},
    "names_object": {"mean": 1.0, "removal": 1.0, "attribute_modification": 1.0},
}


def test_shares_before_and_after(tmp_path: Path) -> None:
    callback = RewriteNaming()
    fit = trainer(tmp_path, callback)
    fit.fit(Writer(), datamodule=Prompts())
    naming = json.loads((tmp_path / "run/version_0/results.json").read_text())["naming"]
    assert naming["before"] == {"edits": BEFORE} and naming["results"] == {"edits": AFTER}
    sets = naming["history"][0]["sets"]
    assert list(sets) == ["edits"] and naming["history"] == [
        {"step": 0, "rollouts": 0, "results": {"edits": BEFORE}, "sets": sets},
        {"step": 2, "rollouts": 16, "results": {"edits": AFTER}, "sets": sets},
    ]
    rows = list(csv.DictReader((tmp_path / "run/version_0/metrics.csv").open()))
    logged = [float(row["val/edits/names_source"]) for row in rows if row.get("val/edits/names_source")]
    assert logged == [0.25, 0.75] and not any("plain" in column for column in rows[0])

    resumed = RewriteNaming(["edits"])
    resumed.load_state_dict(callback.state_dict())
    assert resumed.history == callback.history
    writer = Writer()
    other = trainer(tmp_path, resumed)
    other.test(writer, datamodule=Prompts(), verbose=False)  # a test tells of other scenes: history begins anew
    assert resumed.history == [{"step": 0, "rollouts": 0, "results": {"edits": BEFORE}, "sets": sets}]
    assert other.callback_metrics["test/edits/names_object"] == 0.5


class Drawer(Writer):
    """Its rollouts have two rewrites of the first prompt and two of the last; one of the four is right."""

    latest: Any

    def training_step(self, batch: list[PromptSample], batch_idx: int) -> None:
        super().training_step(batch, batch_idx)
        rewrites = ["remove the left one", "delete the scarlet ball", "paint the scarlet ball navy", "right"]
        self.latest = SimpleNamespace(samples=[PROMPTS[0], PROMPTS[3]], completions=SimpleNamespace(rewrites=rewrites))


def test_drawn_rewrites(tmp_path: Path) -> None:
    trainer(tmp_path, RewriteNaming()).fit(Drawer(), datamodule=Prompts())
    rows = list(csv.DictReader((tmp_path / "run/version_0/metrics.csv").open()))
    logged = [(row["refine/names_source"], row["refine/names_object"]) for row in rows if row["refine/names_source"]]
    assert logged == [("0.25", "0.5")] * 2


def test_nothing_to_read(tmp_path: Path) -> None:
    """No refiner, or a set that is not asked for."""
    for writer, callback in ((Writer(None), RewriteNaming()), (Writer(), RewriteNaming(["others"]))):
        fit = trainer(tmp_path, callback)
        fit.fit(writer, datamodule=Prompts())
        assert callback.history == [] and not any("names" in key for key in fit.callback_metrics)
    assert not (tmp_path / "run/version_0/results.json").exists()
