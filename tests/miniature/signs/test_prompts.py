"""The prompt sets of the miniature's other rewards: what they share, what is held out, where their tags lead."""

from __future__ import annotations

from typing import Any

import pytest

from datamodules.base import PromptSample
from datamodules.geneval_names import validate_metadata
from miniature.scenes.prompts import shapes_prompts
from miniature.scenes.wording import PREFIXES
from miniature.scenes.world import TAGS
from miniature.signs.pretraining import WordsPretraining
from miniature.signs.prompts import MultiRewardPrompts, PreferencePrompts, WordsPrompts, word_prompts
from miniature.signs.world import WORD_PREFIXES, read_caption, split_of


def texts(samples: list[PromptSample]) -> list[str]:
    return [sample.metadata["text"][0] for sample in samples]


@pytest.mark.parametrize("split", ["val", "test"])
def test_words_in_two_wordings(split: str) -> None:
    """Same words and same ids, which key the evaluation noise; two, three and four letters in turn."""
    data = WordsPrompts(eval_prompts=60)
    sets = data.eval_samples() if split == "val" else data.test_samples()
    assert list(sets) == ["ocr", "unseen"] and data.originals == {"unseen": "ocr"}
    for samples in sets.values():
        assert [sample.id for sample in samples] == [f"{split}-{i:05}" for i in range(60)]
        assert texts(samples) == texts(sets["ocr"]) == [read_caption(sample.prompt) for sample in samples]
        assert [len(text) for text in texts(samples)] == [2, 3, 4] * 20
        assert {split_of(text) for text in texts(samples)} == {split}
        assert {sample.tag for sample in samples} == {"ocr"}
    assert all(sample.prompt.startswith("a sign that says") for sample in sets["ocr"])
    assert all(sample.prompt.startswith(WORD_PREFIXES["unseen"]) for sample in sets["unseen"])


def test_training_words_are_held_out() -> None:
    train = WordsPrompts(train_prompts=600).train_samples()
    assert {split_of(text) for text in texts(train)} == {"train"} and len({sample.id for sample in train}) == 600
    assert all(sample.prompt.startswith("a sign that says") for sample in train)
    assert train == WordsPrompts(train_prompts=600).train_samples()
    assert texts(train) != texts(WordsPrompts(train_prompts=600, seed=1).train_samples())


def test_preference_prompts_are_scenes_of_few_shapes_and_colours() -> None:
    """GenEval's prompts and metadata, but for what the models have not seen; only the tag names the reward."""
    data = PreferencePrompts(eval_prompts=24)
    for split, sets in (("val", data.eval_samples()), ("test", data.test_samples())):
        assert list(sets) == ["preference", "unseen"]
        for name, style in (("preference", "canonical"), ("unseen", "unseen")):
            theirs = shapes_prompts(split, split, (style,), 24, 0, few=True)  # type: ignore[arg-type]
            assert [(s.id, s.prompt, s.metadata) for s in sets[name]] == [(s.id, s.prompt, s.metadata) for s in theirs]
            assert {sample.tag for sample in sets[name]} == {"preference"}


def test_three_kinds_by_tags() -> None:
    data = MultiRewardPrompts(train_prompts=100, eval_prompts=12)
    train = data.train_samples()
    assert [sample.tag for sample in train] == (["geneval", "ocr", "preference"] * 34)[:100]
    assert len({sample.id for sample in train}) == 100
    for split, sets in (("val", data.eval_samples()), ("test", data.test_samples())):
        assert list(sets) == ["geneval", "ocr", "preference"]
        for name, samples in sets.items():
            assert [sample.tag for sample in samples] == [name] * 12
            assert samples[0].id == f"{split}-{name}-00000"
        assert sets["ocr"] == word_prompts(f"{split}-ocr", split, "canonical", 12, 0)  # type: ignore[arg-type]
        for scenes in (sets["geneval"], sets["preference"]):
            assert [sample.metadata["tag"] for sample in scenes] == [*TAGS] * 2
            for sample in scenes:
                validate_metadata(sample.metadata)
        assert [s.prompt for s in sets["geneval"]] != [s.prompt for s in sets["preference"]]
    scenes = [sample for sample in train if sample.tag != "ocr"]
    assert all(sample.prompt.startswith(PREFIXES["canonical"]) for sample in scenes)


@pytest.mark.parametrize("what", ["images", "captions", "rewrites"])
def test_streams_mix_scenes_and_signs(what: Any) -> None:
    """A quarter of 16 are scenes; the order depends on the seed alone."""
    batches = [next(iter(WordsPretraining(what, 16, 0.25, seed=seed).train_dataloader())) for seed in (1, 1, 2)]
    assert all(len(value) == 16 for value in batches[0].values())
    if "images" in batches[0]:
        assert batches[0]["images"].equal(batches[1]["images"])
        assert not batches[0]["images"].equal(batches[2]["images"])
    for key in {"captions", "prompts"} & batches[0].keys():
        assert [read_caption(text) is not None for text in batches[0][key]] == [False] * 4 + [True] * 12
        assert batches[0][key] == batches[1][key] != batches[2][key]


def test_streams_need_a_share() -> None:
    with pytest.raises(ValueError, match=r"scene_share=1\.5, use 0 to 1"):
        WordsPretraining("captions", scene_share=1.5)
