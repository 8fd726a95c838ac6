"""EditReward: a Qwen2.5-VL with two heads that score edited images (TIGER-Lab, arXiv 2509.26346)."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AddedToken, AutoTokenizer, Qwen2_5_VLConfig, Qwen2_5_VLModel, Qwen2VLImageProcessorPil

from datamodules.chunks import chunks
from datamodules.jsonl import read_json
from rewards.arguments import check_minimum
from rewards.base import Reward, RewardBatch, Score
from rewards.editreward_weights import build_heads, check_names, locate, read_weights, split_state_dict
from rewards.judges.templates import EDIT_RUBRICS, REWARD_TOKEN, read_wording
from rewards.pretrained import load_processor, pick_device

DType = Literal["bfloat16", "float16", "float32"]
Positions = Literal["sequential", "mrope"]

PIXELS = 256 * 28 * 28
"""Area that every image is resized to: 448 x 448, or the nearest multiples of 28 in its own aspect ratio."""
IMAGE_TOKEN = "<|image_pad|>"
DIMENSIONS = ("instruction_following", "visual_quality")


class EditReward(Reward):
    """Scores an edit by its source image, its result and its instruction. native = table = rl = mu, unbounded.

    Each of two questions (does it follow the instruction; how good does it look) is a pass of its own that ends in
    `<|Reward|>`. The hidden state there goes through that question's head to (mu, log sigma); the score is the mean of
    the two mu. `detail` holds mu and sigma of each.

    Not checked against the published weights:

    * The wording of the questions is our own. The heads were trained with the published wording, so paste that into two
      text files and give them as `rubrics` before you compare with published numbers.
    * `positions: sequential`, as the authors' code has it: it hands embeddings to the language model without the grid
      of the image patches, so every token counts as one step, and Qwen2.5-VL's positions in two dimensions (`mrope`)
      were never used, in training neither.
    * Names of weights: see `split_state_dict`. LoRA weights must be merged; the authors trained without LoRA.

    Args:
        checkpoint: folder or hub id with `*.safetensors` or `model.pth`.
        base_model: folder or hub id of the configuration, the tokenizer and the image processor; null is the checkpoint
            itself.
        rubrics: two text files that replace our own questions (instruction following, then visual quality), each with
            `{prompt}` where the instruction goes and one `<|Reward|>`, used to the letter.
        positions: position ids of the image tokens, `sequential` (EditReward's) or `mrope` (Qwen2.5-VL's own).
        device: null is this process's GPU if there is one, else the CPU.
        dtype: precision of the backbone; null is bfloat16 on a GPU and float32 on the CPU. The heads are float32.
        batch_size: edits per forward pass; one has some 1,000 tokens.
    """

    name = "editreward"
    needs = ("image",)

    def __init__(
        self,
        checkpoint: str = "TIGER-Lab/EditReward-MiMo-VL-7B-SFT-2508",
        base_model: str | None = None,
        rubrics: list[str] | None = None,
        positions: Positions = "sequential",
        device: str | None = None,
        dtype: DType | None = None,
        batch_size: int = 4,
    ) -> None:
        if positions not in get_args(Positions):
            raise ValueError(f"EditReward has positions={positions!r}, use sequential or mrope.")
        if dtype is not None and dtype not in get_args(DType):
            raise ValueError(f"EditReward has dtype={dtype!r}, use null or one of {', '.join(get_args(DType))}.")
        check_minimum("EditReward", 1, batch_size=batch_size)
        if rubrics is not None and len(rubrics) != len(DIMENSIONS):
            raise ValueError(f"EditReward has {len(rubrics)} rubrics, give 2 text files: {' and '.join(DIMENSIONS)}.")
        self.checkpoint = checkpoint
        self.base_model = base_model
        self.rubrics = (
            EDIT_RUBRICS
            if rubrics is None
            else tuple(read_wording(path, "EditReward's rubrics", REWARD_TOKEN) for path in rubrics)
        )
        self.positions: Positions = positions
        self.device = device
        self.dtype: DType | None = dtype
        self.batch_size = batch_size
        self._network: Any = None
        self._heads = nn.ModuleList()
        self._tokenizer: Any = None
        self._processor: Any = None
        self._chat_template: str | None = None

    @property
    def version(self) -> str:
        """Version of the scores: the checkpoint, the wording, the positions and the precision."""
        wording = hashlib.sha256("\0".join(self.rubrics).encode()).hexdigest()[:8]
        kind = "own" if self.rubrics == EDIT_RUBRICS else "given"
        return f"editreward {self.checkpoint} rubrics={kind}:{wording} positions={self.positions} dtype={self._dtype}"

    @property
    def _dtype(self) -> DType:
        return self.dtype or ("bfloat16" if pick_device(self.device).type == "cuda" else "float32")

    def load(self) -> None:
        """Loads the backbone, the heads, the tokenizer and the image processor."""
        if self._network is not None:
            return
        weights = locate(self.checkpoint, weights=True)
        base = weights if self.base_model is None else locate(self.base_model, weights=False)
        for part in ("config.json", "tokenizer_config.json", "preprocessor_config.json"):
            if not (base / part).is_file():
                raise ValueError(
                    f"EditReward finds no {part} in {self.base_model or self.checkpoint}: set base_model to the model "
                    "that the checkpoint was trained from."
                )
        config = load_processor(Qwen2_5_VLConfig, str(base))
        self._tokenizer = load_processor(AutoTokenizer, str(base))
        self._tokenizer.add_tokens([AddedToken(REWARD_TOKEN, special=True, normalized=False)], special_tokens=True)
        size = {"shortest_edge": PIXELS, "longest_edge": PIXELS}
        self._processor = load_processor(Qwen2VLImageProcessorPil, str(base), size=size)
        self._chat_template = _chat_template(base)
        self._check_text()
        backbone, heads = split_state_dict(read_weights(weights))
        self._heads = build_heads(config.text_config.hidden_size)
        check_names(self.checkpoint, {name: head.shape for name, head in self._heads.state_dict().items()}, heads)
        self._heads.load_state_dict({name: tensor.float() for name, tensor in heads.items()})
        self._heads.to(pick_device(self.device)).eval().requires_grad_(False)
        self._network = self._build_backbone(config, backbone)

    def _build_backbone(self, config: Any, state: dict[str, Tensor]) -> Any:
        # The embedding has one row per token of the tokenizer it was trained with, `<|Reward|>` among them: fewer than
        # the base model's, which is padded. The checkpoint knows how many.
        rows = len(state.get("language_model.embed_tokens.weight", ()))
        token = self._tokenizer.convert_tokens_to_ids(REWARD_TOKEN)
        if rows and token >= rows:
            raise ValueError(
                f"{self.checkpoint} has embeddings of {rows} tokens, but the tokenizer gives {REWARD_TOKEN} the id "
                f"{token}: set base_model to the model that the checkpoint was trained from."
            )
        config.text_config.vocab_size = rows or config.text_config.vocab_size
        with torch.device("meta"):
            expected = {name: tensor.shape for name, tensor in Qwen2_5_VLModel(config).state_dict().items()}
        check_names(self.checkpoint, expected, state)
        dtype = getattr(torch, self._dtype)
        network: Any = Qwen2_5_VLModel.from_pretrained(None, config=config, state_dict=state, dtype=dtype)
        return network.to(pick_device(self.device)).eval().requires_grad_(False)

    def _check_text(self) -> None:
        """Raises ValueError if the chat template drops the images, as text-only ones do without an error."""
        for rubric in self.rubrics:
            text = self._text(rubric, "")
            if (text.count(IMAGE_TOKEN), text.count(REWARD_TOKEN)) != (2, 1):
                raise ValueError(
                    f"the chat template of {self.base_model or self.checkpoint} puts {text.count(IMAGE_TOKEN)} images "
                    f"and {text.count(REWARD_TOKEN)} {REWARD_TOKEN} into a message with 2 and 1: set base_model to a "
                    "Qwen2.5-VL whose folder holds its chat_template file."
                )

    def _text(self, rubric: str, instruction: str) -> str:
        content = [
            {"type": "image"},
            {"type": "image"},
            {"type": "text", "text": rubric.replace("{prompt}", instruction)},
        ]
        text = self._tokenizer.apply_chat_template(
            [{"role": "user", "content": content}],
            chat_template=self._chat_template,
            tokenize=False,
            add_generation_prompt=True,
        )
        return str(text)

    def __call__(self, batch: RewardBatch) -> list[Score]:
        """Scores B edits; a sample without its source image is invalid."""
        self.load()
        scores: list[Score | None] = []
        edits: list[tuple[Image.Image, Image.Image, str]] = []
        for sample, image in zip(batch.samples, batch.images, strict=True):
            reason = _invalid_reason(sample.image, image, sample.prompt)
            scores.append(Score.invalid(reason) if reason else None)
            if sample.image is not None and not reason:
                edits.append((sample.image.convert("RGB"), image.convert("RGB"), sample.prompt))
        scored = iter([score for rows in chunks(len(edits), self.batch_size) for score in self._score(edits[rows])])
        return [next(scored) if score is None else score for score in scores]

    def _score(self, edits: Sequence[tuple[Image.Image, Image.Image, str]]) -> list[Score]:
        outputs = self.evaluate(edits).tolist()
        return [_to_score(output) for output in outputs]

    @torch.no_grad()
    def evaluate(self, edits: Sequence[tuple[Image.Image, Image.Image, str]]) -> Tensor:
        """Returns [B, 2, 2] float32, (mu, log sigma) of both questions, for B edits (source, edited, instruction)."""
        self.load()
        device, network = self._network.device, self._network
        pixels = self._processor([image for edit in edits for image in edit[:2]], return_tensors="pt").to(device)
        grid = pixels["image_grid_thw"]
        # one pass of the vision tower serves both questions
        features = torch.cat(network.get_image_features(pixels["pixel_values"].to(network.dtype), grid).pooler_output)
        counts = (grid.prod(-1) // self._processor.merge_size**2).tolist()
        outputs = []
        for rubric, head in zip(self.rubrics, self._heads, strict=True):
            texts = []
            for index, (_, _, instruction) in enumerate(edits):
                parts = self._text(rubric, instruction).split(IMAGE_TOKEN)
                images = [IMAGE_TOKEN * count for count in counts[2 * index : 2 * index + 2]]
                texts.append("".join([parts[0], images[0], parts[1], images[1], parts[2]]))
            inputs = self._tokenizer(texts, padding=True, padding_side="right", return_tensors="pt").to(device)
            hidden = self._hidden(inputs["input_ids"], inputs["attention_mask"], features, grid)
            token = self._tokenizer.convert_tokens_to_ids(REWARD_TOKEN)
            outputs.append(head(hidden[inputs["input_ids"] == token].float()))
        return torch.stack(outputs, dim=1)

    def _hidden(self, ids: Tensor, mask: Tensor, features: Tensor, grid: Tensor) -> Tensor:
        """Returns the last layer's hidden states [B, S, H], after the final norm."""
        network = self._network
        images = ids == network.config.image_token_id
        embeds = network.get_input_embeddings()(ids)
        embeds = embeds.masked_scatter(images[..., None], features.to(embeds.dtype))
        if self.positions == "mrope":
            positions, _ = network.get_rope_index(
                ids, mm_token_type_ids=images.int(), image_grid_thw=grid, attention_mask=mask
            )
        else:
            positions = (mask.cumsum(-1) - 1).expand(3, -1, -1)
        output = network.language_model(
            inputs_embeds=embeds, attention_mask=mask, position_ids=positions, use_cache=False
        )
        hidden: Tensor = output.last_hidden_state
        return hidden


def _chat_template(folder: Path) -> str | None:
    """Reads the processor's chat template, which knows images; None if the folder has only the tokenizer's."""
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    if (folder / "chat_template.json").is_file():
        return str(read_json(folder / "chat_template.json")["chat_template"])
    return None


def _invalid_reason(source: Image.Image | None, edited: Image.Image, instruction: str) -> str:
    """Returns the reason why an edit cannot be scored; empty if it can."""
    if source is None:
        return "EditReward compares with a source image, and the sample has none"
    if any(max(image.size) > 200 * min(image.size) for image in (source, edited)):
        return "an image is more than 200 times as long as it is wide"
    if re.search(r"<\|\w+\|>", instruction):
        return "the instruction holds a special token such as <|Reward|>"
    return ""


def _to_score(output: list[list[float]]) -> Score:
    """Converts the heads' output [[mu, log sigma], [mu, log sigma]] to a score."""
    detail: dict[str, float] = {}
    for dimension, (mu, log_sigma) in zip(DIMENSIONS, output, strict=True):
        detail[f"{dimension}_mu"] = mu
        detail[f"{dimension}_sigma"] = math.exp(min(log_sigma, 700.0))  # larger overflows
    if not all(map(math.isfinite, detail.values())):
        return Score.invalid("EditReward's heads put out a number that is not finite")
    mean = sum(detail[f"{dimension}_mu"] for dimension in DIMENSIONS) / len(DIMENSIONS)
    return Score(native=mean, table=mean, rl=mean, detail=detail)
