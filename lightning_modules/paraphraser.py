"""`WrittenParaphrases`: other wordings of prompts by a language model, written once and kept in a file."""

from __future__ import annotations

import gc
import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

from datamodules.atomic_write import write_atomically
from datamodules.base import PromptSample, bare
from datamodules.chunks import chunks
from datamodules.local_path import local_path
from datamodules.paraphrases.base import Paraphraser, Wordings, check_kinds
from datamodules.paraphrases.files import read_wordings
from lightning_modules.policies.language import LanguagePolicy
from lightning_modules.seeding import seed_of
from rewards.pretrained import pick_device

Line = dict[str, Any]
"""A wording and what decided it: `{"id", "set", "original", "paraphrase", "formatted", "model", "template", "seed",
"settings", "image"?}`."""


class WrittenParaphrases(Paraphraser):
    """Paraphrases by any refiner, such as a prompt enhancer with its own template or an untrained model.

    They are appended to a JSONL file, a batch at a time, and read from it later: a line counts if its prompt, model,
    template, seed and what else decides the wording agree. The model is loaded only while something is missing. Models
    are compared by name: delete the file after changing the weights in a folder.

    Where several processes evaluate, let the first one call `write` and the others after it.

    Args:
        writer: the refiner, frozen (`learning_rate: null`); wordings have up to its `eval_max_new_tokens`. An answer
            outside `<answer> </answer>` is no wording, except with `checked: false`, where all of it is, as it would
            be in a run.
        kind: name of this kind of wordings in the names of evaluation sets.
        cache: the JSONL file; null is `paraphrases/<set>.<kind>.jsonl` where the run was started.
        num: number of wordings of each prompt, at the writer's temperature; above 1 they are the kinds `<kind>_1` and
            so on, and need a seed.
        seed: draws the wordings, every one with random numbers of its own and so one at a time; null writes greedily.
        batch_size: prompts that are written at once when greedy.
        refined: true puts the run's own refiner in front of these wordings too.
        checked: true leaves out wordings that lose something; false for a prompt enhancer (static PE), whose
            mistakes count.
        device: device of the writer; null is this process's GPU if there is one, else the CPU.
    """

    def __init__(
        self,
        writer: LanguagePolicy,
        kind: str = "written",
        cache: str | None = None,
        num: int = 1,
        seed: int | None = None,
        batch_size: int = 16,
        refined: bool = False,
        checked: bool = True,
        device: str | None = None,
    ) -> None:
        super().__init__(refined)
        if writer.trained:
            raise ValueError(
                f"the writer {writer.model} of WrittenParaphrases has a learning_rate, but nothing trains it: set "
                "`learning_rate: null`."
            )
        for name, value in (("num", num), ("batch_size", batch_size)):
            if value < 1:
                raise ValueError(f"WrittenParaphrases has `{name}` {value}, use at least 1.")
        if num > 1 and seed is None:
            raise ValueError(f"WrittenParaphrases has `num` {num}, but greedy wordings are all the same: set `seed`.")
        check_kinds([kind], "WrittenParaphrases.kind")
        self.writer = writer
        # As given, for the file's lines: loading an adapter puts its base model here.
        self.model, self.lora = writer.model, None if writer.lora is None else writer.lora.path
        self.kind = kind
        self.cache = None if cache is None else local_path(cache, "WrittenParaphrases.cache")
        self.num = num
        self.seed = seed
        self.batch_size = batch_size
        self.checked = checked
        self.device = device
        # A writer of text alone has no use for the images, which may be thousands of files.
        self.sees_images = type(writer) is not LanguagePolicy

    @property
    def kinds(self) -> tuple[str, ...]:
        """Names of the kinds: the one `kind`, or with `num` above 1 so many, numbered from 1."""
        return (self.kind,) if self.num == 1 else tuple(f"{self.kind}_{k}" for k in range(1, self.num + 1))

    def path(self, name: str) -> Path:
        """Path of the file with the wordings of a set."""
        return Path("paraphrases") / f"{name}.{self.kind}.jsonl" if self.cache is None else self.cache

    def missing(self, name: str, samples: Sequence[PromptSample]) -> bool:
        """Returns True if `write` would have to load the model."""
        found = self._read(name)
        return any(_key(line) not in found for _, _, line in self._wanted(name, samples))

    def write(self, name: str, samples: Sequence[PromptSample]) -> Wordings:
        """Gives every prompt a wording of every kind; None where the writer gave the prompt back or no answer.

        Raises:
            ValueError: if the file has a broken line, or a checked writer kept its format in no answer at all.
        """
        found = self._read(name)
        wanted = list(self._wanted(name, samples))
        todo = [(row, line) for _, row, line in wanted if _key(line) not in found]
        if todo:
            found |= self._write_missing(name, samples if self.sees_images else bare(samples), todo)
        lines = [found[_key(line)] for _, _, line in wanted]
        if self.checked and lines and not any(line["formatted"] for line in lines):
            raise ValueError(
                f"{self.path(name)}: none of the {len(lines)} answers of {self.writer.model} holds <answer> </answer>: "
                "ask for it in the writer's `template`, or set `checked: false` to take answers as they are."
            )
        wordings: Wordings = {kind: [None] * len(samples) for kind in self.kinds}
        for (kind, row, _), line in zip(wanted, lines, strict=True):
            if line["paraphrase"] != line["original"] and (line["formatted"] or not self.checked):
                wordings[kind][row] = line["paraphrase"]
        return wordings

    # --- what decides a wording -------------------------------------------------------------------------------------

    def _wanted(self, name: str, samples: Sequence[PromptSample]) -> Iterator[tuple[str, int, Line]]:
        """Yields the kind, the prompt's row, and a line that has everything but the wording."""
        for row, sample in enumerate(samples if self.sees_images else bare(samples)):
            for k, kind in enumerate(self.kinds):
                yield kind, row, self._line(name, sample, k)

    def _line(self, name: str, sample: PromptSample, k: int) -> Line:
        writer = self.writer
        settings: dict[str, Any] = {
            "class": type(writer).__name__,
            "max_new_tokens": writer.eval_max_new_tokens,
            "chat": writer.chat_template_kwargs,
            "dtype": str(writer.dtype).removeprefix("torch."),
            "quantization": writer.quantization,
        }
        if self.lora is not None:
            settings["lora"] = self.lora
        if self.seed is not None:
            settings |= {"temperature": writer.temperature, "k": k}
        line: Line = {
            "id": sample.id,
            "set": name,
            "original": sample.prompt,
            "model": self.model,
            "template": writer.template,
            "seed": self.seed,
            "settings": settings,
        }
        if self.sees_images and sample.image is not None:
            settings["max_pixels"] = getattr(writer, "max_pixels", None)
            image = sample.image.convert("RGB")
            line["image"] = hashlib.blake2b(repr(image.size).encode() + image.tobytes(), digest_size=8).hexdigest()
        return line

    # --- the file ---------------------------------------------------------------------------------------------------

    def _read(self, name: str) -> dict[str, Line]:
        """Reads the file: key -> line, empty if there is no file."""
        path = self.path(name)
        if not path.exists():
            return {}
        found = {}
        for where, line in read_wordings(path, broken="skip_last"):
            if not isinstance(line.get("formatted"), bool) or not isinstance(line.get("original"), str):
                raise ValueError(f"{where}: no line of WrittenParaphrases: name another file as `cache`.")
            found[_key(line)] = line
        return found

    def _write_missing(
        self, name: str, samples: Sequence[PromptSample], todo: Sequence[tuple[int, Line]]
    ) -> dict[str, Line]:
        """Writes missing wordings a batch at a time, so that a stopped run goes on from there; key -> new line."""
        path = self.path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        _end_last_line(path)
        written: dict[str, Line] = {}
        with self._loaded(), open(path, "a", encoding="utf-8") as file, Progress(transient=True) as progress:
            task = progress.add_task(f"{self.kind} wordings of {name}", total=len(todo))
            for batch in chunks(len(todo), self.batch_size if self.seed is None else 1):
                lines = self._ask([samples[row] for row, _ in todo[batch]], [line for _, line in todo[batch]])
                written |= {_key(line): line for line in lines}
                file.write("".join(json.dumps(line) + "\n" for line in lines))
                file.flush()
                progress.advance(task, len(lines))
        return written

    @torch.no_grad()
    def _ask(self, samples: Sequence[PromptSample], lines: Sequence[Line]) -> list[Line]:
        """Completes the lines of a batch with their wordings."""
        writer = self.writer
        with torch.random.fork_rng([writer.device] if writer.device.type == "cuda" else []):
            if self.seed is not None:
                (line,) = lines
                key = (line["set"], line["id"], line["settings"]["k"])
                torch.manual_seed(seed_of("paraphrase", self.seed, *key))
            answers = writer._write(samples, 1, writer.eval_max_new_tokens, greedy=self.seed is None)
        written = zip(lines, answers.rewrites, answers.formatted.tolist(), strict=True)
        return [line | {"paraphrase": text, "formatted": formatted == 1.0} for line, text, formatted in written]

    @contextmanager
    def _loaded(self) -> Iterator[None]:
        """Context manager: the writer has its weights, on its device."""
        self.writer.load()
        self.writer.to(pick_device(self.device))
        try:
            yield
        finally:
            self.writer.network = None
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


def _key(line: Line) -> str:
    """Key of a line: all that decides its wording."""
    parts = ("id", "set", "original", "model", "template", "seed", "settings", "image")
    return json.dumps([line.get(part) for part in parts], sort_keys=True)


def _end_last_line(path: Path) -> None:
    """Adds the line feed that a file's last line lacks, or drops the line if a stopped run left it unfinished."""
    content = path.read_bytes() if path.exists() else b""
    whole = content[: content.rfind(b"\n") + 1]
    if whole == content:
        return
    try:
        json.loads(content[len(whole) :])
    except json.JSONDecodeError:
        write_atomically(path, whole)
    else:
        write_atomically(path, content + b"\n")
