"""`Dashboard`: TensorBoard charts that compare runs, curves over rollouts, and a row of hyperparameters."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import lightning as L
from torch.utils.tensorboard.summary import hparams

from callbacks.benchmark import Benchmark
from callbacks.diversity import ARMS, Diversity
from callbacks.health import Health
from callbacks.robustness import PromptRobustness, paired_difference
from callbacks.samples import tensorboards
from datamodules.base import PromptDataModule
from lightning_modules.evaluation import MODES
from lightning_modules.prompt_rl import PromptRL
from lightning_modules.run_folder import mode_of

BY_ROLLOUTS = "by_rollouts"
REWARDS = "reward(/[^/]+)?"
"""Pattern of the names that a step's rewards are logged under: the total, and each scorer's native value."""
TOTAL = "total reward (with format)"
STATISTICS = ("blank_share", "flat_area", "saturation", "duplicates")
"""Statistics `health/...` that show a collapse; the others are under Time Series."""

Chart = list[Any]
"""`["Multiline", [regular expressions of tags]]`, as `add_custom_scalars` takes it."""
Layout = dict[str, dict[str, Chart]]
"""Category -> title -> chart."""


class Dashboard(L.Callback):
    """Prepares a fit's TensorBoard for `tensorboard --logdir runs`, where it stands beside other runs.

    - Custom Scalars: a layout of what the run has (see `layout`).
    - `by_rollouts/reward`, `by_rollouts/reward/<name>`, `by_rollouts/val/<set>/<mode>` and
      `by_rollouts/val/robustness/<benchmark>/<set>/<mode>`: reward, its scorers, headline scores, and differences of
      other wordings to their originals, with images drawn for training in the place of steps. Runs with other group or
      batch sizes, or more processes, compare at equal x.
    - HParams: a row for the run, whose metrics are its curves' last values.

    Every fit of ours adds it; where there are no agents it does nothing.
    """

    def __init__(self) -> None:
        self._laid_out: Layout | None = None

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Forgets the layout of an earlier fit."""
        self._laid_out = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Writes the layout and the hyperparameters; the evaluation sets are known by now."""
        if not isinstance(pl_module, PromptRL) or not trainer.is_global_zero:
            return
        self._lay_out(trainer, pl_module)
        for logger in tensorboards(trainer):
            # Without torch's `experiment`, of which TensorBoard reads one run's alone: a flow-only run's would hide the
            # scores with PE of all others. So it takes the columns from all runs, and puts those that differ first.
            _, start, _ = hparams({"experiment": logger.name} | hyperparameters(trainer, pl_module), {})
            logger.experiment.file_writer.add_summary(start)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Logs the rewards in those steps in which the loggers get them (Lightning has no public name for that)."""
        if isinstance(pl_module, PromptRL) and trainer._logger_connector.should_update_logs:
            logged = trainer.callback_metrics
            rewards = {tag: float(value) for tag, value in logged.items() if re.fullmatch(REWARDS, tag)}
            _log(trainer, rewards, pl_module.num_rollouts)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Logs the headline scores, and the differences of paraphrased sets to their originals, over rollouts."""
        if not isinstance(pl_module, PromptRL) or trainer.sanity_checking or not trainer.is_global_zero:
            return
        self._lay_out(trainer, pl_module)
        originals = _data(trainer).originals
        values: dict[str, float] = {}
        for benchmark in _all(trainer, Benchmark):
            for name, mode in benchmark.tables:
                if name not in originals:
                    tag = f"val/{benchmark.key(name)}/{mode}"
                    values[tag] = float(trainer.callback_metrics[tag])
                elif (originals[name], mode) in benchmark.tables:
                    pair = paired_difference(benchmark, (name, mode), (originals[name], mode), resamples=1)
                    values[f"val/robustness/{benchmark.title}/{name}/{mode}"] = pair.scores["headline"]
        _log(trainer, values, pl_module.num_rollouts)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Marks the run as finished in HParams."""
        if isinstance(pl_module, PromptRL) and trainer.is_global_zero:
            _, _, end = hparams({}, {})
            for logger in tensorboards(trainer):
                logger.experiment.file_writer.add_summary(end)

    def _lay_out(self, trainer: L.Trainer, module: PromptRL) -> None:
        """Writes the layout once, and again if evaluation sets have come to it: the last one counts."""
        now = layout(trainer, refines=module.language is not None)
        if now != self._laid_out:
            self._laid_out = now
            for logger in tensorboards(trainer):
                logger.experiment.add_custom_scalars(now)


def layout(trainer: L.Trainer, *, refines: bool) -> Layout:
    """Returns the charts of a run.

    TensorBoard merges the layouts of all runs: category by category, equal charts once, in the first run's order. A run
    has one colour, so each mode has a chart of its own. All runs have all categories, since one that the first lacks is
    merged wrongly from the third on (`custom_scalars_plugin.py` of TensorBoard 2.21). The task reward comes first, as
    it is measured alike in all runs; the total, which has the format reward in it where there is a refiner, last.

    Args:
        trainer: knows the callbacks and the evaluation sets.
        refines: True if the run has a refiner.
    """
    originals = _data(trainer).originals
    modes = MODES if refines else MODES[:1]
    own: list[str] = []
    derived: list[str] = []
    by_rollouts: list[str] = []
    differences: list[str] = []
    for benchmark in _all(trainer, Benchmark):
        for name in _data(trainer).eval_sets:
            if not benchmark.scores_set(_data(trainer), name):
                continue
            tags = [f"val/{benchmark.key(name)}/{mode}" for mode in modes]
            if name in originals:
                derived += tags
                prefix = f"val/robustness/{benchmark.title}/{name}"
                differences += [f"{BY_ROLLOUTS}/{prefix}/{mode}" for mode in modes]
                if _all(trainer, PromptRobustness):
                    derived += [f"{prefix}/{end}" for end in (*modes, *(["against_pe"] if refines else []))]
            else:
                own += tags
                by_rollouts += [f"{BY_ROLLOUTS}/{tag}" for tag in tags]
    diversity = _charts(["group/image_similarity", "group/zero_std_share", *["refine/distinct"] * refines])
    for probe in _all(trainer, Diversity):
        if probe.every_n_validations is not None:
            for name in probe.sets or [name for name in _data(trainer).eval_sets if name not in originals][:1]:
                tags = [f"{arm}/image_similarity" for arm in ARMS]
                diversity[f"val/{probe.name}/{name}"] = _chart(f"val/{probe.name}/{name}", tags)
    health: dict[str, Chart] = {}
    for watch in _all(trainer, Health):
        if watch.held_out is not None:
            health |= _charts([f"health/held_out/{watch.held_out.name}"])
        health |= _charts(f"health/{name}" for name in STATISTICS)
    learned = ("flow/kl", "flow/grad_norm", *(("language/kl", "language/grad_norm", "language/entropy") * refines))
    health |= _charts(f"train/{name}" for name in learned)
    return {
        "Reward": {"task reward": _scorers(""), **_charts(["format"] * refines)},
        "Benchmarks": _charts(own),
        "By rollouts": {
            "task reward by rollouts": _scorers(f"{BY_ROLLOUTS}/"),
            **_charts(by_rollouts + differences),
        },
        "Other wordings": _charts(derived),
        "Diversity": diversity,
        "Health": health,
        # A category of its own: within another, charts that later runs add would come after it.
        "Total reward": {TOTAL: _chart("reward"), f"{TOTAL} by rollouts": _chart(f"{BY_ROLLOUTS}/reward")},
    }


def hyperparameters(trainer: L.Trainer, module: PromptRL) -> dict[str, int | float | str]:
    """Returns the settings that tell runs of one experiment apart; a frozen agent has learning rate and KL weight 0."""
    flow, sampling = module.flow, module.flow.sampling
    language = module.language if module.language is not None and module.language.trained else None
    return {
        "agents": mode_of(flow.trained, None if module.language is None else module.language.trained),
        "flow.learning_rate": flow.learning_rate or 0.0,
        "flow.kl_weight": flow.kl_weight if flow.trained else 0.0,
        "language.learning_rate": 0.0 if language is None else language.learning_rate or 0.0,
        "language.kl_weight": 0.0 if language is None else language.kl_weight,
        "group_size": module.group_size,
        "num_retained": module.num_retained,
        "images_per_prompt": module.images_per_prompt,
        "batch_size": _data(trainer).batch_size,
        "processes": trainer.world_size,
        "updates_per_rollout": module.updates_per_rollout,
        "num_steps": sampling.num_steps,
        "sde_steps": sampling.sde_steps if isinstance(sampling.sde_steps, int) else str(sampling.sde_steps),
        "sde_type": sampling.sde_type,
        "noise_level": sampling.noise_level,
        "clip_range": sampling.clip_range,
        "seed": module.seed,
    }


def _chart(prefix: str, ends: tuple[str, ...] | list[str] = ()) -> Chart:
    """Returns a chart of the tag `prefix`, or of the tags `<prefix>/<end>`."""
    tags = [f"{prefix}/{end}" for end in ends] or [prefix]
    return ["Multiline", [f"{re.escape(tag)}$" for tag in tags]]


def _charts(tags: Iterable[str]) -> dict[str, Chart]:
    """Returns a chart for each tag, which is its title."""
    return {tag: _chart(tag) for tag in tags}


def _scorers(prefix: str) -> Chart:
    """Returns the chart of each scorer's native value, below which the total reward is not."""
    return ["Multiline", [f"{prefix}reward/[^/]+$"]]


def _log(trainer: L.Trainer, values: dict[str, float], rollouts: int) -> None:
    for logger in tensorboards(trainer):
        logger.log_metrics({f"{BY_ROLLOUTS}/{tag}": value for tag, value in values.items()}, step=rollouts)


def _all(trainer: L.Trainer, kind: type[Any]) -> list[Any]:
    return [callback for callback in trainer.callbacks if isinstance(callback, kind)]  # type: ignore[attr-defined]


def _data(trainer: L.Trainer) -> PromptDataModule:
    data: PromptDataModule = trainer.datamodule  # type: ignore[attr-defined]
    return data
