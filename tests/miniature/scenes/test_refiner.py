"""The editing miniature's refiner: what it is built of, what it is taught on, and what it has learned to see."""

from __future__ import annotations

import random
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    AutoTokenizer,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
)

from datamodules.sample import PromptSample
from lightning_modules.policies.vision_language import VisionLanguagePolicy
from miniature.edits.naming import named_correctly
from miniature.edits.rewrites import ShapesEditRewrites
from miniature.edits.wording import CATEGORIES, edit_vocabulary
from miniature.edits.world import EditExample, example
from miniature.pretrain_language import VisionLanguagePretraining
from miniature.scenes.world import render

pytestmark = pytest.mark.filterwarnings("ignore:You are trying to `self.log")

SHIPPED = "miniature/edit_language"


def load(folder: str | Path, **kwargs: Any) -> VisionLanguagePolicy:
    options = {"max_pixels": 1024, "max_new_tokens": 24, "eval_max_new_tokens": 24, "dtype": "float32"}
    policy = VisionLanguagePolicy(str(folder), "{prompt}", **(options | kwargs))
    policy.load()
    return policy


@cache
def examples() -> tuple[EditExample, ...]:
    """96 edits that nothing was trained on, all categories alike."""
    rng = random.Random("refiner")
    return tuple(example(rng, CATEGORIES[i % 6], "test") for i in range(96))


def ask(refiner: VisionLanguagePolicy, shown: tuple[EditExample | None, ...]) -> list[str]:
    """Greedy rewrites of the instructions, beside the images of `shown`."""
    images = [None if one is None else Image.fromarray(render(one.source)) for one in shown]
    pairs = zip(examples(), images, strict=True)
    return refiner.rewrite([PromptSample(one.id, one.instruction, "", {}, image) for one, image in pairs])


def share_named(rewrites: list[str]) -> float:
    named = [named_correctly(text, one.metadata) for text, one in zip(rewrites, examples(), strict=True)]
    return sum(one is True for one in named) / len(named)


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> tuple[VisionLanguagePretraining, list[float]]:
    """A few steps of teaching, and their losses."""
    torch.manual_seed(0)
    module = VisionLanguagePretraining(str(tmp_path_factory.mktemp("refiner")))
    module.configure_model()
    optimizer = torch.optim.AdamW(module.parameters(), 3e-3)
    losses = []
    for batch in islice(ShapesEditRewrites(batch_size=16).train_dataloader(), 20):
        loss = module.training_step(batch, 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    module.on_train_end()
    return module, losses


@pytest.mark.slow
def test_the_loss_is_of_the_completions_alone(taught: tuple[VisionLanguagePretraining, list[float]]) -> None:
    """The trainer's loss is minus the mean log-prob that the policy gives to the same tokens."""
    module, losses = taught
    assert losses[0] > 4 and losses[-1] < losses[0] - 1  # about log 115 for random weights
    policy = load(module.output)
    batch = next(iter(ShapesEditRewrites(batch_size=6, hidden=0.5, seed=7).train_dataloader()))
    assert 0 < batch["images"].count(None) < 6
    samples = [
        PromptSample(str(i), prompt, "", {}, image)
        for i, (prompt, image) in enumerate(zip(batch["prompts"], batch["images"], strict=True))
    ]
    ids, attention, seen = policy._encode(samples)
    answers = [policy.tokenizer(f"{text} <end>")["input_ids"] for text in batch["completions"]]
    total = count = 0.0
    with torch.no_grad():
        expected = module.eval().training_step(batch, 0)
        for row, answer in enumerate(answers):
            whole = torch.cat([ids[row : row + 1], torch.tensor([answer])], 1)
            mask = torch.cat([attention[row : row + 1], torch.ones(1, len(answer), dtype=torch.long)], 1)
            hidden = policy._hidden(whole, mask, None if seen is None else seen.rows(slice(row, row + 1)))
            logits = policy.causal_lm.get_output_embeddings()(hidden[:, -len(answer) - 1 : -1])
            total -= float(logits.log_softmax(-1).gather(2, torch.tensor(answer)[None, :, None]).sum())
            count += len(answer)
    assert total / count == pytest.approx(float(expected), abs=1e-5)


def test_the_vision_tower_learns_in_teaching_and_not_in_rl(
    taught: tuple[VisionLanguagePretraining, list[float]],
) -> None:
    module, _ = taught
    assert all(parameter.grad is not None for parameter in module.model.model.visual.parameters())
    policy = load(module.output)
    assert not any(parameter.requires_grad for parameter in policy.causal_lm.model.visual.parameters())


def test_the_folder_is_stock(taught: tuple[VisionLanguagePretraining, list[float]]) -> None:
    """It loads by transformers alone; a word is a token, and an 8 x 8 cell is one."""
    folder = taught[0].output
    model = AutoModelForImageTextToText.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    processor = Qwen2VLImageProcessorPil.from_pretrained(folder)
    assert type(model) is Qwen2_5_VLForConditionalGeneration
    assert sum(file.stat().st_size for file in folder.iterdir()) < 2_000_000
    words = [*edit_vocabulary(), "<answer>", "</answer>"]
    ids = tokenizer(" ".join(words))["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == words and tokenizer.decode(ids) == " ".join(words)
    image = Image.fromarray(render(examples()[0].source))
    grid = processor([image], return_tensors="pt")["image_grid_thw"]
    assert grid.tolist() == [[1, 8, 8]] and model.config.vision_config.spatial_merge_size == 2
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "remove it"}]}],
        tokenize=False, add_generation_prompt=True,
    )  # fmt: skip
    assert chat == "<user> <vision><image></vision> remove it <end> <assistant> "
    text = tokenizer.apply_chat_template([{"role": "user", "content": "remove it"}], tokenize=False)
    assert text == "<user> remove it <end> "


@pytest.mark.slow
@pytest.mark.skipif(not Path(SHIPPED).is_dir(), reason="the editing miniature's refiner is not there")
def test_the_shipped_refiner_needs_the_image() -> None:
    """It names the object by the right image, and guesses without it or beside another (chance: about 1 in 24)."""
    refiner = load(SHIPPED)
    others = (*examples()[6:], *examples()[:6])
    assert share_named(ask(refiner, examples())) > 0.7
    assert share_named(ask(refiner, others)) < 0.15
    assert share_named(ask(refiner, (None,) * 96)) < 0.15
    assert share_named(ask(load(SHIPPED, see_source=False), examples())) < 0.15
