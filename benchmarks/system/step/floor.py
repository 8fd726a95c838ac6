"""The floor of a step: its own network calls, forward and backward, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache

from lightning_modules.prompt_rl import PromptRL


@dataclass(frozen=True)
class Call:
    """A forward pass as a step made it.

    Attributes:
        run: the network's own function.
        args: positional arguments.
        kwargs: keyword arguments; caches of keys and values are what they were then by name alone.
        with_gradient: True if a backward pass followed.
    """

    run: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    with_gradient: bool


def networks(module: PromptRL) -> Iterator[tuple[Any, str]]:
    """Yields the networks of both agents, each with the name of the function that a step calls."""
    flow: Any = module.flow
    for name, part in flow.pipe.components.items():
        if isinstance(part, nn.Module):
            yield part, "decode" if name == "vae" else "forward"
    if flow._frozen_copy is not None:
        yield flow._frozen_copy, "forward"
    language: Any = module.language
    if language is not None:
        yield language.causal_lm.get_decoder(), "forward"
        yield language.causal_lm.get_output_embeddings(), "forward"
        if language._frozen_copy is not None:
            yield language._frozen_copy.get_decoder(), "forward"
            yield language._frozen_copy.get_output_embeddings(), "forward"


@contextmanager
def recorded(module: PromptRL) -> Iterator[list[Call]]:
    """Context manager: keeps every network call made inside, but not those that a backward pass makes again."""
    calls: list[Call] = []
    inside = False  # a call of a network by a network is a part of it

    def recording(run: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal inside
            if inside or torch._C._current_graph_task_id() != -1:
                return run(*args, **kwargs)
            inside = True
            try:
                result = run(*args, **kwargs)
            finally:
                inside = False
            calls.append(Call(run, _detached(args), _detached(kwargs), any(t.requires_grad for t in _tensors(result))))
            return result

        return call

    with ExitStack() as stack:
        for network, name in networks(module):
            stack.enter_context(patch.object(network, name, recording(getattr(network, name))))
        yield calls


def replay(calls: list[Call]) -> None:
    """Makes recorded calls again, each with its backward pass."""
    caches: dict[int, Cache] = {}
    for call in calls:
        kwargs = {name: _cache(value, call.kwargs, caches) for name, value in call.kwargs.items()}
        with torch.set_grad_enabled(call.with_gradient):
            outputs = [t for t in _tensors(call.run(*call.args, **kwargs)) if t.requires_grad]
        if outputs:
            torch.autograd.backward(outputs[:1], [torch.ones_like(outputs[0])])


def _cache(value: Any, kwargs: dict[str, Any], caches: dict[int, Cache]) -> Any:
    """Puts a cache in the place of a recorded one, with as many rows as the call has."""
    if not isinstance(value, Cache):
        return value
    if id(value) not in caches:
        caches[id(value)] = DynamicCache()
        return caches[id(value)]
    cache: Any = caches[id(value)]
    tokens = kwargs["input_ids"] if kwargs.get("input_ids") is not None else kwargs["inputs_embeds"]
    rows, had = len(tokens), len(cache.layers[0].keys)
    if rows > had:
        cache.batch_repeat_interleave(rows // had)
    elif rows < had:
        cache.batch_select_indices(torch.arange(rows, device=tokens.device))
    return cache


def _detached(value: Any) -> Any:
    """Keeps inputs as they are now: tensors without their graphs, which learn if they did."""
    if isinstance(value, Tensor):
        return value.detach().requires_grad_(value.requires_grad)
    if isinstance(value, dict):
        return {name: _detached(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_detached(one) for one in value)
    return value


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for one in value.values():
            yield from _tensors(one)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _tensors(one)
