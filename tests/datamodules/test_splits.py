"""Folders of other projects load as they are: Flow-GRPO's, Flow-Factory's and UniRL's."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from datamodules.base import PromptDataModule
from datamodules.editing import hub
from datamodules.editing.prompts import EditPrompts
from datamodules.geneval import GenEvalPrompts
from datamodules.ocr import OCRPrompts
from datamodules.text import TextPrompts

RECORD = {"tag": "colors", "include": [{"class": "cat", "count": 1, "color": "red"}]}


def write(path: Path, *records: dict[str, object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def prompts(data: PromptDataModule) -> tuple[list[str], list[str], list[str]]:
    """Training, validation and test prompts."""
    for stage in ("fit", "test"):
        data.setup(stage)
    (val,), (test,) = data.eval_samples().values(), data.test_samples().values()
    return tuple([sample.prompt for sample in samples] for samples in (data.train_samples(), val, test))  # type: ignore[return-value]


def test_flow_grpo_gives_its_folders(tmp_path: Path) -> None:
    geneval, ocr = tmp_path / "dataset" / "geneval", tmp_path / "dataset" / "ocr"
    for split in ("train", "test"):
        write(geneval / f"{split}_metadata.jsonl", {"prompt": f"{split} cat"} | RECORD)
    write(geneval / "templates.jsonl", {"prompt": "a {}"})
    ocr.mkdir()
    (ocr / "train.txt").write_text('a sign "A"\n')
    (ocr / "test.txt").write_text('a sign "B"\n')
    assert prompts(GenEvalPrompts(str(geneval), str(geneval))) == (["train cat"], ["test cat"], ["test cat"])
    assert prompts(OCRPrompts(str(ocr), str(ocr))) == (['a sign "A"'], ['a sign "B"'], ['a sign "B"'])
    write(geneval / "evaluation_metadata.jsonl", {"prompt": "official cat"} | RECORD)
    assert prompts(GenEvalPrompts(str(geneval), str(geneval), str(geneval)))[1:] == (["official cat"], ["test cat"])
    (geneval / "train_metadata.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match=r"train_metadata\.jsonl:1: `prompt` is None"):
        GenEvalPrompts(str(geneval), str(geneval)).setup("fit")


@pytest.mark.parametrize(
    ("files", "has"),
    [
        ([], "no .txt or .jsonl file"),
        (["train.csv"], "no .txt or .jsonl file"),
        (["trains.txt"], "trains.txt"),
        (["train.txt", "train.jsonl", "test.txt"], "train.jsonl, train.txt"),
    ],
)
def test_a_folder_that_does_not_say_it_is_refused(files: list[str], has: str, tmp_path: Path) -> None:
    for name in files:
        (tmp_path / name).write_text("a cat\n")
    said = f"data.train_file is the folder {str(tmp_path)!r}, which holds {has}: name the file."
    with pytest.raises(ValueError, match=re.escape(said)):
        TextPrompts(str(tmp_path), str(tmp_path)).setup("fit")


def test_text_prompts_come_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "train.txt").write_text("a cat\n")
    (tmp_path / "test.txt").write_text("a dog\n")
    monkeypatch.setattr(hub, "hf_hub_download", lambda repo, path, **kwargs: str(tmp_path / path))
    address = "hf://datasets/owner/name/"
    assert prompts(TextPrompts(f"{address}train.txt", f"{address}test.txt")) == (["a cat"], ["a dog"], ["a dog"])


def draw(folder: Path, *names: str) -> None:
    folder.mkdir(parents=True)
    for name in names:
        Image.new("RGB", (12, 8), "red").save(folder / name)


def test_flow_factory_gives_a_folder_with_images(tmp_path: Path) -> None:
    draw(tmp_path / "images", "a.png", "b.png")
    write(tmp_path / "train.jsonl", {"prompt": "one", "image": "a.png"})
    write(tmp_path / "test.jsonl", {"prompt": "two", "images": ["b.png"]})
    expected = ["one"], ["two"], ["two"]
    assert prompts(EditPrompts(str(tmp_path), str(tmp_path))) == expected
    data = EditPrompts(str(tmp_path / "train.jsonl"), str(tmp_path / "test.jsonl"))
    assert prompts(data) == expected and data.eval_samples()["edit"][0].image is not None
    for images, said in (
        (["a.png", "b.png"], r"test\.jsonl:1: `images` has 2 entries: give the one source image"),
        (["c.png"], r"test\.jsonl:1: there is no image .*c\.png: paths are relative to .*, or to images/ in it"),
    ):
        write(tmp_path / "test.jsonl", {"prompt": "two", "images": images})
        with pytest.raises(ValueError, match=said):
            EditPrompts(str(tmp_path), str(tmp_path)).setup("fit")


def test_unirl_gives_a_list_of_media(tmp_path: Path) -> None:
    draw(tmp_path / "data", "a.png")
    row = {"prompt": "one", "metadata": {"source": "s"}}
    media = {"modality": "image", "role": "condition", "uri": "data/a.png"}
    write(tmp_path / "train.jsonl", row | {"media": [media]})
    data = EditPrompts(str(tmp_path / "train.jsonl"), str(tmp_path / "train.jsonl"))
    assert prompts(data) == (["one"], ["one"], ["one"])
    assert data.train_samples()[0].image is not None and data.train_samples()[0].metadata == {
        "metadata": {"source": "s"}
    }
    write(tmp_path / "train.jsonl", row | {"media": [{"modality": "image"}]})
    with pytest.raises(ValueError, match=r"train\.jsonl:1: `media` is \[.*\]: give the path of the source image"):
        data.setup("fit")
