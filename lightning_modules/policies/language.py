"""`LanguagePolicy`: the refiner, any Hugging Face model that writes text and has a chat template."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    Cache,
    DynamicCache,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from datamodules.base import PromptSample
from datamodules.chunks import chunks
from lightning_modules.policies.adapters import DEFAULT, load_language_lora
from lightning_modules.policies.base import LoRA, Policy
from lightning_modules.policies.decoding import FixedStep, write
from lightning_modules.policies.heads import output_head
from lightning_modules.policies.loading import check_language_model, lora_config
from lightning_modules.policies.memory import gradient_checkpointing_enabled, selective_contexts
from lightning_modules.policies.sharding import run_inside
from lightning_modules.policies.templates import GENERAL, fill, parse_answer
from lightning_modules.rl.log_probs import completion_mask, position_ids, token_log_probs
from lightning_modules.rollout import Completions, SeenImages
from rewards.arguments import check_minimum
from rewards.format import is_tag, opens_thinking
from rewards.pretrained import one_line_errors

VISION_LANGUAGE_TARGETS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
"""LoRA targets for models with a vision tower, whose own layers may have the same names."""


class LanguagePolicy(Policy):
    """Rewrites prompts inside `<answer> </answer>`.

    A vision-language model such as Qwen2.5-VL serves as well: it reads the prompt alone, and its vision tower stays as
    it is (`VisionLanguagePolicy` also shows it the source image).

    Args:
        model: folder or hub id of a model that writes text and has a chat template, or of a LoRA of one.
        template: the user's message, with `{prompt}` where the prompt goes.
        temperature: softmax temperature of the rollouts' sampling, and of every log-prob.
        max_new_tokens: longest completion in rollouts.
        eval_max_new_tokens: longest completion of the greedy rewrites at test time.
        chat_template_kwargs: handed to the chat template, e.g. `enable_thinking: false` for Qwen3.
        learning_rate: null freezes the refiner.
        weight_decay: AdamW's weight decay.
        kl_weight: weight of the k3 KL per token to the model before training; 0 keeps no reference.
        clip_range: the ratio is clipped to 1 - clip_range, 1 + clip_range; with one update per rollout it is 1, unless
            rewrites are written ahead (`model.rewrite_ahead`).
        max_log_ratio: a run stops where replayed log-probs of tokens differ from sampled ones by more on average, in
            nats.
        cuda_graphs: on a GPU, launches each token's kernels all at once (`FixedStep`), where the model has plain
            attention, no int8 weights and no shards. Rewrites that have ended then stay in the batch until all have.
        **kwargs: as for `Policy`.
    """

    default_lora_targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

    def __init__(
        self,
        model: str,
        template: str = GENERAL,
        temperature: float = 1.0,
        max_new_tokens: int = 512,
        eval_max_new_tokens: int = 256,
        chat_template_kwargs: dict[str, Any] | None = None,
        learning_rate: float | None = 1e-6,
        weight_decay: float = 0.0,
        kl_weight: float = 0.01,
        clip_range: float = 0.2,
        max_log_ratio: float = 0.05,
        cuda_graphs: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, learning_rate, weight_decay, kl_weight, clip_range, max_log_ratio, **kwargs)
        check_minimum("model.language", 1, max_new_tokens=max_new_tokens, eval_max_new_tokens=eval_max_new_tokens)
        if not 0 < temperature < math.inf:
            raise ValueError(f"model.language has temperature={temperature}, use a number above 0.")
        if "{prompt}" not in template:
            raise ValueError("`language.template` has no {prompt}, so the refiner would never see the prompt; add it.")
        self.template = template
        self.temperature = temperature
        self.max_new_tokens = max_new_tokens
        self.eval_max_new_tokens = eval_max_new_tokens
        self.chat_template_kwargs = chat_template_kwargs or {}
        self.cuda_graphs = cuda_graphs
        self.tokenizer: Any = None

    def load(self, *, weights: bool = True) -> None:
        """Loads model and tokenizer."""
        if self.network is not None:
            return
        self.settle_model()
        check_language_model(self.model)
        with one_line_errors(self.model):
            config = AutoConfig.from_pretrained(self.model)
            self.tokenizer = AutoTokenizer.from_pretrained(self.model)
        self._check_chat(config)
        text_alone = config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        loader = AutoModelForCausalLM if text_alone else AutoModelForImageTextToText
        with one_line_errors(self.model):
            where = None if weights or not self.trained else "meta"
            self.network = loader.from_pretrained(self.model, dtype=self.dtype, use_safetensors=True, device_map=where)
        self._prepare()

    def _check_chat(self, config: Any) -> None:
        """Raises ValueError if the tokenizer has no chat template; `config` is the model's, not yet loaded."""
        if self.tokenizer.chat_template is None:
            raise ValueError(f"the tokenizer of {self.model} has no chat template; use an instruction-tuned model.")

    def _prepare(self) -> None:
        super()._prepare()
        # A vision tower never learns: text alone gives it no gradient, and what it makes of an image is kept.
        parts = (self.causal_lm.get_decoder(), self.causal_lm.get_output_embeddings())
        learning = {id(parameter) for part in parts for parameter in part.parameters()}
        for parameter in self.network.parameters():
            if id(parameter) not in learning:
                parameter.requires_grad_(False)
        if self.gradient_checkpointing:
            selective = {"context_fn": selective_contexts} if self.gradient_checkpointing == "selective" else {}
            self.causal_lm.gradient_checkpointing_enable({"use_reentrant": False, **selective})

    def _add_adapters(self, lora: LoRA) -> None:
        if lora.path is not None:
            self.network = load_language_lora(self.network, lora, self._adapters)
            return
        sees = hasattr(self.network.config, "vision_config")
        targets = VISION_LANGUAGE_TARGETS if sees else self.default_lora_targets
        self.network = get_peft_model(self.network, lora_config(self.network, lora, targets, "language.lora"))

    @contextmanager
    def _adapters_off(self) -> Iterator[None]:
        with self.network.disable_adapter():
            yield

    @property
    def causal_lm(self) -> Any:
        """The transformers model, with adapters inside its layers if there are any."""
        return self.active.get_base_model() if hasattr(self.active, "get_base_model") else self.active

    @property
    def eos_token_ids(self) -> list[int]:
        """Ids of all tokens that end a completion: the model's own (chat models have several) and the tokenizer's."""
        ids = self.causal_lm.generation_config.eos_token_id
        ids = list(ids) if isinstance(ids, list | tuple) else [ids]
        return list(dict.fromkeys(one for one in [*ids, self.tokenizer.eos_token_id] if one is not None))

    @torch.no_grad()
    def refine(self, samples: Sequence[PromptSample], num: int) -> Completions:
        """Draws `num` rewrites of every sample's prompt, those of one sample side by side.

        The prompt is read once per sample: its keys and values are shared by the group, so that `rollout_batch_size`
        holds at least the rewrites of one.
        """
        size = None if self.rollout_batch_size is None else max(1, self.rollout_batch_size // num)
        parts = [
            self._write(samples[rows], num, self.max_new_tokens, greedy=False) for rows in chunks(len(samples), size)
        ]
        return Completions.joined(parts, self._pad_token_id)

    @torch.no_grad()
    def rewrite(self, samples: Sequence[PromptSample]) -> list[str]:
        """Writes one greedy rewrite per sample, for evaluation ("with PE")."""
        if not samples:
            return []
        rewrites = []
        for rows in chunks(len(samples), self.rollout_batch_size):
            rewrites += self._write(samples[rows], 1, self.eval_max_new_tokens, greedy=True).rewrites
        return rewrites

    def log_probs(self, completions: Completions) -> Tensor:
        """Computes the log-probs [B, T] fp32 of the completions' tokens under the current policy.

        Mask, positions and temperature are those of the sampling, so before an update these are the sampled ones. They
        mean something where `completions.mask` is True.
        """
        ids = torch.cat([completions.prompt_ids, completions.tokens], dim=1)
        attention = torch.cat([completions.prompt_mask, completions.mask.long()], dim=1)
        start, head = completions.prompt_ids.shape[1] - 1, output_head(self.causal_lm)

        def read() -> Tensor:
            checkpoints = bool(self.gradient_checkpointing) and torch.is_grad_enabled()
            with gradient_checkpointing_enabled(self.active, on=checkpoints):
                hidden = self._hidden(ids, attention, completions.seen, use_cache=False)
            return token_log_probs(hidden[:, start:-1], head, completions.tokens, temperature=self.temperature)

        return run_inside(self.causal_lm, read)

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes a PEFT adapter folder, or a transformers model folder; the tokenizer beside it."""
        if self.adapted:
            self.network.peft_config[DEFAULT].base_model_name_or_path = self.base
            self.network.save_pretrained(directory, selected_adapters=[DEFAULT])
        else:
            self.network.save_pretrained(directory)
        self.tokenizer.save_pretrained(directory)

    def _write(self, samples: Sequence[PromptSample], num: int, max_new_tokens: int, *, greedy: bool) -> Completions:
        ids, mask, seen = self._encode(samples)
        cache = self._prefill(ids, mask, seen, num)
        ids, mask = ids.repeat_interleave(num, 0), mask.repeat_interleave(num, 0)
        seen = None if seen is None else seen.repeat(num)
        decoder, head = self.causal_lm.get_decoder(), output_head(self.causal_lm)

        def logits(ids: Tensor, mask: Tensor, positions: Tensor, cache: Cache = cache) -> Tensor:
            inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
            found: Tensor = head(decoder(**inputs, past_key_values=cache, use_cache=True).last_hidden_state[:, -1])
            return found

        fixed = self._captures(cache)
        tokens, log_probs = write(
            FixedStep(logits, cache, ids.shape[1] + max_new_tokens) if fixed else logits,
            ids[:, -1],
            mask,
            self._positions(mask, seen)[..., -1:],
            keep=None if fixed else cache.batch_select_indices,
            max_new_tokens=max_new_tokens,
            eos_token_ids=self.eos_token_ids,
            pad_token_id=self._pad_token_id,
            temperature=None if greedy else self.temperature,
        )
        return self.completed(samples, ids, mask, tokens, log_probs, seen)

    def _captures(self, cache: DynamicCache) -> bool:
        """True if a decoding step is captured as a CUDA graph."""
        config = self.causal_lm.config
        # These positions' frequencies hang on the longest sequence so far, which is asked for in every step.
        moving = any(kind in repr(getattr(config, "rope_parameters", "")) for kind in ("'dynamic'", "'longrope'"))
        plain = FixedStep.plain(cache) and config._attn_implementation == "sdpa" and not moving
        wanted = self.cuda_graphs and self.device.type == "cuda"
        return wanted and plain and not self.sharded and self.quantization != "int8"

    def completed(
        self,
        samples: Sequence[PromptSample],
        ids: Tensor,
        mask: Tensor,
        tokens: Tensor,
        log_probs: Tensor,
        seen: SeenImages | None = None,
    ) -> Completions:
        """Reads the answers in B written completions, those of one sample side by side.

        Args:
            samples: the prompts that were rewritten, each as often as the others.
            ids: [B, P] tokens of the chats.
            mask: [B, P] 1 for tokens, 0 for padding.
            tokens: [B, T] tokens of the completions.
            log_probs: [B, T] fp32.
            seen: the source images as the refiner sees them.
        """
        num = len(tokens) // len(samples)
        answered = completion_mask(tokens, self.eos_token_ids)
        texts = [self._text(row[keep]) for row, keep in zip(tokens, answered, strict=True)]
        start = "<think>" if opens_thinking(self.tokenizer.decode(ids[0, -8:])) else ""
        originals = [sample.asked for sample in samples for _ in range(num)]
        answers = [parse_answer(start + text, original) for text, original in zip(texts, originals, strict=True)]
        ended = torch.isin(tokens, torch.tensor(self.eos_token_ids, device=tokens.device)).any(1)
        return Completions(
            prompt_ids=ids,
            prompt_mask=mask,
            tokens=tokens,
            mask=answered,
            log_probs=log_probs,
            texts=texts,
            rewrites=[answer.rewrite for answer in answers],
            formatted=torch.tensor([float(answer.formatted) for answer in answers], device=tokens.device),
            truncated=~ended,
            seen=seen,
        )

    def _text(self, tokens: Tensor) -> str:
        """Decodes a completion [T] without its special tokens, of which tags of thinking and answer are none here."""
        added = self.tokenizer.added_tokens_decoder.items()
        special = {token for token, content in added if content.special and not is_tag(content.content)}
        text: str = self.tokenizer.decode([token for token in tokens.tolist() if token not in special])
        return text

    def _encode(self, samples: Sequence[PromptSample]) -> tuple[Tensor, Tensor, SeenImages | None]:
        """Tokens [B, P] of the chats, their mask, and the samples' source images (None here: text alone)."""
        texts = [self._chat(fill(self.template, sample.asked)) for sample in samples]
        return *self._tokenize(texts), None

    def _chat(self, content: Any) -> str:
        chat = [{"role": "user", "content": content}]
        text: str = self.tokenizer.apply_chat_template(
            chat, tokenize=False, add_generation_prompt=True, **self.chat_template_kwargs
        )
        return text

    def _tokenize(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        self.tokenizer.pad_token_id = self._pad_token_id
        encoded = self.tokenizer(
            list(texts), padding=True, padding_side="left", add_special_tokens=False, return_tensors="pt"
        ).to(self.device)
        return encoded["input_ids"], encoded["attention_mask"]

    @property
    def _pad_token_id(self) -> int:
        pad: int | None = self.tokenizer.pad_token_id
        return self.eos_token_ids[0] if pad is None else pad

    def _prefill(self, ids: Tensor, mask: Tensor, seen: SeenImages | None, num: int) -> DynamicCache:
        """Computes keys and values of all prompt tokens but the last, once per prompt, for `num` rows each."""
        cache = DynamicCache(config=self.causal_lm.config)
        self._hidden(ids[:, :-1], mask[:, :-1], seen, past_key_values=cache, use_cache=True)
        cache.batch_repeat_interleave(num)
        return cache

    def _hidden(self, ids: Tensor, attention: Tensor, seen: SeenImages | None, **kwargs: Any) -> Tensor:
        """Computes last hidden states [B, L, D] of L tokens from the prompt's first on, for sampling and replay."""
        positions = self._positions(attention, seen)
        output = self.causal_lm.get_decoder()(input_ids=ids, attention_mask=attention, position_ids=positions, **kwargs)
        hidden: Tensor = output.last_hidden_state
        return hidden

    def _positions(self, attention: Tensor, seen: SeenImages | None) -> Tensor:
        """Position ids of the tokens of an attention mask [B, L], as the model takes them."""
        return position_ids(attention)
