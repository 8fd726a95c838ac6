"""Step time and memory against the sizes of a step, beside what its network calls take.

    python -m benchmarks.system.step.growth [--rounds 3] [--plot docs/images/growth.png]

One size is doubled twice, the others stay. Seconds are medians of one thread's CPU time; the exponent is the slope of
seconds over the size, both as logarithms: 1 is linear.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.ticker import LogLocator
from tqdm import tqdm

from benchmarks.system.step.__main__ import FLUX, Case, Measured, measure

BASE = Case(
    FLUX,
    "Qwen3-4B",
    settings={
        "group_size": 8,
        "num_retained": 2,
        "flow.sampling.num_steps": 8,
        "flow.sampling.sde_steps": 2,
        "flow.micro_batch_size": 4,
        "language.micro_batch_size": 4,
        "language.max_new_tokens": 16,
    },
)
SIZES: dict[str, list[tuple[float, Case]]] = {
    "images of a prompt": [
        (n, replace(BASE, settings=BASE.settings | {"group_size": n, "num_retained": n // 4})) for n in (8, 16, 32)
    ],
    "prompts": [(n, replace(BASE, prompts=n)) for n in (1, 2, 4)],
    "SDE steps": [(n, replace(BASE, settings=BASE.settings | {"flow.sampling.sde_steps": n})) for n in (2, 4, 8)],
    "image tokens": [
        ((side // 16) ** 2, replace(BASE, settings=BASE.settings | {"flow.height": side, "flow.width": side}))
        for side in (64, 128, 256)
    ],
    "words of a prompt": [(n, replace(BASE, words=n)) for n in (25, 50, 100)],
    "tokens of a rewrite": [
        (n, replace(BASE, settings=BASE.settings | {"language.max_new_tokens": n})) for n in (16, 32, 64)
    ],
}
"""What grows -> its sizes, each with the agents that have it."""


MEASURES = ("step", "floor", "step_bytes")


def slope(rows: list[tuple[float, float]]) -> float:
    """Exponent of growth of a value with a size, between the first pair of them and the last."""
    (first, before), (last, after) = rows[0], rows[-1]
    return math.log(after / before) / math.log(last / first)


def plot(found: dict[str, list[tuple[float, Measured]]], path: Path) -> None:
    """Draws step and floor over each size."""
    figure, axes = plt.subplots(2, 3, figsize=(9, 5), sharey=True, layout="constrained")
    for axis, (name, rows) in zip(axes.flat, found.items(), strict=True):
        sizes = [size for size, _ in rows]
        axis.plot(sizes, [one.step for _, one in rows], "o-", color="#0072B2", label="step")
        axis.plot(sizes, [one.floor for _, one in rows], "s--", color="#D55E00", label="its network calls alone")
        axis.set(xscale="log", yscale="log", xlabel=name, xticks=sizes)
        axis.set_xticklabels([f"{size:g}" for size in sizes])
        axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.minorticks_off()
        axis.grid(axis="y", alpha=0.3)
    for axis in axes[:, 0]:
        axis.set_ylabel("CPU seconds a step")
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path, dpi=90)


def main() -> None:
    """Prints a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--plot", type=Path, help="file of a plot")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, list[tuple[float, Measured]]] = {}
    print("| size | of | step, s | floor, s | step / floor | step, MB |\n|---|---|---|---|---|---|")
    for name, cases in tqdm(SIZES.items(), disable=None):
        rows = found[name] = []
        for size, case in cases:
            one = measure(case, torch.device("cpu"), options.rounds)
            rows.append((size, one))
            cells = f"{one.step:.2f} | {one.floor:.2f} | {one.step / one.floor:.2f} | {one.step_bytes / 1e6:.1f}"
            print(f"| {name} | {size:g} | {cells} |", flush=True)
        step, floor, memory = (slope([(size, getattr(one, key)) for size, one in rows]) for key in MEASURES)
        print(f"| {name} | exponent | {step:.2f} | {floor:.2f} | | {memory:.2f} |", flush=True)
    if options.plot is not None:
        plot(found, options.plot)


if __name__ == "__main__":
    main()
