"""Base class of all data modules: its loaders resume exactly and evaluate every prompt once."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, Literal, NamedTuple, TypeVar, cast

import lightning as L
import torch
from torch.utils.data import DataLoader, Dataset

from datamodules.chunks import chunks
from datamodules.lazy import Chosen as Chosen
from datamodules.lazy import LazySamples as LazySamples
from datamodules.lazy import Reworded as Reworded
from datamodules.lazy import bare as bare
from datamodules.lazy import contents as contents
from datamodules.lazy import spread as spread
from datamodules.resumable import EpochSampler, ResumableLoader
from datamodules.sample import PromptSample as PromptSample
from datamodules.seed import run_seed as run_seed

_Batch = TypeVar("_Batch")

Stage = Literal["val", "test"]
Derivation = Callable[[Stage, Mapping[str, Sequence[PromptSample]]], dict[str, Sequence[PromptSample]]]
"""Function of the stage and the evaluation sets that returns further sets: the same prompts in other words.

The samples keep their ids, which key the evaluation noise.
"""


class PredictBatch(NamedTuple):
    """Prompts of one set whose images `lightning predict` draws together."""

    name: str
    """Name of the set."""
    samples: list[PromptSample]


class PromptDataModule(L.LightningDataModule):
    """Base class of all data modules: a subclass lists the prompts, this class makes the loaders.

    A batch is a plain list of `PromptSample`. Training shuffles by epoch and drops incomplete batches, so every step
    costs the same number of rollouts. Evaluation keeps the order and gives each rank every world-th prompt, none
    twice: Lightning's own sampler pads with duplicates, which biases scores. A rank may therefore have one batch fewer
    than another, or an empty one: validation steps must not communicate, and metrics reduce by sums, once, at the end.

    Needs `Trainer(use_distributed_sampler=False)` with more than one process; the process count and rank come from the
    Trainer.

    Args:
        batch_size: prompts per process and step (each becomes a group of images).
        eval_batch_size: prompts per process in a validation or test step.
        seed: seed of the training order; null follows `seed_everything`.
        num_workers: loader processes; prompts are short, so 0 is usually best.
    """

    test_images_per_prompt = 1
    """Least number of images of each prompt in `lightning test`, unless `--images.images_per_prompt` says otherwise."""

    def __init__(
        self, batch_size: int = 1, eval_batch_size: int = 8, seed: int | None = None, num_workers: int = 0
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("batch_size", batch_size, 1), ("eval_batch_size", eval_batch_size, 1), ("num_workers", num_workers, 0)
        ):  # fmt: skip
            if value < least:
                raise ValueError(f"data.{name} is {value}, use at least {least}.")
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.seed = run_seed(seed)
        self.num_workers = num_workers
        # A process without any evaluation prompt is fine, but Lightning stops there without this setting.
        self.allow_zero_length_dataloader_with_multiple_devices = True
        self.processes_per_group = 1
        """Neighbouring processes that get the same training prompts; the model sets it."""
        self.eval_names: list[str] = []
        """Names of the evaluation sets, in the order of the loaders (index = Lightning's `dataloader_idx`)."""
        self.eval_sets: dict[str, Sequence[PromptSample]] = {}
        """Name of each evaluation set -> all of its prompts, the same on every rank."""
        self.derivations: list[Derivation] = []
        """Functions that callbacks add in `setup` to have other wordings of the prompts evaluated too."""
        self.originals: dict[str, str] = {}
        """Name of a set of other wordings -> name of the set that it rewords."""
        self.unrefined: set[str] = set()
        """Names of sets that are drawn without the refiner only."""
        self.predicted: set[tuple[str, str]] = set()
        """Set and id of each prompt whose images an earlier `lightning predict` has left; a callback fills it in."""

    @abstractmethod
    def train_samples(self) -> list[PromptSample]:
        """Returns the training prompts."""

    @cached_property
    def training_set(self) -> list[PromptSample]:
        """The training prompts, which are drawn or read once for all who ask."""
        return self.train_samples()

    @abstractmethod
    def eval_samples(self) -> dict[str, list[PromptSample]]:
        """Returns the name and the prompts of each validation set."""

    def test_samples(self) -> dict[str, list[PromptSample]]:
        """Returns the name and the prompts of each test set: the validation sets unless a subclass has fresh ones."""
        return self.eval_samples()

    def predict_samples(self) -> dict[str, list[PromptSample]]:
        """Returns the sets for `lightning predict`: the test sets unless a subclass reads a file for it."""
        return self.test_samples()

    def train_dataloader(self) -> ResumableLoader:
        """Makes the loader of this process's shuffled batches of `batch_size` prompts.

        Raises:
            ValueError: if there are too few prompts for one step.
        """
        samples = self.training_set
        rank, world = (number // self.processes_per_group for number in self._rank_and_world())
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
        """Makes one loader for each validation set, in the order of `eval_names`."""
        return self._eval_loaders("val", self.eval_samples())

    def test_dataloader(self) -> list[DataLoader[PromptSample]]:
        """Makes one loader for each test set, in the order of `eval_names`."""
        return self._eval_loaders("test", self.test_samples())

    def predict_dataloader(self) -> DataLoader[PredictBatch]:
        """Makes the loader of this process's batches of all sets; batches that are all `predicted` are left out.

        The others stay whole: a batch of another make-up could round differently, and continuing an interrupted run
        is to give the images of an unbroken one.
        """
        rank, world = self._rank_and_world()
        sets = self.predict_samples()
        batches = self._unpredicted(sets, rank, world)
        # Lightning would let a process without any batch leave before the others, which would wait for it.
        if not batches and any(self._unpredicted(sets, other, world) for other in range(world)):
            batches = [PredictBatch(next(iter(sets)), [])]
        dataset = cast("Dataset[PredictBatch]", batches)
        return DataLoader(dataset, batch_size=None, num_workers=self.num_workers, collate_fn=_as_it_is)

    def _unpredicted(self, sets: Mapping[str, list[PromptSample]], rank: int, world: int) -> list[PredictBatch]:
        """Returns a process's batches of all sets without those that are all `predicted`."""
        batches = []
        for name, samples in sets.items():
            share = samples[rank::world]
            ids = [sample.id for sample in bare(share)]
            for rows in chunks(len(share), self.eval_batch_size):
                if not all((name, one) in self.predicted for one in ids[rows]):
                    batches.append(PredictBatch(name, share[rows]))
        return batches

    def transfer_batch_to_device(self, batch: _Batch, device: torch.device, dataloader_idx: int) -> _Batch:
        """Returns the batch as it is: Lightning's default would try to rewrite the frozen samples and fail."""
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
        """Makes the loader of a process's share of a set; a share without prompts becomes one empty batch.

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
    """Casts a sequence to PyTorch's map-style data set, which it is in all but its type."""
    return cast("Dataset[PromptSample]", samples)


def _as_it_is(batch: _Batch) -> _Batch:
    """Collates nothing (a named function, because worker processes pickle it)."""
    return batch
