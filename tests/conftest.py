"""Shared by all tests: one thread, tiny pipelines built in code, and two short runs."""

from __future__ import annotations

import os

# Before torch is imported: two threads in each of two processes are slower than one.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline

from datamodules.base import PromptSample
from lightning_modules.cli import main
from lightning_modules.policies.flow import Sampling
from lightning_modules.policies.flux1 import Flux1Policy
from lightning_modules.policies.language import LanguagePolicy
from miniature.architectures import build_flow, build_vae
from miniature.scenes.prompts import shapes_prompts
from miniature.scenes.wording import vocabulary
from tests.short_runs import short_fit

ROOT = Path(__file__).parent.parent


def pytest_configure(config: pytest.Config) -> None:
    """Keeps pytest-xdist from starting the files with the most tests first, which are not the slowest."""
    config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts files with slow tests first: a slow one that starts last would run alone in the end."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(ROOT)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield


@pytest.fixture(scope="session")
def random_flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A FLUX.1 pipeline folder with random weights and a dynamic-shift scheduler."""
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("random_flux")
    pipe: FluxPipeline = build_flow(vocabulary(), build_vae().eval())
    pipe.vae.register_to_config(scaling_factor=0.9, shift_factor=0.1)
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture
def make_flow() -> Callable[..., Flux1Policy]:
    """Builds and loads a policy on the shipped miniature, or on another folder."""

    def make(model: str | Path = "miniature/flow", sampling: Sampling | None = None, **kwargs: object) -> Flux1Policy:
        defaults: dict[str, object] = {
            "height": 32,
            "width": 32,
            "max_sequence_length": 18,
            "dtype": "float32",
            "learning_rate": 1e-4,
        }
        policy = Flux1Policy(str(model), sampling or Sampling(8, 3), **(defaults | kwargs))  # type: ignore[arg-type]
        policy.load()
        return policy

    return make


@pytest.fixture
def make_language() -> Callable[..., LanguagePolicy]:
    """Builds and loads the shipped miniature's refiner."""

    def make(**kwargs: object) -> LanguagePolicy:
        defaults: dict[str, object] = {
            "template": "{prompt}",
            "max_new_tokens": 32,
            "eval_max_new_tokens": 32,
            "dtype": "float32",
            "learning_rate": 1e-4,
        }
        policy = LanguagePolicy("miniature/language", **(defaults | kwargs))  # type: ignore[arg-type]
        policy.load()
        return policy

    return make


@pytest.fixture(scope="session")
def two_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two runs of two steps and three validations: 8 images a step (PromptRL) and 16 (flow-only)."""
    root = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        for experiment, prompts in (("promptrl", 1), ("flow_only", 2)):
            main(short_fit(root, experiment, prompts))
    return root


@pytest.fixture
def samples() -> list[PromptSample]:
    """Six canonical prompts, one of each tag, of different lengths."""
    return shapes_prompts("test", "val", ("canonical",), 6, 0)
