"""The refiner's user message, and how its answer is parsed."""

from __future__ import annotations

from typing import NamedTuple

from rewards.format import broken_answer, format_reward, last_answer

GENERAL = """Rewrite the following prompt for an image generator. Keep every object, number, colour, position and \
quoted text that it asks for, and add concrete visual detail that helps to draw it.
Prompt: {prompt}
Give only the rewritten prompt, inside <answer> </answer>."""


class Answer(NamedTuple):
    """A parsed completion: the prompt to draw, and whether the format was kept."""

    rewrite: str
    formatted: bool


def fill(template: str, prompt: str) -> str:
    """Puts a prompt into a template at `{prompt}`; other braces stay as they are."""
    return template.replace("{prompt}", prompt)


def parse_answer(text: str, original: str) -> Answer:
    """Takes the rewrite from a completion (PromptRL, arXiv 2602.01382, Sec. 3).

    The last `<answer>...</answer>` after the thinking counts. Without one the text is the rewrite, without tags and
    thinking; an empty answer (or an empty text) leaves the original prompt. Both miss the format.

    >>> parse_answer("I say <answer>a red cat</answer>", "a cat")
    Answer(rewrite='a red cat', formatted=True)
    >>> parse_answer("plan</think> a red cat", "a cat")
    Answer(rewrite='a red cat', formatted=False)
    >>> parse_answer("<answer>a red cat on a mat", "a cat")
    Answer(rewrite='a red cat on a mat', formatted=False)
    >>> parse_answer("<think>maybe <answer>a dog</answer> hm", "a cat")
    Answer(rewrite='a cat', formatted=False)
    """
    answer = last_answer(text)
    rewrite = broken_answer(text) if answer is None else answer
    return Answer(rewrite or original, formatted=format_reward(text) == 1.0)
