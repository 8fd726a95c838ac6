"""A plain function as a reward: its values, its errors, and groups in one call."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from datamodules.sample import PromptSample
from rewards.base import RewardBatch, Score
from rewards.function import FunctionReward

MODULE = """
def width(prompts, images, metadata):
    return [image.width * len(prompt) + data["more"] for prompt, image, data in zip(prompts, images, metadata)]

def some(prompts, images, metadata):
    from rewards.base import Score
    return (value for value in [None, True, Score(1, 2, 3)])

def text(prompts, images, metadata):
    return "123"

def nothing(prompts, images, metadata):
    return None

def short(prompts, images, metadata):
    return [1.0]

number = 3
"""


@pytest.fixture(autouse=True)
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "functions_of_mine.py"
    path.write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "functions_of_mine", raising=False)
    return path


def batch(num: int = 3) -> RewardBatch:
    samples = [PromptSample(str(i), "ab", "", {"more": i}, wording="never shown") for i in range(num)]
    return RewardBatch(samples, [Image.new("RGB", (4, 2))] * num)


def test_it_gets_prompts_images_and_metadata() -> None:
    reward = FunctionReward("functions_of_mine.width")
    assert reward.name == "width" and reward.version == "function functions_of_mine.width"
    assert reward(batch()) == [Score(value, value, value) for value in (8.0, 9.0, 10.0)]
    assert FunctionReward("functions_of_mine.width", name="w").name == "w"


def test_none_is_a_failure_and_a_score_is_kept() -> None:
    failed, true, score = FunctionReward("functions_of_mine.some")(batch())
    assert not failed.valid and "functions_of_mine.some returned None" in failed.detail["reason"]
    assert true.rl == 1.0 and (score.native, score.table, score.rl) == (1, 2, 3)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("width", r"function='width', use an import path, such as my_rewards.width"),
        ("no_such_module.width", r"no module 'no_such_module': put no_such_module.py into the current folder"),
        ("functions_of_mine.deeper.width", r"no module 'functions_of_mine.deeper'"),
        ("functions_of_mine.wide", r"functions_of_mine.py has no function 'wide'"),
        ("functions_of_mine.number", r"functions_of_mine.py has no function 'number'"),
    ],
)
def test_functions_that_are_not_there(path: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FunctionReward(path)


def test_a_missing_import_of_the_users_own_is_named(module: Path) -> None:
    module.write_text("import no_such_thing_at_all")
    with pytest.raises(ModuleNotFoundError, match="no_such_thing_at_all"):
        FunctionReward("functions_of_mine.width")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing", r"functions_of_mine.nothing returned None for 3 images: it must return a list"),
        ("short", r"functions_of_mine.short returned 1 scores for 3 images"),
        ("text", r"functions_of_mine.text returned the str '123'"),
    ],
)
def test_values_that_are_no_scores(name: str, message: str) -> None:
    reward: Any = FunctionReward(f"functions_of_mine.{name}")
    with pytest.raises(ValueError, match=message):
        reward(batch())
