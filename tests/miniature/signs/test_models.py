"""The models that know scenes and words: where their weights come from, and what the shipped folders can do."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline
from PIL import Image
from transformers import AutoModelForCausalLM, AutoTokenizer

from datamodules.sample import PromptSample
from lightning_modules.policies.flow import Sampling, to_pil
from lightning_modules.policies.flux1 import Flux1Policy
from lightning_modules.policies.language import LanguagePolicy
from lightning_modules.seeding import seed_of
from miniature.pretrain import WordsFlowPretraining
from miniature.pretrain_language import LanguagePretraining
from miniature.signs.prompts import word_prompts
from miniature.signs.reader import PixelFontReader
from miniature.signs.world import first_column, read_caption, words_vocabulary
from rewards.base import RewardBatch
from rewards.ocr import OCRReward

ROOT = Path(__file__).parents[3]
FLOW, LANGUAGE = ROOT / "miniature/words_flow", ROOT / "miniature/words_language"


def read_as(samples: list[PromptSample], images: list[Image.Image]) -> float:
    """Mean OCR reward."""
    scores = OCRReward(PixelFontReader(), max_extra=0)(RewardBatch(samples, images))
    return sum(score.native for score in scores) / len(scores)


def embedding(encoder: Any, tokenizer: Any, word: str) -> torch.Tensor:
    row: torch.Tensor = encoder.get_input_embeddings().weight[tokenizer.get_vocab()[word]]
    return row


# --- how they are made ------------------------------------------------------------------------------------------------


def test_the_flow_model_begins_with_the_scenes_weights() -> None:
    """All of the transformer and the known words; the autoencoder is its own, every word one token."""
    module = WordsFlowPretraining(str(FLOW), init=str(ROOT / "miniature/flow"))
    module.configure_model()
    old: Any = FluxPipeline.from_pretrained(ROOT / "miniature/flow")
    new: Any = module.pipe
    for key, value in old.transformer.state_dict().items():
        assert torch.equal(new.transformer.state_dict()[key], value)
    assert torch.equal(
        embedding(old.text_encoder_2, old.tokenizer_2, "circle"),
        embedding(new.text_encoder_2, new.tokenizer_2, "circle"),
    )
    shipped: Any = FluxPipeline.from_pretrained(FLOW)
    for key, value in shipped.vae.state_dict().items():
        assert torch.equal(new.vae.state_dict()[key], value)
    for word in words_vocabulary():
        assert len(new.tokenizer(word, add_special_tokens=False).input_ids) == 1
        assert new.tokenizer_2.unk_token_id not in new.tokenizer_2(word).input_ids


def test_the_flow_model_goes_on_from_its_own_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is kept, unless the world has learnt new words since."""
    shipped: Any = FluxPipeline.from_pretrained(FLOW)
    known = [word for word in words_vocabulary() if word in shipped.tokenizer_2.get_vocab()]
    monkeypatch.setattr("miniature.pretrain.words_vocabulary", lambda: known)
    module = WordsFlowPretraining(str(FLOW), init=str(FLOW))
    module.configure_model()
    for part in ("transformer", "text_encoder", "text_encoder_2", "vae"):
        for key, value in getattr(shipped, part).state_dict().items():
            assert torch.equal(getattr(module.pipe, part).state_dict()[key], value), f"{part}.{key}"


def test_it_needs_an_autoencoder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no autoencoder in .*vae: run pretrain_words_vae.yaml first"):
        WordsFlowPretraining(str(tmp_path)).configure_model()


def test_the_refiner_begins_with_the_scenes_weights() -> None:
    module = LanguagePretraining(signs=True, init=str(ROOT / "miniature/language"))
    module.configure_model()
    old = AutoModelForCausalLM.from_pretrained(ROOT / "miniature/language")
    words = AutoTokenizer.from_pretrained(ROOT / "miniature/language")
    assert torch.equal(embedding(old, words, "circle"), embedding(module.model, module.tokenizer, "circle"))
    for key, value in old.model.layers.state_dict().items():
        assert torch.equal(module.model.model.layers.state_dict()[key], value)
    assert set(words_vocabulary()) <= module.tokenizer.get_vocab().keys()


@pytest.mark.filterwarnings("ignore:You are trying to `self.log")
def test_text_embeddings_are_asked_for_the_letters_columns() -> None:
    """Embeddings that tell each letter's column cost nothing, any others log 4; scenes are not asked."""
    module = WordsFlowPretraining(str(FLOW), init=str(FLOW))
    module.configure_model()
    captions = ['write " c u p "', "two red circles", 'a sign that says " H e z o "', 'write " p u "']
    letters = {0: (2, 0, 3), 2: (5, 0, 4), 3: (2, 1, 2)}  # first token, first column, number: two stand in the middle
    embeds = torch.zeros(4, 18, 64)
    for row, (token, column, num) in letters.items():
        for i in range(num):
            embeds[row, token + i, column + i] = 1
    with torch.no_grad():
        module.column_head.weight.copy_(torch.eye(64)[:4] * 100)
        module.column_head.bias.zero_()
        assert module.text_loss(embeds, {"captions": captions}).item() == pytest.approx(0, abs=1e-6)
        assert module.text_loss(torch.zeros(4, 18, 64), {"captions": captions}).item() == pytest.approx(math.log(4))
        wrong = module.text_loss(embeds.roll(1, dims=2), {"captions": captions}).item()
        assert wrong == pytest.approx((8 * 100 + math.log(4)) / 9), "a column too far; after the last there is none"
        assert module.text_loss(embeds[1:2], {"captions": captions[1:2]}).item() == 0


# --- what is shipped --------------------------------------------------------------------------------------------------


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_the_folders_are_stock_and_small() -> None:
    assert size(FLOW) < 3_500_000 and size(LANGUAGE) < 1_500_000
    pipe: Any = FluxPipeline.from_pretrained(FLOW)
    assert type(pipe).__module__.startswith("diffusers")
    image = pipe(
        'a sign that says " c u p "',
        height=32,
        width=32,
        num_inference_steps=2,
        max_sequence_length=18,
        generator=torch.Generator().manual_seed(0),
    ).images[0]
    assert image.size == (32, 32)
    model = AutoModelForCausalLM.from_pretrained(LANGUAGE)
    tokenizer = AutoTokenizer.from_pretrained(LANGUAGE)
    assert type(model).__name__ == "Qwen3ForCausalLM"
    text = 'a sign that says " C u p "'
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_reader_reads_what_it_draws() -> None:
    """Held-out words are spelt far better than the words of other prompts would be by the same images."""
    policy = Flux1Policy(
        str(FLOW), Sampling(8, 0), height=32, width=32, max_sequence_length=18, learning_rate=None, dtype="float32"
    )
    policy.load()
    samples = word_prompts("val", "val", "canonical", 48, 0)
    seeds = [seed_of("words", i) for i in range(48)]
    images = to_pil(policy.generate([sample.prompt for sample in samples], seeds))
    asked, others = read_as(samples, images), read_as(samples[3:] + samples[:3], images)
    assert 0.5 < asked < 0.9 and asked > others + 0.3, "RL has something to teach"


def test_the_text_encoder_tells_where_a_letter_is() -> None:
    """A linear probe of T5's embeddings, fitted to some words, finds the columns of other words' letters."""
    pipe: Any = FluxPipeline.from_pretrained(FLOW)
    embeds, columns = [], []
    for split in ("train", "val"):
        samples = word_prompts("probe", split, "canonical", 96, 0)  # type: ignore[arg-type]
        ids = pipe.tokenizer_2([sample.prompt for sample in samples], padding="max_length", max_length=18)["input_ids"]
        with torch.no_grad():
            encoded = pipe.text_encoder_2(torch.tensor(ids))[0]
        words = [sample.metadata["text"][0] for sample in samples]
        places = [(i, 5 + j, first_column(len(word)) + j) for i, word in enumerate(words) for j in range(len(word))]
        rows, tokens, column = torch.tensor(places).unbind(1)
        embeds.append(torch.nn.functional.pad(encoded[rows, tokens], (0, 1), value=1.0))
        columns.append(column)
    probe = torch.linalg.lstsq(embeds[0], torch.nn.functional.one_hot(columns[0]).float()).solution
    assert ((embeds[1] @ probe).argmax(1) == columns[1]).float().mean() > 0.95


def test_the_refiner_keeps_the_letters() -> None:
    refiner = LanguagePolicy(str(LANGUAGE), "{prompt}", max_new_tokens=32, eval_max_new_tokens=32, dtype="float32")
    refiner.load()
    samples = word_prompts("val", "val", "canonical", 48, 0)
    rewrites = refiner.rewrite(samples)
    kept = [read_caption(text) == sample.metadata["text"][0] for sample, text in zip(samples, rewrites, strict=True)]
    assert sum(kept) / 48 > 0.9
    assert not any(text == sample.prompt for sample, text in zip(samples, rewrites, strict=True))
