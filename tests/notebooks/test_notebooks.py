"""Every notebook shows in git what its code made, and runs from top to bottom, with shorter settings."""

from __future__ import annotations

import ast
import base64
import io
import re
from pathlib import Path

import nbformat
import pytest
from jupyter_client.manager import KernelManager
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_notebook, new_output
from PIL import Image

from notebooks.run import digest, tidy

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
UNWANTED = (
    re.compile(r"(?<![\w.])/(home|root|tmp|usr|opt|work|mnt|Users|content)\b|[A-Z]:\\"),  # a machine's paths
    re.compile(r"\b20\d\d-\d\d-\d\d\b|\b\d\d:\d\d:\d\d\b"),  # when it ran
    re.compile(r"it/s\b|s/it\b|\d%\||\r"),  # progress bars
    re.compile(r"Warning\b|\bWARNING\b|warnings\.warn|ipywidgets"),
)
"""What no reader wants in an output."""


def cells(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


def shows(source: str) -> bool:
    """True if a cell prints, displays, runs a sweep (which prints) or ends with a value."""
    last = ast.parse(source).body[-1]
    valued = isinstance(last, ast.Expr) and ast.unparse(last) != "quieten()"
    return valued or re.search(r"^\s*(print|display|plt\.show|assert sweep)\(", source, re.MULTILINE) is not None


def text_of(output: nbformat.NotebookNode) -> str:
    return output.get("text", "") + "".join(t for kind, t in output.get("data", {}).items() if kind != "image/png")


every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


@every_notebook
def test_it_begins_anywhere_and_has_one_cell_of_settings(path: Path) -> None:
    notebook = cells(path)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert "REPOSITORY" in code[0].source  # for Colab
    assert sum("parameters" in cell.metadata.get("tags", []) for cell in code) == 1


@every_notebook
def test_outputs_in_git_are_those_of_its_code(path: Path) -> None:
    notebook = cells(path)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert notebook.metadata.outputs_of == digest(notebook), f"run it anew: python notebooks/run.py {path.stem}"
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert [bool(cell.outputs) for cell in code] == [shows(cell.source) for cell in code]


@every_notebook
def test_outputs_in_git_are_small_and_clean(path: Path) -> None:
    assert path.stat().st_size < 400_000
    outputs = [output for cell in cells(path).cells for output in cell.get("outputs", [])]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    for output in outputs:
        assert not [rule.pattern for rule in UNWANTED if rule.search(text_of(output))], text_of(output)
    images = [output.data["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    widths = [Image.open(io.BytesIO(base64.b64decode(image))).width for image in images]
    assert widths and max(widths) <= 900, "a repository's page is 900 pixels wide; wider images get letters too small"


def test_all_are_small_together() -> None:
    assert len(NOTEBOOKS) == 6
    assert sum(path.stat().st_size for path in NOTEBOOKS) < 1_500_000


def test_outputs_are_tidied() -> None:
    """Two prints become one, a log goes, an image is kept once, as a PNG with a palette."""
    file = io.BytesIO()
    Image.new("RGB", (3, 2), "red").save(file, "PNG")
    png = base64.b64encode(file.getvalue()).decode()
    outputs = [
        new_output("stream", name="stdout", text="one "),
        new_output("stream", name="stderr", text="a warning"),
        new_output("stream", name="stdout", text="two"),
        new_output("display_data", data={"image/jpeg": "...", "image/png": png, "text/plain": "<Image>"}),
        new_output("execute_result", data={"text/plain": "3", "text/html": "<b>3</b>"}),
    ]
    notebook = new_notebook(cells=[new_code_cell("x", outputs=outputs)])
    before = digest(notebook)
    tidy(notebook)
    printed, image, value = notebook.cells[0].outputs
    assert printed.text == "one two"
    assert list(image.data) == ["image/png"] and value.data == {"text/html": "<b>3</b>"}
    small = Image.open(io.BytesIO(base64.b64decode(image.data["image/png"])))
    assert small.mode == "P" and small.convert("RGB").getpixel((2, 1)) == (255, 0, 0)
    assert digest(notebook) == before
    notebook.cells[0].source = "y"
    assert digest(notebook) != before


@pytest.mark.slow
@every_notebook
def test_it_runs(path: Path, tmp_path: Path, preloaded: list[str]) -> None:
    """An error in a cell is an error here; every cell that shows something has shown it.

    The kernel, and the runs of its sweeps, start as forks of this process.
    """
    notebook = cells(path)
    (settings,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    given = {line.split("=")[0].strip() for line in settings.source.splitlines()}
    shorter = SHORTER[path.stem].format(runs=str(tmp_path / "runs"))
    assert {name.strip() for name in shorter.split("=")[0].split(",")} <= given
    command = [*preloaded, "-m", "lightning_modules.cli"]
    program = f"import lightning_modules.sweep.run as runs; runs.PROGRAM = {command}"
    inline = "get_ipython().run_line_magic('matplotlib', 'inline')"  # the fork has imported matplotlib before a kernel
    settings.source += f"\n{inline}\n{shorter}\n{program}"
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    manager = KernelManager(kernel_name="python3")
    assert manager.kernel_spec is not None
    manager.kernel_spec.argv = [*preloaded, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    resources = {"metadata": {"path": str(path.parent)}}
    try:
        NotebookClient(notebook, km=manager, timeout=600, resources=resources).execute()
    finally:
        manager.shutdown_kernel(now=True)
    tidy(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [bool(cell.outputs) for cell in code] == [shows(cell.source) for cell in code]
    assert not [output for cell in code for output in cell.outputs if "ipywidgets" in text_of(output)]
    kinds = {kind for cell in code for output in cell.outputs for kind in output.get("data", {})}
    assert "image/png" in kinds
