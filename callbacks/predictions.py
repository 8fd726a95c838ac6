"""`SavePredictions`: the images of `lightning predict` in a folder, where an interrupted run resumes."""

from __future__ import annotations

import hashlib
from itertools import count
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from callbacks.run_config import (
    changed_setting,
    checkpoint_note,
    folder_stamps,
    require_settings,
    resolved_config,
    write_settings,
)
from datamodules.base import PromptDataModule, PromptSample, bare
from datamodules.local_path import local_path
from lightning_modules.evaluation import MODES, EvaluatedAgents
from lightning_modules.image_store import ImageStore, Key, safe_name


class SavePredictions(L.Callback):
    """Writes `<directory>/<set>/<mode>/<id>_<k>.png` and a line for each image in `<directory>/predictions.jsonl`.

    `lightning predict` adds it by itself. Prompts whose images are all there and listed are not drawn again. While
    several processes draw, those after the first list theirs in `predictions.<rank>.jsonl`; at the end, or when the
    run goes on, the lists are made one, in the order of the prompts. `predictions.yaml` holds what the images
    depend on; a run with anything else stops rather than mix its images in.

    Args:
        directory: folder of images and lists; null is `predictions/version_N`, the first that is new or holds images
            with these very settings and prompts, so that the same command goes on and another starts afresh.
        images_per_prompt: K images of each prompt in each mode; the first has the noise of validation's.
    """

    def __init__(self, directory: str | None = None, images_per_prompt: int = 1) -> None:
        if images_per_prompt < 1:
            raise ValueError(f"`predictions.images_per_prompt` is {images_per_prompt}, use at least 1.")
        self.directory = local_path(directory or "predictions", "predictions.directory")
        self._numbered = directory is None
        self.images_per_prompt = images_per_prompt
        self._settings: dict[str, Any] = {}
        self._store = ImageStore(self.directory, "predictions", _place)

    # --- hooks ------------------------------------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Compares the folder with this run and tells the data module which prompts are drawn, before models load.

        Raises:
            ValueError: if the folder's images were drawn with other settings.
        """
        if stage != "predict":
            return
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(pl_module, EvaluatedAgents) and isinstance(data, PromptDataModule)
        self._settings = self._describe(trainer, data)
        if self._numbered:
            self.directory = self._free(self.directory)
        self._store = ImageStore(self.directory, "predictions", _place, trainer.global_rank)
        self._compare()
        pl_module.images_per_evaluation = self.images_per_prompt
        pl_module.image_store = self._store
        trainer.strategy.barrier("compared")
        if trainer.is_global_zero and self._store.path.exists():
            self._merge(pl_module, data)
        trainer.strategy.barrier("merged")
        data.predicted = set(self._whole(pl_module, data))
        if data.predicted:
            rank_zero_info(f"{len(data.predicted)} prompts are drawn already in {self.directory}")

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Writes `predictions.yaml`, now that all is loaded."""
        # Once more, for a checkpoint that `Trainer.predict` was given in Python: it is not known in `setup`.
        self._settings = self._describe(trainer, trainer.datamodule)  # type: ignore[attr-defined]
        self._compare()
        trainer.strategy.barrier("compared again")
        if trainer.is_global_zero:
            self.directory.mkdir(parents=True, exist_ok=True)
            write_settings(self._note, self._settings)
            self._store.path.touch()

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Merges the processes' lists of images into one."""
        trainer.strategy.barrier("all drawn")
        if trainer.is_global_zero:
            assert isinstance(pl_module, EvaluatedAgents)
            self._merge(pl_module, trainer.datamodule)  # type: ignore[attr-defined]

    def summary(self) -> str:
        """Returns the sentence for a command's end: how many images are listed, and where."""
        return f"{len(self._store.read())} images are in {self.directory}, listed in {self._store.path.name}"

    def _free(self, folder: Path) -> Path:
        for number in count():
            version = folder / f"version_{number}"
            note = version / self._note.name
            if not version.exists() or (note.is_file() and changed_setting(note, self._settings) is None):
                break
        return version

    @property
    def _note(self) -> Path:
        return self.directory / "predictions.yaml"

    def _whole(self, agents: EvaluatedAgents, data: PromptDataModule) -> dict[tuple[str, str], list[Key]]:
        """Returns (set, id) -> images, in the data's order, of the prompts of which all images are kept."""
        there = self._store.read()
        modes = MODES if agents.language is not None else MODES[:1]
        wanted = [(mode, k) for mode in modes for k in range(self.images_per_prompt)]
        whole: dict[tuple[str, str], list[Key]] = {}
        for name, samples in data.predict_samples().items():
            for sample in bare(samples):
                keys = [(name, sample.id, mode, k) for mode, k in wanted]
                if all(key in there for key in keys):
                    whole[name, sample.id] = keys
        return whole

    def _merge(self, agents: EvaluatedAgents, data: PromptDataModule) -> None:
        self._store.merge(key for keys in self._whole(agents, data).values() for key in keys)

    # --- what the images depend on ----------------------------------------------------------------------------------

    def _describe(self, trainer: L.Trainer, data: PromptDataModule) -> dict[str, Any]:
        # Lazy samples come without their images, which take long to read; those of the command line have theirs.
        prompts = [
            (name, sample.id, sample.prompt, *([sample.content] if sample.image is not None else []))
            for name, samples in data.predict_samples().items()
            for sample in bare(samples)
        ]
        digest = hashlib.blake2b(repr(prompts).encode(), digest_size=8).hexdigest()
        config = resolved_config(trainer)
        return {
            "images_per_prompt": self.images_per_prompt,
            **checkpoint_note(trainer),
            "model": config.get("model"),
            "folders": folder_stamps(config.get("model")),
            "data": config.get("data"),
            "prompts": f"{len(prompts)} ({digest})",
        }

    def _compare(self) -> None:
        """Raises ValueError if the folder's images were drawn with other settings, or nobody knows with which."""
        if self._store.path.exists() and not self._note.is_file():
            raise ValueError(
                f"{self._store.path} exists, but not the {self._note.name} that says what its images were drawn "
                "with: set `--predictions.directory` to another folder."
            )
        require_settings(self._note, self._settings, "--predictions.directory")


def _place(name: str, mode: str, sample: PromptSample, k: int) -> Path:
    return Path(safe_name(name), mode, f"{safe_name(sample.id)}_{k}.png")
