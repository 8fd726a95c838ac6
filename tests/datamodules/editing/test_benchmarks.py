"""GEdit-Bench's and ImgEdit-Bench's files: every layout gives the same samples, and bad rows name themselves."""

from __future__ import annotations

import io
import json
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from datamodules.base import bare
from datamodules.editing.benchmarks import GEditPrompts, ImgEditPrompts

LAYOUTS = ["jsonl", "parquet", "arrow", "feather"]
COLORS = ["red", "lime", "blue", "white"]


def png(color: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (6, 4), color).save(buffer, format="PNG")
    return buffer.getvalue()


def row(number: int, **changes: Any) -> dict[str, Any]:
    """Rows 0 and 1 are one edit in two languages; likewise 2 and 3."""
    task = ["subject-add", "style_change"][number // 2]
    language = ["en", "cn"][number % 2]
    base = {"key": f"k{number // 2}", "task_type": task, "instruction": f"edit {number}"}
    return base | {"instruction_language": language, "Intersection_exist": number < 2} | changes


def write(folder: Path, layout: str, rows: list[dict[str, Any]], image: str = "input_image_raw") -> Path:
    """The rows, each with its image, in one of the layouts."""
    if layout == "jsonl":
        for number, color in enumerate(COLORS[: len(rows)]):
            (folder / f"{number}.png").write_bytes(png(color))
        lines = [json.dumps({image: f"{number}.png"} | record) for number, record in enumerate(rows)]
        path = folder / "gedit.jsonl"
        path.write_text("\n".join(lines))
        return path
    pa = pytest.importorskip("pyarrow")
    from pyarrow import ipc, parquet

    # as `datasets` stores an image
    cells = [{image: {"bytes": png(COLORS[number]), "path": None}} for number in range(len(rows))]
    table = pa.Table.from_pylist([cell | record for cell, record in zip(cells, rows, strict=True)])
    path = folder / ("gedit.parquet" if layout == "parquet" else "gedit.arrow")
    if layout == "parquet":
        parquet.write_table(table, path, row_group_size=3)
        return path
    with pa.OSFile(str(path), "wb") as sink:
        kind = ipc.new_stream if layout == "arrow" else ipc.new_file
        with kind(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=3)
    return path


def color(sample: Any) -> str:
    assert sample.image.mode == "RGB" and sample.image.size == (6, 4)
    known = {"red": (255, 0, 0), "lime": (0, 255, 0), "blue": (0, 0, 255), "white": (255, 255, 255)}
    return next(name for name, value in known.items() if value == sample.image.getpixel((3, 2)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_samples(tmp_path: Path, layout: str) -> None:
    data = GEditPrompts(str(write(tmp_path, layout, [row(i) for i in range(4)])), eval_batch_size=2)
    data.setup("test")
    english, chinese = (loader for loader in data.test_dataloader())
    assert data.eval_names == ["gedit_en", "gedit_cn"]
    (batch,) = english
    assert [(s.id, s.prompt, s.tag, color(s)) for s in batch] == [
        ("subject-add-k0", "edit 0", "subject-add", "red"),
        ("style_change-k1", "edit 2", "style_change", "blue"),
    ]
    assert batch[0].metadata == {
        "key": "k0",
        "task_type": "subject-add",
        "instruction_language": "en",
        "Intersection_exist": True,
    }
    (batch,) = chinese
    assert [(s.id, s.prompt, s.metadata["Intersection_exist"], color(s)) for s in batch] == [
        ("subject-add-k0", "edit 1", True, "lime"),
        ("style_change-k1", "edit 3", False, "white"),
    ]
    assert [s.image for s in bare(data.test_samples()["gedit_en"])] == [None, None]
    loaded = pickle.loads(pickle.dumps(data.test_samples()["gedit_cn"]))  # as loader processes may need
    assert [color(sample) for sample in loaded] == ["lime", "white"]


def test_a_folder_languages_and_a_limit(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    for number in range(2):
        folder = tmp_path / str(number)
        folder.mkdir()
        path = write(
            folder, "parquet", [row(i, key=f"k{number}{i}", instruction=f"edit {number}{i}") for i in range(4)]
        )
        path.rename(tmp_path / f"data-{number}.parquet")
    data = GEditPrompts(str(tmp_path), languages=["cn"], limit=3)
    data.setup("validate")
    # of k01 k03 k11 k13, spread evenly: rows 0, 1 and 2
    samples = data.eval_samples()
    assert list(samples) == ["gedit_cn"]
    assert [s.metadata["key"] for s in bare(samples["gedit_cn"])] == ["k01", "k03", "k11"]
    assert color(samples["gedit_cn"][2]) == "lime"
    with pytest.raises(ValueError, match="data.languages has 'de', .* has en, cn"):
        GEditPrompts(str(tmp_path), languages=["de"]).setup("test")
    (tmp_path / "more.jsonl").write_text("{}")
    with pytest.raises(ValueError, match=r"holds \.parquet and \.jsonl files: give a file, or a folder with"):
        GEditPrompts(str(tmp_path)).setup("test")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_images_column_may_be_named(tmp_path: Path, layout: str) -> None:
    path = str(write(tmp_path, layout, [row(0)], image="photo"))
    with pytest.raises(ValueError, match=r"no input_image_raw or .* among .*photo.*: name the image's column in data"):
        GEditPrompts(path).setup("test")
    data = GEditPrompts(path, image_column="photo")
    data.setup("test")
    assert color(data.test_samples()["gedit_en"][0]) == "red"


@pytest.mark.parametrize("layout", ["jsonl", "parquet"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"instruction": " "}, "`instruction` is ' ': give a text"),
        ({"key": None}, "`key` is None"),
        ({"instruction_language": "e/n"}, "`instruction_language` is 'e/n'"),
        ({"Intersection_exist": None}, "`Intersection_exist` is None: give true or false"),
        ({"key": "k0", "task_type": "subject-add", "instruction_language": "en"}, "subject-add-k0 is .* in this lang"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, layout: str, changes: dict[str, Any], message: str) -> None:
    path = write(tmp_path, layout, [row(0), row(2, **changes)])
    place = r"gedit\.jsonl:2" if layout == "jsonl" else r"gedit\.parquet, row 1"
    with pytest.raises(ValueError, match=f"{place}: {message}"):
        GEditPrompts(str(path)).setup("test")


def test_bad_files_are_named(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    for name in ("a.parquet", "a.arrow"):
        (tmp_path / name).write_bytes(b"this is none")
        with pytest.raises(ValueError, match=rf"{name} cannot be read as {name[2:].capitalize()} \("):
            GEditPrompts(str(tmp_path / name)).setup("test")
    from pyarrow import parquet

    parquet.write_table(pa.Table.from_pylist([{"key": "k", "image": png("red")}]), tmp_path / "b.parquet")
    with pytest.raises(ValueError, match=r"b\.parquet: no column task_type, only key, image"):
        GEditPrompts(str(tmp_path / "b.parquet")).setup("test")
    (tmp_path / "c.jsonl").write_text('{"key": 1}')
    with pytest.raises(ValueError, match=r"c\.jsonl: no column task_type, only key"):
        GEditPrompts(str(tmp_path / "c.jsonl")).setup("test")
    (tmp_path / "c.jsonl").write_text("\n{")
    with pytest.raises(ValueError, match=r"c\.jsonl:2: not valid JSON"):
        GEditPrompts(str(tmp_path / "c.jsonl")).setup("test")
    with pytest.raises(ValueError, match="data.path is .*nowhere.*, which is not a file: give .parquet or"):
        GEditPrompts(str(tmp_path / "nowhere")).setup("test")


def test_images_that_cannot_be_read_are_named_when_asked_for(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    cells = [{"image": {"bytes": png("red")[:40], "path": "x"}}, {"image": {"bytes": None, "path": "x"}}]
    table = pa.Table.from_pylist([row(2 * i) | cell for i, cell in enumerate(cells)])
    parquet.write_table(table, tmp_path / "a.parquet")
    data = GEditPrompts(str(tmp_path / "a.parquet"))
    data.setup("test")
    samples = data.test_samples()["gedit_en"]
    with pytest.raises(ValueError, match=r"a\.parquet, row 0: the image in `image` cannot be read"):
        samples[0]
    with pytest.raises(
        ValueError, match=r"a\.parquet, row 1: the image in `image` cannot be read \(its `image` holds no"
    ):
        samples[1]


def test_without_pyarrow_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"a\.parquet needs pyarrow .*: run `pip install -e '\.\[data\]'`"):
        GEditPrompts(str(tmp_path / "a.parquet")).setup("test")


# ImgEdit


def imgedit(folder: Path, entries: Any) -> ImgEditPrompts:
    (folder / "animal").mkdir(exist_ok=True)
    for number, name in enumerate(COLORS):
        (folder / "animal" / f"{number}.jpg").write_bytes(png(name))
    (folder / "basic_edit.json").write_text(json.dumps(entries) if not isinstance(entries, str) else entries)
    return ImgEditPrompts(str(folder / "basic_edit.json"), str(folder))


def entry(number: int, **changes: Any) -> dict[str, Any]:
    kind = ["alter", "style", "compose"][number % 3]
    return {"id": f"animal/{number}.jpg", "prompt": f"edit {number}", "edit_type": kind} | changes


def test_imgedit(tmp_path: Path) -> None:
    data = imgedit(tmp_path, {"1082": entry(0), "673": entry(1), "12": entry(2)})
    data.setup("test")
    (loader,) = data.test_dataloader()
    (batch,) = loader
    assert data.eval_names == ["imgedit"]
    assert [(s.id, s.prompt, s.tag, s.metadata, color(s)) for s in batch] == [
        ("1082", "edit 0", "alter", {"edit_type": "alter"}, "red"),
        ("673", "edit 1", "style", {"edit_type": "style"}, "lime"),
        ("12", "edit 2", "compose", {"edit_type": "compose"}, "blue"),
    ]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ("{", r"basic_edit\.json:1: not valid JSON"),
        ([], r"basic_edit\.json: not an object of entries"),
        ({"7": entry(0), "8": []}, r"basic_edit\.json, entry '8': \[\] in place of an object"),
        ({"7": entry(0, prompt="")}, "entry '7': `prompt` is ''"),
        ({"7": entry(0, edit_type=3)}, "entry '7': `edit_type` is 3"),
        ({"7": entry(0, id="animal/9.jpg")}, r"entry '7': there is no image .*9\.jpg: paths are relative to"),
    ],
)
def test_bad_imgedit_entries_are_named(tmp_path: Path, entries: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        imgedit(tmp_path, entries).setup("test")


def test_there_is_nothing_to_train_on(tmp_path: Path) -> None:
    data = imgedit(tmp_path, {"1": entry(0)})
    with pytest.raises(ValueError, match="ImgEditPrompts has no prompts to train on: use it with `lightning test`"):
        data.setup("fit")
    with pytest.raises(ValueError, match="data.limit is 0, use at least 1"):
        ImgEditPrompts("a", "b", limit=0)
    with pytest.raises(ValueError, match="data.file is 'a', which is not a file"):
        ImgEditPrompts("a", "b").setup("test")
