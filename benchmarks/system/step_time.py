"""Splits the time of an RL step into its parts, and measures the share spent inside the two networks.

python -m benchmarks.system.step_time [--config configs/miniature/promptrl.yaml] [--steps 20]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from typing import Any

import lightning as L
import torch

from lightning_modules.cli import main as lightning
from lightning_modules.prompt_rl import PromptRL


class StepTimer(L.Callback):
    """Sums the times of the parts of every step but the first, which warms up."""

    def __init__(self) -> None:
        self.parts: dict[str, float] = {}
        self.inside = self.total = self._start = self._begun = 0.0
        self.depth = self.steps = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Installs a clock around both networks' forward passes and around every backward pass."""
        assert isinstance(pl_module, PromptRL)
        networks = [pl_module.flow.network]
        if pl_module.language is not None:
            networks += [pl_module.language.causal_lm.get_decoder(), pl_module.language.causal_lm.lm_head]
        for network in networks:
            network.register_forward_pre_hook(lambda *_: self.enter())
            network.register_forward_hook(lambda *_: self.leave())
        backward = pl_module.manual_backward

        def timed(*args: Any, **kwargs: Any) -> None:
            self.enter()
            backward(*args, **kwargs)
            self.leave()

        pl_module.manual_backward = timed  # type: ignore[method-assign]

    def enter(self) -> None:
        """Starts the clock unless it runs already."""
        self._begun = time.perf_counter() if self.depth == 0 else self._begun
        self.depth += 1

    def leave(self) -> None:
        """Stops the clock at the outermost end."""
        self.depth -= 1
        if self.depth == 0:
            self.inside += time.perf_counter() - self._begun

    def on_train_batch_start(self, *args: Any) -> None:
        """Notes the time at which a step begins."""
        self._start = time.perf_counter()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        """Adds a step's times to the sums."""
        assert isinstance(pl_module, PromptRL)
        if trainer.global_step == 1:
            self.inside = 0.0
            return
        self.steps += 1
        self.total += time.perf_counter() - self._start
        for part, seconds in pl_module._seconds.items():
            self.parts[part] = self.parts.get(part, 0.0) + seconds

    def on_train_end(self, *args: Any) -> None:
        """Prints a Markdown table of seconds and shares by part."""
        print("\n| part | s per step | share |\n|---|---|---|")
        rest = self.total - sum(self.parts.values())
        for part, seconds in [*self.parts.items(), ("optimizer, logging, rest", rest), ("whole step", self.total)]:
            print(f"| {part} | {seconds / self.steps:.3f} | {seconds / self.total:.0%} |")
        print(f"| inside the networks, both ways | {self.inside / self.steps:.3f} | {self.inside / self.total:.0%} |")


def main() -> None:
    """Runs a short fit with the timer attached."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/miniature/promptrl.yaml")
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    print(f"{args.config}, {args.steps} steps, {torch.get_num_threads()} thread(s)")
    with tempfile.TemporaryDirectory() as folder:
        lightning(
            [
                "fit",
                f"--config={args.config}",
                f"--trainer.max_steps={args.steps}",
                "--trainer.limit_val_batches=0",
                f"--trainer.default_root_dir={folder}",
                "--trainer.callbacks=benchmarks.system.step_time.StepTimer",
                "--trainer.enable_progress_bar=false",
                "--trainer.enable_model_summary=false",
            ]
        )


if __name__ == "__main__":
    main()
