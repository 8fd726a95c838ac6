"""Wordings by rule: literal ones, and that they keep the content of every prompt that GenEval could ask."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from datamodules.base import PromptSample
from datamodules.geneval import read_prompts
from datamodules.geneval_names import RELATIONS
from datamodules.ocr import read_prompts as read_ocr
from datamodules.paraphrases.content import PromptContent
from datamodules.paraphrases.rules import RuleParaphrases
from datamodules.paraphrases.words import CLASSES, COLORS

KINDS = ("template", "synonyms", "order", "case", "typos", "short", "long")
REQUESTS = ("what I want: {}", "this is the request: {}", "I would like the following: {}", "{}, please")
NUMBERS = ("one", "two", "three", "four")


def sample(prompt: str, metadata: dict[str, Any] | None = None, name: str = "0") -> PromptSample:
    return PromptSample(name, prompt, "tag", metadata or {})


def article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def geneval(tag: str, names: tuple[str, str], colors: tuple[str, str], count: int, relation: str) -> PromptSample:
    """A record as GenEval's script words it, bad plurals included."""
    (a, b), (c, d) = names, colors
    first: dict[str, Any] = {"class": a, "count": 1}
    second: dict[str, Any] = {"class": b, "count": 1}
    if tag == "single_object":
        include, text = [first], article(a)
    elif tag == "two_object":
        include, text = [first, second], f"{article(a)} and {article(b)}"
    elif tag == "counting":
        include, text = [first | {"count": count}], f"{NUMBERS[count - 1]} {a + ('es' if a[-1] == 's' else 's')}"
    elif tag == "colors":
        include, text = [first | {"color": c}], article(f"{c} {a}")
    elif tag == "position":
        include, text = [second, first | {"position": [relation, 0]}], f"{article(a)} {relation} {article(b)}"
    else:
        include = [first | {"color": c}, second | {"color": d}]
        text = f"{article(f'{c} {a}')} and {article(f'{d} {b}')}"
    return sample(f"a photo of {text}", {"tag": tag, "include": include})


def check(one: PromptSample, seed: int) -> None:
    content = PromptContent()
    assert content.lost(one, one.prompt) is None, one.prompt
    for kind, (wording,) in RuleParaphrases(seed=seed).write("geneval", [one]).items():
        if wording is None:
            assert kind == "order" and one.metadata["tag"] in ("single_object", "counting", "colors")
        else:
            assert wording != one.prompt
            assert content.lost(one, wording) is None, (kind, wording)


@pytest.mark.slow
def test_every_class_alone_counted_and_colored() -> None:
    for seed, name in enumerate(CLASSES):
        pair = (name, "cat")
        check(geneval("single_object", pair, ("red", "blue"), 1, "above"), seed)
        for count in (2, 3, 4):
            check(geneval("counting", pair, ("red", "blue"), count, "above"), seed)
        for color in COLORS:
            check(geneval("colors", pair, (color, "blue"), 1, "above"), seed)


@given(
    st.sampled_from(("two_object", "position", "color_attr")),
    st.lists(st.sampled_from(CLASSES), min_size=2, max_size=2, unique=True),
    st.lists(st.sampled_from(COLORS), min_size=2, max_size=2, unique=True),
    st.sampled_from(RELATIONS),
    st.integers(0, 50),
)
def test_any_two_objects(tag: str, names: list[str], colors: list[str], relation: str, seed: int) -> None:
    check(geneval(tag, (names[0], names[1]), (colors[0], colors[1]), 1, relation), seed)


@pytest.mark.parametrize("tag", ["two_object", "counting", "colors", "position", "color_attr"])
def test_the_check_tells_other_contents_apart(tag: str) -> None:
    """Over many pairs: the wording of another record, in which one thing is changed, loses something."""
    content = PromptContent()
    for a, b in product(CLASSES[::7], CLASSES[3::11]):
        if a == b:
            continue
        one = geneval(tag, (a, b), ("red", "blue"), 3, "left of")
        if tag == "two_object":
            others = [geneval("single_object", (a, b), ("red", "blue"), 1, "above")]
        elif tag == "counting":
            others = [geneval(tag, (a, b), ("red", "blue"), n, "above") for n in (2, 4)]
        elif tag == "position":
            others = [geneval(tag, (a, b), ("red", "blue"), 1, relation) for relation in ("above", "below")]
        else:
            others = [geneval(tag, (a, b), ("blue", "red"), 1, "above")]
        for other in others:
            for wording in (w for w, *_ in RuleParaphrases().write("geneval", [other]).values() if w is not None):
                assert content.lost(one, wording) is not None, wording


LEFT = {"include": [{"class": "chair", "count": 1}, {"class": "dog", "count": 1, "position": ["left of", 0]}]}
TWO = {"include": [{"class": "cow", "count": 1, "color": "red"}, {"class": "tv", "count": 1}]}


@pytest.mark.parametrize(
    ("kind", "prompt", "metadata", "expected"),
    [
        ("short", "a photo of a dog left of a chair", LEFT, {"dog left of chair"}),
        ("short", 'The sign says "A Day". The end of vitamin A', {}, {'sign says "A Day". end of vitamin A'}),
        ("short", "four red birds", {}, {None}),
        ("order", "a photo of a dog left of a chair", LEFT, {"a photo of a chair right of a dog"}),
        ("order", "A dog to the left of the chair", LEFT, {"The chair to the right of a dog"}),
        ("order", "a photo of a red cow and a tv", TWO, {"a photo of a tv and a red cow"}),
        ("order", "A fox, warm light.", {}, {"Warm light, a fox."}),
        ("order", "a, b, c", {}, {"b, c, a", "c, a, b"}),
        ("order", "remove the car, then paint it", {}, {None}),
        ("order", 'a sign "one, two"', {}, {None}),
        ("case", 'Sign "nO" here', {}, {'SIGN "nO" HERE', 'sign "nO" here', 'Sign "nO" Here'}),
        ("case", "it's a cow", {}, {"IT'S A COW", "It's A Cow"}),
        ("synonyms", "A car and an airplane", {}, {"An automobile and a plane", "An automobile and an aeroplane"}),
        ("synonyms", "a tv remote", {}, {"a television remote", "a tv remote control"}),
        ("synonyms", "a hot dog", {}, {None}),
        ("synonyms", "Two big couches", {}, {"Two large sofas"}),
        ("synonyms", 'the big word "big"', {}, {'the large word "big"'}),
        ("synonyms", "a dog left of a chair", LEFT, {"a dog to the left of a chair"}),
        ("case", "it’s a cow", {}, {"IT’S A COW", "It’s A Cow"}),
        ("template", "把汽车改成蓝色", {}, {None}),
        ("long", '写上 "Open"', {}, {None}),
        ("template", "A {curly} cow", {"text": [" "]}, {text.format("a {curly} cow") for text in REQUESTS}),
        ("typos", "a cat on four red sofas", {}, {None}),  # nothing but content and short words
    ],
)  # fmt: skip
def test_literal_wordings(kind: str, prompt: str, metadata: dict[str, Any], expected: set[str | None]) -> None:
    found = {RuleParaphrases([kind], seed=seed).write("x", [sample(prompt, metadata)])[kind][0] for seed in range(40)}
    expected.discard(prompt)
    assert found == expected


def test_typos_are_small_and_spare_the_content() -> None:
    prompt = 'photograph of three purple backpacks standing right beside "standing" curtains'
    record = {"include": [{"class": "backpack", "count": 3, "color": "purple"}, {"class": "curtain", "count": 1}]}
    slips = set()
    for seed in range(200):
        wording = RuleParaphrases(["typos"], seed).write("x", [sample(prompt, record)])["typos"][0]
        assert wording is not None
        changed = [(a, b) for a, b in zip(prompt.split(), wording.split(), strict=True) if a != b]
        assert 1 <= len(changed) <= 2
        for old, new in changed:
            assert old in ("photograph", "standing", "beside") and new[0] == old[0] and abs(len(new) - len(old)) <= 1
            letters = sum(abs(old.count(letter) - new.count(letter)) for letter in set(old + new))
            assert letters <= 1  # none is exchanged for another
            slips.add(new)
        assert '"standing"' in wording
    assert len(slips) > 30


def test_quoted_text_is_never_touched() -> None:
    samples = read_ocr("datamodules/samples/ocr.txt")
    text = "Big Photo Shop"
    samples.append(PromptSample("single", f"a card that says '{text}' and a car", "ocr", {"text": [text]}))
    for seed in range(5):
        for kind, wordings in RuleParaphrases(seed=seed).write("ocr", samples).items():
            for one, wording in zip(samples, wordings, strict=True):
                if wording is not None:
                    assert all(text in wording for text in one.metadata["text"]), kind


def test_depends_on_the_prompt_alone() -> None:
    samples = read_prompts("datamodules/samples/geneval.jsonl")
    rules = RuleParaphrases()
    everything = rules.write("geneval", samples)
    assert rules.kinds == KINDS and list(everything) == list(KINDS)
    some = rules.write("other", samples[5:2:-1])
    assert some == {kind: wordings[5:2:-1] for kind, wordings in everything.items()}
    assert RuleParaphrases(["long"]).write("geneval", samples) == {"long": everything["long"]}
    assert RuleParaphrases(["long"], seed=1).write("geneval", samples)["long"] != everything["long"]


def test_unknown_kinds_are_refused() -> None:
    with pytest.raises(ValueError, match=r"RuleParaphrases\.kinds is \['typo'\]: use some of template, synonyms"):
        RuleParaphrases(["typo"])
    with pytest.raises(ValueError, match="name one twice"):
        RuleParaphrases(["case", "case"])
