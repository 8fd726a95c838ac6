"""DeQA-Score: the technical quality of an image, by an mPLUG-Owl2 (arXiv 2501.11561). Prompts play no part."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image

from rewards.arguments import check_minimum
from rewards.pretrained import check_hub_id, one_line_errors, pick_device
from rewards.served import ServedReward

TRANSFORMERS = "4.36."
"""Prefix of the version that the model's code is written for; it fails on later ones, even without an error."""


class DeQAReward(ServedReward):
    """DeQA-Score: native = table = 1..5, the mean of five quality words weighted by their probability; rl = native / 5.

    The model's code answers in fp16: ratings from 2 to 4 come in steps of 1/512, others near them, so ties can occur.

    The network's code is not part of transformers: it is downloaded with the weights and executed. Nothing runs
    until `trust_remote_code` is true. Read that code, then pin its commit with `revision`.

    Args:
        model: folder or hub id of weights and code.
        trust_remote_code: true allows the Python code in `model` to run with all rights of the server's process.
        revision: branch, tag or, safest, the hash of the commit whose code you have read.
        batch_size: images per forward pass.
        device: null is this process's GPU if there is one, else the CPU; the weights are fp16 (the code wants it).
    """

    name = "deqa"
    native_range = (1.0, 5.0)
    requirements = "rewards/served/requirements/deqa.txt"
    rl_divisor = 5.0

    def __init__(
        self,
        model: str = "zhiyuanyou/DeQA-Score-Mix3",
        trust_remote_code: bool = False,
        revision: str = "main",
        batch_size: int = 8,
        device: str | None = None,
    ) -> None:
        check_minimum("DeQAReward", 1, batch_size=batch_size)
        self.model = model
        self.trust_remote_code = trust_remote_code
        self.revision = revision
        self.batch_size = batch_size
        self.device = device
        self._network: Any = None

    @property
    def version(self) -> str:
        """Version of the scores: the weights and their commit."""
        return f"deqa {self.model} revision={self.revision}"

    def load(self) -> None:
        """Loads the network, which runs the code of its repository."""
        if self._network is not None:
            return
        if not self.trust_remote_code:
            raise ValueError(
                f"DeQAReward runs Python code from the repository {self.model}, which is off by default: "
                "read that code, pin its commit with revision, then set trust_remote_code: true."
            )
        with self.environment():
            import transformers

            if not transformers.__version__.startswith(TRANSFORMERS):
                raise ImportError(f"it works with transformers {TRANSFORMERS}x, here is {transformers.__version__}")
        if not Path(self.model).is_dir():
            check_hub_id(self.model)
        with self.environment(), one_line_errors(self.model):
            network: Any = transformers.AutoModelForCausalLM.from_pretrained(
                self.model,
                revision=self.revision,
                trust_remote_code=True,
                attn_implementation="eager",  # the only one that its attention masks are made for
                torch_dtype=torch.float16,
                use_safetensors=True,
            )
        self._network = network.to(pick_device(self.device)).eval().requires_grad_(False)

    def native(self, prompts: Sequence[str], images: Sequence[Image]) -> list[float]:
        """Rates the quality of each image, 1 to 5."""
        with torch.inference_mode():
            return [float(score) for score in self._network.score(list(images))]
