"""The miniature world of words: what prompts ask for, how they are worded, misspelt and drawn."""

from __future__ import annotations

import random
from itertools import combinations

import numpy as np
import pytest

from datamodules.ocr import target_text
from miniature.architectures import TEXT_LENGTH
from miniature.scenes.world import COLORS, GROUNDS
from miniature.signs.font import ALPHABET, glyph
from miniature.signs.pretraining import word_rewrite_pair
from miniature.signs.world import (
    FAITHFUL_WORDS,
    LENGTHS,
    WORD_PREFIXES,
    WORD_STYLES,
    Mistake,
    Sign,
    WordHabits,
    WordStyle,
    all_words,
    imagine_sign,
    misspell,
    read_caption,
    render_sign,
    split_of,
    words,
    words_vocabulary,
    write_word,
    write_word_loosely,
)
from rewards.ocr import text_reward


def some_captions(num: int, seed: int) -> list[tuple[str, WordStyle, str]]:
    """(word, style, caption), lengths and styles in turn."""
    rng = random.Random(seed)
    drawn = []
    for i in range(num):
        word, style = rng.choice(all_words(LENGTHS[i % 3])), WORD_STYLES[i % 4]
        drawn.append((word, style, write_word(word, style, rng, mix=0.3)))
    return drawn


def test_splits_are_disjoint_and_cover() -> None:
    """12 x 11 (x 11 (x 11)) strings without equal neighbours; shares by a hash, 60 / 20 / 20 within 4 errors."""
    for length, total in zip(LENGTHS, (132, 1452, 15972), strict=True):
        splits = [words(length, split) for split in ("train", "val", "test")]  # type: ignore[arg-type]
        assert sorted(word for split in splits for word in split) == sorted(all_words(length))
        assert len(all_words(length)) == sum(map(len, splits)) == total
        for words_of_split, share in zip(splits, (0.6, 0.2, 0.2), strict=True):
            assert abs(len(words_of_split) / total - share) < 4 * (share * (1 - share) / total) ** 0.5
    # of the shipped models' training, so they must not move
    assert [split_of(word) for word in ("shop", "at", "so")] == ["train", "val", "val"]


@pytest.mark.parametrize(
    ("style", "captions"),
    [
        ("canonical", {'a sign that says " c u p "'}),
        (
            "gallery",
            {
                'one poster reading " C U P "',
                'one label with the text " C U P "',
                'one banner bearing " C U P "',
            },
        ),
        ("terse", {'write " c u p "', 'letters : " c u p "', 'spell out " c u p "'}),
        (
            "unseen",
            {
                f'{p} " {w} "'
                for p in ("please put up", "here it reads", "the text now says")
                for w in ("c u p", "C U P")
            },
        ),
    ],
)
def test_wordings(style: WordStyle, captions: set[str]) -> None:
    """Each style says exactly these sentences, and over 200 draws every one of them."""
    rng = random.Random(0)
    assert {write_word("cup", style, rng) for _ in range(200)} == captions


def test_every_caption_can_be_read_back_and_fits() -> None:
    """By our reader, by the OCR data's own rule and by the OCR reward, which drops spaces and case."""
    known = set(words_vocabulary())
    for word, _, caption in some_captions(2000, seed=1):
        assert read_caption(caption) == word
        (target,) = target_text(caption, "double")
        assert text_reward([word], target) == text_reward([target], word) == 1.0
        assert len(caption.split()) <= TEXT_LENGTH - 1  # one token is the end of sequence
        assert set(caption.split()) <= known
    for text in ("write c u p", 'write " "', 'write " c a p "', 'write " c u p " or " u p "'):
        assert read_caption(text) is None


def test_the_refiner_never_sees_the_unseen_templates() -> None:
    rng = random.Random(0)
    pairs = [word_rewrite_pair(rng) for _ in range(3000)]
    known = {*words_vocabulary(), "<answer>", "</answer>"}
    for text in (text for pair in pairs for text in pair):
        assert not any(template in text for template in WORD_PREFIXES["unseen"]), text
        assert set(text.split()) <= known and len(text.split()) <= TEXT_LENGTH - 1
    formatted = [completion.startswith("<answer> ") and completion.endswith(" </answer>") for _, completion in pairs]
    assert 0.93 < np.mean(formatted) < 0.97  # one in twenty breaks the format
    same = [read_caption(prompt) == read_caption(completion) for prompt, completion in pairs]
    assert 0.88 < np.mean(same) < 0.93  # a tenth says another word
    assert not any(completion.startswith("<answer> a sign") for _, completion in pairs)


def test_loose_wordings_keep_the_word() -> None:
    assert all(read_caption(write_word_loosely("help", random.Random(i))) == "help" for i in range(300))


@pytest.mark.parametrize(
    ("word", "mistakes", "drawn"),
    [
        ("cup", {1: "wrong"}, "cep"),  # u is number 8 of 12, so five further is number 1
        ("cup", {0: "dropped"}, "up"),
        ("cup", {2: "dropped"}, "cu"),
        ("cup", {1: "doubled"}, "cuup"),
        ("shop", {1: "doubled"}, "shhp"),
        ("shop", {3: "doubled"}, "shpp"),
        ("cup", {0: "swapped"}, "ucp"),
        ("cup", {2: "swapped"}, "cpu"),
        ("up", {0: "dropped", 1: "dropped"}, "u"),
        ("cup", {}, "cup"),
    ],
)
def test_misspelling(word: str, mistakes: dict[int, Mistake], drawn: str) -> None:
    assert misspell(word, mistakes) == drawn


def test_a_single_mistake_always_shows() -> None:
    rng = random.Random(0)
    kinds: tuple[Mistake, ...] = ("wrong", "dropped", "doubled", "swapped")
    for word in (rng.choice(all_words(length)) for length in LENGTHS for _ in range(100)):
        for i in range(len(word)):
            for kind in kinds:
                shown = misspell(word, {i: kind}, rng.randrange(1, 12))
                assert shown != word and 1 <= len(shown) <= 4


def test_faithful_signs_say_the_word() -> None:
    rng = random.Random(0)
    for word, style, caption in some_captions(400, seed=2):
        assert imagine_sign(word, caption, style, rng, FAITHFUL_WORDS).letters == word
        assert imagine_sign(word, caption, style, rng, WordHabits(slips=1.0)).letters != word


def test_the_words_decide_the_sign() -> None:
    """The same caption gives the same sign at every seed; another wording of the word mostly another one."""
    habits = WordHabits(slips=0.0, freedom=0.0)
    other = []
    for word, style, caption in some_captions(200, seed=3):
        sign = imagine_sign(word, caption, style, random.Random(1), habits)
        assert sign == imagine_sign(word, caption, style, random.Random(2), habits)
        reworded = write_word(word, "terse" if style == "canonical" else "canonical", random.Random(0))
        other.append(sign != imagine_sign(word, reworded, "terse", random.Random(1), habits))
    assert np.mean(other) > 0.9


def test_all_wordings_are_spelt_equally_badly() -> None:
    """No wording is worth a refiner's switching to it alone."""
    rng, right = random.Random(0), {}
    for style in WORD_STYLES:
        asked = [rng.choice(words(length, "val")) for length in LENGTHS for _ in range(400)]
        shown = [imagine_sign(word, write_word(word, style, rng), style, rng).letters for word in asked]
        right[style] = np.mean([a == b for a, b in zip(asked, shown, strict=True)])
    assert all(0.3 < share < 0.4 for share in right.values()), right


def test_templates_spoil_letters_of_their_own() -> None:
    """A letter is drawn wrong by some templates and right by others; about as many as asked are spoilt."""
    habits = WordHabits(mistakes=(("terse", 0.2),), slips=0.0)
    templates = [prefix for prefixes in WORD_PREFIXES.values() for prefix in prefixes]
    right = np.array(
        [
            [
                imagine_sign(pair, f'{template} " {" ".join(pair)} "', "terse", random.Random(0), habits).letters
                == pair
                for template in templates
            ]
            for pair in all_words(2)
        ]
    )
    assert (right.any(1)).mean() > 0.95 and right.all(1).mean() < 0.1
    assert abs((1 - right.mean()) - (1 - (1 - 0.2) ** 2)) < 0.1


def test_glyphs_differ() -> None:
    """The most alike, c and e, differ in 5 pixels; h and u in 8."""
    differences = {frozenset((a, b)): int(abs(glyph(a) - glyph(b)).sum()) for a, b in combinations(ALPHABET, 2)}
    assert differences[frozenset("hu")] == 8 and differences[frozenset("ce")] == 5
    assert min(differences.values()) == 5
    assert glyph("t").sum() == 6 + 6 * 2 and glyph("l").sum() == 6 * 2 + 6
    for letter in ALPHABET:
        assert not glyph(letter)[:, (0, 7)].any() and not glyph(letter)[7].any()
    with pytest.raises(ValueError, match="no letter 'a': use c, e, h, l, o, p, s, t, u, x, y, z"):
        glyph("a")


def test_a_sign_is_drawn_letter_by_letter() -> None:
    """'up' in row 2: two cells in the middle, rows 16-23, columns 8-15 and 16-23; the rest is ground."""
    image = render_sign(Sign("up", 2, "blue", 1))
    assert image.shape == (32, 32, 3)
    inked = (image == COLORS["blue"]).all(-1)
    assert (inked[16:24, 8:16] == glyph("u")).all() and (inked[16:24, 16:24] == glyph("p")).all()
    assert inked.sum() == glyph("u").sum() + glyph("p").sum()
    assert (image[~inked] == GROUNDS[1]).all()
    assert [Sign(letters, 0, "red").column for letters in ("c", "cu", "cup", "cups")] == [1, 1, 0, 0]


def test_unknown_style() -> None:
    with pytest.raises(ValueError, match="unknown style 'loud': use one of canonical, gallery, terse, unseen"):
        write_word("cup", "loud", random.Random(0))  # type: ignore[arg-type]
