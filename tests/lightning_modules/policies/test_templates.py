"""Filling a template and reading an answer."""

from __future__ import annotations

import pytest

from lightning_modules.policies.templates import GENERAL, fill, parse_answer


def test_fill_leaves_other_braces_alone() -> None:
    assert fill('{"p": "{prompt}"} {x}', "a {cat}") == '{"p": "a {cat}"} {x}'
    assert fill(GENERAL, "a cat").splitlines()[1] == "Prompt: a cat"


@pytest.mark.parametrize(
    ("text", "rewrite", "formatted"),
    [
        ("<answer>red cat</answer>", "red cat", True),
        ("so: <answer>\n a red\ncat </answer> done", "a red\ncat", True),
        ("<answer>one</answer> no, <answer>two</answer>", "two", True),  # the last counts
        ("<answer>one <answer>two</answer>", "two", True),  # an open tag before it does not
        ("<answer>one</answer> <answer>two", "one", True),  # nor one that was cut off
        ("<answer>one</answer></answer>", "one", True),
        ("<answer>one</answer> <answer> </answer>", "the original", False),
        ("<answer></answer>", "the original", False),
        (" a red cat ", "a red cat", False),
        ("a red cat</answer>", "a red cat</answer>", False),
        ("<ANSWER>cat</ANSWER>", "<ANSWER>cat</ANSWER>", False),
        ("", "the original", False),
        (" \n", "the original", False),
    ],
)
def test_parse_answer(text: str, rewrite: str, formatted: bool) -> None:
    assert parse_answer(text, "the original") == (rewrite, formatted)
