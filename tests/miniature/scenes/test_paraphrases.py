"""The miniature's styles as paraphrases, and the check that reads them back."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from datamodules.base import PromptSample
from datamodules.paraphrases.rules import RuleParaphrases
from miniature.scenes.paraphrases import ShapesContent, StyleParaphrases, content_of, read_wording
from miniature.scenes.prompts import shapes_prompts
from miniature.scenes.wording import PREFIXES, STYLES, Style, write
from miniature.scenes.world import COLORS, OPPOSITES, SHAPES, TAGS, Ask, Content, all_contents, elaborate

ALL = tuple(content for tag in TAGS for content in all_contents(tag))
CHECK = ShapesContent()


def sample(content: Content) -> PromptSample:
    return PromptSample("0", "a photo", content.tag, content.metadata)


def worded(content: Content, style: Style, rng: random.Random) -> str:
    return write(elaborate(content, rng) if style == "detailed" else content, style, rng, mix=0.3)


def changes(content: Content) -> list[Content]:
    """Contents in which one asked-for thing is another."""
    changed: list[Content] = []
    for i, ask in enumerate(content.asks):
        used = {other.shape for other in content.asks}
        others = [replace(ask, shape=shape) for shape in SHAPES if shape not in used]
        others += [replace(ask, count=count) for count in (1, 2, 3, 4) if count != ask.count]
        others += [replace(ask, color=color) for color in COLORS if ask.color not in (None, color)]
        changed += [replace(content, asks=(*content.asks[:i], other, *content.asks[i + 1 :])) for other in others]
    if content.relation is not None:
        changed += [replace(content, relation=relation) for relation in OPPOSITES if relation != content.relation]
        changed.append(replace(content, asks=content.asks[::-1]))
    if content.tag == "color_attr":
        a, b = content.asks
        changed.append(replace(content, asks=(replace(a, color=b.color), replace(b, color=a.color))))
    if len(content.asks) == 2 and content.relation is None:
        changed += [replace(content, asks=content.asks[:1]), replace(content, asks=content.asks[1:])]
    return changed


def test_metadata_gives_the_content_back() -> None:
    assert len(ALL) == 3512
    for content in ALL:
        assert content_of(content.metadata) == content


def test_every_content_in_every_style_passes() -> None:
    rng = random.Random(0)
    for content in ALL:
        for style in STYLES:
            wording = worded(content, style, rng)
            assert CHECK.lost(sample(content), wording) is None, wording


@given(st.sampled_from(ALL), st.sampled_from(STYLES), st.integers(0, 10**6))
def test_a_changed_content_does_not_pass(content: Content, style: Style, seed: int) -> None:
    rng = random.Random(seed)
    for other in changes(content):
        wording = worded(other, style, rng)
        assert CHECK.lost(sample(content), wording) is not None, wording


def one(tag: str, *asks: Ask, relation: str | None = None) -> PromptSample:
    return sample(Content(tag, asks, relation))


@pytest.mark.parametrize(
    ("sample", "wording", "lost"),
    [
        (one("counting", Ask("circle", count=2)), "Discs: a pair of DISCS!", "no circle"),
        (one("counting", Ask("circle", count=2)), "2 balls", None),
        (one("counting", Ask("circle", count=2)), "balls", "2 circle"),
        (one("counting", Ask("circle", count=2)), "a photo of circles", "2 circle"),
        (one("colors", Ask("cross", "black")), "imagine having one ebony star", None),
        (one("colors", Ask("cross", "black")), "one star and ebony", "black cross"),
        (one("two_object", Ask("cross"), Ask("square")), "a box next to a star", None),
        (one("two_object", Ask("cross"), Ask("square")), "a box", "cross"),
        (one("two_object", Ask("cross"), Ask("square")), "a box, a star, a wedge", "no triangle"),
        (one("position", Ask("cross"), Ask("square"), relation="above"), "1 block south of 1 star", None),
        (one("position", Ask("cross"), Ask("square"), relation="above"), "1 block north of 1 star", "above"),
        (one("position", Ask("cross"), Ask("square"), relation="above"), "over a box, a plus", None),
        (one("position", Ask("cross"), Ask("square"), relation="above"), "a plus and a box", "above"),
    ],
)
def test_literal_wordings(sample: PromptSample, wording: str, lost: str | None) -> None:
    assert CHECK.lost(sample, wording) == lost


def test_reads_what_is_said() -> None:
    text = "clean composition of two red crosses at upper left with a blue square at lower right"
    assert read_wording(text) == ([Ask("cross", "red", 2), Ask("square", "blue", 1)], None)


def test_styles_are_paraphrases_by_prompt() -> None:
    samples = shapes_prompts("test", "test", ("canonical",), 60, 0)
    styles = StyleParaphrases()
    assert styles.kinds == ("gallery", "terse", "detailed", "unseen")
    found = styles.write("geneval", samples)
    for kind, wordings in found.items():
        for original, wording in zip(samples, wordings, strict=True):
            assert wording is not None and CHECK.lost(original, wording) is None
            assert any(wording.startswith(prefix) for prefix in PREFIXES[kind])  # type: ignore[index]
    assert styles.write("other", samples[9:3:-1]) == {kind: wordings[9:3:-1] for kind, wordings in found.items()}
    assert StyleParaphrases(seed=1).write("geneval", samples)["gallery"] != found["gallery"]
    assert StyleParaphrases(["canonical"]).write("geneval", samples) == {"canonical": [None] * 60}


def test_rules_keep_the_miniatures_content_too() -> None:
    samples = shapes_prompts("test", "val", ("canonical",), 300, 0)
    for kind, wordings in RuleParaphrases().write("geneval", samples).items():
        assert sum(wording is not None for wording in wordings) == (150 if kind == "order" else 300)
        for original, wording in zip(samples, wordings, strict=True):
            assert wording is None or CHECK.lost(original, wording) is None, wording


def test_other_worlds_are_refused() -> None:
    bench = PromptSample("0", "a bench", "single_object", {"tag": "single_object", "include": [{"class": "bench"}]})
    with pytest.raises(ValueError, match="no prompt of the miniature world: use RuleParaphrases and PromptContent"):
        StyleParaphrases().write("geneval", [bench])
    with pytest.raises(ValueError, match=r"StyleParaphrases\.styles is \['baroque'\]: use some of canonical"):
        StyleParaphrases(["baroque"])
