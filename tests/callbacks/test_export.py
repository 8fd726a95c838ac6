"""Exports: stock diffusers, transformers and peft load them by the card's own code and draw what the agents draw."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import yaml
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus
from PIL import Image
from safetensors.torch import load_file

from callbacks.export import Export
from callbacks.reporting.model_card import drawing_code, loading_code
from datamodules.base import PromptSample
from lightning_modules.cli import main
from lightning_modules.evaluation import EvaluatedAgents, evaluation_seeds
from lightning_modules.policies.base import LoRA
from lightning_modules.policies.flow import Sampling, to_pil
from lightning_modules.policies.flux1 import Flux1Policy
from lightning_modules.policies.language import LanguagePolicy
from lightning_modules.prompt_rl import PromptRL
from lightning_modules.seeding import generators_for
from miniature.scenes.prompts import ShapesPrompts
from tests.lightning_modules.policies import tiny_sd3
from tests.lightning_modules.policies.family import PROMPTS, Family
from tests.lightning_modules.policies.test_families import FAMILIES
from tests.lightning_modules.policies.test_flux1 import perturb
from tests.lightning_modules.policies.tiny_qwen_image_edit import QWEN_IMAGE_EDIT
from tests.short_runs import quick

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
FLOW, LANGUAGE = "model.init_args.flow.init_args", "model.init_args.language.init_args"
ADAPTERS = [f"--{FLOW}.lora.rank=4", f"--{LANGUAGE}.lora.rank=4"]
LARGE = [f"--{FLOW}.learning_rate=3e-3", f"--{LANGUAGE}.learning_rate=3e-3"]  # so that a step shows in the images
PROMPT = "a photo of two red circles"
CONTENTS = {"flow", "language", "samples", "README.md", "config.yaml"}


class Keep(L.Callback):
    """Holds on to the module that the command trains."""

    kept: list[PromptRL] = []

    def on_fit_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.kept[:] = [pl_module]


def run(root: Path, *options: str, command: str = "fit", export: dict[str, Any] | None = None) -> Path:
    """Trains two steps of the quickstart with Export, or tests; returns the run's folder."""
    config = yaml.safe_load((ROOT / "configs/quickstart.yaml").read_text())
    config["trainer"]["callbacks"] = [
        config["trainer"]["callbacks"][0],
        {"class_path": "callbacks.export.Export", "init_args": export or {}},
        {"class_path": f"{__name__}.Keep"},
    ]
    config["trainer"] |= {"max_steps": 2, "val_check_interval": 2}
    root.mkdir(exist_ok=True)
    (root / "c.yaml").write_text(yaml.safe_dump(config))
    main(quick(command, root, *options, config=root / "c.yaml"))
    return sorted((root / "quickstart").iterdir())[-1]


@dataclass
class Exported:
    """A run, the agents that it trained, and a folder of its own for the card's code."""

    folder: Path
    module: PromptRL

    @property
    def export(self) -> Path:
        return self.folder / "export"


def exported(root: Path, *options: str, **export: Any) -> Exported:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        return Exported(run(root, *options, export=export), Keep.kept[0])


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Adapters of both agents, with validations of six prompts."""
    return exported(tmp_path_factory.mktemp("lora"), *ADAPTERS, *LARGE, "--data.init_args.eval_prompts=6")


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """All weights of both agents."""
    return exported(tmp_path_factory.mktemp("full"), *LARGE, "--trainer.limit_val_batches=0")


def card_code(export: Path) -> str:
    """Both blocks of the card, as a reader would paste them."""
    return "\n".join(re.findall(r"```python\n(.*?)```", (export / "README.md").read_text(), re.DOTALL))


def use_card(export: Path, monkeypatch: pytest.MonkeyPatch, prompt: str = PROMPT) -> dict[str, Any]:
    """Runs the card's code in a folder of its own."""
    with TemporaryDirectory() as fresh:
        monkeypatch.chdir(fresh)
        names: dict[str, Any] = {}
        exec(re.sub(r"^prompt = '.*'$", f"prompt = {prompt!r}", card_code(export), flags=re.MULTILINE), names)
        assert Image.open("image.png").size == (32, 32)
        monkeypatch.chdir(ROOT)
    return names


def largest_difference(module: PromptRL, names: dict[str, Any]) -> float:
    """Largest difference of pixels in [0, 1] between the policy's image and the stock pipeline's, from equal noise."""
    ours = module.flow.generate([names["prompt"]], [7]).clamp(0, 1)
    noise = module.flow.prepare_latents(generators_for([7]))
    theirs = names["pipe"](prompt=names["prompt"], latents=noise, output_type="pt", **names["arguments"]).images
    assert theirs.std() > 0.05  # not one flat colour
    return float((ours - theirs).abs().max())


def untrained(module: PromptRL, prompt: str) -> float:
    """Largest difference of pixels that training made to the image of a prompt."""
    fresh = type(module.flow)(module.flow.model, module.flow.sampling, height=32, width=32, max_sequence_length=18,
                              dtype="float32", learning_rate=None)  # fmt: skip
    fresh.load()
    return float((fresh.generate([prompt], [7]) - module.flow.generate([prompt], [7])).abs().max())


@pytest.mark.parametrize("name", ["lora", "full"])
def test_the_cards_code_draws_and_rewrites_the_same(
    name: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    run: Exported = request.getfixturevalue(name)
    names = use_card(run.export, monkeypatch)
    language = run.module.language
    assert language is not None
    assert largest_difference(run.module, names) < 1e-4
    assert untrained(run.module, names["prompt"]) > 1e-2
    (rewrite,) = language.rewrite([PromptSample("0", PROMPT, "colors", {})])
    assert names["prompt"] == rewrite != PROMPT
    assert type(names["refiner"]).__module__.split(".")[0] == ("peft" if name == "lora" else "transformers")
    assert names["image"].size == (32, 32)

    trained = {name: p for name, p in language.network.named_parameters()}
    loaded = dict(names["refiner"].named_parameters())
    assert loaded.keys() == trained.keys() and all(torch.equal(loaded[name], trained[name]) for name in loaded)


def test_contents_of_the_card(lora: Exported) -> None:
    folder, export = lora.folder, lora.export
    assert {path.name for path in export.iterdir()} == CONTENTS
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
    assert "| evaluation: sampler steps, no noise | 2 |" in card and "flow_sde, 0.8" in card
    assert "Optimizer steps: 2; images drawn for them: 16." in card
    results = json.loads((folder / "results.json").read_text())
    overall = [
        source["geneval"][mode]["overall"]
        for mode in ("without_pe", "with_pe")
        for source in (results["before"], results)
    ]
    assert "| geneval | without PE before | without PE after | with PE before | with PE after |" in card
    assert f"| overall | {' | '.join(f'{value:.3f}' for value in overall)} |" in card
    assert "| paraphrase |" in card and "| unseen |" in card


def test_the_card_has_images_of_the_last_validation(lora: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four prompts, each with and without PE, that are what the exported agents draw of them."""
    card = (lora.export / "README.md").read_text()
    linked = re.findall(r'<img src="(.*?)"', card)
    assert linked == [f"samples/{number}_{mode}.png" for number in range(4) for mode in ("without_pe", "with_pe")]
    assert {path.name for path in (lora.export / "samples").iterdir()} == {Path(name).name for name in linked}
    samples = ShapesPrompts(eval_prompts=6).held_out("val")["geneval"][:6]
    (drawn, *_) = to_pil(lora.module.flow.generate([one.prompt for one in samples], evaluation_seeds(samples)))
    assert Image.open(lora.export / linked[0]).tobytes() == drawn.tobytes()
    assert f"| {samples[0].prompt} | <img" in card and f"prompt = {samples[0].prompt!r}\n" in card


class Hub:
    """Stands for huggingface_hub's `HfApi`."""

    calls: list[Any] = []
    error: OSError | None = None

    def create_repo(self, repo_id: str, **options: Any) -> None:
        self.calls.append(("create", repo_id, options))

    def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> str:
        if self.error is not None:
            raise self.error
        self.calls.append(("upload", repo_id, {path.name for path in folder_path.iterdir()}))
        return f"https://huggingface.co/{repo_id}"


def test_a_token_pushes_the_export_at_the_end_alone(
    lora: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("callbacks.export.HfApi", Hub)
    monkeypatch.setattr("callbacks.export.get_token", lambda: "hf_x")
    monkeypatch.setattr(Hub, "calls", [])
    export = Export(str(tmp_path / "model"), hub_id="me/small", every_n_train_steps=1)
    export.setup(fake_trainer(), lora.module, "fit")
    export.on_train_batch_end(fake_trainer(1), lora.module, None, None, 0)
    assert Hub.calls == []
    export.on_fit_end(fake_trainer(1), lora.module)
    assert Hub.calls == [
        ("create", "me/small", {"private": True, "exist_ok": True}),
        ("upload", "me/small", {"flow", "language", "README.md"}),
    ]
    code = card_code(tmp_path / "model")
    assert "from huggingface_hub import snapshot_download\n" in code
    assert "\nexport = snapshot_download('me/small')\n" in code

    monkeypatch.setattr(Hub, "error", OSError("403 Forbidden\nmore"))
    with pytest.warns(UserWarning, match=r"could not be pushed to me/small: 403 Forbidden; try `hf upload me/small"):
        export.on_fit_end(fake_trainer(1), lora.module)


def test_without_a_token_nothing_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("callbacks.export.get_token", lambda: None)
    with pytest.raises(SystemExit, match="2"):
        run(tmp_path, export={"hub_id": "me/small"})
    said = capfd.readouterr().err.splitlines()[-1]
    assert "`hub_id` is me/small, but there is no token to push with: run `hf auth login`" in said
    agents = EvaluatedAgents(Flux1Policy("nowhere", Sampling(8, 3)), None, torch.optim.SGD)
    with pytest.raises(ValueError, match="`hub_id` is small: give `owner/name`"):
        Export(hub_id="small").setup(fake_trainer(), agents, "fit")
    Export(hub_id="me/small").setup(fake_trainer(), agents, "test")  # which pushes nothing


def test_only_what_was_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompt-only RL, exported during training: the card takes the image model from its base."""
    frozen = (f"--{FLOW}.learning_rate=null", f"--{LANGUAGE}.learning_rate=3e-3", "--trainer.limit_val_batches=0")
    run = exported(tmp_path, *frozen, every_n_train_steps=2, on_train_end=False)
    assert not (run.export / "flow").exists()
    assert "Optimizer steps: 2;" in (run.export / "README.md").read_text()
    names = use_card(run.export, monkeypatch)
    assert largest_difference(run.module, names) < 1e-4
    assert run.module.language is not None
    assert names["prompt"] == run.module.language.rewrite([PromptSample("0", PROMPT, "colors", {})])[0]


def test_a_checkpoint_is_exported_by_test_and_replaces_an_earlier_export(
    lora: Exported, full: Exported, tmp_path: Path
) -> None:
    there = tmp_path / "model"
    shutil.copytree(lora.export, there)
    checkpoint = full.folder / "checkpoints" / "last.ckpt"
    exporting = {"on_train_end": False, "on_test_end": True, "directory": str(there)}
    tested = run(tmp_path / "runs", f"--ckpt_path={checkpoint}", command="test", export=exporting)
    assert {path.name for path in there.iterdir()} == CONTENTS
    assert not (there / "language" / "adapter_config.json").exists(), "of the earlier export"
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    weights = torch.load(checkpoint, weights_only=True)["state_dict"]
    refiner = LanguagePolicy(str(there / "language"), dtype="float32", learning_rate=None)
    refiner.load()
    loaded = {f"language.network.{name}": p for name, p in refiner.network.named_parameters()}
    assert all(torch.equal(loaded[name], weights[name]) for name in weights if name.startswith("language."))
    # Nothing was trained in this run, so there is one column a mode, of the test scenes.
    test = json.loads((tested / "results.json").read_text())["geneval"]
    card = (there / "README.md").read_text()
    assert "| geneval | without PE | with PE |" in card
    assert f"| overall | {test['without_pe']['overall']:.3f} | {test['with_pe']['overall']:.3f} |" in card


def fake_trainer(step: int = 0) -> Any:
    """Stands for the trainer of a run without a configuration, as far as Export uses it."""
    return SimpleNamespace(
        global_step=step, is_global_zero=True, callbacks=[], strategy=SimpleNamespace(barrier=lambda name: None)
    )


def test_steps_of_exports_during_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exports come when another three steps are complete, also where a rollout has two, and after a resume."""
    steps: list[int] = []
    monkeypatch.setattr(Export, "_export", lambda self, trainer, *_, **__: steps.append(trainer.global_step))
    export, nothing = Export(every_n_train_steps=3), L.LightningModule()
    export.on_train_start(fake_trainer(5), nothing)
    for step in (6, 8, 10, 11, 13):
        export.on_train_batch_end(fake_trainer(step), nothing, None, None, 0)
    assert steps == [6, 10, 13]
    export.on_fit_end(fake_trainer(14), nothing)
    export.on_test_end(fake_trainer(14), nothing)
    assert steps == [6, 10, 13, 14]


def test_folders_with_other_things_are_kept(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    agents = EvaluatedAgents(Flux1Policy("nowhere", Sampling(8, 3)), None, torch.optim.SGD)
    with pytest.raises(ValueError, match=r"`directory` is .*, which holds thesis\.tex and .*give a new folder"):
        Export(str(tmp_path)).setup(fake_trainer(), agents, "fit")
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_an_export_that_fails_leaves_the_earlier_one(
    lora: Exported, full: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = tmp_path / "model"
    export = Export(str(there))
    export._export(fake_trainer(), lora.module)
    before = {path: path.read_bytes() for path in there.rglob("*") if path.is_file()}
    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk full"):
        patch.setattr(LanguagePolicy, "save_pretrained", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
        export._export(fake_trainer(), full.module)
    assert {path: path.read_bytes() for path in there.rglob("*") if path.is_file()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


TEMPLATE = 'Say "it" well\\n, in """three""" lines:\n{prompt}\n<answer> or "nothing"'


def test_templates_survive_their_quotes(make_flow: Any, make_language: Any) -> None:
    language = make_language(template=TEMPLATE, chat_template_kwargs={"enable_thinking": False})
    code = drawing_code(make_flow(), language)
    (line,) = re.findall(r"^template = .*?(?=^chat = )", code, re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {}
    exec(line, names)
    assert names["template"] == TEMPLATE
    assert "add_generation_prompt=True, enable_thinking=False)" in code


STOCK = [family for family in FAMILIES if family.name != "qwen_image_edit"]  # stock diffusers cannot load it here


@pytest.mark.parametrize("lora", [None, LoRA(rank=4, alpha=8)], ids=["full", "lora"])
@pytest.mark.parametrize("family", STOCK, ids=lambda family: family.name)
def test_the_cards_code_draws_the_same_in_every_family(
    family: Family, lora: LoRA | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of the card's code, run in the export's folder, on the family's tiny random model."""
    folder = family.save(tmp_path / "base")
    policy: Any = family.load(folder, Sampling(8, 0, eval_steps=4), lora=lora)
    perturb(policy, 0.1 if lora else 0.02)
    policy.save_pretrained(tmp_path / "flow")
    names = run_card(policy, tmp_path, monkeypatch)
    assert (names["pipe"].config._name_or_path == "./flow") == (lora is None)
    arguments, images = names["arguments"], family.images(1)
    assert arguments["num_inference_steps"] == 4
    if images is not None:
        arguments["image"] = images[0]
        assert 'arguments["image"]' in drawing_code(policy, None)
    ours = policy.generate(PROMPTS[2:], [3], images=images).clamp(0, 1)
    theirs = names["pipe"](
        prompt=PROMPTS[2], latents=policy.prepare_latents(generators_for([3])), output_type="pt", **arguments
    ).images
    assert np.ptp(theirs.numpy()) > 0.05
    assert (ours - theirs).abs().max() < 1e-4


def run_card(policy: Any, export: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Runs the code of an export without a refiner, as it stands."""
    names: dict[str, Any] = {}
    with monkeypatch.context() as patch:
        patch.chdir(export)
        exec(f"{loading_code(policy, None)}\n{drawing_code(policy, None)}", names)
    assert names["image"].size == (policy.width, policy.height)
    return names


def test_the_cards_code_names_a_part_that_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SD3 without its T5, which stock diffusers loads only if it is told so."""
    tiny_sd3.build(t5=False).save_pretrained(tmp_path / "base")
    run_card(tiny_sd3.SD3.load(tmp_path / "base", Sampling(2, 0), learning_rate=None), tmp_path, monkeypatch)


def test_the_cards_code_has_an_image_where_one_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The stock pipeline enlarges every source to a megapixel, which takes this model 20 s.
    monkeypatch.setattr(pipeline_qwenimage_edit_plus, "VAE_IMAGE_SIZE", 64 * 64)
    policy: Any = QWEN_IMAGE_EDIT.load(QWEN_IMAGE_EDIT.save(tmp_path), Sampling(2, 0))
    names: dict[str, Any] = {"pipe": policy.pipe}
    monkeypatch.chdir(tmp_path)  # where it saves its image
    exec(drawing_code(policy, None), names)
    assert names["image"].size == (policy.width, policy.height)


# --- exports as the start of another run ------------------------------------------------------------------------------


def test_an_exported_lora_starts_a_run_and_is_evaluated_and_exported_where_it_is_frozen(
    lora: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The refiner goes on by `lora.path`, in front of the flow model frozen with its LoRA, given as `model`."""
    start = (
        f"--{FLOW}.model={lora.export}",
        f"--{FLOW}.learning_rate=null",
        f"--{LANGUAGE}.lora.path={lora.export}",
        f"--{LANGUAGE}.learning_rate=3e-3",
        "--data.init_args.eval_prompts=6",
    )
    again = exported(tmp_path, *start, "--preflight=stop")
    finals, starts = (json.loads((run.folder / "results.json").read_text()) for run in (lora, again))
    assert starts["before"]["geneval"] == finals["geneval"]
    trained = load_file(lora.export / "language" / "adapter_model.safetensors")
    further = load_file(again.export / "language" / "adapter_model.safetensors")
    assert trained.keys() == further.keys() and not all(torch.equal(trained[name], further[name]) for name in trained)
    for name, weight in load_file(lora.export / "flow" / "pytorch_lora_weights.safetensors").items():
        assert torch.equal(load_file(again.export / "flow" / "pytorch_lora_weights.safetensors")[name], weight)
    names = use_card(again.export, monkeypatch)
    assert largest_difference(again.module, names) < 1e-4
    card = (again.export / "README.md").read_text()
    assert "not trained here, with the LoRA in this folder" in card

    checkpoint = again.folder / "checkpoints" / "last.ckpt"
    with monkeypatch.context() as patch:
        patch.chdir(ROOT)
        more = run(tmp_path, *start, f"--ckpt_path={checkpoint}", "--trainer.max_steps=3")
    resumed = torch.load(more / "checkpoints" / "last.ckpt", weights_only=True)
    assert resumed["global_step"] == 3 and all(".default." in name for name in resumed["state_dict"])
