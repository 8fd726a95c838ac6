"""Pages from files written by hand: numbers, marks and texts where a reader looks for them."""

from __future__ import annotations

import json
import re
from html import unescape
from pathlib import Path

import pytest
from PIL import Image

from callbacks.reporting.gallery import Gallery, Sample
from callbacks.reporting.observations import observations
from callbacks.reporting.page import run_page
from callbacks.reporting.predictions_page import predictions_page
from callbacks.runs.loading import Run
from callbacks.runs.report import main
from datamodules.sample import PromptSample
from tests.callbacks.reporting.made_run import MARKUP, REWRITE, made_run


def texts(page: Path) -> str:
    """Text of a page as a reader sees it, without styles and tags."""
    html = re.sub(r"<style>.*?</style>", "", page.read_text(), flags=re.DOTALL)
    return " ".join(unescape(re.sub(r"<[^>]*>", " ", html)).split())


def test_scores_with_the_intervals_of_their_changes(tmp_path: Path) -> None:
    shown = texts(run_page(made_run(tmp_path / "run")))
    assert "GenEval 24 prompts without PE 0.200 0.500 +0.300 [+0.111, +0.444] with PE 0.200 0.500 +0.300" in shown
    assert "0.450" not in shown, "the interval of the score after is not the change's"
    assert "PromptRL: 30 steps, 1,920 rollouts, 2 min, seed 7" in shown


def test_texts_are_shown_as_they_are_and_whole(tmp_path: Path) -> None:
    page = run_page(made_run(tmp_path / "run"))
    assert "<script" not in page.read_text() and MARKUP in texts(page)
    assert texts(page).count(REWRITE.strip()) == 2 * 3 + 4  # with PE at three steps, and the group


def test_first_middle_and_last_step_with_marks(tmp_path: Path) -> None:
    page = run_page(made_run(tmp_path / "run", refines=False))
    card = texts(page).split("make it blue")[1].split("One group")[0]
    assert card.split() == "the image to edit as written step 0 step 20 step 30 ✗ wrong ✓ right ✓ right".split()
    assert "retained ✗ reward 1.50 (task 0.50), advantage \N{MINUS SIGN}1.50" in texts(page)
    assert texts(page).count("retained ") == 2 and "with PE" not in texts(page)


def test_small_images_are_inside_and_large_ones_beside_the_page(tmp_path: Path) -> None:
    small = run_page(made_run(tmp_path / "small", size=(32, 32)))
    assert set(re.findall(r'src="([a-z]*)', small.read_text())) == {"data"}
    assert "can be sent alone" in texts(small) and 'class="pixelated"' in small.read_text()
    folder = made_run(tmp_path / "large")
    for path in (folder / "report").glob("*.jpg"):
        path.write_bytes(path.read_bytes() + bytes(200_000))
    large = run_page(folder)
    links = re.findall(r'src="(report/[^"]*)"', large.read_text())
    assert len(links) == 2 * 2 * 3 + 1 + 4 and all((folder / link).is_file() for link in links)
    assert "keep them together" in texts(large) and large.stat().st_size < 3e6


def test_kept_images_keep_their_shape(tmp_path: Path) -> None:
    gallery = Gallery(tmp_path)
    wide = gallery.keep(Image.new("RGB", (1024, 512)), "wide")
    tiny = gallery.keep(Image.new("RGBA", (32, 48)), "../tiny")
    assert Image.open(tmp_path / wide).size == (512, 256) and wide.endswith(".jpg")
    assert Image.open(tmp_path / tiny).size == (32, 48) and Path(tiny).parent == Path("report")


def test_no_gallery_of_others_names_files_outside(tmp_path: Path) -> None:
    """A resumed run copies and removes images by the names in the earlier one's file."""
    for file in ("report/../../stolen", "/etc/hostname", "config.yaml"):
        gallery = Gallery(tmp_path)
        gallery.samples.append(Sample(1, 1, "set", "without_pe", "0", "a cat", "a cat", file))
        gallery.write()
        with pytest.raises(ValueError, match="gallery.json is damaged: .* is no image in report/; delete it"):
            Gallery.read(tmp_path)


def test_many_evaluations_are_thinned_out(tmp_path: Path) -> None:
    gallery = Gallery(tmp_path)
    for step in range(100):
        file = gallery.keep(Image.new("RGB", (8, 8)), f"{step}")
        gallery.samples.append(Sample(step, step, "set", "without_pe", "0", "a cat", "a cat", file))
        gallery.write()
    steps = Gallery.read(tmp_path).steps
    assert (steps[0], steps[-1]) == (0, 99) and 8 <= len(steps) <= 16
    assert len(list((tmp_path / "report").glob("*.png"))) == len(steps)


def test_a_resumed_run_begins_with_the_earlier_ones_images(tmp_path: Path) -> None:
    made_run(tmp_path / "first")
    gallery = Gallery(tmp_path / "second")
    gallery.begin_with(tmp_path / "first", 10)
    assert gallery.steps == [0, 10]
    assert all((tmp_path / "second" / sample.file).is_file() for sample in gallery.samples)


def test_a_run_without_scores_or_images(tmp_path: Path) -> None:
    bare = made_run(tmp_path / "run", scored=False)
    shown = texts(run_page(bare))
    assert "No benchmark has scored this run's evaluation prompts." in shown and "Gallery" in shown
    for path in (bare / "report").iterdir():
        path.unlink()
    (bare / "metrics.csv").unlink()
    shown = texts(run_page(bare))
    assert "Gallery" not in shown and "Curves" not in shown and "30 steps" in shown
    made_run(tmp_path / "gone")
    (tmp_path / "gone/report/0_with_pe_30.jpg").unlink()
    assert texts(run_page(tmp_path / "gone")).count("the image is gone") == 1


def test_health_in_sentences(tmp_path: Path) -> None:
    folder = made_run(tmp_path / "run")
    found = observations(Run.read(folder))
    assert found == [
        (False, "1 updates of the image model were skipped: loss or gradient not finite."),
        (True, "100% of the rewrites were well-formed at the end."),
    ]
    (folder / "results.md").unlink()
    text = (folder / "metrics.csv").read_text().replace(",1,0\n", ",0.5,0\n").replace(",1,1\n", ",0.5,0\n")
    (folder / "metrics.csv").write_text(text)
    assert observations(Run.read(folder)) == [
        (False, "The run did not reach its end; a resumed one goes on from last.ckpt."),
        (False, "50% of the rewrites were well-formed at the end."),
    ]


def test_a_page_that_compares_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made_run(tmp_path / "a" / "version_0")
    made_run(tmp_path / "b" / "version_0", refines=False)
    main([str(tmp_path), "--output", str(tmp_path / "both.html")])
    assert capsys.readouterr().out.strip() == str(tmp_path / "both.html")
    shown = texts(tmp_path / "both.html")
    assert "PromptRL, without PE 0.200 0.500 +0.300 [+0.111, +0.444]" in shown
    assert "flow-only, without PE 0.200 0.500 +0.300 [+0.111, +0.444]" in shown
    assert "as written PromptRL flow-only ✓ right ✓ right rewritten (PE) PromptRL flow-only ✓ right" in shown
    assert shown.count("none") == 2, "a run without a refiner has no rewrites"
    assert "PromptRL, step 30" in shown and "flow-only, step 30" in shown
    main([str(tmp_path / "a")])
    assert capsys.readouterr().out.strip() == str(tmp_path / "a/version_0/report.html")
    with pytest.raises(SystemExit, match="error: there is no run in nowhere"):
        main(["nowhere"])


def test_an_animation_has_a_frame_for_each_evaluation(tmp_path: Path) -> None:
    made_run(tmp_path / "run", size=(32, 32))
    main([str(tmp_path / "run"), "--gif", str(tmp_path / "run.gif")])
    with Image.open(tmp_path / "run.gif") as gif:
        assert gif.n_frames == 4 and gif.width == 12 + 2 * 220  # type: ignore[attr-defined]
    made_run(tmp_path / "other")
    for path in (tmp_path / "other" / "report").iterdir():
        path.unlink()
    with pytest.raises(SystemExit, match="error: .*other has no images of evaluations"):
        main([str(tmp_path / "other"), "--gif", str(tmp_path / "other.gif")])


def test_predictions_with_and_without_a_source(tmp_path: Path) -> None:
    lines = []
    for name, mode, k in (("0", "without_pe", 0), ("0", "with_pe", 0), ("1", "without_pe", 0), ("1", "with_pe", 0)):
        Image.new("RGB", (32, 16)).save(tmp_path / f"{name}_{mode}.png")
        lines.append(
            {
                "set": "mine",
                "id": name,
                "prompt": MARKUP,
                "wording": None,
                "mode": mode,
                "rewrite": REWRITE if mode == "with_pe" else None,
                "k": k,
                "file": f"{name}_{mode}.png",
            }
        )
    (tmp_path / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    samples = [PromptSample("0", MARKUP, "", {}, Image.new("RGB", (32, 16))), PromptSample("1", MARKUP, "", {})]
    page = predictions_page(tmp_path, {"mine": samples})
    shown = texts(page)
    assert shown.startswith("Predictions Predictions 2 prompts; the images of a row have the same noise.")
    assert shown.count("the image to edit") == 1 and "<script" not in page.read_text()
    assert shown.count(f"as written rewritten by the refiner (PE) {REWRITE.strip()}") == 2
    assert len(re.findall(r"<img src=\"data:image/png", page.read_text())) == 5
