"""Every configuration parses, builds its classes, and says how to run itself."""

from __future__ import annotations

import re
from itertools import product
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import yaml

from benchmarks.system.recipes import FILES, recipe
from callbacks.benchmark import Benchmark
from lightning_modules import cli
from lightning_modules.cli import command
from lightning_modules.sweep import run as sweep
from rewards.serving.server import build_parser

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:LightningCLI's args parameter")]

ROOT = Path(__file__).parents[2]
EVERY = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "configs").rglob("*.yaml"))
SERVED = [config for config in EVERY if config.startswith("configs/rewards/")]
SWEEPS = [config for config in EVERY if config.startswith("configs/sweeps/")]
OVERLAYS = [
    config for config in EVERY if config.startswith(("configs/gpu/", "configs/objectives/", "configs/recipes/"))
]
OBJECTIVES = [config for config in OVERLAYS if config.startswith("configs/objectives/")]
MODELS = ["FLUX.1-dev", "FLUX.2-klein-base-4B", "SD3.5-medium", "Qwen-Image", "Z-Image", "Sana-1600M"]
GPUS = [80, 48, 24]
TASKS = ["geneval", "ocr", "pickscore", "multi_reward", "own"]
MODES = ["promptrl", "flow_only", "prompt_only"]
PARTS = ["gpu", "recipes/mode", "recipes/model", "recipes/task"]
FOR_TESTS = [config for config in EVERY if config.startswith("configs/benchmarks/") or config.endswith("evaluate.yaml")]
CONFIGS = [config for config in EVERY if config not in {*SERVED, *SWEEPS, *OVERLAYS, *FOR_TESTS}]
MINIATURE = [config for config in CONFIGS if config.startswith("configs/miniature/") and "pretrain" not in config]
JOINT = [config for config in CONFIGS if config.endswith("promptrl.yaml")]


@pytest.mark.parametrize("config", CONFIGS)
def test_config(config: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`main` does all but run: no weights are loaded, nothing is written."""
    built: list[command.PromptRLCLI] = []
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(command.PromptRLCLI, "_run_subcommand", lambda self, _: built.append(self))
    cli.main(["fit", "--config", config, "--trainer.default_root_dir", str(tmp_path), "--trainer.accelerator=cpu"])
    (built_by_main,) = built
    resolved = yaml.safe_load((ROOT / config).read_text())
    assert isinstance(built_by_main.model, L.LightningModule)
    assert type(built_by_main.model).__qualname__ == resolved["model"]["class_path"].rsplit(".", 1)[1]
    assert type(built_by_main.datamodule).__qualname__ == resolved["data"]["class_path"].rsplit(".", 1)[1]
    assert built_by_main.trainer.max_steps == resolved["trainer"]["max_steps"]
    assert not any(True for _ in built_by_main.model.parameters()), "constructors load no weights"
    assert list(tmp_path.iterdir()) == []
    if config in MINIATURE:  # no user's files are needed to name the sets
        built_by_main.datamodule.val_dataloader()
        for callback in built_by_main.trainer.callbacks:
            if isinstance(callback, Benchmark):  # what would end the run at its first validation
                callback._refuse_mistakes(built_by_main.trainer, built_by_main.datamodule)

    header = re.match(r"(?:#.*\n)+", (ROOT / config).read_text())
    assert header, "no header comment"
    assert re.search(rf"^#   lightning fit --config {re.escape(config)}(\s|$)", header.group(), re.MULTILINE)


@pytest.mark.parametrize("config", SERVED)
def test_reward_config(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server's parser builds every reward; none loads anything yet. Each has a port of its own."""
    monkeypatch.chdir(ROOT)
    parser = build_parser()
    rewards = parser.instantiate(parser.parse_args(["--config", config])).rewards
    text = (ROOT / config).read_text()
    resolved = yaml.safe_load(text)
    for name, reward in rewards.items():
        assert type(reward).__qualname__ == resolved["rewards"][name]["class_path"].rsplit(".", 1)[1]
        assert reward.version
    assert re.search(rf"^#   python -m rewards\.serving --config {re.escape(config)}$", text, re.MULTILINE)
    ports = [yaml.safe_load((ROOT / other).read_text())["port"] for other in SERVED]
    assert ports.count(resolved["port"]) == 1 and resolved["host"] == "127.0.0.1"


@pytest.mark.parametrize("config", SWEEPS)
def test_sweep(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It parses, its experiments are ones of ours, every run has a folder of its own; its last command builds."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(command.PromptRLCLI, "_run_subcommand", lambda self, _: None)
    plan = sweep.read(["--config", config])
    cli.main([*plan.jobs()[-1].commands[-1].options, "--trainer.accelerator=cpu"])
    assert set(plan.configs) <= set(CONFIGS) and set(plan.test_configs or ()) <= set(FOR_TESTS)
    folders = [command.folder for job in plan.jobs() for command in job.commands]
    assert len(set(folders)) == len(folders) and plan.root.startswith("runs/")
    text = (ROOT / config).read_text()
    assert re.search(rf"^#   python -m lightning_modules\.sweep --config {re.escape(config)}$", text, re.MULTILINE)


@pytest.mark.parametrize("overlay", OBJECTIVES)
def test_objective(overlay: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes over an experiment of ours, of each mode in turn, and sets the objectives that it names."""
    mode = MODES[OBJECTIVES.index(overlay) % len(MODES)]
    config = "configs/geneval/flux1_flow_only.yaml" if mode == "flow_only" else f"configs/miniature/{mode}.yaml"
    built: list[command.PromptRLCLI] = []
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(command.PromptRLCLI, "_run_subcommand", lambda self, _: built.append(self))
    cli.main(["fit", "--config", config, "--config", overlay, "--trainer.accelerator=cpu", "--trainer.strategy=auto"])
    text = (ROOT / overlay).read_text()
    for name, asked in yaml.safe_load(text)["model"]["init_args"].items():
        if name.endswith("objective"):
            made = getattr(built[0].model, name)
            assert f"{type(made).__module__}.{type(made).__qualname__}".startswith("lightning_modules.objectives.")
            assert type(made).__qualname__ == asked["class_path"].rsplit(".", 1)[1]
    assert f"--config {overlay}" in text


def test_there_are_configs() -> None:
    assert "configs/sweeps/miniature.yaml" in SWEEPS
    assert "configs/rewards/shapes.yaml" in SERVED
    assert {"configs/quickstart.yaml", "configs/miniature/promptrl.yaml"} <= set(CONFIGS)


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Leaves by dotted name."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {name: leaf for key, value in tree.items() for name, leaf in flat(value, f"{prefix}.{key}").items()}


def differing(one: str, other: str) -> set[str]:
    a, b = (flat(yaml.safe_load((ROOT / path).read_text())) for path in (one, other))
    return {name for name in {*a, *b} if a.get(name, "absent") != b.get(name, "absent")}


@pytest.mark.parametrize("joint", JOINT)
def test_three_modes_differ_in_their_agents_alone(joint: str) -> None:
    """Data, reward, seeds, number of steps and evaluation are the same; the miniature's rates are each mode's best."""
    model = ".model.init_args"
    rates = {f"{model}.{agent}.init_args.learning_rate" for agent in ("flow", "language")}
    searched = rates if "miniature/" in joint and "edit" not in joint else set()
    frozen = differing(joint, joint.replace("promptrl.yaml", "prompt_only.yaml"))
    assert f"{model}.flow.init_args.learning_rate" in frozen
    # A frozen model is not compared with what it was.
    its_own = {f"{model}.flow.init_args.{name}" for name in ("learning_rate", "kl_weight", "kl_units")}
    assert frozen <= {".experiment"} | its_own | searched
    differ = differing(joint, joint.replace("promptrl.yaml", "flow_only.yaml"))
    assert {name for name in differ if not name.startswith(f"{model}.language")} - searched == {
        ".experiment",
        f"{model}.num_retained",
    }
    assert f"{model}.language" in differ


@pytest.mark.parametrize(("model", "gpu"), list(product(MODELS, GPUS)))
def test_recipe(model: str, gpu: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Five files laid over each other; over all models and GPUs every task and every mode has its turn."""
    number = len(GPUS) * MODELS.index(model) + GPUS.index(gpu)
    task, mode = TASKS[number % len(TASKS)], MODES[(number + number // len(GPUS)) % len(MODES)]
    files = recipe(model, gpu, mode, task)
    built: list[command.PromptRLCLI] = []
    (tmp_path / "my_rewards.py").write_text("def score(prompts, images, metadata): return [0.0] * len(images)")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(command.PromptRLCLI, "_run_subcommand", lambda self, _: built.append(self))
    options = [f"--config=configs/{file}" for file in files]
    cli.main(["fit", *options, "--trainer.accelerator=cpu", f"--trainer.default_root_dir={tmp_path}"])
    module: Any = built[0].model
    flow, language = module.flow, module.language
    wanted = yaml.safe_load((ROOT / "configs" / files[2]).read_text())["model"]["init_args"]["flow"]["init_args"]
    assert (flow.offload, flow.micro_batch_size) == (wanted.get("offload", False), wanted["micro_batch_size"])
    assert flow.quantization == ("nf4" if gpu == 24 or model == "Qwen-Image" else None)
    assert (language is not None, flow.trained) == {
        "promptrl": (True, True),
        "flow_only": (False, True),
        "prompt_only": (True, False),
    }[mode]
    assert flow.gradient_checkpointing and flow.lora is not None
    assert module.group_size * built[0].datamodule.batch_size == 384 and module.num_minibatches == 2
    names = [type(callback).__name__ for callback in built[0].trainer.callbacks]  # type: ignore[attr-defined]
    assert names.index("EMA") < names.index("Export") and len([name for name in names if "Benchmark" in name]) >= 1


def test_all_parts_of_recipes_are_tried() -> None:
    folders = {folder: {path.stem for path in (ROOT / "configs" / folder).glob("*.yaml")} for folder in PARTS}
    assert folders["gpu"] == {f"{gpu}gb" for gpu in GPUS} and folders["recipes/mode"] == set(MODES)
    assert folders["recipes/model"] == {FILES[model] for model in MODELS} and folders["recipes/task"] == set(TASKS)
    assert len(MODELS) * len(GPUS) >= len(TASKS) * len(MODES)
