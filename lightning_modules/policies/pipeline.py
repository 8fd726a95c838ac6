"""`PipelinePolicy`: base class of flow policies over a stock diffusers pipeline."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, cast

import diffusers
import torch
from accelerate import init_empty_weights
from diffusers.image_processor import VaeImageProcessor
from peft import get_peft_model_state_dict
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from datamodules.chunks import chunks
from lightning_modules.policies.adapters import DEFAULT, load_flow_lora
from lightning_modules.policies.base import LoRA
from lightning_modules.policies.flow import FlowPolicy, Sampling
from lightning_modules.policies.loading import absent_parts, check_pipeline, lora_config, read_config
from lightning_modules.policies.memory import compile_blocks, on_device
from lightning_modules.policies.text_cache import TextCache
from lightning_modules.rl.schedule import dynamic_mu
from lightning_modules.rollout import Conditioning
from rewards.arguments import check_minimum
from rewards.pretrained import one_line_errors

NEGATIVE = "negative_"
EncodeTexts = Callable[[Sequence[str], Sequence[Image.Image] | None], dict[str, Tensor]]


class PipelinePolicy(FlowPolicy):
    """A family of flow models in diffusers' own folder layout.

    An adapter sets `pipeline_class` and implements `encode_texts` and `predict`, and where it differs `latent_shape`,
    `decode`, and `schedule` (what its pipeline's sampler gets beside a number of steps). Families with classifier-free
    guidance set `guidance_scale` above 1: `velocity` then asks `predict` twice, for the prompt and for the negative
    prompt.

    Args:
        model: pipeline folder or hub id, or a LoRA's folder that names its pipeline.
        sampling: settings of the sampler.
        batch_guidance: runs the two passes of classifier-free guidance as one batch; faster on a GPU that is not full.
        offload: keeps text encoders and VAE on the CPU between uses.
        text_cache_gib: GiB of CPU memory in each process for encoded texts, so that prompts that come again (retained
            ones in each step, all in the next epoch or evaluation) are not encoded again, nor with `offload` their
            encoders moved. Texts are then encoded one at a time, so that nothing depends on what is kept; 0 keeps none.
        attention_backend: one of diffusers' (such as `flash`, `sage`, `_native_cudnn`); null is PyTorch's own choice.
        compile: compiles the network's repeated blocks with torch.compile.
        **kwargs: as for `FlowPolicy`.
    """

    pipeline_class: ClassVar[Any]
    default_lora_targets: list[str] | str = ["to_q", "to_k", "to_v", "to_out.0"]
    guidance_scale: float = 1.0
    negative_prompt: str = ""

    def __init__(
        self,
        model: str,
        sampling: Sampling,
        batch_guidance: bool = False,
        offload: bool = False,
        text_cache_gib: float = 0.0,
        attention_backend: str | None = None,
        compile: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, sampling, **kwargs)
        check_minimum("model.flow", 0, text_cache_gib=text_cache_gib)
        self.batch_guidance = batch_guidance
        self.offload = offload
        self.texts = TextCache(int(text_cache_gib * 2**30)) if text_cache_gib else None
        self.attention_backend = attention_backend
        self.compile_blocks = compile
        self.pipe: Any = None

    # --- what a family implements -----------------------------------------------------------------------------------

    @abstractmethod
    def encode_texts(self, texts: Sequence[str], images: Sequence[Image.Image] | None = None) -> dict[str, Tensor]:
        """Encodes D texts into conditioning tensors: name -> [D, ...], names of the adapter's choice.

        A tensor whose second dimension depends on the texts' lengths needs a mask beside it: rows of other calls are
        padded with zeros on the right.

        Args:
            texts: D texts.
            images: D source images where the family's text encoder sees them, else None.
        """

    def reading(self, texts: Sequence[str]) -> tuple[Any, list[str], int]:
        """Describes how D texts are read by the text encoder that reads the most of them.

        Returns:
            Its tokenizer, the D texts as it gets them, and the most tokens of each that it takes.
        """
        return self.pipe.tokenizer, list(texts), self.pipe.tokenizer.model_max_length

    def encode_negatives(self, texts: Sequence[str], images: Sequence[Image.Image] | None = None) -> dict[str, Tensor]:
        """Encodes the negative prompt, like `encode_texts`; some pipelines word it differently."""
        return self.encode_texts(texts, images)

    @abstractmethod
    def predict(self, latents: Tensor, sigma: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
        """Runs one pass of `self.active`; returns the velocity (noise minus image), [B, ...].

        Args:
            latents: [B, ...] fp32.
            sigma: scalar, share of noise.
            conditioning: name -> [B, ...], the tensors of `encode_texts` (and `encode_sources`).
        """

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

    def encode_sources(self, images: Sequence[Image.Image]) -> dict[str, Tensor]:
        """Encodes S source images into conditioning tensors: name -> [S, ...]."""
        raise ValueError(f"{type(self).__name__} draws from text alone; take an editing model for source images.")

    @property
    def edits(self) -> bool:
        """True if the family can start from a source image."""
        return type(self).encode_sources is not PipelinePolicy.encode_sources

    def guide(self, positive: Tensor, negative: Tensor) -> Tensor:
        """Combines two fp32 velocities [B, ...] by classifier-free guidance (arXiv 2207.12598)."""
        return negative + self.guidance_scale * (positive - negative)

    # --- what all families share ----------------------------------------------------------------------------------

    @property
    def guided(self) -> bool:
        """True if each velocity takes two passes (classifier-free guidance)."""
        return self.guidance_scale > 1

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
            self.network.enable_gradient_checkpointing()
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

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], images: Sequence[Image.Image] | None = None) -> Conditioning:
        """Encodes every distinct prompt, and every distinct source image, once."""
        assert images is None or len(images) == len(prompts)
        # Sources are told apart by object, which the samples of a group share, not by pixels.
        source_of = [0] * len(prompts) if images is None else [id(image) for image in images]
        sources = list(dict.fromkeys(source_of))
        source_index = [sources.index(source) for source in source_of]
        pairs = list(dict.fromkeys(zip(prompts, source_index, strict=True)))
        place = {pair: row for row, pair in enumerate(pairs)}
        index = [place[pair] for pair in zip(prompts, source_index, strict=True)]
        distinct = None if images is None else [images[source_index.index(row)] for row in range(len(sources))]

        tensors, own_index = self._encode_distinct(pairs, distinct, source_index)
        device = self.device
        return Conditioning(
            {name: self._placed(value) for name, value in tensors.items()},
            torch.tensor(index, device=device),
            {name: torch.tensor(rows, device=device) for name, rows in own_index.items()},
        )

    def _encode_distinct(
        self, pairs: Sequence[tuple[str, int]], distinct: Sequence[Image.Image] | None, source_index: list[int]
    ) -> tuple[dict[str, Tensor], dict[str, list[int]]]:
        """Encodes distinct texts and sources; also returns the samples' rows in tensors that do not go by prompt.

        Args:
            pairs: D texts, each with the number of its source image (0 without).
            distinct: S source images, or None.
            source_index: [B] numbers of the samples' source images (zeros without).
        """
        asked: dict[str, tuple[EncodeTexts, Sequence[tuple[str, int]]]] = {"": (self.encode_texts, pairs)}
        if self.guided:
            # The negative prompt is the same for all; a text encoder that sees the source makes one per source.
            negatives = [(self.negative_prompt, source) for source in range(max(source_index) + 1)]
            asked[NEGATIVE] = (self.encode_negatives, negatives)
        keys: dict[str, list[Hashable]] = {}
        if self.texts is not None:
            seen = [None] if distinct is None else [_digest(image) for image in distinct]
            # Evaluations may run in another precision than training.
            autocast = torch.is_autocast_enabled(self.device.type) and torch.get_autocast_dtype(self.device.type)
            keys = {
                kind: [(kind, text, seen[source], autocast) for text, source in texts]
                for kind, (_, texts) in asked.items()
            }
        known = self.texts is not None and all(key in self.texts for some in keys.values() for key in some)
        tensors: dict[str, Tensor] = {}
        with nullcontext() if known else self.encoding():
            for kind, (encode, texts) in asked.items():
                encoded = self._encode_texts(encode, texts, distinct, keys.get(kind))
                tensors |= {kind + name: value for name, value in encoded.items()}
        own_index = {name: source_index for name in tensors if name.startswith(NEGATIVE)}
        if distinct is not None:
            with self.decoding():
                encoded = self.encode_sources(distinct)
            tensors |= encoded
            own_index |= dict.fromkeys(encoded, source_index)
        return tensors, own_index

    def _placed(self, value: Tensor) -> Tensor:
        """Moves a tensor to the network's device and, where the frozen parts compute in another dtype, to its dtype."""
        other = value.is_floating_point() and self.frozen_dtype != self.dtype
        return value.to(self.device, self.dtype if other else value.dtype)

    def velocity(self, latents: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """Returns the velocity [B, ...] fp32, with classifier-free guidance where the family uses it."""
        tensors = {name: conditioning[name] for name in conditioning.tensors}
        negative = {name[len(NEGATIVE) :]: tensors.pop(name) for name in list(tensors) if name.startswith(NEGATIVE)}
        if not self.guided:
            return self.predict(latents, sigma, tensors).float()
        negative = tensors | negative  # a source's tensors condition both passes
        if self.batch_guidance:
            joined = {name: torch.cat(_same_length([tensors[name], negative[name]])) for name in tensors}
            both = self.predict(torch.cat([latents, latents]), sigma, joined).float()
            return self.guide(*both.chunk(2))
        positive = self.predict(latents, sigma, tensors).float()
        return self.guide(positive, self.predict(latents, sigma, negative).float())

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

    def _encode_texts(
        self,
        encode: EncodeTexts,
        pairs: Sequence[tuple[str, int]],
        distinct: Sequence[Image.Image] | None,
        keys: Sequence[Hashable] | None,
    ) -> dict[str, Tensor]:
        def encode_rows(rows: slice) -> dict[str, Tensor]:
            images = None if distinct is None else [distinct[source] for _, source in pairs[rows]]
            return encode([text for text, _ in pairs[rows]], images)

        if self.texts is None or keys is None:
            parts = [encode_rows(rows) for rows in chunks(len(pairs), self.micro_batch_size)]
        else:
            # One text a call: it is rounded alike whatever else is encoded or kept, in resumed runs for one.
            parts = [self.texts(key, partial(encode_rows, slice(row, row + 1))) for row, key in enumerate(keys)]
        return {name: torch.cat(_same_length([part[name] for part in parts])) for name in parts[0]}


def _digest(image: Image.Image) -> tuple[object, ...]:
    return image.mode, image.size, hashlib.blake2b(image.tobytes()).digest()


def _same_length(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Pads tensors [b, L, ...] with zeros on the right to the longest L."""
    if tensors[0].ndim < 2:
        return list(tensors)
    longest = max(tensor.shape[1] for tensor in tensors)
    return [F.pad(t, (0, 0) * (t.ndim - 2) + (0, longest - t.shape[1])) for t in tensors]
