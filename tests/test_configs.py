"""Every configuration parses, builds its classes, and says how to run itself."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import yaml

from lightning_modules import cli
from rewards.server import build_parser

pytestmark = pytest.mark.filterwarnings("ignore:LightningCLI's args parameter")

ROOT = Path(__file__).parents[1]
EVERY = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "configs").rglob("*.yaml"))
SERVED = [config for config in EVERY if config.startswith("configs/rewards/")]
CONFIGS = [config for config in EVERY if config not in SERVED]


@pytest.mark.parametrize("config", CONFIGS)
def test_config(config: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`main` does all but run: no weights are loaded, nothing is written."""
    built: list[cli.PromptRLCLI] = []
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(cli.PromptRLCLI, "_run_subcommand", lambda self, _: built.append(self))
    cli.main(["fit", "--config", config, "--trainer.default_root_dir", str(tmp_path), "--trainer.accelerator=cpu"])
    (built_by_main,) = built
    resolved = yaml.safe_load((ROOT / config).read_text())
    assert isinstance(built_by_main.model, L.LightningModule)
    assert type(built_by_main.model).__qualname__ == resolved["model"]["class_path"].rsplit(".", 1)[1]
    assert type(built_by_main.datamodule).__qualname__ == resolved["data"]["class_path"].rsplit(".", 1)[1]
    assert built_by_main.trainer.max_steps == resolved["trainer"]["max_steps"]
    assert not any(True for _ in built_by_main.model.parameters()), "constructors load no weights"
    assert list(tmp_path.iterdir()) == []

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
    assert re.search(rf"^#   python -m rewards\.server --config {re.escape(config)}$", text, re.MULTILINE)
    ports = [yaml.safe_load((ROOT / other).read_text())["port"] for other in SERVED]
    assert ports.count(resolved["port"]) == 1 and resolved["host"] == "127.0.0.1"


def test_there_are_configs() -> None:
    assert "configs/rewards/shapes.yaml" in SERVED
    assert {"configs/quickstart.yaml", "configs/miniature/promptrl.yaml"} <= set(CONFIGS)


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Leaves by dotted name."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {name: leaf for key, value in tree.items() for name, leaf in flat(value, f"{prefix}.{key}").items()}


def differing(one: str, other: str) -> set[str]:
    a, b = (flat(yaml.safe_load((ROOT / "configs" / "miniature" / f"{n}.yaml").read_text())) for n in (one, other))
    return {name for name in {*a, *b} if a.get(name, "absent") != b.get(name, "absent")}


def test_the_miniatures_three_differ_in_their_agents_alone() -> None:
    model = ".model.init_args"
    assert differing("promptrl", "prompt_only") == {".experiment", f"{model}.flow.init_args.learning_rate"}
    differ = differing("promptrl", "flow_only")
    assert {name for name in differ if not name.startswith(f"{model}.language")} == {
        ".experiment",
        f"{model}.num_retained",
    }
    assert f"{model}.language" in differ
