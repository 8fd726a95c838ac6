"""A refiner with a vision tower: with the source image in view, and on text alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoTokenizer, Qwen2VLImageProcessorPil

from datamodules.sample import PromptSample
from lightning_modules.policies.base import LoRA
from lightning_modules.policies.flow import Sampling
from lightning_modules.policies.language import LanguagePolicy
from lightning_modules.policies.templates import parse_answer
from lightning_modules.policies.vision_language import VisionLanguagePolicy
from lightning_modules.prompt_rl import PromptRL
from lightning_modules.rollout import Completions
from tests.lightning_modules.policies.family import Red
from tests.lightning_modules.policies.test_language import perturb
from tests.lightning_modules.policies.tiny_flux1_kontext import FLUX1_KONTEXT
from tests.lightning_modules.policies.tiny_vision_language import KINDS, WITH_IMAGES, WORDS_ONLY, build
from tests.lightning_modules.test_prompt_rl import attach

Make = Callable[..., VisionLanguagePolicy]
LORA = LoRA(rank=4, alpha=8)

every_kind = pytest.mark.parametrize("kind", KINDS)
full_and_lora = pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
seeing_or_not = pytest.mark.parametrize("cls", [VisionLanguagePolicy, LanguagePolicy], ids=["image", "text"])


def make_image(seed: int, width: int, height: int) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


SAMPLES = [
    PromptSample("0", "make the circle red", "", {}, make_image(0, 96, 128)),
    PromptSample("1", "put two blue squares left of a very large green triangle", "", {}, make_image(1, 128, 64)),
    PromptSample("2", "one cross", "", {}, None),
]
"""Two sizes of images, and one prompt without."""


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: build(kind, tmp_path_factory.mktemp(kind)) for kind in KINDS}


def load(folder: Path, cls: Any = VisionLanguagePolicy, **kwargs: Any) -> Any:
    defaults = {"template": "{prompt}", "max_new_tokens": 12, "eval_max_new_tokens": 12, "dtype": "float32"}
    policy = cls(str(folder), **(defaults | kwargs))
    policy.load()
    return policy


def stock_inputs(policy: Any, folder: Path, sample: PromptSample, answer: Tensor | None = None) -> dict[str, Tensor]:
    """Inputs of transformers' model for one row, without padding: pixels, grid, and which tokens are an image's."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    content: Any = sample.prompt
    inputs: dict[str, Tensor] = {}
    count = 0
    if sample.image is not None and isinstance(policy, VisionLanguagePolicy):
        content = [{"type": "image"}, {"type": "text", "text": sample.prompt}]
        inputs = dict(Qwen2VLImageProcessorPil.from_pretrained(folder)([sample.image], return_tensors="pt"))
        count = int(inputs["image_grid_thw"].prod()) // 4
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], chat_template=WITH_IMAGES, add_generation_prompt=True, tokenize=False
    )
    ids = tokenizer(text.replace("<|image_pad|>", "<|image_pad|>" * count), return_tensors="pt")["input_ids"]
    kinds = (ids == tokenizer.convert_tokens_to_ids("<|image_pad|>")).int()
    if answer is not None:
        ids, kinds = torch.cat([ids, answer[None]], 1), torch.cat([kinds, torch.zeros_like(answer)[None].int()], 1)
    return {"input_ids": ids, "mm_token_type_ids": kinds, **inputs}


@torch.no_grad()
def largest_difference(policy: Any, completions: Completions) -> float:
    return float((policy.log_probs(completions) - completions.log_probs)[completions.mask].abs().max())


@every_kind
@full_and_lora
@seeing_or_not
def test_replayed_log_probs_are_the_sampled_ones(
    folders: dict[str, Path], kind: str, lora: LoRA | None, cls: Any
) -> None:
    """Left padding, ragged completions, image tokens in them; groups of another size right after."""
    policy = load(folders[kind], cls, lora=lora, temperature=0.8)
    perturb(policy)
    image = policy.causal_lm.config.image_token_id
    drawn = 0
    for num in (6, 4):
        completions = policy.refine(SAMPLES, num)
        drawn += int(((completions.tokens == image) & completions.mask).sum())
        assert completions.prompt_mask.sum(1).unique().numel() == 3 and completions.mask.sum(1).unique().numel() > 1
        assert largest_difference(policy, completions) < 1e-5
        halves = [policy.log_probs(completions.rows(rows)) for rows in (slice(0, num + 1), slice(num + 1, None))]
        torch.testing.assert_close(torch.cat(halves), policy.log_probs(completions), atol=1e-5, rtol=0)
    assert drawn > 0
    policy.network.double()
    assert largest_difference(policy, policy.refine(SAMPLES, 4)) < 2e-6  # what rounding log-probs to fp32 leaves


@every_kind
def test_columns_of_padding_make_no_difference(folders: dict[str, Path], kind: str) -> None:
    """Micro-batches of the update, the shorter of which have shorter prompts, with images and without."""
    policy = load(folders[kind])
    completions = policy.refine(SAMPLES, 4)
    widths = set()
    for rows in completions.micro_batches(3):
        cut = completions.rows(rows).trimmed()
        widths.add(cut.prompt_ids.shape[1])
        whole = policy.log_probs(completions.rows(rows))[:, : cut.tokens.shape[1]]
        torch.testing.assert_close(policy.log_probs(cut)[cut.mask], whole[cut.mask], atol=1e-5, rtol=0)
    assert len(widths) > 1


@every_kind
@seeing_or_not
def test_rewrites_that_are_drawn_in_parts_are_one_batch(folders: dict[str, Path], kind: str, cls: Any) -> None:
    """One prompt at a time, of three lengths, the last without an image; each completion fits its own prompt."""
    policy = load(folders[kind], cls, rollout_batch_size=4)
    perturb(policy)
    parts = [policy._write([sample], 4, 12, greedy=False) for sample in SAMPLES]
    torch.manual_seed(0)
    completions = policy.refine(SAMPLES, 4)
    assert len(completions) == 12 and completions.prompt_ids.shape[1] == max(p.prompt_ids.shape[1] for p in parts)
    assert completions.prompt_mask.sum(1).unique().numel() == 3
    assert largest_difference(policy, completions) < 1e-5
    torch.manual_seed(0)
    alone = [policy._write([sample], 4, 12, greedy=False) for sample in SAMPLES]  # the same draws, not joined
    assert completions.rewrites == [rewrite for part in alone for rewrite in part.rewrites]
    for number, part in enumerate(alone):
        rows = completions.rows(slice(4 * number, 4 * number + 4))
        torch.testing.assert_close(rows.log_probs[rows.mask], part.log_probs[part.mask])
    assert policy.rewrite(SAMPLES) == [policy.rewrite([sample])[0] for sample in SAMPLES]


@pytest.mark.slow
@every_kind
@seeing_or_not
def test_log_probs_and_greedy_rewrites_are_the_stock_models(folders: dict[str, Path], kind: str, cls: Any) -> None:
    """Reference: transformers' own forward pass and `generate`, pixels in, one row at a time, no padding."""
    policy = load(folders[kind], cls)
    completions = policy.refine(SAMPLES, 6)
    model = AutoModelForImageTextToText.from_pretrained(folders[kind]).eval()
    with torch.no_grad():
        ours = policy.log_probs(completions)
    compared = 0
    for row in range(len(completions)):
        answer = completions.tokens[row][completions.mask[row]]
        images = (answer == model.config.image_token_id).nonzero().flatten().tolist()
        answer = answer[: images[0] + 1 if images else None]  # behind it the stock model would look for an image
        with torch.no_grad():
            logits = model(**stock_inputs(policy, folders[kind], SAMPLES[row // 6], answer[:-1])).logits[0]
        expected = torch.distributions.Categorical(logits=logits[-len(answer) :]).log_prob(answer)
        torch.testing.assert_close(ours[row, : len(answer)], expected, atol=2e-5, rtol=0)
        compared += len(answer)
    assert compared > 40
    for sample, rewrite in zip(SAMPLES, policy.rewrite(SAMPLES), strict=True):
        inputs = stock_inputs(policy, folders[kind], sample)
        model.model.rope_deltas = None
        tokens = model.generate(**inputs, do_sample=False, max_new_tokens=12)[0, inputs["input_ids"].shape[1] :]
        text = policy.tokenizer.decode(tokens, skip_special_tokens=True)
        assert parse_answer(text, sample.prompt).rewrite == rewrite


@every_kind
@full_and_lora
@seeing_or_not
def test_only_the_language_model_learns(folders: dict[str, Path], kind: str, lora: LoRA | None, cls: Any) -> None:
    policy = load(folders[kind], cls, lora=lora)
    completions = policy.refine(SAMPLES, 2)
    policy.log_probs(completions)[completions.mask].sum().backward()
    trained = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    assert all("language_model" in name or "lm_head" in name for name in trained)
    assert not any("visual" in name for name, _ in policy.named_parameters() if "lora" in name)
    if lora:
        assert len(trained) == 2 * 7 * 2  # A and B of seven layers in two blocks
        trained = {name: p for name, p in trained.items() if "lora_B" in name}  # A has no gradient while B is 0
    else:
        everything = dict(policy.network.model.language_model.named_parameters())
        assert len(trained) == len(everything) + 1  # and the head
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained.values())


@every_kind
def test_an_image_is_looked_at_once_and_a_prompt_is_read_once(folders: dict[str, Path], kind: str) -> None:
    policy = load(folders[kind])
    looks: list[int] = []
    rows: list[int] = []
    model = policy.causal_lm.base_model
    model.visual.register_forward_pre_hook(
        lambda m, args, kwargs: looks.append(len(kwargs["grid_thw"])), with_kwargs=True
    )
    model.language_model.register_forward_pre_hook(
        lambda m, args, kwargs: rows.append(len(kwargs["attention_mask"])), with_kwargs=True
    )
    completions = policy.refine(SAMPLES, 4)
    policy.log_probs(completions)
    assert looks == [2] and rows[:2] == [3, 12] and rows[-1] == 12
    assert rows[1:-1] == sorted(rows[1:-1], reverse=True)


@every_kind
def test_images_count(folders: dict[str, Path], kind: str) -> None:
    """The same completions are less or more likely beside another image; the row without one does not change."""
    policy = load(folders[kind])
    completions = policy.refine(SAMPLES, 2)
    seen = completions.seen
    # 96 x 128 and 128 x 64 pixels, in tokens of 28 or 32 pixels a side.
    expected = {"qwen2_5_vl": [3 * 5, 5 * 2, 0], "qwen3_vl": [3 * 4, 4 * 2, 0]}
    assert seen is not None and [len(image) for image in seen.features] == expected[kind]
    features = tuple(image.flip(0) for image in seen.features)
    other = Completions(**(vars(completions) | {"seen": type(seen)(features, seen.index, seen.mask, seen.positions)}))
    difference = (policy.log_probs(other) - policy.log_probs(completions)).abs().amax(1)
    assert (difference[:4] > 1e-3).all() and (difference[4:] == 0).all()


@every_kind
@full_and_lora
def test_reference_and_saved_weights(folders: dict[str, Path], kind: str, lora: LoRA | None, tmp_path: Path) -> None:
    policy = load(folders[kind], lora=lora, kl_weight=0.1)
    completions = policy.refine(SAMPLES, 2)
    with torch.no_grad():
        before = policy.log_probs(completions)
        perturb(policy)
        after = policy.log_probs(completions)
        with policy.reference():
            assert torch.equal(policy.log_probs(completions), before)
    assert (after - before).abs().max() > 0.01
    policy.save_pretrained(tmp_path)
    again = load(folders[kind] if lora else tmp_path)  # the full export holds all that a policy needs
    if lora:
        again.network = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(folders[kind]), tmp_path)
    else:
        assert AutoModelForImageTextToText.from_pretrained(tmp_path).config.model_type == kind
    ids, _, seen = again._encode(SAMPLES)
    assert seen is not None and torch.equal(ids, completions.prompt_ids[::2])
    with torch.no_grad():
        torch.testing.assert_close(again.log_probs(completions), after, atol=1e-5, rtol=0)


def test_large_images_are_scaled_to_the_budget(folders: dict[str, Path]) -> None:
    sample = PromptSample("0", "one cross", "", {}, make_image(0, 700, 560))
    tokens = {}
    for budget in (200_704, 16 * 28 * 28):
        seen = load(folders["qwen2_5_vl"], max_pixels=budget)._encode([sample])[2]
        tokens[budget] = len(seen.features[0])
    # 700 x 560 at the same aspect ratio: 17 x 14 = 238 of at most 256 tokens, and 4 x 3 of at most 16.
    assert tokens == {200_704: 17 * 14, 16 * 28 * 28: 4 * 3}


def test_an_image_token_in_a_prompt_is_left_out(folders: dict[str, Path]) -> None:
    policy = load(folders["qwen2_5_vl"])
    plain, odd = (PromptSample("0", f"one {token}cross", "", {}, SAMPLES[1].image) for token in ("", "<|image_pad|>"))
    assert torch.equal(policy._encode([plain])[0], policy._encode([odd])[0])


def test_a_hidden_source_is_read_as_text(folders: dict[str, Path]) -> None:
    """Same chats, same numbers as for samples that have no image."""
    blind, sighted = (load(folders["qwen2_5_vl"], see_source=see) for see in (False, True))
    without = [PromptSample(sample.id, sample.prompt, "", {}) for sample in SAMPLES]
    completions = blind.refine(SAMPLES, 2)
    assert completions.seen is None and largest_difference(blind, completions) < 1e-5
    assert torch.equal(completions.prompt_ids[::2], sighted._encode(without)[0])
    assert blind.rewrite(SAMPLES) == sighted.rewrite(without) != sighted.rewrite(SAMPLES)


def test_editing_and_refining_together(folders: dict[str, Path], tmp_path: Path) -> None:
    """A step of RL with an editing model: on-policy for both, and both move."""
    flow = FLUX1_KONTEXT.load(FLUX1_KONTEXT.save(tmp_path), Sampling(2, 1), learning_rate=1e-3)
    refiner = load(folders["qwen2_5_vl"], learning_rate=1e-2, micro_batch_size=3)
    module = attach(PromptRL(flow, Red(), refiner, group_size=4, num_retained=2))
    images = FLUX1_KONTEXT.images(2)
    assert images is not None
    samples = [PromptSample(str(i), SAMPLES[i].prompt, "", {}, image) for i, image in enumerate(images)]
    rollout = module.collect(samples)
    assert rollout.completions is not None and rollout.completions.seen is not None
    assert largest_difference(refiner, rollout.completions) < 1e-5
    module.update(rollout)
    assert largest_difference(refiner, rollout.completions) > 1e-3


def test_bad_settings_say_what_to_do(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`language\.max_pixels` is 100, less than one token"):
        VisionLanguagePolicy("any/model", max_pixels=100)
    with pytest.raises(ValueError, match="miniature/language is a qwen3, .* use one of qwen2_5_vl, qwen3_vl"):
        VisionLanguagePolicy("miniature/language").load()
    folder = tmp_path / "words"
    shutil.copytree(folders["qwen2_5_vl"], folder)
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": WORDS_ONLY}))
    with pytest.raises(ValueError, match="puts 0 images into a message with one"):
        VisionLanguagePolicy(str(folder)).load()
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match=rf"cannot load {folder}: .*preprocessor_config\.json"):
        VisionLanguagePolicy(str(folder)).load()
