"""What several processes cost: bytes of each at the paper's sizes, and images a second of two against one.

    python -m benchmarks.system.scale memory [--processes 8]
    python -m benchmarks.system.scale efficiency [--steps 8] [--prompts 4 --micro-batch 16]

`memory` shares FLUX.1-dev and Qwen2.5-VL-3B (shapes alone, in the paper's settings) out over processes of which only
one is there, and counts the bytes that this one has of weights, gradients, AdamW's state and references; then it prints
preflight's estimate of a step's peak. `efficiency` trains the small world with one torch thread a process and the same
work in each: 1 is twice the images of one process in the same time. Two processes need two free cores. What sharding
costs there is a time for every call of a layer, whatever it computes, so that it shrinks with larger micro-batches.
Two processes `alone` are two runs that do not know of each other: what they lose, the machine's memory loses.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import socket
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.plugins.environments import LightningEnvironment
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from benchmarks.system.recipes import configured
from lightning_modules.distributed import local_part
from lightning_modules.policies.flow import Sampling
from lightning_modules.policies.flux1 import Flux1Policy
from lightning_modules.policies.language import LanguagePolicy
from lightning_modules.policies.sharding import repeated_layers
from lightning_modules.preflight.estimate import Setting, estimate
from lightning_modules.preflight.meta_models import flow_on_meta, language_on_meta
from lightning_modules.prompt_rl import PromptRL
from miniature.scenes.detector import ShapesDetector
from miniature.scenes.prompts import ShapesPrompts
from rewards.geneval.reward import GenEvalReward

GIB = 2**30


def memory(processes: int) -> None:
    """Prints the bytes that one of several processes holds."""
    dist.init_process_group("fake", rank=0, world_size=processes, store=FakeStore())
    mesh = init_device_mesh("cpu", (processes,))
    with tempfile.TemporaryDirectory() as folder:
        files = ["geneval/flux1_promptrl.yaml"]
        module, config = configured(files, "FLUX.1-dev", "Qwen2.5-VL-3B", Path(folder))
        assert module.language is not None
        parts = {"weights": 0, "gradients": 0, "AdamW": 0, "references": 0}
        for policy in (flow_on_meta(module.flow), language_on_meta(module.language)):  # type: ignore[arg-type]
            networks: dict[str, Any] = {"weights": policy.network, "references": policy._frozen_copy}
            for kind, network in networks.items():
                for layer in [*repeated_layers(network), network]:
                    fully_shard(layer, mesh=mesh)
                for parameter in network.parameters():
                    size = local_part(parameter).nbytes
                    parts[kind] += size
                    parts["gradients"] += size if parameter.requires_grad else 0
                    parts["AdamW"] += 2 * size if parameter.requires_grad else 0
        print(f"FLUX.1-dev and Qwen2.5-VL-3B, all weights, {processes} processes; GiB that each holds:")
        for name, size in parts.items():
            print(f"  {name}: {size / GIB:.1f}")
        print(f"  sum: {sum(parts.values()) / GIB:.1f}")
        setting = Setting(config.data.init_args.batch_size, num_devices=processes, autocast=torch.bfloat16)
        for name, shards in (("ddp", 1), ("sharded", processes)):
            found = estimate(module, Setting(**vars(setting) | {"shards": shards}))
            print(f"preflight, {name}: lasting {found.persistent_total / GIB:.1f}, peak {found.total / GIB:.1f}")


class StepTimes(L.Callback):
    """Keeps the seconds of every step but the first two, which warm up."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._start = 0.0

    def on_train_batch_start(self, *args: Any) -> None:
        """Notes when the step began."""
        self._start = time.perf_counter()

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        """Keeps the time since then."""
        if trainer.global_step > 2:
            self.seconds.append(time.perf_counter() - self._start)


def train(strategy: str, processes: int, options: argparse.Namespace) -> float:
    """Trains the small world in forked processes; returns the median seconds of a step."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    seconds = context.SimpleQueue()
    started = [
        context.Process(target=_train, args=(strategy, processes, options, rank, port, seconds))
        for rank in range(processes)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join()
    if any(process.exitcode for process in started):
        sys.exit(f"{strategy} with {processes} processes ended with {[process.exitcode for process in started]}")
    return max(seconds.get() for _ in started)


def _train(strategy: str, processes: int, options: argparse.Namespace, rank: int, port: int, seconds: Any) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": "0"}
    together = strategy != "alone"
    if together:
        os.environ |= {"LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
    sizes: dict[str, Any] = {"height": 32, "width": 32, "max_sequence_length": 18}
    sizes["micro_batch_size"] = options.micro_batch
    flow = Flux1Policy("miniature/flow", Sampling(8, 3), dtype="float32", learning_rate=1e-4, **sizes)
    text: dict[str, Any] = {"template": "{prompt}", "max_new_tokens": 32}
    language = LanguagePolicy("miniature/language", dtype="float32", learning_rate=1e-4, **text)
    times = StepTimes()
    trainer = L.Trainer(
        accelerator="cpu",
        devices=processes if together else 1,
        strategy=strategy if together else "auto",
        plugins=[LightningEnvironment()],
        max_steps=options.steps + 2,
        limit_val_batches=0,
        use_distributed_sampler=False,
        callbacks=[times],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = PromptRL(flow, GenEvalReward(ShapesDetector()), language, check_ratio_every=1000)
    trainer.fit(module, ShapesPrompts(train_prompts=options.prompts * 16, batch_size=options.prompts))
    seconds.put(statistics.median(times.seconds))


def efficiency(options: argparse.Namespace) -> None:
    """Prints images a second of two processes against twice those of one, in turns."""
    torch.set_num_threads(1)
    found: dict[tuple[str, int], list[float]] = {}
    for _ in range(2):
        for strategy, processes in (("alone", 1), ("alone", 2), ("ddp", 2), ("sharded", 2)):
            found.setdefault((strategy, processes), []).append(train(strategy, processes, options))
    one = min(found["alone", 1])
    print("| strategy | processes | s a step | images a second | efficiency |\n|---|---|---|---|---|")
    for (strategy, processes), seconds in found.items():
        best = min(seconds)
        speed = 8 * options.prompts * processes / best
        print(f"| {strategy} | {processes} | {best:.2f} | {speed:.1f} | {one / best:.2f} |")


def main() -> None:
    """Runs one of the two."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("memory", "efficiency"))
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--prompts", type=int, default=4, help="prompts of each process a step, of eight images each")
    parser.add_argument("--micro-batch", type=int, default=16)
    options = parser.parse_args()
    memory(options.processes) if options.what == "memory" else efficiency(options)


if __name__ == "__main__":
    main()
