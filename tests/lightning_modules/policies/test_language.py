"""The refiner: sampling, replay, and the parsing of answers."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AddedToken, AutoModelForCausalLM, AutoTokenizer

from datamodules.base import PromptSample
from lightning_modules.policies.base import LoRA
from lightning_modules.policies.language import LanguagePolicy

MakeLanguage = Callable[..., LanguagePolicy]
LORA = LoRA(rank=4, alpha=8)


def perturb(module: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter += 0.02 * torch.randn(parameter.shape, generator=generator).to(parameter)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_replayed_log_probs_are_the_sampled_ones(
    make_language: MakeLanguage, samples: list[PromptSample], lora: LoRA | None, temperature: float
) -> None:
    """Prompts of different lengths (left padding) and completions of different lengths."""
    policy = make_language(lora=lora, temperature=temperature)
    perturb(policy)
    completions = policy.refine(samples, 5)
    assert completions.prompt_mask.sum(1).unique().numel() > 1 and completions.mask.sum(1).unique().numel() > 1
    difference = (policy.log_probs(completions) - completions.log_probs)[completions.mask]
    assert difference.abs().max() < 1e-5


def test_log_probs_equal_a_plain_forward_pass_of_each_row(
    make_language: MakeLanguage, samples: list[PromptSample]
) -> None:
    """Reference: transformers alone, no padding, no cache, one row at a time."""
    policy = make_language(temperature=0.8)
    completions = policy.refine(samples, 2)
    model = AutoModelForCausalLM.from_pretrained("miniature/language").eval()
    ours = policy.log_probs(completions)
    for row in range(len(completions)):
        prompt = completions.prompt_ids[row][completions.prompt_mask[row].bool()]
        answer = completions.tokens[row][completions.mask[row]]
        logits = model(torch.cat([prompt, answer])[None]).logits[0, len(prompt) - 1 : -1] / 0.8
        expected = torch.distributions.Categorical(logits=logits).log_prob(answer)
        torch.testing.assert_close(ours[row][completions.mask[row]], expected, atol=2e-5, rtol=0)


def test_draws_from_the_models_own_distribution(make_language: MakeLanguage, samples: list[PromptSample]) -> None:
    """Frequencies of the third token match the softmax, though the model's generation config asks for top-k 1."""
    policy = make_language(max_new_tokens=2)
    policy.network.generation_config.top_k = 1
    policy.network.generation_config.repetition_penalty = 5.0
    completions = policy.refine(samples[:1], 4000)
    counts = torch.bincount(completions.tokens[:, 1], minlength=policy.network.config.vocab_size) / 4000
    row = torch.cat([completions.prompt_ids[:1], completions.tokens[:1, :1]], 1)
    with torch.no_grad():
        expected = policy.network(row).logits[0, -1].softmax(-1)
    kept = completions.tokens[:, 0] == completions.tokens[0, 0]
    assert kept.float().mean() > 0.9  # nearly all begin with <answer>, so one conditional distribution serves
    assert (expected > 0.02).sum() > 5
    assert (counts - expected).abs().max() < 0.03  # 4 standard errors of a share of one half


def test_group_shares_one_prefill_and_greedy_equals_plain_generate(
    make_language: MakeLanguage, samples: list[PromptSample], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = make_language()
    rows: list[int] = []
    decoder = policy.causal_lm.get_decoder()
    decoder.register_forward_pre_hook(lambda m, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True)
    policy.refine(samples, 4)
    assert rows[:2] == [6, 24] and rows[1:] == sorted(rows[1:], reverse=True) and rows[-1] < 24
    tokenizer = AutoTokenizer.from_pretrained("miniature/language")
    model = AutoModelForCausalLM.from_pretrained("miniature/language").eval()
    for sample, rewrite in zip(samples, policy.rewrite(samples), strict=True):
        chat = [{"role": "user", "content": sample.prompt}]
        text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        plain = model.generate(ids, do_sample=False, max_new_tokens=32)[0, ids.shape[1] :]
        assert f"<answer> {rewrite} </answer>" == tokenizer.decode(plain, skip_special_tokens=True)


def test_mask_ends_with_the_first_eos_and_cut_off_completions_are_counted(
    make_language: MakeLanguage, samples: list[PromptSample]
) -> None:
    policy = make_language()
    completions = policy.refine(samples, 8)
    eos = policy.tokenizer.eos_token_id
    for tokens, mask, truncated in zip(completions.tokens, completions.mask, completions.truncated, strict=True):
        kept = tokens[mask].tolist()
        assert not truncated and kept[-1] == eos and eos not in kept[:-1]
    cut = make_language(max_new_tokens=3).refine(samples, 2)
    assert cut.truncated.all() and cut.mask.all() and cut.formatted.sum() == 0
    assert f"<answer> {cut.rewrites[0]}" == cut.texts[0]  # an answer that was cut off is drawn without its tag


@pytest.fixture
def thinker(tmp_path: Path) -> Path:
    """The miniature's refiner with `<think>` and `</think>` as special tokens, as in some models, and one more."""
    folder = shutil.copytree("miniature/language", tmp_path / "thinker")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([AddedToken(token, special=True) for token in ("<think>", "</think>", "<|call|>")])
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(len(tokenizer))
    for part in (tokenizer, model):
        part.save_pretrained(folder)
    return folder


def test_tags_of_thinking_may_be_special_tokens(thinker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = LanguagePolicy(str(thinker), "{prompt}", dtype="float32")
    policy.load()
    for said, text in (
        ("<think> a red circle </think> a blue square <end>", "<think> a red circle </think> a blue square"),
        ("<answer> a <|call|> cross </answer> <end>", "<answer> a cross </answer>"),
    ):
        assert policy._text(policy.tokenizer(said, return_tensors="pt")["input_ids"][0]) == text


def test_a_chat_template_may_open_the_thinking(thinker: Path) -> None:
    """All that is written before `</think>` is thinking then, though no `<think>` is in it."""
    sample = PromptSample("1", "a red circle", "", {})
    # One answer in twenty was taught without its tags: hardly any is when drawn this cold.
    plain = LanguagePolicy(str(thinker), "{prompt}", dtype="float32", max_new_tokens=32, temperature=0.1)
    plain.load()
    completions = plain.refine([sample], 4)
    assert completions.formatted.all()
    template = thinker / "chat_template.jinja"
    template.write_text(template.read_text() + "{% if add_generation_prompt %}<think>\n{% endif %}")
    opened = LanguagePolicy(str(thinker), "{prompt}", dtype="float32", max_new_tokens=32, temperature=0.1)
    opened.load()
    completions = opened.refine([sample], 4)
    assert not any("think" in text for text in completions.texts)
    assert completions.rewrites == [sample.prompt] * 4 and not completions.formatted.any()


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_reference_and_saved_weights(
    make_language: MakeLanguage, samples: list[PromptSample], lora: LoRA | None, tmp_path: Path
) -> None:
    policy = make_language(lora=lora, kl_weight=0.1)
    completions = policy.refine(samples, 2)
    with torch.no_grad():
        before = policy.log_probs(completions)
        perturb(policy)
        after = policy.log_probs(completions)
        with policy.reference():
            assert torch.equal(policy.log_probs(completions), before)
        assert torch.equal(policy.log_probs(completions), after)
    assert (after - before).abs().max() > 0.01
    policy.save_pretrained(tmp_path)
    if lora:
        loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("miniature/language"), tmp_path)
    else:
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = completions.prompt_ids[-1:]
    torch.testing.assert_close(loaded.eval()(ids).logits, policy.network(ids).logits, atol=1e-5, rtol=0)


def test_a_frozen_refiner_is_its_own_reference(make_language: MakeLanguage, samples: list[PromptSample]) -> None:
    policy = make_language(learning_rate=None, kl_weight=0.1)
    completions = policy.refine(samples, 1)
    with policy.reference():
        assert (policy.log_probs(completions) - completions.log_probs)[completions.mask].abs().max() < 1e-5
    assert not any(p.requires_grad for p in policy.parameters())


def test_bad_settings_say_what_to_do(make_language: MakeLanguage, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`language\.template` has no \{prompt\}"):
        make_language(template="Rewrite this.")
    with pytest.raises(ValueError, match=r"`language\.lora\.targets` names qq, which matches no module of Qwen3"):
        make_language(lora=LoRA(targets=["qq"]))
    folder = tmp_path / "language"
    shutil.copytree("miniature/language", folder)
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="has no chat template"):
        LanguagePolicy(str(folder)).load()
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"lacks its weights \(\*\.safetensors\)"):
        LanguagePolicy(str(folder)).load()
