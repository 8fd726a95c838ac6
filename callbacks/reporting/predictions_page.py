"""`predictions_page`: prompts, rewrites and images of `lightning predict` on one page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from callbacks.reporting.gallery import Gallery
from callbacks.reporting.html import Card, Tile, render
from datamodules.jsonl import json_lines
from datamodules.sample import PromptSample

_MOST = 500
"""Prompts on a page."""
_PLACES = {"without_pe": "as written", "with_pe": "rewritten by the refiner (PE)"}
MODES = tuple(_PLACES)


def predictions_page(directory: Path, sets: Mapping[str, Sequence[PromptSample]]) -> Path:
    """Writes `report.html` into a folder of predictions.

    Args:
        directory: folder with `predictions.jsonl` and the images.
        sets: name of each set -> its prompts, for their source images.

    Returns:
        The page.
    """
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for _, line in json_lines(directory / "predictions.jsonl"):
        found.setdefault((line["set"], line["id"]), []).append(line)
    sources = _sources(directory, sets, list(found)[:_MOST])
    cards: dict[str, list[Card]] = {}
    for (name, prompt), lines in list(found.items())[:_MOST]:
        at = {(line["mode"], line["k"]): _tile(directory, line) for line in lines}
        modes = [mode for mode in MODES if any(own == mode for own, _ in at)]
        numbers = sorted({k for _, k in at})
        rows = [(f"noise {k + 1}" if len(numbers) > 1 else "", [at.get((mode, k)) for mode in modes]) for k in numbers]
        asked = lines[0]["wording"] or lines[0]["prompt"]
        card = Card(asked, [_PLACES[mode] for mode in modes], rows, sources.get((name, prompt)))
        cards.setdefault(name, []).append(card)
    shown = f"the first {_MOST} of {len(found):,}" if len(found) > _MOST else f"{len(found):,}"
    path = directory / "report.html"
    render(
        path,
        "predictions.html.jinja",
        title="Predictions",
        lead=f"{shown} prompts; the images of a row have the same noise. All of them: predictions.jsonl.",
        gallery=cards,
    )
    return path


def _tile(directory: Path, line: Mapping[str, Any]) -> Tile:
    return Tile(directory / line["file"], text=line["rewrite"] or "")


def _sources(
    directory: Path, sets: Mapping[str, Sequence[PromptSample]], keys: Sequence[tuple[str, str]]
) -> dict[tuple[str, str], Tile]:
    """Keeps the source images of editing prompts beside the page."""
    gallery, wanted = Gallery(directory), set(keys)
    found = {}
    for name, samples in sets.items():
        for sample in samples if any(name == own for own, _ in wanted) else ():
            if (name, sample.id) in wanted and sample.image is not None:
                file = gallery.keep(sample.image, f"{name}_{sample.id}_source")
                found[name, sample.id] = Tile(directory / file, text="the image to edit")
    return found
