"""EvaluatedAgents without weights: what `load` would make, on the meta device, from configuration files alone."""

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

from lightning_modules.policies.base import Policy
from lightning_modules.policies.language import LanguagePolicy
from lightning_modules.policies.loading import check_language_model, check_pipeline, read_config, read_index
from lightning_modules.policies.memory import Quantization, quantize_linears
from lightning_modules.policies.pipeline import NEGATIVE, PipelinePolicy
from lightning_modules.rl.schedule import sde_step_indices
from lightning_modules.rollout import Completions, Conditioning, Trajectory
from rewards.pretrained import one_line_errors

P = TypeVar("P", bound=Policy)

CLIP_TOKENS = {"SD3Transformer2DModel": 77}
"""Tokens that a network is given beside `max_sequence_length`."""


def flow_skeleton(policy: PipelinePolicy) -> PipelinePolicy:
    """A flow model with all of its pipeline's networks; its own `_prepare` says what is trained.

    Raises:
        ValueError: for what `load` would refuse, in the same words.
    """
    check_pipeline(policy.model, policy.pipeline_class.__name__)
    policy.check_config()
    skeleton = _bare(policy)
    parts = {name: _part(policy, name, value) for name, value in read_index(policy.model).items()}
    accepted = inspect.signature(policy.pipeline_class.__init__).parameters
    skeleton.pipe = policy.pipeline_class(**{name: part for name, part in parts.items() if name in accepted})
    skeleton.network = skeleton.pipe.transformer
    for name, part in skeleton.pipe.components.items():
        if isinstance(part, nn.Module) and part is not skeleton.network:
            skeleton.add_module(name, part.eval())
    return _prepared(skeleton, policy.quantization)


def language_skeleton(policy: LanguagePolicy) -> LanguagePolicy:
    """A refiner without weights and tokenizer; its own `_prepare` says what is trained.

    Raises:
        ValueError: for what `load` would refuse, in the same words.
    """
    check_language_model(policy.model)
    with one_line_errors(policy.model):
        config = AutoConfig.from_pretrained(policy.model)
    text_alone = config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    loader = AutoModelForCausalLM if text_alone else AutoModelForImageTextToText
    skeleton = _bare(policy)
    with torch.device("meta"):
        skeleton.network = _cast(loader.from_config(config), policy.dtype)
    return _prepared(skeleton, policy.quantization)


def quantized_layers(skeleton: Policy) -> list[nn.Linear]:
    """Layers of a skeleton that are whole in it, but would be quantized."""
    return list(skeleton.__dict__.get("quantized_layers", []))


def blank_trajectory(skeleton: PipelinePolicy, rows: int, source: tuple[int, int] | None) -> Trajectory:
    """What a rollout of `rows` samples leaves behind, each with a prompt of its own.

    Args:
        skeleton: of `flow_skeleton`.
        rows: B.
        source: height and width of source images; None draws from text alone.
    """
    sampling = skeleton.sampling
    steps = sde_step_indices(sampling.sde_steps, sampling.num_steps, generator=torch.Generator())
    latents = torch.empty(rows, len(steps), *skeleton.latent_shape, device="meta")
    return Trajectory(
        latents=latents,
        next_latents=torch.empty_like(latents),
        log_probs=torch.empty(rows, len(steps), device="meta"),
        final=torch.empty(rows, *skeleton.latent_shape, device="meta"),
        sigmas=torch.linspace(1, 0, sampling.num_steps + 1),
        sde_steps=steps,
        conditioning=Conditioning(_told(skeleton, rows, source), torch.arange(rows)),
    )


def blank_completions(rows: int, prompt_tokens: int, tokens: int) -> Completions:
    """`rows` completions of full length; the masks are real, since models look into them."""
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


def _told(skeleton: PipelinePolicy, rows: int, source: tuple[int, int] | None) -> dict[str, Tensor]:
    """What `encode` would tell the network; the text encoders' sizes are in the transformer's configuration."""
    config, dtype = skeleton.network.config, skeleton.dtype
    names = ("joint_attention_dim", "caption_channels", "cap_feat_dim")  # FLUX, SD3, Qwen-Image; Sana; Z-Image
    width = next(config[name] for name in names if config.get(name))
    length = getattr(skeleton, "max_sequence_length", 512) + CLIP_TOKENS.get(config._class_name, 0)
    told = {
        "embeds": torch.empty(rows, length, width, dtype=dtype, device="meta"),
        "mask": torch.ones(rows, length, dtype=torch.long),
    }
    if config.get("pooled_projection_dim"):
        told["pooled"] = torch.empty(rows, config["pooled_projection_dim"], dtype=dtype, device="meta")
    if skeleton.guided:
        told |= {NEGATIVE + name: value for name, value in told.items()}
    if source is not None:
        encoded = skeleton.encode_sources([Image.new("RGB", (source[1], source[0]))])
        told |= {name: skeleton._placed(value).expand(rows, *value.shape[1:]) for name, value in encoded.items()}
    return told


def with_settings(policy: P, **settings: Any) -> P:
    """A copy of a policy's settings, some of them changed, without its networks."""
    changed = copy.copy(policy)
    changed.__dict__ |= {"_modules": {}, "_parameters": {}, "_buffers": {}, "network": None, "_frozen_copy": None}
    changed.__dict__ |= settings
    return changed


def _bare(policy: P) -> P:
    """What is done to weights, or to kernels, is left out: there are none."""
    return with_settings(policy, quantization=None, offload=False, attention_backend=None, compile_blocks=False)


def _prepared(skeleton: P, quantization: Quantization | None) -> P:
    if quantization is not None:
        quantized = copy.deepcopy(skeleton.network)
        quantize_linears(quantized, quantization, skeleton.dtype)
        skeleton.__dict__["quantized_layers"] = [
            module
            for name, module in skeleton.network.named_modules()
            if type(module) is not type(quantized.get_submodule(name))
        ]
    with torch.device("meta"):
        skeleton._prepare()
    return skeleton


def _part(policy: PipelinePolicy, name: str, value: Any) -> Any:
    """What stands for an entry of `model_index.json`: a network, a scheduler, a setting, or None for the rest."""
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
    """As `from_pretrained` would load it: some layers stay in fp32, with transformers only beside float16."""
    kept = set(getattr(network, "_keep_in_fp32_modules_strict", None) or ())
    if dtype == torch.float16 or isinstance(network, diffusers.ModelMixin):
        kept |= set(getattr(network, "_keep_in_fp32_modules", None) or ())
    nn.Module.to(network, dtype)
    for name, module in network.named_modules():
        if kept.intersection(name.split(".")):
            module.to(torch.float32)
    return network
