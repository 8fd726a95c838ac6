import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from datamodules.jsonl import json_lines, read_json, read_records
from datamodules.parsing import MAX_YAML_NODES, parse_json, parse_yaml
from lightning_modules.cli.texts import load_config

NAMES = "abcdefg"
BOMB = f"a: &a [{','.join('x' * 9)}]\n" + "".join(
    f"{own}: &{own} [{','.join([f'*{other}'] * 9)}]\n" for other, own in zip(NAMES, NAMES[1:], strict=False)
)
DEEP = "[" * 100_000
DIGITS = "9" * 5_000


def test_aliases_are_bounded() -> None:
    start = time.monotonic()
    for read in (load_config, lambda text: parse_yaml(text, "x.yaml")):
        with pytest.raises(ValueError, match=rf":6: over {MAX_YAML_NODES} values"):
            read(BOMB)
        with pytest.raises(ValueError, match=r":1: over"):
            read("a: &a [*a]")  # endless
    assert time.monotonic() - start < 2
    assert parse_yaml("a: &a {b: 1}\nc: *a\nd: *a\n", "x.yaml") == {"a": {"b": 1}, "c": {"b": 1}, "d": {"b": 1}}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (DEEP, "x.yaml:1 is no YAML"),
        ("- " * 1000 + "x", "x.yaml:1: over"),
        (f"a: {DIGITS}", "x.yaml is no YAML"),
        ("a: 2024-13-01", "x.yaml is no YAML: a value that cannot be read, month"),
        ("a: !!bool x", "x.yaml is no YAML"),
        ('a: !!int ""', "x.yaml is no YAML"),
        ("a: !!timestamp x", "x.yaml is no YAML"),
        ("a: !!python/object/apply:os.system [true]", "x.yaml:1 is no YAML: could not determine a constructor"),
        ("a: 1\nb: \0", "x.yaml is no YAML"),
    ],
    ids=["deep", "deep block", "digits", "date", "bool", "int", "time", "python", "NUL"],
)
def test_texts_that_are_no_yaml(text: str, said: str) -> None:
    with pytest.raises(ValueError) as raised:
        parse_yaml(text, "x.yaml")
    assert not isinstance(raised.value, yaml.YAMLError) and str(raised.value).startswith(said)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f'{{"prompt": {DEEP}', "nested too deeply"),
        (f'{{"prompt": "a", "n": {DIGITS}}}', "an integer of too many digits"),
    ],
)
def test_json_that_python_itself_refuses(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"prompt": "a"}\n' + text)
    with pytest.raises(ValueError, match=rf"x\.jsonl:2: not valid JSON \({said}\): correct or delete the line"):
        list(json_lines(path))
    assert len(list(json_lines(path, broken="skip"))) == 1


# An own sentence is one line that begins with the file's path.
@pytest.mark.parametrize(
    "read", [read_json, lambda path: read_records(path, (".jsonl", ".txt"))], ids=["json", "lines"]
)
@pytest.mark.parametrize("suffix", [".jsonl", ".txt"])
def test_any_bytes_are_read_or_refused(read: Callable[[Path], Any], suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"x{suffix}"
    pieces = [b"{", b"}", b"[", b'"', b"prompt", b":", b",", b"\n", b"\xff\xfe", b"\xef\xbb\xbf", b"\0", b"\\ud800"]

    @settings(max_examples=300, deadline=None, derandomize=True, database=None)
    @given(st.binary(max_size=40) | st.lists(st.sampled_from([*pieces, b"NaN", b"1e999"]), max_size=20).map(b"".join))
    def try_bytes(content: bytes) -> None:
        path.write_bytes(content)
        try:
            read(path)
        except ValueError as error:
            assert type(error) is ValueError and str(error).startswith(str(path)), error

    try_bytes()


@settings(max_examples=500, deadline=None, derandomize=True, database=None)
@given(
    st.text(max_size=40)
    | st.lists(st.sampled_from(["a", ": ", "- ", "\n", "&a ", "*a", "!!int ", "!!set ", "{", "]", "<<", "? "])).map(
        "".join
    )
)
def test_any_text_is_yaml_or_refused(text: str) -> None:
    for parse in (parse_yaml, parse_json):
        try:
            parse(text, "x")
        except ValueError as error:
            assert type(error) is ValueError and str(error).startswith("x"), error
