"""Images kept in a folder, with a list that says what each was drawn from: an interrupted run goes on from there."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from datamodules.jsonl import json_lines
from datamodules.sample import PromptSample

Line = dict[str, Any]
"""One image: `{"set", "id", "prompt", "wording", "source", "mode", "rewrite", "seed", "k", "file", "digest"}`.

`source` and `digest` are digests of the source image (null without one) and of the file.
"""
Key = tuple[str, str, str, int]
"""Set, id, mode, k."""
Place = Callable[[str, str, PromptSample, int], Path]
"""Set, mode, sample and k -> path below the store's folder."""


class ImageStore:
    """Keeps images as PNG, and a line for each in `<directory>/<list_name>.jsonl`.

    A line is written after its image, so what is listed is there. While several processes draw, those after the
    first list theirs in `<list_name>.<rank>.jsonl`; `merge` makes one list of them.

    Args:
        directory: of the images.
        list_name: name of the list, without its ending.
        place: where an image goes.
        rank: of this process.
        describe: also write what was asked for (`metadata.jsonl`) beside a prompt's folder of images.
    """

    def __init__(self, directory: Path, list_name: str, place: Place, rank: int = 0, describe: bool = False) -> None:
        self.directory = directory
        self.list_name = list_name
        self.place = place
        self.describe = describe
        self.rank = rank
        self._lines: dict[Key, Line] = {}

    @property
    def path(self) -> Path:
        """The list of all images."""
        return self.directory / f"{self.list_name}.jsonl"

    def read(self) -> dict[Key, Line]:
        """Reads all processes' lists; a later line of the same image holds."""
        self._lines = {}
        # The whole list first: what a process has drawn anew stands in its own.
        for path in [self.path, *sorted(self.directory.glob(f"{self.list_name}.*.jsonl"))]:
            if not path.is_file():
                continue
            for _, line in json_lines(path, broken="skip"):  # a killed process may have left half a line
                if {"digest", "source"} <= line.keys() and (self.directory / line["file"]).is_file():
                    self._lines[line["set"], line["id"], line["mode"], line["k"]] = line
        return self._lines

    def merge(self, keys: Iterable[Key] | None = None) -> None:
        """Makes one list of all processes' lists.

        Args:
            keys: images to list, in this order; None lists all.
        """
        lines = self.read()
        kept = lines.values() if keys is None else (lines[key] for key in keys)
        write_whole(self.path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept))
        for path in self.directory.glob(f"{self.list_name}.*.jsonl"):
            path.unlink()

    def rewrites(self, name: str, mode: str, k: int, samples: Sequence[PromptSample]) -> list[str] | None:
        """What B samples' kept images were drawn from instead of the prompts; None unless all have one."""
        lines = [self._lines.get((name, sample.id, mode, k)) for sample in samples]
        found = [
            line["rewrite"]
            for line, sample in zip(lines, samples, strict=True)
            if line is not None and (line["prompt"], line["wording"]) == (sample.prompt, sample.wording)
        ]
        return found if len(found) == len(samples) and None not in found else None

    def recall(
        self,
        name: str,
        mode: str,
        k: int,
        samples: Sequence[PromptSample],
        prompts: Sequence[str],
        seeds: Sequence[int],
    ) -> list[Image.Image] | None:
        """B kept images; None unless all are there, drawn from these prompts with these seeds and readable."""
        images = []
        for sample, prompt, seed in zip(samples, prompts, seeds, strict=True):
            line = self._lines.get((name, sample.id, mode, k))
            if line is None or line["seed"] != seed or line["prompt"] != sample.prompt:
                return None
            if prompt != (line["rewrite"] or line["wording"] or line["prompt"]) or line["source"] != _source(sample):
                return None
            try:
                data = (self.directory / line["file"]).read_bytes()
            except OSError:
                return None
            # A file that was written again without its line is another prompt's image, or a later one.
            if _digest(data) != line["digest"]:
                return None
            with Image.open(io.BytesIO(data)) as image:
                images.append(image.convert("RGB"))
        return images

    def keep(
        self,
        name: str,
        mode: str,
        k: int,
        samples: Sequence[PromptSample],
        prompts: Sequence[str],
        seeds: Sequence[int],
        images: Sequence[Image.Image],
    ) -> None:
        """Writes B images, then their lines in one piece."""
        texts = []
        for sample, prompt, seed, image in zip(samples, prompts, seeds, images, strict=True):
            place = self.place(name, mode, sample, k)
            data = _png(image)
            _write_whole(self.directory / place, data)
            if self.describe and k == 0:
                record = {"prompt": sample.prompt, **sample.metadata}
                write_whole(self.directory / place.parent.parent / "metadata.jsonl", json.dumps(record) + "\n")
            line: Line = {
                "set": name,
                "id": sample.id,
                "prompt": sample.prompt,
                "wording": sample.wording,
                "source": _source(sample),
                "mode": mode,
                "rewrite": None if mode == "without_pe" else prompt,
                "seed": seed,
                "k": k,
                "file": place.as_posix(),
                "digest": _digest(data),
            }
            self._lines[name, sample.id, mode, k] = line
            texts.append(json.dumps(line, ensure_ascii=False) + "\n")
        own = self.path if self.rank == 0 else self.directory / f"{self.list_name}.{self.rank}.jsonl"
        with own.open("a", encoding="utf-8") as file:
            file.write("".join(texts))


def safe_name(name: str) -> str:
    """A file name for any text; texts that had to be changed stay distinct by a digest.

    >>> safe_name("test-00001"), safe_name("a/b")
    ('test-00001', 'a_b-82badf67')
    """
    plain = re.sub(r"[^A-Za-z0-9._-]", "_", name)[:100]
    if plain == name and plain.strip("."):
        return plain
    return f"{plain}-{hashlib.blake2b(name.encode(), digest_size=4).hexdigest()}"


def write_whole(path: Path, text: str) -> None:
    """Writes a text that is there as a whole or not at all."""
    _write_whole(path, text.encode("utf-8"))


def _write_whole(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}.tmp")  # two commands may write into one folder
    unfinished.write_bytes(data)
    os.replace(unfinished, path)


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def _source(sample: PromptSample) -> str | None:
    image = sample.image
    return None if image is None else _digest(repr((image.mode, image.size)).encode() + image.tobytes())
