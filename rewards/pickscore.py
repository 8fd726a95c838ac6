"""PickScore: a CLIP ViT-H-14 tuned on people's choices between two images (arXiv 2305.01569)."""

from __future__ import annotations

from rewards.base import Score
from rewards.clip import ClipEncoder, ClipReward, DType


class PickScoreReward(ClipReward):
    """PickScore: native = table = exp(logit_scale) * cosine, about 17 to 25 on generated images; rl = native / 26.

    Args:
        model: folder or hub id of the weights.
        processor: folder or hub id of the image processor and the tokenizer; the weights were tuned with this one's.
        device: null is this process's GPU if there is one, else the CPU.
        dtype: precision of the weights.
        batch_size: images per forward pass.
    """

    name = "pickscore"
    native_range = (-100.0, 100.0)  # CLIP's training keeps exp(logit_scale) at or below 100

    def __init__(
        self,
        model: str = "yuvalkirstain/PickScore_v1",
        processor: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        device: str | None = None,
        dtype: DType = "float32",
        batch_size: int = 32,
    ) -> None:
        super().__init__(ClipEncoder(model, processor, device, dtype, batch_size))

    def score_of(self, cosine: float) -> Score:
        """Converts a cosine in [-1, 1] between an image and its prompt to a score."""
        native = self.encoder.logit_scale * cosine
        return Score(native=native, table=native, rl=native / 26.0, detail={"cosine": cosine})
