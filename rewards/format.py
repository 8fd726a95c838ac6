"""The format reward: 1 if a refiner's completion holds a well-formed answer (PromptRL, arXiv 2602.01382, Sec. 3)."""

from __future__ import annotations

import re

_ANSWER = re.compile(r"<answer>((?:(?!</?answer>).)*)</answer>", re.DOTALL)


def last_answer(text: str) -> str | None:
    """Returns the text inside the last `<answer> </answer>`, stripped; None if there is no such pair.

    >>> last_answer("first <answer>a</answer>, then <answer> b </answer>")
    'b'
    """
    answers = _ANSWER.findall(text)
    return answers[-1].strip() if answers else None


def format_reward(text: str) -> float:
    """Returns 1 for a completion with a well-formed, non-empty answer, else 0.

    >>> [format_reward(text) for text in ("<answer>a red cat</answer>", "a red cat", "<answer> </answer>")]
    [1.0, 0.0, 0.0]
    """
    return float(bool(last_answer(text)))
