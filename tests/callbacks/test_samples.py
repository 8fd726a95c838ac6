"""Image sheets: what TensorBoard is given, read back from its event files."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from callbacks.samples import SampleImages
from datamodules.base import PromptDataModule, PromptSample
from lightning_modules.evaluation import EvaluationBatch
from lightning_modules.rollout import Conditioning, Rollout, Trajectory
from rewards.base import Score

pytestmark = pytest.mark.filterwarnings("ignore:Experiment logs directory", "ignore:The dirpath has changed")

TILE = (160, 160 + 78)
RED, GREEN, BLUE = (200, 0, 0), (0, 200, 0), (0, 0, 200)
WHITE = (255, 255, 255)


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


def middles(image: Image.Image) -> list[list[Any]]:
    """The colour in the middle of every tile's image, by rows."""
    columns, rows = image.width // TILE[0], image.height // TILE[1]
    return [[image.getpixel((x * 160 + 80, y * 238 + 80)) for x in range(columns)] for y in range(rows)]


def test_sheets_of_both_modes_and_a_table_of_rewrites(tmp_path: Path) -> None:
    events = validate(tmp_path, Painter(), num=3)
    assert events.Tags()["images"] == ["samples/geneval", "samples/few"]
    large, small = sheet(events, "samples/geneval"), sheet(events, "samples/few")
    assert large.size == (3 * 160, 2 * 238)  # 3 of the first batch of 4
    assert small.size == (2 * 160, 2 * 238)
    assert middles(large) == [[RED, GREEN, BLUE], [BLUE, BLUE, BLUE]]
    assert middles(small) == [[RED, GREEN], [BLUE, BLUE]]
    # A frame of 4 white pixels, then the image without smoothing; black ink in the caption below.
    assert [large.getpixel((x, 80)) for x in (3, 4, 155, 156)] == [WHITE, RED, RED, WHITE]
    assert large.crop((0, 160, 160, 238)).convert("L").getextrema() == (0, 255)

    assert events.Tags()["tensors"] == ["rewrites/geneval/text_summary", "rewrites/few/text_summary"]
    (text,) = events.Tensors("rewrites/few/text_summary")
    assert text.tensor_proto.string_val[0].decode().splitlines() == [
        "| prompt | rewrite |",
        "|---|---|",
        "| prompt 0 | fine prompt 0 |",
        "| prompt 1 | fine prompt 1 |",
    ]


def test_captions_are_each_images_own(tmp_path: Path) -> None:
    """Equal images with unlike captions give unlike tiles: the rewrite stands below the lower row."""
    large = sheet(validate(tmp_path, Painter(), num=4), "samples/geneval")
    below = [large.crop((3 * 160, y + 160, 4 * 160, y + 238)).tobytes() for y in (0, 238)]
    first = large.crop((0, 160, 160, 238)).tobytes()
    assert len({*below, first}) == 3


def test_without_a_refiner_there_is_one_row_and_no_table(tmp_path: Path) -> None:
    events = validate(tmp_path, Painter(refines=False), num=8)
    assert sheet(events, "samples/geneval").size == (4 * 160, 238)
    assert events.Tags()["tensors"] == []


@pytest.mark.parametrize(
    ("size", "rows"),
    [(4, [[RED, RED], [GREEN, BLUE]]), (5, [[RED, RED, GREEN], [BLUE, RED, WHITE]]), (2, [[RED], [RED]])],
)
def test_one_group_of_the_latest_rollout(tmp_path: Path, size: int, rows: list[list[Any]]) -> None:
    """The first group only, its slots in order over two rows."""
    colors = [RED, RED, GREEN, BLUE, RED][:size] + [GREEN] * size
    events = validate(tmp_path, Painter(latest=rollout(colors, size)), num=3)
    image = sheet(events, "samples/group")
    assert image.size == (len(rows[0]) * 160, 2 * 238)
    assert middles(image) == rows
