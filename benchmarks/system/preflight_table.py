"""Prints the estimated memory of every recipe's model, mode and GPU, from configurations alone.

    python -m benchmarks.system.preflight_table [--models Z-Image ...]

Published sizes stand in for published folders (`published.yaml`): no weights, network or GPU. Each cell is the peak
that preflight estimates, and in brackets what lasts the whole run: weights, gradients, optimizer state. Scorers in the
same process are not in it, and the task makes no other difference.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from benchmarks.system.recipes import FILES, configured, recipe
from lightning_modules.preflight.estimate import Setting, estimate

GPUS = (80, 48, 24)
MODES = ("promptrl", "flow_only", "prompt_only")


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models = [name for name in FILES if "Kontext" not in name and "Edit" not in name]
    parser.add_argument("--models", nargs="*", default=models, choices=models, metavar="MODEL", help=", ".join(models))
    options = parser.parse_args()
    print("| model | GPU | " + " | ".join(MODES) + " |")
    print("|---|---|---|---|---|")
    for name in options.models:
        for gpu in GPUS:
            with tempfile.TemporaryDirectory() as folder:
                cells = [cell(name, gpu, mode, Path(folder, mode)) for mode in MODES]
            print(f"| {name} | {gpu} GB | {' | '.join(cells)} |", flush=True)


def cell(name: str, gpu: int, mode: str, folder: Path) -> str:
    """Formats the estimate of one recipe, in GiB: at the peak, and for the whole run."""
    module, config = configured(recipe(name, gpu, mode), name, "Qwen2.5-VL-3B", folder)
    found = estimate(module, Setting(config.data.init_args.batch_size))
    return f"{found.total / 2**30:.0f} ({found.persistent_total / 2**30:.0f})"


if __name__ == "__main__":
    main()
