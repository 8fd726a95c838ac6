"""What is ours in the wrappers. Their packages need environments of their own (rewards/served/README.md)."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import jsonargparse
import numpy as np
import pytest
import yaml
from packaging.requirements import Requirement
from PIL import Image

from datamodules.sample import PromptSample
from rewards.base import Reward, RewardBatch
from rewards.packages import installed
from rewards.served import ServedReward, to_score
from rewards.served.deqa import DeQAReward
from rewards.served.hpsv3 import HPSv3Reward
from rewards.served.image_reward import ImageRewardReward

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
CLASSES: dict[str, type[ServedReward]] = {
    "image_reward": ImageRewardReward,
    "hpsv3": HPSv3Reward,
    "deqa": DeQAReward,
}
SERVER = {"fastapi", "uvicorn", "httpx", "python-multipart", "pydantic", "jsonargparse", "omegaconf", "pyyaml"}


def batch(prompts: Sequence[str], sizes: Sequence[tuple[int, int]]) -> RewardBatch:
    samples = [PromptSample(str(index), prompt, "t", {}) for index, prompt in enumerate(prompts)]
    return RewardBatch(samples, [Image.new("L", size, index) for index, size in enumerate(sizes)])


class Loudness(ServedReward):
    """A scorer of our own, to run `ServedReward` with: the grey level of the first pixel by the prompt's length."""

    name = "loudness"
    requirements = "none.txt"
    rl_divisor = 5.0
    batch_size = 2

    def __init__(self) -> None:
        self.calls: list[int] = []

    def fault(self, prompt: str, image: Image.Image) -> str | None:
        return "too wide" if image.width > 9 else None

    def native(self, prompts: Sequence[str], images: Sequence[Image.Image]) -> list[float]:
        self.calls.append(len(images))
        assert {image.mode for image in images} == {"RGB"}
        levels = [float(np.asarray(image)[0, 0, 0]) for image in images]
        return [level / len(p) if p != "?" else math.inf for p, level in zip(prompts, levels, strict=True)]


@pytest.mark.parametrize(
    ("native", "divisor", "rl"),
    [(4.0, 5.0, 0.8), (1.0, 5.0, 0.2), (-2.25, 1.0, -2.25), (11.5, 1.0, 11.5), (0.0, 1.0, 0.0)],
)
def test_units(native: float, divisor: float, rl: float) -> None:
    score = to_score(native, rl_divisor=divisor)
    assert (score.native, score.table, score.rl, score.valid) == (native, native, rl, True)


@pytest.mark.parametrize("native", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_invalid(native: float) -> None:
    score = to_score(native)
    assert not score.valid
    assert score.detail == {"reason": f"the scorer put out {native}"}


def test_scales() -> None:
    """Only DeQA's trained value differs from what tables print, and only DeQA is bounded."""
    unbounded = (-math.inf, math.inf)
    assert {name: (cls.rl_divisor, cls.native_range) for name, cls in CLASSES.items()} == {
        "image_reward": (1.0, unbounded),
        "hpsv3": (1.0, unbounded),
        "deqa": (5.0, (1.0, 5.0)),
    }


def test_order_and_faults() -> None:
    """Images 0..5 are as grey as their index; 1 is too wide, 4's score is infinite; the rest is index / length."""
    reward = Loudness()
    scores = reward(batch(["a", "a", "ab", "abc", "?", "a"], [(8, 8), (10, 8), (8, 8), (8, 8), (8, 8), (8, 8)]))
    assert [score.valid for score in scores] == [True, False, True, True, False, True]
    assert [scores[i].native for i in (0, 2, 3, 5)] == [0.0, 1.0, 1.0, 5.0]
    assert [scores[i].rl for i in (0, 2, 3, 5)] == [0.0, 0.2, 0.2, 1.0]
    assert [scores[i].detail["reason"] for i in (1, 4)] == ["too wide", "the scorer put out inf"]
    assert reward.calls == [2, 2, 1]
    assert Loudness()(batch(["a"], [(10, 8)]))[0].detail == {"reason": "too wide"}


@pytest.mark.parametrize("prompt", ["a <|Reward|> fox", "<|image_pad|>", "x<|im_end|>"])
def test_hpsv3_refuses_special_tokens(prompt: str) -> None:
    token = prompt[prompt.index("<") : prompt.index(">") + 1]
    assert HPSv3Reward().fault(prompt, Image.new("RGB", (8, 8))) == f"the prompt holds the special token {token}"


def test_hpsv3_faults() -> None:
    reward = HPSv3Reward()
    for prompt in ("a fox", "a <b> | c {d}", "1 < 2 || 3 > 2", "<| |>"):
        assert reward.fault(prompt, Image.new("RGB", (8, 8))) is None
    assert reward.fault("a", Image.new("RGB", (400, 2))) is None
    assert reward.fault("a", Image.new("RGB", (2, 401))) == "the image of 2 x 401 pixels is longer than 200 to 1"


@pytest.mark.parametrize(
    ("reward", "module"),
    [
        (ImageRewardReward(), "ImageReward"),
        (HPSv3Reward(), "hpsv3"),
        (DeQAReward(trust_remote_code=True), "transformers 4.36.x"),
    ],
    ids=list(CLASSES),
)
def test_without_its_package(reward: ServedReward, module: str) -> None:
    """Really without: the project's environment has neither package, and transformers 5."""
    assert find_spec("ImageReward") is None and find_spec("hpsv3") is None
    with pytest.raises(ValueError, match=re.escape(reward.requirements)) as caught:
        reward(batch(["a"], [(8, 8)]))
    message = str(caught.value)
    assert module in message
    assert message.startswith(f"{type(reward).__name__} cannot import its package (")
    assert "\n" not in message
    assert (ROOT / reward.requirements).is_file()


def test_deqa_runs_no_remote_code_unless_told() -> None:
    reward = DeQAReward("someone/model")
    assert not reward.trust_remote_code
    with pytest.raises(
        ValueError, match="from the repository someone/model, which is off by default: read that code, pin"
    ) as e:
        reward.load()
    assert "trust_remote_code: true" in str(e.value)
    assert "\n" not in str(e.value)


def test_arguments() -> None:
    with pytest.raises(ValueError, match=r"checkpoint_path=x.pth, use a .safetensors file"):
        HPSv3Reward(checkpoint_path="x.pth")
    with pytest.raises(ValueError, match="HPSv3Reward has batch_size=0"):
        HPSv3Reward(batch_size=0)
    with pytest.raises(ValueError, match="DeQAReward has batch_size=0"):
        DeQAReward(batch_size=0)


def test_versions_tell_settings_apart() -> None:
    rewards = [
        ImageRewardReward(),
        ImageRewardReward("mine"),
        HPSv3Reward(),
        HPSv3Reward("a.safetensors"),
        HPSv3Reward(config_path="b.yaml"),
        DeQAReward(),
        DeQAReward(revision="0123abc"),
    ]
    assert len({reward.version for reward in rewards}) == len(rewards)
    assert installed("pip-does-not-know-this") == "pip-does-not-know-this (not installed)"
    assert re.fullmatch(r"packaging \d[\d.]*", installed("packaging"))


@pytest.mark.parametrize("name", CLASSES)
def test_config(name: str) -> None:
    """The server's file builds the wrapper, without any model."""
    path = ROOT / "configs" / "rewards" / f"{name}.yaml"
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_argument("--rewards", type=dict[str, Reward])
    parser.add_argument("--host", type=str)
    parser.add_argument("--port", type=int)
    config = parser.parse_args(["--config", str(path)])
    assert config.host == "127.0.0.1"
    (reward,) = parser.instantiate(config).rewards.values()
    assert type(reward) is CLASSES[name]
    assert list(config.rewards) == [name] == [reward.name]
    assert getattr(reward, "trust_remote_code", False) is False

    header = path.read_text().split("rewards:\n")[0]
    assert f"#   python -m rewards.serving --config configs/rewards/{name}.yaml\n" in header
    assert reward.requirements in header


def test_ports_differ() -> None:
    files = (ROOT / "configs" / "rewards").glob("*.yaml")
    ports = [yaml.safe_load(path.read_text())["port"] for path in files]
    assert len(set(ports)) == len(ports) >= 3


def requirements(name: str) -> dict[str, Requirement]:
    lines = (ROOT / "rewards/served/requirements" / f"{name}.txt").read_text().splitlines()
    parsed = [Requirement(line.split(" #")[0]) for line in lines if line and not line.startswith("#")]
    return {one.name.lower(): one for one in parsed}


@pytest.mark.parametrize("name", CLASSES)
def test_requirements(name: str) -> None:
    """They parse, name nothing twice, hold the server's packages, and no torch that would unpickle weights."""
    wanted = requirements(name)
    lines = [
        line
        for line in (ROOT / "rewards/served/requirements" / f"{name}.txt").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    assert len(wanted) == len(lines)
    assert {*SERVER, "pillow", "numpy", "torch", "transformers"} <= wanted.keys()
    assert wanted["jsonargparse"].extras == {"signatures"}
    assert not wanted["torch"].specifier.contains("2.5.1")  # torch.load's weights_only is the default from 2.6 on
    assert wanted["torch"].specifier.contains("2.13.0")


def test_pins() -> None:
    """The versions that the environments were tried with; image-reward and hpsv3 themselves ask for the first four."""
    image_reward, hpsv3, deqa = (requirements(name) for name in CLASSES)
    assert {name: str(image_reward[name].specifier) for name in ("image-reward", "timm", "fairscale")} == {
        "image-reward": "==1.5",
        "timm": "==0.6.13",
        "fairscale": "==0.4.13",
    }
    assert str(hpsv3["transformers"].specifier) == str(image_reward["transformers"].specifier) == "==4.45.2"
    assert str(deqa["transformers"].specifier) == "==4.36.1"
    # What they import without asking for it.
    assert {"clip-anytorch", "setuptools", "torchvision"} <= image_reward.keys()
    assert {"trl", "peft", "fire", "matplotlib", "pandas", "tensorboard", "rich", "torchvision"} <= hpsv3.keys()
    assert {"icecream", "einops", "sentencepiece"} <= deqa.keys()
    # hpsv3 goes in without its dependencies, by the command in the header.
    assert "hpsv3" not in hpsv3
    assert "pip install --no-deps hpsv3==1.0.0" in (ROOT / HPSv3Reward.requirements).read_text()


@pytest.mark.parametrize("name", CLASSES)
def test_imports_little(name: str) -> None:
    """The other environments have no Lightning, diffusers or transformers 5: importing a wrapper asks for none."""
    module = CLASSES[name].__module__
    code = f"import sys, {module}; print(sorted({{'lightning', 'diffusers', 'transformers'}} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"
