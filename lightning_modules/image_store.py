"""`ImageStore`: images in a folder and a list of what each was drawn from, so that an interrupted run goes on."""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from datamodules.atomic_write import write_atomically
from datamodules.jsonl import json_lines
from datamodules.sample import PromptSample

Line = dict[str, Any]
"""What one image was drawn from: `{"set", "id", "prompt", "wording", "source", "mode", "rewrite", "seed", "k", "file",
"digest"}`.

`source` and `digest` are digests of the source image (null without one) and of the file.
"""
Key = tuple[str, str, str, int]
"""Name of the set, prompt id, mode, number k of the image among those of its prompt and mode."""
PathOf = Callable[[str, str, PromptSample, int], Path]
"""Name of the set, mode, sample, k -> path of the image below the store's folder."""


class ImageStore:
    """Stores images as PNG, and a line for each in `<directory>/<list_name>.jsonl`.

    A line is written after its image, so what is listed is there. While several processes draw, those after the
    first list theirs in `<list_name>.<rank>.jsonl`; `merge` makes one list of them.

    Args:
        directory: folder of the images.
        list_name: name of the list, without its ending.
        path_of: path of an image.
        rank: rank of this process.
        describe: also writes a prompt and its metadata (`metadata.jsonl`) beside its folder of images.
    """

    def __init__(self, directory: Path, list_name: str, path_of: PathOf, rank: int = 0, describe: bool = False) -> None:
        self.directory = directory
        self.list_name = list_name
        self.path_of = path_of
        self.describe = describe
        self.rank = rank
        self._lines: dict[Key, Line] = {}

    @property
    def path(self) -> Path:
        """Path of the list of all images."""
        return self.directory / f"{self.list_name}.jsonl"

    def read(self) -> dict[Key, Line]:
        """Reads all processes' lists; of several lines of one image the last holds."""
        self._lines = {}
        # The whole list first, since a process lists what it has drawn again in its own.
        for path in [self.path, *sorted(self.directory.glob(f"{self.list_name}.*.jsonl"))]:
            if not path.is_file():
                continue
            for _, line in json_lines(path, broken="skip"):  # a killed process may have left half a line
                if {"digest", "source"} <= line.keys() and (self.directory / line["file"]).is_file():
                    self._lines[line["set"], line["id"], line["mode"], line["k"]] = line
        return self._lines

    def merge(self, keys: Iterable[Key] | None = None) -> None:
        """Merges all processes' lists into one.

        Args:
            keys: images to list, in this order; None lists all.
        """
        lines = self.read()
        kept = lines.values() if keys is None else (lines[key] for key in keys)
        write_atomically(self.path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept))
        for path in self.directory.glob(f"{self.list_name}.*.jsonl"):
            path.unlink()

    def saved_rewrites(self, name: str, mode: str, k: int, samples: Sequence[PromptSample]) -> list[str] | None:
        """Rewrites that B samples' stored images were drawn from; None unless all have one."""
        lines = [self._lines.get((name, sample.id, mode, k)) for sample in samples]
        found = [
            line["rewrite"]
            for line, sample in zip(lines, samples, strict=True)
            if line is not None and (line["prompt"], line["wording"]) == (sample.prompt, sample.wording)
        ]
        return found if len(found) == len(samples) and None not in found else None

    def load(
        self,
        name: str,
        mode: str,
        k: int,
        samples: Sequence[PromptSample],
        prompts: Sequence[str],
        seeds: Sequence[int],
    ) -> list[Image.Image] | None:
        """Loads B images; None unless all are stored, readable and drawn from these prompts with these seeds."""
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

    def save(
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
            path = self.path_of(name, mode, sample, k)
            data = _png(image)
            write_atomically(self.directory / path, data)
            if self.describe and k == 0:
                record = {"prompt": sample.prompt, **sample.metadata}
                write_atomically(self.directory / path.parent.parent / "metadata.jsonl", json.dumps(record) + "\n")
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
                "file": path.as_posix(),
                "digest": _digest(data),
            }
            self._lines[name, sample.id, mode, k] = line
            texts.append(json.dumps(line, ensure_ascii=False) + "\n")
        own = self.path if self.rank == 0 else self.directory / f"{self.list_name}.{self.rank}.jsonl"
        with own.open("a", encoding="utf-8") as file:
            file.write("".join(texts))


def safe_name(name: str) -> str:
    """Makes a file name of any text; texts that had to be changed stay distinct by a digest.

    >>> safe_name("test-00001"), safe_name("a/b")
    ('test-00001', 'a_b-82badf67')
    """
    plain = re.sub(r"[^A-Za-z0-9._-]", "_", name)[:100]
    if plain == name and plain.strip("."):
        return plain
    return f"{plain}-{hashlib.blake2b(name.encode(), digest_size=4).hexdigest()}"


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def _source(sample: PromptSample) -> str | None:
    image = sample.image
    return None if image is None else _digest(repr((image.mode, image.size)).encode() + image.tobytes())
