"""Rewrites written ahead: whose they are, what the refiner learns from them, and that they do not wait for scores."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from datamodules.resumable import EpochSampler, ResumableLoader
from datamodules.sample import PromptSample
from lightning_modules.policies.flux1 import Flux1Policy
from lightning_modules.policies.language import LanguagePolicy
from lightning_modules.prompt_rl import PromptRL
from lightning_modules.rollout import Rollout
from rewards.base import Reward, RewardBatch, Score
from tests.lightning_modules.test_prompt_rl import fit

PROMPTS = [PromptSample(str(number), f"a photo of a red circle {number}", "none", {}) for number in range(6)]


def loader(batch_size: int = 2, *, drop_last: bool = True) -> ResumableLoader:
    sampler = EpochSampler(len(PROMPTS), seed=3)
    return ResumableLoader(
        PROMPTS,
        batch_size,
        sampler=sampler,
        collate_fn=list,
        drop_last=drop_last,  # type: ignore[arg-type]
    )


def ids(samples: Any) -> list[str]:
    return [sample.id for sample in samples]


@pytest.mark.parametrize("size", [2, 4])
def test_the_batch_behind_the_current_one(size: int) -> None:
    """Also before the first one is handed out; none behind the last, nor a short one that is left out."""
    data = loader(size)
    first = data.first_batch()
    batches = []
    after = [data.batch_after(first)]
    for batch in data:
        batches.append(batch)
        after.append(data.batch_after(batch))
    assert ids(batches[0]) == ids(first)
    assert [ids(one) for one in after[1:]] == [ids(one) for one in batches[1:]] + [[]]
    assert ids(after[0]) == (ids(batches[1]) if len(batches) > 1 else [])
    if size == 4:
        whole = loader(size, drop_last=False)
        assert len(whole.batch_after(whole.first_batch())) == 2


class Waiting(Reward):
    """Gives no score before the next step's rewrites are written, if it is told to wait for them."""

    name = "waiting"

    def __init__(self, written: threading.Event | None = None) -> None:
        self.written, self.calls = written, 0

    def __call__(self, batch: RewardBatch) -> list[Score]:
        """Scores by turns."""
        self.calls += 1
        if self.written is not None and self.calls < 3:
            assert self.written.wait(60), "the rewrites wait for the scores"
            self.written.clear()
        return [Score(value, value, value) for value in torch.arange(len(batch)).remainder(3).tolist()]


class Keeping(PromptRL):
    """Keeps the rollouts, and the refiner's weights before each of them."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.rollouts: list[Rollout] = []
        self.weights: list[dict[str, torch.Tensor]] = []

    def update(self, rollout: Rollout) -> Any:
        """Keeps what it is given."""
        assert self.language is not None
        self.rollouts.append(rollout)
        self.weights.append({name: weight.clone() for name, weight in self.language.network.state_dict().items()})
        return super().update(rollout)


def trained(
    make_flow: Callable[..., Flux1Policy],
    make_language: Callable[..., LanguagePolicy],
    reward: Reward,
    tmp_path: Path,
    steps: int = 3,
    **more: Any,
) -> Keeping:
    torch.manual_seed(0)
    language = make_language(learning_rate=1e-2, kl_weight=0.0)
    flow = make_flow(learning_rate=None, micro_batch_size=None)
    module = Keeping(flow, reward, language, group_size=4, num_retained=1, check_ratio_every=1, seed=1, **more)
    fit(module, tmp_path, steps, train_prompts=6)
    return module


def test_the_next_rewrites_are_those_of_the_weights_before_the_update(
    make_flow: Callable[..., Flux1Policy],
    make_language: Callable[..., LanguagePolicy],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """While a score is waited for; the first step is on-policy, the others learn by the ratio to what was sampled."""
    written, calls = threading.Event(), []
    refine = LanguagePolicy.refine

    def told(self: LanguagePolicy, samples: Any, num: int) -> Any:
        found = refine(self, samples, num)
        calls.append(ids(samples))
        if len(calls) > 1:
            written.set()
        return found

    monkeypatch.setattr(LanguagePolicy, "refine", told)
    module = trained(make_flow, make_language, Waiting(written), tmp_path, rewrite_ahead=True)
    assert [one.written_ahead for one in module.rollouts] == [False, True, True]
    assert calls == [ids(one.samples) for one in module.rollouts], "nothing is written twice"
    language = module.language
    assert language is not None
    for step, rollout in enumerate(module.rollouts):
        completions = rollout.completions
        assert completions is not None and len(completions) == 6
        apart = []
        for weights in module.weights[: step + 1][-2:]:  # before the last update, and now
            language.network.load_state_dict(weights)
            with torch.no_grad():
                apart.append((language.log_probs(completions) - completions.log_probs)[completions.mask].abs().max())
        assert apart[0] < 1e-5 and (step == 0 or apart[1] > 1e-3)


def test_the_refiner_learns_by_the_ratio_to_the_weights_that_wrote(
    make_flow: Callable[..., Flux1Policy], make_language: Callable[..., LanguagePolicy], tmp_path: Path
) -> None:
    """Gradient of an update against -A * ratio by hand, token by token, averaged as the paper does."""
    module = trained(make_flow, make_language, Waiting(), tmp_path, rewrite_ahead=True)
    rollout, language = module.rollouts[1], module.language
    assert language is not None and rollout.completions is not None and rollout.language_advantages is not None
    language.network.load_state_dict(module.weights[1])
    language.clip_range = 1e9
    with patch.object(torch.optim.AdamW, "step"):  # what it would step by stays in the gradients
        module.update(rollout)
    learning = {name: weight for name, weight in language.network.named_parameters() if weight.grad is not None}
    ours = {name: weight.grad.clone() for name, weight in learning.items() if weight.grad is not None}
    module.zero_grad()
    mask = rollout.completions.mask
    ratio = (language.log_probs(rollout.completions) - rollout.completions.log_probs).exp()
    per_text = (-ratio * rollout.language_advantages[:, None] * mask).sum(1) / mask.sum(1)
    per_text.mean().backward()
    torch.nn.utils.clip_grad_norm_(learning.values(), language.max_grad_norm)
    for name, weight in learning.items():
        torch.testing.assert_close(ours[name], weight.grad, rtol=1e-3, atol=1e-6)
    assert (ratio - 1)[mask].abs().max() > 1e-3


def test_several_optimizer_steps_and_epochs(
    make_flow: Callable[..., Flux1Policy],
    make_language: Callable[..., LanguagePolicy],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """An epoch's first rewrites are not written ahead, nor are any for a step that does not come."""
    calls = []
    refine = LanguagePolicy.refine

    def counted(self: LanguagePolicy, samples: Any, num: int) -> Any:
        calls.append(ids(samples))
        return refine(self, samples, num)

    monkeypatch.setattr(LanguagePolicy, "refine", counted)
    steps: dict[str, Any] = {"num_minibatches": 2, "updates_per_rollout": 2}
    module = trained(make_flow, make_language, Waiting(), tmp_path, 6 * 4, rewrite_ahead=True, **steps)
    assert [one.written_ahead for one in module.rollouts] == [False, True, True] * 2
    assert calls == [ids(one.samples) for one in module.rollouts] and module.global_step == 6 * 4


def test_without_it_every_step_is_on_policy(
    make_flow: Callable[..., Flux1Policy], make_language: Callable[..., LanguagePolicy], tmp_path: Path
) -> None:
    module = trained(make_flow, make_language, Waiting(), tmp_path)
    assert not any(one.written_ahead for one in module.rollouts) and len(module.rollouts) == 3
