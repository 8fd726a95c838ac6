"""Every notebook runs from top to bottom, with shorter settings; in git they have no outputs."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from jupyter_client.manager import KernelManager
from nbclient import NotebookClient

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SHORTER = {
    "01_one_step": "NUM_UPDATES = 1",
    "02_compare_runs": "MAX_STEPS, VALIDATE_EVERY, EVAL_PROMPTS, ROOT = 1, 1, 6, {runs!r}",
    "03_prompt_robustness": "MAX_STEPS, EVAL_PROMPTS, ROOT = 1, 6, {runs!r}",
    "04_ablate_retention": "RETAINED, MAX_STEPS, VALIDATE_EVERY, EVAL_PROMPTS, ROOT = [0, 2], 1, 1, 6, {runs!r}",
    "05_reward_tags": "MAX_STEPS, VALIDATE_EVERY, EVAL_PROMPTS, ROOT = 1, 1, 6, {runs!r}",
    "06_edit": "NUM_EDITS, MAX_STEPS, EVAL_PROMPTS, RUNS = 12, 1, 6, {runs!r}",
}
"""What replaces settings of each notebook's `parameters` cell."""


def cells(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_has_no_outputs_and_one_cell_of_settings(path: Path) -> None:
    notebook = cells(path)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count is None and not cell.outputs for cell in code)
    assert "REPOSITORY" in code[0].source  # for Colab
    assert sum("parameters" in cell.metadata.get("tags", []) for cell in code) == 1


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs(path: Path, tmp_path: Path, preloaded: list[str]) -> None:
    """An error in a cell is an error here; images or tables must have been shown.

    The kernel, and the runs of its sweeps, start as forks of this process.
    """
    notebook = cells(path)
    (settings,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    given = {line.split("=")[0].strip() for line in settings.source.splitlines()}
    shorter = SHORTER[path.stem].format(runs=str(tmp_path / "runs"))
    assert {name.strip() for name in shorter.split("=")[0].split(",")} <= given
    command = [*preloaded, "-m", "lightning_modules.cli"]
    program = f"import lightning_modules.sweep.run as runs; runs.PROGRAM = {command}"
    settings.source += f"\n{shorter}\n{program}"
    manager = KernelManager(kernel_name="python3")
    assert manager.kernel_spec is not None
    manager.kernel_spec.argv = [*preloaded, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    resources = {"metadata": {"path": str(path.parent)}}
    try:
        NotebookClient(notebook, km=manager, timeout=600, resources=resources).execute()
    finally:
        manager.shutdown_kernel(now=True)
    kinds = {kind for cell in notebook.cells for output in cell.get("outputs", []) for kind in output.get("data", {})}
    assert "image/png" in kinds
