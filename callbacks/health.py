"""`Health`: image statistics and a held-out reward in the log, and rules that stop a run that goes wrong."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from callbacks.benchmark import texts_digest
from callbacks.stop_rules import Limit, Streaks
from datamodules.base import PromptDataModule, bare
from lightning_modules.evaluation import EvaluationBatch
from lightning_modules.image_statistics import rollout_statistics
from lightning_modules.rollout import Rollout
from rewards.arguments import check_minimum
from rewards.base import Reward, RewardBatch
from rewards.calls import guarded, score_each


class Health(L.Callback):
    """Logs statistics of drawn images and a reward that is not trained on; stops by rules.

    Every `every_n_steps` steps `health/<statistic>` of the step's images, over all processes (definitions:
    `lightning_modules.image_statistics`). At every validation `health/held_out/<reward>`, the mean table value over the
    scored images of the evaluation sets, and its `/invalid_share`: fixed prompts and noise, so steps compare.

    A rule that ends a run ends it as `max_steps` would: a last validation, `last.ckpt`, results. Resumed from there it
    goes on until a rule applies again.

    Args:
        every_n_steps: steps between two measurements of a rollout's images.
        held_out: reward that the run is not trained on.
        sets: evaluation sets that `held_out` scores; null is all.
        mode: images of the prompts as they are (`without_pe`) or of rewrites (`with_pe`); null: of rewrites if there
            is a refiner.
        patience: validations in a row without a rise of the held-out reward above its best, after which the run stops;
            null never stops for it.
        min_delta: rise of the held-out reward, in its table unit, that counts.
        limits: name of a logged number (as in `metrics.csv`) -> bounds. With several processes the first one's counts.
    """

    def __init__(
        self,
        every_n_steps: int = 10,
        held_out: Reward | None = None,
        sets: list[str] | None = None,
        mode: Literal["without_pe", "with_pe"] | None = None,
        patience: int | None = None,
        min_delta: float = 0.0,
        limits: dict[str, Limit] | None = None,
    ) -> None:
        check_minimum("Health", 1, every_n_steps=every_n_steps, patience=patience)
        check_minimum("Health", 0, min_delta=min_delta)
        if patience is not None and held_out is None:
            raise ValueError("Health has `patience` but no `held_out` reward to be patient with: give one.")
        self.every_n_steps = every_n_steps
        self.held_out = held_out
        self.sets = sets
        self.mode = mode
        self._stopping: EarlyStopping | None = None
        self._prompts: str | None = None
        if patience is not None:
            self._stopping = EarlyStopping(
                self._held_out_name, min_delta, patience, mode="max", check_finite=False, check_on_train_epoch_end=False
            )
        self._streaks = Streaks(limits or {})
        self._sums = torch.zeros(3, dtype=torch.float64)  # of the held-out table values, valid scores, images
        self._ending = False
        self._warned_unseen = False

    @property
    def state_key(self) -> str:
        """Key of this callback's state in checkpoints: one for each held-out reward."""
        return "Health" if self.held_out is None else f"Health by {self.held_out.name}"

    @property
    def _held_out_name(self) -> str:
        assert self.held_out is not None
        return f"health/held_out/{self.held_out.name}"

    # --- hooks ------------------------------------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Loads the held-out reward.

        Raises:
            ValueError: if the run is trained on it, or there is no refiner for `with_pe`.
        """
        if self.held_out is None or stage not in ("fit", "validate"):
            return
        if self.mode == "with_pe" and getattr(pl_module, "language", None) is None:
            raise ValueError("Health has mode=with_pe, but there is no refiner: use without_pe.")
        with guarded(self.held_out.name):
            self.held_out.load()
        trained = {reward.version for reward in _all_parts(getattr(pl_module, "reward", None))}
        if self.held_out.version in trained:
            raise ValueError(
                f"Health has the held-out reward {self.held_out.version!r}, which this run is trained on: give another."
            )

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Switches the rules on."""
        self._ending = self._warned_unseen = False

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measures the step's images and applies the limits to its logged numbers."""
        step = trainer.fit_loop.epoch_loop.total_batch_idx  # the x of the step's own numbers in the log, from 0
        rollout: Rollout | None = getattr(pl_module, "latest", None)
        statistics: dict[str, float] = {}
        if rollout is not None and step % self.every_n_steps == 0:
            found = rollout_statistics(rollout.images, rollout.rewards.shape[1])
            means = trainer.strategy.reduce(
                torch.tensor(list(found.values()), device=pl_module.device), reduce_op="mean"
            )
            statistics = {f"health/{name}": mean for name, mean in zip(found, means.tolist(), strict=True)}
            # Straight to the loggers: `log` would repeat the numbers in every step until the next look.
            for logger in trainer.loggers:
                logger.log_metrics(statistics, step=step)
            trainer.callback_metrics.update({name: torch.tensor(value) for name, value in statistics.items()})
        self._apply_limits(trainer, {**_logged_now(trainer), **statistics})

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Resets the sums of the held-out reward.

        Raises:
            ValueError: if `sets` names an unknown set.
        """
        self._sums = torch.zeros(3, dtype=torch.float64)
        names = getattr(getattr(trainer, "datamodule", None), "eval_names", [])
        unknown = set(self.sets or []).difference(names)
        if self.held_out is not None and unknown:
            raise ValueError(f"Health.sets has {min(unknown)!r}, but the evaluation sets are {', '.join(names)}.")
        if self._stopping is not None:
            data: PromptDataModule = trainer.datamodule  # type: ignore[attr-defined]
            sets = {name: bare(data.eval_sets[name]) for name in self.sets or names}
            digest = texts_digest(f"{name} {s.id} {s.prompt}" for name, samples in sets.items() for s in samples)
            if self._prompts not in (None, digest):  # a resumed run with other prompts: their scores are not comparable
                self._stopping.best_score, self._stopping.wait_count = torch.tensor(-math.inf), 0
            self._prompts = digest

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Scores one batch by the held-out reward; a set without images of the mode is left out."""
        drawn: EvaluationBatch = outputs
        if self.held_out is None or not drawn.samples or (self.sets is not None and drawn.name not in self.sets):
            return
        mode = self.mode or ("with_pe" if getattr(pl_module, "language", None) is not None else "without_pe")
        for images in drawn.images.get(mode, []):
            scores = score_each(self.held_out, RewardBatch(drawn.samples, images))
            valid = [score.table for score in scores if score.valid]
            self._sums += torch.tensor([math.fsum(valid), len(valid), len(scores)], dtype=torch.float64)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Logs the held-out reward."""
        if self.held_out is None:
            return
        # Double precision, which not every accelerator has; processes on GPUs reduce there.
        device = pl_module.device if pl_module.device.type == "cuda" else torch.device("cpu")
        sums = trainer.strategy.reduce(self._sums.to(device), reduce_op="sum")
        total, valid, images = sums.tolist()
        values = {
            self._held_out_name: total / valid if valid else math.nan,
            f"{self._held_out_name}/invalid_share": 1 - valid / images if images else math.nan,
        }
        # Equal on all ranks already, and said to be synced so that `monitor` of other callbacks may name it.
        pl_module.log_dict(values, sync_dist=True)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Applies the rules to the numbers that the validation has logged."""
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking or self._ending or trainer.should_stop:
            return
        now = _logged_now(trainer)
        if self._stopping is not None and not math.isnan(value := float(now[self._held_out_name])):
            self._stopping.on_validation_end(trainer, pl_module)
            if trainer.should_stop:
                rank_zero_info(
                    f"Health ends the run after step {trainer.global_step}: {self._held_out_name} was {value:.4g}, and "
                    f"has not risen by more than {self._stopping.min_delta:g} (`min_delta`) above its best, "
                    f"{float(self._stopping.best_score):.4g}, for {self._stopping.wait_count} validations (`patience`)."
                )
        self._apply_limits(trainer, now)
        if trainer.global_step > 0:
            self._warn_of_unseen(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Switches the rules off for the last validation, which comes after this hook."""
        self._ending = True
        self._warn_of_unseen(trainer)

    def state_dict(self) -> dict[str, Any]:
        """Returns the rules' counts, so that a resumed run stops when the unbroken one would."""
        state: dict[str, Any] = {"streaks": dict(self._streaks.counts)}
        if self._stopping is not None:
            best, waited = float(self._stopping.best_score), self._stopping.wait_count
            state |= {"best": best, "waited": waited, "prompts": self._prompts}
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the rules' counts; limits and patience stay those of the configuration."""
        self._streaks.counts |= {k: v for k, v in state_dict["streaks"].items() if k in self._streaks.limits}
        if self._stopping is not None and "best" in state_dict:
            self._stopping.best_score = torch.tensor(state_dict["best"])
            self._stopping.wait_count = state_dict["waited"]
            self._prompts = state_dict["prompts"]

    # --- helpers ----------------------------------------------------------------------------------------------------

    def _apply_limits(self, trainer: L.Trainer, values: Mapping[str, Any]) -> None:
        """Stops all ranks together if a limit is broken on the first, whose numbers are those in `metrics.csv`."""
        if not self._streaks.limits or trainer.should_stop:
            return
        stop = False
        for breach in self._streaks.update(values) if trainer.is_global_zero else []:
            if breach.limit.action == "stop":
                rank_zero_info(f"Health ends the run after step {trainer.global_step}: {breach.message} (`limits`).")
                stop = True
            else:
                rank_zero_warn(f"Health at step {trainer.global_step}: {breach.message} (`limits`).")
        trainer.should_stop = trainer.strategy.reduce_boolean_decision(stop, all=False)

    def _warn_of_unseen(self, trainer: L.Trainer) -> None:
        """Warns once of limits on names that were never logged: a misspelt rule would never apply."""
        if self._streaks.unseen and not self._warned_unseen:
            hints = {name: difflib.get_close_matches(name, trainer.logged_metrics, 1) for name in self._streaks.unseen}
            names = [name + "".join(f" (did you mean {hint}?)" for hint in hints[name]) for name in sorted(hints)]
            rank_zero_warn(f"Health.limits names what has not been logged so far: {', '.join(names)}.")
        self._warned_unseen = True


def _logged_now(trainer: L.Trainer) -> Mapping[str, Any]:
    """Returns the metrics of the running loop, as the loggers will get them.

    The public `logged_metrics` mixes in what earlier validations left, which would count again in every step.
    """
    return trainer._logger_connector.metrics["log"]


def _all_parts(reward: Reward | None) -> Iterator[Reward]:
    """Yields a reward and, nested, the rewards that it routes to or sums up."""
    if reward is not None:
        yield reward
        for part in getattr(reward, "rewards", {}).values():
            yield from _all_parts(part)
