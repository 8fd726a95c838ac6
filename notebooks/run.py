"""Runs notebooks anew and keeps what they show: `python notebooks/run.py [NAME ...]`, all of them by default.

They run in a copy of the repository's root with an empty `runs/`, so that nothing is taken from an earlier run.
"""

from __future__ import annotations

import base64
import hashlib
import io
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
KEPT = ("text/html", "text/markdown", "image/png", "text/plain")
"""Kinds of output, the best first, of which the first is kept."""


def digest(notebook: nbformat.NotebookNode) -> str:
    """Returns a hash of the code that a notebook's outputs were made by."""
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    return hashlib.sha256("\0".join(code).encode()).hexdigest()[:16]


def tidy(notebook: nbformat.NotebookNode) -> None:
    """Leaves of the outputs what a reader wants.

    No warnings or logs, one kind of each output (images as PNG with 256 colours), and each print in one piece.
    """
    for cell in (cell for cell in notebook.cells if cell.cell_type == "code"):
        outputs: list[nbformat.NotebookNode] = []
        for output in cell.outputs:
            if output.get("name") == "stderr":
                continue
            if outputs and output.get("name") == "stdout" == outputs[-1].get("name"):
                outputs[-1].text += output.text
                continue
            if "data" in output:
                best = next(kind for kind in KEPT if kind in output.data)
                shown = output.data[best]
                output.data = {best: _small(shown) if best == "image/png" else shown}
            outputs.append(output)
        cell.outputs = outputs


def _small(png: str) -> str:
    """Returns a PNG with 256 colours."""
    file = io.BytesIO()
    image = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    image.quantize(256, dither=Image.Dither.NONE).save(file, "PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def run(path: Path) -> None:
    """Runs a notebook from top to bottom and writes it with its outputs; after an error the file stays as it is."""
    notebook = nbformat.read(path, as_version=4)
    metadata = dict(notebook.metadata)
    with tempfile.TemporaryDirectory() as folder:
        for part in ROOT.iterdir():
            if part.name not in ("runs", ".git"):
                (Path(folder) / part.name).symlink_to(part)
        resources = {"metadata": {"path": folder}}
        NotebookClient(
            notebook, timeout=None, kernel_name="python3", record_timing=False, resources=resources
        ).execute()
    tidy(notebook)
    notebook.metadata = metadata | {"outputs_of": digest(notebook)}
    nbformat.write(notebook, path)
    print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB", flush=True)


if __name__ == "__main__":
    paths = sorted((ROOT / "notebooks").glob("*.ipynb"))
    for path in paths:
        if len(sys.argv) == 1 or path.stem in sys.argv[1:] or path.name in sys.argv[1:]:
            run(path)
