"""Settings of objectives that cannot work are refused in one sentence, before weights are loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lightning_modules.agents import Agents
from lightning_modules.cli import main
from lightning_modules.objectives import AWM, DGPO, DPO, DiffusionNFT, FlowGRPO, RefinerGRPO, RewardWeighted
from lightning_modules.policies.flow import Sampling
from lightning_modules.policies.kept import Decay
from lightning_modules.prompt_rl import PromptRL
from tests.lightning_modules.objectives.linear import LinearPolicy, TablePolicy
from tests.lightning_modules.test_joint_step import Listed

ARGUMENTS: dict[str, tuple[Callable[[], Any], str]] = {
    "levels": (lambda: AWM(levels=0), "model.objective has levels=0, use at least 1."),
    "best": (lambda: RewardWeighted(best=0), "model.objective has best=0, use at least 1."),
    "NFT's beta": (lambda: DiffusionNFT(beta=0), "DiffusionNFT has beta=0, advantage_range=5.0: use numbers above 0."),
    "NFT's range": (lambda: DiffusionNFT(advantage_range=-1), "advantage_range=-1: use numbers above 0."),
    "DPO's beta": (lambda: DPO(beta=0), "`model.objective` DPO has beta=0: use a number above 0."),
    "DGPO's beta": (lambda: DGPO(beta=-2), "`model.objective` DGPO has beta=-2: use a number above 0."),
    "trust region": (lambda: FlowGRPO(trust_region=-1), "model.objective has trust_region=-1, use at least 0."),
    "no number": (lambda: FlowGRPO(trust_region=float("nan")), "has trust_region=nan, use a finite number."),
    "clip_high": (lambda: FlowGRPO(clip_high=-0.1), "model.objective has clip_high=-0.1, use at least 0."),
    "trajectories, normalised": (lambda: FlowGRPO(True, ratio="trajectory"), "has ratio: trajectory, which goes with"),
    "trajectories, trusted": (lambda: FlowGRPO(ratio="trajectory", trust_region=1), "or use ratio: step."),
    "trajectories, weighed": (lambda: FlowGRPO(ratio="trajectory", step_weights="noise"), "or use ratio: step."),
    "trust that clips": (lambda: FlowGRPO(trust_region=1, clip_high=0.2), "leave clip_high out"),
    "entropy": (lambda: RefinerGRPO(entropy_weight=-1), "model.language_objective has entropy_weight=-1, use at least"),
    "limit": (lambda: Decay(1.5), "has limit=1.5, use at most 1: a copy that does not move."),
    "slope": (lambda: Decay(0.5, slope=-1), "has slope=-1, use at least 0."),
    "every": (lambda: Decay(0.5, every=0), "has every=0, use at least 1."),
}


def one_sentence(said: str) -> bool:
    return "\n" not in said and said.endswith(".") and ". " not in said


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments(name: str) -> None:
    make, message = ARGUMENTS[name]
    with pytest.raises(ValueError) as error:
        make()
    assert message in str(error.value) and one_sentence(str(error.value))


def built(flow: dict[str, Any], **model: Any) -> PromptRL:
    policy = LinearPolicy(**({"sampling": Sampling(4, 2)} | flow))
    return PromptRL(policy, Listed([]), **({"group_size": 4, "num_retained": 4} | model))


REFINES: dict[str, Any] = {"num_retained": 2, "language": TablePolicy([1], [1.0])}
SETTINGS: dict[str, tuple[Callable[[], Any], str]] = {
    "no SDE steps": (
        lambda: built({"sampling": Sampling(4, 0)}),
        "`model.objective` FlowGRPO learns from SDE steps, but `flow.sampling.sde_steps` is 0, so the flow model has",
    ),
    "levels": (
        lambda: built({}, objective=DPO(levels=5)),
        "`model.objective` DPO has levels=5, but the sampler has 4 steps: use at most that.",
    ),
    "a KL of steps": (
        lambda: built({"kl_weight": 0.1}, objective=DiffusionNFT()),
        "`model.objective` DiffusionNFT has no SDE steps whose KL could be measured: set `flow.kl_units` velocity",
    ),
    **{
        f"groups of several processes, {type(objective).__name__}": (
            lambda objective=objective: built({}, objective=objective, processes_per_group=2),
            "`model.processes_per_group` is 2, but the objective compares all images of a group in one process",
        )
        for objective in (DPO(), DGPO(), RewardWeighted())
    },
    "baseline of one rewrite": (
        lambda: built({}, **REFINES | {"num_retained": 3, "language_objective": RefinerGRPO("leave_one_out")}),
        "`model.language_objective` has baseline: leave_one_out, which compares a group's rewrites by the sum",
    ),
    "baseline of rewards apart": (
        lambda: built({}, **REFINES | {"normalize": "each", "language_objective": RefinerGRPO("refined")}),
        "use `normalize: sum`, and two rewrites or more.",
    ),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_that_do_not_fit(name: str) -> None:
    make, message = SETTINGS[name]
    with pytest.raises(ValueError) as error:
        make()
    assert message in str(error.value) and one_sentence(str(error.value))


@pytest.mark.parametrize(
    ("flow", "model"),
    [
        ({"sampling": Sampling(4, 0)}, {"objective": DiffusionNFT()}),
        ({"sampling": Sampling(4, 0), "learning_rate": None}, REFINES),
        ({"kl_weight": 0.1, "learning_rate": None}, REFINES | {"objective": DPO(levels=9)}),
        ({"kl_weight": 0.1, "kl_units": "velocity"}, {"objective": DGPO(levels=4)}),
        ({}, {"objective": AWM(), "processes_per_group": 2}),
        ({"learning_rate": None}, REFINES | {"objective": DPO(), "processes_per_group": 2}),
    ],
    ids=["no SDE steps", "frozen", "frozen, for an objective", "KL of velocities", "AWM split", "frozen and split"],
)
def test_settings_that_fit(flow: dict[str, Any], model: dict[str, Any]) -> None:
    """What is refused elsewhere does not matter here."""
    assert built(flow, **model).objective is not None


COMMAND = "fit --config=configs/quickstart.yaml --preflight=off --model.init_args.objective="
ONE = "--model.init_args.flow.init_args.{}"


@pytest.mark.parametrize(
    ("objective", "more", "message"),
    [
        ("DiffusionNFT", [ONE.format("kl_weight=0.1")], "DiffusionNFT has no SDE steps whose KL could be measured"),
        ("FlowGRPO", [ONE.format("sampling.sde_steps=0")], "`model.objective` FlowGRPO learns from SDE steps, but"),
        ("DPO", ["--model.init_args.processes_per_group=2"], "the objective compares all images of a group in one"),
        ("AWM", ["--model.init_args.objective.init_args.levels=99"], "`model.objective` AWM has levels=99, but the"),
        ("DGPO", ["--model.init_args.objective.init_args.beta=0"], "DGPO has beta=0.0: use a number above 0."),
        (
            "DiffusionNFT",
            ["--model.init_args.objective.init_args.old_policy={limit: 2}"],
            "has limit=2.0, use at most 1",
        ),
    ],
)
def test_the_command_says_it_in_one_line(
    objective: str,
    more: list[str],
    message: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Agents, "configure_model", lambda self: pytest.fail("models were loaded"))
    options = f"{COMMAND}{objective} --trainer.default_root_dir={tmp_path}".split()
    with pytest.raises(SystemExit):
        main([*options, *more])
    error = capfd.readouterr().err
    assert message in error.splitlines()[-1] and "Traceback" not in error
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_command_trains_by_another_objective(tmp_path: Path) -> None:
    options = f"{COMMAND}DiffusionNFT --trainer.default_root_dir={tmp_path} --trainer.max_steps=1".split()
    more = ["--data.init_args.eval_prompts=1", "--data.init_args.train_prompts=2", "--data.init_args.batch_size=1"]
    main([*options, *more, ONE.format("sampling.sde_steps=0"), ONE.format("sampling.eval_steps=2")])
    (metrics,) = tmp_path.rglob("metrics.csv")
    assert "train/flow/moved" in metrics.read_text().splitlines()[0]
