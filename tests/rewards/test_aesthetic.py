"""The aesthetic predictor: its head by hand and against matrix products, its file by its published names."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from rewards.aesthetic import AestheticReward
from rewards.clip import ClipEncoder
from tests.rewards.tiny_clip import batch, noise, save_model, save_processor

WIDTHS = {0: (1024, 24), 2: (128, 1024), 4: (64, 128), 6: (16, 64), 7: (1, 16)}


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("clip")
    save_model(folder)
    save_processor(folder)
    return str(folder)


@pytest.fixture(scope="module")
def head() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    tensors: dict[str, Tensor] = {}
    for index, (rows, columns) in WIDTHS.items():
        tensors[f"layers.{index}.weight"] = torch.randn(rows, columns, generator=generator) / columns**0.5
        tensors[f"layers.{index}.bias"] = torch.randn(rows, generator=generator) / 4
    return tensors


def test_a_chain_of_matrices(clip: str, head: dict[str, Tensor], tmp_path: Path) -> None:
    """In numpy and double precision; both kinds of file; intermediate values of both signs pass."""
    torch.save(head, tmp_path / "head.pth")
    save_file(head, tmp_path / "head.safetensors")
    images = [noise(28, 28, seed) for seed in range(5)]
    values = ClipEncoder(clip).images(images).double().numpy()
    for index in WIDTHS:
        values = values @ head[f"layers.{index}.weight"].double().numpy().T + head[f"layers.{index}.bias"].numpy()
    assert np.ptp(values) > 0.1
    for file in ("head.pth", "head.safetensors"):
        scores = AestheticReward(str(tmp_path / file), clip, batch_size=2)(batch(["a"] * 5, images))
        for unit in ("native", "table", "rl"):
            np.testing.assert_allclose([getattr(score, unit) for score in scores], values[:, 0], atol=1e-5)


def test_by_hand(clip: str, head: dict[str, Tensor], tmp_path: Path) -> None:
    """Only -1s pass from the first bias to the end: no activation may hold them back, no dropout drop them."""
    chain = {name: torch.zeros_like(tensor) for name, tensor in head.items()}
    chain["layers.0.bias"][0] = -3.0
    for index in (2, 4, 6, 7):
        chain[f"layers.{index}.weight"][0, 0] = -1.0
    chain["layers.7.bias"][0] = 5.5
    torch.save(chain, tmp_path / "head.pth")
    (score,) = AestheticReward(str(tmp_path / "head.pth"), clip)(batch(["a"], [noise(28, 28, 0)]))
    assert (score.native, score.table, score.rl) == (2.5, 2.5, 2.5)  # -3 * (-1)^4 + 5.5


def test_prompts_play_no_part(clip: str, head: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save(head, tmp_path / "head.pth")
    reward = AestheticReward(str(tmp_path / "head.pth"), clip)
    one, two = (reward(batch([prompt], [noise(28, 28, 0)]))[0] for prompt in ("a cat", "blue"))
    assert one.native == two.native


def test_an_image_of_no_size_is_invalid(clip: str, head: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save(head, tmp_path / "head.pth")
    scores = AestheticReward(str(tmp_path / "head.pth"), clip)(
        batch(["a", "a"], [Image.new("RGB", (0, 0)), noise(28, 28, 0)])
    )
    assert [score.valid for score in scores] == [False, True]


def test_a_missing_file_is_noticed_before_clip_loads(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"download sac\+logos\+ava1-l14-linearMSE.pth from the repository chris"):
        AestheticReward(str(tmp_path / "none.pth"), "no/model").load()


def test_files_that_are_no_head(clip: str, head: dict[str, Tensor], tmp_path: Path) -> None:
    damaged = "is damaged or holds more than weights"
    (tmp_path / "page.pth").write_text("<html>")
    (tmp_path / "page.safetensors").write_text("<html>")
    (tmp_path / "empty.pth").touch()
    torch.save({"state_dict": head, "args": argparse.Namespace()}, tmp_path / "code.pth")
    for file in ("page.pth", "page.safetensors", "empty.pth", "code.pth"):
        with pytest.raises(ValueError, match=damaged):
            AestheticReward(str(tmp_path / file), clip).load()


@pytest.mark.parametrize("fault", ["wider", "left over", "missing"])
def test_heads_of_another_model(clip: str, head: dict[str, Tensor], tmp_path: Path, fault: str) -> None:
    other = dict(head)
    if fault == "wider":
        other["layers.0.weight"] = torch.zeros(1024, 768)
    elif fault == "left over":
        other["layers.1.weight"] = torch.zeros(1)
    else:
        del other["layers.7.bias"]
    torch.save(other, tmp_path / "head.pth")
    with pytest.raises(ValueError, match=r"does not hold the aesthetic head for .* \(24 inputs\)"):
        AestheticReward(str(tmp_path / "head.pth"), clip).load()
