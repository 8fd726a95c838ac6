"""Shared by all tests: one thread, tiny pipelines built in code, and two short runs."""

from __future__ import annotations

import copy
import functools
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:  # pytest-xdist's own process reads this file too, and needs none of it
    from datamodules.base import PromptSample
    from lightning_modules.policies.flow import Sampling
    from lightning_modules.policies.flux1 import Flux1Policy
    from lightning_modules.policies.language import LanguagePolicy

# Before torch is imported: two threads in each of two processes are slower than one.
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).parent.parent
LONGEST = (
    "tests/lightning_modules/test_sharded.py",
    "tests/notebooks/",
    "tests/lightning_modules/policies/test_families.py",
    "tests/configs/",
    "tests/lightning_modules/preflight/",
    "tests/lightning_modules/sweep/",
    "tests/callbacks/test_kept_images.py",
    "tests/callbacks/test_export.py",
    "tests/lightning_modules/test_resume.py",
    "tests/lightning_modules/cli/test_run_folders.py",
    "tests/lightning_modules/cli/test_demo.py",
    "tests/faults/",
    "tests/rewards/serving/",
)
"""Files that take the most time, the longest first."""


def pytest_configure(config: pytest.Config) -> None:
    """Keeps pytest-xdist from starting the files with the most tests first, which are not the slowest."""
    config.option.loadscopereorder = False
    if not getattr(config.option, "numprocesses", None):
        # A process that runs tests. Lightning's messages look as they do to users if it comes before pytest's logging.
        import lightning.pytorch  # noqa: F401


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the longest files first, then the other slow ones: one that starts last would run alone in the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}

    def turn(item: pytest.Item) -> int:
        name = item.path.relative_to(ROOT).as_posix()
        longest = (number for number, start in enumerate(LONGEST) if name.startswith(start))
        return next(longest, len(LONGEST) + (item.path not in slow))

    items.sort(key=turn)


@pytest.fixture(autouse=True)
def _no_charts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves the charts out of the pages of short fits, but where pages are tested: they take as long as a step."""
    if "slow" in request.keywords and not request.path.is_relative_to(ROOT / "tests/callbacks/reporting"):
        monkeypatch.setattr("callbacks.reporting.page.line_chart", lambda *_, **__: "data:,")


@pytest.fixture(autouse=True)
def _same_start(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    import torch

    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)  # the seed of a command that an earlier test ran
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    written = str(tmp_path_factory.getbasetemp())
    for name in [
        name for name, module in sys.modules.items() if str(getattr(module, "__file__", "")).startswith(written)
    ]:
        del sys.modules[name]  # a module that this test wrote; another test may write one of the same name


@pytest.fixture(autouse=True, scope="session")
def _no_waiting() -> None:
    """Leaves out waits for the disk, of which a fit has 60, and has jsonargparse resolve a protocol's signature once.

    That is a sixth of the time of every parse, in which the same protocols come many times.
    """
    from jsonargparse import _typehints

    os.fsync = lambda file: None
    resolve = functools.cache(_typehints.get_protocol_signature)

    def resolved(*args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        parameters, returned = resolve(*args, **kwargs)
        return [copy.copy(parameter) for parameter in parameters], returned  # callers write in them

    _typehints.get_protocol_signature = resolved


@pytest.fixture(scope="session")
def preloaded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """The start of a command, such as `[*preloaded, "-m", "rewards.serving"]`, in place of `sys.executable`."""
    from tests.forked import Forked
    from tests.preloaded import serve

    folder = tmp_path_factory.mktemp("preloaded")
    server = Forked(lambda: serve(folder / "socket"), folder / "log")
    while not (folder / "socket").exists():
        time.sleep(0.01)
    yield [sys.executable, "-S", str(ROOT / "tests" / "preloaded.py"), str(folder / "socket")]
    server.kill()


@pytest.fixture(scope="session")
def random_flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A FLUX.1 pipeline folder with random weights and a dynamic-shift scheduler."""
    import torch

    from miniature.architectures import build_flow, build_vae
    from miniature.scenes.wording import vocabulary

    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("random_flux")
    pipe = build_flow(vocabulary(), build_vae().eval())
    pipe.vae.register_to_config(scaling_factor=0.9, shift_factor=0.1)
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture
def make_flow() -> Callable[..., Flux1Policy]:
    """Builds and loads a policy on the shipped miniature, or on another folder."""
    from lightning_modules.policies.flow import Sampling
    from lightning_modules.policies.flux1 import Flux1Policy

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
    from lightning_modules.policies.language import LanguagePolicy

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
    from lightning_modules.cli import main
    from tests.short_runs import short_fit

    root = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        for experiment, prompts in (("promptrl", 1), ("flow_only", 2)):
            main(short_fit(root, experiment, prompts))
    return root


@pytest.fixture
def samples() -> list[PromptSample]:
    """Six canonical prompts, one of each tag, of different lengths."""
    from miniature.scenes.prompts import shapes_prompts

    return shapes_prompts("test", "val", ("canonical",), 6, 0)
