"""Short fits of the miniature, for tests of what a run leaves."""

from __future__ import annotations

from pathlib import Path


def short_fit(root: Path, experiment: str, prompts: int, steps: int = 2) -> list[str]:
    """The command of a miniature fit with validations of six prompts at its start and after every step.

    Args:
        root: of the run folders.
        experiment: which configuration.
        prompts: a step.
        steps: when to end.
    """
    return [
        "fit", f"--config=configs/miniature/{experiment}.yaml", f"--trainer.default_root_dir={root}",
        f"--trainer.max_steps={steps}", "--trainer.val_check_interval=1", "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false",
        "--data.init_args.eval_prompts=6", "--data.init_args.train_prompts=12",
        f"--data.init_args.batch_size={prompts}",
    ]  # fmt: skip


def folder(root: Path, experiment: str) -> Path:
    """Where the first run of an experiment lies."""
    return root / "miniature" / experiment / "version_0"
