"""The miniature world: what prompts ask for, how they are worded, drawn, and read back by the detector."""

from __future__ import annotations

import random
from itertools import combinations, product

import numpy as np
import pytest
from PIL import Image

from datamodules.geneval_names import validate_metadata
from miniature.architectures import TEXT_LENGTH
from miniature.scenes.detector import ShapesDetector
from miniature.scenes.interpretation import FAITHFUL, Habits, heeded, imagine
from miniature.scenes.pretraining import rewrite_pair
from miniature.scenes.wording import JOIN, PREFIXES, STYLES, Style, vocabulary, write
from miniature.scenes.world import (
    CELL,
    COLORS,
    GRID,
    SHAPES,
    TAGS,
    Ask,
    Content,
    Item,
    Scene,
    all_contents,
    contents,
    elaborate,
    random_scene,
    render,
    stencil,
)
from rewards.geneval.rules import judge


def make_image(scene: Scene) -> Image.Image:
    return Image.fromarray(render(scene))


def some_wordings(tag: str, num: int, seed: int) -> list[tuple[Content, Content, str]]:
    """(content, content as worded, caption) for contents of one tag over all styles."""
    rng = random.Random(seed)
    drawn = []
    for i in range(num):
        content = rng.choice(all_contents(tag))
        style = STYLES[i % len(STYLES)]
        worded = elaborate(content, rng) if style == "detailed" else content
        drawn.append((content, worded, write(worded, style, rng, mix=0.3)))
    return drawn


def excluded(**counts: int) -> list[dict[str, object]]:
    return [{"class": shape, "count": counts.get(shape, 1)} for shape in SHAPES]


@pytest.mark.parametrize(
    ("content", "include", "exclude"),
    [
        (Content("single_object", (Ask("cross"),)), [{"class": "cross", "count": 1}], excluded(cross=2)),
        (
            Content("two_object", (Ask("square"), Ask("circle"))),
            [{"class": "square", "count": 1}, {"class": "circle", "count": 1}],
            excluded(circle=2, square=2),
        ),
        (Content("counting", (Ask("triangle", count=3),)), [{"class": "triangle", "count": 3}], excluded(triangle=4)),
        (
            Content("colors", (Ask("circle", "purple"),)),
            [{"class": "circle", "count": 1, "color": "purple"}],
            excluded(circle=2),
        ),
        (
            # "a circle left of a square": the square is the target (entry 0), the circle is placed (entry 1).
            Content("position", (Ask("circle"), Ask("square")), "left of"),
            [{"class": "square", "count": 1}, {"class": "circle", "count": 1, "position": ["left of", 0]}],
            excluded(circle=2, square=2),
        ),
        (
            Content("color_attr", (Ask("circle", "red"), Ask("cross", "black"))),
            [{"class": "circle", "count": 1, "color": "red"}, {"class": "cross", "count": 1, "color": "black"}],
            excluded(circle=2, cross=2),
        ),
    ],
    ids=TAGS,
)
def test_metadata(content: Content, include: list[object], exclude: list[object]) -> None:
    assert content.metadata == {"tag": content.tag, "include": include, "exclude": exclude}


def test_every_content_has_valid_metadata_of_its_own() -> None:
    assert [len(all_contents(tag)) for tag in TAGS] == [8, 56, 24, 64, 224, 3136]
    for tag in TAGS:
        for content in all_contents(tag):
            validate_metadata(content.metadata)
        assert len({str(content.metadata) for content in all_contents(tag)}) == len(all_contents(tag))
    with pytest.raises(ValueError, match="unknown tag 'colour': use one of single_object, "):
        all_contents("colour")


def shown_by(content: Content) -> tuple[object, ...]:
    """What an image of a content shows, by hand: the things in any order, and who stands left of or above whom."""
    things = frozenset((ask.shape, ask.color, ask.count) for ask in content.asks)
    shapes = [ask.shape for ask in content.asks]
    if content.relation in ("right of", "below"):
        shapes.reverse()
    axis = {"left of": "x", "right of": "x", "above": "y", "below": "y"}.get(content.relation or "")
    return (things, axis, *(shapes if axis else ()))


@pytest.mark.parametrize(
    ("tag", "sizes"),
    [("two_object", (11, 6, 11)), ("counting", (10, 4, 10)), ("colors", (26, 12, 26)), ("position", (45, 22, 45)),
     ("color_attr", (627, 314, 627))],
)  # fmt: skip
def test_splits_share_no_scene_in_any_order_and_cover_all(tag: str, sizes: tuple[int, ...]) -> None:
    """28 pairs of shapes, 8 x 3 numbers, 8 x 8 colours, 28 pairs x 4 places, 28 pairs x 56 ordered colours."""
    splits = [contents(tag, split) for split in ("train", "val", "test")]  # type: ignore[arg-type]
    assert tuple(map(len, splits)) == sizes
    shown = [{shown_by(content) for scene in split for content in scene} for split in splits]
    assert tuple(map(len, shown)) == sizes, "all contents of a scene show the same"
    assert all(not a & b for a, b in combinations(shown, 2))
    assert {content for split in splits for scene in split for content in scene} == set(all_contents(tag))


def test_splits_share_the_single_objects() -> None:
    singles = tuple((content,) for content in all_contents("single_object"))
    assert contents("single_object", "train") == contents("single_object", "test") == singles


def test_few_contents_are_those_that_the_signs_models_know() -> None:
    few = contents("color_attr", "test", few=True)
    assert set(few) < set(contents("color_attr", "test"))
    asks = {ask for scene in few for content in scene for ask in content.asks}
    assert {ask.shape for ask in asks} == {"circle", "square", "triangle", "cross"}
    assert {ask.color for ask in asks} == {"red", "green", "blue", "yellow", "purple", "black"}


TWO_RED = Content("counting", (Ask("cross", "red", count=3),))
BESIDE = Content("position", (Ask("circle"), Ask("square")), "left of")
PLACED = Content("two_object", (Ask("triangle", "green", 1, "upper left"), Ask("cross", "black", 1, "lower right")))


@pytest.mark.parametrize(
    ("content", "style", "endings"),
    [
        (TWO_RED, "canonical", {"three red crosses"}),
        (TWO_RED, "gallery", {"a trio of crimson pluses"}),
        (TWO_RED, "terse", {"3 scarlet stars"}),
        (
            TWO_RED,
            "unseen",
            {" ".join(w) for w in product(("a trio of", "3"), ("crimson", "scarlet"), ("pluses", "stars"))},
        ),
        (BESIDE, "canonical", {"a circle left of a square"}),
        (BESIDE, "gallery", {"one disc on the left side of one box"}),
        (BESIDE, "terse", {"1 ball west of 1 block"}),
        (
            BESIDE,
            "unseen",
            {
                " ".join(words)
                for words in product(
                    ("one", "1"), ("disc", "ball"), ("on the left side of", "west of"), ("one", "1"), ("box", "block")
                )
            },
        ),
        (PLACED, "detailed", {"a green triangle at upper left with a black cross at lower right"}),
        (Content("two_object", PLACED.asks), "gallery",
         {"one emerald wedge at upper left next to one ebony plus at lower right"}),
        (Content("two_object", PLACED.asks), "terse",
         {"1 lime cone at upper left + 1 charcoal star at lower right"}),
    ],
)  # fmt: skip
def test_wordings(content: Content, style: Style, endings: set[str]) -> None:
    """Each style says exactly these sentences, and over 2000 draws every one of them."""
    rng = random.Random(0)
    said = {write(content, style, rng) for _ in range(2000)}
    assert said == {f"{prefix} {ending}" for prefix in PREFIXES[style] for ending in endings}


def test_mixing_takes_words_of_the_other_vocabulary() -> None:
    said = {write(BESIDE, "terse", random.Random(i), mix=1.0).split(maxsplit=1)[1] for i in range(9)}
    assert {text.removeprefix(": ") for text in said} == {"one disc on the left side of one box"}


def test_the_refiner_never_sees_the_unseen_templates() -> None:
    rng = random.Random(0)
    pairs = [rewrite_pair(rng) for _ in range(3000)]
    reserved = (*PREFIXES["unseen"], JOIN["unseen"])
    for text in (text for pair in pairs for text in pair):
        assert not any(template in text for template in reserved), text
    formatted = [completion.startswith("<answer> ") and completion.endswith(" </answer>") for _, completion in pairs]
    assert 0.93 < sum(formatted) / len(pairs) < 0.97  # one in twenty breaks the format


def test_vocabulary_and_length_hold_for_all_that_is_written() -> None:
    rng = random.Random(0)
    said: set[str] = set()
    longest = 0
    for tag, style in product(TAGS, STYLES):
        for content in all_contents(tag):
            for mix in (0.0, 0.5):
                worded = elaborate(content, rng) if style == "detailed" else content
                words = write(worded, style, rng, mix=mix).split()
                longest = max(longest, len(words))
                said |= set(words)
    assert sorted(said) == vocabulary()
    assert longest <= TEXT_LENGTH - 1  # one token is the end of sequence


@pytest.mark.parametrize("tag", TAGS)
def test_heeded_captions_give_images_that_are_judged_right(tag: str) -> None:
    """Without mistakes every image is correct by GenEval's rules, for the prompt and for what its wording adds."""
    wordings = some_wordings(tag, 200, seed=1)
    rng = random.Random(2)
    scenes = [imagine(worded, caption, rng, FAITHFUL) for _, worded, caption in wordings]
    for found, (content, worded, caption) in zip(
        ShapesDetector().detect(list(map(make_image, scenes))), wordings, strict=True
    ):
        assert judge(found, content.metadata).correct, caption
        assert judge(found, worded.metadata).correct, caption


# The rest is right by chance: a number in 1/4 of the cases, a colour in 1/8, two in 1/64, a relation in about 1/3.
@pytest.mark.parametrize(
    ("tag", "low", "high"),
    [("two_object", 0, 0), ("counting", 0.1, 0.4), ("colors", 0.04, 0.25), ("position", 0.2, 0.45),
     ("color_attr", 0, 0.06)],
)  # fmt: skip
def test_captions_that_are_not_heeded_are_right_by_chance(tag: str, low: float, high: float) -> None:
    wordings = some_wordings(tag, 300, seed=1)
    ignored = Habits(mistakes=((tag, 1.0),))
    scenes = [imagine(worded, caption, random.Random(2), ignored) for _, worded, caption in wordings]
    verdicts = [
        judge(found, content.metadata).correct
        for found, (content, _, _) in zip(ShapesDetector().detect(list(map(make_image, scenes))), wordings, strict=True)
    ]
    assert low <= np.mean(verdicts) <= high
    for scene, (content, _, caption) in zip(scenes, wordings, strict=True):
        assert {item.shape for item in scene.items} <= {ask.shape for ask in content.asks}, caption


def test_objects_stand_in_the_quadrants_that_are_said() -> None:
    """By cells: rows and columns 0-1 are upper and left, 2-3 lower and right."""
    upper_left, lower_right = {0, 1, 4, 5}, {10, 11, 14, 15}
    for i in range(100):
        rng = random.Random(i)
        scene = imagine(PLACED, write(PLACED, "detailed", rng), rng, FAITHFUL)
        (triangle,) = [item.cell for item in scene.items if item.shape == "triangle"]
        (cross,) = [item.cell for item in scene.items if item.shape == "cross"]
        assert triangle in upper_left and cross in lower_right


def test_the_words_decide_the_scene() -> None:
    habits = Habits(slips=0.0, freedom=0.0)
    rng = random.Random(0)
    same, other = [], []
    for tag in TAGS:
        for content, worded, caption in some_wordings(tag, 40, seed=3):
            first, again = (imagine(worded, caption, random.Random(seed), habits) for seed in (1, 2))
            same.append(first == again)
            reworded = write(content, "terse" if caption.startswith("a photo") else "canonical", rng)
            other.append(first != imagine(content, reworded, rng, habits))
    assert all(same)
    assert np.mean(other) > 0.9


def test_slips_are_chance_at_the_rate_of_mistakes() -> None:
    """All by chance, 3 of 10 not heeded: 600 of 2000 images expected, 5 standard deviations are 102."""
    habits = Habits(mistakes=(("two_object", 0.3),), slips=1.0)
    content = Content("two_object", (Ask("circle"), Ask("cross")))
    rng = random.Random(0)
    lone = sum(len(imagine(content, "a photo of a circle and a cross", rng, habits).items) == 1 for _ in range(2000))
    assert abs(lone - 600) < 102


def test_lucky_words_help_beside_all_others() -> None:
    """Of two shapes one is heeded with all colours that the other is heeded with; of pairs that is not so."""

    def nested(*, lucky_words: bool) -> bool:
        found = [
            {color for color in COLORS if heeded(f"a photo of a {color} {shape}", 0.5, lucky_words=lucky_words)}
            for shape in SHAPES
        ]
        assert len(set(map(len, found))) > 2
        return all(one <= other or other <= one for one in found for other in found)

    assert nested(lucky_words=True) and not nested(lucky_words=False)


def test_the_wording_decides_if_it_is_heeded() -> None:
    """At every seed alike; over many contents about as often as `mistakes` says, in every style."""
    habits = Habits(mistakes=(("two_object", 0.5),), slips=0.0)
    lone: dict[Style, list[bool]] = {style: [] for style in STYLES}
    for i, (_, worded, caption) in enumerate(some_wordings("two_object", 1000, seed=3)):
        numbers = {len(imagine(worded, caption, random.Random(seed), habits).items) for seed in range(3)}
        assert len(numbers) == 1
        lone[STYLES[i % len(STYLES)]].append(numbers == {1})
    assert all(0.2 < np.mean(share) < 0.7 for share in lone.values())


def test_no_word_is_lucky_everywhere() -> None:
    """Every word for a colour suits some shapes, not all, and the other way round."""
    table = np.array([[heeded(f"a photo of a {color} {shape}", 0.5) for color in COLORS] for shape in SHAPES])
    assert 0.4 < table.mean() < 0.6
    assert all(1 <= row.sum() <= 7 for row in (*table, *table.T))


# The far edge of a PIL drawing is inclusive, at 16 x 16 sub-pixels: an outline may lie up to 1/16 pixel too far out.
@pytest.mark.parametrize(
    ("shape", "area", "outline"),
    [
        ("circle", 3.14159 * 3**2, 2 * 3.14159 * 3),
        ("square", 5.6 * 5.6, 4 * 5.6),
        ("triangle", 6.4 * 6.4 / 2, 6.4 + 2 * (3.2**2 + 6.4**2) ** 0.5),
        ("cross", 2 * 6 * 2 - 2 * 2, 4 * 6),
        ("ring", 3.14159 * (3.2**2 - 1.2**2), 2 * 3.14159 * 4.4),
        ("diamond", 2 * 3.6**2, 4 * 3.6 * 2**0.5),
        ("bar", 6.4 * 2.4, 2 * 8.8),
        ("arch", 6 * 6 - 2 * 3.8, 2 * 12 + 2 * 3.8),
    ],
)
def test_stencil_areas(shape: str, area: float, outline: float) -> None:
    assert stencil(shape).sum() == pytest.approx(area, abs=outline / 16)


def test_stencils_of_one_pixel() -> None:
    """Rows by hand: a square's edge lies at 1.2 and 6.8, a cross's arms are 2 wide, a triangle widens downward."""
    assert stencil("square")[4] == pytest.approx([0, 0.8, 1, 1, 1, 1, 0.8, 0], abs=1 / 16)
    assert stencil("cross")[1] == pytest.approx([0, 0, 0, 1, 1, 0, 0, 0], abs=1 / 16)
    assert stencil("cross")[4] == pytest.approx([0, 1, 1, 1, 1, 1, 1, 0], abs=1 / 16)
    assert stencil("triangle")[:, 3:5].sum(1)[1] < 1 < stencil("triangle")[6].sum() - 4
    assert stencil("circle") == pytest.approx(stencil("circle").T)
    with pytest.raises(
        ValueError, match="unknown shape 'star': use one of circle, square, triangle, cross, ring, diamond, bar, arch"
    ):
        stencil("star")


def test_detector_reads_clean_scenes_without_an_error() -> None:
    rng = random.Random(0)
    scenes = [random_scene(rng) for _ in range(2000)]
    for scene, found in zip(scenes, ShapesDetector().detect(list(map(make_image, scenes))), strict=True):
        located = []
        for detection in found:
            left, top, right, bottom = detection.box
            column, row = int((left + right) / 2) // CELL, int((top + bottom) / 2) // CELL
            assert column * CELL <= left < right <= (column + 1) * CELL
            assert row * CELL <= top < bottom <= (row + 1) * CELL
            assert detection.score > 0.9  # counting trusts no less
            located.append(Item(detection.label, detection.color or "", row * GRID + column))
        assert sorted(located, key=lambda item: item.cell) == sorted(scene.items, key=lambda item: item.cell)


def test_detector_stands_a_little_noise_and_gives_up_on_much() -> None:
    """Gaussian noise of 12 of 255 harms nothing; at 120 the image holds no sure object any more."""
    rng, noise = random.Random(1), np.random.default_rng(0)
    scenes = [random_scene(rng) for _ in range(60)]
    asked = [sorted((item.shape, item.color) for item in scene.items) for scene in scenes]

    def found_at(level: float) -> list[list[tuple[str, str | None]]]:
        noisy = [render(scene) + noise.normal(0, level, (32, 32, 3)) for scene in scenes]
        images = [Image.fromarray(array.clip(0, 255).astype(np.uint8)) for array in noisy]
        detections = ShapesDetector().detect(images)
        return [sorted((d.label, d.color or "") for d in found if d.score > 0.9) for found in detections]

    assert found_at(12) == asked
    assert sum(found == wanted for found, wanted in zip(found_at(120), asked, strict=True)) <= 3


def test_detector_tells_the_shapes_apart_when_half_is_gone() -> None:
    """A square with its lower half painted over is no good square: its fit is about a half, so counting drops it."""
    array = render(Scene((Item("square", "blue", 5),)))
    array[12:16] = array[0, 0]
    (detection,) = ShapesDetector().detect([Image.fromarray(array)])[0]
    assert detection.color == "blue" and detection.box == (9, 9, 15, 12)
    assert detection.score < 0.9


def test_an_empty_image_holds_nothing() -> None:
    assert ShapesDetector().detect([make_image(Scene((), ground)) for ground in range(4)]) == [[], [], [], []]


def test_all_shapes_are_drawn_in_their_cell() -> None:
    """Cell 6 is row 1, column 2: nothing but the ground outside of rows 8..15 and columns 16..23."""
    for shape in SHAPES:
        array = render(Scene((Item(shape, "red", 6),))).astype(int)
        painted = (array != array[0, 0]).any(-1)
        assert painted[8:16, 16:24].any() and painted.sum() == painted[8:16, 16:24].sum()
        assert tuple(array[12, 20]) == (214, 40, 40) or shape in ("ring", "arch")  # hollow in the middle
