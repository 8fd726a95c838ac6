"""A joint step by the plain recipe of reference trainers, with the same gradients as `PromptRL`.

Prompts are read once for every rewrite, every image's prompt is encoded, log-probs of tokens come from a softmax over
all positions at once, references are full copies of both networks, and no image is scored before all are drawn.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from transformers import GenerationConfig

from datamodules.base import PromptSample
from datamodules.chunks import chunks
from lightning_modules.groups import group_prompts
from lightning_modules.policies.base import Policy
from lightning_modules.policies.conditioning import NEGATIVE, same_length
from lightning_modules.policies.flow import to_pil
from lightning_modules.prompt_rl import PromptRL
from lightning_modules.rl.log_probs import position_ids
from lightning_modules.rollout import Completions, Conditioning, Rollout, Trajectory
from rewards.base import RewardBatch
from rewards.calls import score_each


class PlainRecipe:
    """Takes joint steps with the agents of a `PromptRL`.

    Args:
        module: agents that are loaded, with an optimizer.
    """

    def __init__(self, module: PromptRL) -> None:
        self.module = module
        learning = [agent for agent in (module.flow, module.language) if agent is not None and agent.kl_weight > 0]
        self.copies = {agent.agent: copy.deepcopy(agent.network).requires_grad_(False) for agent in learning}

    def step(self, samples: Sequence[PromptSample]) -> None:
        """Takes one step."""
        rollout = self.collect(samples)
        optimizer: Any = self.module.optimizers()
        optimizer.zero_grad()
        self.backward(rollout)
        for group in optimizer.param_groups:
            torch.nn.utils.clip_grad_norm_(group["params"], 1.0)
        optimizer.step()

    # --- rollout ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def collect(self, samples: Sequence[PromptSample]) -> Rollout:
        """Rewrites, draws, then scores."""
        module, completions = self.module, None
        if module.language is not None:
            completions = self._write(samples, module.group_size - module.num_retained)
        rewrites = None if completions is None else completions.rewrites
        prompts = group_prompts(samples, rewrites, module.num_retained, 1)
        judged = [sample for sample in samples for _ in range(module.group_size)]
        trajectory, pixels = self._draw(prompts)
        images = to_pil(pixels)
        scores = score_each(module.reward, RewardBatch(judged, images))
        rewards, valid, advantages = module.compare(samples, scores, completions)
        return Rollout(
            samples=samples,
            prompts=prompts,
            completions=completions,
            trajectory=trajectory,
            images=images,
            scores=scores,
            rewards=rewards,
            valid=valid,
            advantages=advantages,
            language_advantages=None if completions is None else advantages[:, module.num_retained :].flatten(),
        )

    def _write(self, samples: Sequence[PromptSample], num: int) -> Completions:
        """Writes `num` rewrites of every prompt, each of which is read by itself."""
        language = self.module.language
        assert language is not None
        ids, mask, _ = language._encode([sample for sample in samples for _ in range(num)])
        config = GenerationConfig(
            max_new_tokens=language.max_new_tokens,
            do_sample=True,
            temperature=language.temperature,
            top_k=0,
            eos_token_id=language.eos_token_ids,
            pad_token_id=language._pad_token_id,
        )
        # A folder's own generation config would fill in what is left unsaid, such as top-k.
        with patch.object(language.causal_lm, "generation_config", GenerationConfig()):
            written = language.causal_lm.generate(input_ids=ids, attention_mask=mask, generation_config=config)
        tokens = written[:, ids.shape[1] :]
        return language.completed(samples, ids, mask, tokens, torch.zeros(tokens.shape, device=tokens.device))

    def _draw(self, prompts: Sequence[str]) -> tuple[Trajectory, Tensor]:
        """Encodes every image's prompt, draws all images, then decodes them."""
        flow: Any = self.module.flow
        parts: list[dict[str, Tensor]] = []
        with flow.encoding():
            for rows in chunks(len(prompts), flow.micro_batch_size):
                part = dict(flow.encode_texts(prompts[rows]))
                negatives = flow.encode_negatives([flow.negative_prompt] * len(prompts[rows])) if flow.guided else {}
                parts.append(part | {NEGATIVE + name: value for name, value in negatives.items()})
        tensors = {name: flow.placed(torch.cat(same_length([part[name] for part in parts]))) for name in parts[0]}
        conditioning = Conditioning(tensors, torch.arange(len(prompts), device=flow.device))
        sigmas = flow.sigmas(flow.sampling.num_steps)
        steps = range(flow.sampling.sde_steps) if isinstance(flow.sampling.sde_steps, int) else flow.sampling.sde_steps
        trajectory = flow._sample(conditioning, list(range(len(prompts))), sigmas, tuple(steps))
        return trajectory, flow.final_images(trajectory)

    # --- update -------------------------------------------------------------------------------------------------------

    def backward(self, rollout: Rollout) -> None:
        """Adds the gradients of both agents' losses."""
        module = self.module
        if module.language is not None and module.language.trained and rollout.completions is not None:
            advantages = rollout.language_advantages
            assert advantages is not None
            for rows in chunks(len(advantages), module.language.micro_batch_size):
                loss = self._language_loss(rollout.completions.rows(rows), advantages[rows])
                module.manual_backward(loss.sum() / len(advantages))
        if module.flow.trained:
            advantages = rollout.advantages.flatten()
            for rows in chunks(len(advantages), module.flow.micro_batch_size):
                part = rollout.trajectory.rows(rows)
                for step in range(len(part.sde_steps)):
                    loss = self._flow_loss(part, step, advantages[rows])
                    module.manual_backward(loss.sum() / (len(advantages) * len(part.sde_steps)))

    def _language_loss(self, completions: Completions, advantages: Tensor) -> Tensor:
        language = self.module.language
        assert language is not None
        log_probs = self._token_log_probs(language.causal_lm, completions)
        ratio = (log_probs - log_probs.detach()).exp()
        loss = -advantages[:, None] * ratio
        if language.kl_weight > 0:
            with torch.no_grad(), self._by_copy(language):
                reference = self._token_log_probs(language.causal_lm, completions)
            apart = reference - log_probs
            loss = loss + language.kl_weight * (apart.exp() - 1 - apart)
        return (loss * completions.mask).sum(1) / completions.mask.sum(1)

    def _token_log_probs(self, model: Any, completions: Completions) -> Tensor:
        """Computes log-probs [B, T] by a softmax over all words at all positions."""
        ids = torch.cat([completions.prompt_ids, completions.tokens], 1)
        mask = torch.cat([completions.prompt_mask, completions.mask.long()], 1)
        length = completions.tokens.shape[1]
        output = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=position_ids(mask),
            logits_to_keep=length + 1,
            use_cache=False,
        )
        assert self.module.language is not None
        scaled = output.logits[:, :-1].float() / self.module.language.temperature
        return scaled.log_softmax(-1).gather(2, completions.tokens[..., None])[..., 0]

    def _flow_loss(self, part: Trajectory, step: int, advantages: Tensor) -> Tensor:
        flow = self.module.flow
        transition = flow.replay(part, step)
        log_probs = transition.log_prob(part.next_latents[:, step])
        loss = -advantages * (log_probs - log_probs.detach()).exp()
        if flow.kl_weight > 0:
            with torch.no_grad(), self._by_copy(flow):
                reference = flow.replay(part, step)
            loss = loss + flow.kl_weight * transition.kl(reference)
        return loss

    @contextmanager
    def _by_copy(self, agent: Policy) -> Iterator[None]:
        """Context manager: the agent computes with its full copy."""
        kept = agent._frozen_copy, agent._use_frozen_copy
        agent._frozen_copy, agent._use_frozen_copy = self.copies[agent.agent], True
        try:
            yield
        finally:
            agent._frozen_copy, agent._use_frozen_copy = kept
