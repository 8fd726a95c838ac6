"""PickScore against CLIPModel's own logits, with weights and processor in two folders as published."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from datamodules.sample import PromptSample
from rewards.base import RewardBatch
from rewards.pickscore import PickScoreReward
from tests.rewards.tiny_clip import batch, noise, reference_logits, save_model, save_processor


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Weights, and the processor beside a CLIP with other weights, which must not be the ones used."""
    model, processor = tmp_path_factory.mktemp("pickscore"), tmp_path_factory.mktemp("laion")
    save_model(model, logit_scale=100.0, seed=1)
    save_model(processor, seed=2)
    save_processor(processor)
    return str(model), str(processor)


def test_scores_are_logits(folders: tuple[str, str], tmp_path: Path) -> None:
    """One prompt of a group repeats; sizes differ; the reference takes one pair at a time."""
    prompts = ["a cat", "a cat", "a blue dog running", "a cat", "x " * 100]
    images = [noise(28, 28, 0), noise(56, 28, 1), noise(28, 28, 2), noise(28, 84, 3), noise(64, 64, 4)]
    reference = reference_logits(save_model(tmp_path, logit_scale=100.0, seed=1), prompts, images)
    scores = PickScoreReward(*folders, batch_size=2)(batch(prompts, images))
    np.testing.assert_allclose([s.native for s in scores], reference, atol=5e-5)
    np.testing.assert_allclose([s.detail["cosine"] for s in scores], np.array(reference) / 100, atol=1e-6)
    assert max(reference) - min(reference) > 1


def test_worth_by_hand(folders: tuple[str, str]) -> None:
    score = PickScoreReward(*folders).score_of(0.2405)
    assert score.native == score.table == pytest.approx(24.05)
    assert score.rl == pytest.approx(0.925)  # 24.05 / 26


def test_only_the_original_prompt_counts(folders: tuple[str, str]) -> None:
    image = noise(28, 28, 0)
    samples = [PromptSample("0", "a cat", "x", {"rewrite": "a dog"}), PromptSample("1", "a cat", "y", {})]
    first, second = PickScoreReward(*folders)(RewardBatch(samples, [image, image]))
    assert first.native == pytest.approx(second.native, abs=1e-6)


def test_defaults_are_the_published_ones() -> None:
    assert PickScoreReward().version == (
        "pickscore by yuvalkirstain/PickScore_v1 processor=laion/CLIP-ViT-H-14-laion2B-s32B-b79K float32"
    )
