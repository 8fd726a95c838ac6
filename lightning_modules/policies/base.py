"""`Policy`: base class of both agents, which are trained fully, trained by adapters, or frozen."""

from __future__ import annotations

import copy
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule

from lightning_modules.policies.adapters import DEFAULT, REFERENCE, base_and_adapter, reference_adapter
from lightning_modules.policies.kept import Decay, KeptWeights
from lightning_modules.policies.memory import Quantization, follow_weights, quantize_linears
from lightning_modules.policies.sharding import gathered, saved_whole, shard_network
from rewards.arguments import check_minimum

DType = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class LoRA:
    """Low-rank adapters (peft) instead of full fine-tuning.

    Args:
        rank: rank of the update; null is 64.
        alpha: the update is scaled by alpha / rank; null is 128.
        targets: module name endings, or one regular expression; null is the policy's own choice.
        path: adapter to start from, or to evaluate where the agent is frozen: a folder (diffusers' or peft's format,
            or one that `callbacks.export.Export` wrote), a LoRA file of an image model, or a hub id. Its rank, alpha
            and targets apply; leave these out.
    """

    rank: int | None = None
    alpha: int | None = None
    targets: list[str] | str | None = None
    path: str | None = None


class Policy(nn.Module, ABC):
    """An agent: a network that is trained fully, trained by adapters, or frozen.

    Constructors only store their arguments; `load` brings the weights. A policy always stays in evaluation mode, since
    dropout or batch statistics would make a replay differ from its rollout.

    Args:
        model: folder or hub id; an adapter's stands for its base model with the adapter as `lora.path`.
        learning_rate: null freezes this agent.
        weight_decay: AdamW's weight decay.
        kl_weight: weight of the KL to the model before training; 0 keeps no reference.
        clip_range: the ratio in the surrogate is clipped to 1 - clip_range, 1 + clip_range.
        max_log_ratio: a run stops where replayed log-probs differ from sampled ones by more, in nats.
        betas: AdamW's betas.
        max_grad_norm: the gradient of this agent alone is clipped to this norm.
        lora: adapters; null trains all weights.
        dtype: dtype of the loaded weights.
        frozen_dtype: dtype of networks that never learn: this one, if its learning rate is null, the reference, and a
            pipeline's text encoders and VAE; null is `dtype`. With bfloat16 and `trainer.precision: bf16-mixed` the KL
            of published weights, which are bf16, is 0 at the start; in 32-true it would have bf16's rounding.
        micro_batch_size: samples per forward pass of the update, and of a flow model's rollout; null is all at once.
        rollout_batch_size: samples of a rollout that are drawn together; null is `micro_batch_size` for a flow model,
            and all completions for a refiner. Other batches may round otherwise, so that `max_log_ratio` has to be
            higher in half precision.
        gradient_checkpointing: computes activations again in the backward pass instead of keeping them; `selective`
            keeps those of attention and of every second matrix product.
        quantization: keeps the frozen weights in 4 or 8 bits (bitsandbytes); an agent that learns needs `lora` then.
        reference_decay: how the reference follows the weights: null keeps it as it was before training,
            `{limit: 0, every: 100}` sets it to the weights every 100 optimizer steps, `{limit: 0.999}` is their moving
            average.
        kl_every: optimizer steps from one with the KL to the next; the others do not call the reference, and have no
            `kl` in the log. The KL weighs `kl_every` times as much where it is, so that the mean gradient over steps
            stays the same, but AdamW's moments and `max_grad_norm` see it in bursts.
    """

    agent: ClassVar[str] = "language"
    """Name of this kind of agent in the configuration, the optimizer's groups and the log."""
    default_lora_targets: list[str] | str

    def __init__(
        self,
        model: str,
        learning_rate: float | None,
        weight_decay: float,
        kl_weight: float,
        clip_range: float,
        max_log_ratio: float,
        betas: tuple[float, float] = (0.9, 0.999),
        max_grad_norm: float = 1.0,
        lora: LoRA | None = None,
        dtype: DType = "bfloat16",
        frozen_dtype: DType | None = None,
        micro_batch_size: int | None = None,
        rollout_batch_size: int | None = None,
        gradient_checkpointing: bool | Literal["selective"] = False,
        quantization: Quantization | None = None,
        kl_every: int = 1,
        reference_decay: Decay | None = None,
    ) -> None:
        super().__init__()
        agent = self.agent
        own = f"model.{agent}"
        check_minimum(own, 0, learning_rate=learning_rate, weight_decay=weight_decay, kl_weight=kl_weight)
        check_minimum(own, 0, clip_range=clip_range, max_log_ratio=max_log_ratio, beta_1=betas[0], beta_2=betas[1])
        check_minimum(own, 1, micro_batch_size=micro_batch_size, rollout_batch_size=rollout_batch_size)
        check_minimum(own, 1, kl_every=kl_every)
        if lora is not None:
            check_minimum(f"{own}.lora", 1, rank=lora.rank, alpha=lora.alpha)
        if max(betas) >= 1:
            raise ValueError(f"{own} has betas={betas}, use less than 1: the averages would stay at 0.")
        if learning_rate is not None and learning_rate > 1:
            raise ValueError(
                f"{own} has learning_rate={learning_rate}, use at most 1: AdamW moves each weight by about that a step."
            )
        if not max_grad_norm > 0:
            raise ValueError(f"{own} has max_grad_norm={max_grad_norm}, use more than 0, or .inf for no clipping.")
        self.model = model
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.betas = betas
        self.max_grad_norm = max_grad_norm
        self.kl_weight = kl_weight
        self.kl_every = kl_every
        self.step = 0
        """Number of the optimizer step that is being taken."""
        self.clip_range = clip_range
        self.max_log_ratio = max_log_ratio
        self.lora = lora
        self.frozen_dtype: torch.dtype = getattr(torch, frozen_dtype or dtype)
        self.dtype: torch.dtype = self.frozen_dtype if learning_rate is None else getattr(torch, dtype)
        self.micro_batch_size = micro_batch_size
        self.rollout_batch_size = rollout_batch_size
        self.gradient_checkpointing = gradient_checkpointing
        self.quantization: Quantization | None = quantization
        self.network: Any = None
        self._frozen_copy: nn.Module | None = None
        self._use_frozen_copy = False
        self.needs_reference = False
        """True if an objective compares with `reference`, whatever the KL's weight is."""
        self.reference_decay = reference_decay
        self.old_decay: Decay | None = None
        """How an objective's old policy follows the weights; None if there is none."""
        self._copies: dict[str, KeptWeights] = {}

    @property
    def trained(self) -> bool:
        """True if this agent learns."""
        return self.learning_rate is not None

    @property
    def kl_weight_now(self) -> float:
        """Weight of the KL in the current optimizer step: none, but in every `kl_every`-th one."""
        return 0.0 if self.step % self.kl_every else self.kl_every * self.kl_weight

    @property
    def adapted(self) -> bool:
        """True if the network has LoRA adapters: trained ones, or loaded ones."""
        return self.lora is not None and (self.trained or self.lora.path is not None)

    @property
    def base(self) -> str:
        """Hub id or absolute folder of the base model, as exports name it."""
        return str(Path(self.model).resolve()) if Path(self.model).is_dir() else self.model

    @property
    def active(self) -> Any:
        """The network in use: the trained one, or its frozen copy inside `reference()`."""
        return self._frozen_copy if self._use_frozen_copy else self.network

    @abstractmethod
    def load(self, *, weights: bool = True) -> None:
        """Loads the weights and prepares them for training; later calls do nothing.

        Args:
            weights: False leaves those of a network that learns on the meta device, for `shard` to fill.
        """

    @abstractmethod
    def _add_adapters(self, lora: LoRA) -> None:
        """Puts LoRA adapters into `self.network`."""

    @abstractmethod
    def save_pretrained(self, directory: str | Path) -> None:
        """Writes what was trained in the libraries' own format: an adapter, or a model folder."""

    def settle_model(self) -> None:
        """Puts an adapter's base model into `model` and the adapter into `lora.path`, if `model` is an adapter.

        Raises:
            ValueError: if the base model cannot be told, or quantized weights would be trained.
        """
        agent = self.agent
        self.model, adapter = base_and_adapter(self.model, agent)
        if adapter is not None:
            lora = self.lora or LoRA()
            if lora.path is not None:
                raise ValueError(
                    f"`{agent}.model` is a LoRA, {adapter}, and `{agent}.lora.path` another: give the base model as "
                    f"`{agent}.model`."
                )
            self.lora = replace(lora, path=adapter)
        if self.quantization is not None and self.trained and self.lora is None:
            raise ValueError(
                f"`{agent}.quantization` is {self.quantization}, whose weights cannot be trained; add `{agent}.lora`."
            )

    @property
    def decays(self) -> dict[str, Decay]:
        """Name of each copy of the trained weights that follows them -> how."""
        found = {"reference": self.reference_decay if self._compares else None, "old": self.old_decay}
        return {name: decay for name, decay in found.items() if decay is not None and self.trained}

    @property
    def _keeps_reference(self) -> bool:
        return self.trained and self._compares and self.reference_decay is None

    @property
    def _compares(self) -> bool:
        return self.kl_weight > 0 or self.needs_reference

    @property
    def _adapters(self) -> list[str]:
        """Names of the adapters that the network gets: one to use and, for the KL, a copy of what was loaded."""
        keeps = self._keeps_reference and self.lora is not None and self.lora.path is not None
        return [DEFAULT, REFERENCE] if keeps else [DEFAULT]

    def _prepare(self) -> None:
        """Freezes everything but what this agent learns, and keeps a reference if the KL needs one."""
        # Its backward pass fails for FLUX.1 and gives NaN behind masks (H100 and H200, PyTorch 2.11 to 2.13; PyTorch's
        # issue 196678). `flow.attention_backend: _native_cudnn` still takes it.
        torch.backends.cuda.enable_cudnn_sdp(False)
        self.requires_grad_(False)
        self.eval()
        if self.quantization is not None:
            quantize_linears(self.network, self.quantization, self.dtype)
        if self.lora is not None and self.adapted:
            self._add_adapters(self.lora)
            if not self.trained:
                self.requires_grad_(False)
        elif self.trained:
            lost = rounded_away(self.network, self.learning_rate) if self.learning_rate else 0.0
            if lost > 0.05:
                warnings.warn(
                    f"{type(self).__name__} trains all weights in {self.dtype} with a learning rate of "
                    f"{self.learning_rate:g}: an update of that size is rounded away for {lost:.0%} of "
                    "the weights; use `dtype: float32` with `trainer.precision: bf16-mixed`, or `lora`.",
                    stacklevel=2,
                )
            if self._keeps_reference:
                if self.frozen_dtype.itemsize > self.dtype.itemsize:
                    raise ValueError(
                        f"model.{self.agent} has frozen_dtype {self.frozen_dtype}, but its reference takes inputs of "
                        f"its `dtype`, {self.dtype}: use that."
                    )
                self._frozen_copy = copy.deepcopy(self.network)
                if self.frozen_dtype != self.dtype:
                    nn.Module.to(self._frozen_copy, self.frozen_dtype)  # diffusers' own warns of layers, none of ours
            self.network.requires_grad_(True)
        self.eval()

    def shard(self, mesh: DeviceMesh, device: torch.device, compute: torch.dtype | None) -> None:
        """Shares the weights and the reference out over processes; nothing happens to a frozen agent.

        Args:
            mesh: one dimension, the processes.
            device: where the shards go.
            compute: dtype in which fully trained weights compute; None is their own.

        Raises:
            ValueError: if the weights are quantized.
        """
        if not self.trained or self.sharded:
            return
        if self.quantization is not None:
            raise ValueError(
                f"`{self.agent}.quantization` is {self.quantization}, which cannot be sharded: leave it out, or use "
                "`trainer.strategy: ddp`."
            )
        shard_network(self._core, mesh, device, None if self.lora is not None else compute)
        if self._frozen_copy is not None:
            shard_network(self._frozen_copy, mesh, device, None)

    @property
    def sharded(self) -> bool:
        """True if this agent's weights are shared out over processes."""
        return isinstance(self._core, FSDPModule)

    def gathered(self) -> AbstractContextManager[None]:
        """Context manager: every process has all weights of this agent; to enter it is a collective."""
        return nullcontext() if self.network is None else gathered(self._core)

    def saved_whole(self) -> AbstractContextManager[None]:
        """Context manager for `save_pretrained` on the first process; to enter it is a collective."""
        return saved_whole(self.network)

    @property
    def _core(self) -> Any:
        """The network without what peft puts around it."""
        return self.network.get_base_model() if hasattr(self.network, "get_base_model") else self.network

    def _apply(self, fn: Any, recurse: bool = True) -> Policy:
        super()._apply(fn, recurse)
        follow_weights(self)
        return self

    def train(self, mode: bool = True) -> Policy:
        """Stays in evaluation mode, whatever `mode` is."""
        del mode
        return super().train(False)

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Context manager: the policy that training starts from, which the KL is measured to.

        Under LoRA the adapters are off or, where training began from `lora.path`, are those that were loaded; under
        full fine-tuning the frozen copy is in use. A frozen agent is its own reference.

        With `reference_decay` it is the copy that follows the weights.

        Raises:
            ValueError: if the agent was loaded without a KL, and so kept no copy.
        """
        if "reference" in self.decays:
            with self.kept("reference"):
                yield
            return
        if self.trained and self.lora is not None and self.lora.path is None:
            with self._adapters_off():
                yield
            return
        if self.trained and self.adapted and REFERENCE in self.network.peft_config:
            with reference_adapter(self.network):
                yield
            return
        if self.trained and self._frozen_copy is None:
            raise ValueError(f"{type(self).__name__} keeps no reference: set `kl_weight` above 0 before loading it.")
        self._use_frozen_copy = self._frozen_copy is not None
        # A copy in another dtype is given what the agent is given. (Disabled, autocast would end an outer one.)
        other = self._use_frozen_copy and self.frozen_dtype != self.dtype and self.device.type != "meta"
        try:
            with torch.autocast(self.device.type, self.frozen_dtype) if other else nullcontext():
                yield
        finally:
            self._use_frozen_copy = False

    @contextmanager
    def _adapters_off(self) -> Iterator[None]:
        self.network.disable_adapters()
        try:
            yield
        finally:
            self.network.enable_adapters()

    @property
    def copies(self) -> dict[str, KeptWeights]:
        """Copies of the trained weights that follow them, by name; made at the first call, before training."""
        if self._copies.keys() != self.decays.keys():
            learned = {name: p for name, p in self.named_parameters() if p.requires_grad}
            self._copies = {name: KeptWeights(learned, decay) for name, decay in self.decays.items()}
        return self._copies

    def kept(self, name: str) -> AbstractContextManager[None]:
        """Context manager: the network computes with a copy of the trained weights, without gradient."""
        return self.copies[name].in_use()

    @property
    def device(self) -> torch.device:
        """Device of the network."""
        device: torch.device = next(self.network.parameters()).device
        return device

    def parameter_group(self) -> dict[str, Any]:
        """Makes this agent's parameter group for the optimizer."""
        return {
            "name": self.agent,
            "params": [p for p in self.parameters() if p.requires_grad],
            "lr": self.learning_rate,
            "weight_decay": self.weight_decay,
            "betas": self.betas,
        }


def rounded_away(network: nn.Module, step: float) -> float:
    """Measures the share of weights, 0..1, that stay as they are when `step` is added to them and when it is taken off.

    AdamW's updates are about as large as its learning rate, whatever the gradient, and half-precision weights of more
    than 256 times that (bf16) round back to what they were.
    """
    stuck = total = 0
    for weight in network.parameters():
        if weight.is_meta:
            return 0.0
        some = weight.detach().flatten()[:: max(1, weight.numel() // 10_000)]  # all of them take minutes on a CPU
        stuck += int(((some + step == some) & (some - step == some)).sum()) * weight.numel() // len(some)
        total += weight.numel()
    return stuck / total
