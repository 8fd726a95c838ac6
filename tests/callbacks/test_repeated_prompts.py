"""An evaluation file that lists each prompt four times: one prompt with four images, each with noise of its own."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from datamodules.base import PromptSample, Reworded
from lightning_modules.cli import main
from lightning_modules.evaluation import EvaluatedAgents
from lightning_modules.policies.flux1 import Flux1Policy
from tests.short_runs import QUICK

pytestmark = pytest.mark.slow

ROWS = [
    {"prompt": f"a photo of a {shape}", "tag": "single_object", "include": [{"class": shape, "count": 1}]}
    for shape in ("circle", "square", "cross")
]


def options(folder: Path, command: str, *more: str) -> list[str]:
    path, overlay = folder / "p.jsonl", folder / "overlay.yaml"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*ROWS, *ROWS[::-1], *ROWS, *ROWS]))
    files = {"train_file": str(path), "eval_file": str(path), "eval_batch_size": 2}
    overlay.write_text(json.dumps({"data": {"class_path": "datamodules.geneval.GenEvalPrompts", "init_args": files}}))
    root = f"--trainer.default_root_dir={folder / 'runs'}"
    return [command, "--config=configs/quickstart.yaml", f"--config={overlay}", root, *QUICK, *more]


def scores(folder: Path) -> list[dict[str, Any]]:
    (path,) = folder.glob("runs/quickstart/version_*/scores.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(("more", "images"), [((), 4), (("--images.images_per_prompt=5",), 5)])
def test_a_test_has_a_line_for_each_prompt(tmp_path: Path, more: tuple[str, ...], images: int) -> None:
    main(options(tmp_path, "test", *more))
    found = {(line["mode"], line["id"]): line["images"] for line in scores(tmp_path)}
    names = ["00000", "00001", "00002"]
    assert found == {(mode, name): images for mode in ("without_pe", "with_pe") for name in names}
    (listed,) = tmp_path.glob("runs/quickstart/images/*/images.jsonl")
    lines = [json.loads(line) for line in listed.read_text().splitlines()]
    assert len({line["seed"] for line in lines}) == 3 * images and len(lines) == 2 * 3 * images
    (results,) = tmp_path.glob("runs/quickstart/version_*/results.json")
    assert json.loads(results.read_text())["sets"]["geneval"]["prompts"] == 3


def test_validation_draws_the_repeats_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []
    generate = Flux1Policy.generate

    def noted(self: Flux1Policy, prompts: Any, own: Any, *args: Any, **kwargs: Any) -> Any:
        seeds.extend(own)
        return generate(self, prompts, own, *args, **kwargs)

    monkeypatch.setattr(Flux1Policy, "generate", noted)
    main(options(tmp_path, "validate"))
    assert len(seeds) == 2 * 12 and len(set(seeds)) == 12


def test_other_wordings_are_drawn_as_often_as_their_originals() -> None:
    """Of which they may lack the prompt that is listed least often: paired differences are on the same noise."""
    samples = [PromptSample(f"{number}", "a cat", "text", {}, repeats=number) for number in (1, 3)]
    sets = {"text": samples, "text.typos": Reworded(samples, {1: "a cta"})}
    data = SimpleNamespace(eval_sets=sets, originals={"text.typos": "text"})
    agents: Any = SimpleNamespace(_data=data)
    assert [EvaluatedAgents._repeats(agents, name) for name in sets] == [1, 1]
