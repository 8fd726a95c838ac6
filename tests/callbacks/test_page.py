"""Pages that real runs leave: fits with and without a refiner, resumed ones, tests, predictions, and a failure."""

from __future__ import annotations

import json
import re
from pathlib import Path

import lightning as L
import pytest
from lightning.pytorch.demos.boring_classes import BoringModel
from PIL import Image

import callbacks.reporting.page as pages
from callbacks.page import Page
from callbacks.reporting.gallery import Gallery
from lightning_modules.cli import main
from tests.short_runs import folder, quick, short_fit

pytestmark = pytest.mark.slow


def test_a_fit_keeps_the_same_prompts_at_every_validation(two_runs: Path) -> None:
    run = folder(two_runs, "promptrl")
    gallery = Gallery.read(run)
    assert gallery.steps == [0, 1, 2]
    shown = {(s.name, s.mode, s.id) for s in gallery.samples if s.step == 0}
    assert len(shown) == 3 * 2 * 6 and len(gallery.samples) == 3 * len(shown), "six prompts of three sets, both modes"
    for sample in gallery.samples:
        assert Image.open(run / sample.file).size == (32, 32)
        assert (sample.drawn == sample.prompt) or sample.mode == "with_pe" or sample.name != "geneval"
    scores = json.loads((run / "results.json").read_text())
    for mode in ("without_pe", "with_pe"):  # all six prompts are shown, so the marks are the scores
        last = [s.ratings[0] for s in gallery.samples if (s.step, s.name, s.mode) == (2, "geneval", mode)]
        assert sum(bool(one.right) for one in last) / 6 == pytest.approx(scores["geneval"][mode]["images"])
    assert gallery.group is not None and gallery.group.step == 2
    assert [slot.retained for slot in gallery.group.slots] == [True, True] + [False] * 6
    assert all(slot.drawn == gallery.group.prompt for slot in gallery.group.slots[:2])
    assert sum(slot.advantage for slot in gallery.group.slots) == pytest.approx(0, abs=1e-4)


def test_every_fit_leaves_a_page(two_runs: Path) -> None:
    for experiment, refined in (("promptrl", True), ("flow_only", False)):
        page = (folder(two_runs, experiment) / "report.html").read_text()
        assert set(re.findall(r'(?:src|href)="([a-z]*)', page)) == {"data"}, "nothing is fetched"
        assert page.count("data:image/svg+xml") >= 5, "curves of scores, the reward and health"
        assert ("with PE" in page) == refined and page.count("retained</span>") == (2 if refined else 8)
        assert len(page) < 3e6


def test_a_resumed_fit_shows_what_was_before(two_runs: Path, tmp_path: Path) -> None:
    last = folder(two_runs, "flow_only") / "checkpoints" / "last.ckpt"
    main([*short_fit(tmp_path, "flow_only", 2, steps=3), f"--ckpt_path={last}"])
    run = folder(tmp_path, "flow_only")
    assert Gallery.read(run).steps == [0, 1, 2, 3]
    page = (run / "report.html").read_text()
    assert all(f">step {step}<" in page for step in (0, 2, 3)) and "resumed from" in page


def test_a_test_and_predictions_leave_pages(two_runs: Path, tmp_path: Path) -> None:
    options = [
        "--config=configs/miniature/promptrl.yaml",
        f"--ckpt_path={folder(two_runs, 'promptrl')}/checkpoints/last.ckpt",
    ]
    main(quick("test", tmp_path, *options[1:], config="configs/miniature/promptrl.yaml"))
    page = (folder(tmp_path, "promptrl") / "report.html").read_text()
    assert "test of PromptRL, checkpoint" in page and "score <span" in page and "before" not in page.split("<body>")[1]
    assert page.count('<p class="column">rewritten (PE)</p>') == 3, "one prompt of each set, both modes side by side"

    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\n<i>two</i> blue squares\n")
    data = ["--data=datamodules.text.TextPrompts", f"--data.train_file={prompts}", f"--data.eval_file={prompts}"]
    quiet = ["--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu"]
    main(["predict", *options, *data, *quiet, f"--predictions.directory={tmp_path}/drawn"])
    page = (tmp_path / "drawn" / "report.html").read_text()
    assert "&lt;i&gt;two&lt;/i&gt; blue squares" in page and page.count("<img ") == 4


def test_a_page_that_cannot_be_drawn_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    def broken(folder: Path) -> Path:
        raise KeyError("a bug")

    monkeypatch.setattr(pages, "run_page", broken)
    main(short_fit(tmp_path, "flow_only", 1, steps=1))
    run = folder(tmp_path, "flow_only")
    said = [str(one.message) for one in recwarn if "report.html" in str(one.message)]
    assert said == ["report.html could not be drawn (KeyError: 'a bug'); all else of the run is there."]
    assert (run / "results.md").is_file() and len((run / "metrics.csv").read_text().splitlines()) > 2
    assert not (run / "report.html").exists()


def test_other_modules_are_left_alone(tmp_path: Path) -> None:
    trainer = L.Trainer(
        default_root_dir=tmp_path, accelerator="cpu", max_steps=1, callbacks=[Page()], logger=False,
        limit_val_batches=1, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(BoringModel())
    assert list(tmp_path.iterdir()) == []
