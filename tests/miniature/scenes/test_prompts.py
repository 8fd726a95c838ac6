"""The miniature's prompt sets: what they share, what is held out, what the seed decides."""

from __future__ import annotations

import json

import pytest

from datamodules.base import PromptSample
from miniature.scenes.paraphrases import content_of
from miniature.scenes.prompts import ShapesPrompts, shapes_prompts
from miniature.scenes.wording import PREFIXES
from miniature.scenes.world import TAGS
from tests.miniature.scenes.test_world import shown_by


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


def test_scenes_do_not_come_again_before_all_have_come() -> None:
    """840 test prompts: all of 8, 11, 10, 26 and 45 scenes, and 140 of 627."""
    test = ShapesPrompts(eval_prompts=840).test_samples()["geneval"]
    shown = {tag: [sample for sample in test if sample.tag == tag] for tag in TAGS}
    numbers = [len({shown_by(content_of(sample.metadata)) for sample in shown[tag]}) for tag in TAGS]
    assert numbers == [8, 11, 10, 26, 45, 140] and sum(numbers) == 240
    few = shapes_prompts("test", "test", ("canonical",), 600, 0, few=True)
    assert not any(word in sample.prompt for sample in few for word in ("ring", "diamond", "bar", "arch", "cyan"))


def test_training_scenes_are_held_out() -> None:
    """Over so many prompts that every scene of a split comes up; the eight single objects are shared."""
    data = ShapesPrompts(train_prompts=6 * 627, eval_prompts=6 * 627)
    sets = (data.train_samples(), data.eval_samples()["geneval"], data.test_samples()["geneval"])
    train, val, test = ({shown_by(content_of(sample.metadata)) for sample in samples} for samples in sets)
    assert len(train & val) == len(train & test) == len(val & test) == 8
    assert (len(train), len(val), len(test)) == (727, 366, 727)


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
