"""What `gpu.py` measures: each case builds a model of random weights and yields rows of figures."""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning as L
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from transformers import GenerationConfig

from benchmarks.system.published import random_weights
from benchmarks.system.recipes import configured, recipe
from datamodules.sample import PromptSample
from lightning_modules.preflight.estimate import CUDA_CONTEXT, Setting, estimate
from lightning_modules.prompt_rl import PromptRL
from rewards.base import Reward, RewardBatch, Score

ROOT = Path(__file__).parents[2]
Row = dict[str, Any]
"""Figures by name; `setting` says which variant of the case they are of."""

PROMPT = "a photo of two red apples left of a blue ceramic bowl on a wooden table"
GROUP = 8
"""Images of a step, which has one prompt."""
TOKENS = 64
"""Tokens of a rewrite within a step: decoding is measured by itself, in the case `decoding`."""


class Constant(Reward):
    """Takes 10 ms an image, whatever it shows, and prefers every second one, whatever the batches."""

    def __init__(self) -> None:
        self.values = itertools.cycle([0.0, 1.0])

    def __call__(self, batch: RewardBatch) -> Sequence[Score]:
        """Scores the images."""
        time.sleep(0.01 * len(batch))
        return [Score(value, value, value) for _, value in zip(batch.images, self.values, strict=False)]


@dataclass(frozen=True)
class Variant:
    """A setting that needs no other weights.

    Args:
        micro_batch_size: samples of a forward pass of both agents; None leaves the configuration's.
        backend: attention backend of the flow model; None leaves PyTorch's choice.
    """

    micro_batch_size: int | None = None
    backend: str | None = None

    @property
    def name(self) -> str:
        """Names the setting in the table."""
        if self.backend is not None:
            return self.backend
        return "" if self.micro_batch_size is None else f"micro-batch {self.micro_batch_size}"

    def apply(self, module: PromptRL) -> None:
        """Changes the settings of agents, loaded or not."""
        if self.micro_batch_size is not None:
            for agent in (module.flow, module.language):
                if agent is not None:
                    agent.micro_batch_size = self.micro_batch_size
        if self.backend is not None:
            module.flow.network.set_attention_backend(self.backend)


@dataclass(frozen=True)
class Case:
    """A measurement of one model.

    Args:
        name: name in the table.
        seconds: time that it takes on an H100, guessed; a case that does not fit the time left is skipped.
        measure: yields the rows.
        flow: name of a pipeline in `published.yaml`.
        refiner: name of a refiner in `published.yaml`; empty is flow-only.
        configs: configuration files under `configs/`, later ones laid over earlier ones; null is the recipe for GenEval
            on 80 GB.
        changes: dotted key under `model.init_args` -> value, laid over these.
        source: side of a source image, which editing models get; 0 is none.
        variants: settings to measure, one row each.
    """

    name: str
    seconds: int
    measure: Callable[[Case, Options], Iterator[Row]]
    flow: str = ""
    refiner: str = ""
    configs: tuple[str, ...] | None = None
    changes: dict[str, Any] = field(default_factory=dict)
    source: int = 0
    variants: tuple[Variant, ...] = (Variant(),)


@dataclass(frozen=True)
class Options:
    """How all cases are run.

    Args:
        device: where.
        folder: folder for model folders.
        tiny: takes stand-ins of few weights, and small images.
        log: file for what cases print.
    """

    device: torch.device
    folder: Path
    tiny: bool
    log: Path


# --- models ---------------------------------------------------------------------------------------------------------


def agents(case: Case, options: Options) -> tuple[PromptRL, str]:
    """Builds a case's agents by its configuration files, without loading them; also returns the precision."""
    changes = {"reward": {"class_path": f"{__name__}.Constant"}, "group_size": GROUP, "num_minibatches": 1}
    changes |= {"flow.init_args.sampling.num_steps": 4, "flow.init_args.sampling.sde_steps": 1, "warmup_steps": 0}
    if case.refiner:
        changes |= {"language.init_args.max_new_tokens": TOKENS, "num_retained": GROUP // 4}
    else:
        changes |= {"num_retained": GROUP}
    files = case.configs or recipe(case.flow, 80, "promptrl" if case.refiner else "flow_only")
    folder = options.folder / case.name
    module, config = configured(files, case.flow, case.refiner, folder, changes | case.changes, tiny=options.tiny)
    return module, str(config.trainer.precision)


def estimated(case: Case, options: Options) -> dict[str, int]:
    """Estimates the peak memory of each variant as preflight does: name -> bytes that PyTorch allocates."""
    module, precision = agents(case, options)
    source = (case.source, case.source) if case.source else None
    setting = Setting(source=source, autocast=torch.bfloat16 if precision == "bf16-mixed" else None)
    found = {}
    for variant in case.variants:
        if variant.backend is None:
            variant.apply(module)
            found[variant.name] = estimate(module, setting).total - CUDA_CONTEXT
    return found


class Running:
    """Agents with a trainer around them, whose parts of a step are called by hand."""

    def __init__(self, case: Case, options: Options) -> None:
        self.device = options.device
        if options.tiny:
            torch.compiler.set_default_backend("eager")  # traced alone: C++ takes a minute and a half
        self.module, precision = agents(case, options)
        kind = "gpu" if self.device.type == "cuda" else "cpu"
        self.trainer = L.Trainer(
            accelerator=kind,
            devices=1,
            precision=precision,  # type: ignore[arg-type]
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        self.trainer.strategy.connect(self.module)
        self.module.trainer = self.trainer
        with random_weights(self.device):
            self.module.configure_model()
        if getattr(self.module.flow, "offload", False):
            for part in self.module.flow._frozen_parts().values():  # type: ignore[operator]
                part.to("cpu")
        self.trainer.strategy.model_to_device()
        self.trainer.strategy.setup_optimizers(self.trainer)
        side = min(case.source, 64) if options.tiny else case.source
        image = Image.effect_noise((side, side), 64).convert("RGB") if side else None
        self.samples = [PromptSample("0", PROMPT, "none", {}, image)]

    def step(self) -> Row:
        """Takes one joint step, the guard on: seconds of its parts, log-ratios, and the peak of memory."""
        module = self.module
        module._seconds = {}
        forget_peak(self.device)
        with self.trainer.precision_plugin.train_step_context():
            start = self.now()
            rollout = module.collect(self.samples)
            guarded = self.now()
            ratios = module.check_ratio(rollout)
            guard = self.now() - guarded
            stats = module.update(rollout).compute()
        seconds = dict(module._seconds) | {"step": self.now() - start - guard}
        wrong = [name for name, value in stats.items() if name.endswith("skipped") and value]
        if wrong:
            raise ValueError(f"the update was skipped, since a loss or gradient is not finite: {', '.join(wrong)}")
        return {"seconds": seconds, "log_ratio": ratios, "silent": stats["train/flow/silent"]} | peak(self.device)

    def now(self) -> float:
        """Seconds on a clock, once the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def forget_peak(device: torch.device) -> None:
    """Begins to look for a peak of memory anew."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak(device: torch.device) -> Row:
    """Bytes at the peak, allocated and reserved; nothing on a CPU, where PyTorch does not count."""
    if device.type != "cuda":
        return {}
    return {"peak": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}


# --- measurements -----------------------------------------------------------------------------------------------------


def card(case: Case, options: Options) -> Iterator[Row]:
    """Names what runs, and measures how fast a GPU multiplies two bf16 matrices: other rates are shares of it."""
    names = ("torch", "diffusers", "transformers", "peft", "bitsandbytes")
    yield {"setting": "versions", "figures": {name: version(name) for name in names if find_spec(name)}}
    if options.device.type != "cuda":
        return
    size, times = 8192, 10
    a, b = (torch.randn(size, size, device=options.device, dtype=torch.bfloat16) for _ in range(2))
    product = a @ b
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(times):
        torch.matmul(a, b, out=product)
    torch.cuda.synchronize()
    rate = times * 2 * size**3 / (time.perf_counter() - start) / 1e12
    card = torch.cuda.get_device_properties(0)
    yield {"setting": card.name, "figures": {"GiB": card.total_memory / 2**30, "TFLOP/s": rate}}


def steps(case: Case, options: Options) -> Iterator[Row]:
    """Takes a joint step in each variant, after one that warms up and counts operations."""
    running = Running(case, options)
    case.variants[0].apply(running.module)
    counter = FlopCounterMode(display=False)
    # What is first called under the counter is never compiled.
    with nullcontext() if running.module.flow.compile_blocks else counter:
        running.step()
    for variant in case.variants:
        variant.apply(running.module)
        row = running.step()
        if flops := counter.get_total_flops():
            row["flops"] = flops / row["seconds"]["step"]
        yield {"setting": variant.name, **row}


def attention(case: Case, options: Options) -> Iterator[Row]:
    """Takes a step with each attention backend; one that is not there, or fails, is a row with its error."""
    running = Running(case, options)
    running.step()
    for variant in case.variants:
        try:
            variant.apply(running.module)
            running.step()  # its kernels are chosen, or compiled, at their first call
            yield {"setting": variant.name or "PyTorch's choice", **running.step()}
        except Exception as error:
            yield {"setting": variant.name, "error": one_line(error)}


def precision(case: Case, options: Options) -> Iterator[Row]:
    """Draws the same images in bf16 and, with the same weights, in fp32, and replays the bf16 trajectory in fp32."""
    running = Running(case, options)
    flow, seeds = running.module.flow, list(range(4))
    with torch.no_grad():
        rounded = flow.rollout([PROMPT] * 4, seeds)
        inputs = {k: v.float() if v.is_floating_point() else v for k, v in rounded.conditioning.tensors.items()}
        conditioning = replace(rounded.conditioning, tensors=inputs)
        begun = running.now()
        flow._sample(rounded.conditioning, seeds, flow.sigmas(4), rounded.sde_steps)
        in_bf16 = running.now() - begun
        flow.network.float()
        flow.dtype = torch.float32
        begun = running.now()
        exact = flow._sample(conditioning, seeds, flow.sigmas(4), rounded.sde_steps)
        in_fp32 = running.now() - begun
        replayed = flow.replay(replace(rounded, conditioning=conditioning), 0).log_prob(rounded.next_latents[:, 0])
    figures = {
        "latents apart, share of their norm": ((rounded.final - exact.final).norm() / exact.final.norm()).item(),
        "log-probs of one step apart": (replayed - rounded.log_probs[:, 0]).abs().max().item(),
        "seconds in bf16": in_bf16,
        "seconds in fp32": in_fp32,
    }
    yield {"setting": "bf16 against fp32", "figures": figures}


def decoding(case: Case, options: Options) -> Iterator[Row]:
    """Writes 6 rewrites of each of 8 prompts: as training does, and by transformers' compiled decoding."""
    running = Running(case, options)
    language = running.module.language
    assert language is not None
    length = language.max_new_tokens
    samples = [replace(running.samples[0], id=str(number)) for number in range(8)]

    def timed(write: Callable[[], Any]) -> Row:
        for _ in range(2):  # the first one warms up, or compiles
            forget_peak(options.device)
            start = running.now()
            write()
            seconds = running.now() - start
        return {"seconds": {"refine": seconds}, "figures": {"tokens/s": 48 * length / seconds}, **peak(options.device)}

    yield {"setting": "as training decodes", **timed(lambda: language.refine(samples, 6))}
    ids, mask, _ = language._encode([sample for sample in samples for _ in range(6)])
    static = GenerationConfig(
        max_new_tokens=length, do_sample=True, top_k=0, cache_implementation="static", pad_token_id=0, eos_token_id=None
    )
    with language._plain_generation(), torch.no_grad():
        generate = language.causal_lm.generate
        row = timed(lambda: generate(input_ids=ids, attention_mask=mask, generation_config=static))
    yield {"setting": "static cache, compiled by transformers", **row}


def gpu_tests(case: Case, options: Options) -> Iterator[Row]:
    """Runs the tests marked `gpu`, which skip themselves where there is none."""
    import pytest

    class Outcomes:
        def __init__(self) -> None:
            self.counts: dict[str, int] = {}
            self.failed: list[str] = []

        def pytest_runtest_logreport(self, report: Any) -> None:
            if report.when == "call" or report.outcome != "passed":
                self.counts[report.outcome] = self.counts.get(report.outcome, 0) + 1
                self.failed += [report.nodeid] * (report.outcome == "failed")

    outcomes = Outcomes()
    pytest.main(
        ["-q", "-m", "gpu", "-p", "no:cacheprovider", str(ROOT / "tests/lightning_modules/test_gpu.py")], [outcomes]
    )
    yield {"setting": "tests/lightning_modules/test_gpu.py", "figures": outcomes.counts}
    if outcomes.failed:
        raise AssertionError(f"failed: {', '.join(outcomes.failed)}")


def one_line(error: BaseException) -> str:
    """Shortens an error to its kind and the beginning of what it says, in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
