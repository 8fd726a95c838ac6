"""Scoring beside drawing, failed scores in an update, and a scorer that goes away for good."""

from __future__ import annotations

import math
import os
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from callbacks.geneval import GenEvalBenchmark
from datamodules.sample import PromptSample
from lightning_modules.agents import check_precision
from lightning_modules.cli import main
from lightning_modules.policies.flux1 import Flux1Policy
from lightning_modules.policies.language import LanguagePolicy
from lightning_modules.prompt_rl import PromptRL
from lightning_modules.scoring import Scoring
from miniature.scenes.detector import ShapesDetector
from rewards.arguments import OnFailure
from rewards.base import Reward, RewardBatch, RewardUnavailable, Score
from rewards.geneval.reward import GenEvalReward
from rewards.tagged import TaggedReward
from tests.lightning_modules.test_prompt_rl import Listed, attach, fit, gradients
from tests.lightning_modules.test_resume import SHORT, same

pytestmark = pytest.mark.slow

MakeFlow = Callable[..., Flux1Policy]
MakeLanguage = Callable[..., LanguagePolicy]


class Width(Reward):
    """An image's width, and the thread that scored it."""

    name = "width"

    def __init__(self) -> None:
        self.threads: list[str] = []
        self.autocast: list[bool] = []

    def __call__(self, batch: RewardBatch) -> list[Score]:
        self.threads.append(threading.current_thread().name)
        self.autocast.append(torch.is_autocast_enabled("cpu"))
        return [Score(image.width, image.width, image.width) for image in batch.images]


class DownAfter(GenEvalReward):
    """The miniature's reward until its server is gone for good, or it returns no scores, on one rank or on all."""

    def __init__(self, batches: int, rank: int | None = None, broken: bool = False) -> None:
        super().__init__(ShapesDetector())
        self.batches = batches
        self.rank = rank
        self.broken = broken

    def __call__(self, batch: RewardBatch) -> list[Score]:
        if self.batches == 0 and self.rank in (None, int(os.environ.get("LOCAL_RANK", 0))):
            if self.broken:
                return [None] * len(batch)  # type: ignore[list-item]
            raise RewardUnavailable("the reward server is gone.")
        self.batches = max(self.batches - 1, 0)
        return super().__call__(batch)


def make_images(*widths: int) -> list[Image.Image]:
    return [Image.new("RGB", (width, 1)) for width in widths]


@pytest.mark.parametrize("overlap", [True, False])
def test_scores_come_in_the_order_of_the_chunks(overlap: bool, samples: Sequence[PromptSample]) -> None:
    reward = Width()
    with torch.autocast("cpu"), Scoring(reward, torch.device("cpu"), overlap=overlap) as scoring:
        for widths in ((5, 6), (1,), (9, 8, 7)):
            scoring.submit([samples[0]] * len(widths), make_images(*widths))
        assert [score.native for score in scoring.scores()] == [5, 6, 1, 9, 8, 7]
    # One thread in both modes, and free of the training's autocast.
    assert set(reward.threads) == {"reward_0"} and reward.autocast == [False] * 3


def test_drawing_goes_on_while_a_chunk_is_scored(samples: Sequence[PromptSample]) -> None:
    drawn = threading.Event()

    class Waits(Width):
        def __call__(self, batch: RewardBatch) -> list[Score]:
            assert drawn.wait(10), "the next chunk was not drawn while this one was scored"
            return super().__call__(batch)

    with Scoring(Waits(), torch.device("cpu")) as scoring:
        scoring.submit(samples[:1], make_images(3))
        drawn.set()  # reached only if `submit` did not wait
        assert [score.native for score in scoring.scores()] == [3]


def test_a_groupwise_reward_gets_whole_groups(samples: Sequence[PromptSample]) -> None:
    """Groups of 3 that are drawn in chunks of 2, 5, 1 and 4 images."""
    sizes: list[int] = []

    class Wider(Reward):
        groupwise = True

        def __call__(self, batch: RewardBatch) -> list[Score]:
            sizes.append(len(batch))
            assert all(len({sample.id for sample in batch.samples[i : i + 3]}) == 1 for i in range(0, len(batch), 3))
            return [Score(image.width, 0, 0) for image in batch.images]

    judged = [sample for sample in samples[:4] for _ in range(3)]
    with Scoring(TaggedReward({sample.tag: Wider() for sample in judged}), torch.device("cpu"), group=3) as scoring:
        for rows in (slice(0, 2), slice(2, 7), slice(7, 8), slice(8, 12)):
            scoring.submit(judged[rows], make_images(*range(1, 13)[rows]))
        assert [score.native for score in scoring.scores()] == list(range(1, 13))
    assert all(size % 3 == 0 for size in sizes) and sum(sizes) == 12


def test_a_reward_that_loses_a_score_is_named(samples: Sequence[PromptSample]) -> None:
    class Short(Width):
        def __call__(self, batch: RewardBatch) -> list[Score]:
            return super().__call__(batch)[1:]

    with pytest.raises(ValueError, match="Short returned 1 scores for 2 images"):
        with Scoring(Short(), torch.device("cpu")) as scoring:
            scoring.submit(samples[:2], make_images(1, 2))
            scoring.scores()


def test_a_reward_that_returns_nothing_ends_a_fit_before_its_evaluation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[object] = []
    monkeypatch.setattr(PromptRL, "validation_step", lambda *_: drawn.append(0))
    reward = "--model.reward=tests.rewards.test_scores.Returns"
    with pytest.raises(SystemExit) as stopped:
        main([*SHORT, "--trainer.max_steps=1", f"--trainer.default_root_dir={tmp_path}", reward])
    assert stopped.value.code == 2 and not drawn
    assert "lightning: error: Returns returned None for " in capsys.readouterr().err.splitlines()[-1]


class Rude(GenEvalReward):
    """The miniature's reward, which does something else first from a call on."""

    def __init__(self, fault: str, after: int = 0, on_failure: OnFailure = "fail") -> None:
        super().__init__(ShapesDetector())
        self.fault = fault
        self.after = after
        self.on_failure = on_failure

    def __call__(self, batch: RewardBatch) -> list[Score]:
        self.after -= 1
        if self.after < 0:
            getattr(self, f"_{self.fault}", lambda: None)()
        return super().__call__(batch)

    def _exit(self) -> None:
        sys.exit(0)

    def _raise(self) -> None:
        raise KeyError("color")

    def _float64(self) -> None:
        torch.set_default_dtype(torch.float64)


def rude(tmp_path: Path, fault: str, after: int = 0, on_failure: str = "fail") -> list[str]:
    """Returns a short command of three steps, each of which calls the reward once."""
    reward = "--model.reward"
    options = {"fault": fault, "after": after, "on_failure": on_failure}
    return [
        *SHORT,
        "--trainer.max_steps=3",
        f"--trainer.default_root_dir={tmp_path}",
        f"{reward}=tests.lightning_modules.test_scoring.Rude",
        *(f"{reward}.{name}={value}" for name, value in options.items()),
    ]


@pytest.mark.parametrize("fault", ["exit", "raise"])
def test_a_scorer_that_fails_at_once_ends_a_fit_before_its_evaluation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """Whatever its `on_failure` is: nothing would be trained."""
    drawn: list[object] = []
    monkeypatch.setattr(PromptRL, "validation_step", lambda *_: drawn.append(0))
    for on_failure in ("fail", "skip"):
        with pytest.raises(SystemExit) as stopped, warnings.catch_warnings(action="ignore"):
            main(rude(tmp_path, fault, on_failure=on_failure))
        assert stopped.value.code == 2 and not drawn
        last = capsys.readouterr().err.splitlines()[-1]
        assert last.startswith("lightning: error: ") and "geneval failed with" in last and "test_scoring.py:" in last


def test_a_scorer_that_fails_later_leaves_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(rude(tmp_path, "exit", after=2))
    said = capsys.readouterr().err
    assert "Traceback" not in said and "lightning: error: geneval failed with SystemExit: 0 (" in said
    (path,) = tmp_path.rglob("last.ckpt")
    assert torch.load(path, weights_only=True)["global_step"] == 2


def test_a_setting_changed_while_others_are_drawn_spoils_all_of_them(samples: Sequence[PromptSample]) -> None:
    """Only where drawing goes on meanwhile."""
    for overlap in (True, False):
        reward = Rude("float64", 1, "skip")
        with Scoring(reward, torch.device("cpu"), overlap=overlap) as scoring:
            with pytest.warns(UserWarning, match="default dtype"):
                for _ in range(2):
                    scoring.submit(samples[:2], [Image.new("RGB", (32, 32))] * 2)
                scores = scoring.scores()
        assert [score.valid for score in scores] == [not overlap] * 2 + [False] * 2
    assert torch.get_default_dtype() == torch.float32


def test_a_benchmark_that_fails_leaves_a_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the validation after the third step; the one before training went well."""
    updates: list[object] = []
    update: Callable[..., Any] = PromptRL.update

    def counted(self: PromptRL, rollout: object) -> object:
        updates.append(rollout)
        return update(self, rollout)

    def score(self: GenEvalBenchmark, samples: Sequence[PromptSample], images: object) -> list[dict[str, float]]:
        if updates:
            raise KeyError("color")
        return [{"correct": 1.0}] * len(samples)

    monkeypatch.setattr(PromptRL, "update", counted)
    monkeypatch.setattr(GenEvalBenchmark, "score", score)
    with pytest.raises(SystemExit):
        main(rude(tmp_path, "none"))
    assert "lightning: error: GenEvalBenchmark failed with KeyError: 'color' (" in capsys.readouterr().err
    (path,) = tmp_path.rglob("last.ckpt")
    assert torch.load(path, weights_only=True)["global_step"] == 3


def test_overlap_changes_nothing(make_flow: MakeFlow, make_language: MakeLanguage, samples: list[PromptSample]) -> None:
    """Scores, images and gradients of a step are bitwise the same with overlap and without."""
    found = []
    for overlap in (True, False):
        reward = GenEvalReward(ShapesDetector())
        flow = make_flow(micro_batch_size=3)
        module = attach(PromptRL(flow, reward, make_language(), 4, 2, overlap_scoring=overlap))
        torch.manual_seed(0)
        rollout = module.collect(samples[4:])
        module.update(rollout)
        pixels = [image.tobytes() for image in rollout.images]
        found.append((pixels, [score.rl for score in rollout.scores], gradients(module)))
    (pixels, scores, grads), (other_pixels, other_scores, other_grads) = found
    assert pixels == other_pixels and scores == other_scores and len(set(scores)) > 1
    assert same(grads, other_grads) and sum(g.abs().sum() for g in grads.values()) > 0


def test_a_group_with_one_valid_score_takes_no_part(
    make_flow: MakeFlow, make_language: MakeLanguage, samples: list[PromptSample]
) -> None:
    """The gradient, KL included, is that of a batch without the group, at the whole batch's scale."""
    found = []
    for values in ([0.0, 1.0, 3.0, 1.0] + [None, None, 5.0, None], [0.0, 1.0, 3.0, 1.0] + [2.0] * 4):
        module = attach(PromptRL(make_flow(), Listed(values), make_language(), 4, 2, format_weight=0.0))
        torch.manual_seed(0)
        rollout = module.collect(samples[:2])
        module.update(rollout)
        found.append((rollout.counted.tolist(), gradients(module)))
    (masked, some), (whole, everything) = found
    assert masked == [[True] * 4, [False] * 4] and whole == [[True] * 4] * 2
    for name, gradient in some.items():  # no KL here: equal rewards have no gradient either
        torch.testing.assert_close(gradient, everything[name], atol=2e-6, rtol=1e-3)
    assert sum(g.abs().sum() for g in some.values()) > 0


def test_kl_and_momentum_do_not_move_a_policy_without_scores(
    make_flow: MakeFlow, make_language: MakeLanguage, samples: list[PromptSample]
) -> None:
    reward = Listed([0.0, 1.0, 3.0, 1.0])
    language = make_language(kl_weight=0.5, learning_rate=1e-2)
    module = attach(PromptRL(make_flow(kl_weight=0.5, learning_rate=1e-2), reward, language, 4, 2))
    module.update(module.collect(samples[:1]))  # now there are momenta, and a KL above 0
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    reward.values = [None, 1.0, None, None]
    module.update(module.collect(samples[:1]))
    assert same(before, {name: parameter.detach() for name, parameter in module.named_parameters()})
    reward.values = [0.0, 1.0, 3.0, 1.0]
    module.update(module.collect(samples[:1]))
    assert not same(before, {name: parameter.detach() for name, parameter in module.named_parameters()})


class Alternates(Reward):
    """Scores a step's prompts by one scorer or the other, in turn."""

    name = "alternates"

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, batch: RewardBatch) -> list[Score]:
        self.calls += 1
        part = Score(self.calls, self.calls, self.calls)
        return [Score(1.0, 1.0, 1.0, parts={"ab"[self.calls % 2]: part}) for _ in batch.images]


def test_a_scorer_that_was_not_asked_leaves_a_gap(make_flow: MakeFlow, tmp_path: Path) -> None:
    steps = fit(PromptRL(make_flow(), Alternates(), None, 2, 2), tmp_path, 3)
    assert [step["reward/b"] for step in steps][0] == 1.0
    assert [math.isnan(step["reward/b"]) for step in steps] == [False, True, False]
    assert [step["reward/a"] for step in steps[1:2]] == [2.0] and math.isnan(steps[2]["reward/a"])


def test_a_scorer_lost_in_validation_leaves_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = yaml.safe_load(Path("configs/quickstart.yaml").read_text())
    lost = {
        "class_path": "tests.lightning_modules.test_scoring.DownAfter",
        "init_args": {"batches": 1},
    }  # the one before training
    config["trainer"]["callbacks"] += [
        {"class_path": "callbacks.reward.RewardBenchmark", "init_args": {"reward": lost, "sets": ["unseen"]}}
    ]
    config["model"]["init_args"] |= {"language": None, "num_retained": 8}
    path = tmp_path / "lost.yaml"
    path.write_text(yaml.safe_dump(config))
    with pytest.raises(SystemExit):
        main(
            ["fit", f"--config={path}", *SHORT[2:-1], "--trainer.max_steps=6", f"--trainer.default_root_dir={tmp_path}"]
        )
    assert "the reward server is gone." in capsys.readouterr().err
    (checkpoint,) = tmp_path.rglob("last.ckpt")
    assert torch.load(checkpoint, weights_only=True)["global_step"] == 3


def test_training_stops_with_a_checkpoint_when_scores_end_and_resumes_exactly(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stopped in step 3 of 4, in mid-epoch, and resumed: parameters as in a run that was never stopped."""
    config = yaml.safe_load(Path("configs/quickstart.yaml").read_text())
    reward = {"class_path": "tests.lightning_modules.test_scoring.DownAfter", "init_args": {"batches": 2}}
    config["model"]["init_args"]["reward"] = reward
    # Two prompts a step of twelve, so that the stop is in mid-epoch; the last checkpoint before it is of step 2.
    path = tmp_path / "down.yaml"
    path.write_text(yaml.safe_dump(config))
    options = [
        *SHORT[2:],
        "--trainer.max_steps=4",
        "--trainer.limit_val_batches=0",
        "--data.init_args.batch_size=2",
        "--checkpoint.every_n_train_steps=9",
    ]
    with pytest.raises(SystemExit):
        main(["fit", f"--config={path}", *options, f"--trainer.default_root_dir={tmp_path / 'stopped'}"])
    (stopped,) = (tmp_path / "stopped").rglob("last.ckpt")
    said = f"lightning: error: the reward server is gone. A fit stops so with its state in {stopped}: go on with --ckpt"
    assert said in capsys.readouterr().err
    assert torch.load(stopped, weights_only=True)["global_step"] == 2
    again = "--model.init_args.reward.init_args.batches=100"
    for name, more in (("resumed", [f"--ckpt_path={stopped}"]), ("unbroken", [])):
        main(["fit", f"--config={path}", *options, f"--trainer.default_root_dir={tmp_path / name}", again, *more])
    resumed, unbroken = (
        torch.load(next((tmp_path / name).rglob("last.ckpt")), weights_only=True) for name in ("resumed", "unbroken")
    )
    assert resumed["global_step"] == unbroken["global_step"] == 4
    assert same(resumed["state_dict"], unbroken["state_dict"])
    assert same(resumed["optimizer_states"], unbroken["optimizer_states"])


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_precisions_that_would_train_wrongly_are_refused(precision: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["fit", "--config=configs/quickstart.yaml", f"--trainer.precision={precision}"])
    assert f"`trainer.precision` is {precision}, which PromptRL does not train in" in capsys.readouterr().err
    with pytest.raises(ValueError, match="is 16-mixed"):  # on a CPU Lightning itself falls back to bf16-mixed
        check_precision("16-mixed")
