"""OCR prompt files: which text is wanted, and what each bad line is told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from datamodules.ocr import OCRPrompts, quote_style, read_prompts, target_text
from rewards.ocr import text_reward

SAMPLES = Path("datamodules/samples/ocr.txt")


def write(path: Path, *lines: object) -> Path:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ('A sign that reads "No Parking", at night', ["No Parking"]),
        ('"First" and "second"', ["First"]),
        ('Labelled "It\'s late"', ["It's late"]),
        ('nothing "closed', []),
        ("it's a dog's life", []),
        ('empty "" here', [""]),
    ],
)
def test_double_quotes(prompt: str, expected: list[str]) -> None:
    assert target_text(prompt, "double") == expected


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("A poster titled 'Night Train'", ["Night Train"]),
        ("'Fire' above, 'Exit' below.", ["Fire", "Exit"]),
        ("It's a card that says 'Don't Panic'!", ["Don't Panic"]),
        ("the dogs' bowl says 'EAT'", ["EAT"]),
        ("a '90s poster saying 'RETRO'", ["RETRO"]),
        ("don't, can't and won't", []),
        ("it's the boys' hat", []),
        ("the boy 's cap with 'GO' on it", ["GO"]),
        ("a mug ('Best Dad')", ["Best Dad"]),
        ("('a','b','c')", ["a", "b", "c"]),
        ("titled 'Ocean's Eleven', by 'O'Neill'", ["Ocean's Eleven", "O'Neill"]),
        ("sizes 5' and 6'2 on 'Tall'", ["Tall"]),
        ("quoted 'été' and ''", ["été"]),
    ],
)
def test_single_quotes(prompt: str, expected: list[str]) -> None:
    assert target_text(prompt, "single") == expected


words = st.from_regex(r"[A-Za-z0-9]+('[a-z]+)?( [A-Za-z0-9]+('[a-z]+)?){0,2}", fullmatch=True)


@pytest.mark.slow
@given(st.lists(words, min_size=1, max_size=4))
def test_every_single_quoted_keyword_comes_back(keywords: list[str]) -> None:
    prompt = "It's a sign with " + " and the boys' ".join(f"'{keyword}'" for keyword in keywords) + ", isn't it"
    assert target_text(prompt, "single") == keywords
    assert target_text(prompt) == keywords  # auto
    assert target_text(prompt + ' "double"') == ["double"]


def test_the_style_is_the_files() -> None:
    assert quote_style(['a "b"', 'c "d"']) == "double"
    assert quote_style(['a "b"', "c 'd'"]) == "single"
    assert quote_style(['a "b"', 'c "d']) == "single"


def test_reads_text_files(tmp_path: Path) -> None:
    first, second = read_prompts(write(tmp_path / "p.txt", "A \"Red\" door, it's 'old'", "", 'The "Blue One"  '))
    assert (first.id, first.prompt, first.tag) == ("00000", "A \"Red\" door, it's 'old'", "ocr")
    assert first.metadata == {"text": ["Red"]}
    assert (second.id, second.prompt, second.metadata) == ("00001", 'The "Blue One"', {"text": ["Blue One"]})
    (single,) = read_prompts(write(tmp_path / "s.txt", "\ufeffIt's 'Fire' and 'Exit'"))
    assert (single.prompt, single.metadata) == ("It's 'Fire' and 'Exit'", {"text": ["Fire", "Exit"]})


def test_reads_jsonl_files(tmp_path: Path) -> None:
    """A line's own `text` counts before quotes, and its prompt does not count for the file's style."""
    path = write(
        tmp_path / "p.jsonl",
        {"prompt": 'a "Red" door', "id": 7, "text": None},
        {"prompt": "a door that says red", "text": "Red"},
        {"prompt": "two doors", "text": ["Red", "Blue"]},
    )
    samples = read_prompts(path)
    assert [sample.id for sample in samples] == ["7", "00001", "00002"]
    assert [sample.metadata["text"] for sample in samples] == [["Red"], ["Red"], ["Red", "Blue"]]


@pytest.mark.parametrize(
    ("line", "quotes", "message"),
    [
        ("a plain door", "double", "no text in double quotes: quote the wanted text"),
        ('a "half door', "double", "no text in double quotes"),
        ("it's a 'Blue' door", "double", "no text in double quotes"),
        ('a "  " door', "auto", "nothing between the double quotes"),
        ('a "" door', "auto", "nothing between the double quotes"),
    ],
)
def test_a_bad_text_line_is_named(tmp_path: Path, line: str, quotes: str, message: str) -> None:
    path = write(tmp_path / "bad.txt", 'a "Red" door', "", line)
    with pytest.raises(ValueError, match=rf"bad\.txt:3: {message}"):
        read_prompts(path, quotes)  # type: ignore[arg-type]


def test_a_file_of_mixed_quotes_is_an_error(tmp_path: Path) -> None:
    """One line without double quotes makes the file one of single quotes, which its first line then lacks."""
    path = write(tmp_path / "mixed.txt", 'a "Red" door', "a 'Blue' door")
    with pytest.raises(ValueError, match=r"mixed\.txt:1: no text in single quotes: .* alike \(`quotes: auto` takes"):
        read_prompts(path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a dog",', r"not valid JSON"),
        ({"prompt": "a door", "text": ""}, r"`text` is '': give the wanted text"),
        ({"prompt": "a door", "text": []}, r"`text` is \[\]: give"),
        ({"prompt": "a door", "text": ["a", " "]}, r"`text` is \['a', ' '\]: give"),
        ({"prompt": "a door", "text": 7}, r"`text` is 7: give"),
        ({"prompt": 'a "Red" door', "id": "00000"}, r"the id '00000' was used in .*:1: make ids unique"),
        ({"prompt": ""}, r"`prompt` is '': give the text"),
    ],
)
def test_a_bad_jsonl_line_is_named(tmp_path: Path, line: object, message: str) -> None:
    path = write(tmp_path / "bad.jsonl", {"prompt": 'a "Red" door'}, line)
    with pytest.raises(ValueError, match=rf"bad\.jsonl:2: {message}"):
        read_prompts(path)


def test_bad_files_and_settings(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"empty\.txt: the file holds no lines: write one prompt per line"):
        read_prompts(write(tmp_path / "empty.txt", " "))
    with pytest.raises(ValueError, match=r"p\.csv: its name ends in '\.csv': give .* \.txt \(.*\) or \.jsonl"):
        read_prompts(write(tmp_path / "p.csv", 'a "b"'))
    with pytest.raises(
        ValueError, match=r"data\.eval_file is 'none\.txt', .* give the path of a \.txt or \.jsonl file"
    ):
        OCRPrompts(str(SAMPLES), "none.txt").setup("validate")
    with pytest.raises(ValueError, match="data.quotes is 'curly', use one of auto, double, single"):
        OCRPrompts(str(SAMPLES), str(SAMPLES), quotes="curly")  # type: ignore[arg-type]


def test_loaders_quotes_and_limit(tmp_path: Path) -> None:
    """24 samples thin out to every 6th; `quotes: single` overrules what the file would be taken for."""
    test = str(write(tmp_path / "test.txt", "a \"Red\" door of 'Oak'"))
    data = OCRPrompts(str(SAMPLES), str(SAMPLES), test, limit=4, batch_size=2, eval_batch_size=3)
    data.setup("fit")
    (loader,) = data.val_dataloader()
    assert [[sample.id for sample in batch] for batch in loader] == [["00000", "00006", "00012"], ["00018"]]
    assert data.eval_names == ["ocr"]
    data.setup("test")
    assert next(iter(data.test_dataloader()[0]))[0].metadata == {"text": ["Red"]}
    single = OCRPrompts(str(SAMPLES), str(SAMPLES), test, quotes="single")
    single.setup("test")
    assert single.test_samples()["ocr"][0].metadata == {"text": ["Oak"]}


def test_the_shipped_samples_are_sound() -> None:
    """24 different prompts with different texts, each as long as the benchmark's (2 to 29 characters)."""
    samples = read_prompts(SAMPLES)
    texts = [sample.metadata["text"] for sample in samples]
    assert len(samples) == len({sample.prompt for sample in samples}) == len({text for (text,) in texts}) == 24
    for sample, (text,) in zip(samples, texts, strict=True):
        assert sample.prompt.count('"') == 2 and 2 <= len(text) <= 29
        assert text_reward([text.upper()], text) == 1
