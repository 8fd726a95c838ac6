"""LoRA adapters from files: finds their base model, loads them into a network, and says what does not fit."""

from __future__ import annotations

import copy
import logging
import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY, LORA_WEIGHT_NAME_SAFE
from diffusers.utils import convert_unet_state_dict_to_peft
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from peft import LoraConfig, PeftConfig, PeftType, get_peft_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import cast_adapter_dtype, set_adapter
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers.utils.peft_utils import find_adapter_config_file

from datamodules.jsonl import read_json
from datamodules.parsing import parse_json
from rewards.pretrained import check_hub_id, one_line_errors

if TYPE_CHECKING:
    from lightning_modules.policies.base import LoRA

DEFAULT, REFERENCE = "default", "reference"
"""Names of the adapter in use and, where training began from a file, of what was loaded."""

TRANSFORMER = "transformer."
PEFT_PREFIX = "base_model.model."
LONGEST = 400
"""Characters of a library's error; some list all weights."""
UNSUPPORTED = re.compile(r"\.diff(_b)?$|dora_scale|lokr_|hada_|^lora_te|text_encoder|text_model|t5xxl|text_projection")
"""Weights in LoRA files of image models that diffusers leaves out, or puts where a policy has no adapter."""


# --- where an adapter and its base model are --------------------------------------------------------------------------


def base_and_adapter(model: str, agent: str) -> tuple[str, str | None]:
    """Finds the base model of an adapter: (base model, adapter's path), or (`model`, None) for a whole model.

    Args:
        model: folder or hub id of a model or an adapter, a LoRA file, or a folder that `Export` wrote.
        agent: "flow" or "language".

    Raises:
        ValueError: if an adapter does not say what its base model is, or that model is not here.
    """
    path = own_folder(model, agent)
    config: Path | str | None = None
    if path.exists():
        model, config = str(path), path / CONFIG_NAME
    elif agent == "flow":
        return model, None  # of a hub id `check_pipeline` looks for a pipeline alone
    else:
        check_hub_id(model)
        if not isinstance(try_to_load_from_cache(model, "config.json"), str):  # else there is no need to ask the hub
            config = find_adapter_config_file(model)
    if agent == "flow" and (path / "model_index.json").is_file():
        return model, None
    if config is not None and Path(config).is_file():
        base = read_json(config).get("base_model_name_or_path")
    elif agent == "flow" and _local_weights(path) is not None:
        base = _base_in_metadata(lora_file(model, agent))
    else:
        return model, None
    advice = f"give the base model as `{agent}.model` and the LoRA as `{agent}.lora.path`"
    if not base:
        raise ValueError(f"{model} is a LoRA that does not name its base model: {advice}.")
    if not Path(base).is_dir():
        try:
            check_hub_id(base)
        except ValueError as error:
            raise ValueError(f"{model} is a LoRA of {base}, which is not here: {advice}.") from error
    return base, model


def own_folder(path: str, agent: str) -> Path:
    """Returns an agent's folder in a folder that `Export` wrote; any other path as it is."""
    folder = Path(path)
    return folder / agent if (folder / agent).is_dir() and not list(folder.glob("*.safetensors")) else folder


def lora_file(path: str, agent: str) -> Path:
    """Finds the file of a LoRA: itself, the one in a folder, or the one of a hub id (downloaded).

    Raises:
        ValueError: if there is none, or several with names that diffusers and peft do not use.
    """
    local = own_folder(path, agent)
    names = (LORA_WEIGHT_NAME_SAFE, SAFETENSORS_WEIGHTS_NAME)
    if local.exists():
        found = _local_weights(local)
        if found is None:
            raise ValueError(
                f"`{agent}.lora.path` is {path}, where {' and '.join(names)} are missing and no other .safetensors "
                "file is alone: give the file itself."
            )
        return found
    _check_there(path, agent)
    with one_line_errors(path):
        for name in names:
            try:
                file = Path(hf_hub_download(path, name))
            except EntryNotFoundError as error:
                if isinstance(error, LocalEntryNotFoundError) and name == names[-1]:
                    raise  # no network
                continue
            if name == SAFETENSORS_WEIGHTS_NAME:
                hf_hub_download(path, CONFIG_NAME)
            return file
    raise ValueError(
        f"`{agent}.lora.path` is {path}, a hub id with neither {' nor '.join(names)}: download the file and give its "
        "path."
    )


def _check_there(path: str, agent: str) -> None:
    try:
        check_hub_id(path)
    except ValueError as error:
        raise ValueError(f"`{agent}.lora.path`: {error}") from error


def _local_weights(path: Path) -> Path | None:
    if path.is_file():
        return path if path.suffix == ".safetensors" else None
    files = sorted(path.glob("*.safetensors"))
    named = [file for file in files if file.name in (LORA_WEIGHT_NAME_SAFE, SAFETENSORS_WEIGHTS_NAME)]
    return next(iter(named or files)) if named or len(files) == 1 else None


def _base_in_metadata(file: Path) -> str | None:
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = (opened.metadata() or {}).get(LORA_ADAPTER_METADATA_KEY, "{}")
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged ({error}): copy it again.") from error
    base: str | None = parse_json(metadata, str(file)).get(f"{TRANSFORMER}base_model_name_or_path")
    return base


# --- image models -----------------------------------------------------------------------------------------------------


def load_flow_lora(network: Any, lora: LoRA, pipeline: Any, adapters: Iterable[str]) -> None:
    """Loads a LoRA of diffusers', kohya's or peft's format into a transformer, in fp32.

    Args:
        network: the transformer; on the meta device names, shapes and settings are checked alone.
        lora: settings with a `path`.
        pipeline: the stock pipeline's class, whose own conversions apply.
        adapters: names that the adapter gets; more than one are copies.

    Raises:
        ValueError: for files that do not fit, or that diffusers would load in part only.
    """
    where, file = f"`flow.lora.path` {lora.path}", lora_file(str(lora.path), "flow")
    device = next(network.parameters()).device
    with _one_error(where, network), _complaints():
        weights, alphas, metadata = _peft_file(file) if _is_peft(file) else _converted(file, pipeline)
        _check_names(network, weights)
        if metadata is not None:
            metadata.pop(f"{TRANSFORMER}base_model_name_or_path", None)  # as in adapters that are made here
        placed = {name: weight.to(device) for name, weight in weights.items()}
        for adapter in adapters:
            # peft warns of a second adapter.
            with device, warnings.catch_warnings(action="ignore", category=UserWarning):
                network.load_lora_adapter(
                    {TRANSFORMER + name: weight for name, weight in placed.items()},
                    network_alphas=alphas,
                    metadata=metadata,
                    adapter_name=adapter,
                )
            # Once more: the first time they went through the network's dtype.
            cast_adapter_dtype(network, adapter)
            set_peft_model_state_dict(network, placed, adapter)
    set_adapter(network, DEFAULT)
    _check_agreement(network, lora, "flow")


def _is_peft(file: Path) -> bool:
    return file.name == SAFETENSORS_WEIGHTS_NAME and (file.parent / CONFIG_NAME).is_file()


def _peft_file(file: Path) -> tuple[dict[str, Tensor], None, dict[str, Any]]:
    """Reads a folder of peft's: weights by peft's names, no alphas, and the configuration as diffusers keeps it."""
    config = _lora_config(str(file.parent))
    weights = {name.removeprefix(PEFT_PREFIX): weight for name, weight in _tensors(file).items()}
    return weights, None, {TRANSFORMER + name: value for name, value in config.to_dict().items()}


def _converted(file: Path, pipeline: Any) -> tuple[dict[str, Tensor], dict[str, Any] | None, dict[str, Any] | None]:
    """Reads a LoRA file by the pipeline's own conversion: weights by peft's names, alphas, metadata."""
    _refuse(name for name, weight in _tensors(file).items() if UNSUPPORTED.search(name) and weight.any())
    found = pipeline.lora_state_dict(
        str(file.parent), weight_name=file.name, use_safetensors=True, return_alphas=True, return_lora_metadata=True
    )
    weights, metadata, alphas = found[0], found[-1], found[1] if len(found) > 2 else None
    if not any(name.startswith(TRANSFORMER) for name in weights):  # `save_lora_adapter` of a bare transformer
        weights, alphas, metadata = (
            part and {TRANSFORMER + name: value for name, value in part.items()} for part in (weights, alphas, metadata)
        )
    _refuse(name for name, weight in weights.items() if not name.startswith(TRANSFORMER) and weight.any())
    weights = {name.removeprefix(TRANSFORMER): w for name, w in weights.items() if name.startswith(TRANSFORMER)}
    if not any("lora_A" in name for name in weights):
        weights = convert_unet_state_dict_to_peft(weights)
    return weights, alphas, metadata


def _refuse(names: Iterable[str]) -> None:
    lost = [name for name in names if not name.endswith(".alpha")]
    if lost:
        raise ValueError(f"{_some(lost)} cannot be loaded: only LoRA weights of the transformer can")


def _tensors(file: Path) -> dict[str, Tensor]:
    with safe_open(file, framework="pt") as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}


def _check_names(network: nn.Module, weights: dict[str, Tensor]) -> None:
    if not any("lora_A" in name for name in weights):
        raise ValueError(f"it holds no LoRA weights, but {_some(weights)}")
    known = {name for name, _ in network.named_modules()}
    unknown = sorted({name for name in weights if name.split(".lora_")[0] not in known})
    if unknown:
        raise ValueError(f"{type(network).__name__} has no layers for {_some(unknown)}")


class _Recorder(logging.Handler):
    """Log handler that keeps messages instead of printing them."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@contextmanager
def _complaints() -> Iterator[None]:
    """Context manager: raises ValueError for what diffusers only warns of, such as weights that it leaves out."""
    logger, recorder = logging.getLogger("diffusers"), _Recorder()
    handlers, level = logger.handlers, logger.level
    logger.handlers = [recorder]
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.handlers = handlers
        logger.setLevel(level)
    if recorder.messages:
        raise ValueError(recorder.messages[0])


# --- refiners ---------------------------------------------------------------------------------------------------------


def load_language_lora(network: Any, lora: LoRA, adapters: Iterable[str]) -> Any:
    """Wraps a transformers model into a `PeftModel` with an adapter from a peft folder or hub id, in fp32.

    Args:
        network: the base model.
        lora: settings with a `path`.
        adapters: names that the adapter gets; more than one are copies.

    Raises:
        ValueError: for adapters that do not fit, or not in full.
    """
    folder = own_folder(str(lora.path), "language")
    path = str(folder)
    if not folder.is_dir():
        _check_there(path, "language")
    elif not list(folder.glob("adapter_model.*")):
        raise ValueError(
            f"`language.lora.path` is {lora.path}, which has no {SAFETENSORS_WEIGHTS_NAME}: give a peft folder."
        )
    with _one_error(f"`language.lora.path` {lora.path}", network):
        config = _lora_config(path)
        config.inference_mode, config.base_model_name_or_path = False, None
        network = get_peft_model(network, config)
        for adapter in adapters:
            if adapter not in network.peft_config:
                copied = copy.deepcopy(config)
                copied.init_lora_weights = False  # some ways of it change the base model, which the first has done
                network.add_adapter(adapter, copied)
            result = network.load_adapter(path, adapter, torch_device="cpu")
            if result.unexpected_keys:
                raise ValueError(f"the model has no layers for {_some(result.unexpected_keys)}")
            if result.missing_keys:
                raise ValueError(f"its configuration asks for {_some(result.missing_keys)}, which it does not hold")
    _check_agreement(network, lora, "language")
    return network


# --- both -------------------------------------------------------------------------------------------------------------


@contextmanager
def reference_adapter(network: nn.Module) -> Iterator[None]:
    """Context manager: the adapter that training started from is in use instead of the trained one."""
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    set_adapter(network, REFERENCE, inference_mode=True)
    try:
        yield
    finally:
        set_adapter(network, DEFAULT, inference_mode=True)
        for parameter in trained:
            parameter.requires_grad_(True)


def matching(names: Iterable[str], targets: list[str] | str) -> set[str]:
    """Returns the module names that peft takes `targets` (endings, or one regular expression) to mean."""
    if isinstance(targets, str):
        return {name for name in names if re.fullmatch(targets, name)}
    return {name for name in names for t in targets if name == t or name.endswith(f".{t}")}


def _lora_config(path: str) -> LoraConfig:
    config = PeftConfig.from_pretrained(path)
    if config.peft_type != PeftType.LORA:
        raise ValueError(f"it is a {config.peft_type}, and only LoRA can be loaded")
    assert isinstance(config, LoraConfig)
    return config


def _check_agreement(network: nn.Module, lora: LoRA, agent: str) -> None:
    """Raises ValueError if rank, alpha or targets were given and are not those of the loaded adapter."""
    modules = {name.removeprefix(PEFT_PREFIX): module for name, module in network.named_modules()}
    layers: dict[str, Any] = {name: module for name, module in modules.items() if isinstance(module, LoraLayer)}
    for name, values in {
        "rank": {layer.r[DEFAULT] for layer in layers.values()},
        "alpha": {layer.lora_alpha[DEFAULT] for layer in layers.values()},
    }.items():
        given = getattr(lora, name)
        if given is not None and values != {given}:
            raise ValueError(
                f"`{agent}.lora.{name}` is {given}, but {', '.join(map(str, sorted(values)))} in {lora.path}: leave "
                f"`{name}` out."
            )
    if lora.targets is not None and matching(modules, lora.targets) != set(layers):
        raise ValueError(
            f"`{agent}.lora.targets` are other layers than the {len(layers)} of {lora.path}, such as {min(layers)}: "
            "leave `targets` out."
        )


@contextmanager
def _one_error(where: str, network: nn.Module) -> Iterator[None]:
    """Context manager: says in one line what a loader of adapters raises, mismatched shapes among it."""
    try:
        yield
    except UnpicklingError as error:  # whose text advises to run whatever the file holds
        raise ValueError(f"{where} holds more than weights, or is damaged; give a .safetensors file.") from error
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        mismatches = [line for line in lines if line.startswith("size mismatch")]
        reason = f"{mismatches[0]} ({len(mismatches) - 1} more)" if mismatches else " ".join(lines)[:LONGEST]
        raise ValueError(
            f"{where} does not fit {type(network).__name__}: {reason.rstrip('.')}; give a LoRA of this model."
        ) from error


def _some(names: Iterable[str]) -> str:
    """Lists up to three names, and says how many there are besides."""
    names = sorted(names)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
