"""Kept images: found again only where they are what would be drawn."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from datamodules.sample import PromptSample
from lightning_modules.image_store import ImageStore

RED, BLUE = Image.new("RGB", (4, 4), "red"), Image.new("RGB", (4, 4), "blue")
A, B = PromptSample("a", "red", "t", {}), PromptSample("b", "blue", "t", {})


def store(root: Path, rows: dict[str, int], rank: int = 0) -> ImageStore:
    made = ImageStore(root, "images", lambda name, mode, sample, k: Path(name, f"{rows[sample.id]}.png"), rank)
    made.read()
    return made


def recalled(root: Path, sample: PromptSample, mode: str = "without_pe", text: str | None = None) -> bool:
    found = store(root, {}).load("s", mode, 0, [sample], [text or sample.asked], [7])
    return found is not None and len(found) == 1


def keep(made: ImageStore, sample: PromptSample, image: Image.Image, mode: str = "without_pe", text: str = "") -> None:
    made.save("s", mode, 0, [sample], [text or sample.asked], [7], [image])


def test_what_is_kept_is_found(tmp_path: Path) -> None:
    keep(store(tmp_path, {"a": 0}), A, RED)
    (found,) = store(tmp_path, {}).load("s", "without_pe", 0, [A], ["red"], [7]) or []
    assert found.tobytes() == RED.tobytes()
    assert store(tmp_path, {}).load("s", "without_pe", 0, [A], ["red"], [8]) is None
    assert store(tmp_path, {}).load("s", "without_pe", 1, [A], ["red"], [7]) is None
    assert store(tmp_path, {}).load("s", "without_pe", 0, [A, B], ["red", "blue"], [7, 7]) is None
    assert not recalled(tmp_path, replace(A, wording="rouge")) and not recalled(tmp_path, replace(A, prompt="pink"))


def test_another_prompts_image_under_the_same_name_is_not_taken(tmp_path: Path) -> None:
    """A prompt was put in front: the second has now the file name that the first one's line still has."""
    keep(store(tmp_path, {"a": 0}), A, RED)
    keep(store(tmp_path, {"b": 0, "a": 1}), B, BLUE)
    assert recalled(tmp_path, B) and not recalled(tmp_path, A)


def test_a_image_whose_line_was_never_written_is_not_taken(tmp_path: Path) -> None:
    made = store(tmp_path, {"a": 0})
    keep(made, A, RED)
    BLUE.save(tmp_path / "s" / "0.png")  # killed between the two
    assert not recalled(tmp_path, A)
    (tmp_path / "s" / "0.png").write_bytes(b"no image")
    assert not recalled(tmp_path, A)


def test_what_another_process_has_drawn_anew_holds(tmp_path: Path) -> None:
    keep(store(tmp_path, {"a": 0}), A, RED)
    later = replace(A, prompt="blue")
    keep(store(tmp_path, {"a": 0}, rank=1), later, BLUE)
    assert recalled(tmp_path, later) and not recalled(tmp_path, A)
    store(tmp_path, {}).merge()
    assert recalled(tmp_path, later) and sorted(path.name for path in tmp_path.iterdir()) == ["images.jsonl", "s"]


def test_other_source_images_are_other_images(tmp_path: Path) -> None:
    keep(store(tmp_path, {"a": 0}), replace(A, image=RED), BLUE)
    assert recalled(tmp_path, replace(A, image=RED.copy()))
    assert not recalled(tmp_path, replace(A, image=BLUE)) and not recalled(tmp_path, A)


def test_rewrites_are_those_of_the_same_asking(tmp_path: Path) -> None:
    keep(store(tmp_path, {"a": 0}), A, RED, "with_pe", "a bright red")
    made = store(tmp_path, {})
    assert made.saved_rewrites("s", "with_pe", 0, [A]) == ["a bright red"]
    assert made.saved_rewrites("s", "with_pe", 0, [replace(A, wording="rouge")]) is None
    assert made.saved_rewrites("s", "with_pe", 0, [A, B]) is None
    assert recalled(tmp_path, A, "with_pe", "a bright red") and not recalled(tmp_path, A, "with_pe", "a dark red")


def test_a_line_cut_short_is_skipped(tmp_path: Path) -> None:
    keep(store(tmp_path, {"a": 0}), A, RED)
    with (tmp_path / "images.jsonl").open("a") as file:
        file.write('{"set": "s", "id": "b"')
    assert recalled(tmp_path, A)


@pytest.mark.parametrize("seed", range(3))
def test_unreadable_files_are_drawn_again(tmp_path: Path, seed: int) -> None:
    keep(store(tmp_path, {"a": 0}), A, RED)
    path = tmp_path / "s" / "0.png"
    data = bytearray(path.read_bytes())
    data[(seed * 17 + 30) % len(data)] ^= 0xFF
    path.write_bytes(data)
    assert not recalled(tmp_path, A)
