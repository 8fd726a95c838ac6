"""The benchmark under a real Trainer: rendered images, the real detector and rules, results by hand."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from PIL import Image

from callbacks.benchmark import Benchmark
from callbacks.geneval import GenEvalBenchmark
from callbacks.report import Report
from callbacks.reward import RewardBenchmark
from datamodules.base import PromptDataModule, PromptSample
from lightning_modules.evaluation import EvaluationBatch, validate_now
from miniature.scenes.detector import ShapesDetector
from miniature.scenes.world import Ask, Content, Item, Scene, render
from rewards.base import Reward, RewardBatch, Score

pytestmark = pytest.mark.filterwarnings("ignore:Experiment logs directory", "ignore:The dirpath has changed")

CIRCLE = Scene((Item("circle", "red", 0),))
CROSSES = Scene((Item("cross", "blue", 3), Item("cross", "red", 9)))
LEFT = Scene((Item("circle", "red", 4), Item("square", "red", 7)))
ASKED = {
    "circle": Content("single_object", (Ask("circle"),)),
    "crosses": Content("counting", (Ask("cross", count=2),)),
    "left": Content("position", (Ask("circle"), Ask("square")), "left of"),
}
RIGHT = {"circle": CIRCLE, "crosses": CROSSES, "left": LEFT}
WRONG = {"circle": CROSSES, "crosses": LEFT, "left": CIRCLE}


class Prompts(PromptDataModule):
    """Three prompts in one set, the first of them in a second one."""

    def __init__(self) -> None:
        super().__init__(batch_size=1, eval_batch_size=2)

    def train_samples(self) -> list[PromptSample]:
        return [PromptSample(name, name, asked.tag, asked.metadata) for name, asked in ASKED.items()]

    def eval_samples(self) -> dict[str, list[PromptSample]]:
        return {"geneval": self.train_samples(), "few": self.train_samples()[:1]}


class Painter(L.LightningModule):
    """Draws the prompts of `right[mode][step]` right and others wrong; its steps change nothing else."""

    def __init__(self, right: dict[str, dict[int, str]], refines: bool = True) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.language = object() if refines else None
        self.right = right
        self.num_rollouts = 0
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch: list[PromptSample], batch_idx: int) -> None:
        self.optimizers().step()  # type: ignore[union-attr]
        self.num_rollouts += 64

    def on_train_start(self) -> None:
        if self.global_step == 0:
            validate_now(self.trainer)

    def validation_step(self, batch: list[PromptSample], batch_idx: int, dataloader_idx: int) -> Any:
        step = self.global_step

        def draw(mode: str) -> list[Image.Image]:
            right = self.right[mode][step].split()
            return [Image.fromarray(render((RIGHT if s.prompt in right else WRONG)[s.prompt])) for s in batch]

        modes = ["without_pe", "with_pe"] if self.language else ["without_pe"]
        name = self.trainer.datamodule.eval_names[dataloader_idx]  # type: ignore[attr-defined]
        prompts = {mode: [sample.asked for sample in batch] for mode in modes}
        return EvaluationBatch(name, batch, prompts, [[0] * len(batch)], {mode: [draw(mode)] for mode in modes})

    test_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def make_trainer(root: Path, *benchmarks: Benchmark, max_steps: int = 2, **kwargs: Any) -> L.Trainer:
    tensorboard = TensorBoardLogger(root, name="run")
    return L.Trainer(
        accelerator="cpu", max_steps=max_steps, val_check_interval=2, check_val_every_n_epoch=None,
        num_sanity_val_steps=kwargs.pop("num_sanity_val_steps", 0), log_every_n_steps=1,
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
        logger=[tensorboard, CSVLogger(root, name="run", version=tensorboard.version)],
        callbacks=list(benchmarks), **kwargs,
    )  # fmt: skip


# Without PE: 1 of 3 right, then 2. With PE: 2 of 3, then all. The set "few" holds the circle alone.
IMPROVES = {
    "without_pe": {0: "left", 2: "left circle"},
    "with_pe": {0: "left crosses", 2: "left crosses circle"},
}


def table_of(single_object: float, counting: float, position: float) -> dict[str, float]:
    mean = (single_object + counting + position) / 3
    tags = {"single_object": single_object, "counting": counting, "position": position}
    return pytest.approx({**tags, "overall": mean, "images": mean, "prompts": mean})


def one_tag(value: float) -> dict[str, float]:
    return {"single_object": value, "overall": value, "images": value, "prompts": value}


def test_a_fit_leaves_results_before_after_and_history(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = make_trainer(tmp_path, GenEvalBenchmark(ShapesDetector()))
    trainer.fit(Painter(IMPROVES), Prompts())
    run = tmp_path / "run" / "version_0"
    results = json.loads((run / "results.json").read_text())

    before = {
        "geneval": {"without_pe": table_of(0, 0, 1), "with_pe": table_of(0, 1, 1)},
        "few": {"without_pe": one_tag(0), "with_pe": one_tag(0)},
    }
    after = {
        "geneval": {"without_pe": table_of(1, 0, 1), "with_pe": table_of(1, 1, 1)},
        "few": {"without_pe": one_tag(1), "with_pe": one_tag(1)},
    }
    assert set(results) == {
        *("geneval", "few", "rollouts", "seconds", "intervals", "before", "changes", "history", "headlines", "sets")
    }
    assert {name: one["prompts"] for name, one in results["sets"].items()} == {"geneval": 3, "few": 1}
    assert results["headlines"] == {"geneval": "overall", "few": "overall"}
    assert {name: results[name] for name in after} == after
    assert results["before"] == before
    assert results["rollouts"] == 128
    history = results["history"]["GenEvalBenchmark"]
    assert [(entry["step"], entry["rollouts"]) for entry in history] == [(0, 0), (2, 128)]
    assert [entry["results"] for entry in history] == [before, after]
    assert 0 <= history[0]["seconds"] <= history[1]["seconds"] == results["seconds"] < 60

    rows = list(csv.DictReader((run / "metrics.csv").open()))
    logged = [[float(row[f"val/geneval/{mode}"]) for row in rows] for mode in ("without_pe", "with_pe")]
    assert logged == [pytest.approx([1 / 3, 2 / 3]), pytest.approx([2 / 3, 1])]
    assert [float(row["val/geneval/without_pe/single_object"]) for row in rows] == [0, 1]
    assert [float(row["val/few/with_pe"]) for row in rows] == [0, 1]

    table = [line for line in capsys.readouterr().out.splitlines() if " PE " in line or "rollouts" in line]
    assert "GenEvalBenchmark after 128 rollouts" in table[0]
    cells = [[cell.strip() for cell in line.strip("│ ").split("│")] for line in table[1:]]
    assert cells == [
        ["geneval", "without PE", "0.333", "0.667", "+0.333"],
        ["geneval", "with PE", "0.667", "1.000", "+0.333"],
        ["few", "without PE", "0.000", "1.000", "+1.000"],
        ["few", "with PE", "0.000", "1.000", "+1.000"],
    ]


def test_without_a_refiner_there_is_one_mode(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, GenEvalBenchmark(ShapesDetector(), sets=["few"]))
    trainer.fit(Painter(IMPROVES, refines=False), Prompts())
    results = json.loads((tmp_path / "run" / "version_0" / "results.json").read_text())
    assert results["few"] == {"without_pe": one_tag(1)}
    assert results["before"] == {"few": {"without_pe": one_tag(0)}}
    assert "geneval" not in results  # `sets` leaves it out


def test_a_sanity_check_is_no_beginning(tmp_path: Path) -> None:
    benchmark = GenEvalBenchmark(ShapesDetector())
    make_trainer(tmp_path, benchmark, num_sanity_val_steps=1).fit(Painter(IMPROVES), Prompts())
    assert [entry["step"] for entry in benchmark.history] == [0, 2]


def test_a_resumed_run_knows_its_beginning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = make_trainer(tmp_path, GenEvalBenchmark(ShapesDetector()))
    first.fit(Painter(IMPROVES), Prompts())
    first.save_checkpoint(tmp_path / "at_2.ckpt")
    started = first.callbacks[0]
    assert isinstance(started, GenEvalBenchmark)
    capsys.readouterr()

    worse = {mode: {4: "left"} for mode in IMPROVES}
    resumed = GenEvalBenchmark(ShapesDetector())
    make_trainer(tmp_path, resumed, max_steps=4).fit(Painter(worse), Prompts(), ckpt_path=tmp_path / "at_2.ckpt")
    assert [entry["step"] for entry in resumed.history] == [0, 2, 4]
    assert resumed.history[:2] == started.history
    assert resumed.history[2]["seconds"] >= started.history[1]["seconds"]
    results = json.loads((tmp_path / "run" / "version_1" / "results.json").read_text())
    assert results["before"]["geneval"]["with_pe"]["overall"] == pytest.approx(2 / 3)
    assert results["geneval"]["with_pe"]["overall"] == pytest.approx(1 / 3)
    assert "-0.333" in capsys.readouterr().out


class Others(Prompts):
    """The first set without its first prompt, the second as it was."""

    def eval_samples(self) -> dict[str, list[PromptSample]]:
        sets = super().eval_samples()
        return sets | {"geneval": sets["geneval"][1:]}


def test_other_prompts_are_not_compared_with_those_from_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = make_trainer(tmp_path, GenEvalBenchmark(ShapesDetector()))
    first.fit(Painter(IMPROVES), Prompts())
    first.save_checkpoint(tmp_path / "at_2.ckpt")
    capsys.readouterr()
    trainer = make_trainer(tmp_path, GenEvalBenchmark(ShapesDetector()), Report(), max_steps=4)
    painter = Painter({mode: {4: "left"} for mode in IMPROVES})
    trainer.fit(painter, Others(), ckpt_path=tmp_path / "at_2.ckpt")
    printed = capsys.readouterr().out
    assert "No change is shown where the prompts are not those of the first" in " ".join(printed.split())
    lines = [line.split("│") for line in printed.splitlines() if " PE " in line]
    assert [[cell.strip() for cell in cells[3:6]] for cells in lines] == [
        *[["", "0.500", ""]] * 2,
        *[["0.000", "0.000", "+0.000"]] * 2,
    ]
    run = tmp_path / "run" / "version_1"
    assert list(json.loads((run / "results.json").read_text())["before"]) == ["few"]
    geneval = (run / "results.md").read_text().split("## ")[1]
    assert geneval.startswith("GenEval\n") and "before" not in geneval


def test_state_survives_a_round_trip() -> None:
    benchmark, other = GenEvalBenchmark(ShapesDetector()), GenEvalBenchmark(ShapesDetector())
    benchmark.history = [{"step": 3, "rollouts": 9, "seconds": 1.5, "results": {}}]
    benchmark._seconds_before = 1000.0
    state = json.loads(json.dumps(benchmark.state_dict()))  # plain values: checkpoints load with weights_only
    other.load_state_dict(state)
    assert other.history == benchmark.history
    assert other.state_dict()["seconds"] == pytest.approx(1000, abs=5)


def test_a_test_prints_its_scores(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = make_trainer(tmp_path, GenEvalBenchmark(ShapesDetector()))
    trainer.test(Painter(IMPROVES), Prompts(), verbose=False)
    run = tmp_path / "run" / "version_0"
    assert json.loads((run / "results.json").read_text())["geneval"]["without_pe"] == table_of(0, 0, 1)
    assert float(next(csv.DictReader((run / "metrics.csv").open()))["test/geneval/with_pe"]) == pytest.approx(2 / 3)
    lines = [line for line in capsys.readouterr().out.splitlines() if " PE " in line]
    cells = [[cell.strip() for cell in line.strip("│ ").split("│")] for line in lines]
    assert cells[:2] == [
        ["geneval", "without PE", "0.333"],
        ["geneval", "with PE", "0.667"],
    ]


def test_a_test_of_a_checkpoint_is_not_compared_with_validation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The fit's history travels in the checkpoint, but its scenes are others: no "before", no "change"."""
    trainer = make_trainer(tmp_path, GenEvalBenchmark(ShapesDetector()))
    trainer.fit(Painter(IMPROVES), Prompts())
    trainer.save_checkpoint(tmp_path / "at_2.ckpt")
    capsys.readouterr()
    tested = make_trainer(tmp_path, GenEvalBenchmark(ShapesDetector()))
    at_0 = {mode: {0: "circle"} for mode in IMPROVES}  # a test counts no steps
    tested.test(Painter(at_0), Prompts(), ckpt_path=tmp_path / "at_2.ckpt", verbose=False)
    results = json.loads((tmp_path / "run" / "version_1" / "results.json").read_text())
    assert results["geneval"]["with_pe"] == table_of(1, 0, 0)
    assert results.get("before", {}) in ({}, {k: results[k] for k in ("geneval", "few")})
    lines = [line for line in capsys.readouterr().out.splitlines() if " PE " in line]
    assert [len(line.strip("│ ").split("│")) for line in lines] == [3] * 4


class Redness(Reward):
    """The red channel's mean from 0 to 1, as a percentage in tables; images of crosses cannot be scored."""

    name = "redness"

    def __init__(self, fails: tuple[str, ...] = ("crosses",)) -> None:
        self.fails = fails

    def __call__(self, batch: RewardBatch) -> list[Score]:
        def score(sample: PromptSample, image: Image.Image) -> Score:
            if sample.prompt in self.fails:
                return Score.invalid("no crosses, please")
            red = float(np.asarray(image)[..., 0].mean()) / 255
            return Score(native=red, table=100 * red, rl=red / 2)

        return [score(sample, image) for sample, image in zip(batch.samples, batch.images, strict=True)]


def test_any_reward_is_a_benchmark_beside_another(tmp_path: Path) -> None:
    """Table values of valid images are averaged; both benchmarks of one set stand in results.json."""
    painter = Painter(IMPROVES, refines=False)
    trainer = make_trainer(tmp_path, GenEvalBenchmark(ShapesDetector()), RewardBenchmark(Redness()))
    trainer.fit(painter, Prompts())
    results = json.loads((Path(trainer.log_dir or "") / "results.json").read_text())
    assert set(results) >= {"geneval", "few", "geneval/redness", "few/redness"}
    red = {name: float(render(scene)[..., 0].mean()) / 255 for name, scene in RIGHT.items()}
    mean = (red["circle"] + red["left"]) / 2  # right at the end; the crosses are left out
    found = results["geneval/redness"]["without_pe"]
    by_tag = {"single_object": 100 * red["circle"], "position": 100 * red["left"]}
    assert math.isnan(found.pop("counting") or math.nan)
    assert found == pytest.approx({**by_tag, "mean": 100 * mean, "rl": mean / 2, "invalid_share": 1 / 3, "images": 3})
    assert results["geneval"]["without_pe"]["images"] == pytest.approx(2 / 3)


def test_a_score_that_no_image_has_is_null(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, RewardBenchmark(Redness(("circle", "crosses", "left"))))
    trainer.fit(Painter(IMPROVES, refines=False), Prompts())
    text = (Path(trainer.log_dir or "") / "results.json").read_text()
    assert "NaN" not in text and json.loads(text)["few/redness"]["without_pe"]["mean"] is None


def test_validate_prints_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = make_trainer(tmp_path, GenEvalBenchmark(ShapesDetector(), sets=["few"]))
    trainer.validate(Painter(IMPROVES), Prompts(), verbose=False)
    assert [line.split("│")[1:4] for line in capsys.readouterr().out.splitlines() if " PE " in line]


def test_mistakes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is to score the set fwe, but the data has geneval, few: correct its `sets`"):
        make_trainer(tmp_path, GenEvalBenchmark(ShapesDetector(), sets=["fwe"])).test(Painter(IMPROVES), Prompts())
    two = [GenEvalBenchmark(ShapesDetector(), sets=["few"]), GenEvalBenchmark(ShapesDetector())]
    with pytest.raises(ValueError, match="GenEvalBenchmark and GenEvalBenchmark, call their scores few: give them"):
        make_trainer(tmp_path, *two).test(Painter(IMPROVES), Prompts())
    apart = [GenEvalBenchmark(ShapesDetector(), sets=["few"]), GenEvalBenchmark(ShapesDetector(), sets=["geneval"])]
    make_trainer(tmp_path, *apart).test(Painter(IMPROVES), Prompts(), verbose=False)


class Repeated(Prompts):
    """Four prompts for a circle, each `times` times, of which the painter draws half right."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.times = times

    def train_samples(self) -> list[PromptSample]:
        metadata = ASKED["circle"].metadata | {"of": ""}
        texts = [f"circle {i // self.times}" for i in range(4 * self.times)]
        return [
            PromptSample(f"{i}", "circle", "single_object", metadata | {"of": text}) for i, text in enumerate(texts)
        ]


class HalfRight(Painter):
    """Draws the prompts 0 and 1 right, 2 and 3 wrong."""

    def validation_step(self, batch: list[PromptSample], batch_idx: int, dataloader_idx: int) -> Any:
        name = self.trainer.datamodule.eval_names[dataloader_idx]  # type: ignore[attr-defined]
        images = [
            Image.fromarray(render(CIRCLE if s.metadata["of"] in ("circle 0", "circle 1") else CROSSES)) for s in batch
        ]
        prompts = [sample.asked for sample in batch]
        return EvaluationBatch(name, batch, {"without_pe": prompts}, [[0] * len(batch)], {"without_pe": [images]})

    test_step = validation_step


def test_equal_prompts_of_any_data_module_are_resampled_together(tmp_path: Path) -> None:
    """Four prompts, each five times, have the interval of four prompts: 0 to 1."""
    ends = {}
    for times in (1, 5):
        trainer = make_trainer(tmp_path / str(times), GenEvalBenchmark(ShapesDetector(), sets=["geneval"]))
        trainer.test(HalfRight(IMPROVES, refines=False), Repeated(times), verbose=False)
        run = tmp_path / str(times) / "run" / "version_0"
        results = json.loads((run / "results.json").read_text())
        ends[times] = results["intervals"]["geneval"]["without_pe"]["overall"]
        assert results["geneval"]["without_pe"]["overall"] == 0.5 and results["sets"]["geneval"]["prompts"] == 4
        lines = [json.loads(line) for line in (run / "scores.jsonl").read_text().splitlines()]
        assert len(lines) == 4 * times and len({line["prompt"] for line in lines}) == 4
    assert ends[1] == ends[5] == [0, 1]


class Better(HalfRight):
    """Draws the prompt 2 right before training, and all but the prompt 3 after it."""

    def validation_step(self, batch: list[PromptSample], batch_idx: int, dataloader_idx: int) -> Any:
        right = ("circle 2",) if self.global_step == 0 else ("circle 0", "circle 1", "circle 2")
        drawn = super().validation_step(batch, batch_idx, dataloader_idx)
        images = [Image.fromarray(render(CIRCLE if s.metadata["of"] in right else CROSSES)) for s in batch]
        return EvaluationBatch(drawn.name, batch, drawn.prompts, drawn.seeds, {"without_pe": [images]})


def test_the_interval_beside_a_change_is_the_changes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two of four prompts get better: a change of 0.5 in 0 to 1. The score after has 0.25 to 1. Also after a resume."""
    first = make_trainer(tmp_path, GenEvalBenchmark(ShapesDetector(), sets=["geneval"]))
    first.fit(Better(IMPROVES, refines=False), Repeated(1))
    first.save_checkpoint(tmp_path / "at_2.ckpt")
    resumed = make_trainer(tmp_path, GenEvalBenchmark(ShapesDetector(), sets=["geneval"]), max_steps=4)
    resumed.fit(Better(IMPROVES, refines=False), Repeated(1), ckpt_path=tmp_path / "at_2.ckpt")
    printed = capsys.readouterr().out
    assert printed.count("change [95 % interval]") == printed.count("+0.500 [+0.000, +1.000]") == 2
    for version in (0, 1):
        results = json.loads((tmp_path / f"run/version_{version}/results.json").read_text())
        assert results["changes"]["geneval"]["without_pe"]["overall"] == [0, 1]
        assert results["intervals"]["geneval"]["without_pe"]["overall"] == [0.25, 1]


def test_one_prompt_of_a_tag_has_no_interval(tmp_path: Path) -> None:
    """It would be drawn in every replicate and seem certain; four of one tag have an interval."""
    benchmark = GenEvalBenchmark(ShapesDetector())
    trainer = make_trainer(tmp_path, benchmark)
    trainer.test(Painter(IMPROVES), Prompts(), verbose=False)
    assert benchmark.intervals["geneval"]["without_pe"] == {}
