"""`Page`: a `report.html` in the folder of every run, and in that of predictions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from PIL.Image import Image

from callbacks.benchmark import Benchmark
from callbacks.predictions import SavePredictions
from callbacks.reporting.gallery import Gallery, Group, Rating, Sample, Slot
from callbacks.run_config import given
from datamodules.base import PromptDataModule, PromptSample, bare, spread
from datamodules.jsonl import read_json
from lightning_modules.evaluation import EvaluationBatch
from lightning_modules.rollout import Rollout


class Page(L.Callback):
    """Keeps a few images of each evaluation, and draws the run's `report.html` at its end.

    Every command of ours adds it, as the last callback: the page shows what the others leave. Images lie in `report/`
    beside it, at most 512 pixels wide and high; where they are small the page holds them itself. A page that cannot be
    drawn is said in one line and ends nothing. `python -m callbacks.runs.report` draws it again.

    Args:
        num: prompts of each evaluation set that are shown, spread evenly over it.
    """

    def __init__(self, num: int = 6) -> None:
        self.num = num
        self._picked: dict[str, set[str]] = {}
        self._drawn: list[tuple[str, str, PromptSample, str, Image]] = []
        self._gallery: Gallery | None = None

    # --- hooks ------------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Takes over the images of the run that is resumed."""
        gallery, path = self._opened(trainer), given(trainer, "ckpt_path") or trainer.ckpt_path
        if gallery is not None and path is not None:
            earlier = Path(path).resolve().parents[1]
            if earlier != gallery.folder.resolve():
                self._safely(lambda: gallery.begin_with(earlier, trainer.global_step), trainer)

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Picks the prompts to show among those that rank 0 draws, the same every time."""
        data: Any = getattr(trainer, "datamodule", None)
        self._drawn = []
        if isinstance(data, PromptDataModule) and trainer.is_global_zero:
            for name, samples in data.eval_sets.items():
                share = bare(samples)[:: trainer.world_size]
                self._picked[name] = {share[row].id for row in spread(len(share), self.num)}

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Holds the picked images until they are scored."""
        if isinstance(outputs, EvaluationBatch) and trainer.is_global_zero:
            for row, sample in enumerate(outputs.samples):
                if sample.id in self._picked.get(outputs.name, ()):
                    for mode, images in outputs.images.items():
                        drawn = outputs.prompts[mode][row]
                        self._drawn.append((outputs.name, mode, sample, drawn, images[0][row]))

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keeps the images with their scores, and one group of the latest rollout."""
        if trainer.sanity_checking:
            return
        gallery = self._opened(trainer)
        if gallery is not None:
            self._safely(lambda: self._keep(gallery, trainer, pl_module), trainer)
        if trainer.state.fn == TrainerFn.VALIDATING:
            self.on_fit_end(trainer, pl_module)

    on_test_epoch_start = on_validation_epoch_start
    on_test_batch_end = on_validation_batch_end

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keeps the images and draws the page of a test."""
        self.on_validation_end(trainer, pl_module)
        self.on_fit_end(trainer, pl_module)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draws the page from the run's files."""
        folder = trainer.log_dir  # asked on every rank: Lightning broadcasts it
        path = None if folder is None else Path(folder) / "results.json"
        if not trainer.is_global_zero or path is None or not path.is_file() or read_json(path).keys() == {"run"}:
            return
        for logger in trainer.loggers:
            logger.save()  # the curves' last rows

        def draw() -> Path:
            from callbacks.reporting.page import run_page  # pandas and matplotlib: a second

            return run_page(path.parent)

        self._drawn_page(draw, trainer)

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draws the page of predictions, whose list `SavePredictions` has completed by now."""
        kept = [callback for callback in trainer.callbacks if isinstance(callback, SavePredictions)]  # type: ignore[attr-defined]
        data: Any = getattr(trainer, "datamodule", None)
        if not kept or not trainer.is_global_zero or not isinstance(data, PromptDataModule):
            return

        def draw() -> Path:
            from callbacks.reporting.predictions_page import predictions_page

            return predictions_page(kept[0].directory, data.predict_samples())

        self._drawn_page(draw, trainer)

    # --- helpers ----------------------------------------------------------------------------------------------------

    def _opened(self, trainer: L.Trainer) -> Gallery | None:
        """Returns this run's gallery on rank 0; None elsewhere, and for a run without a folder."""
        folder = trainer.log_dir  # asked on every rank: Lightning broadcasts it
        if folder is None or not trainer.is_global_zero:
            return None
        if self._gallery is None or self._gallery.folder != Path(folder):
            self._gallery = Gallery(Path(folder))
        return self._gallery

    def _keep(self, gallery: Gallery, trainer: L.Trainer, module: Any) -> None:
        step = 0 if trainer.testing else trainer.global_step
        rollouts = getattr(module, "num_rollouts", 0)
        gallery.samples = [sample for sample in gallery.samples if sample.step != step]  # validated twice
        for name, mode, sample, drawn, image in self._drawn:
            start = f"{name}_{sample.id}"
            gallery.samples.append(
                Sample(
                    step=step,
                    rollouts=rollouts,
                    name=name,
                    mode=mode,
                    id=sample.id,
                    prompt=sample.prompt,
                    drawn=drawn,
                    file=gallery.keep(image, f"{start}_{mode}_{step:06d}"),
                    source=None if sample.image is None else gallery.keep(sample.image, f"{start}_source"),
                    ratings=_ratings(trainer, name, mode, sample.id),
                )
            )
        self._drawn = []
        rollout: Rollout | None = getattr(module, "latest", None)
        if rollout is not None and not trainer.testing:
            retained = sum(slot < module.num_retained for slot in module.own_slots) * module.images_per_prompt
            gallery.group = _group(gallery, rollout, retained, step, rollouts)
        if gallery.samples or gallery.group is not None:
            gallery.write()

    def _drawn_page(self, draw: Callable[[], Path], trainer: L.Trainer) -> None:
        path = self._safely(draw, trainer)
        if path is not None and trainer.state.fn == TrainerFn.PREDICTING:  # the others' last lines name it
            rank_zero_info(f"A page to look at: {path}")

    def _safely(self, work: Callable[[], Any], trainer: L.Trainer) -> Any:
        """Does what no run may be lost for: of a failure it says one line, and returns None."""
        from jinja2 import TemplateError

        try:
            return work()
        except (ImportError, LookupError, OSError, RuntimeError, TemplateError, TypeError, ValueError) as error:
            rank_zero_warn(
                f"report.html could not be drawn ({type(error).__name__}: {error}); all else of the run is there."
            )
            return None


def _ratings(trainer: L.Trainer, name: str, mode: str, prompt: str) -> tuple[Rating, ...]:
    """Returns what each benchmark said of a prompt's images: the first of its values."""
    found = []
    for benchmark in trainer.callbacks:  # type: ignore[attr-defined]
        table = benchmark.tables.get((name, mode)) if isinstance(benchmark, Benchmark) else None
        if table is not None and prompt in table.ids:
            row, column = table.ids.index(prompt), benchmark.columns[0]
            scored = float(table.counts[column][row])
            value = float(table.sums[column][row]) / scored if scored else None
            right = bool(value) if column == "correct" and value in (0, 1) else None
            label = benchmark.reward.name if column == "table" else column
            found.append(Rating(label, value, right))
    return tuple(found)


def _group(gallery: Gallery, rollout: Rollout, retained: int, step: int, rollouts: int) -> Group:
    """Keeps the first group that says something: its images differ in reward."""
    size = rollout.rewards.shape[1]
    differs = rollout.advantages.abs().amax(1) > 0
    number = int(differs.int().argmax())
    slots = []
    for slot in range(size):
        row = number * size + slot
        score, valid = rollout.scores[row], bool(rollout.valid[number, slot])
        slots.append(
            Slot(
                file=gallery.keep(rollout.images[row], f"group_{slot:03d}"),
                drawn=rollout.prompts[row],
                retained=slot < retained,
                reward=float(rollout.rewards[number, slot]) if valid else None,
                task=float(score.rl) if valid else None,
                advantage=float(rollout.advantages[number, slot]),
                right=score.detail.get("correct"),
            )
        )
    sample = rollout.samples[number]
    source = None if sample.image is None else gallery.keep(sample.image, "group_source")
    return Group(step, rollouts, sample.prompt, source, tuple(slots))
