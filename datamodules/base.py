"""The prompt record, and loaders that resume exactly and evaluate every prompt once."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeVar, cast

import lightning as L
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from datamodules.chunks import chunks
from datamodules.lazy import Chosen as Chosen
from datamodules.lazy import LazySamples as LazySamples
from datamodules.lazy import Reworded as Reworded
from datamodules.lazy import bare as bare
from datamodules.lazy import spread as spread
from datamodules.sample import PromptSample as PromptSample

_Batch = TypeVar("_Batch")

Stage = Literal["val", "test"]
Derivation = Callable[[Stage, Mapping[str, Sequence[PromptSample]]], dict[str, Sequence[PromptSample]]]
"""Stage and evaluation sets -> further sets, of the same prompts (and ids, which key the noise) in other words."""


class EpochSampler(Sampler[int]):
    """A permutation that depends on the seed and the epoch only, dealt out to the ranks.

    Nothing of it lives in a global generator, so epoch 3 has the same order in a run that was interrupted and in one
    that was not. All ranks get the same number of indices; the uneven tail of this epoch's order is dropped, since a
    rank with one step more than the others would wait for them for ever.

    Args:
        num_samples: size of the data set.
        seed: of the run.
        rank: of this process, below `world`.
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
        """Indices of this rank that the next iteration leaves out; it falls back to 0 once used."""

    def set_epoch(self, epoch: int) -> None:
        """Choose the order; Lightning calls this before every epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Length of a full epoch on this rank, whatever `start` is: Lightning measures epochs by it."""
        return self.num_samples // self.world

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(self.num_samples, generator=generator).tolist()
        share = order[self.rank :: self.world][: len(self)]
        start, self.start = self.start, 0
        yield from share[start:]


class ResumableLoader(DataLoader[PromptSample]):
    """A DataLoader over an `EpochSampler` whose position in the epoch goes into the checkpoint.

    Lightning's own resume restores the batch *counter* but not the data: a plain DataLoader starts the interrupted
    epoch from its beginning, with a new shuffle, so some prompts come twice and others not at all. Lightning saves and
    restores the state of any loader that has `state_dict` and `load_state_dict`; these two are all that is missing.

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

    def put_back(self) -> None:
        """The batch handed out last counts as not yet handed out: its step was never finished."""
        self._batches -= 1

    def state_dict(self) -> dict[str, int]:
        """Position (epoch and batches handed out, on every rank the same) and the settings that give it meaning."""
        epoch, batches = self._resume_from or (self._epoch, self._batches)
        return {"epoch": epoch, "batches": batches, **self._settings()}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue from a saved position at the next iteration.

        Raises:
            ValueError: if a setting changed, because the position then means other prompts.
        """
        for name, value in self._settings().items():
            if state[name] != value:
                raise ValueError(
                    f"Cannot resume the training data: {name} was {state[name]} when the checkpoint was written and "
                    f"is {value} now; resume with {name} {state[name]}, or start a new run from exported weights."
                )
        self._resume_from = (state["epoch"], state["batches"])
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


class PredictBatch(NamedTuple):
    """Prompts of one set to draw together, for `lightning predict`."""

    name: str
    """Name of the set."""
    samples: list[PromptSample]


class PromptDataModule(L.LightningDataModule):
    """Base of all data modules: a subclass says which prompts, this class makes the loaders.

    A batch is a plain list of `PromptSample`. Training shuffles by epoch and drops incomplete batches, so every step
    costs the same number of rollouts. Evaluation keeps the order and gives each rank every world-th prompt, none
    twice: Lightning's own sampler pads with duplicates, which biases scores. A rank may therefore have one batch fewer
    than another, or an empty one: validation steps must not communicate, and metrics reduce by sums, once, at the end.

    Needs `Trainer(use_distributed_sampler=False)` with more than one process; the process count and rank come from the
    Trainer.

    Args:
        batch_size: prompts per process and step (each becomes a group of images).
        eval_batch_size: prompts per process in a validation or test step.
        seed: of the training order.
        num_workers: loader processes; prompts are short, so 0 is usually best.
    """

    published = True
    """Whether the evaluation sets are those that papers report, so that their numbers may stand beside ours."""
    test_images_per_prompt = 1
    """Images of each prompt in `lightning test`, unless `--images.images_per_prompt` says otherwise."""

    def __init__(self, batch_size: int = 1, eval_batch_size: int = 8, seed: int = 42, num_workers: int = 0) -> None:
        super().__init__()
        for name, value in (("batch_size", batch_size), ("eval_batch_size", eval_batch_size)):
            if value < 1:
                raise ValueError(f"data.{name} is {value}, use at least 1.")
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.seed = seed
        self.num_workers = num_workers
        # A process without any evaluation prompt is fine: Lightning stops on it unless told so.
        self.allow_zero_length_dataloader_with_multiple_devices = True
        self.eval_names: list[str] = []
        """Names of the evaluation sets, in the order of the loaders (index = Lightning's `dataloader_idx`)."""
        self.eval_sets: dict[str, Sequence[PromptSample]] = {}
        """The sets themselves, on every rank as a whole."""
        self.derivations: list[Derivation] = []
        """Callbacks add theirs in `setup`, to have other wordings of the prompts evaluated too."""
        self.originals: dict[str, str] = {}
        """Set of other wordings -> the set that it rewords."""
        self.unrefined: set[str] = set()
        """Sets that are drawn without the refiner only."""
        self.predicted: set[tuple[str, str]] = set()
        """Set and id of prompts whose images an earlier `lightning predict` has left; a callback says so."""

    @abstractmethod
    def train_samples(self) -> list[PromptSample]:
        """Prompts to train on."""

    @abstractmethod
    def eval_samples(self) -> dict[str, list[PromptSample]]:
        """Name of each evaluation set and its prompts, for validation."""

    def test_samples(self) -> dict[str, list[PromptSample]]:
        """Likewise for `lightning test`; the validation sets unless a subclass has fresh ones."""
        return self.eval_samples()

    def predict_samples(self) -> dict[str, list[PromptSample]]:
        """Likewise for `lightning predict`; the test sets unless a subclass reads a file for it."""
        return self.test_samples()

    def train_dataloader(self) -> ResumableLoader:
        """Shuffled batches of `batch_size` prompts for this process."""
        samples = self.train_samples()
        rank, world = self._rank_and_world()
        if len(samples) < self.batch_size * world:
            raise ValueError(
                f"{len(samples)} training prompts do not fill one step of {world} process(es) x data.batch_size "
                f"{self.batch_size}: lower data.batch_size or add prompts."
            )
        return ResumableLoader(
            _as_dataset(samples),
            batch_size=self.batch_size,
            sampler=EpochSampler(len(samples), seed=self.seed, rank=rank, world=world),
            drop_last=True,
            num_workers=self.num_workers,
            collate_fn=_as_it_is,
        )

    def val_dataloader(self) -> list[DataLoader[PromptSample]]:
        """One loader per evaluation set, in the order of `eval_names`."""
        return self._eval_loaders("val", self.eval_samples())

    def test_dataloader(self) -> list[DataLoader[PromptSample]]:
        """One loader per test set, in the order of `eval_names`."""
        return self._eval_loaders("test", self.test_samples())

    def predict_dataloader(self) -> DataLoader[PredictBatch]:
        """This process's batches of all sets, less those that are `predicted` to the last prompt.

        The others stay whole: a batch of another make-up could round differently, and continuing an interrupted run
        is to give the images of an unbroken one.
        """
        rank, world = self._rank_and_world()
        batches = []
        for name, samples in self.predict_samples().items():
            share = samples[rank::world]
            for rows in chunks(len(share), self.eval_batch_size):
                batch = PredictBatch(name, share[rows])
                if not all((name, sample.id) in self.predicted for sample in batch.samples):
                    batches.append(batch)
        dataset = cast("Dataset[PredictBatch]", batches)
        return DataLoader(dataset, batch_size=None, num_workers=self.num_workers, collate_fn=_as_it_is)

    def transfer_batch_to_device(self, batch: _Batch, device: torch.device, dataloader_idx: int) -> _Batch:
        """Nothing to move; Lightning's default would try to rewrite the frozen samples and fail."""
        return batch

    def _eval_loaders(
        self, stage: Stage, given: Mapping[str, Sequence[PromptSample]]
    ) -> list[DataLoader[PromptSample]]:
        sets = dict(given)
        for derive in self.derivations:
            sets |= derive(stage, given)
        self.eval_sets, self.eval_names = sets, list(sets)
        rank, world = self._rank_and_world()
        return [self._eval_loader(samples[rank::world]) for samples in sets.values()]

    def _eval_loader(self, share: Sequence[PromptSample]) -> DataLoader[PromptSample]:
        """Batches of a process's share; one empty batch if it has none.

        Lightning skips the evaluation of a process without any batch, and the others would wait for its scores.
        """
        how: dict[str, Any] = {"batch_size": self.eval_batch_size} if len(share) else {"batch_sampler": [[]]}
        return DataLoader(_as_dataset(share), num_workers=self.num_workers, collate_fn=_as_it_is, **how)

    def _rank_and_world(self) -> tuple[int, int]:
        if self.trainer is None:
            return 0, 1
        # Lightning would share the shares out a second time, silently; the setting has no public name.
        if self.trainer.world_size > 1 and self.trainer._accelerator_connector.use_distributed_sampler:
            raise ValueError(
                f"trainer.use_distributed_sampler is true with {self.trainer.world_size} processes, but this data "
                "module already gives each process its share: set trainer.use_distributed_sampler to false."
            )
        return self.trainer.global_rank, self.trainer.world_size


def _as_dataset(samples: Sequence[PromptSample]) -> Dataset[PromptSample]:
    """A list is a map-style dataset in all but its type."""
    return cast("Dataset[PromptSample]", samples)


def _as_it_is(batch: _Batch) -> _Batch:
    """Collate nothing (a named function, because worker processes pickle it)."""
    return batch
