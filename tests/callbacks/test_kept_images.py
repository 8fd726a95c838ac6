"""`lightning test` of the miniature: GenEval's folders, a killed test goes on, any number of processes, one table."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from callbacks.geneval import GenEvalBenchmark
from callbacks.run_config import folder_stamps
from lightning_modules.cli import main
from lightning_modules.policies.flux1 import Flux1Policy
from miniature.scenes.detector import ShapesDetector
from rewards.geneval.rules import judge
from tests.forked import command, two_processes
from tests.short_runs import quick

pytestmark = pytest.mark.slow

FLOW = "model.init_args.flow.init_args"
MODES = ("without_pe", "with_pe")


def options(root: Path, prompts: int = 7, batch: int = 3, images: int = 2) -> list[str]:
    sizes = {"data.init_args.eval_prompts": prompts, "data.init_args.eval_batch_size": batch,
             "images.images_per_prompt": images}  # fmt: skip
    return quick("test", root, *(f"--{name}={value}" for name, value in sizes.items()))


def results_of(root: Path, version: int = 0) -> dict[str, Any]:
    results: dict[str, Any] = json.loads((root / f"quickstart/version_{version}/results.json").read_text())
    return {name: results[name] for name in ("geneval", "paraphrase", "unseen", "intervals")}


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Notes the size of every batch that the flow model draws."""
    sizes: list[int] = []
    generate = Flux1Policy.generate

    def counted(self: Flux1Policy, prompts: Any, *args: Any, **kwargs: Any) -> Any:
        sizes.append(len(prompts))
        return generate(self, prompts, *args, **kwargs)

    monkeypatch.setattr(Flux1Policy, "generate", counted)
    return sizes


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An unbroken test: 7 prompts in 3 sets, 2 images in 2 modes."""
    root = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(Path(__file__).parents[2])
        main(options(root))
    return root


def folder_of(root: Path) -> Path:
    (folder,) = (root / "quickstart/images").iterdir()
    return folder


def test_the_folders_are_those_that_genevals_script_reads(whole: Path) -> None:
    """A loop by its rules: digit folders, `metadata.jsonl`, images called digits and .png; its summary is ours."""
    for name in ("geneval", "paraphrase", "unseen"):
        for mode in MODES:
            rows = []
            for subfolder in os.listdir(folder_of(whole) / name / mode):
                path = folder_of(whole) / name / mode / subfolder
                if not path.is_dir() or not subfolder.isdigit():
                    continue
                metadata = json.loads((path / "metadata.jsonl").read_text())
                for image in os.listdir(path / "samples"):
                    if re.match(r"\d+\.png", image):
                        with Image.open(path / "samples" / image) as image:
                            (found,) = ShapesDetector().detect([image])
                        rows.append((metadata["tag"], judge(found, metadata).correct, subfolder))
            assert len(rows) == 7 * 2 and {row[2] for row in rows} == {f"{i:05d}" for i in range(7)}
            tags = {tag: [right for own, right, _ in rows if own == tag] for tag in {row[0] for row in rows}}
            means = {tag: sum(rights) / len(rights) for tag, rights in tags.items()}
            scores = results_of(whole)[name][mode]
            assert {tag: scores[tag] for tag in means} == pytest.approx(means)
            assert scores["overall"] == pytest.approx(sum(means.values()) / len(means))
            assert scores["images"] == pytest.approx(sum(row[1] for row in rows) / len(rows))
            assert scores["prompts"] == pytest.approx(len({row[2] for row in rows if row[1]}) / 7)


def test_the_same_command_draws_nothing_again(whole: Path, drawn: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise AssertionError("nothing is to be rewritten")

    monkeypatch.setattr("lightning_modules.policies.language.LanguagePolicy.rewrite", refuse)
    main(options(whole))
    assert drawn == [] and results_of(whole, 1) == results_of(whole)


def test_more_images_keep_the_first_ones(whole: Path, drawn: list[int]) -> None:
    before = {path: path.read_bytes() for path in folder_of(whole).rglob("000[01].png")}
    main(options(whole, images=3))
    assert sorted(drawn) == sorted([3, 3, 1] * 2 * 3)
    assert len(list(folder_of(whole).rglob("0002.png"))) == 7 * 3 * 2
    assert all(path.read_bytes() == data for path, data in before.items())


def test_a_killed_test_goes_on_to_the_same_table(whole: Path, tmp_path: Path, drawn: list[int]) -> None:
    """SIGKILL in the middle; the second run draws what lacks, the table is that of the unbroken run."""
    (process,) = command(tmp_path / "output", *options(tmp_path))
    deadline = time.monotonic() + 120
    while len(list(tmp_path.rglob("000[01].png"))) < 20 and time.monotonic() < deadline:
        time.sleep(0.005)
    process.kill()
    there = len(list(tmp_path.rglob("000[01].png")))
    assert 20 <= there < 7 * 3 * 2 * 2
    main(options(tmp_path))
    assert 0 < sum(drawn) <= 7 * 3 * 2 * 2 - there + 3
    assert results_of(tmp_path, 1) == results_of(whole)


def test_other_settings_have_another_folder(whole: Path, tmp_path: Path, drawn: list[int]) -> None:
    main(options(tmp_path, prompts=2, images=1))
    main([*options(tmp_path, prompts=2, images=1), f"--{FLOW}.guidance=2.0"])
    main([*options(tmp_path, prompts=2, images=1), "--model.init_args.reward.init_args.reward=strict"])
    assert len(drawn) == 2 * 3 * 2  # the reward changes no image
    assert len(list((tmp_path / "quickstart/images").iterdir())) == 2


def test_a_model_that_was_trained_again_is_drawn_again(tmp_path: Path, drawn: list[int]) -> None:
    """A folder has the same name after another export; its files' time tells."""
    shutil.copytree("miniature/flow", tmp_path / "flow")
    arguments = [*options(tmp_path, prompts=1, images=1), f"--{FLOW}.model={tmp_path}/flow"]
    main(arguments)
    main(arguments)
    assert len(drawn) == 3 * 2
    (tmp_path / "flow" / "transformer" / "config.json").touch()
    main(arguments)
    assert len(drawn) == 2 * 3 * 2


def test_a_lora_file_is_told_apart_by_its_time(tmp_path: Path) -> None:
    file = tmp_path / "mine.safetensors"
    file.write_text("12345")
    (stamp,) = folder_stamps({"flow": {"lora": {"path": str(file), "rank": None}}}).values()
    assert stamp.endswith(", 5 bytes")
    os.utime(file, (0, 0))
    assert folder_stamps(str(file)) == {str(file): "1970-01-01T00:00:00+00:00, 5 bytes"} != {str(file): stamp}


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit):
        main([*options(tmp_path, prompts=1, images=1), f"--images.directory={tmp_path}/file/x"])
    assert "/file/x cannot be made (Not a directory): name another folder." in capfd.readouterr().err.splitlines()[-1]


def test_a_named_folder_is_not_mixed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    named = [f"--images.directory={tmp_path}/named"]
    main([*options(tmp_path, prompts=2, images=1), *named])
    with pytest.raises(SystemExit):
        main([*options(tmp_path, prompts=2, images=1), *named, f"--{FLOW}.guidance=2.0"])
    line = capfd.readouterr().err.splitlines()[-1]
    assert f"the images in {tmp_path}/named were drawn with flow.init_args.guidance" in line
    assert "which is 2.0 now: set `--images.directory` to another folder" in line
    main([*options(tmp_path, prompts=2, images=1), "--images.keep=false"])
    assert not (tmp_path / "quickstart/images").exists()


def test_no_images_are_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(options(tmp_path, images=0))
    assert "`images.images_per_prompt` is 0, use at least 1" in capfd.readouterr().err.splitlines()[-1]


def draw_by_two(rank: int, root: str) -> None:
    for prompts in (1, 3):
        two = ["--trainer.devices=2", "--trainer.strategy=ddp", f"--images.directory={root}/two-{prompts}"]
        main([*options(Path(root, f"{prompts}"), prompts, batch=2), *two])


def test_two_processes_give_the_table_of_one(tmp_path: Path) -> None:
    """Uneven shares (3 prompts), and a process without any prompt (1): nothing is counted twice."""
    two_processes(draw_by_two, str(tmp_path))
    for prompts in (1, 3):
        root = tmp_path / f"{prompts}"
        main([*options(root, prompts, batch=2), "--images.keep=false"])
        assert results_of(root, 1) == results_of(root)
        lines = [json.loads(line) for line in (tmp_path / f"two-{prompts}/images.jsonl").read_text().splitlines()]
        keys = {(line["set"], line["id"], line["mode"], line["k"]) for line in lines}
        assert len(lines) == len(keys) == prompts * 3 * 2 * 2
        assert GenEvalBenchmark.headline in results_of(root)["geneval"]["with_pe"]
