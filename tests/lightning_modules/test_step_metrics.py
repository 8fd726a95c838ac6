"""Metrics of a training step, by hand."""

from __future__ import annotations

import math

import pytest
import torch
from PIL import Image

from datamodules.chunks import chunks
from lightning_modules.rollout import Completions
from lightning_modules.seeding import seed_of
from lightning_modules.step_metrics import Averages, group_similarity, refine_stats


def test_averages() -> None:
    averages = Averages()
    averages.add_all("flow", {"kl": torch.tensor(1.0), "max_log_ratio": torch.tensor(-3.0)}, weight=1)
    averages.add_all("flow", {"kl": torch.tensor(5.0), "max_log_ratio": torch.tensor(-2.0)}, weight=3)
    averages.add("flow/max_log_ratio", torch.tensor(-7.0))
    averages.add("loss", torch.tensor(2.0))
    averages.add("nothing", float("nan"), weight=0)
    for value, weight in ((1.0, 1), (math.nan, 0), (2.0, 1)):  # a scorer's own name, and a score that failed
        averages.add("reward/max_objects", value, weight)
    found = averages.compute()
    assert found.pop("reward/max_objects") == 1.5
    assert math.isnan(found.pop("nothing"))
    assert found == {"flow/kl": 4.0, "flow/max_log_ratio": -2.0, "loss": 2.0}  # (1 * 1 + 3 * 5) / 4


def test_refine_stats() -> None:
    """Two groups of three. 4 of 6 formatted; 2, 1, 3, 3, 3, 3 tokens; 2 + 3 distinct; 2 + 1 copies."""
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1], [1, 1, 1], [1, 1, 1], [1, 1, 1]], dtype=torch.bool)
    rewrites = ["a cat", "a cat", "red cat", "a dog", "blue dog", "a cat"]
    completions = Completions(
        prompt_ids=torch.zeros(6, 2),
        prompt_mask=torch.ones(6, 2),
        tokens=torch.zeros(6, 3),
        mask=mask,
        log_probs=torch.zeros(6, 3),
        texts=rewrites,
        rewrites=rewrites,
        formatted=torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0, 0.0]),
        truncated=torch.tensor([False, False, False, False, False, True]),
    )
    expected = {"format": 4 / 6, "length": 15 / 6, "truncated": 1 / 6, "distinct": 5 / 6, "copies": 3 / 6}
    assert refine_stats(completions, ["a cat", "a dog"]) == pytest.approx(expected)


def ramp(*, upward: bool = True, across: bool = False) -> Image.Image:
    """Rows from 0 to 248, or columns; upside down when not upward."""
    values = torch.arange(32, dtype=torch.uint8)[:, None].expand(32, 32) * 8
    values = values.T if across else values
    values = values if upward else 248 - values
    return Image.fromarray(values[..., None].expand(32, 32, 3).contiguous().numpy())


def test_group_similarity() -> None:
    same, opposite, orthogonal = ramp(), ramp(upward=False), ramp(across=True)
    assert group_similarity([same] * 4, 1) == pytest.approx(1, abs=1e-5)
    assert group_similarity([same, opposite], 1) == pytest.approx(-1, abs=1e-5)
    assert group_similarity([same, orthogonal], 1) == pytest.approx(0, abs=1e-5)
    assert group_similarity([same, same, opposite], 1) == pytest.approx(-1 / 3, abs=1e-5)  # pairs: 1, -1, -1
    assert group_similarity([same, same, opposite, same], 2) == pytest.approx(0, abs=1e-5)  # groups: 1, -1
    assert group_similarity([same.resize((64, 64)), same], 1) == pytest.approx(1, abs=0.01)


def test_group_similarity_of_blank_images_is_zero() -> None:
    """A blank image has no direction: its cosine with any image, another blank one included, counts as 0."""
    black, white = (Image.new("RGB", (32, 32), color) for color in ("black", "white"))
    assert group_similarity([black, black, white, white], 1) == 0
    assert group_similarity([black, ramp(), ramp()], 1) == pytest.approx(1 / 3, abs=1e-5)


def test_chunks() -> None:
    assert list(chunks(7, 3)) == [slice(0, 3), slice(3, 6), slice(6, 7)]
    assert list(chunks(7, None)) == [slice(0, 7)]


def test_seeds_are_a_fixed_function_of_their_key() -> None:
    """The literal keeps evaluation noise, and so published numbers, the same for ever."""
    assert seed_of("evaluation", "val-00000") == 3462849652424572039
    keys = [("rollout", 42, 0, "val-1", 1), ("rollout", 42, 0, "val-11", 1), ("rollout", 42, 0, "val-1", 11)]
    keys += [("rollout", 42, 1, "val-1", 1), ("rollout", 42, 0, "val-1", "1")]
    assert len({seed_of(*key) for key in keys}) == 5
    assert all(0 <= seed_of(i) < 2**63 for i in range(1000))
