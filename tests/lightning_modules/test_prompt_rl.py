"""The joint step: groups, rewards, advantages, gradients, guards, and that it learns."""

from __future__ import annotations

import csv
import logging
import warnings
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from datamodules.base import PromptSample
from lightning_modules.objectives import FlowGRPO, RatioNormalization
from lightning_modules.policies.base import LoRA, Policy
from lightning_modules.policies.flow import Sampling
from lightning_modules.policies.flux1 import Flux1Policy
from lightning_modules.policies.language import LanguagePolicy
from lightning_modules.prompt_rl import PromptRL
from lightning_modules.rl.schedule import Window
from lightning_modules.rl.sde import SDEType
from lightning_modules.rollout import Rollout
from lightning_modules.seeding import generators_for, seed_of
from miniature.scenes.prompts import ShapesPrompts
from rewards.base import Reward, RewardBatch, Score
from tests.lightning_modules.objectives.batches import batch_of
from tests.lightning_modules.policies.test_flux1 import perturb

MakeFlow = Callable[..., Flux1Policy]
MakeLanguage = Callable[..., LanguagePolicy]


class Redness(Reward):
    """Mean red minus mean of green and blue, -1..1."""

    name = "redness"

    def __call__(self, batch: RewardBatch) -> list[Score]:
        """Scores images by colour alone."""
        means = [np.asarray(image, dtype=float).mean((0, 1)) / 255 for image in batch.images]
        values = [float(red - (green + blue) / 2) for red, green, blue in means]
        return [Score(value, value, value) for value in values]


class Listed(Reward):
    """Gives out listed values; None is a failed score. Remembers what it was asked about."""

    name = "listed"

    def __init__(self, values: Sequence[float | None]) -> None:
        self.values = values
        self.prompts: list[str] = []

    def __call__(self, batch: RewardBatch) -> list[Score]:
        """One value an image."""
        self.prompts = [sample.prompt for sample in batch.samples]
        return [Score.invalid("scorer down") if v is None else Score(v, v, v) for v in self.values]


class Collector(L.Callback):
    """Keeps what every step logged."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        """Copies the step's metrics."""
        self.steps.append({k: float(v) for k, v in trainer.callback_metrics.items()})


def fit(module: PromptRL, tmp_path: Path, steps: int, *callbacks: L.Callback, **data: Any) -> list[dict[str, float]]:
    collector = Collector()
    trainer = L.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        default_root_dir=tmp_path,
        callbacks=[*callbacks, collector],
        use_distributed_sampler=False,
    )
    trainer.fit(module, ShapesPrompts(**({"train_prompts": 24, "batch_size": 2} | data)))
    return collector.steps


def attach(module: PromptRL) -> PromptRL:
    """Gives a module a trainer and its optimizer, so that `collect` and `update` can be called by hand."""
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.strategy.connect(module)
    module.trainer = trainer
    module.configure_model()
    trainer.strategy.setup_optimizers(trainer)
    module.log_dict = lambda *args, **kwargs: None  # type: ignore[method-assign,assignment]
    return module


def gradients(module: PromptRL) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}


def test_a_group_keeps_m_originals_and_is_judged_by_the_original(
    make_flow: MakeFlow, make_language: MakeLanguage, samples: list[PromptSample]
) -> None:
    reward = Listed([0.0, 1.0] * 8)
    module = attach(PromptRL(make_flow(), reward, make_language(), group_size=4, num_retained=1, images_per_prompt=2))
    rollout = module.collect(samples[:2])
    assert rollout.completions is not None and len(rollout.completions) == 6
    for group, sample in enumerate(samples[:2]):
        prompts = rollout.prompts[8 * group : 8 * group + 8]
        assert prompts[:2] == [sample.prompt] * 2
        assert prompts[2::2] == prompts[3::2] == rollout.completions.rewrites[3 * group : 3 * group + 3]
    assert reward.prompts == [samples[0].prompt] * 8 + [samples[1].prompt] * 8
    assert len(rollout.images) == 16 and rollout.rewards.shape == (2, 8)


def test_rewards_and_advantages_by_hand(
    make_flow: MakeFlow, make_language: MakeLanguage, samples: list[PromptSample]
) -> None:
    """Group of 4, m = 2, formats 1 and 0: retained ones get 0.5. Rewards 0.5+1, 0.5+0, 1+1, 0+0.

    Mean 1, population std sqrt((0.25 + 0.25 + 1 + 1) / 4) = 0.790569; advantages 0.5, -0.5, 1, -1 over that.
    """
    language = make_language()
    module = attach(PromptRL(make_flow(), Listed([1.0, 0.0, 1.0, 0.0]), language, group_size=4, num_retained=2))
    refine = language.refine

    def with_formats(*args: Any) -> Any:
        completions = refine(*args)
        object.__setattr__(completions, "formatted", torch.tensor([1.0, 0.0]))
        return completions

    language.refine = with_formats  # type: ignore[method-assign]
    rollout = module.collect(samples[:1])
    torch.testing.assert_close(rollout.rewards, torch.tensor([[1.5, 0.5, 2.0, 0.0]]))
    expected = torch.tensor([[0.5, -0.5, 1.0, -1.0]]) / (0.625**0.5 + 1e-4)
    torch.testing.assert_close(rollout.advantages, expected)
    torch.testing.assert_close(rollout.language_advantages, expected[0, 2:])


def test_each_rewrite_gets_the_mean_of_its_images_advantages(
    make_flow: MakeFlow, make_language: MakeLanguage, samples: list[PromptSample]
) -> None:
    values = [0.0, 0.0, 1.0, 0.0, 1.0, 1.0]  # two of the original, two of each rewrite
    module = attach(
        PromptRL(make_flow(), Listed(values), make_language(), 3, 1, images_per_prompt=2, format_weight=0.0)
    )
    rollout = module.collect(samples[:1])
    assert rollout.language_advantages is not None
    expected = torch.tensor([0.5 * (1 + 0) - 0.5, 1.0 - 0.5]) / (0.5 + 1e-4)
    torch.testing.assert_close(rollout.language_advantages, expected, atol=1e-6, rtol=0)


def test_failed_scores_are_masked_and_never_zero(make_flow: MakeFlow, samples: list[PromptSample]) -> None:
    values = [1.0, None, 3.0, None, None, None, 5.0, None]
    module = attach(PromptRL(make_flow(), Listed(values), None, group_size=4, num_retained=4))
    rollout = module.collect(samples[:2])
    expected = torch.tensor([[-1.0, 0.0, 1.0, 0.0], [0.0] * 4]) / (1 + 1e-4)  # one valid sample is no group
    torch.testing.assert_close(rollout.advantages, expected)
    assert rollout.valid.tolist() == [[True, False, True, False], [False, False, True, False]]


def test_stops_when_nothing_can_be_scored(make_flow: MakeFlow, tmp_path: Path) -> None:
    module = PromptRL(make_flow(), Listed([None] * 4), None, 2, 2, max_invalid_steps=2)
    with pytest.raises(ValueError, match=r"no image could be scored in 2 steps in a row .* scorer down"):
        fit(module, tmp_path, 5)


@pytest.mark.slow
@pytest.mark.parametrize("lora", [None, LoRA(rank=4, alpha=8)], ids=["full", "lora"])
def test_micro_batches_add_up_to_the_full_batch(
    make_flow: MakeFlow, make_language: MakeLanguage, samples: list[PromptSample], lora: LoRA | None
) -> None:
    """The accumulated gradient of uneven micro-batches equals the gradient of all samples at once."""
    flow, language = make_flow(lora=lora, kl_weight=0.01), make_language(lora=lora, kl_weight=0.01)
    module = attach(PromptRL(flow, Redness(), language, group_size=4, num_retained=2))
    rollout = module.collect(samples[:2])
    found = []
    for flow_size, language_size in ((None, None), (3, 1)):
        flow.micro_batch_size, language.micro_batch_size = flow_size, language_size
        torch.manual_seed(0)
        before = {n: p.detach().clone() for n, p in module.named_parameters()}
        module.update(rollout)
        found.append(gradients(module))
        for name, parameter in module.named_parameters():
            parameter.data.copy_(before[name])
    whole, parts = found
    assert whole.keys() == parts.keys() and sum(g.abs().sum() for g in whole.values()) > 0
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], atol=2e-6, rtol=1e-3)


def test_on_policy_gradient_is_the_policy_gradient(make_flow: MakeFlow, samples: list[PromptSample]) -> None:
    """Independent reference: minus the advantage-weighted mean log-prob, differentiated."""
    flow = make_flow(max_grad_norm=1e9)
    module = attach(PromptRL(flow, Redness(), None, group_size=4, num_retained=4))
    rollout = module.collect(samples[:2])
    parameters = [p for p in flow.parameters() if p.requires_grad]
    log_probs = torch.stack(
        [flow.replay(rollout.trajectory, k).log_prob(rollout.trajectory.next_latents[:, k]) for k in range(3)], 1
    )
    expected = torch.autograd.grad(
        -(rollout.advantages.flatten()[:, None] * log_probs).mean(), parameters, allow_unused=True
    )
    module.update(rollout)
    for parameter, gradient in zip(parameters, expected, strict=True):
        if gradient is not None:
            torch.testing.assert_close(parameter.grad, gradient, atol=1e-6, rtol=1e-4)


@pytest.mark.slow
def test_a_second_update_on_a_rollout_is_clipped_against_the_first(
    make_flow: MakeFlow, make_language: MakeLanguage, samples: list[PromptSample]
) -> None:
    flow = make_flow(learning_rate=1e-3)
    module = attach(PromptRL(flow, Redness(), make_language(), 4, 2, updates_per_rollout=2))
    rollout = module.collect(samples[:2])
    first = rollout.trajectory.log_probs
    stats = module.update(rollout).compute()
    assert stats["train/flow/max_abs_log_ratio"] > 1e-3  # the second update saw a policy that had moved
    assert 0 < stats["train/flow/clip_fraction"] <= 0.5  # at most the second of the two
    module.updates_per_rollout = 1
    assert module.update(module.collect(samples[:2])).compute()["train/flow/max_abs_log_ratio"] == 0
    assert torch.equal(first, rollout.trajectory.log_probs)


@pytest.mark.parametrize("kl_weight", [0.0, 0.1])
def test_groups_that_say_nothing_cost_nothing(
    make_flow: MakeFlow, samples: list[PromptSample], monkeypatch: pytest.MonkeyPatch, kl_weight: float
) -> None:
    """The second group's rewards are equal: it has no surrogate, but a KL; the first group's gradient is the same."""
    flow = make_flow(
        kl_weight=kl_weight, max_grad_norm=1e9, micro_batch_size=2, rollout_batch_size=8, learning_rate=0.0
    )
    perturb(flow)
    module = attach(PromptRL(flow, Listed([0.0, 1.0, 2.0, 3.0, 1.0, 1.0, 1.0, 1.0]), None, 4, 4))
    rollout = module.collect(samples[:2])
    replays: list[int] = []
    replay = flow.replay
    monkeypatch.setattr(flow, "replay", lambda part, step: (replays.append(len(part)), replay(part, step))[1])
    stats = module.update(rollout).compute()
    found = gradients(module)
    assert stats["train/flow/silent"] == (0.5 if kl_weight == 0 else 0)
    assert sum(replays) == (4 if kl_weight == 0 else 2 * 8) * len(rollout.trajectory.sde_steps)
    if kl_weight == 0:  # twice the loss of the first group alone, which is a mean over half as many
        module.update(rollout.groups(slice(0, 1)))
        for name, gradient in gradients(module).items():
            torch.testing.assert_close(2 * found[name], gradient)


def test_a_step_that_says_nothing_moves_weights_as_a_gradient_of_zeros_does(
    make_flow: MakeFlow, samples: list[PromptSample]
) -> None:
    """Weight decay alone, not an agent that was left out."""
    flow = make_flow(learning_rate=0.1, weight_decay=0.5)
    module = attach(PromptRL(flow, Listed([1.0] * 4), None, 4, 4))
    before = {name: weight.detach().clone() for name, weight in module.named_parameters() if weight.requires_grad}
    stats = module.update(module.collect(samples[:1])).compute()
    assert stats["train/flow/silent"] == 1 and stats["train/flow/grad_norm"] == 0
    for name, weight in module.named_parameters():
        if weight.requires_grad:
            torch.testing.assert_close(weight, before[name] * (1 - 0.1 * 0.5))


def test_a_rollout_of_too_few_prompts_is_not_split(make_flow: MakeFlow, tmp_path: Path) -> None:
    module = PromptRL(make_flow(), Redness(), None, 2, 2, num_minibatches=3)
    with pytest.raises(ValueError, match=r"`model.num_minibatches` is 3, but a rollout has 2 prompts a process"):
        fit(module, tmp_path, 1)


def test_learning_rates_follow_their_schedules(make_flow: MakeFlow, tmp_path: Path) -> None:
    """A warm-up over three optimizer steps times a decay over four; both steps of a rollout count."""
    decay = partial(torch.optim.lr_scheduler.PolynomialLR, total_iters=4)
    module = PromptRL(
        make_flow(learning_rate=0.01), Redness(), None, 2, 2, num_minibatches=2, lr_scheduler=decay, warmup_steps=3
    )
    steps = fit(module, tmp_path, 4)
    factors = [1 / 3, 2 / 3 * 0.75, 0.5, 0.25]
    assert [step["train/flow/learning_rate"] for step in steps] == pytest.approx(
        [0.01 * sum(factors[:2]) / 2, 0.01 * sum(factors[2:]) / 2], rel=1e-5
    )
    assert module.trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0, abs=1e-9)


def test_a_schedule_that_waits_for_a_loss_is_refused(make_flow: MakeFlow, tmp_path: Path) -> None:
    plateau: Any = torch.optim.lr_scheduler.ReduceLROnPlateau
    with pytest.raises(ValueError, match=r"`model.lr_scheduler` is ReduceLROnPlateau.*counts steps"):
        fit(PromptRL(make_flow(), Redness(), None, 2, 2, lr_scheduler=plateau), tmp_path, 1)


@pytest.mark.parametrize("normalization", [True, "over_dt"])
def test_grpo_guard_weighs_all_updates_alike(
    make_flow: MakeFlow, samples: list[PromptSample], normalization: RatioNormalization
) -> None:
    """With a learning rate of 0 the policy stays where it was, and so does the gradient, KL included."""
    flow = make_flow(learning_rate=0.0, max_grad_norm=1e9, kl_weight=0.1)
    perturb(flow)  # away from the reference
    module = attach(
        PromptRL(
            flow, Redness(), None, 4, 4, updates_per_rollout=3, objective=FlowGRPO(ratio_normalization=normalization)
        )
    )
    norms: list[torch.Tensor] = []
    optimizer: Any = module.optimizers()
    optimizer.optimizer.register_step_pre_hook(
        lambda *_: norms.append(torch.cat([g.flatten() for g in gradients(module).values()]).norm())
    )
    module.update(module.collect(samples[:2]))
    assert norms[0] > 1e-3
    torch.testing.assert_close(torch.stack(norms), norms[0].expand(3), rtol=1e-5, atol=0)


def test_later_updates_in_bf16_see_the_weights_that_earlier_ones_left(
    make_flow: MakeFlow, make_language: MakeLanguage, samples: list[PromptSample]
) -> None:
    """A training step is one autocast context, whose cache of bf16 weights must not outlive an optimizer step."""
    found = []
    for cached in (True, False):
        torch.manual_seed(0)
        flow, language = make_flow(learning_rate=0.05), make_language(learning_rate=0.05, clip_range=10.0)
        module = attach(PromptRL(flow, Listed([0.0, 1.0, 3.0, 1.0]), language, 4, 2, updates_per_rollout=2))
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=cached):
            module.update(module.collect(samples[:1]))
        found.append(gradients(module))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[1])


def test_the_kl_of_every_third_step(
    make_flow: MakeFlow, make_language: MakeLanguage, samples: list[PromptSample], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps 0 and 3 have the gradient of three times the KL, the others none, and no call of a reference."""
    found: dict[tuple[float, int, int], dict[str, torch.Tensor]] = {}
    logged: dict[tuple[float, int, int], set[str]] = {}
    calls: list[str] = []
    reference = Policy.reference
    monkeypatch.setattr(Policy, "reference", lambda agent: (calls.append(agent.agent), reference(agent))[1])
    for kl_weight, kl_every in ((0.1, 3), (3 * 0.1, 1), (0.0, 1)):
        torch.manual_seed(0)
        shared: dict[str, Any] = {"kl_weight": kl_weight, "kl_every": kl_every, "learning_rate": 0.0}
        flow, language = make_flow(max_grad_norm=1e9, **shared), make_language(max_grad_norm=1e9, **shared)
        perturb(flow), perturb(language)
        module = attach(PromptRL(flow, Listed([0.0, 1.0, 3.0, 1.0]), language, 4, 2))
        torch.manual_seed(0)
        rollout = module.collect(samples[:1])
        progress = module.trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress.total
        for step in (0, 1, 3, 5):
            calls.clear()
            progress.completed = step  # as in a resumed run
            logged[kl_weight, kl_every, step] = {name for name in module.update(rollout).compute() if "kl" in name}
            found[kl_weight, kl_every, step] = gradients(module)
            assert set(calls) == ({"flow", "language"} if kl_weight and step % kl_every == 0 else set())
    for step in (0, 1, 3, 5):
        expected = (3 * 0.1, 1, 0) if step % 3 == 0 else (0.0, 1, 0)
        ours, theirs = found[0.1, 3, step], found[expected]
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
        assert logged[0.1, 3, step] == logged[expected]
    one, other = found[0.1, 3, 0], found[0.1, 3, 1]
    assert {name.split(".")[0] for name in one if not torch.equal(one[name], other[name])} == {"flow", "language"}
    with pytest.raises(ValueError, match=r"^model.flow has kl_every=0, use at least 1\.$"):
        make_flow(kl_every=0)


@pytest.mark.parametrize("sde_type", ["flow_sde", "dance_sde", "cps"])
def test_units_of_the_kl_and_the_weight_of_a_step(make_flow: MakeFlow, sde_type: SDEType) -> None:
    """Sigmas of the table of 4 steps; Flow-CPS's variance is no rate, so that its KL is the same in both units."""
    flow = make_flow(sampling=Sampling(4, [0, 2], sde_type=sde_type), kl_weight=1.0)
    trajectory = flow.rollout(["a red square", "a blue circle"], [1, 2])
    perturb(flow)
    advantages, nothing = torch.tensor([1.0, -1.0]), torch.zeros(2)
    for number, step in enumerate((0, 2)):
        dt = flow.sigmas(4)[step] - flow.sigmas(4)[step + 1]
        flow.kl_units = "step"
        whole = FlowGRPO().loss(flow, batch_of(trajectory, nothing), number, None).loss
        flow.kl_units = "flow_grpo"
        theirs = FlowGRPO().loss(flow, batch_of(trajectory, nothing), number, None).loss
        torch.testing.assert_close(theirs, whole if sde_type == "cps" else whole * dt)
        guarded, weighted = (
            FlowGRPO(kind).loss(flow, batch_of(trajectory, advantages), number, None).loss - theirs
            for kind in (True, "over_dt")
        )
        torch.testing.assert_close(weighted, guarded / dt)


def test_idle_clipping_is_said(make_flow: MakeFlow, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for updates, said in ((1, True), (2, False)):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            fit(PromptRL(make_flow(), Redness(), None, 2, 2, updates_per_rollout=updates), tmp_path, 1)
        assert ("Clipping is idle" in caplog.text) == said


def test_the_guard_measures_every_so_many_rollouts_and_is_logged_beside_them(
    make_flow: MakeFlow, tmp_path: Path
) -> None:
    """Not every so many optimizer steps, of which a rollout has three here."""
    module = PromptRL(make_flow(), Redness(), None, 2, 2, updates_per_rollout=3, check_ratio_every=2)
    logger = CSVLogger(tmp_path)
    trainer = L.Trainer(
        max_steps=15,
        accelerator="cpu",
        logger=logger,
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        use_distributed_sampler=False,
    )
    trainer.fit(module, ShapesPrompts(train_prompts=24, batch_size=1))
    rows = list(csv.DictReader((Path(logger.log_dir) / "metrics.csv").open()))
    assert [row["step"] for row in rows if row["train/flow/max_log_ratio"]] == ["0", "2", "4"]
    assert [row["step"] for row in rows if row["reward"]] == ["0", "1", "2", "3", "4"]


def test_the_guard_has_a_limit_of_its_own(make_flow: MakeFlow, samples: list[PromptSample]) -> None:
    """However tight the clip range, which does nothing at one update a rollout."""
    flow = make_flow(sampling=Sampling(8, 3, clip_range=1e-8), max_log_ratio=1e-5)
    module = attach(PromptRL(flow, Redness(), None, 4, 4))
    rollout = module.collect(samples[:2])
    object.__setattr__(rollout.trajectory, "log_probs", rollout.trajectory.log_probs + 5e-6)
    assert module.check_ratio(rollout)["flow"] == pytest.approx(5e-6, rel=0.1)
    flow.max_log_ratio = 1e-6
    with pytest.raises(ValueError, match="more than its `max_log_ratio` 1e-06"):
        module.check_ratio(rollout)


def test_the_guard_measures_zero_and_stops_a_rollout_of_another_policy(
    make_flow: MakeFlow, make_language: MakeLanguage, samples: list[PromptSample]
) -> None:
    flow, language = make_flow(), make_language()
    module = attach(PromptRL(flow, Redness(), language, 4, 2))
    rollout = module.collect(samples[:2])
    found = module.check_ratio(rollout)
    assert found["flow"] == 0 and found["language"] < 1e-5
    flow.guidance = 4.0
    with pytest.raises(ValueError, match="the flow policy is not on-policy: .* more than its `max_log_ratio` 1e-05"):
        module.check_ratio(rollout)
    flow.guidance, language.temperature = 3.5, 1.3
    with pytest.raises(ValueError, match="the language policy is not on-policy"):
        module.check_ratio(rollout)


@pytest.mark.slow
@pytest.mark.parametrize("frozen", ["flow", "language"])
def test_an_agent_without_learning_rate_does_not_move(
    make_flow: MakeFlow, make_language: MakeLanguage, tmp_path: Path, frozen: str
) -> None:
    rates = {"flow": 1e-3, "language": 1e-3} | {frozen: None}
    module = PromptRL(
        make_flow(learning_rate=rates["flow"]), Redness(), make_language(learning_rate=rates["language"]), 4, 2
    )
    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    fit(module, tmp_path, 2)
    moved = {n.split(".")[0] for n, p in module.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {"flow", "language"} - {frozen}


@pytest.mark.slow
@pytest.mark.parametrize("lora", [None, LoRA(rank=16, alpha=32)], ids=["full", "lora"])
def test_flow_rl_raises_a_simple_reward(make_flow: MakeFlow, tmp_path: Path, lora: LoRA | None) -> None:
    rate = 3e-4 if lora is None else 3e-3
    module = PromptRL(make_flow(learning_rate=rate, lora=lora, sampling=Sampling(4, 2)), Redness(), None, 8, 8)
    rewards = [step["reward"] for step in fit(module, tmp_path, 16, batch_size=4)]
    assert np.mean(rewards[-4:]) > np.mean(rewards[:4]) + 0.03


@pytest.mark.slow
def test_prompt_rl_raises_a_simple_reward_by_words_alone(
    make_flow: MakeFlow, make_language: MakeLanguage, tmp_path: Path
) -> None:
    """The frozen flow model cannot change, so whatever reddens the images is the refiner's doing."""
    language = make_language(learning_rate=2e-3, kl_weight=0.0)
    module = PromptRL(
        make_flow(learning_rate=None, sampling=Sampling(4, 1)), Redness(), language, 8, 2, format_weight=0.0
    )
    rewards = [step["reward"] for step in fit(module, tmp_path, 16, batch_size=4)]
    assert np.mean(rewards[-4:]) > np.mean(rewards[:4]) + 0.02


@pytest.mark.parametrize(("sde_steps", "first"), [([2, 4], 2), (Window(2, 3, 5), 3), (Window(1, 0, 1), 0)])
def test_samples_of_one_prompt_share_their_start(
    make_flow: MakeFlow,
    make_language: MakeLanguage,
    samples: list[PromptSample],
    monkeypatch: pytest.MonkeyPatch,
    sde_steps: Any,
    first: int,
) -> None:
    """Two of four samples are the original: their Euler steps before the first SDE step are taken once."""
    rows: list[int] = []
    flow = make_flow(sampling=Sampling(6, sde_steps, share_start=True), micro_batch_size=4)
    velocity = flow.velocity
    monkeypatch.setattr(
        flow, "velocity", lambda latents, *more: (rows.append(len(latents)), velocity(latents, *more))[1]
    )
    module = attach(PromptRL(flow, Listed([0.0, 1.0, 3.0, 1.0]), make_language(), 4, 2))
    torch.manual_seed(0)
    rollout = module.collect(samples[:2])
    pairs = [(row // 4, prompt) for row, prompt in enumerate(rollout.prompts)]
    starts = list(dict.fromkeys(pairs))
    assert pairs[0] == pairs[1] and 2 < len(starts) < len(pairs) == 8
    assert sum(rows) == first * len(starts) + (6 - first) * len(pairs)
    assert module.check_ratio(rollout)["flow"] == 0
    latents, sigmas = rollout.trajectory.latents[:, 0], flow.sigmas(6)
    for row, pair in enumerate(pairs):
        others = [other for other in range(8) if torch.equal(latents[row], latents[other])]
        assert others == [other for other in range(8) if pairs[other] == pair]
        seed = seed_of("start", module.seed, 0, samples[pair[0]].id, pair[1])
        expected, conditioning = flow.prepare_latents(generators_for([seed])), flow.encode([pair[1]])
        for step in range(first):
            with torch.no_grad():
                drift = flow.velocity(expected, sigmas[step], conditioning)
            expected = expected + drift * (sigmas[step + 1] - sigmas[step])
        torch.testing.assert_close(latents[row], expected[0], atol=1e-5, rtol=1e-5)
    assert not torch.equal(rollout.trajectory.final[0], rollout.trajectory.final[1])
    flow.sampling = replace(flow.sampling, share_start=False)
    apart = module.collect(samples[:2]).trajectory.latents[:, 0]
    assert not torch.equal(apart[0], apart[1])


@pytest.mark.parametrize("sde_steps", [3, 0, [0, 2]])
def test_without_euler_steps_there_is_nothing_to_share(sde_steps: Any) -> None:
    with pytest.raises(ValueError, match=r"^model.flow.sampling has share_start, but `sde_steps` is .* to share\.$"):
        Sampling(6, sde_steps, share_start=True)


def test_the_last_trajectories_are_gone_while_the_next_are_drawn(make_flow: MakeFlow, tmp_path: Path) -> None:
    flow = make_flow()
    module = PromptRL(flow, Listed([0.0, 1.0] * 2), None, 2, 2)
    rollout, kept, shown = flow.rollout, [], []

    def watched(*args: Any, **kwargs: Any) -> Any:
        assert not [trajectory for trajectory in kept if trajectory() is not None]
        trajectory = rollout(*args, **kwargs)
        kept.append(weakref.ref(trajectory))
        return trajectory

    flow.rollout = watched  # type: ignore[method-assign]
    looks = L.pytorch.callbacks.LambdaCallback(on_train_batch_end=lambda *_: shown.append(module.latest is not None))
    fit(module, tmp_path, 3, looks)
    assert len(kept) == 3 and shown == [True] * 3


def test_updates_of_a_rollout_part_by_part(make_flow: MakeFlow, samples: list[PromptSample]) -> None:
    """`Trajectory.rows` is consistent with itself: what DDP's shares add up to (see test_distributed)."""
    module = attach(PromptRL(make_flow(), Redness(), None, 4, 4))
    rollout: Rollout = module.collect(samples[:2])
    part = rollout.trajectory.rows(slice(4, 8))
    assert len(part) == 4 and torch.equal(part.conditioning["embeds"], rollout.trajectory.conditioning["embeds"][4:])


def test_settings_that_cannot_work_say_what_to_do(make_flow: MakeFlow, make_language: MakeLanguage) -> None:
    flow, language = make_flow(), make_language()
    with pytest.raises(ValueError, match="`model.num_retained` is 8 of `model.group_size` 8, which leaves the refiner"):
        PromptRL(flow, Redness(), language, 8, 8)
    with pytest.raises(ValueError, match="`model.language` is null, but `model.num_retained` 2 is less than"):
        PromptRL(flow, Redness(), None, 8, 2)
    with pytest.raises(ValueError, match="a group needs at least 2 samples"):
        PromptRL(flow, Redness(), None, 1, 1)
    flow.learning_rate = None
    with pytest.raises(ValueError, match="nothing learns"):
        PromptRL(flow, Redness(), None, 8, 8).require_learner()


def test_prompts_and_rewrites_that_are_cut_off_are_counted(
    make_flow: MakeFlow, make_language: MakeLanguage, tmp_path: Path
) -> None:
    """T5 reads two words here, its end being a token too, and all of them with the miniature's own 18 tokens."""

    def step(length: int) -> float:
        module = PromptRL(make_flow(max_sequence_length=length), Redness(), make_language(), 3, num_retained=1)
        (logged,) = fit(module, tmp_path, 1)
        return logged["refine/cut"]

    said = (
        r"only the beginning of long prompts: 24 of 24 in training \(such as id 'train-00000'\), \d+ of .* in geneval"
    )
    with pytest.warns(UserWarning, match=said) as warned:
        assert step(3) == 1.0
    assert sum("only the beginning" in str(one.message) for one in warned) == 1
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "the text encoders")
        assert step(18) == 0.0
