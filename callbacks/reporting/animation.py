"""`animate`: how the same prompts and noise look from evaluation to evaluation, as a GIF."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from callbacks.reporting.gallery import Gallery, Sample
from callbacks.reporting.sheets import ROWS, sheet
from datamodules.atomic_write import replaced_file

_MILLISECONDS = 1200
"""Time that each frame is shown; the last one twice as long."""


def animate(gallery: Gallery, path: Path) -> None:
    """Writes a run's first evaluation set as an animation, a frame for each evaluation.

    Args:
        gallery: the images that the run has kept.
        path: the GIF.

    Raises:
        ValueError: if the run has kept none.
    """
    if not gallery.samples:
        raise ValueError(f"{gallery.folder} has no images of evaluations: give a run with a report/ folder.")
    name = gallery.samples[0].name
    frames = []
    for step in gallery.steps:
        rows: dict[str, list[tuple[Image.Image, str]]] = {}
        for sample in gallery.samples:
            if (sample.step, sample.name) == (step, name):
                with Image.open(gallery.folder / sample.file) as image:
                    tile = (image.convert("RGB"), _caption(sample))
                rows.setdefault(f"step {step}: {ROWS[sample.mode]}", []).append(tile)
        frames.append(sheet(rows))
    size = frames[0].width, max(frame.height for frame in frames)
    whole = [Image.new("RGB", size, "white") for _ in frames]
    for canvas, frame in zip(whole, frames, strict=True):
        canvas.paste(frame)
    times = [_MILLISECONDS] * (len(whole) - 1) + [2 * _MILLISECONDS]
    with replaced_file(path) as file:
        whole[0].save(file, "GIF", save_all=True, append_images=whole[1:], duration=times, loop=0, optimize=True)


def _caption(sample: Sample) -> str:
    marks = [{True: "right", False: "WRONG", None: ""}[rating.right] for rating in sample.ratings]
    return "\n".join(filter(None, [", ".join(filter(None, marks)), sample.drawn]))
