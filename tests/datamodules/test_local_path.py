"""Settings that name a folder or file of this machine take no addresses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.paper.__main__ import main as paper
from callbacks.export import Export
from callbacks.kept_images import KeepImages
from callbacks.predictions import SavePredictions
from datamodules.editing.benchmarks import ImgEditPrompts
from datamodules.local_path import local_path
from datamodules.paraphrases.files import FileParaphrases
from datamodules.text import TextPrompts
from lightning_modules.cli import main
from lightning_modules.paraphraser import WrittenParaphrases
from lightning_modules.policies.language import LanguagePolicy
from lightning_modules.sweep.plan import Sweep
from miniature.pretrain import VAEPretraining
from rewards.judges.imgedit import ImgEditJudge
from rewards.judges.viescore import VIEScore

URL = "http://127.0.0.1:8000/v1"


def setup(data: Any) -> None:
    data.setup("validate")


@pytest.mark.parametrize(
    ("make", "setting"),
    [
        (lambda name: Export(name), "Export's `directory`"),
        (lambda name: SavePredictions(name), "predictions.directory"),
        (lambda name: KeepImages(name), "images.directory"),
        (lambda name: Sweep(["configs/quickstart.yaml"], root=name), "the sweep's `root`"),
        (
            lambda name: WrittenParaphrases(LanguagePolicy("miniature/language", learning_rate=None), cache=name),
            "WrittenParaphrases.cache",
        ),
        (lambda name: FileParaphrases(name).kinds, "FileParaphrases.path"),
        (lambda name: setup(ImgEditPrompts(name, ".")), "data.file"),
        (lambda name: ImgEditJudge(URL, "m", cache_dir=name), "ImgEditJudge's cache_dir"),
        (lambda name: ImgEditJudge(URL, "m", wording=name), "ImgEditJudge's wording"),
        (lambda name: VIEScore(URL, "m", semantic_wording=name), "VIEScore's semantic_wording"),
        (lambda name: VAEPretraining(name), "VAEPretraining's output"),
    ],
)
@pytest.mark.parametrize("name", ["hf://me/mine", "s3://bucket/x.jsonl"])
def test_addresses_are_refused(make: Callable[[str], object], setting: str, name: str) -> None:
    with pytest.raises(ValueError, match=rf"^{setting} is {name}, an address: give a path on this machine\.$"):
        make(name)


def test_prompts_may_lie_on_the_hub_but_not_elsewhere() -> None:
    with pytest.raises(
        ValueError, match=r"^data\.eval_file is s3://b/x\.txt, an address: give a path on this machine\.$"
    ):
        setup(TextPrompts("s3://b/x.txt", "s3://b/x.txt"))


def test_commands_refuse_them_too(capfd: pytest.CaptureFixture[str]) -> None:
    for option in ("trainer.default_root_dir", "experiment"):
        with pytest.raises(SystemExit):
            main(["fit", "--config=configs/quickstart.yaml", f"--{option}=s3://bucket/runs"])
        assert f"{option} is s3://bucket/runs, an address: give a path" in capfd.readouterr().err
    with pytest.raises(SystemExit):
        paper(["--report-only", "--out=hf://me/report.md"])
    assert "--out is hf:/me/report.md, an address: give a path" in capfd.readouterr().err
    assert not Path("s3:").exists() and not Path("hf:").exists()


@pytest.mark.parametrize("name", ["runs", "/a/b:c", "C:/runs", "C:\\runs", "a: b/c", "./hf:x"])
def test_paths_are_no_addresses(name: str) -> None:
    assert local_path(name, "x") == Path(name)
