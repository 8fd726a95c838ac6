"""Routing by tag and weighted sums: order, parts, failures, by literal answers."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from datamodules.sample import PromptSample
from lightning_modules.step_metrics import Averages
from rewards.base import Reward, RewardBatch, Score
from rewards.format import format_reward, last_answer
from rewards.tagged import TaggedReward, WeightedSum


class Size(Reward):
    """Width or height in three units; images of size 1 cannot be scored."""

    def __init__(self, side: int, scale: float = 1.0) -> None:
        self.side = side
        self.scale = scale
        self.name = ("width", "height")[side]
        self.needs = (f"{self.name}_key",)
        self.asked: list[int] = []
        self.loaded = 0

    def load(self) -> None:
        self.loaded += 1

    def __call__(self, batch: RewardBatch) -> list[Score]:
        self.asked.append(len(batch))
        sizes = [float(image.size[self.side]) for image in batch.images]
        return [Score(s, 10 * s, self.scale * s) if s > 1 else Score.invalid(f"no {self.name}") for s in sizes]


def batch(*rows: tuple[str, int, int]) -> RewardBatch:
    """Rows of tag, width and height."""
    samples = [PromptSample(str(i), "a prompt", tag, {}) for i, (tag, _, _) in enumerate(rows)]
    return RewardBatch(samples, [Image.new("RGB", (width, height)) for _, width, height in rows])


def test_every_sample_goes_to_its_tags_scorer_and_comes_back_in_place() -> None:
    wide, tall = Size(0), Size(1)
    tagged = TaggedReward({"wide": wide, "tall": tall})
    scores = tagged(batch(("wide", 5, 2), ("tall", 5, 2), ("tall", 4, 9), ("wide", 7, 3)))
    assert [(score.native, score.table, score.rl) for score in scores] == [
        (5, 50, 5),
        (2, 20, 2),
        (9, 90, 9),
        (7, 70, 7),
    ]
    assert [list(score.parts) for score in scores] == [["width"], ["height"], ["height"], ["width"]]
    assert wide.asked == tall.asked == [2]  # one call a scorer
    tagged.load()
    assert (wide.loaded, tall.loaded) == (1, 1)


def test_scorers_of_one_name_go_by_their_tags() -> None:
    scores = TaggedReward({"a": Size(0), "b": Size(0, 2.0), "c": Size(1)})(batch(("a", 5, 2), ("b", 5, 2), ("c", 5, 2)))
    assert [list(score.parts) for score in scores] == [["a"], ["b"], ["height"]]


@given(st.lists(st.tuples(st.sampled_from(["wide", "tall"]), st.integers(2, 9), st.integers(2, 9)), max_size=12))
def test_routing_keeps_the_order(rows: list[tuple[str, int, int]]) -> None:
    scores = TaggedReward({"wide": Size(0), "tall": Size(1)})(batch(*rows))
    assert [score.native for score in scores] == [width if tag == "wide" else height for tag, width, height in rows]


def test_an_unknown_tag_names_prompt_and_tags() -> None:
    with pytest.raises(ValueError, match=r"the prompt '1' has the tag 'deep', but .* knows only tall, wide"):
        TaggedReward({"wide": Size(0), "tall": Size(1)})(batch(("wide", 5, 2), ("deep", 5, 2)))


def test_a_weighted_sum_by_hand() -> None:
    both = WeightedSum({"w": Size(0, scale=0.5), "h": Size(1)}, {"w": 2.0, "h": -1.0})
    first, second = both(batch(("", 6, 4), ("", 3, 1)))
    assert (first.native, first.rl) == (2 * 0.5 * 6 - 4, 2 * 0.5 * 6 - 4)
    assert {name: part.native for name, part in first.parts.items()} == {"w": 6, "h": 4}
    assert not second.valid and second.detail["reason"] == "h: no height" and second.parts["w"].native == 3
    assert both.needs == ("width_key", "height_key")


def test_wrong_compositions() -> None:
    with pytest.raises(ValueError, match="`weights` differs in h, x"):
        WeightedSum({"w": Size(0), "h": Size(1)}, {"w": 1.0, "x": 1.0})
    with pytest.raises(ValueError, match=r"WeightedSum.weights has minimum=nan, use a finite number"):
        WeightedSum({"w": Size(0), "minimum": Size(1)}, {"w": 1.0, "minimum": math.nan})
    for composite in (TaggedReward, WeightedSum):
        with pytest.raises(ValueError, match="rewards is empty"):
            composite({})


def test_the_log_shows_every_scorer_raw_with_its_failures() -> None:
    nested = TaggedReward({"both": WeightedSum({"w": Size(0), "h": Size(1, 0.5)}), "wide": Size(0)})
    scores = nested(batch(("both", 6, 4), ("both", 3, 1), ("wide", 8, 1), ("wide", 1, 1)))
    averages = Averages()
    for score in scores:
        for name, part in score.leaves(nested.name):
            averages.add_score(name, part)
    expected = {
        "reward/w": (6 + 3) / 2,
        "reward/w/rl": (6 + 3) / 2,
        "reward/w/invalid_share": 0.0,
        "reward/h": 4.0,
        "reward/h/rl": 2.0,
        "reward/h/invalid_share": 0.5,
        "reward/width": 8.0,
        "reward/width/rl": 8.0,
        "reward/width/invalid_share": 0.5,
    }
    assert averages.compute() == expected
    averages.add_score("solo", Score.invalid("down"))
    nothing = averages.compute()
    assert math.isnan(nothing["reward/solo"]) and nothing["reward/solo/invalid_share"] == 1.0


def test_the_last_well_formed_answer_counts() -> None:
    text = "<answer>one</answer> or <answer> two\nlines </answer> and an <answer> open one"
    assert last_answer(text) == "two\nlines" and format_reward(text) == 1.0
    assert last_answer("no tag") is None and format_reward("no tag") == 0.0
    assert last_answer("<answer></answer>") == "" and format_reward("<answer></answer>") == 0.0
