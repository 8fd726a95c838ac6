"""Checkpoints on disk: one file, or a folder that several processes write together (PyTorch's distributed checkpoint).

Both hold the same: Lightning's record of a run, with the trained weights by name and the optimizers' state by number.
"""

from __future__ import annotations

import errno
import lzma
import pickle
import struct
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from lightning.fabric.plugins import TorchCheckpointIO
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from datamodules.atomic_write import naming, replaced_file, replaced_folder, unfinished

RECORD = "record.pt"
"""File in a folder that holds all but the large tensors."""
OPTIMIZERS = "optimizer_states"
WEIGHTS = ("state_dict", "current_model_state")
"""Entries of a checkpoint that are tensors by name: the weights and, beside a moving average, those in training."""


_FAULTS = (
    *(AssertionError, AttributeError, EOFError, IndexError, KeyError, OSError, RuntimeError, TypeError, ValueError),
    *(CheckpointException, lzma.LZMAError, pickle.UnpicklingError, struct.error, zipfile.BadZipFile, zlib.error),
)
"""What readers of damaged files raise."""
_SAFE = {
    "torch.distributed.checkpoint.metadata": (
        *("BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta"),
        *("TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING"),
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    **dict.fromkeys(("pathlib", "pathlib._local"), ("PosixPath",)),
    "torch.serialization": ("_get_layout",),
}
"""Names, beside `torch.Size` and the dtypes, that the description of a folder's tensors may use."""


def is_checkpoint(path: str | Path) -> bool:
    """Returns True if a path is a checkpoint's file or folder."""
    try:
        return zipfile.is_zipfile(path) or (Path(path) / RECORD).is_file()
    except zipfile.BadZipFile:
        return True  # a damaged one, as whoever reads it says


def read(path: str | Path, like: Mapping[str, Tensor] | None = None, *, record_only: bool = False) -> dict[str, Any]:
    """Reads a checkpoint, of any origin: no code in it is run.

    Args:
        path: file or folder.
        like: key of `_flat`, or of `_flat` without its last part -> tensor in whose layout a folder's is read, so that
            each process reads its own shards.
        record_only: gives empty tensors in place of a folder's. A file's stay on the disk until they are used, with
            this and with `like`, so that the processes of a machine do not hold a copy each.

    Raises:
        ValueError: if it is damaged, or holds other things than a checkpoint does.
    """
    path = Path(path)
    with _one_line(path):
        if path.is_dir():
            return _read_folder(path, like, record_only)
        checkpoint = torch.load(path, map_location="cpu", mmap=record_only or like is not None, weights_only=True)
        if not isinstance(checkpoint, dict):
            raise TypeError(f"a {type(checkpoint).__name__} in place of a dict")
        return checkpoint


def check_whole(path: str | Path) -> None:
    """Raises ValueError if a byte of a file has changed since it was written; of folders there are no checksums."""
    with _one_line(Path(path)):
        if Path(path).is_file():
            with zipfile.ZipFile(path) as file:
                changed = file.testzip()
            if changed is not None:
                raise ValueError(f"the checksum of {changed} is wrong")


@contextmanager
def _one_line(path: Path) -> Iterator[None]:
    try:
        yield
    except _FAULTS as error:
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):  # of a place before a file's start
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise ValueError(
            f"the checkpoint {path} is damaged, or holds more than a run's own ({reason}); give another, such as the "
            "one before."
        ) from error


def _read_folder(path: Path, like: Mapping[str, Tensor] | None, record_only: bool) -> dict[str, Any]:
    record: dict[str, Any] = torch.load(path / RECORD, map_location="cpu", weights_only=True)
    tensors: dict[str, Tensor] = {}
    reader = _Reader(path)
    for key, stored in reader.read_metadata().state_dict_metadata.items():
        if not isinstance(stored, TensorStorageMetadata):  # which torch would unpickle
            raise TypeError(f"{key} is no tensor")
        model = (like or {}).get(key, (like or {}).get(key.rpartition("/")[0]))
        dtype = stored.properties.dtype
        if record_only:
            tensors[key] = torch.empty(0)
        elif model is not None and model.shape == stored.size:
            tensors[key] = torch.empty_like(model, dtype=dtype, requires_grad=False)
        else:
            tensors[key] = torch.empty(stored.size, dtype=dtype)
    if not record_only:
        with warnings.catch_warnings(action="ignore", category=UserWarning):
            dcp.load(tensors, storage_reader=reader, no_dist=not dist.is_initialized())
    for key, tensor in tensors.items():
        kind, *names = key.split("/")
        if kind in WEIGHTS:
            record.setdefault(kind, {})[names[0]] = tensor
        else:
            optimizer, parameter, name = names
            record[OPTIMIZERS][int(optimizer)]["state"].setdefault(int(parameter), {})[name] = tensor
    return record


class _Writer(dcp.FileSystemWriter):
    """PyTorch's writer, whose errors reach the other processes as OSErrors; what stands behind them does not."""

    def write_data(self, plan: Any, planner: Any) -> Any:
        with naming(Path(self.path)):
            return super().write_data(plan, planner)


class _Reader(dcp.FileSystemReader):
    """Reader of a folder that unpickles the description of its tensors without running code from it."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Reads the file `.metadata`."""
        with (Path(self.path) / ".metadata").open("rb") as file:
            metadata: Metadata = _Unpickler(file).load()
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _Unpickler(pickle.Unpickler):
    """Unpickler of torch's own descriptions of tensors, and of nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        """Returns a class that may be built, or a dtype."""
        if name in _SAFE.get(module, ()):
            return super().find_class(module, name)
        if module == "torch" and (name == "Size" or isinstance(getattr(torch, name, None), torch.dtype)):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def write_folder(checkpoint: Mapping[str, Any], path: Path) -> None:
    """Writes a checkpoint's tensors by all processes at the same time; an earlier folder is replaced in the end.

    Raises:
        OSError: in all processes, naming the folder, if one cannot write; an earlier folder stays as it was.
    """
    states = checkpoint.get(OPTIMIZERS, [])
    record = {name: value for name, value in checkpoint.items() if name not in WEIGHTS}
    record |= {OPTIMIZERS: [state | {"state": {}} for state in states]} if states else {}
    with replaced_folder(path) if dist.get_rank() == 0 else nullcontext(unfinished(path)) as folder:
        if dist.get_rank() == 0:
            with replaced_file(folder / RECORD) as file:
                torch.save(record, file)
        dist.barrier()
        try:
            dcp.save(_flat(checkpoint), storage_writer=_Writer(folder))
        except dcp.api.CheckpointException as error:
            failed = next((one for one, _ in error.failures.values() if isinstance(one, OSError)), None)
            if failed is None:
                raise
            raise OSError(failed.errno, failed.strerror, str(path)) from error
        dist.barrier()
    dist.barrier()


def _flat(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """Returns key -> tensor: `state_dict/<name>`, `optimizer/<number>/<number of the parameter>/<name>`."""
    flat = {f"{kind}/{name}": tensor for kind in WEIGHTS for name, tensor in checkpoint.get(kind, {}).items()}
    for number, state in enumerate(checkpoint.get(OPTIMIZERS, [])):
        for parameter, values in state["state"].items():
            flat |= {f"optimizer/{number}/{parameter}/{name}": torch.as_tensor(v) for name, v in values.items()}
    return flat


class CheckpointIO(TorchCheckpointIO):
    """Lightning's reader and writer of checkpoints, which reads a folder too, and writes no half of a file.

    Lightning's own writes to the temporary folder; on another file system than the run's, it then copies.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Writes a file beside its place, which it then takes; at an address, such as s3://, as Lightning does.

        Raises:
            OSError: if the disk is full or the folder cannot be written; a file of that name stays as it was.
        """
        if storage_options is not None or "://" in str(path):
            return super().save_checkpoint(checkpoint, path, storage_options)
        with replaced_file(Path(path)) as file:
            torch.save(checkpoint, file)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Reads all of a file or a folder."""
        return read(path)
