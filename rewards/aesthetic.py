"""The LAION aesthetic predictor: a stack of linear layers on CLIP's image embedding."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor, nn

from rewards.base import Reward, RewardBatch, Score
from rewards.clip import ClipEncoder, DType, score_decodable
from rewards.pretrained import read_tensors

FILE = "sac+logos+ava1-l14-linearMSE.pth"
REPOSITORY = "christophschuhmann/improved-aesthetic-predictor"


class AestheticHead(nn.Module):
    """The predictor's linear layers, without activations, under the names of the published file.

    Args:
        width: size of CLIP's projected embedding, 768 in ViT-L/14.
    """

    def __init__(self, width: int = 768) -> None:
        super().__init__()
        # Dropout does nothing outside training; it is here because it counts in the names (layers.0, 2, 4, 6, 7).
        self.layers = nn.Sequential(
            nn.Linear(width, 1024),
            nn.Dropout(0.2),
            nn.Linear(1024, 128),
            nn.Dropout(0.2),
            nn.Linear(128, 64),
            nn.Dropout(0.1),
            nn.Linear(64, 16),
            nn.Linear(16, 1),
        )

    def forward(self, embeddings: Tensor) -> Tensor:
        """Returns [B] ratings, about 1 to 10, of [B, width] embeddings of length 1."""
        ratings: Tensor = self.layers(embeddings)
        return ratings.squeeze(-1)


class AestheticReward(Reward):
    """Aesthetic rating of an image, whatever its prompt: native = table = rl, about 1 to 10, unbounded.

    Args:
        weights: path of the head's weights, published as `sac+logos+ava1-l14-linearMSE.pth` in the repository
            christophschuhmann/improved-aesthetic-predictor (.pth, or the same tensors as .safetensors).
        model: folder or hub id of the CLIP model that the head was trained on.
        processor: folder or hub id of the image processor and the tokenizer; null is the model's own.
        device: null is this process's GPU if there is one, else the CPU.
        dtype: precision of the CLIP weights; the head is fp32.
        batch_size: images per forward pass.
    """

    name = "aesthetic"

    def __init__(
        self,
        weights: str,
        model: str = "openai/clip-vit-large-patch14",
        processor: str | None = None,
        device: str | None = None,
        dtype: DType = "float32",
        batch_size: int = 32,
    ) -> None:
        self.weights = weights
        self.encoder = ClipEncoder(model, processor, device, dtype, batch_size)
        self._head: AestheticHead | None = None

    @property
    def version(self) -> str:
        """Version of the scores: the scorer, the name of its weights and its CLIP model."""
        return f"{self.name} {Path(self.weights).name} by {self.encoder.version}"

    def load(self) -> None:
        """Loads the head, then CLIP, so that a missing file is noticed before the long part."""
        if self._head is not None:
            return
        if not Path(self.weights).is_file():
            raise ValueError(
                f"there is no file {self.weights}: download {FILE} from the repository {REPOSITORY} and give its path."
            )
        tensors = read_tensors(self.weights, f"download {FILE} from {REPOSITORY} again")
        self.encoder.load()
        network = self.encoder.network
        head = AestheticHead(network.config.projection_dim)
        try:
            head.load_state_dict(tensors)
        except RuntimeError as error:
            raise ValueError(
                f"{self.weights} does not hold the aesthetic head for {self.encoder.model} "
                f"({head.layers[0].in_features} inputs): use {FILE} of {REPOSITORY} with CLIP ViT-L/14."
            ) from error
        self._head = head.to(network.device).eval().requires_grad_(False)

    def __call__(self, batch: RewardBatch) -> list[Score]:
        """Scores B images; their prompts play no part."""
        self.load()
        return score_decodable(batch, self._score)

    def _score(self, batch: RewardBatch) -> list[Score]:
        assert self._head is not None
        embeddings = self.encoder.images(batch.images)
        with torch.autocast(embeddings.device.type, enabled=False):
            ratings = self._head(embeddings).tolist()
        return [Score(r, r, r) if math.isfinite(r) else Score.invalid("the rating is not finite") for r in ratings]
