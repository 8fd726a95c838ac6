"""What the editing miniature's refiner is taught."""

from __future__ import annotations

import random
from collections import Counter

from lightning_modules.policies.templates import parse_answer
from miniature.edits.naming import named_correctly
from miniature.edits.rewrites import ShapesEditRewrites, caption_pair, edit_rewrite_pair
from miniature.edits.wording import UNSEEN_TEMPLATES, edit_vocabulary, named_objects
from miniature.scenes.detector import ShapesDetector
from miniature.scenes.world import Item, Scene


def test_shares_of_mistakes_and_of_wordings() -> None:
    """4,000 pairs: a tenth name another object, one in twenty breaks the format; all are of training scenes."""
    rng = random.Random(0)
    seen: Counter[str] = Counter()
    for _ in range(4000):
        drawn, instruction, completion = edit_rewrite_pair(rng)
        answer = parse_answer(completion, "")
        text = completion.removeprefix("<answer>").removesuffix("</answer>").strip()
        asked, named = (named_correctly(said, drawn.metadata) for said in (instruction, text))
        assert drawn.split == "train" and asked is not False and named is not None and len(named_objects(text)) == 1
        seen.update(wrong=not named, malformed=not answer.formatted, ambiguous=asked is None)
        seen.update(canonical=instruction == drawn.instruction)
    shares = {name: count / 4000 for name, count in seen.items()}
    # Standard errors are at most 0.008; an instruction that names the object is canonical in no case.
    assert abs(shares["wrong"] - 0.1) < 0.02 and abs(shares["malformed"] - 0.05) < 0.015
    assert abs(shares["ambiguous"] - 0.8) < 0.03 and 0.5 - 0.03 < shares["canonical"] < 0.5 + 0.06


def test_words_are_known_and_the_unseen_templates_are_not_taught() -> None:
    rng, words = random.Random(1), {*edit_vocabulary(), "<answer>", "</answer>"}
    for _ in range(2000):
        _, instruction, completion = edit_rewrite_pair(rng)
        assert words.issuperset(f"{instruction} {completion}".split())
        assert not any(instruction.startswith(f"{a} the ") and f" one {b} " in instruction for a, b in UNSEEN_TEMPLATES)


def test_captions_name_everything_from_one_side_on() -> None:
    """By hand; the square and the cross are as far to the right, the square is read first."""
    scene = Scene((Item("cross", "black", 15), Item("circle", "red", 0), Item("square", "blue", 7)))
    said = dict(caption_pair(scene, random.Random(seed)) for seed in range(200))
    circle = {
        "the red circle at the upper left",
        "the crimson disc at the top left",
        "the scarlet ball at the northwest",
    }
    square = {"the blue square at the upper right", "the azure box at the top right", "the navy block at the northeast"}
    cross = {
        "the black cross at the lower right",
        "the ebony plus at the bottom right",
        "the charcoal star at the southeast",
    }
    orders = {
        "left leftmost west": [circle, square, cross],
        "right rightmost east": [square, cross, circle],
        "upper topmost north": [circle, square, cross],
        "lower bottommost south": [cross, square, circle],
    }
    assert len(said) == 12
    for sides, order in orders.items():
        for side in sides.split():
            names = said[f"see {side}"].split(" , ")
            assert len(names) == 3 and all(name in group for name, group in zip(names, order, strict=True))


def test_the_stream() -> None:
    """Captions first; then images belong to what is said of them, and the given share is not shown."""
    stream = iter(ShapesEditRewrites(batch_size=50, captioned_batches=2, hidden=0.3).train_dataloader())
    detector, words = ShapesDetector(), {*edit_vocabulary()}
    for _ in range(2):
        batch = next(stream)
        assert words.issuperset(" ".join(batch["prompts"] + batch["completions"]).split())
        for image, text in zip(batch["images"], batch["completions"], strict=True):
            found = {(one.label, one.color) for one in detector.detect([image])[0]}
            assert found == {*named_objects(text)}
    batches = [next(stream) for _ in range(8)]
    images = [image for batch in batches for image in batch["images"]]
    assert abs(images.count(None) / 400 - 0.3) < 0.08
    for image, text in zip(images, (text for batch in batches for text in batch["completions"]), strict=True):
        if image is not None:
            found = {(one.label, one.color) for one in detector.detect([image])[0]}
            assert found >= {*named_objects(text)}
    first, again = (next(iter(ShapesEditRewrites(50, 2, seed=seed).train_dataloader())) for seed in (3, 3))
    assert first["completions"] == again["completions"] != batches[0]["completions"]
