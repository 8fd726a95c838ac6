"""The editing miniature's flow model: where its weights come from, what training fits, and what the shipped one can."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, FluxKontextPipeline, FluxPipeline
from PIL import Image
from torch import Tensor

from datamodules.sample import PromptSample
from lightning_modules.policies.flow import Sampling, to_pil
from lightning_modules.policies.flux1_kontext import KontextPolicy
from lightning_modules.seeding import generators_for, seed_of
from miniature.edits.pretraining import ShapesEditPretraining
from miniature.edits.reward import ShapesEditReward
from miniature.edits.wording import CATEGORIES, EditStyle, edit_vocabulary, write_edit
from miniature.edits.world import EditExample, example
from miniature.pretrain import EditFlowPretraining
from miniature.scenes.world import render
from rewards.base import RewardBatch, Score
from tests.lightning_modules.policies.tiny_flux1_kontext import draw

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:You are trying to `self.log")]

SHIPPED = "miniature/edit_flow"


def pretraining(**options: Any) -> EditFlowPretraining:
    module = EditFlowPretraining(**options)
    module.configure_model()
    return module


@pytest.fixture(scope="module")
def policy() -> KontextPolicy:
    policy = KontextPolicy(
        SHIPPED,
        Sampling(8, 0),
        auto_resize=False,
        height=32,
        width=32,
        max_sequence_length=18,
        learning_rate=None,
        dtype="float32",
    )
    policy.load()
    return policy


def edits(num: int, split: Any = "test") -> list[EditExample]:
    rng = random.Random("editor")
    return [example(rng, CATEGORIES[i % 6], split) for i in range(num)]


# --- how it is made ---------------------------------------------------------------------------------------------------


def test_the_editor_begins_with_the_drawers_weights_word_by_word() -> None:
    old: Any = FluxPipeline.from_pretrained("miniature/flow")
    new: Any = pretraining().pipe
    assert type(new).__name__ == "FluxKontextPipeline"
    for part in ("transformer", "vae"):
        for key, value in getattr(old, part).state_dict().items():
            torch.testing.assert_close(getattr(new, part).state_dict()[key], value, rtol=0, atol=0)
    for encoder, tokenizer in (("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2")):
        rows = []
        for pipe in (old, new):
            (word, *_) = getattr(pipe, tokenizer)(["circle"], add_special_tokens=False).input_ids[0]
            rows.append(getattr(pipe, encoder).get_input_embeddings().weight[word])
        torch.testing.assert_close(*rows, rtol=0, atol=0)
    for word in edit_vocabulary():
        assert len(new.tokenizer(word, add_special_tokens=False).input_ids) == 1
        assert new.tokenizer_2.unk_token_id not in new.tokenizer_2(word).input_ids


@torch.no_grad()
def test_the_loss_is_that_of_the_velocity_that_the_policy_predicts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same inputs, put together by KontextPolicy: source tokens, their ids, texts, guidance."""
    module = pretraining(init=SHIPPED, guidance=2.5)
    batch = next(iter(ShapesEditPretraining(batch_size=4, seed=5).train_dataloader()))
    seen: dict[str, Tensor] = {}
    lerp = torch.lerp

    def keep(start: Tensor, end: Tensor, weight: Tensor) -> Tensor:
        seen.update(clean=start, noise=end, sigma=weight[:, 0, 0])
        return lerp(start, end, weight)

    monkeypatch.setattr(torch, "lerp", keep)
    loss = module.training_step(batch, 0)
    monkeypatch.undo()
    policy = KontextPolicy(
        SHIPPED, Sampling(4, 0), auto_resize=False, height=32, width=32, max_sequence_length=18, dtype="float32"
    )
    policy.load()
    pixels = ((batch["sources"].permute(0, 2, 3, 1) + 1) * 127.5).round().byte().numpy()
    conditioning = policy.encode(batch["captions"], images=[Image.fromarray(one) for one in pixels])
    told = {name: conditioning[name] for name in conditioning.tensors}
    wanted = seen["noise"] - seen["clean"]
    errors = []
    for i in range(4):
        one = {key: value[i : i + 1] for key, value in told.items()}
        noisy = (1 - seen["sigma"][i]) * seen["clean"][i : i + 1] + seen["sigma"][i] * seen["noise"][i : i + 1]
        errors.append(F.mse_loss(policy.predict(noisy, seen["sigma"][i : i + 1], one), wanted[i : i + 1]))
    assert loss.item() == pytest.approx(torch.stack(errors).mean().item(), rel=1e-4)


def test_training_saves_a_stock_folder_that_can_be_continued(tmp_path: Path) -> None:
    module = pretraining(output=str(tmp_path))
    with torch.no_grad():
        for parameter in module.pipe.vae.parameters():
            parameter *= 1 + 1e-7  # what averaging may do to it
    module.on_train_end()
    again: Any = DiffusionPipeline.from_pretrained(tmp_path)
    first: Any = FluxPipeline.from_pretrained("miniature/flow")
    assert type(again).__name__ == "FluxKontextPipeline"
    for key, value in first.vae.state_dict().items():
        assert torch.equal(again.vae.state_dict()[key], value)
    for key, value in first.transformer.state_dict().items():
        torch.testing.assert_close(again.transformer.state_dict()[key], value, rtol=1e-3, atol=1e-6)
    assert {p.dtype for p in again.transformer.parameters()} == {torch.float32}, "only the file is in half precision"
    on = pretraining(init=str(tmp_path))
    for key, value in again.text_encoder_2.state_dict().items():
        assert torch.equal(on.pipe.text_encoder_2.state_dict()[key], value)


# --- what the shipped one can -----------------------------------------------------------------------------------------


def test_the_shipped_folder_is_small_and_draws_the_stock_pipelines_images(policy: KontextPolicy) -> None:
    assert sum(file.stat().st_size for file in Path(SHIPPED).rglob("*") if file.is_file()) < 4e6
    stock = FluxKontextPipeline.from_pretrained(SHIPPED)
    stock.set_progress_bar_config(disable=True)
    asked = edits(6)
    sources = [Image.fromarray(render(one.source)) for one in asked]
    prompts, seeds = [one.instruction for one in asked], list(range(6))
    ours = policy.generate(prompts, seeds, 8, images=sources).clamp(0, 1)
    theirs = draw(stock, policy, prompts, policy.prepare_latents(generators_for(seeds)), 8, sources)
    assert (ours - theirs).abs().max() < 1e-4


def marks(policy: KontextPolicy, asked: list[EditExample], prompts: list[str]) -> list[Score]:
    sources = [Image.fromarray(render(one.source)) for one in asked]
    samples = [
        PromptSample(o.id, o.instruction, o.category, o.metadata, s) for o, s in zip(asked, sources, strict=True)
    ]
    seeds = [seed_of("editor", i) for i in range(len(asked))]
    return ShapesEditReward()(RewardBatch(samples, to_pil(policy.generate(prompts, seeds, images=sources))))


def test_the_shipped_editor_follows_some_edits_and_names_help(policy: KontextPolicy) -> None:
    """Room to learn in every wording, more of it where the object is not named; and it is the words that count."""
    asked, rng = edits(96), random.Random(1)
    styles: tuple[EditStyle, ...] = ("canonical", "explicit")
    prompts: dict[str, list[str]] = {"no text": [""] * len(asked)}
    for style in styles:
        prompts[style] = [write_edit(one.edit, one.source, style, rng) for one in asked]
    found = {name: marks(policy, asked, texts) for name, texts in prompts.items()}
    strict = {name: float(np.mean([score.detail["strict"] for score in scores])) for name, scores in found.items()}
    assert 0.15 < strict["canonical"] < 0.45 and strict["canonical"] < strict["explicit"] < 0.65
    assert strict["no text"] < 0.1
