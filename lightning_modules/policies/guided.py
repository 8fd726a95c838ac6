"""`GuidedPolicy`: base class of the families with classifier-free guidance by a negative prompt."""

from __future__ import annotations

from typing import Any

from lightning_modules.policies.flow import Sampling
from lightning_modules.policies.pipeline import PipelinePolicy
from rewards.arguments import check_minimum


class GuidedPolicy(PipelinePolicy):
    """A family with classifier-free guidance, whose scale and negative prompt are settings.

    Args:
        model: pipeline folder or hub id.
        sampling: settings of the sampler.
        guidance_scale: weight of the guidance, off at 1.
        negative_prompt: prompt that guidance leads away from.
        max_sequence_length: tokens per prompt (the pipeline's default).
        **kwargs: as for `PipelinePolicy`.
    """

    def __init__(
        self,
        model: str,
        sampling: Sampling,
        guidance_scale: float,
        negative_prompt: str = "",
        max_sequence_length: int = 512,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, sampling, **kwargs)
        check_minimum("model.flow", 0, guidance_scale=guidance_scale)
        check_minimum("model.flow", 1, max_sequence_length=max_sequence_length)
        self.guidance_scale = guidance_scale
        self.negative_prompt = negative_prompt
        self.max_sequence_length = max_sequence_length
