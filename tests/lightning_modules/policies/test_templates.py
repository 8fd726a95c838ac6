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
        # Tags that are no pair are no part of the prompt that is drawn, and miss the format.
        ("<answer>a red cat on a mat", "a red cat on a mat", False),
        ("Sure! <answer>a red cat", "a red cat", False),
        ("a red cat</answer>", "a red cat", False),
        ("a red cat</answer> Enjoy!", "a red cat", False),
        ("</answer>a red cat", "a red cat", False),
        ("<answer>a red cat<answer>", "a red cat", False),
        ("<answer>a red cat</ans", "a red cat", False),
        ("<answer>a red cat <", "a red cat", False),
        ("<ANSWER>cat</ANSWER>", "cat", False),
        ("<answer>cat</Answer>", "cat", False),
        ("< answer >cat< / answer >", "cat", False),
        ("<answer>red <ANSWER>cat</answer>", "cat", False),
        ("<answer><answer>cat</answer></answer>", "cat", True),
        ("<answer>I <3 cats</answer>", "I <3 cats", True),
        ("I <3 cats", "I <3 cats", False),
        ("<answer>", "the original", False),
        # Thinking is no answer.
        ("<think>maybe <answer>a dog</answer> hm", "the original", False),
        ("<think>maybe a dog", "the original", False),
        ("<answer>a dog</answer> <think>or a cat", "the original", False),
        ("plan</think> a red cat", "a red cat", False),
        ("<answer>a dog</answer> no</think> a red cat", "a red cat", False),
        ("<think>hm</think>", "the original", False),
        ("<think>\n\n</think>\n<answer>cat</answer>", "cat", True),
        ("<answer>a dog</answer></think><answer>cat</answer>", "cat", True),
        ("<think>a</think><answer>a dog</answer><think>b</think><answer>cat</answer>", "cat", True),
        ("<think>a<think>b</think>c</think><answer>cat</answer>", "cat", True),
        ("<think>a<think>b</think><answer>cat</answer>", "cat", True),
        ("<think>a</think><answer>a dog</answer><think>b", "the original", False),
        ("<THINK>a dog</Think> <answer>cat</answer>", "cat", True),
        ("<thinking><answer>a dog</answer></thinking>a red cat", "a red cat", False),
        ("<reasoning>a dog</reasoning>\n<answer>cat</answer>", "cat", True),
        ("[THINK]<answer>a dog</answer>[/THINK]a red cat", "a red cat", False),
        ("<seed:think><answer>a dog</answer></seed:think>a red cat", "a red cat", False),
        ("◁think▷<answer>a dog</answer>◁/think▷a red cat", "a red cat", False),
        ("◁think▷<answer>a dog</answer>", "the original", False),
        ("<answer>a sign that reads [THOUGHT]</answer>", "a sign that reads [THOUGHT]", True),
        ("<answer>a <think>dog</think> red cat</answer>", "red cat", False),
        ("<think>a</think> <answer>a red cat</answ", "a red cat", False),
        ("", "the original", False),
        (" \n", "the original", False),
    ],
)
def test_parse_answer(text: str, rewrite: str, formatted: bool) -> None:
    assert parse_answer(text, "the original") == (rewrite, formatted)
