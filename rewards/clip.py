"""CLIP for all scorers: `ClipEncoder` (embeddings), `ClipReward` (scores by cosine), CLIPScore (arXiv 2104.08718)."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar, get_args

import torch
from PIL.Image import Image
from torch import Tensor
from torch.nn.functional import normalize
from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel, PreTrainedConfig

from datamodules.chunks import chunks
from rewards.arguments import check_minimum
from rewards.base import Reward, RewardBatch, Score
from rewards.pretrained import load_pretrained, load_processor

DType = Literal["float32", "bfloat16", "float16"]
T = TypeVar("T")


class ClipEncoder:
    """Embeds images and texts with a CLIP model.

    Preprocessing is the model's own, done by Pillow as the published scores were: bicubic resize of the shorter side,
    centre crop. Texts are cut to the model's context (77 tokens), keeping the end-of-text token.

    Args:
        model: folder or hub id of the weights.
        processor: folder or hub id of the image processor and the tokenizer; null is the model's own.
        device: null is this process's GPU if there is one, else the CPU.
        dtype: precision of the weights; embeddings are normalised in fp32 whatever it is.
        batch_size: images, or texts, per forward pass.
    """

    def __init__(
        self,
        model: str,
        processor: str | None = None,
        device: str | None = None,
        dtype: DType = "float32",
        batch_size: int = 32,
    ) -> None:
        if dtype not in get_args(DType):
            raise ValueError(f"the CLIP model {model} has dtype={dtype!r}, use one of {', '.join(get_args(DType))}.")
        check_minimum(f"the CLIP model {model}", 1, batch_size=batch_size)
        self.model = model
        self.processor = processor or model
        self.device = device
        self.dtype: DType = dtype
        self.batch_size = batch_size
        self.network: Any = None

    @property
    def version(self) -> str:
        """Version of the embeddings: the weights, the processor and the precision."""
        return f"{self.model} processor={self.processor} {self.dtype}"

    @property
    def logit_scale(self) -> float:
        """Factor from a cosine to a logit: exp of the learnt parameter, 100 in most published models."""
        self.load()
        return float(self.network.logit_scale.float().exp())

    def load(self) -> None:
        """Loads the model, its tokenizer and its image processor; later calls do nothing."""
        if self.network is not None:
            return
        self.image_processor = self._load_image_processor()
        self.tokenizer = load_processor(AutoTokenizer, self.processor)
        network = self._load_network()
        if not pools_at_end_of_text(network, self.tokenizer):
            raise ValueError(
                f"the tokenizer of {self.processor} does not end texts with the token at which {self.model} reads "
                "them out: give the `processor` that belongs to this CLIP model."
            )
        self.network = network

    def images(self, images: Sequence[Image]) -> Tensor:
        """Embeds images by the vision tower.

        Args:
            images: B images of any size and mode.

        Returns:
            [B, D] fp32 projected embeddings of length 1.
        """
        self.load()
        return self._embed(images, lambda part: self.network.get_image_features(self._on_network(self.pixels(part))))

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Embeds texts by the text tower, each distinct one once: the images of a group share their prompt.

        Args:
            texts: B texts.

        Returns:
            [B, D] fp32 projected embeddings of length 1.
        """
        self.load()
        row = {text: index for index, text in enumerate(dict.fromkeys(texts))}
        embeddings = self._embed(list(row), self._text_features)
        return embeddings[[row[text] for text in texts]]

    def pixels(self, images: Sequence[Image]) -> Tensor:
        """Preprocesses B images to the vision tower's input [B, 3, H, W]."""
        pixels: Tensor = self.image_processor([image.convert("RGB") for image in images], return_tensors="pt")[
            "pixel_values"
        ]
        return pixels

    def _text_features(self, texts: Sequence[str]) -> Any:
        context = self.network.config.text_config.max_position_embeddings
        # Attention is causal, so that the padding after the end-of-text token needs no mask.
        tokens = self.tokenizer(list(texts), padding=True, truncation=True, max_length=context, return_tensors="pt")
        return self.network.get_text_features(tokens["input_ids"].to(self.network.device))

    def _embed(self, items: Sequence[T], features: Callable[[Sequence[T]], Any]) -> Tensor:
        if not items:
            return torch.empty(0, self.network.config.projection_dim, device=self.network.device)
        # A caller's autocast would change the scores with the training's precision.
        with torch.no_grad(), torch.autocast(self.network.device.type, enabled=False):
            parts = [features(items[rows]).pooler_output.float() for rows in chunks(len(items), self.batch_size)]
        return normalize(torch.cat(parts), dim=-1)

    def _on_network(self, pixels: Tensor) -> Tensor:
        return pixels.to(self.network.device, self.network.dtype)

    def _load_network(self) -> Any:
        return load_pretrained(CompleteClip, self.model, device=self.device, dtype=getattr(torch, self.dtype))

    def _load_image_processor(self) -> Any:
        return load_processor(CLIPImageProcessorPil, self.processor)


class CompleteClip:
    """Loader of CLIP models that refuses incomplete checkpoints, which transformers fills with random numbers."""

    @classmethod
    def from_pretrained(cls, model: str, **kwargs: Any) -> Any:
        """Loads a CLIP model whose every weight comes from its checkpoint.

        Args:
            model: folder or hub id.
            **kwargs: for `CLIPModel.from_pretrained`.

        Raises:
            ValueError: if the model is of another kind, or weights are missing.
        """
        kind = PreTrainedConfig.get_config_dict(model)[0].get("model_type")
        if kind not in (None, "clip"):  # None is for transformers to complain about
            raise ValueError(f"{model} is a model of type {kind!r}: give a whole CLIP model (type 'clip').")
        loaded: Any = CLIPModel.from_pretrained(model, output_loading_info=True, **kwargs)
        network, report = loaded
        if report["missing_keys"]:
            raise ValueError(
                f"{model} lacks {len(report['missing_keys'])} weights of its CLIP model, such as "
                f"{min(report['missing_keys'])}: give a complete checkpoint with transformers' weight names."
            )
        return network


def pools_at_end_of_text(network: Any, tokenizer: Any) -> bool:
    """Returns True if the text tower pools at the last token that the tokenizer gives a text.

    transformers pools at the first `eos_token_id`, wherever the tokenizer puts its own end; with a tokenizer of
    another model that is the first token, which has seen nothing of the text.
    """
    ids = tokenizer("a")["input_ids"]
    config = network.config.text_config
    # CLIP's first configurations say 2 by mistake: transformers then takes the highest id, the true end of text.
    end = max(ids) if config.eos_token_id == 2 else config.eos_token_id
    return end in ids and ids.index(end) == len(ids) - 1 and max(ids) < config.vocab_size


def decoding_error(image: Image) -> str | None:
    """Returns the reason why an image cannot be decoded; None if it can."""
    if 0 in image.size:
        return f"the image has {image.width} x {image.height} pixels"
    try:
        image.load()  # an image opened from a file is read only now
    except (OSError, SyntaxError) as error:  # Pillow's word for a broken PNG is SyntaxError
        return f"the image cannot be decoded: {error}"
    return None


def score_decodable(batch: RewardBatch, score: Callable[[RewardBatch], list[Score]]) -> list[Score]:
    """Scores the images that can be decoded; the others become invalid.

    Args:
        batch: B images with their samples.
        score: scores a batch of decodable images.
    """
    faults = [decoding_error(image) for image in batch.images]
    kept = [index for index, fault in enumerate(faults) if fault is None]
    if not kept:
        return [Score.invalid(fault or "") for fault in faults]
    scores = iter(score(RewardBatch([batch.samples[i] for i in kept], [batch.images[i] for i in kept])))
    return [next(scores) if fault is None else Score.invalid(fault) for fault in faults]


class ClipReward(Reward):
    """Scores each image by its cosine with its sample's original prompt; a subclass converts it.

    Args:
        encoder: the CLIP model.
    """

    def __init__(self, encoder: ClipEncoder) -> None:
        self.encoder = encoder

    @property
    def version(self) -> str:
        """Version of the scores: the scorer and its CLIP model."""
        return f"{self.name} by {self.encoder.version}"

    def load(self) -> None:
        """Loads the CLIP model."""
        self.encoder.load()

    def __call__(self, batch: RewardBatch) -> list[Score]:
        """Scores B images against their samples' prompts."""
        self.load()
        return score_decodable(batch, self._score)

    def _score(self, batch: RewardBatch) -> list[Score]:
        images = self.encoder.images(batch.images)
        texts = self.encoder.texts([sample.prompt for sample in batch.samples])
        cosines = (images * texts).sum(-1).tolist()
        return [self.score_of(c) if math.isfinite(c) else Score.invalid("the cosine is not finite") for c in cosines]

    @abstractmethod
    def score_of(self, cosine: float) -> Score:
        """Converts a cosine in [-1, 1] between an image and its prompt to a score."""


class CLIPScoreReward(ClipReward):
    """CLIPScore: native = cosine; table = 100 * cosine; rl = exp(logit_scale) * cosine over 30 or 100.

    torchmetrics prints max(mean of 100 * cosine, 0). It clips the mean over images and not each image, so nothing is
    clipped here: the mean of `table` is torchmetrics' number wherever that is above 0.

    Args:
        model: folder or hub id of the CLIP weights.
        processor: folder or hub id of the image processor and the tokenizer; null is the model's own.
        convention: the rl value's divisor of the logit: `flow_grpo` 30, `diffusion_nft` 100.
        device: null is this process's GPU if there is one, else the CPU.
        dtype: precision of the weights.
        batch_size: images per forward pass.
    """

    name = "clipscore"
    native_range = (-1.0, 1.0)

    def __init__(
        self,
        model: str = "openai/clip-vit-large-patch14",
        processor: str | None = None,
        convention: Literal["flow_grpo", "diffusion_nft"] = "flow_grpo",
        device: str | None = None,
        dtype: DType = "float32",
        batch_size: int = 32,
    ) -> None:
        if convention not in ("flow_grpo", "diffusion_nft"):
            raise ValueError(f"CLIPScoreReward has convention={convention!r}, use flow_grpo or diffusion_nft.")
        super().__init__(ClipEncoder(model, processor, device, dtype, batch_size))
        self.convention = convention

    @property
    def version(self) -> str:
        """Version of the scores: the scorer, its CLIP model and the convention of the rl value."""
        return f"{super().version} convention={self.convention}"

    def score_of(self, cosine: float) -> Score:
        """Converts a cosine in [-1, 1] between an image and its prompt to a score."""
        divisor = {"flow_grpo": 30.0, "diffusion_nft": 100.0}[self.convention]
        return Score(native=cosine, table=100.0 * cosine, rl=self.encoder.logit_scale * cosine / divisor)
