"""A fit's files for TensorBoard, read back by TensorBoard's own code: layout, curves over rollouts, HParams."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.custom_scalar.custom_scalars_plugin import CustomScalarsPlugin
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams import api_pb2, backend_context, list_session_groups
from torch.utils.tensorboard import SummaryWriter

from callbacks.dashboard import Dashboard, hyperparameters, layout
from callbacks.diversity import Diversity
from callbacks.geneval import GenEvalBenchmark
from callbacks.health import Health
from callbacks.reward import RewardBenchmark
from callbacks.robustness import PromptRobustness
from datamodules.base import PromptDataModule, PromptSample
from lightning_modules.cli import main
from lightning_modules.policies.flow import Sampling
from lightning_modules.policies.flux1 import Flux1Policy
from lightning_modules.policies.language import LanguagePolicy
from lightning_modules.prompt_rl import PromptRL
from miniature.scenes.detector import ShapesDetector
from miniature.scenes.prompts import ShapesPrompts
from miniature.scenes.quality import ShapesQuality
from rewards.encoders import PixelEncoder
from tests.short_runs import folder, short_fit

pytestmark = pytest.mark.slow

EXPERIMENTS = ("flow_only", "promptrl")
CATEGORIES = ["Reward", "Benchmarks", "By rollouts", "Other wordings", "Diversity", "Health", "Total reward"]


def events(run: Path) -> EventAccumulator:
    return EventAccumulator(str(run), {"scalars": 0, "tensors": 0}).Reload()


def curve(run: Path, tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in events(run).Scalars(tag)]


def column(run: Path, name: str) -> list[float]:
    """A column of `metrics.csv`, in its order, gaps left out."""
    with (run / "metrics.csv").open() as file:
        return [float(row[name]) for row in csv.DictReader(file) if row[name]]


def layouts(run: Path) -> list[Layout]:
    tensors = events(run).Tensors("custom_scalars__config__")
    return [Layout.FromString(tensor.tensor_proto.string_val[0]) for tensor in tensors]


def charts(shown: Layout) -> dict[str, dict[str, list[str]]]:
    """Category -> title -> regular expressions."""
    return {one.title: {chart.title: list(chart.multiline.tag) for chart in one.chart} for one in shown.category}


def context(root: Path) -> TBContext:
    """The context through which TensorBoard's own pages read a folder of runs."""
    multiplexer = EventMultiplexer(tensor_size_guidance={"custom_scalars": 0})
    multiplexer.AddRunsFromDirectory(str(root)).Reload()
    return TBContext(logdir=str(root), data_provider=MultiplexerDataProvider(multiplexer, str(root)))


def merged(root: Path) -> dict[str, list[str]]:
    """Category -> titles, as TensorBoard merges the layouts of all runs."""
    shown = json.loads(CustomScalarsPlugin(context(root)).layout_impl(RequestContext(), ""))
    return {one["title"]: [chart["title"] for chart in one.get("chart", [])] for one in shown["category"]}


# --- curves -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("experiment", "images"), [("flow_only", 16), ("promptrl", 8)])
def test_curves_over_rollouts_are_those_of_the_log(two_runs: Path, experiment: str, images: int) -> None:
    run = folder(two_runs, experiment)
    for tag in ("reward", "reward/geneval"):
        rollouts, rewards = zip(*curve(run, f"by_rollouts/{tag}"), strict=True)
        assert list(rollouts) == column(run, "rollouts") == [images, 2 * images]
        assert list(rewards) == pytest.approx(column(run, tag), rel=1e-6)
    modes = ["without_pe", "with_pe"] if experiment == "promptrl" else ["without_pe"]
    for mode in modes:
        scores = column(run, f"val/geneval/{mode}")
        rollouts, values = zip(*curve(run, f"by_rollouts/val/geneval/{mode}"), strict=True)
        assert list(rollouts) == [0, images, 2 * images]
        assert list(values) == pytest.approx(scores, rel=1e-6)
        for name in ("paraphrase", "unseen"):  # all prompts have all wordings, so the pairs' difference is the scores'
            rollouts, values = zip(
                *curve(run, f"by_rollouts/val/robustness/GenEvalBenchmark/{name}/{mode}"), strict=True
            )
            others = column(run, f"val/{name}/{mode}")
            assert list(rollouts) == [0, images, 2 * images]
            assert list(values) == pytest.approx([a - b for a, b in zip(others, scores, strict=True)], abs=1e-6)
    # The headlines, and nothing else.
    tags = [tag for tag in events(run).Tags()["scalars"] if tag.startswith("by_rollouts/")]
    assert len(tags) == 2 + 3 * len(modes)


def test_a_resumed_run_goes_on_counting(two_runs: Path, tmp_path: Path) -> None:
    last = folder(two_runs, "flow_only") / "checkpoints" / "last.ckpt"
    # Without a validation in the first epochs, the sets are not known before the run's end.
    late = ["--trainer.check_val_every_n_epoch=9", "--trainer.val_check_interval=null"]
    main([*short_fit(tmp_path, "flow_only", 2, steps=3), f"--ckpt_path={last}", *late])
    run = folder(tmp_path, "flow_only")
    assert [step for step, _ in curve(run, "by_rollouts/reward")] == [48]
    assert [step for step, _ in curve(run, "by_rollouts/val/geneval/without_pe")] == [48]
    first, second = layouts(run)
    assert charts(first)["Benchmarks"] == {}
    assert second == layouts(folder(two_runs, "flow_only"))[0]
    assert merged(tmp_path)["Benchmarks"] == ["val/geneval/without_pe"], "the last layout counts"


def test_other_modules_are_left_alone(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, name="run")
    trainer = L.Trainer(
        accelerator="cpu", max_steps=1, logger=logger, callbacks=[Dashboard()], limit_val_batches=1,
        log_every_n_steps=1, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(BoringModel())
    found = EventAccumulator(logger.log_dir).Reload().Tags()
    assert found["tensors"] == [] and set(found["scalars"]) <= {"epoch"}


# --- layout ---------------------------------------------------------------------------------------------------------


def test_layout_shows_what_was_logged(two_runs: Path) -> None:
    (flow_only,), (promptrl,) = (layouts(folder(two_runs, experiment)) for experiment in EXPERIMENTS)
    shown = charts(promptrl)
    assert list(shown) == list(charts(flow_only)) == CATEGORIES
    for category, titles in charts(flow_only).items():
        assert titles.items() <= shown[category].items(), "equal charts are shown once, with the curves of both runs"
    assert list(shown["Reward"].items()) == [
        ("task reward", ["reward/[^/]+$"]),
        ("format", ["format$"]),
    ]
    assert shown["Total reward"] == {
        "total reward (with format)": ["reward$"],
        "total reward (with format) by rollouts": ["by_rollouts/reward$"],
    }
    modes = ("without_pe", "with_pe")
    assert shown["Benchmarks"] == {f"val/geneval/{mode}": [f"val/geneval/{mode}$"] for mode in modes}
    assert list(shown["Other wordings"]) == [
        f"val/{name}/{mode}" for name in ("paraphrase", "unseen") for mode in modes
    ]
    assert list(shown["By rollouts"]) == [
        "task reward by rollouts",
        *(f"by_rollouts/val/geneval/{mode}" for mode in modes),
        *(f"by_rollouts/val/robustness/GenEvalBenchmark/paraphrase/{mode}" for mode in modes),
        *(f"by_rollouts/val/robustness/GenEvalBenchmark/unseen/{mode}" for mode in modes),
    ]
    for run, layout_of_it in (("promptrl", shown), ("flow_only", charts(flow_only))):
        logged = events(folder(two_runs, run)).Tags()["scalars"]
        for titles in layout_of_it.values():
            for title, patterns in titles.items():
                # TensorBoard's way of looking for them. A KL weight of 0 leaves no KL of the flow model.
                matches = [tag for tag in logged for pattern in patterns if re.match(pattern, tag)]
                assert len(matches) == (0 if title == "train/flow/kl" else 1), title


class Prompts(PromptDataModule):
    """The sets "a+b" and "c", and rewordings of "a+b"."""

    def __init__(self, *kinds: str) -> None:
        super().__init__()
        self.kinds = kinds
        self.originals = {f"a+b.{kind}": "a+b" for kind in kinds}

    def train_samples(self) -> list[PromptSample]:
        return []

    def eval_samples(self) -> dict[str, list[PromptSample]]:
        names = ["a+b", "c", *self.originals]
        return {name: [PromptSample("0", "prompt", "colors", {})] for name in names}


def prepared(data: PromptDataModule, *callbacks: L.Callback) -> L.Trainer:
    """A trainer that knows its evaluation sets."""
    trainer: Any = L.Trainer(
        accelerator="cpu", logger=False, callbacks=list(callbacks), enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    trainer.datamodule = data
    data.val_dataloader()
    return trainer


def test_layout_of_other_callbacks() -> None:
    shown = layout(
        prepared(
            Prompts("typos"),
            RewardBenchmark(ShapesQuality()),
            GenEvalBenchmark(ShapesDetector(), sets=["c"]),
            PromptRobustness([]),
            Diversity(PixelEncoder(), every_n_validations=2),
            Diversity(PixelEncoder(), name="diversity_tests"),  # `every_n_validations: null`: not within a fit
            Health(),
        ),
        refines=True,
    )
    name = ShapesQuality().name
    modes = ("without_pe", "with_pe")
    assert shown["Benchmarks"] == {
        **{f"val/a+b/{name}/{mode}": ["Multiline", [rf"val/a\+b/{name}/{mode}$"]] for mode in modes},
        **{f"val/c/{name}/{mode}": ["Multiline", [f"val/c/{name}/{mode}$"]] for mode in modes},
        **{f"val/c/{mode}": ["Multiline", [f"val/c/{mode}$"]] for mode in modes},
    }
    title = f"val/robustness/{RewardBenchmark(ShapesQuality()).title}/a+b.typos"
    assert shown["Other wordings"] == {
        tag: ["Multiline", [f"{re.escape(tag)}$"]]
        for tag in [
            *(f"val/a+b.typos/{name}/{mode}" for mode in modes),
            *(f"{title}/{mode}" for mode in (*modes, "against_pe")),
        ]
    }
    assert shown["Diversity"]["val/diversity/a+b"][1] == [
        rf"val/diversity/a\+b/{arm}/image_similarity$" for arm in ("same_prompt", "rewrites", "rewrites_shared_noise")
    ]
    assert not [title for title in shown["Diversity"] if "diversity_tests" in title]
    assert "health/duplicates" in shown["Health"] and not [t for t in shown["Health"] if "held_out" in t]


def test_layouts_of_unlike_runs_become_one(tmp_path: Path) -> None:
    """The first run rewords nothing and has no refiner, the second and third different kinds."""
    for run, kinds in (("1", ()), ("2", ("typos",)), ("3", ("order", "typos"))):
        trainer = prepared(Prompts(*kinds), GenEvalBenchmark(ShapesDetector()))
        with SummaryWriter(tmp_path / run) as writer:
            writer.add_custom_scalars(layout(trainer, refines=run != "1"))
    found = merged(tmp_path)
    assert list(found) == CATEGORIES
    modes = ("without_pe", "with_pe")
    assert found["Benchmarks"] == [f"val/{name}/{mode}" for mode in modes for name in ("a+b", "c")]
    assert found["Other wordings"] == [f"val/a+b.{kind}/{mode}" for kind in ("typos", "order") for mode in modes]


# --- HParams --------------------------------------------------------------------------------------------------------


def test_a_row_of_hparams_for_each_run(two_runs: Path) -> None:
    request = api_pb2.ListSessionGroupsRequest(
        slice_size=10, allowed_statuses=[api_pb2.STATUS_SUCCESS, api_pb2.STATUS_RUNNING, api_pb2.STATUS_UNKNOWN]
    )
    read = backend_context.Context(context(two_runs))
    rows = {
        group.sessions[0].name: group
        for group in list_session_groups.Handler(RequestContext(), read, "", request).run().session_groups
    }
    assert sorted(rows) == [f"miniature/{experiment}/version_0" for experiment in EXPERIMENTS]
    flow_only, promptrl = (
        {name: value.string_value or value.number_value for name, value in rows[run].hparams.items()}
        for run in sorted(rows)
    )
    assert promptrl == {
        "experiment": "miniature/promptrl",
        "agents": "PromptRL",
        "flow.learning_rate": 1.5e-4,
        "flow.kl_weight": 0,
        "language.learning_rate": 3e-4,
        "language.kl_weight": 0.08,
        "group_size": 8,
        "num_retained": 2,
        "images_per_prompt": 1,
        "batch_size": 1,
        "processes": 1,
        "updates_per_rollout": 1,
        "num_steps": 8,
        "sde_steps": 3,
        "sde_type": "flow_sde",
        "noise_level": 0.8,
        "clip_range": 1e-4,
        "seed": 42,
    }
    assert flow_only == promptrl | {
        "experiment": "miniature/flow_only",
        "agents": "flow-only",
        "language.learning_rate": 0,
        "language.kl_weight": 0,
        "num_retained": 8,
        "batch_size": 2,
    }
    for experiment, run in zip(EXPERIMENTS, sorted(rows), strict=True):
        shown = {metric.name.tag: metric.value for metric in rows[run].metric_values}
        assert rows[run].sessions[0].status == api_pb2.STATUS_SUCCESS
        for tag in ["val/geneval/without_pe", "val/unseen/without_pe", "reward"]:
            assert shown[tag] == pytest.approx(column(folder(two_runs, experiment), tag)[-1], rel=1e-6)
        # TensorBoard shows five metrics unasked, in this order.
        first = [metric.name.tag for metric in rows[run].metric_values][:3]
        assert first == ["by_rollouts/reward", "by_rollouts/reward/geneval"] + (
            ["by_rollouts/val/geneval/with_pe"] if experiment == "promptrl" else ["by_rollouts/val/geneval/without_pe"]
        )
    assert "val/geneval/with_pe" in {metric.name.tag for metric in rows[max(rows)].metric_values}


@pytest.mark.parametrize(
    ("rates", "agents"),
    [((1e-4, 1e-4), "PromptRL"), ((None, 1e-4), "prompt-only"), ((1e-4, None), "flow-only, static PE")],
)
def test_agents_are_called_as_where_runs_are_read(rates: tuple[float | None, float | None], agents: str) -> None:
    """A frozen refiner is no flow-only run; its KL weight says nothing."""
    flow = Flux1Policy("miniature/flow", Sampling(8, 3), learning_rate=rates[0])
    language = LanguagePolicy("miniature/language", learning_rate=rates[1])
    trainer: Any = L.Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
    trainer.datamodule = ShapesPrompts()
    found = hyperparameters(trainer, PromptRL(flow, ShapesQuality(), language))
    assert found["agents"] == agents and found["language.kl_weight"] == (0.01 if rates[1] else 0.0)
