"""Training loader that shuffles by seed and epoch and resumes in the middle of an epoch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch.utils.data import DataLoader, Sampler

from datamodules.sample import PromptSample

STEP_SIZE = ("number of processes", "batch_size")
"""Entries of a loader's state whose product is the number of prompts of a step."""


class EpochSampler(Sampler[int]):
    """Sampler whose permutation depends on seed and epoch only and is dealt out to the ranks.

    No global generator takes part, so epoch 3 has the same order in a run that was interrupted and in one
    that was not. All ranks get the same number of indices; the uneven tail of this epoch's order is dropped, since a
    rank with one step more than the others would wait for them for ever.

    Args:
        num_samples: size of the data set.
        seed: seed of the run.
        rank: rank of this process, below `world`.
        world: number of processes.
    """

    def __init__(self, num_samples: int, *, seed: int, rank: int = 0, world: int = 1) -> None:
        assert 0 <= rank < world
        self.num_samples = num_samples
        self.seed = seed
        self.rank = rank
        self.world = world
        self.epoch = 0
        self.start = 0
        """Number of this rank's indices that the next iteration skips; it falls back to 0 once used."""

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order; Lightning calls this before every epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Number of indices of a full epoch on this rank, whatever `start` is: Lightning measures epochs by it."""
        return self.num_samples // self.world

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(self.num_samples, generator=generator).tolist()
        share = order[self.rank :: self.world][: len(self)]
        start, self.start = self.start, 0
        yield from share[start:]


class ResumableLoader(DataLoader[PromptSample]):
    """DataLoader over an `EpochSampler` whose position in the epoch goes into the checkpoint.

    Lightning's own resume restores the batch *counter* but not the data: a plain DataLoader starts the interrupted
    epoch from its beginning, with a new shuffle, so some prompts come twice and others not at all. Lightning saves and
    restores the state of any loader that has `state_dict` and `load_state_dict`, which this class adds.

    The constructor is DataLoader's, because Lightning may have to build the loader anew.
    """

    _epoch = 0
    _batches = 0
    _resume_from: tuple[int, int] | None = None

    def __iter__(self) -> Iterator[list[PromptSample]]:  # type: ignore[override]
        # A generator on purpose: its body runs at the first batch, when Lightning has restored the state and set the
        # epoch; Lightning creates the iterator before it does either.
        sampler = self._epoch_sampler()
        epoch, batches = self._resume_from or (sampler.epoch, 0)
        self._resume_from = None
        # Another epoch than the saved one means that the saved one was complete (`limit_train_batches` may have made
        # it shorter than this loader), so nothing is to be left out.
        skip = batches if epoch == sampler.epoch else 0
        self._epoch, self._batches = sampler.epoch, skip
        assert self.batch_size is not None
        sampler.start = skip * self.batch_size
        for batch in super().__iter__():
            self._batches += 1
            yield batch

    def first_batch(self) -> list[PromptSample]:
        """Returns the epoch's first batch, which counts as not yet handed out."""
        return [self.dataset[row] for row in islice(self._epoch_sampler(), self.batch_size)]

    def batch_after(self, samples: Sequence[PromptSample]) -> list[PromptSample]:
        """Returns the epoch's batch behind the current one, which counts as not yet handed out; [] at the epoch's end.

        Args:
            samples: the current batch: the last one handed out or, before an epoch's first one is, that one.
        """
        assert self.batch_size is not None
        rows = list(self._epoch_sampler())
        for number in (self._batches, self._batches + 1):
            found = rows[number * self.batch_size : (number + 1) * self.batch_size]
            batch = [] if self.drop_last and len(found) < self.batch_size else [self.dataset[row] for row in found]
            if [one.id for one in batch] != [one.id for one in samples]:
                return batch
        return []

    def put_back(self) -> None:
        """Counts the last batch as not yet handed out, because its step was never finished."""
        self._batches -= 1

    def state_dict(self) -> dict[str, int]:
        """Returns epoch and number of batches handed out (the same on every rank), and the settings they depend on."""
        epoch, batches = self._resume_from or (self._epoch, self._batches)
        return {"epoch": epoch, "batches": batches, **self._settings()}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continues from a saved position at the next iteration.

        Raises:
            ValueError: if a setting changed, because the position then means other prompts.
        """
        own = self._settings()
        for name in ("number of training prompts", "data seed"):
            value = own[name]
            if state[name] != value:
                raise ValueError(
                    f"Cannot resume the training data: {name} was {state[name]} when the checkpoint was written and "
                    f"is {value} now; resume with {name} {state[name]}, or start a new run from exported weights."
                )
        if any(state[name] != own[name] for name in STEP_SIZE):
            rank_zero_info(f"Prompts a step from now on: {prompts_per_step(own)}, before {prompts_per_step(state)}.")
        self._resume_from = (state["epoch"], resumed_batches(state, prompts_per_step(own)))
        self._epoch_sampler().set_epoch(state["epoch"])

    def _settings(self) -> dict[str, int]:
        sampler = self._epoch_sampler()
        assert self.batch_size is not None
        return {
            "number of training prompts": sampler.num_samples,
            "number of processes": sampler.world,
            "batch_size": self.batch_size,
            "data seed": sampler.seed,
        }

    def _epoch_sampler(self) -> EpochSampler:
        if not isinstance(self.sampler, EpochSampler):
            raise ValueError(
                f"The Trainer replaced the training sampler by {type(self.sampler).__name__}, which cannot resume: "
                "set trainer.use_distributed_sampler to false and trainer.overfit_batches to 0."
            )
        return self.sampler


def prompts_per_step(position: Mapping[str, int]) -> int:
    """Returns the number of prompts that all processes take together in a step, by a loader's state."""
    return math.prod(position[name] for name in STEP_SIZE)


def resumed_batches(position: Mapping[str, int], size: int) -> int:
    """Returns how many steps of `size` prompts an epoch's first steps were that a loader's state counts, cut short."""
    return position["batches"] * prompts_per_step(position) // size


def place_in_epoch(fit_loop: dict[str, Any], size: int | None = None) -> None:
    """Sets a saved fit loop's counters to the position of its `ResumableLoader`, from which a resumed run goes on.

    Lightning counts an epoch as whole in which `max_steps`, or a rule that stops training, ends a run, and a validation
    that a checkpoint was saved after shifts its steps by one. Here the counters become those of a checkpoint that was
    saved right after its last batch. Loops over other loaders are left as they are.

    Args:
        fit_loop: `checkpoint["loops"]["fit_loop"]`; changed in place.
        size: prompts that the processes take together in a step from now on; None is as before.
    """
    position = next(iter(fit_loop["state_dict"].get("combined_loader", [])), None)
    batch = fit_loop["epoch_loop.batch_progress"]
    finished = batch["total"]["processed"]
    if not isinstance(position, dict) or "batches" not in position or not finished:
        return
    epoch, batches = position["epoch"], resumed_batches(position, size or prompts_per_step(position))
    if batch["is_last_batch"] and batch["current"]["processed"] == batch["current"]["ready"]:
        epoch, batches = epoch + 1, 0
        position.update(epoch=epoch, batches=batches)  # so that it holds where this run is saved before its first step
    begun = epoch + (batches > 0)
    for epochs in (fit_loop["epoch_progress"]["total"], fit_loop["epoch_progress"]["current"]):
        epochs.update(ready=begun, started=begun, processed=epoch, completed=epoch)
    # As many batches as all epochs had are no fewer than the last one has: Lightning then begins to count anew.
    for steps, number in ((batch["total"], finished), (batch["current"], batches or finished)):
        steps.update(ready=number, started=number, processed=number, completed=number - 1)
    batch["is_last_batch"] = False
    fit_loop["epoch_loop.state_dict"]["_batches_that_stepped"] = finished - 1
    validation = fit_loop["epoch_loop.val_loop.batch_progress"]  # none is to be finished
    for part in (validation["total"], validation["current"]):
        part.update(dict.fromkeys(part, part["ready"]))
