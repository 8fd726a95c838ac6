"""Every layout of editing data gives the same samples; columns are found or asked for; bad rows name themselves."""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from callbacks.reporting.published import EDIT
from datamodules.base import bare
from datamodules.editing.arrow import ArrowRows
from datamodules.editing.prompts import EditPrompts
from datamodules.editing.rows import TASKS, category_of

COLORS = ["red", "lime", "blue", "white"]
KNOWN = {(255, 0, 0): "red", (0, 255, 0): "lime", (0, 0, 255): "blue", (255, 255, 255): "white"}


def png(color: str, size: tuple[int, int] = (9, 8)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, format="PNG")
    return buffer.getvalue()


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    """A file of rows, of the kind that its name says."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)
    pa = pytest.importorskip("pyarrow")
    from pyarrow import ipc, parquet

    table = pa.Table.from_pylist(rows)
    if path.suffix == ".parquet":
        parquet.write_table(table, path, row_group_size=3)
        return str(path)
    with pa.OSFile(str(path), "wb") as sink, ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=3)
    return str(path)


def load(path: str, **how: Any) -> Any:
    data = EditPrompts(path, path, **how)
    data.setup("test")
    return data.test_samples()["edit"]


def color(sample: Any) -> str:
    assert sample.image.mode == "RGB" and sample.image.size == (9, 8)
    return KNOWN[sample.image.getpixel((4, 4))]


LAYOUTS = [
    "jsonl",
    "parquet-bytes",
    "parquet-struct",
    "parquet-struct-path",
    "parquet-path",
    "arrow-struct",
    "arrow-path",
]


def layout_rows(folder: Path, layout: str, rows: list[dict[str, Any]], image: str = "image") -> str:
    """The rows, each with its image as the layout has it."""
    kind, _, how = layout.partition("-")
    cells = []
    for number, row in enumerate(rows):
        name = f"{number}.png"
        if "path" in how or kind == "jsonl":
            (folder / name).write_bytes(png(COLORS[number]))
        data = png(COLORS[number])
        as_struct = {"bytes": None if "path" in how else data, "path": name}
        cells.append({image: as_struct if "struct" in how else data if how == "bytes" else name} | row)
    return write(folder / f"edits.{kind}", cells)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_samples(tmp_path: Path, layout: str) -> None:
    rows = [
        {"prompt": f"edit {i}", "category": ["style", "obj_swap"][i % 2], "id": f"n{i}", "level": i, "caption": "c"}
        for i in range(4)
    ]
    samples = load(layout_rows(tmp_path, layout, rows))
    assert [(s.id, s.prompt, s.tag, color(s)) for s in samples] == [
        ("n0", "edit 0", "style", "red"),
        ("n1", "edit 1", "swap", "lime"),
        ("n2", "edit 2", "style", "blue"),
        ("n3", "edit 3", "swap", "white"),
    ]
    assert samples[3].metadata == {"category": "obj_swap", "level": 3, "caption": "c"}
    assert [s.image for s in bare(samples)] == [None] * 4
    assert [color(s) for s in pickle.loads(pickle.dumps(samples))] == COLORS  # as loader processes may need


def omniedit(number: int, **changes: Any) -> dict[str, Any]:
    task = ["swap", "style", "addition", "attribute_modification", "env", "removal"][number % 6]
    base = {
        "omni_edit_id": f"task_x_{number}",
        "task": task,
        "src_img": {"bytes": png(COLORS[number % 4]), "path": None},
        "edited_img": {"bytes": png("black"), "path": None},
        "edited_prompt_list": [f"a long caption {number}", f"do {number}"],
        "sc_score_1": 8.5 if number else float("nan"),
    }
    return base | changes


def test_omniedits_columns(tmp_path: Path) -> None:
    path = write(tmp_path / "dev.parquet", [omniedit(i) for i in range(6)])
    samples = load(path)
    assert [s.tag for s in bare(samples)] == list(EDIT[:6])
    assert (samples[1].id, samples[1].prompt, color(samples[1])) == ("task_x_1", "do 1", "lime")
    assert samples[1].metadata == {"task": "style", "sc_score_1": 8.5}
    assert samples[0].metadata["sc_score_1"] is None  # JSON has no NaN
    assert [s.prompt for s in bare(load(path, prompt_index=0))][2] == "a long caption 2"
    with pytest.raises(ValueError, match=r"dev\.parquet, row 0: `edited_prompt_list` has 2 entries, none at 2"):
        load(path, prompt_index=2)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_columns_may_be_named(tmp_path: Path, layout: str) -> None:
    rows = [{"prompt": "not this", "wish": f"edit {i}", "kind": "env", "name": f"n{i}", "id": "same"} for i in range(2)]
    path = layout_rows(tmp_path, layout, rows, image="seen")
    samples = load(path, columns={"image": "seen", "prompt": "wish", "category": "kind", "id": "name"})
    assert [(s.id, s.prompt, s.tag, color(s)) for s in samples] == [
        ("n0", "edit 0", "env", "red"),
        ("n1", "edit 1", "env", "lime"),
    ]
    assert samples[0].metadata == {"prompt": "not this", "kind": "env", "id": "same"}
    # one column of images, whatever its name
    assert color(load(path, columns={"id": "name"})[1]) == "lime"
    with pytest.raises(ValueError, match=r"edits\.\w+: data\.columns\.prompt is 'wishes', and the columns are .*wish"):
        load(path, columns={"prompt": "wishes"})
    with pytest.raises(ValueError, match="data.columns names 'photo': its keys are image, prompt, category, id"):
        load(path, columns={"photo": "seen"})


@pytest.mark.parametrize(
    ("cells", "image", "prompt"),
    [
        ({"image": "p", "prompt": "t", "caption": "c", "target_caption": "d"}, "image", "prompt"),
        ({"image": "p", "caption": "c", "instruction": "t"}, "image", "instruction"),
        ({"edited_image": "q", "original_image": "p", "edit_prompt": "t", "edited_prompt": "d"}, "original_image", "t"),
        ({"target_img": "q", "mask_img": "q", "source_img": "p", "instruction": "t"}, "source_img", "t"),
        ({"src_img": "q", "image": "p", "input_image": "q", "text": "t"}, "image", "text"),
        ({"file_name": "p", "text": "t"}, "file_name", "text"),
        ({"anything": "p", "text": "t"}, "anything", "text"),
    ],
)
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_columns_that_are_found(tmp_path: Path, cells: Mapping[str, str], image: str, prompt: str, kind: str) -> None:
    """`p` stands for the source's image, `q` for another, `t` for the instruction."""
    for name, shade in (("p.png", "red"), ("q.png", "blue")):
        (tmp_path / name).write_bytes(png(shade))
    inside = {"p": png("red"), "q": png("blue")} if kind == "parquet" else {"p": "p.png", "q": "q.png"}
    (sample,) = load(write(tmp_path / f"a.{kind}", [{key: inside.get(v, v) for key, v in cells.items()}]))
    assert sample.prompt == "t" and color(sample) == "red" and sample.id == "00000" and sample.tag == "edit"
    assert image not in sample.metadata and prompt not in sample.metadata


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_unclear_columns_are_listed(tmp_path: Path, kind: str) -> None:
    image = png("red") if kind == "parquet" else "a.png"
    for cells, message in (
        (
            {"one": image, "two": image, "text": "t"},
            "any of one, two may hold the source images, the columns are one, two, text: name it in data.columns.image",
        ),
        ({"src_img": image, "source_img": image, "text": "t"}, "any of src_img, source_img may hold"),
        ({"number": 3, "text": "t"}, "no column may hold the source images, the columns are number, text"),
        ({"image": image, "words": "t"}, "no column is called prompt or .*, the columns are image, words: name the"),
    ):
        with pytest.raises(ValueError, match=rf"a\.{kind}: {message}"):
            load(write(tmp_path / f"a.{kind}", [cells]))
    with pytest.raises(ValueError, match="x{60}[.]{3}, 0, .* and 80 more") as raised:
        load(write(tmp_path / f"b.{kind}", [{"x" * 5000: "t"} | {str(number): "t" for number in range(99)}]))
    assert len(str(raised.value)) < 600


def test_categories() -> None:
    assert set(TASKS.values()) == set(EDIT) - {"mean"}
    ids = {
        "task_obj_swap_rand_mask_401099": "swap",
        "task_attr_mod_color_11699": "attribute_modification",
        "task_env_weather_112463": "env",
        "task_obj_add_40931": "addition",
        "task_obj_remove_380621": "removal",
        "task_style_7": "style",
        "style_12": "style",
        "env_12": "edit",  # someone's own id, not OmniEdit's
        "stylet": "edit",
        "task_environment": "edit",
        "00001": "edit",
    }
    for name, tag in ids.items():
        assert category_of(None, name) == category_of(" ", name) == tag
    given = {
        "task_obj_add": "addition",
        "attr_mod": "attribute_modification",
        "move": "move",
        "obj_swap_x": "obj_swap_x",
    }
    for value, tag in given.items():
        assert category_of(value, "task_env_1") == tag


def test_categories_by_id(tmp_path: Path) -> None:
    rows = [{"prompt": "t", "id": f"task_{short}_x_{n}"} for n, short in enumerate(["env", "obj_add"])]
    assert [s.tag for s in bare(load(layout_rows(tmp_path, "parquet-bytes", rows)))] == ["env", "addition"]


def test_folders(tmp_path: Path) -> None:
    """A metadata.jsonl beside its images; several Parquet files; images with captions."""
    tables, files, captions = (tmp_path / name for name in ("tables", "files", "captions"))
    for folder in (tables, files, captions / "swap", captions / "obj_remove"):
        folder.mkdir(parents=True)
    (files / "a.png").write_bytes(png("red"))
    write(files / "metadata.jsonl", [{"file_name": "a.png", "text": "t"}])
    assert [(s.prompt, color(s)) for s in load(str(files))] == [("t", "red")]

    for number in range(2):
        write(tables / f"data-{number}.parquet", [{"image": png(COLORS[number]), "prompt": f"edit {number}"}])
    wanted = [("00000", "edit 0", "red"), ("00001", "edit 1", "lime")]
    for name in (str(tables), f"{tables}/data-*.parquet"):
        assert [(s.id, s.prompt, color(s)) for s in load(name)] == wanted
    write(tables / "more.jsonl", [{}])
    with pytest.raises(ValueError, match=r"tables holds \.parquet and \.jsonl files: give a file, or a folder with"):
        load(str(tables))

    (captions / "a.PNG").write_bytes(png("red"))
    (captions / "a.txt").write_text("edit a\n")
    (captions / "swap" / "b.png").write_bytes(png("lime"))
    (captions / "swap" / "b.txt").write_text("edit b")
    (captions / "obj_remove" / "c.png").write_bytes(png("blue"))
    with pytest.raises(ValueError, match=r"obj_remove.c\.png: `prompt` is None: give the text"):
        load(str(captions))
    (captions / "obj_remove" / "c.txt").write_text("edit c")
    assert [(s.id, s.prompt, s.tag, color(s)) for s in load(str(captions))] == [
        ("a", "edit a", "edit", "red"),
        ("obj_remove/c", "edit c", "removal", "blue"),
        ("swap/b", "edit b", "swap", "lime"),
    ]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty holds neither \.parquet nor \.arrow nor \.jsonl files nor images"):
        load(str(tmp_path / "empty"))


def bad_rows(folder: Path, layout: str) -> tuple[str, list[str]]:
    """Ten rows of which seven cannot be used, and what is wrong with each."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    whole = io.BytesIO()
    Image.fromarray(noise).save(whole, "PNG")
    frames = io.BytesIO()
    Image.new("L", (9, 8)).save(frames, "GIF", save_all=True, append_images=[Image.new("L", (9, 8), 255)])
    images = [png("red"), b"no image", png("lime"), png("red", (7, 9)), png("red", (90, 90))]
    images += [frames.getvalue(), png("red"), None, whole.getvalue()[:4000], png("blue")]
    rows: list[dict[str, Any]] = []
    for number, data in enumerate(images):
        name = f"{number}.png"
        if data is not None and layout == "jsonl":
            (folder / name).write_bytes(data)
        image = name if layout == "jsonl" else {"bytes": data, "path": None}
        rows.append({"prompt": " " if number == 6 else f"edit {number}", "image": image})
    missing = r"there is no image .*7\.png" if layout == "jsonl" else r"the image .* \(its `image` holds no bytes\)"
    messages = {
        1: r"the image .* cannot be read \(cannot identify",
        3: "the image .* is only 7 x 9 pixels, less than 8",
        4: "the image .* is 90 x 90 pixels, more than 8000 in all",
        5: "the image .* holds 2 images: replace it or drop the row",
        6: "`prompt` is ' ': give the text of the prompt",
        7: missing,
        8: "the image .* cannot be read .*: replace it or drop the row",
    }
    place = (lambda n: rf"a\.jsonl:{n + 1}") if layout == "jsonl" else (lambda n: rf"a\.parquet, row {n}")
    return write(folder / f"a.{layout}", rows), [f"{place(number)}: {text}" for number, text in messages.items()]


@pytest.mark.parametrize("layout", ["jsonl", "parquet"])
def test_bad_rows_are_named_and_stop_or_are_left_out(tmp_path: Path, layout: str) -> None:
    path, messages = bad_rows(tmp_path, layout)
    unread = [messages[4]] + ([messages[5]] if layout == "jsonl" else [])  # found while reading, before any image
    with pytest.raises(ValueError, match=unread[0]):
        load(path, max_pixels=8000)
    how = {"max_pixels": 8000, "on_bad_row": "skip", "check_images": "full"}
    with pytest.warns(
        UserWarning, match=rf"a\.\w+: 7 of 10 rows are left out .*, 3 are left; the first: .*{messages[4]}"
    ):
        samples = load(path, **how)
    # the others keep the ids that they have among all
    assert [(s.id, s.prompt, color(s)) for s in samples] == [
        ("00000", "edit 0", "red"),
        ("00002", "edit 2", "lime"),
        ("00009", "edit 9", "blue"),
    ]
    # a header says nothing about what is cut off behind it
    with pytest.warns(UserWarning, match="6 of 10 rows are left out"):
        samples = load(path, **how | {"check_images": "header"})
    assert [s.id for s in bare(samples)] == ["00000", "00002", "00008", "00009"]
    with pytest.raises(ValueError, match=messages[6]):
        samples[2]


@pytest.mark.parametrize("layout", ["jsonl", "parquet"])
@pytest.mark.parametrize("number", range(7))
def test_each_bad_row_stops_by_itself(tmp_path: Path, layout: str, number: int) -> None:
    path, messages = bad_rows(tmp_path, layout)
    row = (1, 3, 4, 5, 6, 7, 8)[number]
    if layout == "jsonl":
        lines = Path(path).read_text().splitlines()
        Path(path).write_text("\n" * row + lines[row] + "\n")
    else:
        parquet = pytest.importorskip("pyarrow.parquet")
        table = parquet.read_table(path)
        parquet.write_table(table.slice(row, 1), path)
        messages = [message.replace(f"row {row}:", "row 0:") for message in messages]
    with pytest.raises(ValueError, match=messages[number]):
        load(path, max_pixels=8000, check_images="full")
    with pytest.raises(
        ValueError, match=rf"1 of 1 rows are left out .*, and none is left; the first: .*{messages[number]}"
    ):
        load(path, max_pixels=8000, check_images="full", on_bad_row="skip")


def test_images_may_stay_unseen_until_their_turn(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", [{"prompt": "t", "image": png("red", (3, 3))}])
    samples = load(path, check_images="none")
    with pytest.raises(ValueError, match=r"a\.parquet, row 0: the image in `image` is only 3 x 3 pixels"):
        samples[0]
    with pytest.raises(ValueError, match="is only 3 x 3 pixels"):
        samples[:1][0]  # as each process has its share
    assert load(path, min_side=3)[0].image.size == (3, 3)


def test_only_chosen_rows_are_looked_at(tmp_path: Path) -> None:
    rows = [{"prompt": f"t {n}", "image": png("red") if n % 2 == 0 else b"none"} for n in range(6)]
    assert [s.id for s in load(write(tmp_path / "a.parquet", rows), limit=3)] == ["00000", "00002", "00004"]


@pytest.mark.parametrize("layout", ["jsonl", "parquet"])
def test_files_that_are_wrong_stop_whatever_is_to_be_skipped(tmp_path: Path, layout: str) -> None:
    path = layout_rows(tmp_path, "jsonl" if layout == "jsonl" else "parquet-bytes", [{"prompt": "t", "id": 7}] * 2)
    with pytest.raises(ValueError, match=r"edits\..*: the id '7' was used in .*edits\..*: make ids unique"):
        load(path, on_bad_row="skip")
    empty = tmp_path / f"empty.{layout}"
    if layout == "jsonl":
        empty.write_text("\n")
        (tmp_path / "b.jsonl").write_text('{"prompt": "t"}\n[]')
        with pytest.raises(ValueError, match=r"b\.jsonl:2: a JSON list in place of an object"):
            load(str(tmp_path / "b.jsonl"))
    else:
        pa = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pa.table({"prompt": pa.array([], pa.string()), "image": pa.array([], pa.binary())}), empty)
    with pytest.raises(ValueError, match=rf"empty\.{layout}: the file holds no"):
        load(str(empty), on_bad_row="skip")


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"on_bad_row": "ignore"}, "data.on_bad_row is 'ignore', use one of stop, skip"),
        ({"check_images": "all"}, "data.check_images is 'all', use one of header, full, none"),
        ({"repo_type": "space"}, "data.repo_type is 'space', use one of model, dataset"),
        ({"min_side": 0}, "data.min_side is 0 and"),
        ({"min_side": 8, "max_pixels": 63}, "data.min_side is 8 and data.max_pixels 63: no image could have both"),
    ],
)
def test_settings_are_checked(how: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EditPrompts("a.jsonl", "a.jsonl", **how)


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a prompt without an image")
    with pytest.raises(ValueError, match=r"a\.txt: the name ends in '\.txt': give \.parquet or"):
        load(str(tmp_path / "a.txt"))
    with pytest.raises(ValueError, match=r"data\.eval_file is '.*b\.jsonl', which is not a file"):
        load(str(tmp_path / "b.jsonl"))


def test_a_predicted_sets_name_has_no_signs_of_a_pattern(tmp_path: Path) -> None:
    path = write(tmp_path / "dev-0.parquet", [{"prompt": "t", "image": png("red")}])
    data = EditPrompts(path, path, predict_file=f"{tmp_path}/dev-*.parquet")
    data.setup("predict")
    assert [(name, len(samples)) for name, samples in data.predict_samples().items()] == [("dev-_", 1)]


def test_damaged_pages_of_a_parquet_file(tmp_path: Path) -> None:
    """Bytes are flipped one after another all over the file; each is read, or refused in one sentence."""
    path = tmp_path / "rows.parquet"
    write(path, [{"prompt": f"a photo of number {i}", "id": i} for i in range(9)])
    whole = path.read_bytes()
    refused = 0
    for place in range(4, len(whole), 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        try:
            rows = ArrowRows(path)
            rows.read(list(rows.kinds))
        except ValueError as error:
            assert type(error) is ValueError and str(error).startswith(str(path))
            refused += 1
    assert refused
