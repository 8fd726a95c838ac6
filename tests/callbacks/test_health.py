"""The watcher under a real Trainer: its numbers by hand, its rules on one and two processes, and across a resume."""

from __future__ import annotations

import csv
import json
import math
import random
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.environments import LightningEnvironment
from PIL import Image

from callbacks.health import Health
from callbacks.samples import SampleImages
from callbacks.stop_rules import Limit, Streaks
from datamodules.base import PromptDataModule, PromptSample
from lightning_modules import cli
from lightning_modules.cli.checkpoint import Checkpoint
from lightning_modules.evaluation import EvaluationBatch, validate_now
from lightning_modules.rollout import Conditioning, Rollout, Trajectory
from rewards.base import Reward, RewardBatch, Score
from rewards.tagged import WeightedSum
from tests.forked import two_processes
from tests.short_runs import quick

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings(
        "ignore:Experiment logs directory", "ignore:The dirpath has changed", "ignore:Using ModelCheckpoint with manual"
    ),
]

NAME = "health/held_out/redness"


class Redness(Reward):
    """An image's red, 0..1, in per cent on the table; a black one fails. Upsets every global generator."""

    name = "redness"

    def __init__(self, kind: str = "") -> None:
        self.kind = kind

    @property
    def version(self) -> str:
        return f"redness{self.kind}"

    def __call__(self, batch: RewardBatch) -> list[Score]:
        random.random(), np.random.rand(), torch.rand(3)
        reds = [image.getpixel((0, 0))[0] / 255 for image in batch.images]  # type: ignore[index]
        return [Score(red, 100 * red, red) if red else Score.invalid("black") for red in reds]


def plain(red: float) -> Image.Image:
    return Image.new("RGB", (32, 32), (round(255 * red), 0, 0))


def checkers() -> Image.Image:
    plane = (np.indices((32, 32)).sum(0) % 2 * 255).astype(np.uint8)
    return Image.fromarray(np.stack([plane] * 3, -1))


def rollout(images: list[Image.Image], size: int) -> Rollout:
    num, numbers = len(images), torch.zeros(len(images) // size, size)
    nothing = torch.zeros(num, 0, 1)
    conditioning = Conditioning({}, torch.zeros(num, dtype=torch.long))
    flat = torch.zeros(num, 0)
    trajectory = Trajectory(nothing, nothing, flat, torch.zeros(num, 1), torch.tensor([1.0, 0.0]), (), conditioning)
    samples = Prompts().train_samples()[: len(numbers)]
    scores = [Score(0, 0, 0)] * num
    return Rollout(samples, ["p"] * num, None, trajectory, images, scores, numbers, numbers == 0, numbers, None)


class Prompts(PromptDataModule):
    """Three prompts in one set, the first of them in another; a batch of two."""

    def __init__(self) -> None:
        super().__init__(batch_size=1, eval_batch_size=2)

    def train_samples(self) -> list[PromptSample]:
        return [PromptSample(f"{i}", f"prompt {i}", "colors", {}) for i in range(64)]

    def eval_samples(self) -> dict[str, list[PromptSample]]:
        return {"main": self.train_samples()[:3], "few": self.train_samples()[:1]}


class Painter(L.LightningModule):
    """Logs `numbers[name][step]` and paints evaluation images as red as `reds[step]` says."""

    def __init__(
        self,
        numbers: dict[str, list[float]] | None = None,
        reds: list[float] | None = None,
        images: list[list[Image.Image]] | None = None,
        refines: bool = False,
        reward: Reward | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.numbers = numbers or {}
        self.reds = reds
        self.images = images
        self.latest: Rollout | None = None
        self.language = object() if refines else None
        self.reward = reward
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.drawn: list[float] = []

    def training_step(self, batch: list[PromptSample], batch_idx: int) -> None:
        step = self.global_step
        self.drawn += [torch.rand(()).item(), random.random(), np.random.rand()]
        self.log_dict({name: values[step] for name, values in self.numbers.items() if not name.startswith("val/")})
        if self.images is not None:
            self.latest = rollout(self.images[step], 2)
        self.optimizers().step()  # type: ignore[union-attr]

    def on_train_start(self) -> None:
        if self.global_step == 0:
            validate_now(self.trainer)

    def validation_step(self, batch: list[PromptSample], batch_idx: int, dataloader_idx: int) -> EvaluationBatch:
        red = 0.0 if self.reds is None else self.reds[self.global_step]
        name = self.trainer.datamodule.eval_names[dataloader_idx]  # type: ignore[attr-defined]
        images = {"without_pe": [[plain(red) for _ in batch]]}
        if self.language is not None:
            # Two of each prompt. Prompt 0's first is as red as asked, its second fails; others are half as red.
            first = [plain(red if sample.id == "0" else red / 2) for sample in batch]
            images["with_pe"] = [first, [plain(0.0 if sample.id == "0" else red / 2) for sample in batch]]
        return EvaluationBatch(name, batch, {}, [], images)

    def on_validation_epoch_end(self) -> None:
        values = {name: values[self.global_step] for name, values in self.numbers.items() if name.startswith("val/")}
        self.log_dict(values)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(root: Path, module: Painter, health: L.Callback | None, steps: int = 8, **more: Any) -> L.Trainer:
    resume = more.pop("ckpt_path", None)
    every = more.pop("every", 2)
    logger: Any = [CSVLogger(root, name="run", version=0)]
    callbacks = [Checkpoint(save_last=True, every_n_train_steps=every), *([] if health is None else [health])]
    options: dict[str, Any] = {
        "accelerator": "cpu",
        "max_steps": steps,
        "val_check_interval": 1,
        "check_val_every_n_epoch": None,
        "num_sanity_val_steps": 1,
        "log_every_n_steps": 1,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
        "logger": logger,
        "callbacks": callbacks,
    }
    trainer = L.Trainer(**(options | more))
    L.seed_everything(1, verbose=False)
    trainer.fit(module, Prompts(), ckpt_path=resume)
    return trainer


def rows(root: Path, name: str) -> dict[int, float]:
    """Reads step -> value of a logged number."""
    with (root / "run" / "version_0" / "metrics.csv").open() as file:
        return {int(row["step"]): float(row[name]) for row in csv.DictReader(file) if row.get(name)}


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.getMessage().startswith("Health")]


# --- numbers ----------------------------------------------------------------------------------------------------------


def test_images_of_every_second_step(tmp_path: Path) -> None:
    """Red twice, then checkers and black, in two groups; in the next look four checkers. Its x is the step's own."""
    seen, repeated = [plain(1.0), plain(1.0), checkers(), plain(0.0)], [checkers()] * 4
    module = Painter({"a": [0.0] * 4}, images=[seen, [], repeated, []], reds=[1.0] * 5)
    trainer = fit(tmp_path, module, Health(every_n_steps=2), steps=3)
    expected = {
        "dark_share": (0.25, 0),
        "bright_share": (0, 0),
        "blank_share": (0.75, 0),
        "flat_area": (0.75, 0),
        "saturation": (0.5, 0),
        "high_frequency": (0.25, 1),
        "duplicates": (0.5, 1),
    }
    for name, (first, second) in expected.items():
        assert rows(tmp_path, f"health/{name}") == pytest.approx({0: first, 2: second}, abs=1e-4)
        assert float(trainer.callback_metrics[f"health/{name}"]) == pytest.approx(second, abs=1e-4)
    assert list(rows(tmp_path, "a")) == [0, 1, 2]


@pytest.mark.parametrize(
    ("mode", "sets", "mean", "invalid"),
    [
        # With two images each: prompt 0 has 80 and a failure, in both sets; prompts 1 and 2 have 40 twice.
        (None, None, (80 + 80 + 4 * 40) / 6, 2 / 8),
        ("with_pe", ["main"], (80 + 4 * 40) / 5, 1 / 6),
        ("with_pe", ["few"], 80, 1 / 2),
        ("without_pe", None, 80, 0),
    ],
)
def test_the_held_out_reward(tmp_path: Path, mode: Any, sets: list[str] | None, mean: float, invalid: float) -> None:
    module = Painter(reds=[0.8, 0.0, 0.4], refines=True)
    fit(tmp_path, module, Health(held_out=Redness(), mode=mode, sets=sets), steps=2)
    # A validation's x is the step before it, 0 for the one before training too: the later row is read.
    values = rows(tmp_path, NAME)
    assert values[1] == pytest.approx(mean / 2)
    assert math.isnan(values[0]), "nothing could be scored"
    assert rows(tmp_path, f"{NAME}/invalid_share") == pytest.approx({0: 1, 1: invalid})


def test_without_a_refiner_the_prompts_as_they_are(tmp_path: Path) -> None:
    fit(tmp_path, Painter(reds=[0.4, 0.8]), Health(held_out=Redness()), steps=1)
    assert rows(tmp_path, NAME) == pytest.approx({0: 80})


def test_training_draws_the_same_numbers_with_and_without(tmp_path: Path) -> None:
    with_it, without = Painter(reds=[0.5] * 5), Painter(reds=[0.5] * 5)
    fit(tmp_path / "with", with_it, Health(held_out=Redness()), steps=4)
    fit(tmp_path / "without", without, None, steps=4)
    assert len(set(with_it.drawn)) == 12 and with_it.drawn == without.drawn


# --- rules ------------------------------------------------------------------------------------------------------------


def test_patience(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Best at step 1; 2 and 3 do not pass it by more than 5, NaN at 4 counts neither way, and 5 is the third."""
    caplog.set_level("INFO")
    reds = [0.2, 0.4, 0.42, 0.44, 0.0, 0.2, 0.8, 0.8, 0.8]
    trainer = fit(tmp_path, Painter(reds=reds), Health(held_out=Redness(), patience=3, min_delta=5.0))
    assert trainer.global_step == 5
    saved = torch.load(tmp_path / "run/version_0/checkpoints/last.ckpt", weights_only=True)
    assert saved["global_step"] == 5
    (state,) = (state for name, state in saved["callbacks"].items() if name.startswith("Health"))
    assert state.items() >= {"streaks": {}, "best": 40.0, "waited": 3}.items()
    assert said(caplog) == [
        "Health ends the run after step 5: health/held_out/redness was 20, and has not risen by more than 5 "
        "(`min_delta`) above its best, 40, for 3 validations (`patience`)."
    ]


def test_a_reward_that_rises_goes_on(tmp_path: Path) -> None:
    reds = [0.2, 0.1, 0.1, 0.3, 0.3, 0.3, 0.4, 0.4, 0.4]
    assert fit(tmp_path, Painter(reds=reds), Health(held_out=Redness(), patience=3)).global_step == 8


@pytest.mark.parametrize(
    ("values", "limit", "end"),
    [
        ([9, 1, 1, 1, 9, 9, 9, 9], Limit(below=2, for_steps=3), 4),
        ([9, 1, 1, math.nan, 1, 9, 9, 9], Limit(below=2, for_steps=3), 5),  # NaN counts neither way
        ([9, 1, 1, 2, 1, 1, 9, 9], Limit(below=2, for_steps=3), 8),  # 2 itself is within bounds
        ([9, 1, 1, 2, 9, 9, 9, 9], Limit(above=2, for_steps=1), 1),
        ([1, 9, 1, 9, 1, 9, 1, 9], Limit(below=0, above=2, for_steps=2), 8),
        ([1, 9, -1, 9, 1, 1, 1, 1], Limit(below=0, above=2, for_steps=3), 4),
    ],
)
def test_limits(tmp_path: Path, values: list[float], limit: Limit, end: int, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    trainer = fit(tmp_path, Painter({"group/std": values}), Health(limits={"group/std": limit}))
    assert trainer.global_step == end and len(rows(tmp_path, "group/std")) == end
    saved = torch.load(tmp_path / "run/version_0/checkpoints/last.ckpt", weights_only=True)
    assert saved["global_step"] == end
    assert len(said(caplog)) == (end < 8)


def test_what_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    fit(tmp_path, Painter({"kl": [0.1, 0.5, 0.71234]}), Health(limits={"kl": Limit(above=0.4, for_steps=2)}))
    assert said(caplog) == [
        "Health ends the run after step 3: kl was 0.7123, above its limit 0.4 for 2 logged values in a row (`limits`)."
    ]


def test_a_warning_does_not_stop(tmp_path: Path) -> None:
    """One for each row that is long enough: not for the first of 1, once for those of 2 and 3."""
    values = [9.0, 1.0, 9.0, 1.0, 1.0, 9.0, 1.0, 1.0, 1.0]
    health = Health(limits={"std": Limit(below=2, for_steps=2, action="warn")})
    with pytest.warns(UserWarning, match="^Health") as found:
        assert fit(tmp_path, Painter({"std": values}), health, steps=9).global_step == 9
    mine = [str(one.message) for one in found if str(one.message).startswith("Health")]
    assert [text.split(":")[0] for text in mine] == ["Health at step 5", "Health at step 8"]


def test_a_number_of_validations_counts_once_in_each(tmp_path: Path) -> None:
    """Validations at steps 0, 3 and 6: two of them in a row are out of bounds at 6, though four steps lie between."""
    module = Painter({"val/score": [9, 9, 9, 1, 1, 1, 1, 1, 1, 1], "other": [0.0] * 10})
    limits = {"val/score": Limit(below=2, for_steps=2), "other": Limit(above=2)}
    assert fit(tmp_path, module, Health(limits=limits), 9, val_check_interval=3).global_step == 6


def test_statistics_count_once_in_each_look(tmp_path: Path) -> None:
    """Looks at steps 0, 2 and 4 (so after 1, 3 and 5): the third blank one in a row ends the run."""
    module = Painter(images=[[plain(0.5), plain(0.5)]] * 9)
    health = Health(2, limits={"health/blank_share": Limit(above=0.9, for_steps=3)})
    assert fit(tmp_path, module, health).global_step == 5


def test_names_that_are_never_logged(tmp_path: Path) -> None:
    """Said once, after the first validation of a trained model; a name that is only ever NaN is known."""
    limits = {"group/st": Limit(below=1), "gone": Limit(below=1), "kl": Limit(below=1)}
    module = Painter({"group/std": [9.0] * 8, "kl": [math.nan] * 8})
    with pytest.warns(UserWarning, match="^Health") as found:
        fit(tmp_path, module, Health(limits=limits))
    assert [str(one.message) for one in found if str(one.message).startswith("Health")] == [
        "Health.limits names what has not been logged so far: gone, group/st (did you mean group/std?)."
    ]
    with pytest.warns(UserWarning, match="gone, group/st"):  # at the end, where nothing is validated
        fit(tmp_path / "more", module, Health(limits=limits), limit_val_batches=0)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Health")
        fit(tmp_path / "known", module, Health(limits={"kl": Limit(below=1)}))


def test_looks_go_on_where_they_were(tmp_path: Path) -> None:
    """Every third step, wherever the run is broken and whether or not a checkpoint or a validation falls on it."""

    def module() -> Painter:
        paler = [(200, 200 - 20 * step, 200 - 20 * step) for step in range(8)]  # of saturation step / 10
        return Painter(images=[[Image.new("RGB", (32, 32), color)] * 2 for color in paler])

    fit(tmp_path / "whole", module(), Health(3), steps=8)
    whole = rows(tmp_path / "whole", "health/saturation")
    assert whole == pytest.approx({0: 0, 3: 0.3, 6: 0.6})
    for broken in (1, 2, 3, 4):
        folder = tmp_path / str(broken)
        fit(folder / "first", module(), Health(3), steps=broken)
        last = folder / "first/run/version_0/checkpoints/last.ckpt"
        fit(folder / "second", module(), Health(3), ckpt_path=last)
        assert rows(folder / "second", "health/saturation") == {k: v for k, v in whole.items() if k >= broken}


@pytest.mark.parametrize("broken", [1, 2, 3, 4])
def test_a_resumed_run_stops_when_the_unbroken_one_does(tmp_path: Path, broken: int) -> None:
    """Three values in a row and three validations without a rise, across the break; both rules end at step 5."""

    def module() -> Painter:
        return Painter({"std": [9, 9, 1, 1, 1, 1, 1, 1, 1]}, [0.3, 0.1, 0.5, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1])

    def health(**rules: Any) -> Health:
        return Health(held_out=Redness(), **rules)

    for name, rules in {
        "limits": {"limits": {"std": Limit(below=2, for_steps=3)}},
        "patience": {"patience": 3},
    }.items():
        root = tmp_path / name
        whole = fit(root / "whole", module(), health(**rules))
        assert whole.global_step == 5
        # Only `last.ckpt`, which is saved after the step's validation.
        fit(root / "first", module(), health(**rules), steps=broken, every=100)
        again = health(**rules)
        last = root / "first/run/version_0/checkpoints/last.ckpt"
        resumed = fit(root / "second", module(), again, ckpt_path=last, every=100)
        assert resumed.global_step == 5
        assert again.state_dict() == next(c for c in whole.callbacks if isinstance(c, Health)).state_dict()  # type: ignore[attr-defined]


def test_a_resumed_run_takes_its_rules_from_the_configuration(tmp_path: Path) -> None:
    """Another patience holds, Lightning's own callback would take the old one back; a new limit starts at 0."""
    module = Painter({"a": [0.0] * 20, "b": [0.0] * 20}, [0.6] + [0.2] * 20)
    fit(tmp_path / "first", module, Health(held_out=Redness(), patience=9, limits={"a": Limit(above=1)}), 2, every=9)
    checkpoint = tmp_path / "first/run/version_0/checkpoints/last.ckpt"
    health = Health(held_out=Redness(), patience=4, limits={"b": Limit(above=1)})
    assert fit(tmp_path / "second", module, health, ckpt_path=checkpoint, every=9).global_step == 4
    assert health.state_dict().items() >= {"streaks": {"b": 0}, "best": 60.0, "waited": 4}.items()
    other = Health(held_out=Redness(), patience=4, sets=["main"])
    assert fit(tmp_path / "third", module, other, ckpt_path=checkpoint, steps=6, every=9).global_step == 6
    assert other.state_dict().items() >= {"best": 20.0, "waited": 3}.items(), "of other prompts: it begins anew"


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Health(every_n_steps=0), "every_n_steps=0, use at least 1"),
        (lambda: Health(held_out=Redness(), patience=0), "patience=0, use at least 1"),
        (lambda: Health(patience=2), "no `held_out` reward"),
        (lambda: Limit(), "neither `below` nor `above`"),
        (lambda: Limit(below=2, above=1), "swap them"),
        (lambda: Limit(below=2, for_steps=0), "for_steps=0, use at least 1"),
        (lambda: Limit(below=math.nan), "below=nan, use a finite number"),
        (lambda: Limit(above=math.inf), "above=inf, use a finite number"),
        (lambda: Health(min_delta=math.nan), "Health has min_delta=nan, use a finite number"),
        (lambda: Health(min_delta=-1), "Health has min_delta=-1, use at least 0"),
        (lambda: SampleImages(0), "SampleImages has num=0, use at least 1"),
    ],
)
def test_settings_that_cannot_work(make: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make()


def test_a_reward_that_is_trained_on_is_not_held_out(tmp_path: Path) -> None:
    own = Redness(" 2")
    for trained in (Redness(" 2"), WeightedSum({"one": Redness(" 1"), "two": Redness(" 2")})):
        with pytest.raises(ValueError, match=r"held-out reward 'redness 2', which this run is trained on"):
            fit(tmp_path, Painter(reward=trained), Health(held_out=own))
    fit(tmp_path, Painter(reward=Redness(" 1"), reds=[1.0] * 2), Health(held_out=own), steps=1)


def test_modes_and_sets_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no refiner"):
        fit(tmp_path, Painter(), Health(held_out=Redness(), mode="with_pe"))
    with pytest.raises(ValueError, match="Health.sets has 'man', but the evaluation sets are main, few"):
        fit(tmp_path, Painter(), Health(held_out=Redness(), sets=["man", "main"]))


def test_streaks_leave_other_names_alone() -> None:
    streaks = Streaks({"a": Limit(above=1, for_steps=2)})
    assert [len(streaks.update(values)) for values in ({"a": 2}, {"b": 0}, {}, {"a": 2}, {"a": 2}, {"a": 0})] == [
        0, 0, 0, 1, 1, 0,
    ]  # fmt: skip
    assert streaks.counts == {"a": 0} and streaks.unseen == set()


# --- two processes ----------------------------------------------------------------------------------------------------


def two(rank: int, root: str) -> None:
    found: dict[str, Any] = {}
    ddp = {"devices": 2, "strategy": "ddp", "plugins": [LightningEnvironment()]}
    # The second process's own number is out of bounds at once, the first one's from step 2 on: the first one's counts.
    module = Painter({"std": [9, 9, 1, 1, 1, 1, 1, 1] if rank == 0 else [1.0] * 8}, reds=[0.5] * 9)
    health = Health(limits={"std": Limit(below=2, for_steps=2)})
    found["limits"] = fit(Path(root) / "limits", module, health, **ddp).global_step
    # Rank 0 has prompts 0 and 2 and the small set, rank 1 has prompt 1: images are weighted equally, not ranks.
    images = [[plain(1.0)] * 2 if rank == 0 else [checkers(), plain(0.5)]] * 9
    module = Painter(reds=[0.1] + [0.3, 0.2, 0.3, 0.2] * 2, refines=True, images=images)
    health = Health(1, Redness(), patience=2)
    trainer = fit(Path(root) / "patience", module, health, **ddp)
    found["patience"] = trainer.global_step
    found["metrics"] = {name: value.item() for name, value in trainer.callback_metrics.items()}
    Path(root, f"{rank}.json").write_text(json.dumps(found))


def test_two_processes_stop_together(tmp_path: Path) -> None:
    two_processes(two, str(tmp_path))
    one, other = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert one == other
    assert one["limits"] == 4 and one["patience"] == 3
    metrics = one["metrics"]
    mean = (2 * 100 * round(255 * 0.3) + 4 * 100 * round(255 * 0.15)) / 255 / 6  # as on one process
    assert metrics[NAME] == pytest.approx(mean, rel=1e-5)
    assert metrics[f"{NAME}/invalid_share"] == pytest.approx(2 / 8)
    assert metrics["health/blank_share"] == pytest.approx(3 / 4)
    assert metrics["health/duplicates"] == pytest.approx(1 / 2)


# --- the miniature ----------------------------------------------------------------------------------------------------

WATCHED = """
trainer:
  callbacks+:
    - class_path: callbacks.reward.RewardBenchmark
      init_args:
        reward:
          class_path: miniature.scenes.quality.ShapesQuality
    - class_path: callbacks.health.Health
      init_args:
        every_n_steps: 2
        held_out:
          class_path: miniature.scenes.quality.ShapesQuality
        patience: 50
        limits:
          refine/distinct: {below: 0.1}
          train/language/kl: {above: 5.0, for_steps: 3, action: warn}
          group/zero_std_share: {above: 1.0}
"""


def miniature(root: Path, steps: int, *more: str) -> tuple[dict[str, Any], list[dict[str, str]]]:
    """Runs a fit, with two validations if it has any; returns its last checkpoint and its logged rows."""
    often = ["--checkpoint.every_n_train_steps=2", "--trainer.val_check_interval=9", f"--trainer.max_steps={steps}"]
    cli.main(quick("fit", root, *often, "--data.init_args.eval_prompts=2", *more))
    (folder,) = (root / "quickstart").iterdir()
    with (folder / "metrics.csv").open() as file:
        logged = [{k: v for k, v in row.items() if v and not k.startswith("time/")} for row in csv.DictReader(file)]
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True), logged


def test_the_miniature_is_watched_and_not_changed(tmp_path: Path) -> None:
    """A watched fit of two steps and a third after a resume is the unwatched fit of three."""
    (tmp_path / "watched.yaml").write_text(WATCHED)
    watched = f"--config={tmp_path}/watched.yaml"
    alone, alone_rows = miniature(tmp_path / "alone", 3, "--trainer.limit_val_batches=0")
    _, first_rows = miniature(tmp_path / "first", 2, watched)
    (checkpoint,) = (tmp_path / "first").rglob("last.ckpt")
    resumed, resumed_rows = miniature(tmp_path / "second", 3, watched, f"--ckpt_path={checkpoint}")

    weights = alone["state_dict"]
    assert weights and all(torch.equal(weight, resumed["state_dict"][name]) for name, weight in weights.items())
    rewards = [[row["reward"] for row in rows if "reward" in row] for rows in (alone_rows, first_rows, resumed_rows)]
    assert len(set(rewards[0])) == 3 and rewards[0] == rewards[1] + rewards[2]

    looks = [row for row in first_rows + resumed_rows if "health/blank_share" in row]
    assert [row["step"] for row in looks] == ["0", "2"] and len(looks[0]) == 8
    assert 0 < float(looks[0]["health/high_frequency"]) < 0.3 < float(looks[0]["health/flat_area"]) < 1

    name = "health/held_out/shapes_quality"
    validations = [row for row in first_rows + resumed_rows if name in row]
    assert len(validations) == 3  # before training, and at the end of each fit
    for row in validations:
        sets = [key for key in row if key.startswith("val/") and key.endswith("/shapes_quality/with_pe")]
        assert len(sets) == 3  # of 2 prompts each: the mean of all images is the mean of the sets' means
        assert float(row[name]) == pytest.approx(sum(float(row[key]) for key in sets) / 3, abs=1e-6)

    (state,) = (value for key, value in resumed["callbacks"].items() if key.startswith("Health"))
    assert state["streaks"] == {"refine/distinct": 0, "train/language/kl": 0, "group/zero_std_share": 0}
    assert state["best"] == pytest.approx(float(validations[0][name])) and state["waited"] == 0, "of the first fit"
