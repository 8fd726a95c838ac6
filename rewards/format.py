"""The answer in a refiner's completion, and the format reward for it (PromptRL, arXiv 2602.01382, Sec. 3)."""

from __future__ import annotations

import re

_THINK = r"(?:(?:seed:)?think|thinking|thought|reasoning)\s*"
# In square brackets a thought or reasoning is a heading, or a text to draw.
_OPEN_THINKING = re.compile(rf"[<◁]\s*{_THINK}[>▷]|\[think\]", re.IGNORECASE)
_END_THINKING = re.compile(rf"[<◁]\s*/\s*{_THINK}[>▷]|\[/think\]", re.IGNORECASE)
_ANSWER = re.compile(r"<answer>((?:(?!(?i:<\s*/?\s*answer\s*>)).)*)</answer>", re.DOTALL)
_OPEN_ANSWER = re.compile(r"<\s*answer\s*>", re.IGNORECASE)
_END_ANSWER = re.compile(r"<\s*/\s*answer\s*>|</?a?n?s?w?e?r?\s*\Z", re.IGNORECASE)  # whole, or cut off


def is_tag(token: str) -> bool:
    """Returns True for a tag of thinking or of the answer; some tokenizers have them as special tokens."""
    tags = (_OPEN_THINKING, _END_THINKING, _OPEN_ANSWER, _END_ANSWER)
    return any(tag.fullmatch(token) for tag in tags)


def opens_thinking(chat: str) -> bool:
    """Returns True if a chat ends with an open `<think>`, as chat templates of some thinking models do."""
    return any(not chat[tag.end() :].strip() for tag in _OPEN_THINKING.finditer(chat))


def after_thinking(text: str) -> str:
    """Returns what stands after a text's last `</think>` (all of it without one); "" while a `<think>` is open.

    >>> [after_thinking(text) for text in ("plan</think> a red cat", "<think>a</think> b <think>c", "a red cat")]
    [' a red cat', '', 'a red cat']
    """
    rest = _END_THINKING.split(text)[-1]
    return "" if _OPEN_THINKING.search(rest) else rest


def last_answer(text: str) -> str | None:
    """Returns the text inside the last `<answer> </answer>`, stripped; None if there is no such pair.

    Thinking holds no answer.

    >>> last_answer("first <answer>a</answer>, then <answer> b </answer>")
    'b'
    >>> last_answer("<think>maybe <answer>a dog</answer> hm") is None
    True
    """
    answers = _ANSWER.findall(after_thinking(text))
    return answers[-1].strip() if answers else None


def broken_answer(text: str) -> str:
    """Returns the answer of a text without a well-formed one, stripped: after an `<answer>`, before an `</answer>`.

    >>> [broken_answer(text) for text in ("Sure: <answer>a red cat", "a red cat</answer> Done.", "a red cat</ans")]
    ['a red cat', 'a red cat', 'a red cat']
    """
    started = _filled(_OPEN_ANSWER.split(after_thinking(text)))
    ended = _filled(_END_ANSWER.split(started[-1])) if started else []
    return ended[0] if ended else ""


def format_reward(text: str) -> float:
    """Returns 1 for a completion with a well-formed, non-empty answer, else 0.

    >>> [format_reward(text) for text in ("<answer>a red cat</answer>", "a red cat", "<answer> </answer>")]
    [1.0, 0.0, 0.0]
    """
    return float(bool(last_answer(text)))


def _filled(parts: list[str]) -> list[str]:
    return [part.strip() for part in parts if part.strip()]
