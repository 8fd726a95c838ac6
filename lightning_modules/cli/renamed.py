"""Old names of modules, for the error that a saved configuration with one of them gets."""

from __future__ import annotations

import re

_MODULES = {
    "callbacks.naming": "miniature.edits.naming_benchmark",
    "callbacks.pictures": "callbacks.kept_images",
    "datamodules.edit": "datamodules.editing.prompts",
    "datamodules.edit_benchmarks": "datamodules.editing.benchmarks",
    "datamodules.paraphrases.written": "lightning_modules.paraphraser",
    "datamodules.shapes": "miniature.scenes.prompts",
    "datamodules.shapes_edit": "miniature.edits.prompts",
    "datamodules.shapes_edit_pretraining": "miniature.edits.pretraining",
    "datamodules.shapes_edit_rewrites": "miniature.edits.rewrites",
    "datamodules.shapes_paraphrases": "miniature.scenes.paraphrases",
    "datamodules.shapes_pretraining": "miniature.scenes.pretraining",
    "datamodules.words": "miniature.signs.prompts",
    "datamodules.words_pretraining": "miniature.signs.pretraining",
    "lightning_modules.pretrain": "miniature.pretrain",
    "pictures": "images",  # not a module, but a section of `lightning test`
    "rewards.imgedit": "rewards.judges.imgedit",
    "rewards.pixel_font": "miniature.signs.reader",
    "rewards.remote": "rewards.serving.client",
    "rewards.shapes": "miniature.scenes.detector",
    "rewards.shapes_edit": "miniature.edits.reward",
    "rewards.shapes_preference": "miniature.scenes.preference",
    "rewards.shapes_quality": "miniature.scenes.quality",
    "rewards.viescore": "rewards.judges.viescore",
    "rewards.vlm_judge": "rewards.judges.vlm_judge",
}
_CLASSES = {
    "callbacks.pictures.KeepPictures": "callbacks.kept_images.KeepImages",
    "callbacks.samples.SamplePictures": "callbacks.samples.SampleImages",
    "datamodules.text.TaggedPrompts": "datamodules.tagged.TaggedPrompts",
    "lightning_modules.policies.base.Sampling": "lightning_modules.policies.flow.Sampling",
    "miniature.pretrain.LanguagePretraining": "miniature.pretrain_language.LanguagePretraining",
    "miniature.pretrain.VisionLanguagePretraining": "miniature.pretrain_language.VisionLanguagePretraining",
    "rewards.encoders.ShapesEncoder": "miniature.scenes.encoder.ShapesEncoder",
}


def renamed(message: str) -> str | None:
    """Returns the sentence that tells a class's new name.

    Args:
        message: message of an error, in which a class path stands in quotes.

    Returns:
        None if the message names no old path.

    >>> renamed("Problem with given class_path 'rewards.shapes.ShapesDetector'")
    '`rewards.shapes.ShapesDetector` is now called `miniature.scenes.detector.ShapesDetector`; change it in the config.'
    >>> renamed("Problem with given class_path 'rewards.ocr.OCRReward'") is None
    True
    """
    for path in re.findall(r"'([\w.]+)'", message):
        module, _, name = path.rpartition(".")
        new = _CLASSES.get(path) or (f"{_MODULES[module]}.{name}" if module in _MODULES else None)
        if new is not None:
            return f"`{path}` is now called `{new}`; change it in the config."
    return None
