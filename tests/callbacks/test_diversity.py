"""Diversity by hand on painted groups, then with the miniature's agents: noise, randomness, resuming, processes."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.environments import LightningEnvironment
from PIL import Image
from torch import Tensor

from callbacks.diversity import ARMS, DIFFERENCE, VIT_G, Diversity, by_tag, summarize
from callbacks.ema import EMA
from callbacks.kept_images import KeepImages
from callbacks.scores.prompt_scores import PromptTable
from datamodules.base import PromptDataModule, PromptSample
from lightning_modules.cli import main
from lightning_modules.evaluation import EvaluatedAgents
from lightning_modules.policies.flow import Sampling
from lightning_modules.policies.flux1 import Flux1Policy
from lightning_modules.policies.language import LanguagePolicy
from miniature.scenes.detector import ShapesDetector
from miniature.scenes.encoder import ShapesEncoder
from miniature.scenes.prompts import ShapesPrompts
from rewards.base import Reward, RewardBatch, Score
from rewards.clip import ClipEncoder
from rewards.encoders import PixelEncoder
from rewards.geneval.reward import GenEvalReward
from tests.forked import two_processes
from tests.short_runs import quick

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings(
        "ignore:Experiment logs directory", "ignore:The dirpath has changed", "ignore:LightningCLI's args parameter"
    ),
]

COLORS = {"red": (200, 0, 0), "green": (0, 200, 0), "blue": (0, 0, 200)}


def make_trainer(root: Path, *callbacks: L.Callback, **kwargs: Any) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu", enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
        enable_checkpointing=False, callbacks=list(callbacks), logger=CSVLogger(root, name="run"), **kwargs,
    )  # fmt: skip


def results_of(root: Path) -> Any:
    (path,) = root.rglob("results.json")
    return json.loads(path.read_text())


# --- by hand ----------------------------------------------------------------------------------------------------------


class Channels:
    """An image is the length-1 vector of its corner's channels, a text its first word's."""

    version = "channels"

    def load(self) -> None: ...

    def images(self, images: Sequence[Image.Image]) -> Tensor:
        corners = torch.tensor([image.getpixel((0, 0)) for image in images]).float()
        return torch.nn.functional.normalize(corners, dim=-1)

    def texts(self, texts: Sequence[str]) -> Tensor:
        return torch.tensor([[float(text.split()[0] == color) for color in COLORS] for text in texts])


class Redness(Reward):
    """100 for red, 0 for green; blue cannot be scored."""

    name = "redness"

    def __call__(self, batch: RewardBatch) -> list[Score]:
        scores = [Score.invalid("blue") if image.getpixel((0, 0))[2] else None for image in batch.images]
        red = [float(image.getpixel((0, 0))[0] > 0) for image in batch.images]
        return [score or Score(native=r, table=100 * r, rl=r / 2) for score, r in zip(scores, red, strict=True)]


class Refiner:
    """Rewrites "red" as itself with each colour in turn, and "green" always as "green green"."""

    def refine(self, samples: Sequence[PromptSample], num: int) -> Any:
        said = {"red": [f"red {color}" for color in COLORS], "green": ["green green"] * 3}
        return SimpleNamespace(rewrites=[text for sample in samples for text in said[sample.asked][:num]])

    def rewrite(self, samples: Sequence[PromptSample]) -> list[str]:
        return [sample.asked for sample in samples]


class Painter(EvaluatedAgents):
    """Paints a prompt's last word, but "green" with its third noise red."""

    def __init__(self, refines: bool = True) -> None:
        super().__init__(Flux1Policy("nowhere", Sampling(8, 3)), None, torch.optim.SGD)
        self.language = Refiner() if refines else None  # type: ignore[assignment]

    def configure_model(self) -> None: ...

    def draw(self, name: str, mode: str, k: int, samples: Any, prompts: Any, seeds: Any) -> list[Image.Image]:
        painted = ["red" if (prompt, k) == ("green", 2) else prompt.split()[-1] for prompt in prompts]
        return [Image.new("RGB", (8, 8), COLORS[color]) for color in painted]


class Prompts(PromptDataModule):
    def train_samples(self) -> list[PromptSample]:
        return [PromptSample("r", "red", "tag", {}), PromptSample("g", "green", "tag", {})]

    def eval_samples(self) -> dict[str, list[PromptSample]]:
        reworded = [PromptSample("r", "red", "tag", {}, wording="green")]
        self.originals = {"own.typos": "own"}
        return {"own.typos": reworded, "own": self.train_samples(), "others": self.train_samples()[:1]}


def test_three_arms_by_hand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    callback = Diversity(Channels(), images_per_prompt=3, reward=Redness())
    trainer = make_trainer(tmp_path, callback)
    trainer.test(Painter(), Prompts(), verbose=False)
    results = results_of(tmp_path)
    found = results["diversity"]
    # same_prompt: red red red; green green red. rewrites: red green blue; green green green.
    same = {"image_similarity": (1 + 1 / 3) / 2, "text_similarity": (1 + 2 / 3) / 2, "redness": (100 + 100 / 3) / 2}
    new = {"image_similarity": (0 + 1) / 2, "text_similarity": (1 / 3 + 1) / 2, "redness": (50 + 0) / 2}
    change = {score: new[score] - same[score] for score in same}
    assert set(found) == {"own", "intervals"}
    assert found["own"] == {
        "same_prompt": pytest.approx(same),
        "rewrites": pytest.approx(new | {"distinct_rewrites": (1 + 1 / 3) / 2}),
        "rewrites_shared_noise": pytest.approx(new | {"distinct_rewrites": (1 + 1 / 3) / 2}),
        DIFFERENCE: pytest.approx(change),
    }
    assert results["settings/diversity"] == {"encoder": "channels", "images_per_prompt": 3}
    # Of two prompts a quarter of the resamples hold one alone: the ends are the two prompts' own values.
    ends = found["intervals"]["own"]
    assert ends["same_prompt"]["image_similarity"] == pytest.approx([1 / 3, 1])
    assert ends["rewrites"]["redness"] == pytest.approx([0, 50])
    assert ends[DIFFERENCE]["image_similarity"] == pytest.approx([0 - 1, 1 - 1 / 3])
    (row,) = csv.DictReader((Path(trainer.log_dir or "") / "metrics.csv").open())
    assert float(row["test/diversity/own/rewrites/text_similarity"]) == pytest.approx(2 / 3)
    assert float(row["test/diversity/own/same_prompt/redness"]) == pytest.approx(200 / 3)
    lines = capsys.readouterr().out.splitlines()
    assert sum("diversity of own: 3 images a prompt, channels" in line for line in lines) == 1
    cells = [[cell.strip() for cell in line.strip("│ ").split("│")] for line in lines if " to " in line]
    assert cells[:4] == [
        ["image_similarity", "same_prompt", "0.667", "0.333 to 1.000"],
        ["rewrites", "0.500", "0.000 to 1.000"],
        ["rewrites_shared_noise", "0.500", "0.000 to 1.000"],
        [DIFFERENCE, "-0.167", "-1.000 to 0.667"],
    ]


def test_sets_and_wordings(tmp_path: Path) -> None:
    """A reworded set is drawn in its words and compared with the prompt; two callbacks of a run stand side by side."""
    given = Diversity(Channels(), 3, sets=["own.typos", "others"], name="diversity_given")
    trainer = make_trainer(tmp_path, Diversity(Channels(), 3), given)
    trainer.validate(Painter(), Prompts(), verbose=False)
    results = results_of(tmp_path)
    assert {"diversity", "diversity_given"} <= set(results) and set(results["diversity"]) == {"own", "intervals"}
    typos = results["diversity_given"]["own.typos"]
    # "green" is painted green green red, "green green" always green; the original prompt is "red".
    assert typos["same_prompt"] == pytest.approx({"image_similarity": 1 / 3, "text_similarity": 1 / 3})
    assert typos["rewrites"]["text_similarity"] == 0
    assert results["diversity_given"]["others"]["same_prompt"]["text_similarity"] == 1
    (row,) = csv.DictReader((Path(trainer.log_dir or "") / "metrics.csv").open())
    assert float(row["val/diversity_given/own.typos/same_prompt/image_similarity"]) == pytest.approx(1 / 3)


def test_without_a_refiner_there_is_one_arm(tmp_path: Path) -> None:
    make_trainer(tmp_path, Diversity(PixelEncoder(), 2)).test(Painter(refines=False), Prompts(), verbose=False)
    found = results_of(tmp_path)["diversity"]["own"]
    assert found == {"same_prompt": {"image_similarity": pytest.approx(1)}}


def test_a_set_without_refining_has_one_arm(tmp_path: Path) -> None:
    prompts = Prompts()
    prompts.unrefined = {"others"}
    make_trainer(tmp_path, Diversity(Channels(), 2, sets=["others", "own"])).test(Painter(), prompts, verbose=False)
    found = results_of(tmp_path)["diversity"]
    assert set(found["others"]) == {"same_prompt"} and set(found["own"]) == {*ARMS, DIFFERENCE}


def test_a_mean_that_no_image_has_is_null(tmp_path: Path) -> None:
    class Blue(Painter):
        def draw(self, *args: Any) -> list[Image.Image]:
            return [Image.new("RGB", (8, 8), COLORS["blue"]) for _ in args[3]]

    make_trainer(tmp_path, Diversity(Channels(), 3, reward=Redness())).test(Blue(), Prompts(), verbose=False)
    found = results_of(tmp_path)["diversity"]
    assert found["own"]["rewrites"]["redness"] is None and found["own"]["rewrites"]["image_similarity"] == 1
    assert found["intervals"]["own"][DIFFERENCE]["redness"] == [None, None]


def test_differences_are_paired() -> None:
    """A replicate takes both arms' prompts by the same weights; intervals of equal arms are exactly 0."""
    values = {"same_prompt/x": [0.2, 0.9, 0.4], "rewrites/x": [0.1, 0.8, 0.3], "rewrites/y": [1.0, 0.0, 0.0]}
    sums = {name: torch.tensor(column, dtype=torch.float64) for name, column in values.items()}
    ones = torch.ones(3, dtype=torch.float64)
    table = PromptTable(["a", "b", "c"], ["t"] * 3, sums, {name: ones for name in sums}, ones)
    weights = torch.tensor([[1, 1, 1], [3, 0, 0], [0, 1, 2]], dtype=torch.float64)
    scores = summarize(table, weights)
    assert scores["same_prompt"]["x"].tolist() == pytest.approx([0.5, 0.2, 1.7 / 3])
    assert scores["rewrites"]["y"].tolist() == pytest.approx([1 / 3, 1, 0])
    assert scores[DIFFERENCE].keys() == {"x"} and scores[DIFFERENCE]["x"].tolist() == pytest.approx([-0.1] * 3)


def test_prompts_are_taken_from_all_tags_alike() -> None:
    """Also where tags alternate, with whose period every n-th prompt would coincide."""
    prompts = [("abc"[i % 3], f"{i}") for i in range(60)]
    rows = by_tag(prompts, 12, seed=0)
    assert rows == sorted(set(rows)) and len(rows) == 12
    assert [sum(prompts[row][0] == tag for row in rows) for tag in "abc"] == [4, 4, 4]
    assert len({row // 3 % 2 for row in rows}) == 2  # nor do they all come from one of two alternating styles
    assert rows == by_tag(prompts, 12, seed=0) != by_tag(prompts, 12, seed=1)
    assert by_tag(prompts, None, 0) == by_tag(prompts, 100, 0) == list(range(60))
    assert by_tag([], 4, 0) == []


# --- the miniature's agents -------------------------------------------------------------------------------------------


class Recorder(EvaluatedAgents):
    """The miniature's agents; notes what is drawn, and can fail as an interrupted run does."""

    def __init__(self, fails_at: int | None = None) -> None:
        flow = Flux1Policy(
            "miniature/flow", Sampling(2, 1), height=32, width=32, max_sequence_length=18, dtype="float32"
        )
        language = LanguagePolicy(
            "miniature/language", template="{prompt}", max_new_tokens=32, eval_max_new_tokens=32, dtype="float32"
        )
        super().__init__(flow, language, torch.optim.SGD)
        self.asked: list[tuple[str, str, int, list[str], list[int]]] = []
        self.drawn: dict[tuple[str, int], list[Image.Image]] = {}
        self.generated = 0
        generate = flow.generate

        def counted(prompts: Any, *args: Any, **kwargs: Any) -> Tensor:
            if self.generated == fails_at:
                raise KeyboardInterrupt
            self.generated += 1
            return generate(prompts, *args, **kwargs)

        flow.generate = counted  # type: ignore[method-assign, assignment]

    def draw(self, name: str, mode: str, k: int, samples: Any, prompts: Any, seeds: Any) -> list[Image.Image]:
        images = super().draw(name, mode, k, samples, prompts, seeds)
        if mode in ARMS:
            self.asked.append((name, mode, k, list(prompts), list(seeds)))
            self.drawn.setdefault((mode, k), []).extend(images)
        return images


def miniature(batch: int = 3) -> ShapesPrompts:
    return ShapesPrompts(train_prompts=6, eval_prompts=6, batch_size=2, eval_batch_size=batch)


def test_arms_share_their_noise(tmp_path: Path) -> None:
    module = Recorder()
    make_trainer(tmp_path, Diversity(PixelEncoder(), 4)).test(module, miniature(batch=6), verbose=False)
    asked = {(mode, k): (prompts, seeds) for name, mode, k, prompts, seeds in module.asked}
    assert {name for name, *_ in module.asked} == {"geneval.diversity-4-0"} and len(asked) == len(module.asked) == 12
    originals = [sample.prompt for sample in miniature().test_samples()["geneval"]]
    for k in range(4):
        same, new, shared = (asked[arm, k] for arm in ARMS)
        assert same[0] == originals and new[0] == shared[0]
        assert same[1] == new[1] and shared[1] == asked["same_prompt", 0][1]
    assert len({seed for k in range(4) for seed in asked["same_prompt", k][1]}) == 4 * 6
    assert module.drawn["rewrites", 0] == module.drawn["rewrites_shared_noise", 0]
    assert module.drawn["rewrites", 1] != module.drawn["rewrites_shared_noise", 1]
    wordings = [[asked["rewrites", k][0][row] for k in range(4)] for row in range(6)]
    assert sum(len(set(texts)) for texts in wordings) > 12

    # An independent reference for the table, from the images that were drawn.
    found = results_of(tmp_path)["diversity"]["geneval"]
    for arm in ARMS:
        flat = np.stack([[np.asarray(i, dtype=np.float64).ravel() for i in module.drawn[arm, k]] for k in range(4)])
        flat -= flat.mean(-1, keepdims=True)
        flat /= np.linalg.norm(flat, axis=-1, keepdims=True)
        cosines = [
            [a @ b for i, a in enumerate(flat[:, r]) for j, b in enumerate(flat[:, r]) if i < j] for r in range(6)
        ]
        assert found[arm]["image_similarity"] == pytest.approx(np.mean(cosines), abs=1e-6)
    distinct = np.mean([len(set(texts)) / 4 for texts in wordings])
    assert found["rewrites"]["distinct_rewrites"] == pytest.approx(distinct)


def test_rewrites_depend_on_the_prompt_and_the_seed_alone(tmp_path: Path) -> None:
    """Neither on how many prompts are drawn together, nor on what was drawn before."""

    def wordings(batch: int, seed: int, before: int) -> dict[tuple[int, int], tuple[str, int]]:
        module = Recorder()
        torch.manual_seed(before)
        make_trainer(tmp_path, Diversity(PixelEncoder(), 2, seed=seed)).test(module, miniature(batch), verbose=False)
        own = [entry for entry in module.asked if entry[1] == "rewrites"]
        flat = [(k, list(zip(texts, seeds, strict=True))) for _, _, k, texts, seeds in own]
        return {(k, i): pair for k in range(2) for i, pair in enumerate(p for n, ps in flat if n == k for p in ps)}

    one = wordings(batch=6, seed=0, before=1)
    assert len(one) == 12 and one == wordings(batch=2, seed=0, before=2)
    assert one != wordings(batch=6, seed=1, before=1)


def test_random_numbers_go_on_as_if_nothing_had_been_drawn(tmp_path: Path) -> None:
    class Watcher(L.Callback):
        """Stands before and after the measurement."""

        states: list[Tensor] = []

        def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            self.states.append(torch.get_rng_state())

    first, last = Watcher(), Watcher()
    first.states, last.states = [], []
    module = Recorder()
    make_trainer(tmp_path, first, Diversity(ShapesEncoder(), 2), last).validate(module, miniature(), verbose=False)
    assert len(module.asked) == 2 * 2 * 3
    assert torch.equal(first.states[0], last.states[0])


def test_a_killed_test_goes_on_from_its_images(tmp_path: Path) -> None:
    def test(module: Recorder, folder: str, root: str) -> Any:
        keep = KeepImages(str(tmp_path / folder))
        make_trainer(tmp_path / root, keep, Diversity(PixelEncoder(), 2)).test(module, miniature(), verbose=False)
        return results_of(tmp_path / root)["diversity"]

    whole = Recorder()
    table = test(whole, "whole", "0")
    assert whole.generated > 12  # the benchmark's own images, then 2 batches x 3 arms x 2
    before = whole.generated - 12
    killed = Recorder(fails_at=before + 7)
    with pytest.raises(BaseException):  # noqa: B017 (Lightning turns the interrupt into an exit)
        test(killed, "killed", "1")
    assert killed.generated == before + 7
    resumed = Recorder()
    assert test(resumed, "killed", "2") == table
    assert resumed.generated == 5
    again = Recorder()
    assert test(again, "whole", "3") == table
    assert again.generated == 0


# --- the command ------------------------------------------------------------------------------------------------------


def overlay(path: Path, *callbacks: dict[str, Any]) -> str:
    path.write_text(yaml.safe_dump({"trainer": {"callbacks": list(callbacks)}}))
    return str(path)


def diversity(encoder: str, **arguments: Any) -> dict[str, Any]:
    encoder_of = {"class_path": encoder}
    return {"class_path": "callbacks.diversity.Diversity", "init_args": {"encoder": encoder_of, **arguments}}


GENEVAL = {"class_path": "rewards.geneval.reward.GenEvalReward",
           "init_args": {"detector": {"class_path": "miniature.scenes.detector.ShapesDetector"}}}  # fmt: skip


@pytest.mark.parametrize("command", ["test", "validate"])
def test_the_command(command: str, tmp_path: Path) -> None:
    config = overlay(
        tmp_path / "overlay.yaml",
        diversity("miniature.scenes.encoder.ShapesEncoder", images_per_prompt=2, num_prompts=4, reward=GENEVAL),
        diversity("rewards.encoders.PixelEncoder", images_per_prompt=2, num_prompts=4, name="diversity_pixels"),
    )
    main(quick(command, tmp_path / "runs", f"--config={config}", "--data.init_args.eval_prompts=6"))
    results = results_of(tmp_path)
    shapes, pixels = results["diversity"]["geneval"], results["diversity_pixels"]["geneval"]
    for arm in ARMS:
        assert -1 <= pixels[arm]["image_similarity"] <= 1 and 0 <= shapes[arm]["text_similarity"] <= 1
        assert 1 <= shapes[arm]["distinct_contents"] <= 2
        share = 8 * shapes[arm]["geneval"]
        assert share == pytest.approx(round(share))  # a mean of 8 verdicts
        low, high = results["diversity_pixels"]["intervals"]["geneval"][arm]["image_similarity"]
        assert low <= pixels[arm]["image_similarity"] <= high
    assert pixels["rewrites"]["distinct_rewrites"] == shapes["rewrites"]["distinct_rewrites"]
    assert pixels["rewrites"]["image_similarity"] < pixels["same_prompt"]["image_similarity"]


def test_training_is_the_same_with_measurements_in_it(tmp_path: Path) -> None:
    def fit(name: str, *more: str, callbacks: list[dict[str, Any]]) -> tuple[dict[str, Tensor], list[dict[str, str]]]:
        (tmp_path / name).mkdir()
        config = overlay(tmp_path / name / "overlay.yaml", *callbacks)
        steps = ["--trainer.max_steps=2", "--trainer.val_check_interval=1", "--data.init_args.eval_prompts=2", *more]
        main(quick("fit", tmp_path / name, f"--config={config}", *steps))
        (checkpoint,) = (tmp_path / name).rglob("last.ckpt")
        (metrics,) = (tmp_path / name).rglob("metrics.csv")
        return torch.load(checkpoint, weights_only=True), list(csv.DictReader(metrics.open()))

    benchmark = {"class_path": "callbacks.geneval.GenEvalBenchmark", "init_args": GENEVAL["init_args"]}
    plain, _ = fit("plain", "--trainer.limit_val_batches=0", callbacks=[benchmark])
    every = {"images_per_prompt": 2, "num_prompts_in_fit": 2, "every_n_validations": 2}
    watched = [benchmark, diversity("miniature.scenes.encoder.ShapesEncoder", **every)]
    measured, rows = fit("measured", callbacks=watched)
    assert plain["state_dict"].keys() == measured["state_dict"].keys()
    assert all(torch.equal(value, measured["state_dict"][name]) for name, value in plain["state_dict"].items())
    # Validations before training and after each of two steps: the first and the third are measured.
    key = "val/diversity/geneval/rewrites/image_similarity"
    validations = [row for row in rows if row["val/geneval/without_pe"]]
    assert [bool(row[key]) for row in validations] == [True, False, True]
    assert measured["callbacks"]["Diversity diversity by bag of shapes"] == {"validations": 3}


# --- processes --------------------------------------------------------------------------------------------------------


def share_out(rank: int, folder: str, world: int = 2) -> None:
    for num in (1, 5):
        callback = Diversity(ShapesEncoder(), 2, num_prompts=num, reward=GenEvalReward(ShapesDetector()))
        trainer = make_trainer(
            Path(folder, f"{num}-{world}"), callback, devices=world, strategy="ddp" if world > 1 else "auto",
            plugins=[LightningEnvironment()],
        )  # fmt: skip
        # One prompt a batch: a batch of another make-up could round differently.
        trainer.test(Recorder(), miniature(batch=1), verbose=False)
        table = callback.tables["geneval"]
        torch.save({"ids": table.ids, "sums": table.sums, "counts": table.counts}, f"{folder}/{num}-{world}-{rank}.pt")


def test_two_processes_give_the_table_of_one(tmp_path: Path) -> None:
    two_processes(share_out, str(tmp_path))
    share_out(0, str(tmp_path), world=1)
    workers = [(0, 1), (0, 2), (1, 2)]
    for num in (1, 5):
        one, *two = (torch.load(tmp_path / f"{num}-{world}-{rank}.pt", weights_only=True) for rank, world in workers)
        assert len(one["ids"]) == num
        assert all(counts.tolist() == [1] * num for counts in one["counts"].values())
        for other in two:
            assert other["ids"] == one["ids"]
            assert {name: sums.tolist() for name, sums in other["sums"].items()} == {
                name: sums.tolist() for name, sums in one["sums"].items()
            }
        one_results, two_results = (results_of(tmp_path / f"{num}-{world}") for world in (1, 2))
        assert one_results == two_results


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"images_per_prompt": 1}, "images_per_prompt=1, use at least 2"),
        ({"num_prompts": 0}, "num_prompts=0, use at least 1"),
        ({"every_n_validations": 0}, "every_n_validations=0, use at least 1"),
        ({"num_prompts_in_fit": 0}, "num_prompts_in_fit=0, use at least 1"),
        ({"resamples": 0}, "resamples=0, use at least 1"),
        ({"sets": []}, "empty list of `sets`"),
    ],
)
def test_bounds(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Diversity(PixelEncoder(), **arguments)


def test_the_encoder_is_the_papers_and_waits(tmp_path: Path) -> None:
    encoder = Diversity().encoder
    assert isinstance(encoder, ClipEncoder) and encoder.model == VIT_G and encoder.network is None


def test_a_set_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="names 'other', which is not evaluated here: use some of own.typos, own, oth"):
        make_trainer(tmp_path, Diversity(PixelEncoder(), sets=["other"])).test(Painter(), Prompts(), verbose=False)


def test_two_of_one_name(tmp_path: Path) -> None:
    two = make_trainer(tmp_path, Diversity(PixelEncoder()), Diversity(ShapesEncoder()))
    with pytest.raises(ValueError, match="two Diversity callbacks are called 'diversity': give one of them another"):
        two.test(Painter(), Prompts(), verbose=False)


def test_nothing_to_draw_with(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing to draw with in BoringModel: leave it out"):
        make_trainer(tmp_path, Diversity(PixelEncoder())).test(BoringModel(), verbose=False)


def test_a_moving_average_comes_after(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, EMA(), Diversity(PixelEncoder(), every_n_validations=1))
    with pytest.raises(ValueError, match=r"list Diversity before it in `trainer\.callbacks`"):
        trainer.callbacks[-1].setup(trainer, Painter(), "fit")  # type: ignore[attr-defined]


def test_an_encoder_that_drops_an_image(tmp_path: Path) -> None:
    class Drops(PixelEncoder):
        def images(self, images: Sequence[Image.Image]) -> Tensor:
            return super().images(images)[1:]

    with pytest.raises(ValueError, match=r"Drops.images returned \[5, 3072\] for 6 images"):
        make_trainer(tmp_path, Diversity(Drops(), 3)).test(Painter(), Prompts(), verbose=False)
