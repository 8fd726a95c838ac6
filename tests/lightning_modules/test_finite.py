"""Losses, gradients, weights and settings that are not finite: skipped, named, counted, refused, never saved."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from datamodules.base import PromptSample
from lightning_modules.agents import NotFinite
from lightning_modules.policies.base import LoRA
from lightning_modules.policies.flow import Sampling
from lightning_modules.policies.flux1 import Flux1Policy
from lightning_modules.policies.flux2 import Flux2KleinPolicy
from lightning_modules.policies.language import LanguagePolicy
from lightning_modules.policies.sd3 import SD3Policy
from lightning_modules.policies.z_image import ZImagePolicy
from lightning_modules.prompt_rl import PromptRL
from tests.lightning_modules.test_prompt_rl import Redness, attach, fit

MakeFlow = Callable[..., Flux1Policy]
MakeLanguage = Callable[..., LanguagePolicy]


class Spoiled(L.Callback):
    """Sets one element of one gradient of an agent to NaN in some steps, on one rank."""

    def __init__(self, agent: str, steps: set[int], rank: int = 0) -> None:
        self.agent = agent
        self.steps = steps
        self.rank = rank
        self.weights: list[torch.Tensor] = []

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Hangs a hook on the agent's first weight."""
        weight = next(p for p in getattr(pl_module, self.agent).parameters() if p.requires_grad)

        def spoil(gradient: torch.Tensor) -> torch.Tensor:
            if trainer.global_step in self.steps and trainer.global_rank == self.rank:
                gradient = gradient.clone()
                gradient.view(-1)[0] = math.nan
            return gradient

        weight.register_hook(spoil)
        self.weights = [weight.detach().clone()]

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        """Keeps the weight after every step."""
        weight = next(p for p in getattr(pl_module, self.agent).parameters() if p.requires_grad)
        self.weights.append(weight.detach().clone())


@pytest.mark.parametrize("agent", ["flow", "language"])
def test_a_gradient_that_is_not_finite_is_skipped_named_and_counted(
    make_flow: MakeFlow, make_language: MakeLanguage, tmp_path: Path, agent: str
) -> None:
    """The other agent learns on; AdamW's momentum and weight decay do not move the one that is skipped."""
    flow = make_flow(learning_rate=1e-3, weight_decay=0.1, sampling=Sampling(4, 2))
    module = PromptRL(flow, Redness(), make_language(learning_rate=1e-3), 4, 2)
    spoiled = Spoiled(agent, {1})
    with pytest.warns(UserWarning, match=rf"step 1: the gradient of the {agent} agent is not finite \(prompts train-"):
        steps = fit(module, tmp_path, 3, spoiled)
    other = "language" if agent == "flow" else "flow"
    assert [step[f"train/{agent}/skipped"] for step in steps] == [0, 1, 0]
    assert [step[f"train/{other}/skipped"] for step in steps] == [0, 0, 0]
    before, first, second, third = spoiled.weights
    assert torch.equal(first, second) and not torch.equal(before, first) and not torch.equal(second, third)
    assert all(parameter.isfinite().all() for parameter in module.parameters())


def test_too_many_bad_steps_in_a_row_end_the_run(make_flow: MakeFlow, tmp_path: Path) -> None:
    module = PromptRL(make_flow(sampling=Sampling(4, 2)), Redness(), None, 2, 2, max_bad_steps=2)
    spoiled = Spoiled("flow", {0, 2, 3, 4})
    with pytest.raises(NotFinite, match=r"of the flow agent was not finite in 2 steps in a row .*max_bad_steps"):
        fit(module, tmp_path, 9, spoiled)
    assert len(spoiled.weights) == 1 + 3  # the fourth step ended it


def test_a_sample_without_a_finite_log_prob_is_named(make_flow: MakeFlow, samples: list[PromptSample]) -> None:
    """The velocity of one prompt alone is NaN: its image is no score, and the update is skipped in its name."""
    module = attach(PromptRL(make_flow(sampling=Sampling(4, 2)), Redness(), None, 2, 2))
    velocity = module.flow.velocity
    rollout = module.collect(samples[:3])

    def broken(latents: torch.Tensor, *args: Any) -> torch.Tensor:
        found = velocity(latents, *args)
        return torch.where((torch.arange(len(found)) == 2).view(-1, *[1] * (found.ndim - 1)), math.nan, found)

    module.flow.velocity = broken  # type: ignore[method-assign]
    with pytest.warns(UserWarning, match=rf"the loss of the flow agent is not finite \(prompts {samples[1].id}\)"):
        stats = module.update(rollout).compute()
    assert stats["train/flow/skipped"] == 1
    drawn = module.collect(samples[:3])
    assert drawn.valid.tolist() == [[True, True], [False, True], [True, True]]
    assert drawn.scores[2].detail["reason"] == "its pixels are not finite"


def test_a_model_that_draws_nothing_ends_the_run(make_flow: MakeFlow, tmp_path: Path) -> None:
    """Weights so large that every pixel overflows: no image has a score, whatever the reward says of black ones."""
    flow = make_flow(sampling=Sampling(4, 2))
    with torch.no_grad():
        flow.network.proj_out.weight.mul_(1e38)
    module = PromptRL(flow, Redness(), None, 2, 2, max_invalid_steps=2, check_ratio_every=100)
    with pytest.raises(ValueError, match="no image could be scored in 2 steps in a row .* its pixels are not finite"):
        fit(module, tmp_path, 9, Spoiled("flow", set()))


def test_weights_that_are_not_finite_are_not_saved(make_flow: MakeFlow) -> None:
    module = PromptRL(make_flow(), Redness(), None, 2, 2)
    state = {name: value.clone() for name, value in module.state_dict().items()}
    module.on_save_checkpoint({"state_dict": state})
    next(p for p in module.flow.parameters() if p.requires_grad).data.view(-1)[0] = math.inf
    with pytest.raises(NotFinite, match="1 of .* trained weights are not finite, for example flow"):
        module.on_save_checkpoint({"state_dict": module.state_dict()})
    for average, current in ((module.state_dict(), state), (state, module.state_dict())):  # as EMA leaves them
        with pytest.raises(NotFinite):
            module.on_save_checkpoint({"state_dict": average, "current_model_state": current})


@pytest.mark.parametrize(
    "settings",
    [
        {"learning_rate": -1.0},
        {"learning_rate": 1000.0},
        {"learning_rate": math.nan},
        {"weight_decay": math.inf},
        {"kl_weight": -0.1},
        {"max_grad_norm": 0.0},
        {"max_grad_norm": math.nan},
        {"max_log_ratio": math.nan},
        {"betas": (-0.9, 0.99)},
        {"betas": (0.9, 1.0)},
        {"lora": LoRA(alpha=0)},
        {"lora": LoRA(rank=0)},
        {"micro_batch_size": 0},
    ],
)
@pytest.mark.parametrize("agent", ["flow", "language"])
def test_settings_of_an_agent_that_cannot_train_are_refused(agent: str, settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"model\.{agent}(\.lora)? has "):
        if agent == "flow":
            Flux1Policy("miniature/flow", Sampling(4, 2), **settings)
        else:
            LanguagePolicy("miniature/language", **settings)


@pytest.mark.parametrize("settings", [{"guidance": math.nan}, {"guidance": -1.0}, {"max_sequence_length": 0}])
def test_settings_of_an_image_model_that_cannot_draw_are_refused(settings: dict[str, Any]) -> None:
    (name, value), *_ = settings.items()
    with pytest.raises(ValueError, match=f"model.flow has {name}={value}"):
        Flux1Policy("miniature/flow", Sampling(4, 2), **settings)
    renamed = {"guidance": "guidance_scale"}.get(name, name)
    for family in (SD3Policy, Flux2KleinPolicy, ZImagePolicy):
        with pytest.raises(ValueError, match=f"model.flow has {renamed}={value}"):
            family("x", Sampling(4, 2), **{renamed: value})


@pytest.mark.parametrize(
    "settings",
    [{"clip_range": math.nan}, {"noise_level": -1.0}, {"num_steps": 0}, {"noise_level": 1.5, "sde_type": "cps"}],
)
def test_settings_of_a_sampler_that_cannot_train_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"model.flow.sampling has {next(iter(settings))}="):
        Sampling(**({"num_steps": 4, "sde_steps": 2} | settings))


@pytest.mark.parametrize(
    "settings", [{"task_weight": math.inf}, {"format_weight": math.nan}, {"updates_per_rollout": 0}]
)
def test_settings_of_a_step_that_cannot_train_are_refused(make_flow: MakeFlow, settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"model has {next(iter(settings))}="):
        PromptRL(make_flow(), Redness(), None, 2, 2, **settings)
