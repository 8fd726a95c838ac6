"""Loading of scorers' networks: device, transformers models, weight files, and errors that say what to do."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file


def load_pretrained(cls: Any, model: str, *, device: str | None = None, **kwargs: Any) -> Any:
    """Loads a frozen transformers model in evaluation mode, fp32 unless `dtype` says otherwise.

    Args:
        cls: a class with `from_pretrained`.
        model: folder or hub id.
        device: null is this process's GPU if there is one, else the CPU.
        **kwargs: further arguments of `from_pretrained`.
    """
    if not Path(model).is_dir():
        check_hub_id(model)
    with one_line_errors(model):
        network = cls.from_pretrained(model, **{"dtype": torch.float32, **kwargs})
    return network.to(pick_device(device)).eval().requires_grad_(False)


def load_processor(cls: Any, model: str, **kwargs: Any) -> Any:
    """Loads a tokenizer, image processor or configuration (folder or hub id) with one-line errors."""
    if not Path(model).is_dir():
        check_hub_id(model)
    with one_line_errors(model):
        return cls.from_pretrained(model, **kwargs)


def pick_device(device: str | None) -> torch.device:
    """Returns the device asked for; null is this process's GPU if there is one, else the CPU.

    Call it from the main thread: a new thread's current GPU is always the first. Of several processes on a machine each
    takes the GPU of its `LOCAL_RANK`, since scorers load before the trainer has made that one the current.
    """
    if device is not None:
        return torch.device(device)
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local_rank = int(os.environ.get("LOCAL_RANK", torch.cuda.current_device()))
    return torch.device("cuda", local_rank % torch.cuda.device_count())


@contextmanager
def one_line_errors(model: str) -> Iterator[None]:
    """Context manager: turns a loader's error (gated or unknown hub id, missing or damaged files) into one line."""
    try:
        yield
    except LocalEntryNotFoundError as error:
        raise ValueError(
            f"cannot load {model}: the hub cannot be reached, and there is no copy of it here: check the network, or "
            "give the folder of a download."
        ) from error
    except (AttributeError, KeyError, RecursionError, SafetensorError, TypeError) as error:  # a file holds other things
        said = (str(error).strip().splitlines() or [""])[0]
        raise ValueError(
            f"cannot load {model}: one of its files is damaged ({type(error).__name__}: {said}); copy it again."
        ) from error
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"cannot load {model}: {reason} (a gated hub model needs its licence accepted and `hf auth login`)"
        ) from error


def check_hub_id(model: str) -> None:
    """Raises a ValueError if a model's name is neither a folder nor a possible hub id."""
    beside = Path(model).parent  # "miniature/flwo" looks like a hub id, but miniature/ is a folder here
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", model) or beside.is_dir():
        raise ValueError(f"there is no folder {model}: give an existing folder or a hub id such as owner/name.")


def read_tensors(path: str | Path, advice: str, *, allow_pickle: bool = False) -> Any:
    """Reads a .safetensors or `torch.save` file to the CPU; runs no code from it unless `allow_pickle`.

    Args:
        path: an existing file.
        advice: end of the error's sentence: what the user should do.
        allow_pickle: if the file holds more than weights, load it all the same, which runs code from it.

    Returns:
        Name -> tensor of a .safetensors file, else the saved object.

    Raises:
        ValueError: if the file is damaged or holds more than weights.
    """
    try:
        if str(path).endswith(".safetensors"):
            return load_file(path)
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except UnpicklingError:
            if not allow_pickle:
                raise
            return torch.load(path, map_location="cpu", weights_only=False)
    except (SafetensorError, UnpicklingError, RuntimeError, EOFError) as error:
        fault = "is damaged" if allow_pickle else "is damaged or holds more than weights"
        raise ValueError(f"{path} {fault}: {advice}.") from error
