"""Measures how much of the scoring hides behind the drawing: time to collect a rollout with and without overlap.

python -m benchmarks.system.scoring_overlap [--repeats 8]

Rewards: the miniature's detector and a real OCR engine (whose scores mean nothing here, only its cost), both in this
process and behind `rewards.serving.server`. The two modes take turns, so that a busy machine disturbs them alike.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from typing import Any

import httpx
import lightning as L
import torch
from rich.console import Console
from rich.table import Table

from datamodules.sample import PromptSample
from lightning_modules.policies.flow import Sampling
from lightning_modules.policies.flux1 import Flux1Policy
from lightning_modules.prompt_rl import PromptRL
from miniature.scenes.detector import ShapesDetector
from miniature.scenes.prompts import shapes_prompts
from rewards.base import Reward
from rewards.geneval.reward import GenEvalReward
from rewards.ocr import OCRReward
from rewards.ocr_engines import RapidOCRReader
from rewards.serving.client import RemoteReward

PROMPTS, GROUP, CHUNK = 2, 8, 4


def module(reward: Reward) -> PromptRL:
    """Builds flow-only RL on the miniature, ready to collect rollouts."""
    sampling = Sampling(num_steps=20, sde_steps=3)
    flow = Flux1Policy(
        "miniature/flow", sampling, height=32, width=32, max_sequence_length=18, dtype="float32", micro_batch_size=CHUNK
    )
    made = PromptRL(flow, reward, None, group_size=GROUP, num_retained=GROUP)
    made.trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    made.trainer.strategy.connect(made)
    made.configure_model()
    return made


def serve(name: str, port: int) -> subprocess.Popen[bytes]:
    """Starts a reward server in a process of its own and waits until it answers.

    Raises:
        RuntimeError: if the server ends before it answers.
    """
    command = [
        sys.executable,
        "-m",
        "rewards.serving",
        "--config",
        f"configs/rewards/{name}.yaml",
        "--port",
        str(port),
    ]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    while process.poll() is None:
        try:
            httpx.get(f"http://127.0.0.1:{port}/v1/health")
            return process
        except httpx.TransportError:
            time.sleep(0.2)
    raise RuntimeError(f"the server of {name} did not start")


def seconds(made: PromptRL, samples: list[PromptSample], overlap: bool) -> float:
    """Returns the seconds that it takes to collect one rollout."""
    made.overlap_scoring = overlap
    start = time.perf_counter()
    made.collect(samples)
    return time.perf_counter() - start


def main() -> None:
    """Prints the median times by reward, with and without overlap."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=8)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    samples: Any = shapes_prompts("bench", "train", ("canonical",), PROMPTS, 0)
    for sample in samples:
        sample.metadata["text"] = ["stop"]
    ocr = OCRReward(RapidOCRReader(limit_side_len=64))
    servers = [serve("shapes", 18180), serve("ocr", 18181)]
    table = Table(title=f"collect {PROMPTS * GROUP} images in chunks of {CHUNK}, median of {repeats}")
    for column in ("reward", "one after the other (s)", "overlapped (s)", "ratio"):
        table.add_column(column, justify="left" if column == "reward" else "right")
    try:
        for name, reward in (
            ("detector, in process", GenEvalReward(ShapesDetector())),
            ("detector, served", RemoteReward("http://127.0.0.1:18180", "geneval")),
            ("OCR at 64 px, in process", ocr),
            ("OCR at 512 px, served", RemoteReward("http://127.0.0.1:18181", "ocr")),
        ):
            made = module(reward)
            times: dict[bool, list[float]] = {False: [], True: []}
            seconds(made, samples, True)  # warms up
            for _ in range(repeats):
                for overlap, found in times.items():
                    found.append(seconds(made, samples, overlap))
            plain, overlapped = (statistics.median(times[overlap]) for overlap in (False, True))
            table.add_row(name, f"{plain:.3f}", f"{overlapped:.3f}", f"{overlapped / plain:.2f}")
    finally:
        for server in servers:
            server.terminate()
    Console().print(table)


if __name__ == "__main__":
    main()
