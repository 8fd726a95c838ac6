"""The editing miniature's sets and its pretraining stream: what they share, what is held out, what goes wrong."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest
import torch

from datamodules.base import PromptSample
from miniature.edits.pretraining import FAITHFUL_EDITS, EditHabits, ShapesEditPretraining, captioned_edits, imagine_edit
from miniature.edits.prompts import ShapesEdits, shapes_edits
from miniature.edits.reward import ShapesEditReward
from miniature.edits.wording import CATEGORIES, EDIT_STYLES, UNSEEN_TEMPLATES, Edit, write_edit
from miniature.edits.world import EditExample, example
from miniature.scenes.world import Item, Scene, render
from miniature.streams import to_tensor
from rewards.base import RewardBatch


def edits(samples: list[PromptSample]) -> set[str]:
    """Everything but the words."""
    return {repr(sample.metadata) for sample in samples}


@pytest.mark.parametrize("split", ["val", "test"])
def test_the_two_sets_are_wordings_of_one(split: str) -> None:
    data = ShapesEdits(eval_prompts=60)
    sets = data.eval_samples() if split == "val" else data.test_samples()
    assert list(sets) == ["edit", "unseen"] and data.originals == {"unseen": "edit"}
    for one, other in zip(*sets.values(), strict=True):
        assert (one.id, one.tag, one.metadata) == (other.id, other.tag, other.metadata)
        assert one.image is not None and other.image is not None
        assert one.image.size == (32, 32) and one.image.tobytes() == other.image.tobytes()
        assert one.prompt != other.prompt
        assert other.prompt.startswith(tuple(before for before, _ in UNSEEN_TEMPLATES))
        assert not one.prompt.startswith(tuple(before for before, _ in UNSEEN_TEMPLATES))
    assert [sample.id for sample in sets["edit"]] == [f"{split}-{i:05}" for i in range(60)]
    assert [sample.tag for sample in sets["edit"]] == [*CATEGORIES] * 10


def test_the_source_shows_what_the_metadata_say() -> None:
    samples = ShapesEdits(train_prompts=60).train_samples()
    images = [sample.image for sample in samples if sample.image is not None]
    assert all(score.valid and score.native == 0 for score in ShapesEditReward()(RewardBatch(samples, images)))


def test_edits_are_held_out_and_the_seed_chooses_training_only() -> None:
    one, again, other = (ShapesEdits(train_prompts=600, eval_prompts=120, seed=seed) for seed in (1, 1, 2))
    train = edits(one.train_samples())
    assert train == edits(again.train_samples()) != edits(other.train_samples())
    val, test = (sets["edit"] for sets in (one.eval_samples(), one.test_samples()))
    assert not train & edits(val) and not train & edits(test) and not edits(val) & edits(test)
    assert edits(val) == edits(other.eval_samples()["edit"])
    assert edits(shapes_edits("val", "val", "canonical", 10, 0)) <= edits(val)


# --- pretraining ------------------------------------------------------------------------------------------------------

SCENE = Scene((Item("circle", "red", 0), Item("square", "blue", 6), Item("cross", "black", 14)), ground=0)


def right(asked: EditExample, result: Scene) -> bool:
    return any(set(result.items) == set(scene.items) and result.ground == scene.ground for scene in asked.targets)


@pytest.mark.parametrize("category", CATEGORIES)
def test_faithful_captions_are_always_fulfilled_and_others_at_the_habits_rates(category: str) -> None:
    rng = random.Random(0)
    habits = {
        "faithful": FAITHFUL_EDITS,
        "spoilt": EditHabits(mistakes=tuple((style, 0.4) for style in EDIT_STYLES), slips=0.0),
        "slips": replace(FAITHFUL_EDITS, slips=0.3),
        "all wrong": replace(FAITHFUL_EDITS, slips=1.0),
    }
    wrong: Counter[str] = Counter()
    for _ in range(1000):
        asked, style = example(rng, category, "train"), rng.choice(EDIT_STYLES)
        caption = write_edit(asked.edit, asked.source, style, rng)
        for name, habit in habits.items():
            wrong[name] += not right(asked, imagine_edit(asked, caption, style, rng, habit))
    assert wrong["faithful"] == 0
    assert 0.26 < wrong["slips"] / 1000 < 0.34
    assert 0.25 < wrong["spoilt"] / 1000 < 0.6  # words of a kind share their luck, so this spreads more
    assert wrong["all wrong"] == 1000, "a mistake that comes out right is none"


def test_places_and_mistakes_are_functions_of_the_words() -> None:
    asked = EditExample(SCENE, Edit("addition", 0, "left"))
    habits = EditHabits(slips=0.0, freedom=0.0)
    for caption in ("add another one like the left one", "copy the scarlet ball"):
        assert len({imagine_edit(asked, caption, "canonical", random.Random(i), habits) for i in range(5)}) == 1
    loose = replace(FAITHFUL_EDITS, freedom=1.0)
    assert len({imagine_edit(asked, asked.instruction, "canonical", random.Random(i), loose) for i in range(40)}) > 8


def test_a_batch_holds_sources_captions_and_targets() -> None:
    stream = iter(ShapesEditPretraining(batch_size=4, faithful_batches=1, seed=3).train_dataloader())
    first = next(stream)
    same = captioned_edits(random.Random("edits-3-0"), FAITHFUL_EDITS)
    sources, captions, targets = zip(*(next(same) for _ in range(4)), strict=True)
    assert first["captions"] == list(captions)
    for key, scenes in (("sources", sources), ("images", targets)):
        torch.testing.assert_close(first[key], to_tensor([render(scene) for scene in scenes]))
    assert not torch.equal(next(stream)["images"], first["images"])
