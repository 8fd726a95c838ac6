"""Policies on the meta device: what `load` would make, without weights, from configuration files alone."""

from __future__ import annotations

import copy
import inspect
from typing import Any, TypeVar, cast

import diffusers
import torch
import transformers
from PIL import Image
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from lightning_modules.objectives import FlowBatch, FlowObjective
from lightning_modules.policies.base import Policy
from lightning_modules.policies.conditioning import NEGATIVE
from lightning_modules.policies.language import LanguagePolicy
from lightning_modules.policies.loading import check_language_model, check_pipeline, read_config, read_index
from lightning_modules.policies.memory import Quantization, quantize_linears
from lightning_modules.policies.pipeline import PipelinePolicy
from lightning_modules.rl.schedule import sde_step_indices
from lightning_modules.rollout import Completions, Conditioning, Trajectory
from rewards.pretrained import one_line_errors

P = TypeVar("P", bound=Policy)

CLIP_TOKENS = {"SD3Transformer2DModel": 77}
"""Tokens of CLIP that a network gets beside `max_sequence_length`, by its class."""


def flow_on_meta(policy: PipelinePolicy) -> PipelinePolicy:
    """Builds a flow model with all of its pipeline's networks; its own `_prepare` says what is trained.

    Raises:
        ValueError: for what `load` would refuse, in the same words.
    """
    policy.settle_model()
    check_pipeline(policy.model, policy.pipeline_class.__name__)
    policy.check_config()
    meta = _unloaded(policy)
    parts = {name: _component(policy, name, value) for name, value in read_index(policy.model).items()}
    accepted = inspect.signature(policy.pipeline_class.__init__).parameters
    meta.pipe = policy.pipeline_class(**{name: part for name, part in parts.items() if name in accepted})
    meta.network = meta.pipe.transformer
    for name, part in meta.pipe.components.items():
        if isinstance(part, nn.Module) and part is not meta.network:
            meta.add_module(name, part.eval())
    return _prepare_on_meta(meta, policy.quantization)


def language_on_meta(policy: LanguagePolicy) -> LanguagePolicy:
    """Builds a refiner without weights and tokenizer; its own `_prepare` says what is trained.

    Raises:
        ValueError: for what `load` would refuse, in the same words.
    """
    policy.settle_model()
    check_language_model(policy.model)
    with one_line_errors(policy.model):
        config = AutoConfig.from_pretrained(policy.model)
    text_alone = config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    loader = AutoModelForCausalLM if text_alone else AutoModelForImageTextToText
    meta = _unloaded(policy)
    with torch.device("meta"):
        meta.network = _cast(loader.from_config(config), policy.dtype)
    return _prepare_on_meta(meta, policy.quantization)


def quantized_layers(meta: Policy) -> list[nn.Linear]:
    """Linear layers of a meta policy that loading would quantize; here they keep their full size."""
    return list(meta.__dict__.get("quantized_layers", []))


def meta_trajectory(meta: PipelinePolicy, rows: int, source: tuple[int, int] | None) -> Trajectory:
    """Builds the trajectory of `rows` samples, each with a prompt of its own.

    Args:
        meta: from `flow_on_meta`.
        rows: B.
        source: height and width of source images; None draws from text alone.
    """
    sampling = meta.sampling
    steps = sde_step_indices(sampling.sde_steps, sampling.num_steps, generator=torch.Generator())
    latents = torch.empty(rows, len(steps), *meta.latent_shape, device="meta")
    return Trajectory(
        latents=latents,
        next_latents=torch.empty_like(latents),
        log_probs=torch.empty(rows, len(steps), device="meta"),
        final=torch.empty(rows, *meta.latent_shape, device="meta"),
        sigmas=torch.linspace(1, 0, sampling.num_steps + 1),
        sde_steps=steps,
        conditioning=Conditioning(_conditioning(meta, rows, source), torch.arange(rows)),
    )


def meta_batch(objective: FlowObjective, trajectory: Trajectory) -> FlowBatch:
    """Builds the samples of a trajectory as an objective takes them, one group."""
    rows = len(trajectory)
    advantages = torch.empty(rows, device="meta")
    return FlowBatch(
        trajectory=trajectory,
        advantages=advantages,
        rewards=advantages,
        counted=advantages.bool(),
        groups=advantages.long(),
        seeds=range(rows),
        group_seeds=[0] * rows,
        levels_seed=0,
        weights=advantages[:, None].expand(-1, objective.num_terms(trajectory))
        if objective.needs_whole_groups
        else None,
    )


def meta_completions(rows: int, prompt_tokens: int, tokens: int) -> Completions:
    """Builds `rows` completions of full length; the masks hold values, since models look into them."""
    texts = [""] * rows
    return Completions(
        prompt_ids=torch.empty(rows, prompt_tokens, dtype=torch.long, device="meta"),
        prompt_mask=torch.ones(rows, prompt_tokens, dtype=torch.long),
        tokens=torch.empty(rows, tokens, dtype=torch.long, device="meta"),
        mask=torch.ones(rows, tokens, dtype=torch.bool),
        log_probs=torch.empty(rows, tokens, device="meta"),
        texts=texts,
        rewrites=texts,
        formatted=torch.empty(rows, device="meta"),
        truncated=torch.zeros(rows, dtype=torch.bool),
    )


def _conditioning(meta: PipelinePolicy, rows: int, source: tuple[int, int] | None) -> dict[str, Tensor]:
    """Builds the tensors that `encode` would make; the text encoders' sizes are in the transformer's configuration."""
    config, dtype = meta.network.config, meta.dtype
    names = ("joint_attention_dim", "caption_channels", "cap_feat_dim")  # FLUX, SD3, Qwen-Image; Sana; Z-Image
    width = next(config[name] for name in names if config.get(name))
    length = getattr(meta, "max_sequence_length", 512) + CLIP_TOKENS.get(config._class_name, 0)
    tensors = {
        "embeds": torch.empty(rows, length, width, dtype=dtype, device="meta"),
        "mask": torch.ones(rows, length, dtype=torch.long),
    }
    if config.get("pooled_projection_dim"):
        tensors["pooled"] = torch.empty(rows, config["pooled_projection_dim"], dtype=dtype, device="meta")
    if meta.guided:
        tensors |= {NEGATIVE + name: value for name, value in tensors.items()}
    if source is not None:
        encoded = meta.encode_sources([Image.new("RGB", (source[1], source[0]))])
        tensors |= {name: meta.placed(value).expand(rows, *value.shape[1:]) for name, value in encoded.items()}
    return tensors


def with_settings(policy: P, **settings: Any) -> P:
    """Copies a policy without its networks, with some of its settings changed."""
    changed = copy.copy(policy)
    changed.__dict__ |= {"_modules": {}, "_parameters": {}, "_buffers": {}, "network": None, "_frozen_copy": None}
    changed.__dict__ |= settings
    return changed


def _unloaded(policy: P) -> P:
    """Copies a policy without its networks, and without what would be done to weights or kernels: there are none."""
    return with_settings(policy, quantization=None, offload=False, attention_backend=None, compile_blocks=False)


def _prepare_on_meta(meta: P, quantization: Quantization | None) -> P:
    """Prepares a meta policy for training as `load` would, noting the layers that would be quantized."""
    if quantization is not None:
        quantized = copy.deepcopy(meta.network)
        quantize_linears(quantized, quantization, meta.dtype)
        meta.__dict__["quantized_layers"] = [
            module
            for name, module in meta.network.named_modules()
            if type(module) is not type(quantized.get_submodule(name))
        ]
    with torch.device("meta"):
        meta._prepare()
    return meta


def _component(policy: PipelinePolicy, name: str, value: Any) -> Any:
    """Builds what an entry of `model_index.json` names: a network, a scheduler, a setting, or None for the rest."""
    if not isinstance(value, list):
        return value
    cls = getattr(diffusers, value[1] or "", None) or getattr(transformers, value[1] or "", None)
    if not inspect.isclass(cls):
        return None
    if issubclass(cls, diffusers.SchedulerMixin):
        return cls.from_config(read_config(policy.model, name, "scheduler_config.json"))
    dtype = policy.dtype if name == "transformer" else policy.frozen_dtype
    with torch.device("meta"):
        if issubclass(cls, diffusers.ModelMixin):
            return _cast(cls.from_config(read_config(policy.model, name)), dtype)
        if issubclass(cls, transformers.PreTrainedModel):
            with one_line_errors(policy.model):
                config = cast(Any, cls).config_class.from_pretrained(policy.model, subfolder=name)
            return _cast(cls(config), dtype)
    return None


def _cast(network: nn.Module, dtype: torch.dtype) -> Any:
    """Casts a network as `from_pretrained` would."""
    nn.Module.to(network, dtype)
    for module in kept_in_fp32(network, dtype):
        module.to(torch.float32)
    return network


def kept_in_fp32(network: nn.Module, dtype: torch.dtype) -> list[nn.Module]:
    """Lists the layers that `from_pretrained` leaves in fp32, some of transformers' only beside float16."""
    kept = set(getattr(network, "_keep_in_fp32_modules_strict", None) or ())
    if dtype == torch.float16 or isinstance(network, diffusers.ModelMixin):
        kept |= set(getattr(network, "_keep_in_fp32_modules", None) or ())
    return [module for name, module in network.named_modules() if kept.intersection(name.split("."))]
