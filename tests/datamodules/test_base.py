"""Order, sharding and exact resume of the prompt loaders, alone and under a real Trainer."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import SequentialSampler

from datamodules.base import PromptDataModule, PromptSample
from datamodules.resumable import EpochSampler, ResumableLoader


class Numbers(PromptDataModule):
    """`num` training prompts named by their number, and two evaluation sets."""

    def __init__(self, num: int = 11, **kwargs: Any) -> None:
        super().__init__(**{"batch_size": 2, "eval_batch_size": 2, "seed": 7, **kwargs})
        self.num = num

    def train_samples(self) -> list[PromptSample]:
        return [PromptSample(str(i), f"prompt {i}", "t", {}) for i in range(self.num)]

    def eval_samples(self) -> dict[str, list[PromptSample]]:
        return {"large": self.train_samples(), "small": self.train_samples()[:1]}

    def attach(self, rank: int, world: int, use_distributed_sampler: bool = False) -> Numbers:
        connector = SimpleNamespace(use_distributed_sampler=use_distributed_sampler)
        self.trainer = SimpleNamespace(  # type: ignore[assignment]
            global_rank=rank, world_size=world, _accelerator_connector=connector
        )
        return self


def ids(batches: Any) -> list[list[int]]:
    return [[int(sample.id) for sample in batch] for batch in batches]


def epochs(loader: ResumableLoader, which: range) -> list[list[int]]:
    order = []
    for epoch in which:
        loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        order += ids(loader)
    return order


def test_epochs_are_permutations_that_differ() -> None:
    sampler = EpochSampler(50, seed=3)
    first = list(sampler)
    assert list(sampler) == first
    sampler.set_epoch(1)
    second = list(sampler)
    assert sorted(first) == sorted(second) == list(range(50))
    assert first != second and first != list(range(50))
    assert list(EpochSampler(50, seed=4)) != first


def test_order_ignores_global_randomness() -> None:
    torch.manual_seed(0)
    first = list(EpochSampler(50, seed=3))
    torch.manual_seed(1)
    assert list(EpochSampler(50, seed=3)) == first


def test_training_ranks_are_disjoint_equal_and_drop_the_tail() -> None:
    shares = [list(EpochSampler(11, seed=3, rank=rank, world=3)) for rank in range(3)]
    assert [len(share) for share in shares] == [3, 3, 3] == [len(EpochSampler(11, seed=3, world=3))] * 3
    union = {index for share in shares for index in share}
    assert len(union) == 9
    assert union == set(list(EpochSampler(11, seed=3))[:9])  # the tail of this epoch's order is what is left out


@pytest.mark.parametrize(("done", "num_workers"), [(1, 0), (3, 0), (5, 0), (7, 0), (7, 1)])
def test_resume_equals_the_uninterrupted_order(done: int, num_workers: int) -> None:
    """5 batches an epoch: stops within the first epoch, exactly at its end, and within the second."""
    whole = epochs(Numbers().train_dataloader(), range(3))
    assert len(whole) == 15

    loader = Numbers(num_workers=num_workers).train_dataloader()
    seen: list[list[int]] = []
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        for batch in loader:
            seen += ids([batch])
            if len(seen) == done:
                break
        if len(seen) == done:
            break
    state = loader.state_dict()

    resumed = Numbers(num_workers=num_workers).train_dataloader()
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state  # a checkpoint before the first new batch loses nothing
    assert len(resumed) == 5
    assert seen + epochs(resumed, range(state["epoch"], 3)) == whole


def test_resume_skips_once_only() -> None:
    loader = Numbers().train_dataloader()
    loader.load_state_dict({**loader.state_dict(), "batches": 4})
    assert [len(ids(loader)), len(ids(loader))] == [1, 5]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"num": 12}, "number of training prompts was 11 when the checkpoint was written and is 12 now"),
        ({"seed": 8}, "data seed was 7 .* is 8 now"),
    ],
)
def test_resume_with_other_settings_is_an_error(changed: dict[str, int], message: str) -> None:
    state = Numbers().train_dataloader().state_dict()
    with pytest.raises(ValueError, match=message):
        Numbers(**changed).train_dataloader().load_state_dict(state)


@pytest.mark.parametrize(("batch_size", "processes", "left"), [(2, 1, 3), (1, 2, 3), (3, 1, 2), (2, 2, 1), (1, 1, 7)])
def test_resume_with_another_step_size_goes_on_in_the_epoch(batch_size: int, processes: int, left: int) -> None:
    """Two steps of two prompts are done: no prompt of a whole new step of theirs comes again, and none is left out."""
    state = {**Numbers().train_dataloader().state_dict(), "batches": 2}
    order = sum(ids(Numbers(batch_size=1).train_dataloader()), [])
    loaders = [Numbers(batch_size=batch_size).attach(rank, processes).train_dataloader() for rank in range(processes)]
    for loader in loaders:
        loader.load_state_dict(state)
    steps = list(zip(*(ids(loader) for loader in loaders), strict=True))
    done = 4 // (batch_size * processes) * batch_size * processes
    assert len(steps) == left
    expected = order[done : done + left * batch_size * processes]
    assert sorted(sum((sum(step, []) for step in steps), [])) == sorted(expected)


def test_a_replaced_sampler_is_an_error() -> None:
    samples = Numbers().train_samples()
    loader = ResumableLoader(samples, sampler=SequentialSampler(samples), batch_size=2)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"replaced the training sampler by SequentialSampler.*overfit_batches to 0"):
        next(iter(loader))


def test_evaluation_covers_every_prompt_once() -> None:
    parts = [Numbers().attach(rank, 3) for rank in range(3)]
    loaders = [part.val_dataloader() for part in parts]
    large = [sum(ids(part[0]), []) for part in loaders]
    assert large == [[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8]]
    # An empty batch where there is nothing, lest Lightning skip the evaluation of that process.
    assert [ids(part[1]) for part in loaders] == [[[0]], [[]], [[]]]
    assert parts[0].eval_names == ["large", "small"]
    assert [ids(loader) for loader in Numbers(3).test_dataloader()] == [[[0, 1], [2]], [[0]]]


def test_lightnings_own_sampler_is_refused() -> None:
    with pytest.raises(ValueError, match="set trainer.use_distributed_sampler to false"):
        Numbers().attach(0, 2, use_distributed_sampler=True).val_dataloader()
    assert len(Numbers().attach(0, 1, use_distributed_sampler=True).val_dataloader()) == 2  # one process: harmless


def test_too_few_prompts_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"3 training prompts do not fill one step of 2 process\(es\) x .* 2: lower"):
        Numbers(3).attach(0, 2).train_dataloader()
    with pytest.raises(ValueError, match="data.batch_size is 0, use at least 1"):
        Numbers(batch_size=0)
    with pytest.raises(ValueError, match="data.num_workers is -1, use at least 0"):
        Numbers(num_workers=-1)


class Recorder(L.LightningModule):
    """Counts steps with a real optimizer, and remembers the prompts it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[list[int]] = []
        self.evaluated: list[list[int]] = []

    def training_step(self, batch: list[PromptSample], batch_idx: int) -> None:
        self.seen += ids([batch])
        self.optimizers().step()  # type: ignore[union-attr]

    def validation_step(self, batch: list[PromptSample], batch_idx: int, dataloader_idx: int) -> None:
        self.evaluated += ids([batch])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(root: Path, ckpt_path: Path | None = None, **kwargs: Any) -> Recorder:
    module = Recorder()
    keep_all = ModelCheckpoint(root, filename="{step}", save_top_k=-1, every_n_train_steps=1)
    trainer = L.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        num_sanity_val_steps=0, use_distributed_sampler=False, callbacks=[keep_all], **kwargs,
    )  # fmt: skip
    trainer.fit(module, Numbers(), ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
    return module


@pytest.mark.parametrize("limit", [{"max_steps": 12}, {"max_epochs": 3, "limit_train_batches": 4}])
def test_trainer_resumes_exactly_from_every_step(tmp_path: Path, limit: dict[str, Any]) -> None:
    """5 batches an epoch, or 4 of them: mid-epoch and epoch-end checkpoints alike."""
    whole = fit(tmp_path / "whole", **limit)
    assert len(whole.seen) == 12
    assert whole.seen[:4] == ids(Numbers().train_dataloader())[:4]
    assert whole.evaluated[:7] == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [10], [0]]
    for step in range(1, 12):
        resumed = fit(tmp_path / "resumed", tmp_path / "whole" / f"step={step}.ckpt", **limit)
        assert resumed.seen == whole.seen[step:], f"resumed at step {step}"
