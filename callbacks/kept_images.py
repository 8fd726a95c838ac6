"""`KeepImages`: files of a test's images, so that a killed test resumes and scoring is redone without drawing."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from callbacks.run_config import checkpoint_note, folder_stamps, require_settings, resolved_config, write_settings
from datamodules.atomic_write import remove_strays
from datamodules.base import PromptDataModule, PromptSample, bare
from datamodules.local_path import local_path
from lightning_modules.evaluation import EvaluatedAgents
from lightning_modules.image_store import ImageStore, safe_name


class KeepImages(L.Callback):
    """Writes the images of a test as `<directory>/<set>/<mode>/00000/samples/0000.png` with a `metadata.jsonl` each.

    That is GenEval's own layout, which its published scripts read: prompts are numbered in the order of their set.
    `lightning test` adds it by itself. The same command goes on where it was killed, and another scorer, or further
    images of a prompt, need no second drawing of what is there. `images.jsonl` lists what each was drawn from.

    Args:
        directory: folder of the images; null is `<root>/<experiment>/images/<digest>`, the digest being that of what
            images depend on: flow model, refiner, data, checkpoint, local model folders (by time and size), precision.
        images_per_prompt: K images of each prompt in each mode; null is the data's (GenEval 4, others 1), or as many as
            the file lists the prompt if that is more. The first have the noise of validation's.
        keep: false draws all images anew and writes nothing.
    """

    def __init__(self, directory: str | None = None, images_per_prompt: int | None = None, keep: bool = True) -> None:
        if images_per_prompt is not None and images_per_prompt < 1:
            raise ValueError(f"`images.images_per_prompt` is {images_per_prompt}, use at least 1, or null.")
        self.directory = None if directory is None else local_path(directory, "images.directory")
        self.images_per_prompt = images_per_prompt
        self.keep = keep
        self._rows: dict[str, dict[str, int]] = {}

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Opens the folder, now that the prompts and the checkpoint are known.

        Raises:
            ValueError: if the folder cannot be made, or its images were drawn with other settings.
        """
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(pl_module, EvaluatedAgents) or not isinstance(data, PromptDataModule):
            return
        pl_module.images_per_evaluation = self.images_per_prompt
        if not self.keep:
            return
        config = resolved_config(trainer)
        if self.directory is None and not config:
            raise ValueError("KeepImages knows no configuration outside the `lightning` command: give `directory`.")
        settings = self._describe(trainer, config)
        directory = _own_folder(config, settings) if self.directory is None else self.directory
        self._rows = {
            name: {sample.id: row for row, sample in enumerate(bare(samples))}
            for name, samples in data.eval_sets.items()
        }
        store = ImageStore(directory, "images", self._place, trainer.global_rank, describe=True)
        if trainer.is_global_zero:
            try:
                directory.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ValueError(
                    f"`images.directory` {directory} cannot be made ({error.strerror}): name another folder."
                ) from None
            require_settings(directory / "images.yaml", settings, "--images.directory")
            write_settings(directory / "images.yaml", settings)
            remove_strays(directory, deep=True)
            store.merge()
        trainer.strategy.barrier("images merged")
        there = len(store.read())
        rank_zero_info(f"Images are kept in {directory}" + (f"; {there} are there already." if there else "."))
        pl_module.image_store = store

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Merges the processes' lists of images into one."""
        if isinstance(pl_module, EvaluatedAgents) and pl_module.image_store is not None:
            trainer.strategy.barrier("all drawn")
            if trainer.is_global_zero:
                pl_module.image_store.merge()
            pl_module.image_store = None

    def _place(self, name: str, mode: str, sample: PromptSample, k: int) -> Path:
        row = self._rows.get(name, {}).get(sample.id)
        folder = safe_name(sample.id) if row is None else f"{row:05d}"
        return Path(safe_name(name), safe_name(mode), folder, "samples", f"{k:04d}.png")

    def _describe(self, trainer: L.Trainer, config: dict[str, Any]) -> dict[str, Any]:
        model = config.get("model", {}).get("init_args", {})
        return {
            **checkpoint_note(trainer),
            "flow": model.get("flow"),
            "language": model.get("language"),
            "folders": folder_stamps({name: model.get(name) for name in ("flow", "language")}),
            "data": config.get("data"),
            "precision": str(trainer.precision),
        }


def _own_folder(config: dict[str, Any], settings: dict[str, Any]) -> Path:
    digest = hashlib.blake2b(repr(settings).encode(), digest_size=6).hexdigest()
    return Path(config["trainer"]["default_root_dir"], config["experiment"], "images", digest)
