"""`metrics.csv`, and the loggers of the key `loggers`, such as Weights & Biases, beside it and TensorBoard."""

from __future__ import annotations

import csv
import inspect
import io
from collections.abc import Sequence
from pathlib import Path
from pydoc import locate
from typing import Any

from jsonargparse import ArgumentParser, Namespace
from lightning.fabric.loggers.csv_logs import _ExperimentWriter
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from datamodules.atomic_write import write_atomically


class MetricsLogger(CSVLogger):
    """Lightning's logger to `metrics.csv`, of which a kill leaves all rows but, at most, half of the last one."""

    @property
    @rank_zero_experiment
    def experiment(self) -> _ExperimentWriter:
        """Writer of the file, made when it is first used."""
        if self._experiment is None:
            self._experiment = _MetricsFile(self.log_dir)
        return self._experiment


class _MetricsFile(ExperimentWriter):
    def save(self) -> None:
        """Writes the rows since the last call: behind the others in one piece, or, with new columns, all rows anew."""
        if not self.metrics:
            return
        path = Path(self.metrics_file_path)
        keys = sorted({*self.metrics_keys, *(key for row in self.metrics for key in row)})
        text = io.StringIO()
        writer = csv.DictWriter(text, keys)
        if keys == self.metrics_keys:
            writer.writerows(self.metrics)
            with path.open("a", newline="") as file:
                file.write(text.getvalue())
        else:
            writer.writeheader()
            if self.metrics_keys:
                with path.open(newline="") as file:
                    writer.writerows(csv.DictReader(file))
            writer.writerows(self.metrics)
            write_atomically(path, text.getvalue())
        self.metrics, self.metrics_keys = [], keys


def open_loggers(specs: Sequence[Namespace], folder: Path, config: dict[str, Any]) -> list[Logger]:
    """Builds loggers and starts their runs, so that one that cannot log stops the command before models load.

    Args:
        specs: class paths and arguments. A `save_dir` at its default, if that is a folder below the current one,
            becomes the run's folder; a `name` that is None becomes `<experiment>/version_N`.
        folder: the run's folder, `<root>/<experiment>/version_N`.
        config: the run's configuration, which the loggers are told.

    Raises:
        ValueError: if a package is missing, or arguments do not go together.
    """
    for spec in specs:
        takes: Any = locate(spec.class_path)
        defaults = {name: one.default for name, one in inspect.signature(takes).parameters.items()}
        for name, own in (("save_dir", str(folder)), ("name", f"{folder.parent.name}/{folder.name}")):
            if defaults.get(name, "") in (None, ".", "./mlruns") and spec.init_args[name] == defaults[name]:
                spec.init_args[name] = own
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--loggers", type=list[Logger])
    try:
        loggers: list[Logger] = parser.instantiate_classes(Namespace(loggers=specs)).loggers
    except (ImportError, MisconfigurationException, ValueError) as error:  # the parser wraps what a class raises
        raise ValueError(f"`loggers` cannot be used: {' '.join(str(error.__cause__ or error).split())}") from error
    for logger in loggers:
        logger.log_hyperparams(config)
    return loggers
