"""Measures a joint step against its own network calls (the floor) and against a plain recipe, in turns.

    python -m benchmarks.system.step [--rounds 5] [--only miniature ...] [--cuda]

The floor makes the step's network calls again, forward and backward, and does nothing else. The plain recipe
(`plain.py`) is what reference trainers do. Each round takes all three in turn; seconds are medians of one thread's CPU
time, or of wall time with `--cuda`, which takes models of published sizes with random weights. The last line is JSON:
`step_over_floor`, `speedup_over_plain` and `memory_over_plain` by case, and `head_over_logits`, the peak of the head's
forward and backward pass over the fp32 logits of one chunk.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import yaml
from jsonargparse import ArgumentParser
from lightning import LightningModule
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from benchmarks.system.gpu import cases
from benchmarks.system.gpu.cases import Options
from benchmarks.system.gpu.running import Running
from benchmarks.system.published import MODELS
from benchmarks.system.step.floor import recorded, replay
from benchmarks.system.step.plain import PlainRecipe
from lightning_modules.rl.log_probs import token_log_probs
from miniature.scenes.prompts import ShapesPrompts

FLUX = "FLUX.1-dev"
MIDDLE_FLUX = {
    "num_layers": 3,
    "num_single_layers": 7,
    "num_attention_heads": 8,
    "attention_head_dim": 64,
    "axes_dims_rope": [16, 24, 24],
}
"""A FLUX of 58 million parameters."""
WORDS = 151_936
"""Words of Qwen's vocabulary."""


@dataclass(frozen=True)
class Case:
    """Agents whose step is measured.

    Args:
        flow: published pipeline, or a file under `configs/`, whose agents are taken as they are.
        refiner: published refiner; empty is flow-only.
        changes: dotted key under `model.init_args` -> value.
        sizes: class -> sizes of the small network that stands in for a published one.
        settings: dotted attribute of the loaded agents -> value, where the stand-ins' settings are too small.
        prompts: prompts of a step.
        words: words of each prompt.
    """

    flow: str
    refiner: str = ""
    changes: dict[str, Any] = field(default_factory=dict)
    sizes: dict[str, dict[str, Any]] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    prompts: int = 1
    words: int = 15


GROUP = ("group_size", "num_retained")
FULL = {"flow.init_args.lora": None, "flow.init_args.dtype": "float32"}
CASES = {
    "miniature": Case("miniature/promptrl.yaml", prompts=8),
    "miniature, flow-only": Case("miniature/flow_only.yaml", prompts=8),
    "FLUX, all weights": Case(FLUX, changes=FULL),
    "FLUX, LoRA": Case(FLUX),
    "SD3": Case("SD3.5-medium"),
    "klein": Case("FLUX.2-klein-base-4B"),
    "klein, refiner": Case("FLUX.2-klein-base-4B", "Qwen3-4B"),
    "Qwen-Image": Case("Qwen-Image", changes={"flow.init_args.quantization": None}),
    "FLUX of 58 M, LoRA": Case(
        FLUX,
        sizes={"FluxTransformer2DModel": MODELS["tiny"]["FluxTransformer2DModel"] | MIDDLE_FLUX},
        settings={
            "flow.height": 256,
            "flow.width": 256,
            "group_size": 8,
            "num_retained": 8,
            "flow.micro_batch_size": 4,
        },
    ),
    "refiner of 152 k words": Case(
        FLUX,
        "Qwen3-4B",
        sizes={"Qwen3ForCausalLM": MODELS["tiny"]["Qwen3ForCausalLM"] | {"vocab_size": WORDS, "hidden_size": 256}},
        settings={"language.max_new_tokens": 48, "group_size": 8, "num_retained": 2, "language.micro_batch_size": 4},
        prompts=2,
        words=100,
    ),
}
ON_GPU = ("klein, refiner", "FLUX, LoRA", "klein", "SD3")
"""Cases that fit an 80 GB card with models of published sizes."""


@dataclass(frozen=True)
class Measured:
    """Medians of a case: seconds of step, floor and plain recipe, and the peak bytes of the first and the last."""

    step: float
    floor: float
    plain: float
    step_bytes: int
    plain_bytes: int


def built(case: Case, device: torch.device, folder: Path) -> Running:
    """Loads a case's agents."""
    if case.flow.endswith(".yaml"):
        config = yaml.safe_load(Path("configs", case.flow).read_text(encoding="utf-8"))
        parser = ArgumentParser(exit_on_error=False)
        parser.add_subclass_arguments(LightningModule, "model", fail_untyped=False)
        module = parser.instantiate(parser.parse_object({"model": config["model"]})).model
        samples = ShapesPrompts(train_prompts=case.prompts).train_samples()
        return Running(module, "32-true", device, samples)
    options = Options(device, folder, device.type == "cpu", folder / "log.txt")
    with patch.dict(MODELS["tiny"], case.sizes):
        running = Running.of_case(
            cases.Case(case.flow, 0, _none, case.flow, case.refiner, changes=case.changes), options
        )
    if running.module.language is not None:
        running.module.language.cuda_graphs = False  # the floor makes recorded calls again, of which a graph has none
    for key, value in case.settings.items() if options.tiny else ():
        *path, name = key.split(".")
        if path == ["flow", "sampling"]:
            running.module.flow.sampling = replace(running.module.flow.sampling, **{name: value})
        else:
            setattr(running.module.get_submodule(".".join(path)), name, value)
    first = running.samples[0]
    words = (cases.PROMPT.split() * case.words)[: case.words]
    running.samples = [
        replace(first, id=str(number), prompt=" ".join([*words, str(number)])) for number in range(case.prompts)
    ]
    return running


def _none(case: cases.Case, options: Options) -> Iterator[cases.Row]:
    yield from ()


def measure(case: Case, device: torch.device, rounds: int) -> Measured:
    """Takes step, floor and plain recipe in turns, after one of each that warms up."""
    with tempfile.TemporaryDirectory() as folder:
        running = built(case, device, Path(folder))
        module = running.module
        plain = PlainRecipe(module)

        def step() -> None:
            module.update(module.collect(running.samples))

        with running.trainer.precision_plugin.train_step_context():
            torch.manual_seed(0)
            with recorded(module) as calls:
                step()
            runs = {"step": step, "floor": lambda: replay(calls), "plain": lambda: plain.step(running.samples)}
            seconds: dict[str, list[float]] = {name: [] for name in runs}
            for number in range(rounds + 1):
                for name, run in runs.items():
                    torch.manual_seed(number)
                    taken = timed(run, device)
                    if number:
                        seconds[name].append(taken)
                module.zero_grad()
            peaks = {name: peak_bytes(runs[name], device) for name in ("step", "plain")}
    medians = {name: statistics.median(taken) for name, taken in seconds.items()}
    return Measured(**medians, step_bytes=peaks["step"], plain_bytes=peaks["plain"])


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of CPU time, or of wall time on a GPU."""
    if device.type == "cpu":
        start = time.process_time()
        run()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """Most bytes alive at one time beside those that were there before."""
    if device.type != "cuda":
        return measured_peak(run)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return torch.cuda.max_memory_allocated() - before


def measured_peak(run: Callable[[], object]) -> int:
    """The profiler's account of the CPU's allocator: most bytes at one time beside those that were there."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    assert profiler.profiler is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def head_over_logits(device: torch.device, positions: int = 1024, width: int = 256) -> float:
    """Peak of the head's forward and backward pass, beside inputs and gradients, over the fp32 logits of one chunk."""
    head = torch.nn.Linear(width, WORDS, bias=False, device=device)
    hidden = torch.randn(1, positions, width, device=device, requires_grad=True)
    targets = torch.randint(WORDS, (1, positions), device=device)
    head.weight.grad, hidden.grad = torch.zeros_like(head.weight), torch.zeros_like(hidden)

    def run() -> None:
        token_log_probs(hidden, head, targets, chunk_size=positions).sum().backward()

    # The gradient of the head's weight is made anew before it is added to what is there.
    return (peak_bytes(run, device) - head.weight.nbytes) / (positions * WORDS * 4)


def main() -> None:
    """Prints a table, and JSON in the last line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each case, of which the median is taken")
    parser.add_argument("--only", nargs="+", choices=CASES, metavar="CASE", help=f"cases: {', '.join(CASES)}")
    parser.add_argument("--cuda", action="store_true", help="models of published sizes on a GPU")
    options = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device("cuda" if options.cuda else "cpu")
    names: Sequence[str] = options.only or (ON_GPU if options.cuda else tuple(CASES))
    print(
        "| case | step, s | floor, s | plain, s | step / floor | plain / step | step, MB | plain, MB | plain / step |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    found = {}
    for name in tqdm(names, disable=None):
        one = found[name] = measure(CASES[name], device, options.rounds)
        print(
            f"| {name} | {one.step:.2f} | {one.floor:.2f} | {one.plain:.2f} | {one.step / one.floor:.2f} | "
            f"{one.plain / one.step:.2f} | {one.step_bytes / 1e6:.0f} | {one.plain_bytes / 1e6:.0f} | "
            f"{one.plain_bytes / one.step_bytes:.2f} |",
            flush=True,
        )
    summary = {
        "step_over_floor": {name: round(one.step / one.floor, 3) for name, one in found.items()},
        "speedup_over_plain": {name: round(one.plain / one.step, 3) for name, one in found.items()},
        "memory_over_plain": {name: round(one.plain_bytes / one.step_bytes, 3) for name, one in found.items()},
        "head_over_logits": round(head_over_logits(device), 3),
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
