"""Folders of published architectures without their weights, and models of random weights in their place.

Sizes are those of the published configuration files (`published.yaml`). Tokenizers are byte-level ones of as many
tokens, since the published vocabularies are files too: texts are as long as they have bytes.
"""

from __future__ import annotations

import json
import pydoc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import diffusers
import torch
import transformers
import yaml
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from lightning_modules.policies.pipeline import PipelinePolicy
from lightning_modules.preflight.meta_models import kept_in_fp32

MODELS: dict[str, Any] = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
"""Sizes of published models: `pipelines` and `refiners` by name, and `tiny` stand-ins by class."""

CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
IMAGE_TOKENS = {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>"}
IMAGE_TOKENS |= {"vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>"}


def write_pipeline(folder: Path, name: str, *, tiny: bool = False) -> type[PipelinePolicy]:
    """Writes a pipeline's folder without weights: configurations and tokenizers.

    Args:
        folder: folder to write.
        name: one of `MODELS["pipelines"]`.
        tiny: takes the stand-ins' sizes.

    Returns:
        The policy that reads it.
    """
    model = MODELS["pipelines"][name]
    policy: Any = pydoc.locate(model["policy"])
    index = {"_class_name": policy.pipeline_class.__name__, "_diffusers_version": diffusers.__version__}
    index |= {"scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"], **model.get("index", {})}
    scheduler: Any = diffusers.FlowMatchEulerDiscreteScheduler(**model.get("scheduler", {"shift": 3.0}))
    scheduler.save_config(folder / "scheduler")
    for part, entry in model["parts"].items():
        ((kind, published),) = entry.items()
        index[part] = ["diffusers" if hasattr(diffusers, kind) else "transformers", kind]
        if part.startswith("tokenizer") or part == "processor":
            encoder = model["parts"][part.replace("tokenizer", "text_encoder").replace("processor", "text_encoder")]
            ((read_by, read),) = encoder.items()
            write_tokenizer(folder / part, _sized(read_by, read, tiny), **published)
        if part == "processor":
            transformers.Qwen2VLImageProcessorPil().save_pretrained(folder / part)
        elif hasattr(diffusers, kind):
            with torch.device("meta"):
                getattr(diffusers, kind)(**_sized(kind, published, tiny)).save_config(folder / part)
        elif hasattr(getattr(transformers, kind), "config_class"):
            getattr(transformers, kind).config_class(**_sized(kind, published, tiny)).save_pretrained(folder / part)
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))
    return policy


def write_refiner(folder: Path, name: str, *, tiny: bool = False) -> None:
    """Writes a refiner's folder without weights; loading looks for a file of them first, so an empty one is there.

    Args:
        folder: folder to write.
        name: one of `MODELS["refiners"]`.
        tiny: takes the stand-ins' sizes.
    """
    ((kind, published),) = MODELS["refiners"][name].items()
    settings = _sized(kind, published, tiny)
    config = getattr(transformers, kind).config_class(**settings)
    config.architectures = [kind]
    config.save_pretrained(folder)
    write_tokenizer(folder, settings)
    if "vision_config" in settings:
        transformers.Qwen2VLImageProcessorPil().save_pretrained(folder)
    (folder / "model.safetensors").touch()


def write_tokenizer(folder: Path, settings: dict[str, Any], **more: Any) -> None:
    """Writes a byte-level tokenizer with a token for every id of a model: bytes, special tokens, and words.

    Args:
        folder: folder to write.
        settings: the model's configuration, which says how many ids there are and which mark images.
        **more: arguments of the tokenizer, such as `model_max_length`.
    """
    size = settings.get("text_config", settings)["vocab_size"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = dict(enumerate([*letters, "<|endoftext|>", "<|im_start|>", "<|im_end|>"]))
    special = [*tokens.values()][len(letters) :]
    for key in IMAGE_TOKENS.keys() & settings.keys():
        tokens[settings[key]] = IMAGE_TOKENS[key]
        special.append(IMAGE_TOKENS[key])
    vocabulary = {tokens.get(number, f"\u0120w{number}"): number for number in range(size)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True) for token in special])
    roles = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "chat_template": CHAT}
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **(roles | {"model_max_length": 4096} | more))
    fast.save_pretrained(folder)


@contextmanager
def random_weights(device: torch.device) -> Iterator[None]:
    """Context manager: networks that would be loaded from a folder are drawn at random on `device` instead.

    Everything else of `from_pretrained` is the libraries' own: configurations, dtypes, tokenizers, pipelines.
    """

    def drawn(cls: Any, path: Any, *args: Any, config: Any = None, dtype: Any = None, **kwargs: Any) -> Any:
        dtype = dtype or kwargs.get("torch_dtype") or torch.float32
        usual = torch.get_default_dtype()
        torch.set_default_dtype(dtype)  # as loading does: drawn in fp32 first, the largest would not fit
        try:
            with torch.device(device):
                if issubclass(cls, diffusers.ModelMixin):
                    network = cls.from_config(cls.load_config(path))
                else:
                    network = cls(config or cls.config_class.from_pretrained(path))
        finally:
            torch.set_default_dtype(usual)
        for module in kept_in_fp32(network, dtype):
            module.to(torch.float32)
        return network.eval()

    with (
        patch.object(diffusers.ModelMixin, "from_pretrained", classmethod(drawn)),
        patch.object(transformers.PreTrainedModel, "from_pretrained", classmethod(drawn)),
    ):
        yield


def _sized(kind: str, published: dict[str, Any], tiny: bool) -> dict[str, Any]:
    """Settings of a part, with the stand-in's sizes where they are asked for."""
    return published | MODELS["tiny"].get(kind, {}) if tiny else published
