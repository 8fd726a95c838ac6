"""Short commands on the miniature, for tests of what a run leaves."""

from __future__ import annotations

from pathlib import Path

QUICK = [
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--model.init_args.flow.init_args.sampling.eval_steps=2",
]
"""Options of any command that save seconds: evaluation draws with two sampler steps."""


def quick(command: str, root: Path, *more: str, config: str | Path = "configs/quickstart.yaml") -> list[str]:
    """Returns a command on the quickstart's small models: 12 prompts, one a step, and one in each evaluation set.

    Args:
        command: `fit`, `validate` or `test`.
        root: folder below which the run's folder is made.
        more: further options; they override the others.
        config: configuration file.
    """
    data = {"batch_size": 1, "train_prompts": 12, "eval_prompts": 1}
    sizes = [f"--data.init_args.{name}={size}" for name, size in data.items()]
    preflight = ["--preflight=off"] if command == "fit" else []
    return [command, f"--config={config}", f"--trainer.default_root_dir={root}", *QUICK, *sizes, *preflight, *more]


def short_fit(root: Path, experiment: str, prompts: int, steps: int = 2) -> list[str]:
    """Returns the command of a miniature fit with validations of six prompts at its start and after every step.

    Args:
        root: folder below which the run's folder is made.
        experiment: name of a configuration in `configs/miniature`.
        prompts: number of prompts a step.
        steps: number of steps after which training ends.
    """
    return [
        "fit", f"--config=configs/miniature/{experiment}.yaml", f"--trainer.default_root_dir={root}", *QUICK,
        f"--trainer.max_steps={steps}", "--trainer.val_check_interval=1", "--preflight=off",
        "--data.init_args.eval_prompts=6", "--data.init_args.train_prompts=12",
        f"--data.init_args.batch_size={prompts}",
    ]  # fmt: skip


def folder(root: Path, experiment: str) -> Path:
    """Returns the folder of the first run of an experiment."""
    return root / "miniature" / experiment / "version_0"


def last(root: Path) -> Path:
    """Returns the only `last.ckpt` below a folder."""
    (path,) = root.rglob("last.ckpt")
    return path
