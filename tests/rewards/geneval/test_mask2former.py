"""The detector on a tiny random Mask2Former, loaded through the real path; post-processing against slow numpy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jsonargparse
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessorPil,
    SwinConfig,
)

from callbacks.geneval import GenEvalBenchmark
from datamodules.geneval_names import CLASSES, COLORS
from datamodules.sample import PromptSample
from rewards.base import RewardBatch
from rewards.geneval.clip_colors import ClipColors, Mask
from rewards.geneval.mask2former import Mask2FormerDetector, find_instances, resized_size, to_pixels
from rewards.geneval.reward import AskedDetector, Detector, GenEvalReward, detect_for
from rewards.geneval.rules import Box, Detection, judge

DOG, CAT = 16, 15
EDGES: dict[str, Any] = {"shortest_edge": 64, "longest_edge": 107, "device": "cpu"}


def tiny_mask2former(folder: Path, num_labels: int = 80) -> Path:
    """Random weights, but sure of itself: every query is a dog or a cat (0.49 each) with a mask of clear edges."""
    torch.manual_seed(5)
    config = Mask2FormerConfig(
        backbone_config=SwinConfig(
            embed_dim=8,
            depths=[1, 1, 1, 1],
            num_heads=[1, 1, 2, 2],
            window_size=4,
            out_features=["stage1", "stage2", "stage3", "stage4"],
        ),
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=32,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        dim_feedforward=32,
        num_queries=12,
        num_labels=num_labels,
    )
    model = Mask2FormerForUniversalSegmentation(config).eval()
    if num_labels == len(CLASSES):
        model.class_predictor.weight.data.mul_(0.01)  # pulls the queries apart by a little
        model.class_predictor.bias.data.fill_(-9.0)
        model.class_predictor.bias.data[[DOG, CAT]] = 4.0
        model.class_predictor.bias.data[80] = 1.0
        model.model.pixel_level_module.decoder.mask_projection.weight.data.mul_(30.0)
    model.save_pretrained(folder)
    # A preprocessor as wrong as can be: the detector must not listen to it.
    Mask2FormerImageProcessorPil(
        size={"height": 32, "width": 96}, image_mean=[0, 0, 0], image_std=[9, 9, 9]
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def mask2former(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_mask2former(tmp_path_factory.mktemp("tiny_mask2former"))


def make_image(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth random blobs, so that different images give different masks."""
    small = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


# --- post-processing ----------------------------------------------------------------------------------------------


def reference_bilinear(array: np.ndarray, height: int, width: int) -> np.ndarray:
    """[h, w] to [height, width]: the value at every target pixel's centre, between the four nearest centres."""
    out = np.empty((height, width))
    for row in range(height):
        y = max((row + 0.5) * array.shape[0] / height - 0.5, 0.0)
        top = int(y)
        bottom = min(top + 1, array.shape[0] - 1)
        line = array[top] * (1 - (y - top)) + array[bottom] * (y - top)
        for column in range(width):
            x = max((column + 0.5) * array.shape[1] / width - 0.5, 0.0)
            left = int(x)
            right = min(left + 1, array.shape[1] - 1)
            out[row, column] = line[left] * (1 - (x - left)) + line[right] * (x - left)
    return out


def reference_instances(
    class_logits: np.ndarray,
    mask_logits: np.ndarray,
    padded: tuple[int, int],
    resized: tuple[int, int],
    original: tuple[int, int],
) -> list[tuple[str, float, Box, np.ndarray]]:
    """The rules in float64 and loops: label, score, box, mask of up to 100 pairs of query and class."""
    pairs = []
    for query, row in enumerate(class_logits):
        exps = np.exp(row - row.max())
        pairs += [(exp / exps.sum(), query, label) for label, exp in enumerate(exps[:80])]
    pairs.sort(key=lambda pair: -pair[0])
    found = []
    for prob, query, label in pairs[:100]:
        on_canvas = reference_bilinear(mask_logits[query], *padded)
        logits = reference_bilinear(on_canvas[: resized[0], : resized[1]], *original)
        inside = [1 / (1 + math.exp(-value)) for value in logits.flatten() if value > 0]
        if inside:
            rows, columns = np.nonzero(logits > 0)
            box = (float(columns.min()), float(rows.min()), float(columns.max() + 1), float(rows.max() + 1))
            found.append((CLASSES[label], prob * sum(inside) / len(inside), box, logits > 0))
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("width", "height"), [(97, 41), (40, 61)])
def test_post_processing_against_numpy(mask2former: Path, width: int, height: int) -> None:
    """Real outputs of the network for odd aspect ratios, all 100 pairs: scores within 1e-4, boxes and masks exactly."""
    image = make_image(width, height)
    resized = resized_size((height, width), 64, 107)
    padded = (-(-resized[0] // 32) * 32, -(-resized[1] // 32) * 32)
    assert resized != padded  # there is padding to cut off
    network = Mask2FormerForUniversalSegmentation.from_pretrained(mask2former).eval()
    torch.nn.init.normal_(network.class_predictor.weight, std=1.0)  # spreads the classes: 100 pairs of many labels
    with torch.no_grad():
        output = network(pixel_values=to_pixels(image, resized, padded)[None])
    classes, masks = output.class_queries_logits[0], output.masks_queries_logits[0]
    shapes = {"padded": padded, "resized": resized, "original": (height, width)}
    expected = reference_instances(classes.double().numpy(), masks.double().numpy(), **shapes)
    ours = find_instances(classes, masks, min_score=0.0, **shapes)
    assert len(ours) == len(expected) > 50 and len({one.label for one in ours}) > 2
    for one, (label, score, box, mask) in zip(ours, expected, strict=True):
        assert (one.label, one.box) == (label, box)
        assert one.score == pytest.approx(score, abs=1e-4)
        assert (one.mask == mask).all() and one.mask.shape == (height, width)
    # Leaving out what cannot exceed the threshold is exact.
    sure = find_instances(classes, masks, min_score=0.3, **shapes)
    assert [(one.label, one.score) for one in sure] == [(one.label, one.score) for one in ours if one.score > 0.3]
    assert 0 < len(sure) < len(ours)


def logits_of(*probs: dict[int, float]) -> torch.Tensor:
    """[Q, 81] logits whose softmax is the given probability at the given indices, the rest being "no object"."""
    rows = torch.full((len(probs), 81), -math.inf)
    for row, known in zip(rows, probs, strict=True):
        row[80] = math.log(1 - sum(known.values()))
        for index, prob in known.items():
            row[index] = math.log(prob)
    return rows


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_known_logits_score_and_box() -> None:
    """A right half at +4, a left half at -4, on a grid of 16 x 16 for an image of 64 x 64 that is shown as it is.

    The edge between columns 7 and 8 (centres at 30 and 34 pixels) crosses 0 at 32: pixel 32 (centre 32.5) holds an
    eighth of the way from -4 to +4 past the middle: 4 * 0.25 = 1, pixel 33 holds 3, all others 4. Rows are equal.
    """
    masks = torch.full((1, 16, 16), -4.0)
    masks[:, :, 8:] = 4.0
    (one,) = find_instances(
        logits_of({DOG: 0.75}), masks, padded=(64, 64), resized=(64, 64), original=(64, 64), min_score=0.3
    )
    assert one.label == "dog"
    assert one.box == (32.0, 0.0, 64.0, 64.0)
    assert one.score == pytest.approx(0.75 * (sigmoid(1) + sigmoid(3) + 30 * sigmoid(4)) / 32, abs=1e-6)


def test_padding_is_cut_off() -> None:
    """The image fills the left half of its canvas and is twice that size in truth; the mask begins at its middle.

    On the canvas the sign changes at 16 pixels of 32, so at 32 of the original's 64; without the cut it would change at
    16 of 64. Canvas pixels 15..18 hold -1, 1, 3, 4, so the original's from 32 hold 0.5, 1.5, 2.5, 3.25, 3.75, 4, ...
    """
    masks = torch.full((2, 16, 16), -4.0)
    masks[0, :, 4:] = 4.0
    masks[1, :, 9:] = 4.0  # only over the padding: no object at all
    (one,) = find_instances(
        logits_of({DOG: 0.75}, {CAT: 0.75}), masks, padded=(64, 64), resized=(64, 32), original=(128, 64)
    )
    assert one.label == "dog"
    assert one.box == (32.0, 0.0, 64.0, 128.0)
    inside = [0.5, 1.5, 2.5, 3.25, 3.75] + [4.0] * 27
    assert one.score == pytest.approx(0.75 * sum(map(sigmoid, inside)) / 32, abs=1e-6)


def test_single_pixel_box_has_the_far_edge_added() -> None:
    masks = torch.full((1, 8, 8), -1.0)
    masks[0, 2, 5] = 1.0
    (one,) = find_instances(logits_of({0: 0.9}), masks, padded=(8, 8), resized=(8, 8), original=(8, 8))
    assert (one.label, one.box) == ("person", (5.0, 2.0, 6.0, 3.0))
    assert one.score == pytest.approx(0.9 * sigmoid(1), abs=1e-6)


def test_labels_go_by_index_and_a_query_may_have_two() -> None:
    queries = [{64: 0.6, 65: 0.35}, {66: 0.9}, {79: 0.8}]
    masks = torch.full((3, 4, 4), 9.0)
    shapes = {"padded": (16, 16), "resized": (16, 16), "original": (16, 16)}
    found = find_instances(logits_of(*queries), masks, **shapes)
    assert [one.label for one in found] == ["computer keyboard", "toothbrush", "computer mouse", "tv remote"]
    assert [one.score for one in found] == pytest.approx([p * sigmoid(9) for p in (0.9, 0.8, 0.6, 0.35)], abs=1e-6)
    assert [CLASSES[i] for i in (0, 7, 12, 39, 45, 47, 56, 60, 67, 79)] == (
        "person/truck/parking meter/bottle/bowl/apple/chair/dining table/cell phone/toothbrush".split("/")
    )
    assert len(set(CLASSES)) == 80


def test_threshold_is_not_rounded_to_fp32() -> None:
    """GenEval's rules compare in double: the fp32 next to 0.3 is 0.3000000119, which is above, and torch denies it."""
    lowest_above = torch.tensor(0.3)
    assert lowest_above.item() > 0.3 and not lowest_above > 0.3
    shapes = {"padded": (4, 4), "resized": (4, 4), "original": (4, 4)}
    num = {True: 0, False: 0}
    for step in range(-20, 21):  # logits around the one that gives it
        classes = logits_of({DOG: 0.3 + step * 1e-8})
        above = classes.softmax(-1)[0, DOG] == lowest_above
        below = classes.softmax(-1)[0, DOG] < lowest_above
        if above or below:
            num[bool(above)] += 1
            found = find_instances(classes, torch.full((1, 4, 4), 50.0), **shapes)
            assert len(found) == int(above)
    assert num[True] and num[False]


# --- pre-processing -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("original", "expected"),
    [
        ((512, 512), (800, 800)),
        ((768, 1024), (800, 1067)),  # 1066.67
        ((500, 2000), (333, 1333)),  # 333.25: the longest edge binds
        ((1024, 1024), (800, 800)),
        ((427, 640), (800, 1199)),  # 1199.06
        ((1, 5000), (1, 1333)),  # 0.27, but an image has pixels
    ],
)
def test_resized_size(original: tuple[int, int], expected: tuple[int, int]) -> None:
    """Hand-computed: scale = min(1333 / longest, 800 / shortest), edges rounded half up."""
    assert resized_size(original, 800, 1333) == expected


def test_pixels_against_transformers() -> None:
    """The library's own processor without its stretching to multiples of 32; ours then adds zeros."""
    image = make_image(600, 400)
    processor = Mask2FormerImageProcessorPil(size={"shortest_edge": 80, "longest_edge": 133}, size_divisor=0)
    expected = processor(image, return_tensors="pt").pixel_values[0]
    height, width = resized_size((400, 600), 80, 133)
    assert expected.shape == (3, height, width) == (3, 80, 120)
    pixels = to_pixels(image, (height, width), (96, 128))
    torch.testing.assert_close(pixels[:, :80, :120], expected, atol=1e-5, rtol=0)
    assert pixels.shape == (3, 96, 128) and not pixels[:, 80:].any() and not pixels[:, :, 120:].any()


def test_network_sees_own_sizes_whatever_the_folder_says(mask2former: Path) -> None:
    detector = Mask2FormerDetector(str(mask2former), colors=False, **EDGES)
    detector.load()
    seen: list[torch.Tensor] = []
    hook = detector._network.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["pixel_values"]), with_kwargs=True
    )
    image = make_image(50, 40)
    detector.detect([image])
    hook.remove()
    (pixels,) = seen
    torch.testing.assert_close(pixels[0], to_pixels(image, (64, 80), (64, 96)))


# --- the detector -------------------------------------------------------------------------------------------------


def same(ours: Sequence[Detection], theirs: Sequence[Detection]) -> None:
    assert [(one.label, one.box, one.color) for one in ours] == [(one.label, one.box, one.color) for one in theirs]
    assert [one.score for one in ours] == pytest.approx([one.score for one in theirs], abs=1e-5)


def test_batch_equals_single_images(mask2former: Path) -> None:
    """Sizes of which two share a padded size and one does not, so that order must be restored."""
    detector = Mask2FormerDetector(str(mask2former), colors=False, batch_size=3, **EDGES)
    images = [make_image(50, 40, 1), make_image(40, 60, 2), make_image(52, 40, 3)]
    together = detector.detect(images)
    for found, image in zip(together, images, strict=True):
        same(found, detector.detect([image])[0])
        assert found and all(0.3 < one.score <= 1 for one in found)
        assert all(0 <= one.box[0] < one.box[2] <= image.width for one in found)
        assert all(0 <= one.box[1] < one.box[3] <= image.height for one in found)
    assert len({tuple(one.box for one in found) for found in together}) == 3
    assert detector.detect([]) == []


def test_exif_orientation_and_modes(mask2former: Path, tmp_path: Path) -> None:
    """A file that says "turn me" is seen as a viewer shows it; RGBA and grey images are seen as RGB."""
    image = make_image(50, 40)
    turned = image.transpose(Image.Transpose.ROTATE_90)  # stored so; orientation 6 turns it back
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.png", exif=exif)
    detector = Mask2FormerDetector(str(mask2former), colors=False, **EDGES)
    upright, stored, from_file = detector.detect([image, turned, Image.open(tmp_path / "turned.png")])
    same(from_file, upright)
    assert [one.box for one in stored] != [one.box for one in upright]
    rgba = image.convert("RGBA")
    rgba.putalpha(7)
    grey = image.convert("L")
    found = detector.detect([rgba, grey])
    same(found[0], upright)
    same(found[1], detector.detect([grey.convert("RGB")])[0])


def test_wrong_number_of_labels(tmp_path: Path) -> None:
    tiny_mask2former(tmp_path, num_labels=3)
    with pytest.raises(ValueError, match=r"has 3 labels where GenEval needs COCO's 80 instance classes: use a"):
        Mask2FormerDetector(str(tmp_path), colors=False, device="cpu").load()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"shortest_edge": 0}, "shortest_edge=0 and longest_edge=1333, use at least 1"),
        ({"longest_edge": 799}, "longest_edge=799, use at least 1 and no shorter than the shortest"),
        ({"min_score": 0.5}, r"min_score=0.5, use 0 to 0.3"),
        ({"batch_size": 0}, "batch_size=0, use at least 1"),
    ],
)
def test_configuration_is_checked_at_construction(kwargs: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Mask2FormerDetector(**kwargs)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("colors", "background"),
    [
        ("true", "#999999"),
        ("false", None),
        ('{"class_path": "rewards.geneval.clip_colors.ClipColors", "init_args": {"background": "#000000"}}', "#000000"),
    ],
)
def test_from_yaml(colors: str, background: str | None) -> None:
    parser = jsonargparse.ArgumentParser()
    parser.add_argument("--detector", type=Detector)
    value = f'{{"class_path": "rewards.geneval.mask2former.Mask2FormerDetector", "init_args": {{"colors": {colors}}}}}'
    detector = parser.instantiate(parser.parse_args([f"--detector={value}"])).detector
    assert isinstance(detector, Mask2FormerDetector) and isinstance(detector, AskedDetector)
    assert (detector.colors and detector.colors.background) == background


# --- colours, reward, benchmark -----------------------------------------------------------------------------------


class CountingColors(ClipColors):
    """The real classifier, which also notes what it was asked."""

    def classify(self, image: Image.Image, masks: Sequence[Mask], boxes: Sequence[Box], label: str) -> list[str]:
        self.asked = [*getattr(self, "asked", []), (image.size, len(masks), label)]
        names = super().classify(image, masks, boxes, label)
        self.last = names
        return names


def record(tag: str, *include: dict[str, Any], **rest: Any) -> dict[str, Any]:
    return {"tag": tag, "include": list(include), **rest}


RED_DOG = record("colors", {"class": "dog", "count": 1, "color": "red"})
DOG_CAT = record("two_object", {"class": "dog", "count": 1}, {"class": "cat", "count": 1})
RED_DOG_CAT = record("color_attr", {"class": "dog", "count": 1, "color": "red"}, {"class": "cat", "count": 1})


def test_only_asked_classes_are_classified(mask2former: Path, tiny_clip: Path) -> None:
    colors = CountingColors(str(tiny_clip), device="cpu")
    detector = Mask2FormerDetector(str(mask2former), colors, min_score=0.0, **EDGES)
    images = [make_image(50, 40, 1), make_image(40, 50, 2), make_image(60, 40, 3)]
    found = detect_for(detector, images, [RED_DOG, DOG_CAT, RED_DOG_CAT])
    num_dogs = [sum(one.label == "dog" and one.score > 0.3 for one in image) for image in found]
    assert all(num_dogs) and all(any(one.label == "cat" and one.score > 0.3 for one in image) for image in found)
    assert sorted(colors.asked) == sorted([((50, 40), num_dogs[0], "dog"), ((60, 40), num_dogs[2], "dog")])
    for image, asked in zip(found, (True, False, True), strict=True):
        for one in image:
            assert (one.color in COLORS) == (asked and one.label == "dog" and one.score > 0.3)
    # Nobody to say what is asked: all that rules may look at.
    plain = detector.detect(images[:1])[0]
    assert [one.color is not None for one in plain] == [one.score > 0.3 for one in plain]
    assert {one.label for one in plain if one.color} == {"dog", "cat"} and any(one.color is None for one in plain)


def test_verdict_depends_on_the_named_color(mask2former: Path, tiny_clip: Path) -> None:
    """The colour that the classifier names is the one that the rules then find, and no other."""
    colors = CountingColors(str(tiny_clip), device="cpu")
    reward = GenEvalReward(Mask2FormerDetector(str(mask2former), colors, **EDGES), reward="correct")
    image = make_image(50, 40, 1)
    dogs = [one for one in reward.detector.detect([image])[0] if one.label == "dog"]
    best = max(dogs, key=lambda one: one.score)
    records = [record("colors", {"class": "dog", "count": 1, "color": color}) for color in COLORS]
    samples = [PromptSample(str(i), "a photo of a dog", "colors", data) for i, data in enumerate(records)]
    scores = reward(RewardBatch(samples, [image] * len(samples)))
    assert [score.rl for score in scores] == [float(color == best.color) for color in COLORS]


def test_reward_end_to_end(mask2former: Path, tiny_clip: Path) -> None:
    """Finite scores that equal the rules' on the detections; the version tells both models and the scale."""
    detector = Mask2FormerDetector(str(mask2former), ClipColors(str(tiny_clip), device="cpu"), **EDGES)
    reward = GenEvalReward(detector)
    reward.load()
    images = [make_image(50, 40, 1), make_image(40, 50, 2), make_image(60, 40, 3)]
    records = [
        RED_DOG,
        DOG_CAT,
        record("counting", {"class": "bus", "count": 2}, exclude=[{"class": "bus", "count": 3}]),
    ]
    samples = [PromptSample(str(i), "a photo", "geneval", data) for i, data in enumerate(records)]
    scores = reward(RewardBatch(samples, images))
    found = detector.detect(images)
    assert [score.rl for score in scores] == [judge(*pair).soft for pair in zip(found, records, strict=True)]
    assert all(score.valid and math.isfinite(score.rl) for score in scores)
    assert [score.native for score in scores][1:] == [1.0, 0.0]  # a dog and a cat are there, buses are not
    assert str(mask2former) in reward.version and str(tiny_clip) in reward.version and "64x107" in reward.version


def test_benchmark_uses_the_records_tag(mask2former: Path, tiny_clip: Path) -> None:
    """In tagged data a sample's tag names the reward; the benchmark's tag is in the metadata."""
    colors = CountingColors(str(tiny_clip), device="cpu")
    benchmark = GenEvalBenchmark(Mask2FormerDetector(str(mask2former), colors, **EDGES))
    samples = [PromptSample("0", "a dog and a cat", "geneval", DOG_CAT)]
    assert benchmark.tag(samples[0]) == "two_object"
    assert benchmark.score(samples, [make_image(50, 40, 1)]) == [{"correct": 1.0}]
    assert not hasattr(colors, "asked")


@pytest.mark.parametrize(
    ("colors", "data", "message"),
    [
        (True, record("single_object", {"class": "mouse", "count": 1}), "the class 'mouse' is none of the 80"),
        (
            True,
            record("counting", {"class": "dog", "count": 1}, exclude=[{"class": "sofa", "count": 2}]),
            "the class 'sofa' is none of the 80",
        ),
        (
            True,
            record("colors", {"class": "dog", "count": 1, "color": "gray"}),
            "the colour 'gray' is none of GenEval's",
        ),
        (False, RED_DOG, "the colour of 'dog' is asked but Mask2FormerDetector has colors=false"),
    ],
)
def test_what_can_never_be_found_is_an_error(colors: bool, data: dict[str, Any], message: str) -> None:
    """Checked before anything loads: a class that no image can show would be every image's failure."""
    with pytest.raises(ValueError, match=message):
        detect_for(Mask2FormerDetector(colors=colors), [make_image(8, 8)], [data])
