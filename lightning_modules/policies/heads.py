"""The last layer of transformers models, with the cap or scale that some put on their logits after it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

CAPS_AND_SCALES = ("final_logit_softcapping", "logits_scaling", "logit_scale", "lm_head_multiplier")
"""Names in the configurations of models (Gemma; Granite; Cohere; Falcon-H1) whose forward pass changes its logits."""


def output_head(model: Any) -> nn.Module:
    """Finds the module that makes logits [N, V] of last hidden states [N, D] as a model's own forward pass does."""
    config, layer = model.config.get_text_config(), model.get_output_embeddings()
    changed = any(getattr(config, name, None) not in (None, 1) for name in CAPS_AND_SCALES)
    return _ForwardWithoutDecoder(model, layer) if changed else layer


class _ForwardWithoutDecoder(nn.Module):
    """A model's own forward pass from its last hidden states on; its parameters are those of its last layer."""

    def __init__(self, model: Any, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.out_features = layer.out_features

        def pass_on(*_: Any, inputs_embeds: Tensor, **__: Any) -> BaseModelOutputWithPast:
            return BaseModelOutputWithPast(last_hidden_state=inputs_embeds)

        base = _twin(model.base_model, forward=pass_on, _forward_pre_hooks={}, _forward_hooks={})
        twin = _twin(model, _modules=model._modules | {model.base_model_prefix: base})
        self._twin = (twin,)  # a tuple: the decoder's parameters are not this module's

    def forward(self, states: Tensor) -> Tensor:
        logits: Tensor = self._twin[0].forward(inputs_embeds=states[None]).logits[0]
        return logits


def _twin(module: Any, **changes: Any) -> Any:
    """Makes a module of the same parts, but for some attributes; neither copies nor touches anything."""
    twin = object.__new__(type(module))
    vars(twin).update(vars(module) | changes)
    return twin
