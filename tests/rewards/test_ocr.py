"""The OCR reward: the letter rule, MARIO-Eval's word scores, and what the real engine reads off drawn images."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from datamodules.base import PromptSample
from rewards.base import RewardBatch, Score
from rewards.mario import WordScores, split_words, word_scores
from rewards.ocr import OCRReward, TextReader, text_reward
from rewards.ocr_engines import Line, PaddleOCRReader, RapidOCRReader

SENTENCES = """
The kettle is boiling | Fresh figs every Monday | Please ring the bell | No swimming after dark | Lost: one red mitten
Turn left at the mill | Our roof leaks again | Keep this gate closed | Seven boats for hire | Winter sale ends soon
Mind the wet paint | A quiet room upstairs | Books borrowed here | The ferry leaves at 9 | Soup of the day: leek
Two owls and a moon | Ask for the back door | Handle with both hands | Songs my uncle knew | Beware of low beams
Open from May to June | Grandma's best jam | Queue on this side | Wash before wearing | Night bus to Harbour
Private road, no exit | The lamp is broken | Gloves must be worn | Every window tells | Return to sender
Half price on plums | Use the other stairs | Chess club, room 12 | My dog ate the map | Tickets at the desk
Cold drinks and chips | Made by hand in Porto | Feed the cat twice | Follow the blue line | We moved next door
Nothing rhymes with it | Do not lean bikes here | Garden path ahead | Quartz, jade and onyx | Stop, look and listen
Free hugs on Friday | Deep water this side | Vote for the penguin | Zebra crossing ahead | Last one turns it off
"""
TEXTS = [sentence.strip() for line in SENTENCES.strip().splitlines() for sentence in line.split("|")]


def make_image(text: str, size: int = 512) -> Image.Image:
    """Black on white, one or two lines, with the scalable font that Pillow brings along."""
    image = Image.new("RGB", (size, size), "white")
    lines = "\n".join(textwrap.wrap(text, 14))
    draw = ImageDraw.Draw(image)
    draw.multiline_text((size / 2, size / 2), lines, fill="black", anchor="mm", align="center", font_size=size / 11)
    return image


def batch(images: Sequence[Image.Image], texts: Sequence[object]) -> RewardBatch:
    return RewardBatch([PromptSample(str(i), "p", "ocr", {"text": t}) for i, t in enumerate(texts)], images)


class ScriptedReader:
    """Reads from an image of width w the w-th page; an absent page breaks it."""

    def __init__(self, *pages: list[Line]) -> None:
        self.pages = pages

    def read(self, images: Sequence[Image.Image]) -> list[list[Line]]:
        return [self.pages[image.width] for image in images]


def scripted(reader: TextReader, texts: Sequence[object], **kwargs: object) -> list[Score]:
    """Images of widths 0, 1, ... against the texts."""
    images = [Image.new("RGB", (width, 4)) for width in range(len(texts))]
    return OCRReward(reader, **kwargs)(batch(images, texts))  # type: ignore[arg-type]


# --- the letter rule --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recognized", "target", "expected"),
    [
        (["Hello Wrld"], "Hello World", 0.9),
        (["xxhelloworldyy"], "Hello World", 1.0),
        (["hello"], "Hello World", 0.5),
        ([""], "Hello World", 0.0),
        ([], "Hello World", 0.0),
        (["q" * 40], "Hello World", 0.0),
        (["HEL", "LO w", "orld"], "Hello World", 1.0),  # lines join without a separator
        (["World", "Hello"], "Hello World", 0.2),  # order counts: 8 edits of 10
        (["hallo world"], "hello, world!", 0.75),  # punctuation counts: 3 edits of 12
        (["café"], "CAFÉ", 1.0),
    ],
)
def test_golden_vectors(recognized: list[str], target: str, expected: float) -> None:
    assert text_reward(recognized, target) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("max_extra", "expected"), [(None, 1.0), (4, 1.0), (3, 0.6), (0, 0.6)])
def test_max_extra_closes_the_leak(max_extra: int | None, expected: float) -> None:
    """Four letters too many on ten wanted: past the limit they are four edits."""
    assert text_reward(["xxhelloworldyy"], "Hello World", max_extra=max_extra) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("target", ["", "   "])
def test_an_empty_target_is_an_error(target: str) -> None:
    with pytest.raises(ValueError, match="without any letters: leave out prompts that ask for no text"):
        text_reward(["hello"], target)


def _reference_distance(a: str, b: str) -> int:
    """The textbook recursion over prefixes, row by row."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        above, row = row, [i]
        for j, y in enumerate(b, start=1):
            row.append(min(above[j] + 1, row[j - 1] + 1, above[j - 1] + (x != y)))
    return row[-1]


LETTERS = "abAB é1!"  # few, so that random strings resemble one another
lines = st.lists(st.text(LETTERS, max_size=6), max_size=4)
targets = st.text(LETTERS, min_size=1, max_size=12).filter(str.strip)


@given(lines, targets)
def test_equals_a_slow_reference(recognized: list[str], target: str) -> None:
    read, wanted = ("".join(c for c in text.lower() if c != " ") for text in ("".join(recognized), target))
    edits = 0 if wanted in read else _reference_distance(read, wanted)
    expected = max(0.0, (len(wanted) - edits) / len(wanted))
    assert text_reward(recognized, target) == pytest.approx(expected, abs=1e-12)


@given(lines, targets, st.integers(0, 5))
def test_stays_in_range_and_max_extra_only_takes_away(recognized: list[str], target: str, extra: int) -> None:
    reward, limited = text_reward(recognized, target), text_reward(recognized, target, max_extra=extra)
    assert 0 <= limited <= reward <= 1
    # Only what covers the target with more text than allowed loses by the limit.
    if limited < reward:
        assert reward == 1


# All of Unicode but the sigma, whose lower case depends on what follows it.
texts = st.text(st.characters(codec="utf-8", exclude_characters="Σ"), max_size=12)


@given(texts.filter(str.strip), texts, texts)
def test_the_exact_text_scores_1(target: str, before: str, after: str) -> None:
    assert text_reward([target], target) == text_reward([target], target, max_extra=0) == 1
    assert text_reward([before, target, after], target) == 1


@given(lines, targets, st.randoms())
def test_case_spaces_and_line_breaks_do_not_matter(recognized: list[str], target: str, random: object) -> None:
    def disturb(text: str) -> str:
        return "".join(c.swapcase() + " " * random.randint(0, 2) for c in text)  # type: ignore[attr-defined]

    expected = text_reward(recognized, target)
    assert text_reward(list("".join(recognized)), target) == expected
    assert text_reward([disturb(line) for line in recognized], disturb(target)) == expected


@given(st.text("abc", min_size=1, max_size=12), st.data())
def test_one_wrong_letter_costs_one_nth(target: str, data: st.DataObject) -> None:
    """Whether it is replaced, left out or doubled by a foreign one; the substring rule cannot apply."""
    at = data.draw(st.integers(0, len(target) - 1))
    expected = pytest.approx(1 - 1 / len(target), abs=1e-12)
    assert text_reward([target[:at] + "x" + target[at + 1 :]], target) == expected
    assert text_reward([target[:at] + target[at + 1 :]], target) == expected
    if at:
        assert text_reward([target[:at] + "x" + target[at:]], target) == expected


# --- the reward -------------------------------------------------------------------------------------------------------


def test_scores_and_detail() -> None:
    """Lines without confidence are dropped; several keywords join in order; no text is a 0, and valid."""
    reader = ScriptedReader([("Hello", 0.5), ("noise", 0.0), ("Wrld", 1.0)], [("fireexit", 0.75)], [])
    scores = scripted(reader, ["Hello World", ["Fire", "Exit"], "gone"])
    assert [score.native for score in scores] == pytest.approx([0.9, 1.0, 0.0], abs=1e-12)
    assert all(score.native == score.table == score.rl and score.valid for score in scores)
    assert scores[0].detail == {"recognized": ["Hello", "Wrld"], "target": ["Hello World"], "confidence": 0.75}
    assert scores[2].detail == {"recognized": [], "target": ["gone"], "confidence": 0.0}


def test_mario_scores() -> None:
    """One word of two right: accuracy 0, f1 2/3 (precision 1, recall 1/2)."""
    reader = ScriptedReader([("Exit Fire", 0.9)], [("FIRE", 0.9)])
    first, second = scripted(reader, [["Fire", "Exit"], "fire exit"], scorer="mario")
    assert (first.native, first.table, first.rl) == (1.0, 1.0, 1.0)
    assert (second.native, second.table, second.rl) == (0.0, 0.0, pytest.approx(2 / 3))


def test_max_extra_reaches_the_rule() -> None:
    reader = ScriptedReader([("xxhelloworldyy", 1.0)])
    (score,) = scripted(reader, ["hello world"], max_extra=3)
    assert score.rl == pytest.approx(0.6)


def test_a_image_that_breaks_the_engine_is_invalid_and_alone() -> None:
    reader = ScriptedReader([("a", 1.0)], [("b", 1.0)])
    scores = scripted(reader, ["a", "b", "c"])
    assert [score.valid for score in scores] == [True, True, False]
    assert scores[2].detail == {"reason": "ScriptedReader: IndexError: tuple index out of range"}


def test_errors_of_load_and_of_the_contract_are_raised() -> None:
    class Misconfigured(ScriptedReader):
        def load(self) -> None:
            raise ValueError("no such model")

    class Short(ScriptedReader):
        def read(self, images: Sequence[Image.Image]) -> list[list[Line]]:
            return []

    with pytest.raises(ValueError, match="no such model"):
        scripted(Misconfigured(), ["a"])
    with pytest.raises(ValueError, match=r"Short\.read returned 0 lists for 1 image"):
        scripted(Short(), ["a"])


@pytest.mark.parametrize("text", [None, "", " ", [], ["", " "], 7, ["a", 7]])
def test_a_sample_without_text_is_an_error(text: object) -> None:
    with pytest.raises(ValueError, match="the prompt '0' has the metadata text=.*as a string or a list of strings"):
        scripted(ScriptedReader([]), [text])


def test_configuration_is_checked_at_construction() -> None:
    with pytest.raises(ValueError, match="scorer='words', use one of levenshtein, mario"):
        OCRReward(scorer="words")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="max_extra=-1 with scorer=levenshtein: use null, or 0 or more"):
        OCRReward(max_extra=-1)
    with pytest.raises(ValueError, match="max_extra=3 with scorer=mario"):
        OCRReward(scorer="mario", max_extra=3)
    with pytest.raises(ValueError, match="limit_side_len=8, use at least 32"):
        RapidOCRReader(limit_side_len=8)
    with pytest.raises(ValueError, match="threads=0, use at least 1"):
        RapidOCRReader(threads=0)
    for reader in (RapidOCRReader, PaddleOCRReader):
        with pytest.raises(ValueError, match=f"{reader.__name__} has min_confidence=1.5, use a number from 0 to 1"):
            reader(min_confidence=1.5)


def test_versions_tell_what_scores_depend_on() -> None:
    engine = pytest.importorskip("rapidocr._version")
    read_by = f"rapidocr {engine.version} limit_side_len=512 min_confidence=0.5"
    assert OCRReward().version == f"ocr levenshtein by {read_by}"
    assert OCRReward(max_extra=4).version == f"ocr levenshtein max_extra=4 by {read_by}"
    assert OCRReward(ScriptedReader(), scorer="mario").version == "ocr mario by ScriptedReader"


# --- MARIO-Eval -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recognized", "target", "expected"),
    [
        (["B", "a"], ["A", "b"], WordScores(1.0, 1.0, 1.0, 1.0)),
        (["a"], ["a", "a"], WordScores(1.0, 0.5, 2 / 3, 0.0)),  # a multiset
        (["a", "a", "a", "b"], ["a"], WordScores(0.25, 1.0, 0.4, 0.0)),
        (["ab"], ["a", "b"], WordScores(0.0, 0.0, 0.0, 0.0)),  # a swallowed space costs both words
        ([], ["a"], WordScores(0.0, 0.0, 0.0, 0.0)),
    ],
)
def test_word_scores(recognized: list[str], target: list[str], expected: WordScores) -> None:
    assert word_scores(recognized, target) == expected


@given(st.lists(st.sampled_from("abcA"), max_size=6), st.lists(st.sampled_from("abcA"), min_size=1, max_size=6))
def test_word_scores_equal_a_slow_reference(recognized: list[str], target: list[str]) -> None:
    """Crosses wanted words off one by one."""
    left, hits = [word.lower() for word in target], 0
    for word in recognized:
        if word.lower() in left:
            left.remove(word.lower())
            hits += 1
    scores = word_scores(recognized, target)
    assert scores.recall == hits / len(target)
    assert scores.precision == (hits / len(recognized) if recognized else 0)
    assert scores.f1 == pytest.approx(2 * hits / (len(recognized) + len(target)))
    assert scores.accuracy == (sorted(w.lower() for w in recognized) == sorted(w.lower() for w in target))


def test_word_scores_need_a_target() -> None:
    with pytest.raises(ValueError, match="at least one target word"):
        word_scores(["a"], split_words([" "]))


# --- RapidOCR, the real engine ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pages() -> list[list[Line]]:
    """What RapidOCR reads off the 50 drawn sentences, and off an empty image (the last page)."""
    pytest.importorskip("rapidocr")
    reader = RapidOCRReader()
    assert isinstance(reader, TextReader)
    return reader.read([*map(make_image, TEXTS), Image.new("RGB", (512, 512), "white")])


@pytest.mark.slow
def test_rapidocr_reads_drawn_sentences(pages: list[list[Line]]) -> None:
    scores = scripted(ScriptedReader(*pages), TEXTS)
    assert all(score.valid for score in scores)
    assert sum(score.rl for score in scores) / 50 >= 0.95


@pytest.mark.slow
def test_rapidocr_scores_other_sentences_low(pages: list[list[Line]]) -> None:
    """Every image against all 49 other sentences: chance resemblance of short English texts, no choice involved."""
    rewards = [
        text_reward([text for text, _ in page], other)
        for page, own in zip(pages, TEXTS, strict=False)
        for other in TEXTS
        if other != own
    ]
    assert len(rewards) == 50 * 49
    assert sum(rewards) / len(rewards) < 0.2


@pytest.mark.slow
def test_rapidocr_on_an_empty_image_is_0_and_valid(pages: list[list[Line]]) -> None:
    assert pages[-1] == []
    (score,) = scripted(ScriptedReader(pages[-1]), ["anything"])
    assert score.valid and score.rl == 0


@pytest.mark.slow
def test_the_default_reward_runs_rapidocr_end_to_end() -> None:
    """In colour and not RGB, with one target right, one in another's place and one image that cannot be read."""
    pytest.importorskip("rapidocr")
    image = make_image("Seven boats for hire").convert("RGBA")
    broken = Image.new("RGB", (0, 5))
    right, wrong, invalid = OCRReward()(batch([image, image, broken], ["Seven Boats for Hire", "qqqq zzzz", "x"]))
    assert right.rl == 1.0 and right.detail["confidence"] > 0.9
    assert wrong.rl == 0.0
    assert not invalid.valid and "RapidOCRReader: " in invalid.detail["reason"]


# --- PaddleOCR's two interfaces ---------------------------------------------------------------------------------------

# Stand-ins with the signatures and replies that PaddleOCR documents. They find "red" in red images given as BGR,
# "none" in no others, and refuse any argument that the real one does not have.
PADDLE = {
    "2.9.1": """
class PaddleOCR:
    def __init__(self, *, use_angle_cls, lang, show_log, use_gpu, drop_score):
        assert (use_angle_cls, lang, show_log, use_gpu, drop_score) == (False, "en", False, False, 0.5)
    def ocr(self, img, *, cls):
        assert cls is False and img.dtype == "uint8" and img.shape == (3, 2, 3) and img.flags["C_CONTIGUOUS"]
        if img[0, 0].tolist() != [0, 0, 255]:
            return [None]
        box = [[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0]]
        return [[[box, ("red", 0.75)], [box, ("car", 0.5)]]]
""",
    "3.0.1": """
class PaddleOCR:
    def __init__(self, *, lang, use_doc_orientation_classify, use_doc_unwarping, use_textline_orientation,
                 text_rec_score_thresh, device):
        assert not (use_doc_orientation_classify or use_doc_unwarping or use_textline_orientation)
        assert (lang, text_rec_score_thresh, device) == ("en", 0.5, "cpu")
    def predict(self, input):
        assert input.dtype == "uint8" and input.shape == (3, 2, 3) and input.flags["C_CONTIGUOUS"]
        red = input[0, 0].tolist() == [0, 0, 255]
        return [{"rec_texts": ["red", "car"] if red else [], "rec_scores": [0.75, 0.5] if red else []}]
""",
}


@pytest.mark.parametrize("version", PADDLE)
def test_paddleocr_is_spoken_to_as_its_version_documents(
    version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "paddleocr.py").write_text(PADDLE[version])
    info = tmp_path / f"paddleocr-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: paddleocr\nVersion: {version}\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "paddleocr", raising=False)
    reader = PaddleOCRReader()
    assert reader.version == f"paddleocr {version} lang=en min_confidence=0.5"
    images = [Image.new("RGB", (2, 3), color) for color in ("red", "blue")]
    assert reader.read(images) == [[("red", 0.75), ("car", 0.5)], []]
    monkeypatch.delitem(sys.modules, "paddleocr")


@pytest.mark.parametrize(
    ("reader", "package", "message"),
    [
        (RapidOCRReader(), "rapidocr", r"rapidocr cannot be used \(.*\): run `pip install -e '\.\[ocr\]'`"),
        (PaddleOCRReader(), "paddleocr", r"paddleocr cannot be used \(.*\): run `pip install 'paddleocr==2\.9\.1'"),
        (ScriptedReader([]), "rapidfuzz.distance", r"needs rapidfuzz \(.*\): run `pip install -e '\.\[ocr\]'`"),
    ],
)
def test_a_missing_package_is_one_sentence_and_no_score(
    reader: TextReader, package: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # what Python itself does with a module known to be absent
    with pytest.raises(ValueError, match=message):
        scripted(reader, ["a"])
