"""Runs the `lightning` command; errors that a user can cause end it in one line."""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import jsonargparse
import lightning as L
import yaml
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf.errors import OmegaConfBaseException

from lightning_modules.cli.checkpoint import SaveConfig
from lightning_modules.cli.command import Parser, PromptRLCLI
from lightning_modules.cli.errors import complain, raised_by_us
from lightning_modules.cli.preemption import Preempted
from lightning_modules.cli.refusals import refused_by_lightning
from lightning_modules.cli.texts import load_config, no_such_key
from lightning_modules.cli.trainer import Trainer
from lightning_modules.peers import PeerFailed
from rewards.base import RewardUnavailable

_GONE = (errno.ENOENT, errno.ENOTDIR, errno.ESTALE)
_NO_ACCESS = (errno.EACCES, errno.EDQUOT, errno.EFBIG, errno.ENOSPC, errno.EPERM, errno.EROFS)


def _other_threads_errors(error: threading.ExceptHookArgs) -> None:
    """Prints an error of a thread, unless it is TensorBoard's writer, whose errors its next call raises again."""
    if type(error.thread).__name__ != "_AsyncWriterThread":
        threading.__excepthook__(error)


def run(args: Sequence[str] | None = None, cli_class: type[PromptRLCLI] = PromptRLCLI) -> PromptRLCLI:
    """Runs the command.

    Errors raised on purpose by this project's own code end in one line; any other keeps its traceback.

    Args:
        args: the words after the command's name; None takes the process's own.
        cli_class: class of the command.

    Returns:
        The finished command, with its trainer and model.
    """
    threading.excepthook = _other_threads_errors
    jsonargparse.set_loader("omegaconf+", load_config, (yaml.YAMLError,))
    words = sys.argv[1:] if args is None else args
    PromptRLCLI.wanted = words[0] if words and words[0] in LightningCLI.subcommands() else None
    try:
        cli = cli_class(
            L.LightningModule,
            L.LightningDataModule,
            trainer_class=Trainer,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            parser_class=Parser,
            parser_kwargs={"parser_mode": "omegaconf+"},
            save_config_callback=SaveConfig,
            save_config_kwargs={"overwrite": True},
            seed_everything_default=42,
            args=None if args is None else list(args),
        )
        cli.say_where_things_are()
        return cli
    except Preempted as stop:
        print(f"lightning: {stop}", file=sys.stderr)
        sys.exit(128 + signal.SIGTERM)  # as shells say it, so that a stopped run is no finished one
    except PeerFailed as error:
        sys.exit(complain(str(error)))
    except OmegaConfBaseException as error:
        sys.exit(complain(no_such_key(error)))
    except RewardUnavailable as error:
        sys.exit(complain(" ".join([str(error), *getattr(error, "__notes__", [])])))
    except OSError as error:
        place = os.fsdecode(error.filename or "a file of the run cannot be written")
        if error.errno in _GONE and any(part.startswith("version_") for part in Path(place).parts):
            sys.exit(complain(f"{place}: {error.strerror}; the run's folder was deleted or moved while it was used."))
        if error.errno not in _NO_ACCESS:
            raise
        sys.exit(complain(f"{place}: {error.strerror}; make room or allow access, or name another place."))
    except RuntimeError as error:
        if not isinstance(error.__cause__, PeerFailed):
            raise
        sys.exit(complain(str(error.__cause__)))
    except (MisconfigurationException, ValueError) as error:
        ours = raised_by_us(error)
        said = refused_by_lightning(error) if ours is None else str(ours)
        if said is None:
            raise
        sys.exit(complain(said))
