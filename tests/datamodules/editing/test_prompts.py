"""Editing prompts: what is read when, and rows that name themselves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from datamodules.editing.prompts import EditPrompts


def write(folder: Path, *rows: dict[str, object]) -> str:
    path = folder / "edit.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def make_image(folder: Path, name: str, mode: str = "RGB", **save: object) -> None:
    Image.new(mode, (12, 8), 255 if mode in ("L", "I;16") else None).save(folder / name, **save)


def test_images_come_upright_in_rgb_with_their_rows(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    make_image(tmp_path, "a.jpg", exif=exif)
    make_image(tmp_path, "b.png", "RGBA")
    path = write(
        tmp_path,
        {"prompt": "make it red", "image": "a.jpg", "category": "style", "id": "x"},
        {"prompt": "remove it", "image": "b.png"},
        {"prompt": "add one", "image": "b.png"},
    )
    data = EditPrompts(path, path, limit=2)
    data.setup("fit")
    samples = data.train_samples()
    assert len(samples) == 2
    assert (samples[0].id, samples[0].tag, samples[0].metadata) == ("x", "style", {"category": "style"})
    assert samples[0].image is not None and samples[0].image.size == (8, 12) and samples[0].image.mode == "RGB"
    assert samples[1].tag == "edit" and samples[1].image is not None and samples[1].image.mode == "RGB"
    (batch,) = data.val_dataloader()[0]
    assert [sample.prompt for sample in batch] == ["make it red", "remove it"]


def test_rows_without_a_readable_image_are_named(tmp_path: Path) -> None:
    make_image(tmp_path, "a.png")
    good = {"prompt": "p", "image": "a.png"}
    for bad, message in (
        ({"prompt": "q"}, "`image` is None"),
        ({"prompt": "q", "image": "no.png"}, "there is no image"),
    ):
        path = write(tmp_path, good, bad)
        with pytest.raises(ValueError, match=rf"edit\.jsonl:2: {message}"):
            EditPrompts(path, path).setup("fit")
    (tmp_path / "broken.png").write_bytes((tmp_path / "a.png").read_bytes()[:43])
    path = write(tmp_path, good, {"prompt": "q", "image": "broken.png"})
    data = EditPrompts(path, path)
    data.setup("fit")
    assert data.train_samples()[0].image is not None
    with pytest.raises(ValueError, match=r"edit\.jsonl:2: the image .*broken\.png cannot be read"):
        data.train_samples()[1]
