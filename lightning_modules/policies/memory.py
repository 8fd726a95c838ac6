"""Memory savings: quantized frozen weights, gradient checkpointing, compilation, networks offloaded to the CPU."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch._dynamo
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers.modeling_layers import GradientCheckpointingLayer

Quantization = Literal["nf4", "int8"]
BLOCK = 64
"""Weights that share a scale in NF4; rows of another length have no CPU kernel and occur in toy models only."""


def quantize_linears(network: nn.Module, kind: Quantization, compute_dtype: torch.dtype) -> None:
    """Replaces all linear layers by bitsandbytes' quantized ones, so that adapters can be trained on them (QLoRA).

    Biases, norms, embeddings and the last layer stay as they are.

    Args:
        network: a frozen network with its weights loaded.
        kind: `nf4` is 4-bit NormalFloat (arXiv 2305.14314), `int8` is LLM.int8() (arXiv 2208.07339) without its
            outlier columns, which would make a product depend on the rest of the batch.
        compute_dtype: dtype of the products.
    """
    import bitsandbytes as bnb  # slow to import, and seldom needed

    for name, module in list(network.named_modules()):
        for child_name, child in list(module.named_children()):
            head = not name and child_name in ("lm_head", "proj_out")  # small in a flow model, else tied to embeddings
            if type(child) is not nn.Linear or head or child.in_features % BLOCK:
                continue
            bias, weight = child.bias is not None, child.weight.data
            new: nn.Linear
            with torch.device("meta"):  # its first weights would be drawn: minutes for a large model
                if kind == "nf4":
                    new = bnb.nn.Linear4bit(
                        child.in_features, child.out_features, bias, compute_dtype=compute_dtype, quant_type="nf4"
                    )
                else:
                    new = bnb.nn.Linear8bitLt(child.in_features, child.out_features, bias, has_fp16_weights=False)
            if kind == "nf4":
                new.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
                # A CPU kernel that rounds otherwise, repacks the weights for good and fails once gradients are on.
                new.support_avx512bf16_for_cpu = False
            else:
                new.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
            if bias:
                new.bias = nn.Parameter(child.bias.data, requires_grad=False)
            setattr(network.get_submodule(name) if name else network, child_name, new)
    # What peft looks at to choose its layers.
    setattr(network, "is_loaded_in_4bit" if kind == "nf4" else "is_loaded_in_8bit", True)
    network.to(next(network.parameters()).device)  # rounds now, where the weights are


def follow_weights(network: nn.Module) -> None:
    """Moves the tensors that bitsandbytes keeps beside int8 weights to the weights' device.

    Moving a module leaves those tensors behind, and the first product would then fail on a GPU.
    """
    for module in network.modules():
        # By name, since bitsandbytes is slow to import; peft's wrapper around such a layer has the same one.
        if type(module).__name__ != "Linear8bitLt" or not type(module).__module__.startswith("bitsandbytes"):
            continue
        layer: Any = module
        for holder in (layer.weight, layer.state):
            if getattr(holder, "CB", None) is not None:
                holder.CB = layer.weight.data
            if getattr(holder, "SCB", None) is not None:
                holder.SCB = holder.SCB.to(layer.weight.device)


def compile_blocks(network: nn.Module) -> None:
    """Compiles the layers that a network repeats, each kind once, for all the ways that a step calls them."""
    # With and without gradient, adapters, checkpointing and two batch sizes: more than dynamo's 8 variants.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    if getattr(network, "_repeated_blocks", None):
        network.compile_repeated_blocks()  # type: ignore[operator]
        return
    for blocks in [module for module in network.children() if isinstance(module, nn.ModuleList)]:
        for block in blocks:
            block.compile()


SMALL = 256
"""Matrix products with a side of a weight below this, which are adapters', are always made again."""
_PRODUCTS = {"aten.mm.default", "aten.addmm.default"}
_QUANTIZED = {"bitsandbytes.gemm_4bit.default", "bitsandbytes.int8_scaled_mm.default"}


def selective_contexts() -> Any:
    """`context_fn` of `torch.utils.checkpoint`: keeps the results of attention and of every second matrix product.

    The first are long to compute for what they take; of the second half the time is saved for half the memory. In
    compiled blocks the products have no names of their own, and attention alone is kept.
    """
    products = {False: 0, True: 0}

    def policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        name = str(operation)
        if name.startswith("aten._scaled_dot_product_"):
            return CheckpointPolicy.MUST_SAVE
        if name in _QUANTIZED or (name in _PRODUCTS and min(args[-1].shape) >= SMALL):
            products[context.is_recompute] += 1
            if products[context.is_recompute] % 2:
                return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


def checkpoint_selectively(module: nn.Module, *args: Any) -> Any:
    """Runs a block of a diffusers network, and keeps a part of its activations (`selective_contexts`)."""
    return checkpoint(module.__call__, *args, use_reentrant=False, context_fn=selective_contexts)


@contextmanager
def gradient_checkpointing_enabled(network: nn.Module, on: bool) -> Iterator[None]:
    """Context manager: transformers' layers checkpoint their activations, if `on`.

    transformers does so in training mode only, but policies stay in evaluation mode (no dropout): the layers themselves
    are put into training mode, the modules inside them are not.
    """
    layers = [module for module in network.modules() if on and isinstance(module, GradientCheckpointingLayer)]
    for layer in layers:
        layer.training = True
    try:
        yield
    finally:
        for layer in layers:
            layer.training = False


@contextmanager
def on_device(modules: Sequence[nn.Module], device: torch.device) -> Iterator[None]:
    """Context manager: modules that never learn, and are kept on the CPU between uses, are on a device.

    Nothing is copied back: their tensors on the CPU wait, in memory that a GPU reads without a detour, and return.
    """
    lent: dict[int, tuple[Tensor, Tensor, Tensor]] = {}  # the first one too, so that no other tensor gets its id

    def lend(tensor: Tensor) -> Tensor:
        if id(tensor) not in lent:  # layers may share a weight
            waiting = tensor.data.pin_memory() if device.type == "cuda" else tensor.data  # once: it stays pinned
            moved = _copied(waiting, device)
            # A parameter gets the moved values, a buffer is replaced by them.
            lent[id(tensor)] = lent[id(moved)] = tensor, moved, waiting
        return lent[id(tensor)][1]

    def take_back(tensor: Tensor) -> Tensor:
        return lent[id(tensor)][2] if id(tensor) in lent else tensor.to("cpu")  # it was made meanwhile

    for module in modules:
        module._apply(lend)
    try:
        yield
    finally:
        for module in modules:
            module._apply(take_back)


def _copied(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.to(device, non_blocking=True)
