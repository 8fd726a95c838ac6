"""HPSv2.1: a CLIP ViT-H-14 tuned on people's rankings (arXiv 2306.09341), converted from its open_clip file."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import hf_hub_download
from PIL import Image
from torch import Tensor
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

from rewards.base import Score
from rewards.clip import ClipEncoder, ClipReward, DType
from rewards.pretrained import one_line_errors, pick_device, read_tensors

HEADS = 16
"""Attention heads of both towers of ViT-H-14, which the weights do not show: 80 wide in vision, 64 in text."""

# open_clip's names -> transformers'. Applied in order; names that no rule knows stay, and fail the strict load.
RENAMES = (
    (r"^visual\.class_embedding$", "vision_model.embeddings.class_embedding"),
    (r"^visual\.conv1\.", "vision_model.embeddings.patch_embedding."),
    (r"^visual\.positional_embedding$", "vision_model.embeddings.position_embedding.weight"),
    (r"^visual\.ln_pre\.", "vision_model.pre_layrnorm."),
    (r"^visual\.ln_post\.", "vision_model.post_layernorm."),
    (r"^visual\.proj$", "visual_projection.weight"),
    (r"^visual\.transformer\.resblocks\.", "vision_model.encoder.layers."),
    (r"^token_embedding\.", "text_model.embeddings.token_embedding."),
    (r"^positional_embedding$", "text_model.embeddings.position_embedding.weight"),
    (r"^ln_final\.", "text_model.final_layer_norm."),
    (r"^text_projection$", "text_projection.weight"),
    (r"^transformer\.resblocks\.", "text_model.encoder.layers."),
    (r"\.ln_([12])\.", r".layer_norm\1."),
    (r"\.attn\.", ".self_attn."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
)


class HpsEncoder(ClipEncoder):
    """Encoder of the converted HPSv2.1 network, with its own preprocessing.

    Args:
        weights: file, or owner/name/file on the hub.
        processor: folder or hub id of the tokenizer.
        device: null is this process's GPU if there is one, else the CPU.
        dtype: precision of the weights.
        batch_size: images per forward pass.
        allow_pickle: see `read_state_dict`.
    """

    def __init__(
        self, weights: str, processor: str, device: str | None, dtype: DType, batch_size: int, allow_pickle: bool
    ) -> None:
        super().__init__(weights, processor, device, dtype, batch_size)
        self.allow_pickle = allow_pickle

    def pixels(self, images: Sequence[Image.Image]) -> Tensor:
        """Preprocesses B images to [B, 3, H, W]: whole, on black squares, normalised as CLIP's are."""
        size = self.network.config.vision_config.image_size
        return super().pixels([letterbox(image, size) for image in images])

    def _load_network(self) -> Any:
        state_dict = read_state_dict(self.model, allow_pickle=self.allow_pickle)
        try:
            network: Any = clip_from_open_clip(state_dict, vision_heads=HEADS, text_heads=HEADS)
        except ValueError as error:
            raise ValueError(f"{self.model} is not HPSv2's ViT-H-14: {error}") from error
        return network.to(pick_device(self.device), getattr(torch, self.dtype)).eval().requires_grad_(False)

    def _load_image_processor(self) -> Any:
        return CLIPImageProcessorPil(do_resize=False, do_center_crop=False)  # mean and deviation are CLIP's by default


class HPSReward(ClipReward):
    """HPSv2.1: native = cosine; table = 100 * cosine; rl = cosine. Not comparable with v2.0.

    Images are resized by their longer side to 224 pixels (bicubic) and centred on a black square, so a square image is
    only resized. The published script resizes no image whose longer side is 224 already, and thus fails on an oblong
    one of that size; here it is padded like any other. That script ran under fp16 autocast, and its tokenizer repaired
    mojibake and HTML entities in prompts first; both move scores in the last digits or for odd prompts only.

    Args:
        weights: path of `HPS_v2.1_compressed.pt`, or owner/name/file on the hub.
        processor: folder or hub id of CLIP ViT-H-14's tokenizer, which the weights do not hold.
        compat: `unirl` makes rl = 2 * cosine, as that code's reward service returns.
        allow_pickle: trust the file: run what it holds beside tensors if it cannot be read safely.
        device: null is this process's GPU if there is one, else the CPU.
        dtype: precision of the weights.
        batch_size: images per forward pass.
    """

    name = "hps"
    native_range = (-1.0, 1.0)

    def __init__(
        self,
        weights: str = "xswu/HPSv2/HPS_v2.1_compressed.pt",
        processor: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        compat: Literal["unirl"] | None = None,
        allow_pickle: bool = False,
        device: str | None = None,
        dtype: DType = "float32",
        batch_size: int = 32,
    ) -> None:
        if compat not in (None, "unirl"):
            raise ValueError(f"HPSReward has compat={compat!r}, use null or unirl.")
        super().__init__(HpsEncoder(weights, processor, device, dtype, batch_size, allow_pickle))
        self.compat = compat

    @property
    def version(self) -> str:
        """Version of the scores: the scorer, its weights and the convention of the rl value."""
        return f"{super().version} compat={self.compat}"

    def score_of(self, cosine: float) -> Score:
        """Converts a cosine in [-1, 1] between an image and its prompt to a score."""
        return Score(native=cosine, table=100.0 * cosine, rl=2.0 * cosine if self.compat == "unirl" else cosine)


def letterbox(image: Image.Image, size: int) -> Image.Image:
    """Puts the whole image on a black square: longer side to `size` pixels, centred, an odd pixel right or below."""
    scale = size / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    square = Image.new("RGB", (size, size))
    resized = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    square.paste(resized, ((size - width) // 2, (size - height) // 2))
    return square


def read_state_dict(weights: str, *, allow_pickle: bool = False) -> dict[str, Tensor]:
    """Reads the `state_dict` entry of a checkpoint.

    Args:
        weights: file, or owner/name/file on the hub.
        allow_pickle: if the file holds more than weights, load it all the same, which runs code from it.
    """
    path = weights
    if not Path(weights).is_file():
        match = re.fullmatch(r"(\w[\w.-]*/\w[\w.-]*)/([\w.-]+)", weights)
        if match is None or Path(weights).parent.is_dir():
            raise ValueError(f"there is no file {weights}: give an existing file or owner/name/file on the hub.")
        with one_line_errors(weights):
            path = hf_hub_download(match[1], match[2])
    trust = "" if allow_pickle else ", or set `allow_pickle: true` if you trust where it comes from (it may run code)"
    checkpoint = read_tensors(path, f"download it again{trust}", allow_pickle=allow_pickle)
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise ValueError(f"{weights} has no entry `state_dict`: give HPSv2's own file, HPS_v2.1_compressed.pt.")
    state_dict: dict[str, Tensor] = checkpoint["state_dict"]
    return state_dict


def clip_from_open_clip(state_dict: Mapping[str, Tensor], *, vision_heads: int, text_heads: int) -> CLIPModel:
    """Converts open_clip's weights to a CLIP model of transformers, in fp32.

    Sizes come from the tensors. The activation is the exact GELU: models that open_clip calls quickgelu cannot be told
    apart by their weights and would come out wrong.

    Args:
        state_dict: weights of open_clip's `CLIP` with a vision transformer and linear projections without bias.
        vision_heads: attention heads of the image tower.
        text_heads: attention heads of the text tower.

    Raises:
        ValueError: if tensors are missing or left over.
    """
    weights: dict[str, Tensor] = {}
    for name, tensor in state_dict.items():
        if name == "attn_mask":  # a buffer in some files; the mask follows from causality
            continue
        if name in ("visual.proj", "text_projection"):
            tensor = tensor.T  # [in, out] there, nn.Linear's [out, in] here
        if name == "logit_scale":
            tensor = tensor.reshape(())
        for pattern, replacement in RENAMES:
            name = re.sub(pattern, replacement, name)
        if ".in_proj_" in name:
            for part, third in zip("qkv", tensor.chunk(3), strict=True):
                weights[name.replace("in_proj_", f"{part}_proj.")] = third.float().contiguous()
        else:
            weights[name] = tensor.float().contiguous()
    try:
        config = _config(weights, vision_heads, text_heads)
    except KeyError as error:
        raise ValueError(f"no tensor becomes {error.args[0]} of a CLIP model.") from error
    try:
        loaded: Any = CLIPModel.from_pretrained(None, config=config, state_dict=weights, output_loading_info=True)
    except RuntimeError as error:
        raise ValueError("its tensors do not fit one another.") from error
    network: CLIPModel
    network, report = loaded
    for problem in ("missing_keys", "unexpected_keys"):
        if report[problem]:
            raise ValueError(f"{problem.replace('_', ' ')} after conversion: {', '.join(sorted(report[problem])[:3])}.")
    return network


def _config(weights: Mapping[str, Tensor], vision_heads: int, text_heads: int) -> CLIPConfig:
    """Derives the model's configuration from the sizes of converted weights."""

    def tower(prefix: str, heads: int) -> dict[str, Any]:
        hidden, width = weights[f"{prefix}.encoder.layers.0.mlp.fc1.weight"].shape
        layers = {name.split(".")[3] for name in weights if name.startswith(f"{prefix}.encoder.layers.")}
        return {
            "hidden_size": width,
            "intermediate_size": hidden,
            "num_hidden_layers": len(layers),
            "num_attention_heads": heads,
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-5,
        }

    patch = weights["vision_model.embeddings.patch_embedding.weight"].shape[-1]
    patches = len(weights["vision_model.embeddings.position_embedding.weight"]) - 1  # the first is the class token's
    vocabulary = len(weights["text_model.embeddings.token_embedding.weight"])
    return CLIPConfig(
        vision_config=tower("vision_model", vision_heads)
        | {"patch_size": patch, "image_size": patch * math.isqrt(patches)},
        text_config=tower("text_model", text_heads)
        | {
            "vocab_size": vocabulary,
            "max_position_embeddings": len(weights["text_model.embeddings.position_embedding.weight"]),
            # open_clip reads a text out at its highest id: the end of text, last in CLIP's vocabulary.
            "eos_token_id": vocabulary - 1,
            "bos_token_id": vocabulary - 2,
            "pad_token_id": vocabulary - 1,
        },
        projection_dim=len(weights["visual_projection.weight"]),
    )
