"""`FunctionReward`: a plain function of prompts and images as a reward."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

from rewards.arguments import OnFailure, check_on_failure
from rewards.base import Reward, RewardBatch, Score, as_score, checked_list

PlainReward = Callable[[list[str], list[Any], list[dict[str, Any]]], Sequence[Any]]
"""(B prompts, B images, B metadata) -> B numbers or `Score`s; None is an image that could not be scored."""


class FunctionReward(Reward):
    """A reward of a few lines: a function that gets the original prompts, the images and the samples' metadata.

    Args:
        function: import path of it, such as `my_rewards.redness` for `my_rewards.py` in the current folder. It returns
            a number (or a `Score`) for each image; None, NaN or infinity where it failed.
        groupwise: gives the function all images of a prompt's group in one call, as pairwise judges need them.
        name: name in the logs; null is the function's own.
        on_failure: what is done if the function raises or returns something else: `fail` stops the run with a
            checkpoint, `skip` leaves out the images that it fails on.
    """

    def __init__(
        self, function: str, groupwise: bool = False, name: str | None = None, on_failure: OnFailure = "fail"
    ) -> None:
        check_on_failure("FunctionReward", on_failure)
        self.on_failure = on_failure
        self.function = function
        self.groupwise = groupwise
        self.score = find(function)
        self.name = name or function.rpartition(".")[2]

    @property
    def version(self) -> str:
        """Names the function by its path; what it computes is not part of it."""
        return f"function {self.function}"

    def __call__(self, batch: RewardBatch) -> list[Score]:
        """Scores B images."""
        prompts = [sample.prompt for sample in batch.samples]
        values = self.score(prompts, list(batch.images), [sample.metadata for sample in batch.samples])
        values = checked_list(values, self.function, len(batch))
        failed = Score.invalid(f"{self.function} returned None")
        return [failed if value is None else as_score(value, self.function) for value in values]


def find(path: str) -> PlainReward:
    """Imports a function.

    Raises:
        ValueError: if there is no such module, no such function in it, or it cannot be called.
    """
    module_name, _, name = path.rpartition(".")
    if not module_name:
        raise ValueError(
            f"FunctionReward has function={path!r}, use an import path, such as my_rewards.{path or 'score'}."
        )
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # a module that the user's own imports
        raise ValueError(
            f"FunctionReward has function={path!r}, but there is no module {error.name!r}: put {error.name}.py into "
            "the current folder, or its folder on PYTHONPATH."
        ) from None
    found: Any = getattr(module, name, None)
    if not callable(found):
        raise ValueError(f"FunctionReward has function={path!r}, but {module.__file__} has no function {name!r}.")
    return found  # type: ignore[no-any-return]
