"""`promptrl demo RUN`: checks of its words; the page itself is in `demo_page`, which takes seconds to import."""

from __future__ import annotations

import sys
from argparse import ArgumentError, ArgumentParser, Namespace
from collections.abc import Sequence
from importlib.util import find_spec
from itertools import takewhile
from pathlib import Path

from lightning_modules.cli.errors import complain
from lightning_modules.cli.misspelt import misspelt
from lightning_modules.run_folder import RunFolder

ONE_PROCESS = ["--trainer.fast_dev_run=true", "--trainer.devices=1", "--trainer.num_nodes=1", "--trainer.strategy=auto"]
"""Options of a `predict` that keeps nothing, whatever the run was trained on."""


def serve_demo(words: Sequence[str]) -> None:
    """Serves the page until Ctrl-C.

    Args:
        words: the words after `promptrl demo`: folders of runs, then options; those that are not the page's are
            `promptrl predict`'s, for all runs.
    """
    folders = list(takewhile(lambda word: not word.startswith("-"), words))
    try:
        options, rest = _parser().parse_known_args(words[len(folders) :])
        if find_spec("gradio") is None:
            raise ValueError("the demo page needs gradio: run `pip install -e '.[demo]'`.")
        if not folders:
            raise ValueError("which run? Give its folder first: `promptrl demo runs/quickstart/version_0`.")
        runs = [trained_run(Path(folder)) for folder in folders]
    except (ArgumentError, ValueError) as error:
        sys.exit(complain(str(error)))
    commands = [predict_words(run, rest) for run in runs]
    mistake = next(filter(None, map(misspelt, commands)), None)
    if mistake is not None:
        sys.exit(complain(mistake))
    _serve(runs, commands, options)


def trained_run(folder: Path) -> RunFolder:
    """Reads the folder of a fit, or finds the fit that a test's folder is of.

    Raises:
        ValueError: if there is no run, or it has no checkpoint to draw with.
    """
    run = RunFolder.read(folder)
    if not run.config:
        raise ValueError(f"{folder} has no config.yaml, so it is no run: give the folder of one, runs/NAME/version_0.")
    run = run.fitted or run
    if not checkpoint_of(run).exists():
        raise ValueError(
            f"{folder} has no checkpoint ({checkpoint_of(run)} is not there), so nothing trained to draw "
            "with: give the folder of a fit that has saved one."
        )
    return run


def checkpoint_of(run: RunFolder) -> Path:
    """Returns the path of a fit's last checkpoint, which need not be there."""
    return Path(run.get("checkpoint.dirpath") or run.folder / "checkpoints", "last.ckpt")


def predict_words(run: RunFolder, more: Sequence[str]) -> list[str]:
    """Returns the words of the `predict` that loads a run.

    Args:
        run: folder of a fit.
        more: further options; they override the others.
    """
    own = ["predict", f"--config={run.folder / 'config.yaml'}", f"--ckpt_path={checkpoint_of(run)}"]
    return [*own, *ONE_PROCESS, *more]


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="promptrl demo",
        usage="promptrl demo RUN [RUN ...] [--host HOST] [--port PORT] [--share] [--KEY VALUE ...]",
        description="A page on which any prompt is drawn as it is and rewritten, before and after training.",
        epilog="RUN is the folder of a fit, such as runs/quickstart/version_0; several stand beside each other. "
        "--KEY VALUE is any option of `promptrl predict`, such as --trainer.accelerator cpu.",
        allow_abbrev=False,
        exit_on_error=False,
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0 lets other machines in")
    parser.add_argument("--port", type=int, help="port; without one the first free one from 7860 on")
    parser.add_argument("--share", action="store_true", help="also open a public link through gradio's servers")
    return parser


def _serve(runs: Sequence[RunFolder], commands: Sequence[Sequence[str]], options: Namespace) -> None:
    from lightning_modules.cli import quieten

    quieten()  # before the import below, which has notices of its own
    from lightning_modules.cli.demo_page import serve

    serve(runs, commands, options.host, options.port, options.share)
