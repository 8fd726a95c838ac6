"""Errors of loading: each names what is missing and what to do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model
from torch import nn

from lightning_modules.policies.base import LoRA
from lightning_modules.policies.loading import check_language_model, check_pipeline, lora_config


def pipeline(folder: Path, **parts: list[str | None]) -> Path:
    folder.mkdir()
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline", **parts}))
    return folder


def fill(folder: Path) -> None:
    folder.mkdir()
    (folder / "config.json").write_text("{}")


def test_a_whole_pipeline_passes(tmp_path: Path) -> None:
    """A part that the index gives as null (an optional one) need not be there."""
    folder = pipeline(tmp_path / "pipe", vae=["diffusers", "AutoencoderKL"], image_encoder=[None, None])
    fill(folder / "vae")
    check_pipeline(str(folder))


def test_missing_and_empty_parts_are_named(tmp_path: Path) -> None:
    parts = dict.fromkeys(("vae", "transformer", "tokenizer"), ["library", "Class"])
    folder = pipeline(tmp_path / "pipe", **parts)  # type: ignore[arg-type]
    fill(folder / "vae")
    (folder / "transformer").mkdir()
    with pytest.raises(ValueError, match=r"folder .*pipe lacks transformer, tokenizer: copy the missing part there"):
        check_pipeline(str(folder))


def test_a_folder_without_index_is_no_pipeline(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is not a diffusers pipeline: it has no model_index.json"):
        check_pipeline(str(tmp_path))


@pytest.mark.parametrize("check", [check_pipeline, check_language_model])
def test_neither_folder_nor_hub_id(check: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last one could be a hub id, but for the folder miniature/ here."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "miniature").mkdir()
    for model in (str(tmp_path / "gone"), "gone", "a/b/c", "./gone", "../gone", "miniature/flwo"):
        with pytest.raises(ValueError, match=r"no folder .*: give an existing folder or a hub id such as owner/name"):
            check(model)  # type: ignore[operator]
    check("black-forest-labs/FLUX.1-dev")  # type: ignore[operator]


def test_a_hub_that_cannot_be_reached_is_no_missing_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"cannot load nobody/nothing: the hub cannot be reached"):
        check_pipeline("nobody/nothing", "FluxPipeline")


@pytest.mark.parametrize(
    ("files", "lacks"),
    [
        ([], "config.json"),
        (["config.json"], r"weights \(\*.safetensors\)"),
        (["config.json", "model-00001-of-00002.safetensors"], "tokenizer"),
    ],
)
def test_language_model_folder(tmp_path: Path, files: list[str], lacks: str) -> None:
    for name in files:
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=rf"the language model folder .* lacks its {lacks}.*: copy it there"):
        check_language_model(str(tmp_path))


def test_language_model_folder_passes(tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors", "tokenizer_config.json"):
        (tmp_path / name).touch()
    check_language_model(str(tmp_path))


def test_lora_targets() -> None:
    network = nn.ModuleDict(
        {"attn": nn.ModuleDict({"to_q": nn.Linear(2, 2), "to_out": nn.ModuleList([nn.Identity()])})}
    )
    config = lora_config(network, LoRA(rank=3, alpha=5), ["to_q", "to_out.0"], "flow.lora")
    assert (config.r, config.lora_alpha, config.target_modules) == (3, 5, {"to_q", "to_out.0"})
    assert lora_config(network, LoRA(targets=r"attn\.to_.*"), ["to_q"], "flow.lora").target_modules == r"attn\.to_.*"
    for targets, named in ((["to_q", "q"], "q"), (["to_k", "to_v"], "to_k, to_v"), ("to_q", "to_q")):
        # A string is a regular expression of the whole name, so "to_q" alone matches nothing.
        with pytest.raises(
            ValueError, match=rf"`flow.lora.targets` names {named}, which .* of ModuleDict; use .* such as to_q\."
        ):
            lora_config(network, LoRA(targets=targets), ["to_q"], "flow.lora")  # type: ignore[arg-type]


@pytest.mark.parametrize("targets", [["attn"], ["to_q", "norm"], r"attn.*"])
def test_lora_targets_that_are_no_layers(targets: list[str] | str) -> None:
    """Only single layers can have adapters; peft would say so with the whole network printed."""
    network = nn.ModuleDict({"attn": nn.ModuleDict({"to_q": nn.Linear(2, 2), "norm": nn.LayerNorm(2)})})
    with pytest.raises(
        ValueError, match=r"names .*, which matches attn.* and not a single layer, .* such as to_q\."
    ) as said:
        lora_config(network, LoRA(targets=targets), ["to_q"], "flow.lora")
    with pytest.raises(ValueError, match="is not supported"):
        get_peft_model(network, LoraConfig(target_modules=targets))  # type: ignore[arg-type]
    assert "\n" not in str(said.value)
