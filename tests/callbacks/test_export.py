"""Exports: stock diffusers, transformers and peft load them by the card's own code and draw what the agents draw."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import yaml

from callbacks.export import Export
from callbacks.reporting.model_card import call_arguments, drawing_code, loading_code
from datamodules.base import PromptSample
from lightning_modules.cli import main
from lightning_modules.policies.flow import Sampling
from lightning_modules.policies.language import LanguagePolicy
from lightning_modules.prompt_rl import PromptRL
from lightning_modules.seeding import generators_for
from tests.lightning_modules.policies.family import PROMPTS, Family
from tests.lightning_modules.policies.test_families import FAMILIES, stock
from tests.lightning_modules.policies.test_flux1 import perturb

ROOT = Path(__file__).parents[2]
FLOW, LANGUAGE = "model.init_args.flow.init_args", "model.init_args.language.init_args"
LORA = [f"--{FLOW}.lora.rank=4", f"--{LANGUAGE}.lora.rank=4"]
LARGE = [f"--{FLOW}.learning_rate=3e-3", f"--{LANGUAGE}.learning_rate=3e-3"]  # so that a step shows in the images
PROMPT = "a photo of two red circles"


class Keep(L.Callback):
    """Holds on to the module that the command trains."""

    kept: list[PromptRL] = []

    def on_fit_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.kept[:] = [pl_module]

    on_test_end = on_fit_end


def run(root: Path, *options: str, command: str = "fit", export: dict[str, Any] | None = None) -> Path:
    """Trains two steps with Export added to the quickstart; the run's folder."""
    config = yaml.safe_load((ROOT / "configs/quickstart.yaml").read_text())
    config["trainer"]["callbacks"] = [
        config["trainer"]["callbacks"][0],
        {"class_path": "callbacks.export.Export", "init_args": export or {}},
        {"class_path": f"{__name__}.Keep"},
    ]
    config["trainer"] |= {"max_steps": 2, "val_check_interval": 1, "accelerator": "cpu"}
    root.mkdir(exist_ok=True)
    (root / "c.yaml").write_text(yaml.safe_dump(config))
    quick = ["--data.init_args.eval_prompts=6", "--data.init_args.batch_size=2", "--trainer.enable_progress_bar=false"]
    main([command, f"--config={root}/c.yaml", f"--trainer.default_root_dir={root}", *quick, *options])
    return sorted((root / "quickstart").iterdir())[-1]


def card_code(export: Path) -> str:
    """Both blocks of the card, as a reader would paste them."""
    return "\n".join(re.findall(r"```python\n(.*?)```", (export / "README.md").read_text(), re.DOTALL))


def use_card(export: Path, monkeypatch: pytest.MonkeyPatch, prompt: str = PROMPT) -> dict[str, Any]:
    """Runs the card's code in the export's folder, which sees the miniature as the training did."""
    if not (export / "miniature").exists():
        (export / "miniature").symlink_to(ROOT / "miniature")
    monkeypatch.chdir(export)
    names: dict[str, Any] = {}
    exec(card_code(export).replace('prompt = "..."', f"prompt = {prompt!r}"), names)
    monkeypatch.chdir(ROOT)
    return names


def largest_difference(module: PromptRL, names: dict[str, Any]) -> float:
    """Of pixels in [0, 1], between the policy's image and the stock pipeline's from the same noise."""
    ours = module.flow.generate([names["prompt"]], [7]).clamp(0, 1)
    noise = module.flow.prepare_latents(generators_for([7]))
    theirs = names["pipe"](prompt=names["prompt"], latents=noise, output_type="pt", **names["arguments"]).images
    assert theirs.std() > 0.05  # not one flat colour
    return float((ours - theirs).abs().max())


def untrained(module: PromptRL, prompt: str) -> float:
    """How far training moved the image of a prompt."""
    fresh = type(module.flow)(module.flow.model, module.flow.sampling, height=32, width=32, max_sequence_length=18,
                              dtype="float32", learning_rate=None)  # fmt: skip
    fresh.load()
    return float((fresh.generate([prompt], [7]) - module.flow.generate([prompt], [7])).abs().max())


@pytest.mark.parametrize("adapters", [LORA, []], ids=["lora", "full"])
def test_the_cards_code_draws_and_rewrites_the_same(
    adapters: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = run(tmp_path / "runs", *adapters, *LARGE)
    export = folder / "export"
    names = use_card(export, monkeypatch)
    (module,) = Keep.kept
    assert module.language is not None
    assert largest_difference(module, names) < 1e-4
    assert untrained(module, names["prompt"]) > 1e-2
    (rewrite,) = module.language.rewrite([PromptSample("0", PROMPT, "colors", {})])
    assert names["prompt"] == rewrite != PROMPT
    assert type(names["refiner"]).__module__.split(".")[0] == ("peft" if adapters else "transformers")
    assert names["image"].size == (32, 32)

    trained = {name: p for name, p in module.language.network.named_parameters()}
    loaded = dict(names["refiner"].named_parameters())
    assert loaded.keys() == trained.keys() and all(torch.equal(loaded[name], trained[name]) for name in loaded)


def test_contents_of_the_card(tmp_path: Path) -> None:
    folder = run(tmp_path / "runs", *LORA)
    export = folder / "export"
    assert {path.name for path in export.iterdir()} == {"flow", "language", "README.md", "config.yaml"}
    assert yaml.safe_load((export / "config.yaml").read_text()) == yaml.safe_load((folder / "config.yaml").read_text())
    assert not list(folder.glob(".export*"))
    card = (export / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    # The miniature is a folder, not a hub id, so it may not stand as base_model; the licence is the user's to choose.
    assert front == {
        "library_name": "diffusers",
        "tags": ["text-to-image", "reinforcement-learning", "promptrl", "lora"],
    }
    assert "# license: yours to choose" in card
    assert "````text\n{prompt}\n````" in card
    assert "| evaluation: sampler steps, no noise | 8 |" in card and "flow_sde, 0.8" in card
    assert "Optimizer steps: 2; images drawn for them: 32." in card
    results = json.loads((folder / "results.json").read_text())
    overall = [
        source["geneval"][mode]["overall"]
        for mode in ("without_pe", "with_pe")
        for source in (results["before"], results)
    ]
    assert "| geneval | without PE before | without PE after | with PE before | with PE after |" in card
    assert f"| overall | {' | '.join(f'{value:.3f}' for value in overall)} |" in card
    assert "| paraphrase |" in card and "| unseen |" in card


def test_only_what_was_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompt-only RL: the card takes the image model from its base."""
    folder = run(tmp_path / "runs", f"--{FLOW}.learning_rate=null", f"--{LANGUAGE}.learning_rate=3e-3")
    assert not (folder / "export" / "flow").exists()
    names = use_card(folder / "export", monkeypatch)
    assert largest_difference(Keep.kept[0], names) < 1e-4
    assert Keep.kept[0].language is not None
    assert names["prompt"] == Keep.kept[0].language.rewrite([PromptSample("0", PROMPT, "colors", {})])[0]


def test_a_checkpoint_is_exported_by_test_and_replaces_an_earlier_export(tmp_path: Path) -> None:
    there = tmp_path / "model"
    folder = run(tmp_path / "runs", *LARGE, export={"on_train_end": False, "directory": str(there)})
    assert not there.exists()
    checkpoint = f"--ckpt_path={folder}/checkpoints/last.ckpt"
    exporting = {"on_test_end": True, "directory": str(there)}
    for _ in range(2):
        tested = run(tmp_path / "runs", checkpoint, command="test", export=exporting)
    assert {path.name for path in there.iterdir()} == {"flow", "language", "README.md", "config.yaml"}
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    weights = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    refiner = LanguagePolicy(str(there / "language"), dtype="float32", learning_rate=None)
    refiner.load()
    loaded = {f"language.network.{name}": p for name, p in refiner.network.named_parameters()}
    assert all(torch.equal(loaded[name], weights[name]) for name in weights if name.startswith("language."))
    # Nothing was trained in this run, so there is one column a mode, of the test scenes.
    test = json.loads((tested / "results.json").read_text())["geneval"]
    card = (there / "README.md").read_text()
    assert "| geneval | without PE | with PE |" in card
    assert f"| overall | {test['without_pe']['overall']:.3f} | {test['with_pe']['overall']:.3f} |" in card


def test_exports_during_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []
    export = Export._export
    monkeypatch.setattr(Export, "_export", lambda self, t, m: (steps.append(t.global_step), export(self, t, m)))
    folder = run(
        tmp_path / "runs", *LORA, "--trainer.max_steps=5", "--trainer.limit_val_batches=0",
        export={"every_n_train_steps": 2, "on_train_end": False},
    )  # fmt: skip
    assert steps == [2, 4]
    assert "Optimizer steps: 4;" in (folder / "export" / "README.md").read_text()
    steps.clear()
    checkpoint = f"--ckpt_path={folder}/checkpoints/last.ckpt"
    run(tmp_path / "runs", *LORA, checkpoint, "--trainer.max_steps=7", export={"every_n_train_steps": 3})
    assert steps == [6, 7]  # from step 5 on; the last is that of the end


def test_folders_with_other_things_are_kept(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("years of work")
    with pytest.raises(SystemExit):
        run(tmp_path / "runs", export={"directory": str(mine)})
    line = capfd.readouterr().err.splitlines()[-1]
    assert re.search(r"error: Export's `directory` is .*mine, which holds thesis\.tex and .*give a new folder\.$", line)
    assert (mine / "thesis.tex").read_text() == "years of work"


def test_a_killed_export_leaves_the_earlier_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = tmp_path / "model"
    run(tmp_path / "runs", *LORA, export={"directory": str(there)})
    before = {path: path.read_bytes() for path in there.rglob("*") if path.is_file()}
    monkeypatch.setattr(LanguagePolicy, "save_pretrained", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        run(tmp_path / "runs", *LORA, *LARGE, export={"directory": str(there)})
    assert {path: path.read_bytes() for path in there.rglob("*") if path.is_file()} == before
    monkeypatch.undo()
    monkeypatch.chdir(ROOT)
    run(tmp_path / "runs", *LORA, *LARGE, export={"directory": str(there)})
    after = {path: path.read_bytes() for path in there.rglob("*") if path.is_file()}
    assert after.keys() == before.keys() and after != before
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


TEMPLATE = 'Say "it" well\\n, in """three""" lines:\n{prompt}\n<answer> or "nothing"'


def test_templates_survive_their_quotes(make_flow: Any, make_language: Any) -> None:
    language = make_language(template=TEMPLATE, chat_template_kwargs={"enable_thinking": False})
    code = drawing_code(make_flow(), language)
    (line,) = re.findall(r"^template = .*?(?=^chat = )", code, re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {}
    exec(line, names)
    assert names["template"] == TEMPLATE
    assert "add_generation_prompt=True, enable_thinking=False)" in code


CALLED = [family for family in FAMILIES if family.name != "qwen_image_edit"]  # its source's size is a constant


@pytest.mark.parametrize("family", CALLED, ids=lambda family: family.name)
def test_the_cards_arguments_draw_the_same_in_every_family(family: Family, tmp_path: Path) -> None:
    """The stock pipeline, called as the card says, on the family's tiny random model."""
    folder = family.save(tmp_path)
    policy: Any = family.load(folder, Sampling(8, 0, eval_steps=4))
    perturb(policy, 0.02)
    pipe: Any = stock(family, folder)
    pipe.transformer.load_state_dict(policy.network.state_dict())
    loading = loading_code(policy, None)
    assert f"pipe = {type(pipe).__name__}.from_pretrained('flow', torch_dtype=torch.float32)" in loading
    sampler = [line for line in loading.splitlines() if line.startswith(("from diffusers", "pipe.scheduler"))]
    exec("\n".join(sampler), {"pipe": pipe})  # Sana's is another than the folder's
    arguments = call_arguments(policy)
    assert arguments["num_inference_steps"] == 4
    images = family.images(1)
    if images is not None:
        arguments["image"] = images[0]
        assert 'arguments["image"]' in drawing_code(policy, None)
    ours = policy.generate(PROMPTS[2:], [3], images=images).clamp(0, 1)
    theirs = pipe(
        prompt=PROMPTS[2], latents=policy.prepare_latents(generators_for([3])), output_type="pt", **arguments
    ).images
    assert np.ptp(theirs.numpy()) > 0.05
    assert (ours - theirs).abs().max() < 1e-4
