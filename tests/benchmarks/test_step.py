"""The step's benchmark: a plain recipe of the same gradients, a floor of the same network calls, JSON at the end."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.system.step import __main__ as step
from benchmarks.system.step.floor import recorded, replay
from benchmarks.system.step.plain import PlainRecipe
from lightning_modules import updates
from lightning_modules.prompt_rl import PromptRL

pytestmark = pytest.mark.slow


def gradients(module: PromptRL) -> dict[str, Tensor]:
    return {name: weight.grad.clone() for name, weight in module.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("name", ["miniature", "SD3"])
def test_the_plain_recipe_has_the_same_gradients(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    running = step.built(step.CASES[name], torch.device("cpu"), tmp_path)
    module, found = running.module, {}
    with running.trainer.precision_plugin.train_step_context():
        rollout = module.collect(running.samples)
        plain = PlainRecipe(module)
        plain.backward(rollout)
        expected = gradients(module)

        def clip(parameters: Sequence[nn.Parameter], max_norm: float) -> Tensor:
            found.update(gradients(module))
            return torch.zeros(())

        monkeypatch.setattr(updates, "clip", clip)
        module.update(rollout)
    assert found.keys() == expected.keys() and len(found) > 10
    scale = max(float(gradient.abs().max()) for gradient in expected.values())
    assert scale > 0
    for key, gradient in found.items():
        torch.testing.assert_close(gradient, expected[key], rtol=1e-3, atol=1e-4 * scale)


def test_a_plain_step_learns(tmp_path: Path) -> None:
    running = step.built(step.CASES["miniature"], torch.device("cpu"), tmp_path)
    before = {name: weight.detach().clone() for name, weight in running.module.named_parameters()}
    PlainRecipe(running.module).step(running.samples)
    moved = {name for name, weight in running.module.named_parameters() if not torch.equal(weight, before[name])}
    assert any(name.startswith("flow.") for name in moved) and any(name.startswith("language.") for name in moved)


def test_the_floor_makes_the_steps_calls(tmp_path: Path) -> None:
    running = step.built(step.CASES["miniature"], torch.device("cpu"), tmp_path)
    module = running.module
    with recorded(module) as calls:
        module.update(module.collect(running.samples))
    counts: Counter[Any] = Counter((getattr(call.run, "__self__", None), call.with_gradient) for call in calls)
    assert counts[module.flow.network, False] == 8  # steps of the sampler; all 64 images at once
    assert counts[module.flow.network, True] == 3  # SDE steps
    assert module.language is not None
    assert counts[module.language.causal_lm.get_decoder(), True] == 1
    module.zero_grad()
    replay(calls)
    learns = [weight for weight in module.parameters() if weight.requires_grad]
    assert sum(weight.grad is not None for weight in learns) > 0.9 * len(learns)


def test_it_ends_with_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["step", "--rounds", "1", "--only", "FLUX, LoRA"])
    monkeypatch.setattr(step, "WORDS", 1000)
    step.main()
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found.keys() == {"step_over_floor", "speedup_over_plain", "memory_over_plain", "head_over_logits"}
    assert found["step_over_floor"]["FLUX, LoRA"] > 0.8 and 0.5 < found["head_over_logits"] < 6
