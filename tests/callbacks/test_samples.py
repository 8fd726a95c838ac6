"""Image sheets: what TensorBoard is given, read back from its event files."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from callbacks import samples
from callbacks.reporting.sheets import sheet as sheet_of
from callbacks.samples import SampleImages
from datamodules.base import PromptDataModule, PromptSample
from lightning_modules.evaluation import EvaluationBatch
from lightning_modules.rollout import Conditioning, Rollout, Trajectory
from rewards.base import Score

pytestmark = pytest.mark.filterwarnings("ignore:Experiment logs directory", "ignore:The dirpath has changed")

RED, GREEN, BLUE = (200, 0, 0), (0, 200, 0), (0, 0, 200)


def plain(color: tuple[int, int, int], size: int = 32) -> Image.Image:
    return Image.new("RGB", (size, size), color)


class Prompts(PromptDataModule):
    def __init__(self) -> None:
        super().__init__(eval_batch_size=4)

    def train_samples(self) -> list[PromptSample]:
        return [PromptSample(f"{i}", f"prompt {i}", "colors", {}) for i in range(5)]

    def eval_samples(self) -> dict[str, list[PromptSample]]:
        return {"geneval": self.train_samples(), "few": self.train_samples()[:2]}


class Painter(L.LightningModule):
    """Draws red, green and blue in turn without PE; with PE all blue, and large."""

    def __init__(self, refines: bool = True, latest: Rollout | None = None) -> None:
        super().__init__()
        self.refines = refines
        self.latest = latest

    def validation_step(self, batch: Sequence[PromptSample], batch_idx: int, dataloader_idx: int) -> Any:
        images = {"without_pe": [[plain((RED, GREEN, BLUE)[int(sample.id) % 3]) for sample in batch]]}
        prompts = {"without_pe": [sample.prompt for sample in batch]}
        if self.refines:
            images["with_pe"] = [[plain(BLUE, 512) for _ in batch]]
            prompts["with_pe"] = [f"fine {sample.prompt}" for sample in batch]
        name = self.trainer.datamodule.eval_names[dataloader_idx]  # type: ignore[attr-defined]
        return EvaluationBatch(name, batch, prompts, [[0] * len(batch)], images)


def rollout(colors: list[tuple[int, int, int]], size: int) -> Rollout:
    """A rollout with one image for each colour, in groups of `size`."""
    num, groups = len(colors), len(colors) // size
    nothing = torch.zeros(num, 0, 1)
    trajectory = Trajectory(
        nothing, nothing, torch.zeros(num, 0), torch.zeros(num, 1), torch.tensor([1.0, 0.0]), (),
        Conditioning({}, torch.zeros(num, dtype=torch.long)),
    )  # fmt: skip
    numbers = torch.zeros(groups, size)
    return Rollout(
        samples=Prompts().train_samples()[:groups],
        prompts=["a prompt that goes on and on " * 20] * num,
        completions=None,
        trajectory=trajectory,
        images=[plain(color) for color in colors],
        scores=[Score(0, 0, 0)] * num,
        rewards=numbers,
        valid=numbers == 0,
        advantages=numbers,
        language_advantages=None,
    )


def validate(root: Path, module: Painter, num: int) -> EventAccumulator:
    tensorboard = TensorBoardLogger(root, name="run")
    trainer = L.Trainer(
        accelerator="cpu", enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
        logger=[tensorboard, CSVLogger(root, name="run", version=0)], callbacks=[SampleImages(num)],
    )  # fmt: skip
    trainer.validate(module, Prompts(), verbose=False)
    tensorboard.finalize("success")
    return EventAccumulator(tensorboard.log_dir, {"images": 0, "tensors": 0}).Reload()


def sheet(events: EventAccumulator, tag: str) -> Image.Image:
    (event,) = events.Images(tag)
    return Image.open(io.BytesIO(event.encoded_image_string))


def color_rows(image: Image.Image) -> list[list[Any]]:
    """The colours of images 208 pixels wide, by rows from the top: runs of equal rows of pixels that hold them."""
    pixels = np.asarray(image)
    rows: list[list[Any]] = []
    was = False
    for line in pixels:
        found = [tuple(map(int, line[12 + x * 220 + 104])) for x in range(image.width // 220)]
        edges = [tuple(map(int, line[12 + x * 220])) for x in range(image.width // 220)]
        now = [color for color, edge in zip(found, edges, strict=True) if color == edge and color in (RED, GREEN, BLUE)]
        if now and not was:
            rows.append(now)
        was = bool(now)
    return rows


def test_sheets_of_both_modes_and_a_table_of_rewrites(tmp_path: Path) -> None:
    events = validate(tmp_path, Painter(), num=3)
    assert events.Tags()["images"] == ["samples/geneval", "samples/few"]
    large, small = sheet(events, "samples/geneval"), sheet(events, "samples/few")
    assert (large.width, small.width) == (12 + 3 * 220, 12 + 2 * 220)  # 3 of the first batch of 4
    assert color_rows(large) == [[RED, GREEN, BLUE], [BLUE, BLUE, BLUE]]
    assert color_rows(small) == [[RED, GREEN], [BLUE, BLUE]]

    assert events.Tags()["tensors"] == ["rewrites/geneval/text_summary", "rewrites/few/text_summary"]
    (text,) = events.Tensors("rewrites/few/text_summary")
    assert text.tensor_proto.string_val[0].decode().splitlines() == [
        "| prompt | rewrite |",
        "|---|---|",
        "| prompt 0 | fine prompt 0 |",
        "| prompt 1 | fine prompt 1 |",
    ]


def height(image: Image.Image, color: tuple[int, int, int]) -> int:
    """Number of the first column's pixels that have a colour."""
    return int((np.asarray(image)[:, 12 + 104] == color).all(-1).sum())


@pytest.mark.parametrize(("size", "shown"), [((1024, 512), 104), ((24, 48), 416), ((32, 32), 208)])
def test_images_keep_their_aspect_ratio(size: tuple[int, int], shown: int) -> None:
    assert height(sheet_of({"a row": [(Image.new("RGB", size, RED), "caption")]}), RED) == shown


def ink(image: Image.Image) -> int:
    """Number of dark pixels."""
    return int((np.asarray(image.convert("L")) < 128).sum())


def test_captions_are_whole_and_collide_with_nothing() -> None:
    """Twice the words, twice the ink; below the images, within their width, and the row's label above them."""
    image = plain((255, 255, 255))
    words = "a red circle left of a large blue square and two small green crosses " * 4
    one, two = sheet_of({"row": [(image, words)]}), sheet_of({"row": [(image, words * 2)]})
    label = ink(sheet_of({"row": [(image, "")]}))
    assert label > 20
    assert ink(two) - label == pytest.approx(2 * (ink(one) - label), rel=0.02)
    margin = np.asarray(two.convert("L"))[:, 12 + 208 :]
    assert (margin > 200).all(), "no letter stands right of its image"
    unbroken = sheet_of({"row": [(image, "W" * 300)]})
    assert (np.asarray(unbroken.convert("L"))[:, 12 + 208 :] > 200).all()


def test_the_reward_stands_before_the_prompt(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    drawn: list[Mapping[str, Any]] = []
    monkeypatch.setattr(samples, "sheet", lambda rows: drawn.append(rows) or plain(RED))
    validate(tmp_path, Painter(latest=rollout([RED, GREEN], 2)), num=1)
    label, ((_, caption),) = next(iter(drawn[-1].items()))
    assert label == "one group: prompt 0"
    assert caption.startswith("reward 0.00, advantage +0.00\na prompt that goes on")
    assert list(drawn[0]) == ["prompts as written", "rewritten by the refiner (with PE)"]


def test_without_a_refiner_there_is_one_row_and_no_table(tmp_path: Path) -> None:
    events = validate(tmp_path, Painter(refines=False), num=8)
    assert color_rows(sheet(events, "samples/geneval")) == [[RED, GREEN, BLUE, RED]]
    assert events.Tags()["tensors"] == []


@pytest.mark.parametrize(
    ("size", "rows"),
    [(4, [[RED, RED], [GREEN, BLUE]]), (5, [[RED, RED, GREEN], [BLUE, RED]]), (2, [[RED], [RED]])],
)
def test_one_group_of_the_latest_rollout(tmp_path: Path, size: int, rows: list[list[Any]]) -> None:
    """The first group only, its slots in order over two rows."""
    colors = [RED, RED, GREEN, BLUE, RED][:size] + [GREEN] * size
    events = validate(tmp_path, Painter(latest=rollout(colors, size)), num=3)
    assert color_rows(sheet(events, "samples/group")) == rows
