"""The miniature's prompt sets: what they share, what is held out, what the seed decides."""

from __future__ import annotations

import json

import pytest

from datamodules.base import PromptSample
from miniature.scenes.prompts import ShapesPrompts, shapes_prompts
from miniature.scenes.wording import PREFIXES
from miniature.scenes.world import TAGS


def scenes(samples: list[PromptSample]) -> list[str]:
    return [json.dumps(sample.metadata, sort_keys=True) for sample in samples]


@pytest.mark.parametrize("split", ["val", "test"])
def test_the_three_sets_are_wordings_of_one(split: str) -> None:
    """Same scenes and same ids, which key the evaluation noise; tags in turn."""
    data = ShapesPrompts(eval_prompts=60)
    sets = data.eval_samples() if split == "val" else data.test_samples()
    assert list(sets) == ["geneval", "paraphrase", "unseen"]
    for samples in sets.values():
        assert [sample.id for sample in samples] == [f"{split}-{i:05}" for i in range(60)]
        assert scenes(samples) == scenes(sets["geneval"])
        assert [sample.tag for sample in samples] == [*TAGS] * 10
        assert [sample.metadata["tag"] for sample in samples] == [*TAGS] * 10
    wordings = zip(*([sample.prompt for sample in samples] for samples in sets.values()), strict=True)
    assert all(len(set(three)) == 3 for three in wordings)


def test_styles_of_the_sets() -> None:
    def starts(sample: PromptSample, *styles: str) -> bool:
        return sample.prompt.startswith(tuple(prefix for style in styles for prefix in PREFIXES[style]))  # type: ignore[index]

    sets = ShapesPrompts(eval_prompts=48).eval_samples()
    assert all(starts(sample, "canonical") for sample in sets["geneval"])
    assert all(starts(sample, "unseen") for sample in sets["unseen"])
    for i, sample in enumerate(sets["paraphrase"]):  # six tags gallery, six tags terse, ...
        assert starts(sample, "terse" if i // 6 % 2 else "gallery")
    assert all(starts(sample, "canonical") for sample in ShapesPrompts(train_prompts=48).train_samples())


@pytest.mark.slow
def test_training_scenes_are_held_out() -> None:
    """Over so many prompts that every content of a split comes up; the four single objects are shared."""
    data = ShapesPrompts(train_prompts=18000, eval_prompts=6000)
    train = set(scenes(data.train_samples()))
    val, test = (set(scenes(samples["geneval"])) for samples in (data.eval_samples(), data.test_samples()))
    single = {scene for scene in train if json.loads(scene)["tag"] == "single_object"}
    assert len(single) == 4
    assert train & val == train & test == val & test == single
    # 4 + 60 % of 12, 12, 24, 48 and 360; 4 + 20 % of them; 4 + the rest
    assert (len(train), len(val), len(test)) == (277, 96, 95)


def test_seed_chooses_training_prompts_and_nothing_else() -> None:
    one, again, other = (ShapesPrompts(train_prompts=30, eval_prompts=12, seed=seed) for seed in (1, 1, 2))
    assert one.train_samples() == again.train_samples()
    assert one.train_samples() != other.train_samples()
    assert one.eval_samples() == other.eval_samples() and one.test_samples() == other.test_samples()


def test_more_prompts_begin_with_the_same_ones() -> None:
    few, many = (shapes_prompts("val", "val", ("gallery", "terse"), num, 0) for num in (10, 40))
    assert many[:10] == few


@pytest.mark.parametrize("settings", [{"train_prompts": 0}, {"eval_prompts": -1}])
def test_numbers_of_prompts_are_checked(settings: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"data has (train|eval)_prompts=.*, use at least 1"):
        ShapesPrompts(**settings)
