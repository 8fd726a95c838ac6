"""Encoded texts kept on the CPU: the same conditioning for every family, fewer calls of the text encoders."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from lightning_modules.policies import pipeline
from lightning_modules.policies.flow import Sampling
from lightning_modules.policies.pipeline import PipelinePolicy
from lightning_modules.policies.text_cache import TextCache
from lightning_modules.preflight.estimate import Setting, estimate
from lightning_modules.prompt_rl import PromptRL
from lightning_modules.rollout import Conditioning
from tests.lightning_modules.policies.family import PROMPTS, Family, Red
from tests.lightning_modules.policies.test_families import every_family, folders
from tests.lightning_modules.policies.tiny_flux1 import FLUX1

__all__ = ["folders"]
pytestmark = pytest.mark.slow

MIB = 1 / 1024
"""GiB of a cache that holds all texts of a test."""


def same(one: Conditioning, other: Conditioning) -> bool:
    """Returns True if two conditionings have the same bits."""
    return one.tensors.keys() == other.tensors.keys() and all(
        torch.equal(one[name], other[name]) and one.tensors[name].dtype == other.tensors[name].dtype
        for name in one.tensors
    )


def count_calls(policy: PipelinePolicy) -> list[int]:
    """Returns a list that gets the number of rows of each call of a text encoder."""
    calls: list[int] = []
    for name, part in policy._frozen_parts().items():
        if name.startswith("text_encoder"):
            part.register_forward_hook(lambda _, args, kwargs, out: calls.append(len(out[0])), with_kwargs=True)
    return calls


@every_family
def test_conditioning_is_the_same_with_and_without(
    family: Family, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three texts, two of them again with a new one, all again: only new texts reach an encoder, or move it."""
    plain = family.load(folders[family.name], Sampling(4, 2), micro_batch_size=1)
    cached = family.load(folders[family.name], Sampling(4, 2), text_cache_gib=MIB, offload=True)
    moved: list[nn.Module] = []
    on_device = pipeline.on_device

    @contextmanager
    def recorded(modules: Sequence[nn.Module], device: torch.device) -> Any:
        moved.extend(modules)
        with on_device(modules, device):
            yield

    monkeypatch.setattr(pipeline, "on_device", recorded)
    calls, images = count_calls(cached), family.images(3) or [None] * 3
    sources: list[Any] = [*images, images[0]]
    texts = [*PROMPTS, "a green cross"]
    found = []
    for rows in ([0, 1, 2, 0], [2, 3, 0], [0, 1, 2, 0], [3, 1]):
        some = [sources[row] for row in rows] if family.sources else None
        calls.clear(), moved.clear()
        ours = cached.encode([texts[row] for row in rows], some)
        assert same(ours, plain.encode([texts[row] for row in rows], some))
        encoders = sum(part is not cached.pipe.vae for part in moved)
        found.append((len(calls) > 0, encoders > 0, cached.pipe.vae in moved))
    assert found == [(True, True, family.sources)] * 2 + [(False, False, family.sources)] * 2
    assert {tensor.device.type for kept in cached.texts._kept.values() for tensor in kept.values()} == {"cpu"}


@every_family
def test_another_source_is_another_text(family: Family, folders: dict[str, Path]) -> None:
    """An encoder that sees the source image gets it again, unless it has the same pixels."""
    if not family.sources:
        pytest.skip("draws from text alone")
    policy = family.load(folders[family.name], Sampling(4, 2), text_cache_gib=MIB)
    plain = family.load(folders[family.name], Sampling(4, 2), micro_batch_size=1)
    images = family.images(2)
    assert images is not None
    for image in (images[0], images[1], images[0]):
        assert same(policy.encode(PROMPTS[:1], [image]), plain.encode(PROMPTS[:1], [image]))
    calls = count_calls(policy)
    policy.encode(PROMPTS[:1] * 2, [image.copy() for image in images])
    assert not calls
    policy.encode(PROMPTS[:1], [Image.new("RGB", images[0].size)])
    assert calls


def test_texts_encoded_in_another_precision_are_others(folders: dict[str, Path]) -> None:
    """As in an evaluation beside training in bf16-mixed."""
    policy, plain = (FLUX1.load(folders["flux1"], Sampling(4, 2), text_cache_gib=gib) for gib in (MIB, 0))
    for enabled in (True, False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            found, expected = policy.encode(PROMPTS[:1]), plain.encode(PROMPTS[:1])
        assert same(found, expected)
    assert policy.texts is not None and len(policy.texts._kept) == 2


def test_the_text_not_asked_for_the_longest_goes_first() -> None:
    """Texts of 40 bytes in a cache of 100: a third one replaces the one that was not asked for since."""
    cache, made = TextCache(100), []

    def ask(text: str) -> float:
        def encode() -> dict[str, torch.Tensor]:
            made.append(text)
            return {"embeds": torch.full((1, 9), float(ord(text))), "mask": torch.ones(1, 1)}

        return float(cache(text, encode)["embeds"][0, 8])

    assert [ask(text) for text in "abacabb"] == [ord(text) for text in "abacabb"]
    assert made == list("abcb") and cache.bytes == 80 and "a" in cache and "c" not in cache
    assert TextCache(30)("a", lambda: {"embeds": torch.ones(1, 9)})["embeds"].sum() == 9, "larger than the cache"


def test_the_cache_is_checked_and_estimated(folders: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match=r"^model.flow has text_cache_gib=-1, use at least 0\.$"):
        FLUX1.policy(str(folders["flux1"]), Sampling(4, 2), text_cache_gib=-1)
    kept = {}
    for gib in (0, 1):
        policy = FLUX1.policy(str(folders["flux1"]), Sampling(4, 2), height=32, width=32, text_cache_gib=gib)
        module = PromptRL(policy, Red(), None, 2, 2)
        kept[gib] = [estimate(module, Setting(cuda=cuda)).per_step.get("text cache, at most") for cuda in (True, False)]
    assert kept == {0: [None, None], 1: [None, 2**30]}
