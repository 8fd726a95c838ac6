"""EditReward's weights: finding, reading, renaming and checking them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from torch import Tensor, nn

from rewards.pretrained import check_hub_id, one_line_errors, read_tensors

_HEAD = re.compile(r"rm_heads?\.(?:head_)?(\d+)\.(\d+\.(?:weight|bias))")


def build_heads(hidden_size: int) -> nn.ModuleList:
    """Builds one head per question, from a hidden state to (mu, log sigma). Layers 0, 3 and 5 of each have weights."""

    def head() -> nn.Sequential:
        return nn.Sequential(
            nn.Linear(hidden_size, 1024),
            nn.ReLU(),
            nn.Dropout(0.05),
            nn.Linear(1024, 16),
            nn.ReLU(),
            nn.Linear(16, 2),
        )

    return nn.ModuleList([head(), head()])


def split_state_dict(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Splits and renames EditReward's weights for transformers' `Qwen2_5_VLModel` and for `build_heads`.

    Names that it knows: heads as in the authors' code, `rm_heads.head_0.0.weight` (also `rm_heads.0...`,
    `rm_head.0.0...`); a backbone in today's names (`model.language_model.layers...`, `model.visual...`) or in older
    ones (`model.layers...`, `visual...`); any of the prefixes `module.`, `base_model.`, `model.`, repeated, before
    either. The unused `lm_head` is dropped. Other weights keep their names, so that `check_names` reports them. The
    published files were not at hand when this was written.

    Args:
        state: name -> tensor of the whole checkpoint.

    Returns:
        The backbone's weights and the heads'.
    """
    adapters = [name for name in state if ".lora_" in name]
    if adapters:
        raise ValueError(f"the checkpoint holds unmerged LoRA weights such as {adapters[0]}: merge them first.")
    backbone: dict[str, Tensor] = {}
    heads: dict[str, Tensor] = {}
    for name, tensor in state.items():
        bare = re.sub(r"^(?:(?:module|base_model|model)\.)+", "", name)
        head = _HEAD.fullmatch(bare)
        if head:
            heads[f"{head[1]}.{head[2]}"] = tensor
        elif re.match(r"(embed_tokens|layers|norm)\.", bare):
            backbone[f"language_model.{bare}"] = tensor
        elif bare != "lm_head.weight":
            backbone[bare] = tensor
    return backbone, heads


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Reads all tensors of a folder's `*.safetensors` or, if there are none, of its `model.pth`."""
    state: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        state.update(read_tensors(file, "download EditReward's weights again"))
    if state:
        return state
    path = folder / "model.pth"
    if not path.is_file():
        raise ValueError(f"{folder} holds neither *.safetensors nor model.pth: copy EditReward's weights there.")
    loaded = read_tensors(path, "convert it to model.safetensors")
    named = loaded.get("model", loaded) if isinstance(loaded, dict) else loaded  # the authors' trainer may wrap it
    if not isinstance(named, dict):
        raise ValueError(f"{path} holds no named tensors: convert it to model.safetensors.")
    return named


def check_names(checkpoint: str, expected: Mapping[str, torch.Size], state: Mapping[str, Tensor]) -> None:
    """Raises a ValueError that names the weights that are missing, unknown or of another size."""
    problems = {
        "lacks": [name for name in expected if name not in state],
        "has unknown": [name for name in state if name not in expected],
        "has other sizes of": [n for n, size in expected.items() if n in state and state[n].shape != size],
    }
    found = [f"{what} {len(names)} (such as {', '.join(names[:3])})" for what, names in problems.items() if names]
    if found:
        raise ValueError(
            f"{checkpoint} does not fit EditReward on Qwen2.5-VL: among its weights it {', '.join(found)}; check "
            "checkpoint and base_model."
        )


def locate(model: str, *, weights: bool) -> Path:
    """Finds a model's folder; downloads it from the hub if needed, `model.pth` only where there is no safetensors."""
    if Path(model).is_dir():
        return Path(model)
    check_hub_id(model)
    small = ["*.json", "*.jinja", "merges.txt"]
    with one_line_errors(model):
        folder = Path(snapshot_download(model, allow_patterns=[*small, "*.safetensors"] if weights else small))
        if weights and not list(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(model, allow_patterns=[*small, "model.pth"]))
    return folder
