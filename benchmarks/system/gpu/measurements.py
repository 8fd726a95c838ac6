"""What cases measure: each function builds models of random weights and yields rows of figures."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import GenerationConfig

from benchmarks.system.gpu.cases import PROMPT, Case, Options, Row
from benchmarks.system.gpu.running import Running, forget_peak, peak
from lightning_modules.distributed import whole
from lightning_modules.prompt_rl import PromptRL

ROOT = Path(__file__).parents[3]


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
    running = Running.of_case(case, options)
    case.variants[0].apply(running.module)
    counter = FlopCounterMode(display=False)
    # What is first called under the counter is never compiled.
    running.step(None if running.module.flow.compile_blocks else counter)
    for variant in case.variants:
        variant.apply(running.module)
        row = running.step()
        if flops := counter.get_total_flops():
            row["flops"] = flops / row["seconds"]["flow_update"]
        yield {"setting": variant.name, **row}


def attention(case: Case, options: Options) -> Iterator[Row]:
    """Takes a step with each attention backend; one that is not there, or fails, is a row with its error."""
    running = Running.of_case(case, options)
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
    running = Running.of_case(case, options)
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


def sharded(case: Case, options: Options) -> Iterator[Row]:
    """Trains the same agents under `ddp` and under `sharded`, one process each, and compares the trained weights."""
    start: dict[str, Tensor] = {}
    trained: dict[str, Tensor] = {}
    for strategy in ("ddp", "sharded"):
        torch.manual_seed(0)
        running = Running.of_case(case, options, strategy)
        start = start or _trained_weights(running.module)
        for _ in range(2):
            row = running.step()
        yield {"setting": strategy, **row}
        weights = _trained_weights(running.module)
        if strategy == "ddp":
            trained = weights
            del running  # both fit no card at the same time
            dist.destroy_process_group()
    yield {
        "setting": "sharded against ddp, after two steps",
        "figures": {
            "largest difference of a trained weight": max(_distances(weights, trained)),
            "largest change of a trained weight": max(_distances(start, trained)),
        },
    }


def _trained_weights(module: PromptRL) -> dict[str, Tensor]:
    named = module.named_parameters()
    return {name: whole(weight.detach()).float().cpu().clone() for name, weight in named if weight.requires_grad}


def _distances(one: dict[str, Tensor], other: dict[str, Tensor]) -> Iterator[float]:
    for name, weight in one.items():
        yield (weight - other[name]).abs().max().item()


def decoding(case: Case, options: Options) -> Iterator[Row]:
    """Writes 6 rewrites of each of 8 prompts: as training does, kernel by kernel, and compiled by transformers."""
    running = Running.of_case(case, options)
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

    for graphs, name in ((True, "as training decodes, a CUDA graph"), (False, "cuda_graphs: false")):
        language.cuda_graphs = graphs
        yield {"setting": name, **timed(lambda: language.refine(samples, 6))}
    ids, mask, _ = language._encode([sample for sample in samples for _ in range(6)])
    static = GenerationConfig(
        max_new_tokens=length, do_sample=True, top_k=0, cache_implementation="static", pad_token_id=0, eos_token_id=None
    )
    # The folder's own would fill in all that a call leaves unsaid.
    with patch.object(language.causal_lm, "generation_config", GenerationConfig()), torch.no_grad():
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
