"""GenEval's detector on plain transformers: Mask2Former with mmdet's pre- and post-processing."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor
from transformers import Mask2FormerForUniversalSegmentation

from datamodules.chunks import chunks
from datamodules.geneval_names import CLASSES, COLORS
from rewards.arguments import check_minimum
from rewards.geneval.clip_colors import ClipColors, Mask
from rewards.geneval.rules import MIN_SCORE, Box, Detection
from rewards.pretrained import load_pretrained

MAX_CANDIDATES = 100
STRIDE = 32  # the network wants multiples of this

_MEAN = torch.tensor([0.485, 0.456, 0.406])[:, None, None]  # ImageNet's
_STD = torch.tensor([0.229, 0.224, 0.225])[:, None, None]

Size = tuple[int, int]
"""Height and width in pixels."""


@dataclass(frozen=True)
class Instance:
    """One object that was found, with its mask.

    Args:
        label: one of `CLASSES`.
        score: class probability times the mean sigmoid inside the mask, in [0, 1].
        box: tight around the mask, the far edge exclusive.
        mask: `[height, width]` of the original image, True where the object is.
    """

    label: str
    score: float
    box: Box
    mask: Mask


class Mask2FormerDetector:
    """Finds GenEval's 80 classes and names the objects' colours: the benchmark without mmdet ("geneval-hf").

    The official benchmark runs OpenMMLab's Mask2Former Swin-S; the default checkpoint is Facebook's training of the
    same network, and images are resized by PIL (as for that training) where mmdet uses OpenCV. Others who made the
    same exchange report overall scores within about 0.01 of the official ones and single tags within about 0.03: close
    enough to train on and to compare runs with each other, not interchangeable with published numbers.

    Sizes, mean and deviation are set here, not read from the checkpoint: a sister checkpoint's preprocessor says
    384 x 384 without regard to the aspect ratio; that of the default one has not been verified. Images are batched
    only with images of the same padded size, since the network sees padding: a score never depends on the batch.
    The network runs in fp32, because objects are counted from scores on either side of a threshold; the official
    code's users report confidences that changed with the GPU all the same.

    Args:
        model: folder or hub id of a `Mask2FormerForUniversalSegmentation` with COCO's 80 instance classes.
        colors: names the colours; true is `ClipColors` with its defaults on the same device, false is none at all.
        shortest_edge: images are scaled, aspect ratio kept, until this edge in pixels is reached or the next is.
        longest_edge: as above.
        min_score: objects with scores up to this are left out, and masks that cannot score more are not computed. At
            most 0.3, below which GenEval's rules look at nothing; 0 shows all of up to 100.
        batch_size: images per forward pass.
        device: null is this process's GPU if there is one, else the CPU.
    """

    def __init__(
        self,
        model: str = "facebook/mask2former-swin-small-coco-instance",
        colors: ClipColors | bool = True,
        shortest_edge: int = 800,
        longest_edge: int = 1333,
        min_score: float = MIN_SCORE,
        batch_size: int = 4,
        device: str | None = None,
    ) -> None:
        if not 1 <= shortest_edge <= longest_edge:
            raise ValueError(
                f"Mask2FormerDetector has shortest_edge={shortest_edge} and longest_edge={longest_edge}, use at least "
                "1 and no shorter than the shortest (800 and 1333 are the benchmark's)."
            )
        if not 0 <= min_score <= MIN_SCORE:
            raise ValueError(
                f"Mask2FormerDetector has min_score={min_score}, use 0 to {MIN_SCORE}: GenEval's rules need every "
                f"object above {MIN_SCORE}."
            )
        check_minimum("Mask2FormerDetector", 1, batch_size=batch_size)
        self.model = model
        self.colors: ClipColors | None = ClipColors(device=device) if colors is True else colors or None
        self.shortest_edge = shortest_edge
        self.longest_edge = longest_edge
        self.min_score = min_score
        self.batch_size = batch_size
        self.device = device
        self._network: Any = None

    @property
    def version(self) -> str:
        """Version of the detections: the models and the scale (`min_score` and the batch change no verdict)."""
        colors = self.colors.version if self.colors is not None else "no colors"
        return f"geneval-hf {self.model} {self.shortest_edge}x{self.longest_edge} with {colors}"

    def load(self) -> None:
        """Loads Mask2Former and the colour classifier; later calls do nothing."""
        if self._network is None:
            network = load_pretrained(Mask2FormerForUniversalSegmentation, self.model, device=self.device)
            if network.config.num_labels != len(CLASSES):
                raise ValueError(
                    f"{self.model} has {network.config.num_labels} labels where GenEval needs COCO's {len(CLASSES)} "
                    "instance classes: use a checkpoint such as facebook/mask2former-swin-small-coco-instance."
                )
            self._network = network
        if self.colors is not None:
            self.colors.load()

    def detect(self, images: Sequence[Image.Image]) -> list[list[Detection]]:
        """Finds objects in B images and, unless switched off, names the colour of each that GenEval's rules look at."""
        return self._detect(images, [CLASSES] * len(images))

    def detect_asked(
        self, images: Sequence[Image.Image], metadata: Sequence[Mapping[str, Any]]
    ) -> list[list[Detection]]:
        """Finds objects in B images; names colours only for the classes whose colour is asked.

        Args:
            images: B images.
            metadata: B GenEval records.

        Raises:
            ValueError: if a record asks for what this detector can never find, which would count as the
                image's failure.
        """
        for record in metadata:
            self._check_can_find(record)
        asked = [{item["class"] for item in record["include"] if "color" in item} for record in metadata]
        return self._detect(images, asked)

    def _check_can_find(self, metadata: Mapping[str, Any]) -> None:
        for item in (*metadata["include"], *metadata.get("exclude", ())):
            if item["class"] not in CLASSES:
                raise ValueError(
                    f"the class {item['class']!r} is none of the 80 that Mask2FormerDetector finds: use GenEval's "
                    "names (COCO's, with computer mouse, tv remote and computer keyboard)."
                )
            if "color" in item and self.colors is None:
                raise ValueError(
                    f"the colour of {item['class']!r} is asked but Mask2FormerDetector has colors=false: leave it at "
                    "true or leave such prompts out."
                )
            if item.get("color", COLORS[0]) not in COLORS:
                raise ValueError(f"the colour {item['color']!r} is none of GenEval's: use {', '.join(COLORS)}.")

    def _detect(self, images: Sequence[Image.Image], colored: Sequence[Collection[str]]) -> list[list[Detection]]:
        self.load()
        images = [ImageOps.exif_transpose(image).convert("RGB") for image in images]
        sizes = [resized_size((image.height, image.width), self.shortest_edge, self.longest_edge) for image in images]
        groups: dict[Size, list[int]] = {}
        for index, (height, width) in enumerate(sizes):
            groups.setdefault((-height % STRIDE + height, -width % STRIDE + width), []).append(index)
        found: list[list[Detection]] = [[] for _ in images]
        for padded, group in groups.items():
            for rows in chunks(len(group), self.batch_size):
                batch = group[rows]
                pixels = torch.stack([to_pixels(images[index], sizes[index], padded) for index in batch])
                for index, instances in zip(batch, self._segment(pixels, batch, images, sizes), strict=True):
                    found[index] = self._name_colors(images[index], instances, colored[index])
        return found

    @torch.inference_mode()
    def _segment(
        self, pixels: Tensor, batch: Sequence[int], images: Sequence[Image.Image], sizes: Sequence[Size]
    ) -> list[list[Instance]]:
        """Finds the objects in the images with the indices `batch`, whose pixels are `pixels` `[B, 3, H, W]`."""
        output = self._network(pixel_values=pixels.to(self._network.device))
        return [
            find_instances(
                class_logits,
                mask_logits,
                padded=(pixels.shape[-2], pixels.shape[-1]),
                resized=sizes[index],
                original=(images[index].height, images[index].width),
                min_score=self.min_score,
            )
            for index, class_logits, mask_logits in zip(
                batch, output.class_queries_logits, output.masks_queries_logits, strict=True
            )
        ]

    def _name_colors(
        self, image: Image.Image, instances: Sequence[Instance], colored: Collection[str]
    ) -> list[Detection]:
        """Converts instances to detections, with colours for the classes in `colored` above the rules' threshold."""
        by_label: dict[str, list[int]] = {}
        for index, instance in enumerate(instances):
            if self.colors is not None and instance.label in colored and instance.score > MIN_SCORE:
                by_label.setdefault(instance.label, []).append(index)
        names: dict[int, str] = {}
        for label, indices in by_label.items():
            assert self.colors is not None
            masks, boxes = [instances[i].mask for i in indices], [instances[i].box for i in indices]
            names |= zip(indices, self.colors.classify(image, masks, boxes, label), strict=True)
        return [Detection(one.label, one.box, one.score, names.get(index)) for index, one in enumerate(instances)]


def resized_size(original: Size, shortest_edge: int, longest_edge: int) -> Size:
    """Computes the size that reaches one of the two edges without exceeding the other, rounded half up as mmdet does.

    Example:
        >>> resized_size((512, 512), 800, 1333), resized_size((500, 2000), 800, 1333)
        ((800, 800), (333, 1333))
    """
    scale = min(longest_edge / max(original), shortest_edge / min(original))
    height, width = (max(int(edge * scale + 0.5), 1) for edge in original)
    return height, width


def to_pixels(image: Image.Image, resized: Size, padded: Size) -> Tensor:
    """Returns `[3, *padded]`: the normalised image at the top left, zeros (the mean colour) around it."""
    height, width = resized
    array = np.array(image.resize((width, height), Image.Resampling.BILINEAR))
    pixels = (torch.from_numpy(array).permute(2, 0, 1) / 255 - _MEAN) / _STD
    return F.pad(pixels, (0, padded[1] - width, 0, padded[0] - height))


def find_instances(
    class_logits: Tensor,
    mask_logits: Tensor,
    *,
    padded: Size,
    resized: Size,
    original: Size,
    min_score: float = MIN_SCORE,
) -> list[Instance]:
    """Converts Mask2Former's outputs for one image to objects, by mmdet's rules.

    Softmax over the 80 classes and "no object", which is dropped; the 100 most probable pairs of query and class; mask
    where the logit, brought to the original size, is above 0; score = probability x mean sigmoid inside the mask. Pairs
    with an empty mask are no objects. The score cannot exceed the probability, so skipping pairs whose probability
    is not above `min_score` loses nothing.

    Args:
        class_logits: `[Q, 81]`, the last for "no object".
        mask_logits: `[Q, h, w]` over the padded image.
        padded: size of the network's input.
        resized: size of the image in its top left.
        original: size of the masks wanted.
        min_score: objects must score more.
    """
    probs = class_logits.softmax(-1)[:, :-1]
    top = probs.flatten().topk(min(MAX_CANDIDATES, probs.numel()))
    masks: dict[int, tuple[Mask, Box, float] | None] = {}
    instances: list[Instance] = []
    # Lists, since torch would round the threshold to the tensor's precision, and the rules do not.
    for prob, index in zip(top.values.tolist(), top.indices.tolist(), strict=True):
        query, label = divmod(index, probs.shape[1])
        if prob <= min_score:
            continue
        if query not in masks:
            masks[query] = _find_mask(mask_logits[query], padded, resized, original)
        if (found := masks[query]) is not None and prob * found[2] > min_score:
            instances.append(Instance(CLASSES[label], prob * found[2], found[1], found[0]))
    return instances


def _find_mask(logits: Tensor, padded: Size, resized: Size, original: Size) -> tuple[Mask, Box, float] | None:
    """Returns mask, box and mean sigmoid inside the mask of a query's logits `[h, w]`; None if the mask is empty."""
    # In two steps: only at the input's own size can the padding be cut off exactly.
    logits = F.interpolate(logits[None, None], padded, mode="bilinear", align_corners=False)
    logits = logits[..., : resized[0], : resized[1]]
    logits = F.interpolate(logits, original, mode="bilinear", align_corners=False)[0, 0]
    mask = logits > 0
    rows, columns = (mask.any(dim).nonzero().flatten().tolist() for dim in (1, 0))
    if not rows:
        return None
    box = (float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1))
    confidence = min(logits[mask].sigmoid().mean().item(), 1.0)  # a sum in fp32 might come out above its bound
    return mask.cpu().numpy(), box, confidence
