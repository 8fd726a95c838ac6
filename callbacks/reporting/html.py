"""HTML pages with images: what a template is given, and how images get into a page."""

from __future__ import annotations

import base64
import os
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from datamodules.atomic_write import write_atomically

_EMBEDDED = 1_800_000
"""Bytes of images up to which a page holds them itself, so that it can be sent alone; above, it links to the files."""
_PIXELATED = 128
"""Width in pixels below which an image is enlarged without smoothing."""


@dataclass(frozen=True)
class Tile:
    """An image with its caption.

    Attributes:
        path: the image's file.
        lead: what stands first and bold: rewards.
        right: True or False for a mark.
        text: the rest of the caption: the text that was drawn.
        badge: a word in a corner.
    """

    path: Path
    lead: str = ""
    right: bool | None = None
    text: str = ""
    badge: str = ""


@dataclass(frozen=True)
class Card:
    """Images of one prompt.

    Attributes:
        prompt: the prompt as the user wrote it.
        columns: heads of the columns; empty lets the tiles of a row flow.
        rows: label of each row, and its tiles; None leaves a gap.
        source: the image to edit, or None.
    """

    prompt: str
    columns: list[str]
    rows: list[tuple[str, list[Tile | None]]]
    source: Tile | None = None

    @property
    def tiles(self) -> list[Tile]:
        """All tiles of the card."""
        return [tile for _, row in self.rows for tile in row if tile] + ([self.source] if self.source else [])


@dataclass
class _Images:
    """Puts images into a page: inside it where all together are small, else as links to their files."""

    page: Path
    paths: set[Path] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.paths = {path for path in self.paths if path.is_file()}
        self.embedded = sum(path.stat().st_size for path in self.paths) <= _EMBEDDED

    def __call__(self, path: Path, alt: str) -> Markup:
        """Returns the image's element, which keeps its aspect ratio."""
        if path not in self.paths:
            return Markup('<span class="missing">the image is gone</span>')
        with Image.open(path) as image:
            width, height = image.size
        kind = "png" if path.suffix == ".png" else "jpeg"
        link = quote(Path(os.path.relpath(path, self.page.parent)).as_posix())
        source = f"data:image/{kind};base64,{base64.b64encode(path.read_bytes()).decode()}" if self.embedded else link
        look = ' class="pixelated"' if width < _PIXELATED else ""
        element = '<img src="{}" width="{}" height="{}" alt="{}" loading="lazy"' + look + ">"
        return Markup(element).format(source, width, height, alt)


@cache
def _templates() -> Environment:
    return Environment(
        loader=PackageLoader("callbacks.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def render(page: Path, template: str = "run.html.jinja", **content: Any) -> None:
    """Writes a page; texts of the content are escaped, so that a prompt with markup in it shows as it is.

    Args:
        page: the file.
        template: name of a file in `callbacks/reporting/templates`.
        content: what the template shows.
    """
    cards = [card for cards in content["gallery"].values() for card in cards] + list(content.get("groups", []))
    images = _Images(page, {tile.path for card in cards for tile in card.tiles})
    text = _templates().get_template(template).render(**content, image=images, embedded=images.embedded)
    write_atomically(page, text)
