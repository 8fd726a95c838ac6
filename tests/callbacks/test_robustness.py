"""Paraphrases under a real Trainer: who draws what, and paired differences by hand and against loops."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
from lightning.pytorch.loggers import CSVLogger
from PIL import Image

from callbacks.geneval import GenEvalBenchmark
from callbacks.report import Report
from callbacks.robustness import PromptRobustness, paired_difference
from callbacks.scores.prompt_scores import PromptScores
from datamodules.base import PromptDataModule, PromptSample, Reworded
from datamodules.paraphrases.base import Paraphraser, Wordings
from lightning_modules.evaluation import EvaluationBatch
from miniature.scenes.detector import ShapesDetector
from miniature.scenes.world import Ask, Content, Item, Scene, render

RIGHT, WRONG = Scene((Item("circle", "red", 0),)), Scene((Item("cross", "red", 9),))


class Prompts(PromptDataModule):
    """Four prompts for a circle, of two tags."""

    def __init__(self) -> None:
        super().__init__(eval_batch_size=3)

    def train_samples(self) -> list[PromptSample]:
        return []

    def eval_samples(self) -> dict[str, list[PromptSample]]:
        samples = []
        for i in range(4):
            asked = Content(("single_object", "colors")[i % 2], (Ask("circle", ("red", None)[1 - i % 2]),))
            samples.append(PromptSample(f"p{i}", f"a circle {i}", asked.tag, asked.metadata))
        return {"geneval": samples}


class Painter(L.LightningModule):
    """Draws a prompt right if it says so; its refiner adds that to prompts with an even number."""

    def __init__(self, refines: bool) -> None:
        super().__init__()
        self.language = object() if refines else None
        self.seen: list[tuple[str, str, str]] = []

    def test_step(self, batch: list[PromptSample], batch_idx: int, dataloader_idx: int = 0) -> Any:
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        name = data.eval_names[dataloader_idx]
        prompts = {"without_pe": [sample.asked for sample in batch]}
        if self.language and name not in data.unrefined:
            prompts["with_pe"] = [
                f"{s.asked} right" if int(s.id[1:]) % 2 == 0 and "RIGHT" not in s.asked else s.asked for s in batch
            ]
        images = {
            mode: [[Image.fromarray(render(RIGHT if "right" in text.lower() else WRONG)) for text in texts]]
            for mode, texts in prompts.items()
        }
        self.seen += [(name, mode, text) for mode, texts in prompts.items() for text in texts]
        return EvaluationBatch(name, batch, prompts, [[0] * len(batch)], images)

    validation_step = test_step


class Wordy(Paraphraser):
    """`good` makes the prompts 0, 1, 2 right; `odd` applies to 3 alone and loses its circle."""

    def __init__(self, refined: bool = True, checked: bool = True) -> None:
        super().__init__(refined)
        self.checked = checked
        self.asked: list[list[str]] = []

    @property
    def kinds(self) -> tuple[str, ...]:
        return ("good", "odd")

    def write(self, name: str, samples: Sequence[PromptSample]) -> Wordings:
        self.asked.append([sample.id for sample in samples])
        good: list[str | None] = [f"{s.prompt} RIGHT" if s.id != "p3" else None for s in samples]
        odd: list[str | None] = ["a cross" if s.id == "p3" else None for s in samples]
        return {"good": good, "odd": odd}


class Circles:
    """A wording has to say circle."""

    def lost(self, sample: PromptSample, wording: str) -> str | None:
        return None if "circle" in wording else "no circle"


def evaluate(root: Path, probe: PromptRobustness, refines: bool, command: str = "test") -> tuple[Painter, Path, Any]:
    painter, data = Painter(refines), Prompts()
    # The probe stands before the benchmark: their order must not matter.
    trainer = L.Trainer(
        accelerator="cpu", logger=CSVLogger(root), enable_progress_bar=False, use_distributed_sampler=False,
        callbacks=[probe, GenEvalBenchmark(ShapesDetector()), Report()],
    )  # fmt: skip
    getattr(trainer, command)(painter, data, verbose=False)
    return painter, Path(trainer.log_dir or ""), data


def test_paraphrases_are_drawn_and_compared_pair_by_pair(tmp_path: Path) -> None:
    probe = PromptRobustness([Wordy()], Circles())
    with pytest.warns(UserWarning, match=r"no prompt has a wording of the kind geneval\.odd"):
        painter, folder, _ = evaluate(tmp_path, probe, refines=True)
    asked = [(mode, text) for name, mode, text in painter.seen if name == "geneval.good"]
    assert asked == [(mode, f"a circle {i} RIGHT") for mode in ("without_pe", "with_pe") for i in range(3)]
    results = json.loads((folder / "results.json").read_text())
    assert "geneval.odd" not in results
    assert results["geneval.good"]["without_pe"]["overall"] == 1.0
    said = results["robustness"]["GenEvalBenchmark"]["geneval.good"]
    assert said["of"] == "geneval" and said["rejected"] == 0 and "against_pe" not in said
    # Prompts 0, 1, 2: the originals are wrong without PE; with PE 0 and 2 are right (single_object), 1 (colors) is not.
    plain, refined = said["without_pe"], said["with_pe"]
    assert (plain["prompts"], plain["original"], plain["paraphrase"]) == (3, 0.0, 1.0)
    assert plain["scores"]["headline"] == plain["scores"]["overall"] == plain["scores"]["colors"] == 1.0
    assert (refined["original"], refined["scores"]["headline"]) == (0.5, 0.5)
    assert refined["scores"]["single_object"] == 0.0 and refined["scores"]["colors"] == 1.0
    assert refined["tags"] == ["single_object", "colors"] and refined["intervals"]["headline"] == [None, None]
    assert probe.rejected["geneval.odd"] == ["no circle: a cross"]
    rows = (folder / "metrics.csv").read_text().splitlines()
    assert "test/robustness/GenEvalBenchmark/geneval.good/with_pe" in rows[0]
    text = (folder / "results.md").read_text()
    assert "| geneval.good, with PE | 3 | 0 | 0.500 | 1.000 | +0.500 | +0.000 | +1.000 |" in text


def test_an_enhancer_in_front_of_the_model_counts_with_its_mistakes(tmp_path: Path) -> None:
    """Static PE and LM swap: nothing rejected, unchanged prompts included, and never refined once more."""
    probe = PromptRobustness([Wordy(refined=False, checked=False)], Circles(), resamples=50)
    painter, folder, data = evaluate(tmp_path, probe, refines=True)
    assert data.unrefined == {"geneval.good", "geneval.odd"}
    assert {mode for name, mode, _ in painter.seen if name != "geneval"} == {"without_pe"}
    said = json.loads((folder / "results.json").read_text())["robustness"]["GenEvalBenchmark"]
    assert {name: one["without_pe"]["prompts"] for name, one in said.items()} == {"geneval.good": 4, "geneval.odd": 4}
    # Right are 0, 1, 2 of four: single_object 1, colors 1/2. The refiner's: 0 and 2, so single_object 1, colors 0.
    swap = said["geneval.good"]["against_pe"]
    assert (swap["original"], swap["paraphrase"], swap["scores"]["headline"]) == (0.5, 0.75, 0.25)
    assert said["geneval.odd"]["against_pe"]["scores"]["headline"] == -0.5


@pytest.mark.filterwarnings("ignore:no prompt has a wording")
def test_without_a_refiner_there_is_one_comparison(tmp_path: Path) -> None:
    probe = PromptRobustness([Wordy(refined=False)], Circles(), num_prompts=2)
    painter, folder, _ = evaluate(tmp_path, probe, refines=False, command="validate")
    said = json.loads((folder / "results.json").read_text())["robustness"]["GenEvalBenchmark"]["geneval.good"]
    assert set(said) == {"of", "rejected", "without_pe"} and said["without_pe"]["prompts"] == 2
    assert {text for name, _, text in painter.seen if name == "geneval.good"} == {
        "a circle 0 RIGHT",
        "a circle 2 RIGHT",
    }


def test_settings_that_cannot_work_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="PromptRobustness has `num_prompts` 0, use at least 1"):
        PromptRobustness([Wordy()], num_prompts=0)
    with pytest.raises(ValueError, match="to reword the set drawbench, but the data has geneval: correct its `sets`"):
        evaluate(tmp_path, PromptRobustness([Wordy()], sets=["drawbench"]), refines=False)


def test_differences_against_a_loop() -> None:
    """Two tables of random verdicts, several images each, of which some prompts lack a partner."""
    rng = np.random.default_rng(0)
    benchmark = GenEvalBenchmark(ShapesDetector())
    tags = {f"p{i}": ("colors", "counting", "position")[i % 3] for i in range(60)}
    verdicts: dict[str, dict[str, list[bool]]] = {}
    for name, ids in (("a", list(tags)[:45]), ("b", list(tags)[15:][::-1])):
        metric = PromptScores(ids, [tags[i] for i in ids], ["correct"])
        verdicts[name] = {i: list(rng.random(2) < 0.5) for i in ids}
        for i, two in verdicts[name].items():
            metric.update([i] * 2, [{"correct": float(value)} for value in two])
        benchmark.tables[name, "without_pe"] = metric.table()
    found = paired_difference(benchmark, ("a", "without_pe"), ("b", "without_pe"), 2000)
    common = [i for i in tags if i in verdicts["a"] and i in verdicts["b"]]
    assert found.prompts == len(common) == 30
    by_tag = {
        tag: np.mean([np.mean(verdicts["a"][i]) - np.mean(verdicts["b"][i]) for i in common if tags[i] == tag])
        for tag in set(tags.values())
    }
    assert {tag: found.scores[tag] for tag in by_tag} == pytest.approx(by_tag)
    assert found.scores["headline"] == pytest.approx(np.mean(list(by_tag.values())))
    # The replicates' spread: differences of pairs resampled within tags, by a plain loop.
    pairs = {t: [np.mean(verdicts["a"][i]) - np.mean(verdicts["b"][i]) for i in common if tags[i] == t] for t in by_tag}
    loop = [np.mean([np.mean(rng.choice(values, len(values))) for values in pairs.values()]) for _ in range(4000)]
    assert found.intervals["headline"] == pytest.approx(np.percentile(loop, [2.5, 97.5]).tolist(), abs=0.03)


def test_reworded_samples_keep_their_images_unread() -> None:
    samples = Prompts().eval_samples()["geneval"]
    reworded = Reworded(samples, {2: "two", 0: "zero"})
    assert [(s.id, s.asked, s.prompt) for s in reworded] == [("p0", "zero", "a circle 0"), ("p2", "two", "a circle 2")]
    assert [s.asked for s in reworded[1:]] == ["two"] and reworded[-1].asked == "two"
    assert reworded.without_images() == list(reworded)
