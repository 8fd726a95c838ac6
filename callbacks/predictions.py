"""Pictures of `lightning predict` in a folder, where a run that was interrupted goes on."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import lightning as L
import yaml
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from PIL.Image import Image

from callbacks.benchmark import MODES
from callbacks.config import resolved_config
from datamodules.base import PredictBatch, PromptDataModule
from lightning_modules.agents import Agents, Predictions

Line = dict[str, Any]
"""One picture: `{"set", "id", "prompt", "mode", "rewrite", "seed", "k", "file"}`."""

_ABSENT = "nothing"


class SavePredictions(L.Callback):
    """Writes `<directory>/<set>/<mode>/<id>_<k>.png` and a line for each picture in `<directory>/predictions.jsonl`.

    `lightning predict` adds it by itself. Prompts whose pictures are all there and listed are not drawn again. While
    several processes draw, those after the first list theirs in `predictions.<rank>.jsonl`; at the end, or when the
    run goes on, the lists are made one, in the order of the prompts. `predictions.yaml` holds what the pictures
    depend on; a run with anything else stops rather than mix its pictures in.

    Args:
        directory: where pictures and lists go.
        images_per_prompt: K pictures of each prompt in each mode; the first has the noise of validation's.
    """

    def __init__(self, directory: str = "predictions", images_per_prompt: int = 1) -> None:
        if images_per_prompt < 1:
            raise ValueError(f"`predictions.images_per_prompt` is {images_per_prompt}, use at least 1.")
        self.directory = Path(directory)
        self.images_per_prompt = images_per_prompt
        self._settings: dict[str, Any] = {}

    # --- hooks ------------------------------------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Compares the folder with this run and tells the data module what is there, before models are loaded."""
        if stage != "predict":
            return
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(pl_module, Agents) and isinstance(data, PromptDataModule)
        self._settings = self._describe(trainer, data)
        self._compare()
        pl_module.images_per_prediction = self.images_per_prompt
        trainer.strategy.barrier("compared")
        if trainer.is_global_zero and self._list.exists():
            self._merge(pl_module, data)
        trainer.strategy.barrier("merged")
        data.predicted = set(self._whole(pl_module, data))
        if data.predicted:
            rank_zero_info(f"{len(data.predicted)} prompts are drawn already in {self.directory}")

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Notes what is being drawn, now that all is loaded."""
        # Once more, for a checkpoint that `Trainer.predict` was given in Python: it is not known in `setup`.
        self._settings = self._describe(trainer, trainer.datamodule)  # type: ignore[attr-defined]
        self._compare()
        trainer.strategy.barrier("compared again")
        if trainer.is_global_zero:
            self.directory.mkdir(parents=True, exist_ok=True)
            text = yaml.safe_dump(self._settings, sort_keys=False, allow_unicode=True)
            _write_whole(self._note, f"# What these pictures were drawn with; `lightning predict` compares it.\n{text}")
            self._list.touch()

    def on_predict_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Predictions,
        batch: PredictBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Writes the pictures of one batch, then their lines in one piece: what is listed is there."""
        lines = []
        for line, picture in self._lines(outputs):
            if (line["set"], line["id"]) in trainer.datamodule.predicted:  # type: ignore[attr-defined]
                continue  # drawn again for the sake of its batch
            _save_whole(picture, self.directory / line["file"])
            lines.append(json.dumps(line, ensure_ascii=False) + "\n")
        own = self._list if trainer.is_global_zero else self._list.with_suffix(f".{trainer.global_rank}.jsonl")
        with own.open("a", encoding="utf-8") as file:
            file.write("".join(lines))

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Makes one list of all processes' lists."""
        trainer.strategy.barrier("all drawn")
        if trainer.is_global_zero:
            assert isinstance(pl_module, Agents)
            self._merge(pl_module, trainer.datamodule)  # type: ignore[attr-defined]

    # --- lists ------------------------------------------------------------------------------------------------------

    @property
    def _list(self) -> Path:
        return self.directory / "predictions.jsonl"

    @property
    def _note(self) -> Path:
        return self.directory / "predictions.yaml"

    def _lines(self, drawn: Predictions) -> Iterator[tuple[Line, Image]]:
        """Every picture of a batch with its line, prompt by prompt."""
        for row, sample in enumerate(drawn.samples):
            for mode, pictures in drawn.images.items():
                for k in range(len(pictures)):
                    place = Path(_safe(drawn.name), mode, f"{_safe(sample.id)}_{k}.png")
                    yield (
                        {
                            "set": drawn.name,
                            "id": sample.id,
                            "prompt": sample.prompt,
                            "mode": mode,
                            "rewrite": drawn.rewrites[row] if mode == "with_pe" and drawn.rewrites else None,
                            "seed": drawn.seeds[k][row],
                            "k": k,
                            "file": place.as_posix(),
                        },
                        pictures[k][row],
                    )

    def _whole(self, agents: Agents, data: PromptDataModule) -> dict[tuple[str, str], list[Line]]:
        """Lines of the prompts that have all their pictures, by set and id, in the order of the data."""
        found: dict[tuple[str, str], dict[tuple[str, int], Line]] = {}
        for path in sorted(self.directory.glob("predictions*.jsonl")):
            for text in path.read_text(encoding="utf-8", errors="replace").split("\n"):
                line = _parse(text)
                if line is not None and (self.directory / line["file"]).is_file():
                    found.setdefault((line["set"], line["id"]), {})[line["mode"], line["k"]] = line
        modes = MODES if agents.language is not None else MODES[:1]
        wanted = [(mode, k) for mode in modes for k in range(self.images_per_prompt)]
        keys = [(name, sample.id) for name, samples in data.predict_samples().items() for sample in samples]
        return {key: [found[key][w] for w in wanted] for key in keys if key in found and found[key].keys() >= {*wanted}}

    def _merge(self, agents: Agents, data: PromptDataModule) -> None:
        lines = [line for lines in self._whole(agents, data).values() for line in lines]
        _write_whole(self._list, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
        for path in self.directory.glob("predictions.*.jsonl"):
            path.unlink()

    # --- what the pictures depend on ----------------------------------------------------------------------------------

    def _describe(self, trainer: L.Trainer, data: PromptDataModule) -> dict[str, Any]:
        config = resolved_config(trainer)
        checkpoint = trainer.ckpt_path or config.get("ckpt_path")
        if checkpoint and not os.path.isfile(checkpoint):
            raise ValueError(f"`ckpt_path` is {checkpoint}; name the checkpoint's file, which the pictures depend on.")
        modified = datetime.fromtimestamp(os.stat(checkpoint).st_mtime, UTC).isoformat() if checkpoint else None
        prompts = [
            (name, sample.id, sample.prompt) for name, samples in data.predict_samples().items() for sample in samples
        ]
        return {
            "images_per_prompt": self.images_per_prompt,
            "ckpt_path": os.path.abspath(checkpoint) if checkpoint else None,
            "ckpt_modified": modified,
            "model": config.get("model"),
            "data": config.get("data"),
            "prompts": f"{len(prompts)} ({hashlib.blake2b(repr(prompts).encode(), digest_size=8).hexdigest()})",
        }

    def _compare(self) -> None:
        """Raises a ValueError if the folder's pictures were drawn with something else."""
        if not self._note.is_file():
            if self._list.exists():
                raise ValueError(
                    f"{self._list} exists, but not the {self._note.name} that says what its pictures were drawn with: "
                    "set `--predictions.directory` to another folder."
                )
            return
        before = dict(_leaves(yaml.safe_load(self._note.read_text(encoding="utf-8"))))
        now = dict(_leaves(yaml.safe_load(yaml.safe_dump(self._settings, sort_keys=False))))
        for name in {**now, **before}:
            old, new = before.get(name, _ABSENT), now.get(name, _ABSENT)
            if old != new:
                raise ValueError(
                    f"the pictures in {self.directory} were drawn with {name} {old}, which is {new} now: set "
                    "`--predictions.directory` to another folder, or undo the change."
                )


def _safe(name: str) -> str:
    """A file name for any text; texts that had to be changed stay distinct by a digest.

    >>> _safe("test-00001"), _safe("a/b")
    ('test-00001', 'a_b-82badf67')
    """
    plain = re.sub(r"[^A-Za-z0-9._-]", "_", name)[:100]
    if plain == name and plain.strip("."):
        return plain
    return f"{plain}-{hashlib.blake2b(name.encode(), digest_size=4).hexdigest()}"


def _parse(text: str) -> Line | None:
    """A line of the list; None for one that a killed process left unfinished."""
    try:
        line = json.loads(text)
    except json.JSONDecodeError:
        return None
    return line if isinstance(line, dict) else None


def _save_whole(picture: Image, path: Path) -> None:
    """Writes a PNG that is there as a whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp")
    picture.save(unfinished, format="PNG")
    os.replace(unfinished, path)


def _write_whole(path: Path, text: str) -> None:
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)


def _leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and values; an empty dict is a value."""
    if isinstance(tree, dict) and tree:
        for key, value in tree.items():
            yield from _leaves(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, tree
