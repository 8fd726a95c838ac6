"""The rooms of the house: imports run one way, and everything for real models works without the small world."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("datamodules", "rewards", "lightning_modules", "callbacks", "benchmarks")
"""Each may import those before it."""

WITHOUT = """
import importlib, pkgutil, sys
import lightning_modules.prompt_rl
assert not {"callbacks", "scipy.ndimage"} & set(sys.modules)
for room in ("datamodules", "rewards", "lightning_modules", "callbacks"):
    for module in pkgutil.walk_packages(importlib.import_module(room).__path__, f"{room}."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
from lightning_modules.cli import command, main
built = []
command.PromptRLCLI._run_subcommand = lambda self, _: built.append(type(self.model).__name__)
for config in ("geneval/flux1_promptrl", "edit/flux2_klein_4b_flow_only", "edit/kontext_prompt_only"):
    main(["fit", f"--config=configs/{config}.yaml", "--trainer.accelerator=cpu"])
print("built", *built)
"""


def python(code: str, folder: Path) -> str:
    """Standard output of a program, run where only this folder's packages are found."""
    environment = os.environ | {"PYTHONPATH": str(folder)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_arrows_run_one_way() -> None:
    """The command's room alone puts callbacks into the core's runs; nobody but benchmarks knows the small world."""
    wrong = []
    for path in (path for room in ROOMS for path in (ROOT / room).rglob("*.py")):
        room = path.relative_to(ROOT).parts[0]
        for name in imported(path):
            back = name in ROOMS and ROOMS.index(name) > ROOMS.index(room)
            if (back and path.name != "command.py") or (name == "miniature" and room != "benchmarks"):
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not wrong


def imported(path: Path) -> set[str]:
    """Top-level packages that a file imports anywhere."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    modules = [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module]
    modules += [one.name for node in nodes if isinstance(node, ast.Import) for one in node.names]
    return {module.split(".")[0] for module in modules}


@pytest.mark.slow
def test_real_models_do_without_the_small_world(tmp_path: Path) -> None:
    """Every module is imported and three experiments are built in a tree from which the small world was deleted."""
    for room in ("datamodules", "rewards", "lightning_modules", "callbacks", "configs"):
        shutil.copytree(ROOT / room, tmp_path / room)
    # An editable installation would find the small world again.
    (tmp_path / "miniature.py").write_text("raise ImportError('the small world was deleted')\n")
    assert python(WITHOUT, tmp_path).endswith("built PromptRL PromptRL PromptRL\n")
