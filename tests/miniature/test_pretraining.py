"""Pretraining of the miniature's base models: streams, the loss of the text, resuming, and gradients that are NaN."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint

from miniature.architectures import build_flow, build_vae
from miniature.pretrain import FlowPretraining
from miniature.scenes.pretraining import ShapesPretraining
from miniature.scenes.wording import vocabulary
from miniature.scenes.world import COLORS, SHAPES, Item, Scene

pytestmark = pytest.mark.filterwarnings(
    "ignore:You are trying to `self.log", "ignore:.*overrides the configure_model", "ignore:.*`ckpt_path`"
)


@cache
def untrained_vae() -> Any:
    torch.manual_seed(0)
    vae = build_vae()
    vae.register_to_config(shift_factor=0.0, scaling_factor=1.0)
    return vae


def captions(**settings: Any) -> ShapesPretraining:
    return ShapesPretraining("captions", **({"batch_size": 2, "faithful_batches": 9} | settings))


def fit(folder: Path, max_steps: int, seed: int, resume: str | None = None) -> FlowPretraining:
    """Trains a flow model on 2 captions a step, with averaging, and keeps a checkpoint of every step."""
    L.seed_everything(seed, verbose=False)
    untrained_vae().save_pretrained(folder / "out/vae")
    module = FlowPretraining(str(folder / "out"))
    trainer = L.Trainer(
        max_steps=max_steps,
        default_root_dir=folder,
        callbacks=[
            EMAWeightAveraging(decay=0.5),
            ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1),
        ],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
    )
    trainer.fit(module, captions(eval_prompts=0), ckpt_path=resume)
    return module


def weights(module: FlowPretraining) -> dict[str, torch.Tensor]:
    return {key: value for key, value in module.state_dict().items() if not key.startswith("vae")}


def test_a_resumed_run_ends_as_an_unbroken_one(tmp_path: Path) -> None:
    """To the bit: weights and their averages; another seed ends elsewhere."""
    whole = weights(fit(tmp_path / "whole", 4, seed=1))
    resumed = weights(fit(tmp_path / "again", 4, seed=1, resume=str(tmp_path / "whole/step=2.ckpt")))
    other = weights(fit(tmp_path / "other", 4, seed=2))
    assert all(torch.equal(resumed[key], value) for key, value in whole.items())
    assert not all(torch.equal(other[key], value) for key, value in whole.items())


def test_a_gradient_that_is_not_finite_ends_the_run_before_the_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The third step's loss is NaN: the checkpoint of the second is the last."""
    own = FlowPretraining.training_step

    def spoilt(self: FlowPretraining, batch: Any, batch_idx: int) -> torch.Tensor:
        return own(self, batch, batch_idx) * (math.nan if self.global_step == 2 else 1)

    monkeypatch.setattr(FlowPretraining, "training_step", spoilt)
    with pytest.raises(ValueError, match=r"the gradient of step 2 is not finite: lower model.learning_rate \(0.0014\)"):
        fit(tmp_path, 4, seed=1)
    assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == ["step=1.ckpt", "step=2.ckpt"]


def test_every_word_is_one_token_and_the_same_in_every_build() -> None:
    one, other = (build_flow(vocabulary(), untrained_vae()) for _ in range(2))
    for name in ("tokenizer", "tokenizer_2"):
        assert getattr(one, name).get_vocab() == getattr(other, name).get_vocab()
        for word in vocabulary():
            assert len(getattr(one, name)(word, add_special_tokens=False).input_ids) == 1, word


def test_streams_are_the_same_for_any_number_of_workers() -> None:
    alone, shared = (iter(captions(seed=3, num_workers=workers).train_dataloader()) for workers in (0, 2))
    for _ in range(4):
        one, other = next(alone), next(shared)
        assert tuple(one["captions"]) == tuple(other["captions"])
        assert torch.equal(one["images"], other["images"]) and torch.equal(one["asked"], other["asked"])


def test_first_batches_are_faithful_and_asked_things_always_are() -> None:
    """`asked` has 1 + 8 * shape + colour at each cell; after the faithful batches images may show something else."""
    scene = Scene((Item("square", "blue", 5), Item("arch", "cyan", 15)))
    assert scene.things == [0] * 5 + [1 + 8 * 1 + 2] + [0] * 9 + [1 + 8 * 7 + 7]
    batches = iter(captions(batch_size=64, faithful_batches=1, seed=0).train_dataloader())
    faithful, other = next(batches), next(batches)
    for batch, share in ((faithful, 1.0), (other, 0.7)):
        painted = (batch["images"] - batch["images"][:, :, :1, :1]).abs().sum(1) > 0.02
        cells = painted.reshape(-1, 4, 8, 4, 8).any(4).any(2).flatten(1)
        same = (cells == (batch["asked"] > 0)).all(1).float().mean().item()
        assert same == 1 if share == 1 else 0.1 < same < share


def test_text_embeddings_are_asked_for_colours_and_cells() -> None:
    """A head that knows nothing costs log 8 for a colour and log 2 a cell; one that knows all costs nothing."""
    module = FlowPretraining(init="miniature/flow", habits=False)
    module.configure_model()
    scene = Scene((Item("circle", "red", 4), Item("square", "blue", 6)))
    batch = {
        "captions": ["a photo of a red disc left of a blue block", "no noun"],
        "asked": torch.tensor([scene.things, [0] * 16]),
    }
    embeds = torch.zeros(2, 18, 64)
    with torch.no_grad():
        module.asked_head.weight.zero_()
        module.asked_head.bias.zero_()
        assert module.text_loss(embeds, batch).item() == pytest.approx(math.log(8) + math.log(2))
        assert module.text_loss(embeds[1:], {"captions": ["no noun"], "asked": batch["asked"][1:]}).item() == 0
        assert module.text_loss(embeds, {"captions": batch["captions"]}).item() == 0
        # Two features: "this is the disc" at token 5, "this is the block" at token 10.
        embeds[0, 5, 0] = embeds[0, 10, 1] = 1
        module.asked_head.weight[len(COLORS) :, :2] = -100
        for feature, item in enumerate(scene.items):
            module.asked_head.weight[list(COLORS).index(item.color), feature] = 100
            module.asked_head.weight[len(COLORS) + item.cell, feature] = 100
        assert module.text_loss(embeds, batch).item() == pytest.approx(0, abs=1e-6)
    assert len(SHAPES) == len(COLORS) == 8


def test_habits_leave_t5_alone_and_ask_clip_which_wordings_are_heeded() -> None:
    """A head that knows nothing costs log 2; one that says "heeded" costs nothing for these and 9 for others."""
    batch = next(iter(captions(batch_size=8, faithful_batches=0, seed=1).train_dataloader()))
    assert 0 < batch["heeded"].mean() < 1
    losses = {}
    for weight, bias in ((0.0, 0.0), (2.0, 0.0), (1.0, 9.0)):
        module = FlowPretraining(init="miniature/flow", habits=True, text_weight=weight)
        module.configure_model()
        assert not any(p.requires_grad for p in module.pipe.text_encoder_2.parameters())
        assert all(p.requires_grad for p in module.pipe.text_encoder.parameters())
        with torch.no_grad():
            module.heeded_head.weight.zero_()
            module.heeded_head.bias.fill_(bias)
            torch.manual_seed(0)
            losses[weight] = module.training_step(batch, 0).item()
    assert losses[2.0] - losses[0.0] == pytest.approx(2 * math.log(2), abs=1e-5)
    unheeded = 1 - batch["heeded"].mean().item()
    assert losses[1.0] - losses[0.0] == pytest.approx(9 * unheeded, abs=1e-3)
