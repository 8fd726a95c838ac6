"""LoRA adapters from files: both agents start from them or are evaluated with them, and nothing is left out unsaid."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError
from peft import LoHaConfig, LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from datamodules.sample import PromptSample
from lightning_modules.policies import adapters, loading
from lightning_modules.policies.base import LoRA
from lightning_modules.policies.flow import Sampling
from lightning_modules.policies.flux1 import Flux1Policy
from lightning_modules.policies.language import LanguagePolicy
from lightning_modules.preflight.check import Setting, estimate
from lightning_modules.prompt_rl import PromptRL
from tests.lightning_modules.policies.family import PROMPTS, Family, Red
from tests.lightning_modules.policies.test_families import FAMILIES
from tests.lightning_modules.policies.test_flux1 import perturb
from tests.lightning_modules.policies.test_vision_language import SAMPLES, load
from tests.lightning_modules.policies.tiny_vision_language import KINDS, build

MakeFlow = Callable[..., Flux1Policy]
MakeLanguage = Callable[..., LanguagePolicy]
SMALL = LoRA(rank=4, alpha=8)
FLUX_WEIGHTS = "pytorch_lora_weights.safetensors"


def draw(policy: Any, images: Any = None) -> Tensor:
    drawn: Tensor = policy.generate(PROMPTS[:2], [5, 6], images=images)
    return drawn


def learning(policy: Any) -> list[str]:
    return [name for name, parameter in policy.named_parameters() if parameter.requires_grad]


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensor]:
    """A LoRA of the shipped FLUX, as `save_pretrained` writes it, and two images that it draws."""
    folder = tmp_path_factory.mktemp("flux_lora")
    options: dict[str, Any] = {"height": 32, "width": 32, "max_sequence_length": 18, "dtype": "float32", "lora": SMALL}
    policy = Flux1Policy("miniature/flow", Sampling(4, 2), **options)
    policy.load()
    perturb(policy, 0.2)
    policy.save_pretrained(folder)
    return folder, draw(policy)


@pytest.fixture(scope="module")
def refiner(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A peft adapter of the shipped refiner, and the rewrites that it writes."""
    folder = tmp_path_factory.mktemp("language_lora")
    policy = LanguagePolicy("miniature/language", "{prompt}", dtype="float32", eval_max_new_tokens=24, lora=SMALL)
    policy.load()
    perturb(policy, 0.1)
    policy.save_pretrained(folder)
    return folder, policy.rewrite(TEXTS)


TEXTS = [PromptSample(str(number), prompt, "", {}) for number, prompt in enumerate(PROMPTS)]


# --- image models -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_family_goes_on_from_its_export(family: Family, tmp_path: Path) -> None:
    """The same images frozen and at the start of training, by `lora.path` and as `model`; the KL starts from there."""
    base, export, images = family.save(tmp_path / "base"), tmp_path / "export", family.images(2)
    first = family.load(base, Sampling(4, 2), lora=SMALL)
    bare = draw(first, images)
    perturb(first, 0.2)
    first.save_pretrained(export / "flow")
    drawn = draw(first, images)
    assert (drawn - bare).abs().max() > 0.01

    frozen = family.load(base, Sampling(4, 2), lora=LoRA(path=str(export)), learning_rate=None)
    torch.testing.assert_close(draw(frozen, images), drawn, atol=1e-6, rtol=0)
    assert learning(frozen) == []

    policy = family.load(export / "flow", Sampling(4, 2), kl_weight=0.1)
    assert policy.model == str(base) and learning(policy) == learning(first)
    trajectory = policy.rollout(PROMPTS[:2], [1, 2], images=images)
    with torch.no_grad(), policy.reference():
        reference = policy.replay(trajectory, 0)
        torch.testing.assert_close(draw(policy, images), drawn, atol=1e-6, rtol=0)
    # Equal weights at other addresses may round otherwise.
    assert policy.replay(trajectory, 0).kl(reference).abs().max() < 1e-12
    assert learning(policy) == learning(first)
    perturb(policy, 0.1)
    kl = policy.replay(trajectory, 0).kl(reference)
    assert kl.min() > 0
    with torch.no_grad(), policy.reference():  # between a forward and a backward pass, as in the objective
        torch.testing.assert_close(policy.replay(trajectory, 0).mean, reference.mean, atol=1e-6, rtol=0)
    kl.sum().backward()
    assert any(parameter.grad is not None and parameter.grad.any() for parameter in policy.parameters())
    policy.save_pretrained(tmp_path / "second")
    again = family.load(tmp_path / "second", Sampling(4, 2), learning_rate=None)
    torch.testing.assert_close(draw(again, images), draw(policy, images), atol=1e-6, rtol=0)


def kohya(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Renames one attention layer to kohya's names; alpha 8 of rank 4 is the LoRA's own scale."""
    name = "transformer.transformer_blocks.0.attn.to_out.0"
    renamed = "lora_unet_double_blocks_0_img_attn_proj"
    return {
        f"{renamed}.lora_down.weight": weights[f"{name}.lora_A.weight"],
        f"{renamed}.lora_up.weight": weights[f"{name}.lora_B.weight"],
        f"{renamed}.alpha": torch.tensor(8.0),
    }


def test_formats_of_other_trainers(make_flow: MakeFlow, flux: tuple[Path, Tensor], tmp_path: Path) -> None:
    folder, drawn = flux
    policy = make_flow(lora=LoRA(path=str(folder)))
    policy.network.save_lora_adapter(tmp_path / "bare")  # diffusers, without the pipeline's prefix
    weights = load_file(folder / FLUX_WEIGHTS)
    peft = tmp_path / "peft"
    peft.mkdir()
    policy.network.peft_config["default"].save_pretrained(peft)
    names = {name: f"base_model.model.{name.removeprefix('transformer.')}" for name in weights}
    save_file({names[name]: weight for name, weight in weights.items()}, peft / "adapter_model.safetensors")
    shutil.copy(folder / FLUX_WEIGHTS, tmp_path / "mine.safetensors")
    for path in (tmp_path / "bare", peft, tmp_path / "mine.safetensors"):
        loaded = make_flow(sampling=Sampling(4, 2), lora=LoRA(path=str(path)), learning_rate=None)
        assert torch.equal(draw(loaded), drawn), path

    # Without metadata alpha is the rank, so the weights that draw the same are twice as large in one factor.
    plain = {name: weight * (2 if "lora_B" in name else 1) for name, weight in weights.items()}
    save_file(plain, tmp_path / "plain.safetensors")
    loaded = make_flow(sampling=Sampling(4, 2), lora=LoRA(path=str(tmp_path / "plain.safetensors")), learning_rate=None)
    torch.testing.assert_close(draw(loaded), drawn, atol=1e-5, rtol=0)

    # Ranks that differ from layer to layer, as other trainers choose them.
    wide = {"lora_A": lambda w: torch.cat([w, w]), "lora_B": lambda w: torch.cat([w, w], 1) / 2}
    mixed = {
        name: wide[name.split(".")[-2]](weight) if "blocks.0.attn.to_q" in name else weight
        for name, weight in plain.items()
    }
    save_file(mixed, tmp_path / "mixed.safetensors")
    for path in (tmp_path / "mixed.safetensors", tmp_path / "again"):
        loaded = make_flow(sampling=Sampling(4, 2), lora=LoRA(path=str(path)))
        torch.testing.assert_close(draw(loaded), drawn, atol=1e-5, rtol=0)
        loaded.save_pretrained(tmp_path / "again")
    with pytest.raises(ValueError, match=r"`flow\.lora\.rank` is 4, but 4, 8 in "):
        make_flow(lora=LoRA(rank=4, path=str(tmp_path / "again")))

    one = {name: weight for name, weight in weights.items() if "blocks.0.attn.to_out" in name}
    one = {name: weight for name, weight in one.items() if "single" not in name}
    with safe_open(folder / FLUX_WEIGHTS, framework="pt") as file:
        metadata = json.loads(file.metadata()["lora_adapter_metadata"])
    metadata["transformer.target_modules"] = ["transformer_blocks.0.attn.to_out.0"]
    save_file(one, tmp_path / "one.safetensors", {"lora_adapter_metadata": json.dumps(metadata)})
    save_file(kohya(weights), tmp_path / "kohya.safetensors")
    theirs, ours = (
        make_flow(lora=LoRA(path=str(tmp_path / name)), learning_rate=None)
        for name in ("kohya.safetensors", "one.safetensors")
    )
    assert (draw(ours) - draw(make_flow(learning_rate=None))).abs().max() > 1e-3
    torch.testing.assert_close(draw(theirs), draw(ours), atol=1e-5, rtol=0)


def test_adapters_keep_their_precision_in_a_bf16_network(make_flow: MakeFlow, flux: tuple[Path, Tensor]) -> None:
    policy = make_flow(lora=LoRA(path=str(flux[0])), dtype="bfloat16", kl_weight=0.1)
    weights = load_file(flux[0] / FLUX_WEIGHTS)
    for adapter in ("default", "reference"):
        for name, weight in weights.items():
            where = name.removeprefix("transformer.").replace(".weight", f".{adapter}.weight")
            assert torch.equal(policy.network.get_parameter(where), weight)
    assert len(learning(policy)) == len(weights)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda w: w | {"transformer.nothing.to_q.lora_A.weight": torch.ones(4, 4)},
         r"FluxTransformer2DModel has no layers for nothing\.to_q\.lora_A\.weight"),
        (lambda w: {name: weight[:, :-1] if "lora_A" in name else weight for name, weight in w.items()},
         r"size mismatch for .*lora_A\.default\.weight.* more\)"),
        (lambda w: w | {"text_encoder.layers.0.q_proj.lora_A.weight": torch.ones(4, 4)},
         r"text_encoder\.layers\.0\.q_proj\.lora_A\.weight cannot be loaded: only LoRA weights of the transformer"),
        (lambda w: w | {"transformer.transformer_blocks.0.attn.to_q.dora_scale": torch.ones(4)},
         r"attn\.to_q\.dora_scale cannot be loaded"),
        (lambda w: {name: weight for i, (name, weight) in enumerate(w.items()) if i},
         r"missing keys in the model: .*lora_A\.default\.weight"),
        (lambda w: kohya(w) | {"lora_unet_double_blocks_0_img_other.lora_down.weight": torch.ones(4, 4)},
         r"img_other"),
        (lambda w: {"weight": torch.ones(2)}, r"it holds no LoRA weights, but weight"),
    ],
    ids=["names", "shapes", "text encoder", "dora", "missing", "kohya", "no lora"],
)  # fmt: skip
def test_what_does_not_fit_is_named(
    make_flow: MakeFlow, flux: tuple[Path, Tensor], tmp_path: Path, change: Any, said: str
) -> None:
    weights = change(load_file(flux[0] / FLUX_WEIGHTS))
    save_file({name: weight.contiguous() for name, weight in weights.items()}, tmp_path / FLUX_WEIGHTS)
    with pytest.raises(ValueError, match=rf"`flow\.lora\.path` {tmp_path} does not fit FluxTransf.*{said}") as error:
        make_flow(lora=LoRA(path=str(tmp_path)))
    assert "\n" not in str(error.value) and len(str(error.value)) < 800


def test_another_agents_or_another_models_adapter(
    make_flow: MakeFlow, make_language: MakeLanguage, flux: tuple[Path, Tensor], refiner: tuple[Path, list[str]]
) -> None:
    with pytest.raises(ValueError, match=r"FluxTransformer2DModel has no layers for model\.layers\.0\..* more"):
        make_flow(lora=LoRA(path=str(refiner[0])))
    with pytest.raises(ValueError, match=r"`language\.lora\.path` is .*, which has no adapter_model\.safetensors"):
        make_language(lora=LoRA(path=str(flux[0])))
    for make, agent in ((make_flow, "flow"), (make_language, "language")):
        with pytest.raises(ValueError, match=rf"`{agent}\.lora\.path`: there is no folder nowhere: give an existing"):
            make(lora=LoRA(path="nowhere"))


@pytest.mark.parametrize("agent", ["flow", "language"])
def test_settings_that_contradict_the_adapter(
    agent: str,
    make_flow: MakeFlow,
    make_language: MakeLanguage,
    flux: tuple[Path, Tensor],
    refiner: tuple[Path, list[str]],
) -> None:
    make: Any = make_flow if agent == "flow" else make_language
    path, target = (str(flux[0]), "to_q") if agent == "flow" else (str(refiner[0]), "q_proj")
    every = Flux1Policy.default_lora_targets if agent == "flow" else LanguagePolicy.default_lora_targets
    make(lora=LoRA(4, 8, every, path))
    for lora, said in (
        (LoRA(rank=8, path=path), r"rank` is 8, but 4 in .*: leave `rank` out"),
        (LoRA(alpha=4, path=path), r"alpha` is 4, but 8 in .*: leave `alpha` out"),
        (LoRA(targets=[target], path=path), r"targets` are other layers than .*: leave `targets` out"),
    ):
        with pytest.raises(ValueError, match=rf"`{agent}\.lora\.{said}"):
            make(lora=lora)
    with pytest.raises(ValueError, match=rf"`{agent}\.model` is a LoRA, .* give the base model as `{agent}\.model`"):
        (Flux1Policy(path, Sampling(4, 2), lora=LoRA(path="other")) if agent == "flow" else LanguagePolicy(
            path, lora=LoRA(path="other"))).load()  # fmt: skip


# --- refiners ---------------------------------------------------------------------------------------------------------


def test_a_refiner_goes_on_from_its_export(refiner: tuple[Path, list[str]], tmp_path: Path) -> None:
    folder, rewrites = refiner
    export = tmp_path / "export"
    shutil.copytree(folder, export / "language")
    small: dict[str, Any] = {"template": "{prompt}", "dtype": "float32", "eval_max_new_tokens": 24}
    bare = LanguagePolicy("miniature/language", **small, learning_rate=None)
    bare.load()
    assert bare.rewrite(TEXTS) != rewrites
    for model, lora in ((folder, None), (export, None), ("miniature/language", LoRA(path=str(export)))):
        frozen = LanguagePolicy(str(model), **small, learning_rate=None, lora=lora)
        frozen.load()
        assert frozen.rewrite(TEXTS) == rewrites and learning(frozen) == []

    policy = LanguagePolicy(str(folder), **small, kl_weight=0.1)
    policy.load()
    assert len(learning(policy)) == len(load_file(folder / "adapter_model.safetensors"))
    completions = policy.refine(TEXTS, 2)
    with torch.no_grad():
        before = policy.log_probs(completions)
        perturb(policy, 0.1)
        with policy.reference():
            assert torch.equal(policy.log_probs(completions), before)
            assert policy.rewrite(TEXTS) == rewrites
        after = policy.log_probs(completions)
    assert (after - before).abs().max() > 0.01
    policy.save_pretrained(tmp_path / "second")
    assert not (tmp_path / "second" / "reference").exists()
    base = AutoModelForCausalLM.from_pretrained("miniature/language")
    stock = PeftModel.from_pretrained(base, tmp_path / "second")
    ids = completions.prompt_ids[-1:]
    torch.testing.assert_close(stock.eval()(ids).logits, policy.network(ids).logits, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="keeps no reference"), without_kl(folder).reference():
        pass


def without_kl(folder: Path) -> LanguagePolicy:
    policy = LanguagePolicy(str(folder), "{prompt}", dtype="float32", kl_weight=0.0)
    policy.load()
    return policy


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_refiner_that_sees_images_goes_on_from_its_export(kind: str, tmp_path: Path) -> None:
    base = build(kind, tmp_path)
    policy = load(base, lora=SMALL)
    perturb(policy, 0.1)
    policy.save_pretrained(tmp_path / "lora")
    rewrites = policy.rewrite(SAMPLES)
    assert load(base, learning_rate=None).rewrite(SAMPLES) != rewrites
    assert load(tmp_path / "lora", learning_rate=None).rewrite(SAMPLES) == rewrites
    again = load(tmp_path / "lora")
    assert learning(again) == learning(policy)
    completions = again.refine(SAMPLES, 1)
    with torch.no_grad():
        before = again.log_probs(completions)
        perturb(again, 0.1)
        with again.reference():
            assert torch.equal(again.log_probs(completions), before)


@pytest.mark.parametrize("fault", ["layers", "shapes", "missing", "kind"])
def test_what_does_not_fit_a_refiner_is_named(
    make_language: MakeLanguage, refiner: tuple[Path, list[str]], tmp_path: Path, fault: str
) -> None:
    shutil.copytree(refiner[0], tmp_path, dirs_exist_ok=True)
    file = tmp_path / "adapter_model.safetensors"
    weights = load_file(file)
    first = min(weights)
    if fault == "layers":
        weights[first.replace("layers.0", "layers.77")] = weights[first].clone()
        said = r"the model has no layers for base_model\.model\.model\.layers\.77"
    elif fault == "shapes":
        weights[first] = weights[first][:, :-1].contiguous()
        said = r"size mismatch for .*layers\.0.* \(0 more\)"
    elif fault == "missing":
        del weights[first]
        said = r"its configuration asks for .*layers\.0\..*, which it does not hold"
    else:
        base = AutoModelForCausalLM.from_pretrained("miniature/language")
        get_peft_model(base, LoHaConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
        weights = load_file(file)
        said = r"it is a .*LOHA, and only LoRA can be loaded"
    save_file(weights, file)
    with pytest.raises(ValueError, match=rf"`language\.lora\.path` {tmp_path} does not fit Qwen3.*: {said}") as error:
        make_language(lora=LoRA(path=str(tmp_path)))
    assert "\n" not in str(error.value)


# --- base models ------------------------------------------------------------------------------------------------------


def test_an_adapter_without_its_base_model_says_which_keys_to_use(
    flux: tuple[Path, Tensor], refiner: tuple[Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = r"give the base model as `{0}\.model` and the LoRA as `{0}\.lora\.path`"
    plain = tmp_path / "plain"
    plain.mkdir()
    save_file(load_file(flux[0] / FLUX_WEIGHTS), plain / FLUX_WEIGHTS)
    with pytest.raises(ValueError, match=r"does not name its base model: " + keys.format("flow")):
        Flux1Policy(str(plain), Sampling(4, 2)).load()
    moved = shutil.copytree(refiner[0], tmp_path / "moved")
    config = json.loads((moved / "adapter_config.json").read_text())
    assert Path(config["base_model_name_or_path"]).is_absolute()
    for name, said in (
        (None, "does not name its base model"),
        ("/no/such/base", "of /no/such/base, which is not here"),
    ):
        (moved / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": name}))
        with pytest.raises(ValueError, match=rf"{said}: " + keys.format("language")):
            LanguagePolicy(str(moved)).load()
    with pytest.raises(ValueError, match=r"`flow\.lora\.path` is .* are missing and no other .* give the file itself"):
        Flux1Policy("miniature/flow", Sampling(4, 2), height=32, width=32, lora=LoRA(path=str(tmp_path))).load()

    def absent(model: str, name: str) -> str:
        response: Any = type("Response", (), {"headers": {}, "request": None})()
        raise EntryNotFoundError(f"no {name}", response)

    monkeypatch.setattr(loading, "hf_hub_download", absent)
    monkeypatch.setattr(adapters, "hf_hub_download", absent)
    with pytest.raises(ValueError, match=r"it has no model_index\.json; if it is a LoRA, give its base model as `flow"):
        Flux1Policy("someone/lora", Sampling(4, 2)).load()
    with pytest.raises(ValueError, match=r"someone/lora, a hub id with neither .*: download the file and give its"):
        Flux1Policy("miniature/flow", Sampling(4, 2), height=32, width=32, lora=LoRA(path="someone/lora")).load()


def test_a_hub_ids_adapter(
    make_flow: MakeFlow, flux: tuple[Path, Tensor], refiner: tuple[Path, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapters, "hf_hub_download", lambda model, name: str(flux[0] / name))
    policy = make_flow(sampling=Sampling(4, 2), lora=LoRA(path="someone/lora"), learning_rate=None)
    assert torch.equal(draw(policy), flux[1])
    monkeypatch.setattr(adapters, "find_adapter_config_file", lambda model: str(refiner[0] / "adapter_config.json"))
    found = adapters.base_and_adapter("someone/refiner", "language")
    assert found == (str(Path("miniature/language").resolve()), "someone/refiner")


# --- checkpoints and memory -------------------------------------------------------------------------------------------


def test_checkpoints_and_the_estimate_see_the_same_weights(
    flux: tuple[Path, Tensor], refiner: tuple[Path, list[str]]
) -> None:
    """A checkpoint holds the trained adapter alone, and fits a fresh LoRA of the same settings."""

    def agents(flow_lora: LoRA, language_lora: LoRA) -> PromptRL:
        sizes: dict[str, Any] = {"height": 32, "width": 32, "max_sequence_length": 18, "dtype": "float32"}
        return PromptRL(
            Flux1Policy("miniature/flow", Sampling(4, 2), kl_weight=0.1, lora=flow_lora, **sizes),
            Red(),
            LanguagePolicy("miniature/language", "{prompt}", dtype="float32", lora=language_lora),
        )

    module = agents(LoRA(path=str(flux[0])), LoRA(path=str(refiner[0])))
    found = {network.name: network for network in estimate(module, Setting(cuda=False)).networks}
    module.configure_model()
    checkpoint: dict[str, Any] = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    assert all(".default." in name for name in checkpoint["state_dict"])
    for name, network in (("flow.transformer", module.flow.network), ("language", module.language.network)):  # type: ignore[union-attr]
        assert found[name].parameters == sum(p.numel() for p in network.parameters())
        assert found[name].trained == sum(p.numel() for p in network.parameters() if p.requires_grad) > 0
    fresh = agents(SMALL, SMALL)
    fresh.configure_model()
    fresh.on_load_checkpoint(checkpoint)
    fresh.load_state_dict(checkpoint["state_dict"], strict=False)
    assert torch.equal(draw(fresh.flow), flux[1])
    wrong = agents(LoRA(rank=4, alpha=8, targets=["to_q"]), SMALL)
    wrong.configure_model()
    with pytest.raises(ValueError, match="does not fit this configuration"):
        wrong.on_load_checkpoint(checkpoint)


def test_quantized_frozen_weights_under_a_loaded_adapter(make_flow: MakeFlow, flux: tuple[Path, Tensor]) -> None:
    policy = make_flow(flux[0], lora=None, quantization="int8", kl_weight=0.1)
    assert len(learning(policy)) == len(load_file(flux[0] / FLUX_WEIGHTS))
    assert LoraConfig(**policy.network.peft_config["default"].to_dict()).r == 4
