"""`PipelinePolicy`: base class of flow policies over a stock diffusers pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, ClassVar, cast

import diffusers
import torch
from accelerate import init_empty_weights
from diffusers.image_processor import VaeImageProcessor
from peft import get_peft_model_state_dict
from torch import Tensor, nn

from lightning_modules.policies.adapters import DEFAULT, load_flow_lora
from lightning_modules.policies.base import LoRA
from lightning_modules.policies.conditioning import ConditionedPolicy
from lightning_modules.policies.flow import Sampling
from lightning_modules.policies.loading import absent_parts, check_pipeline, lora_config, read_config
from lightning_modules.policies.memory import checkpoint_selectively, compile_blocks, on_device
from lightning_modules.rl.schedule import dynamic_mu
from rewards.pretrained import one_line_errors


class PipelinePolicy(ConditionedPolicy):
    """A family of flow models in diffusers' own folder layout.

    An adapter sets `pipeline_class` and implements `encode_texts` and `predict`, and where it differs `latent_shape`,
    `decode`, and `schedule` (what its pipeline's sampler gets beside a number of steps).

    Args:
        model: pipeline folder or hub id, or a LoRA's folder that names its pipeline.
        sampling: settings of the sampler.
        offload: keeps text encoders and VAE on the CPU between uses.
        attention_backend: one of diffusers' (such as `flash`, `sage`, `_native_cudnn`); null is PyTorch's own choice.
        compile: compiles the network's repeated blocks with torch.compile.
        **kwargs: as for `ConditionedPolicy`.
    """

    pipeline_class: ClassVar[Any]
    default_lora_targets: list[str] | str = ["to_q", "to_k", "to_v", "to_out.0"]

    def __init__(
        self,
        model: str,
        sampling: Sampling,
        offload: bool = False,
        attention_backend: str | None = None,
        compile: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, sampling, **kwargs)
        self.offload = offload
        self.attention_backend = attention_backend
        self.compile_blocks = compile
        self.pipe: Any = None

    # --- what a family implements -----------------------------------------------------------------------------------

    def reading(self, texts: Sequence[str]) -> tuple[Any, list[str], int]:
        """Describes how D texts are read by the text encoder that reads the most of them.

        Returns:
            Its tokenizer, the D texts as it gets them, and the most tokens of each that it takes.
        """
        return self.pipe.tokenizer, list(texts), self.pipe.tokenizer.model_max_length

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Shape [channels, rows, columns] of the VAE's latents; families that pack them have another."""
        factor = self.pipe.vae_scale_factor
        return self.network.config.in_channels, self.height // factor, self.width // factor

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decodes the VAE's latents [B, channels, rows, columns] into images [B, 3, height, width] in [0, 1]."""
        vae = self.pipe.vae
        latents = latents.to(vae.dtype) / vae.config.scaling_factor + (vae.config.get("shift_factor") or 0.0)
        images: Tensor = VaeImageProcessor.denormalize(vae.decode(latents, return_dict=False)[0])
        return images.float()

    def schedule(self, num_steps: int) -> dict[str, Any]:
        """Arguments that the pipeline gives to its scheduler's `set_timesteps` beside the number of steps."""
        return {}

    def dynamic_shift(self, num_tokens: int, max_shift: float = 1.15) -> float:
        """Computes `mu` for a number of image tokens, by the scheduler's configuration.

        Args:
            num_tokens: image tokens.
            max_shift: `mu` at the most tokens, where the scheduler's configuration has none.
        """
        config = self.pipe.scheduler.config
        return dynamic_mu(
            num_tokens,
            base_seq_len=config.get("base_image_seq_len", 256),
            max_seq_len=config.get("max_image_seq_len", 4096),
            base_shift=config.get("base_shift", 0.5),
            max_shift=config.get("max_shift", max_shift),
        )

    def scheduler(self) -> Any:
        """Makes a fresh scheduler for `sigmas`; the pipeline's own stays as it was loaded."""
        return type(self.pipe.scheduler).from_config(self.pipe.scheduler.config)

    def passed_parts(self) -> dict[str, Any]:
        """Parts to give to `from_pretrained` instead of having it load them; None for one that the pipeline lacks."""
        return dict(absent_parts(self.model))

    # --- what all families share ----------------------------------------------------------------------------------

    def cut(self, prompts: Sequence[str]) -> list[bool]:
        """Returns, for B prompts, True where every text encoder reads the beginning alone."""
        tokenizer, frame, limit = self.reading([""])
        # No text has more tokens than bytes, give or take some at its ends: most of a large set need not be read.
        room = limit - len(tokenizer(frame)["input_ids"][0]) - 8
        rows = [row for row, prompt in enumerate(prompts) if len(prompt.encode()) > room]
        texts = self.reading([prompts[row] for row in rows])[1] if rows else []
        cut = {row for row, text in zip(rows, texts, strict=True) if len(tokenizer(text)["input_ids"]) > limit}
        return [row in cut for row in range(len(prompts))]

    def load(self, *, weights: bool = True) -> None:
        """Loads the pipeline; its modules become submodules, so that Lightning moves them."""
        if self.pipe is not None:
            return
        self.settle_model()
        check_pipeline(self.model, self.pipeline_class.__name__)
        self.check_config()
        with one_line_errors(self.model):
            self.pipe = self.pipeline_class.from_pretrained(
                self.model,
                torch_dtype={"transformer": self.dtype, "default": self.frozen_dtype},
                use_safetensors=True,
                **self.passed_parts(),
                **({} if weights or not self.trained else {"transformer": self._network_to_fill()}),
            )
        self.network = self.pipe.transformer
        for name, part in self._frozen_parts().items():
            part.requires_grad_(False).eval()
            if not self.offload:
                self.add_module(name, part)
        self._prepare()

    def _prepare(self) -> None:
        super()._prepare()
        if self.gradient_checkpointing:
            selective = self.gradient_checkpointing == "selective"
            self.network.enable_gradient_checkpointing(checkpoint_selectively if selective else None)
        # The reference too: with other kernels its KL to an untrained policy would not be 0.
        for network in (self.network, self._frozen_copy):
            if network is not None and self.attention_backend is not None:
                cast(Any, network).set_attention_backend(self.attention_backend)
            if network is not None and self.compile_blocks:
                compile_blocks(network)

    def _frozen_parts(self) -> dict[str, nn.Module]:
        """Text encoders and VAE by name."""
        parts = {name: part for name, part in self.pipe.components.items() if isinstance(part, nn.Module)}
        return {name: part for name, part in parts.items() if part is not self.network}

    def decoding(self) -> AbstractContextManager[None]:
        """Context manager: the VAE is on the policy's device."""
        return on_device([self.pipe.vae], self.device) if self.offload else nullcontext()

    def encoding(self) -> AbstractContextManager[None]:
        """Context manager: the text encoders are on the policy's device."""
        encoders = [part for part in self._frozen_parts().values() if part is not self.pipe.vae]
        return on_device(encoders, self.device) if self.offload else nullcontext()

    def check_config(self) -> None:
        """Raises ValueError for settings that the model cannot take; reads configuration files only, no weights."""
        factor = self.pixels_per_token()
        if self.height % factor or self.width % factor:
            raise ValueError(
                f"`height` and `width` are {self.height} x {self.width}; {self.model} needs multiples of "
                f"{factor} pixels."
            )
        if self.lora is not None and self.lora.path is not None:
            load_flow_lora(self.empty_network(), self.lora, self.pipeline_class, [DEFAULT])
        elif self.lora is not None and self.trained:
            lora_config(self.empty_network(), self.lora, self.default_lora_targets, "flow.lora")

    def pixels_per_token(self) -> int:
        """Divisor of height and width: the VAE halves them at all levels but one, a token has 2 x 2 latent pixels."""
        return int(2 ** len(read_config(self.model, "vae")["block_out_channels"]))

    def empty_network(self) -> nn.Module:
        """Builds the network on the meta device, from its configuration alone."""
        config = read_config(self.model, "transformer")
        with torch.device("meta"):
            network: nn.Module = getattr(diffusers, config["_class_name"]).from_config(config)
        return network

    def _network_to_fill(self) -> nn.Module:
        """Builds the network with its parameters alone on the meta device; it computes its tables of positions."""
        config = read_config(self.model, "transformer")
        with init_empty_weights():
            network: nn.Module = getattr(diffusers, config["_class_name"]).from_config(config)
        return network

    def _add_adapters(self, lora: LoRA) -> None:
        if lora.path is not None:
            load_flow_lora(self.network, lora, self.pipeline_class, self._adapters)
            return
        self.network.add_adapter(lora_config(self.network, lora, self.default_lora_targets, "flow.lora"))
        for parameter in self.network.parameters():
            if parameter.requires_grad:  # bf16 would round small updates away
                parameter.data = parameter.float()

    def sigmas(self, num_steps: int) -> Tensor:
        """Returns the sigma table of the pipeline's own scheduler: [num_steps + 1] fp32, from 1 to 0."""
        scheduler = self.scheduler()
        for flag in ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "invert_sigmas"):
            if scheduler.config.get(flag):
                raise ValueError(f"the scheduler of {self.model} sets {flag}, which rollouts do not support.")
        scheduler.set_timesteps(num_steps, **self.schedule(num_steps))
        sigmas: Tensor = scheduler.sigmas.float().cpu()
        return sigmas

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes a LoRA that the stock pipeline's `load_lora_weights` reads, or the whole pipeline."""
        if not self.adapted:
            self.pipe.save_pretrained(directory)
            return
        metadata = self.network.peft_config[DEFAULT].to_dict() | {"base_model_name_or_path": self.base}
        self.pipeline_class.save_lora_weights(
            directory,
            transformer_lora_layers=get_peft_model_state_dict(self.network, adapter_name=DEFAULT),
            transformer_lora_adapter_metadata=metadata,
        )
