"""Paraphrases from a JSONL file: published ones, or one's own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from datamodules.base import PromptSample, bare
from datamodules.jsonl import Broken, Record, id_of, json_lines
from datamodules.local_path import local_path
from datamodules.paraphrases.base import Paraphraser, Wordings, check_kinds
from datamodules.parsing import quoted


@dataclass(frozen=True)
class _Line:
    """A wording, and the set, id and text of the prompt that it rewords, as far as the file says so."""

    where: str
    kind: str
    paraphrase: str
    name: str | None
    id: str | None
    original: str | None

    def rewords(self, name: str, sample: PromptSample) -> bool:
        """Returns True if the wording belongs to this prompt of the set `name`."""
        pairs = ((self.name, name), (self.id, sample.id), (self.original, sample.prompt))
        return all(said is None or said == is_ for said, is_ in pairs)


class FileParaphrases(Paraphraser):
    """Source of paraphrases that are read from a JSONL file.

    A line is `{"id" or "original" or both, "paraphrase", "kind"?, "set"?}` and belongs to the prompt with this id, with
    this text, in this set (`"set": "geneval"`): whatever it names has to agree. Ids that a set does not have are for
    other sets. Files that `WrittenParaphrases` has left serve as they are.

    Args:
        path: path of the file.
        kind: kind of the lines that name none.
        refined: true evaluates the run's own refiner on these wordings too.
    """

    def __init__(self, path: str, kind: str = "file", refined: bool = True) -> None:
        super().__init__(refined)
        self.path = path
        check_kinds([kind], "FileParaphrases.kind")
        self.kind = kind
        self._lines: list[_Line] | None = None

    @property
    def kinds(self) -> tuple[str, ...]:
        """Names of the kinds that the file has, in its order."""
        return tuple(dict.fromkeys(line.kind for line in self._read()))

    def write(self, name: str, samples: Sequence[PromptSample]) -> Wordings:
        """Returns, for every kind, the file's wording for each prompt, or None where it has none.

        Raises:
            ValueError: if no line is for this set, or two are for the same kind of the same prompt.
        """
        samples = bare(samples)
        lines: dict[str, list[_Line]] = {}
        for line in self._read():
            lines.setdefault(f"text {line.original}" if line.id is None else f"id {line.id}", []).append(line)
        found: dict[str, list[str | None]] = {kind: [None] * len(samples) for kind in self.kinds}
        places: dict[tuple[str, int], str] = {}
        for row, sample in enumerate(samples):
            for line in (*lines.get(f"id {sample.id}", ()), *lines.get(f"text {sample.prompt}", ())):
                if not line.rewords(name, sample):
                    continue
                if (line.kind, row) in places:
                    raise ValueError(
                        f"{line.where}: {places[line.kind, row]} has a wording of the prompt {quoted(sample.id)} of "
                        f"the kind {line.kind} already: give one of them another `kind`."
                    )
                places[line.kind, row] = line.where
                found[line.kind][row] = None if line.paraphrase == sample.prompt else line.paraphrase
        if not places:
            raise ValueError(
                f"{self.path}: none of its {len(self._read())} lines is for the set {name}: make `id`, `original` and "
                "`set` agree with the prompts, or name the sets to reword in `sets`."
            )
        return found

    def _read(self) -> list[_Line]:
        if self._lines is None:
            self._lines = list(_parse(local_path(self.path, "FileParaphrases.path"), self.kind))
        return self._lines


def read_wordings(path: Path, *, broken: Broken = "stop") -> Iterator[tuple[str, Record]]:
    """Yields `file:line` and the object of each line of a file of wordings.

    Args:
        path: a JSONL file whose objects have a `paraphrase`.
        broken: treatment of lines that hold no JSON object; see `json_lines`.

    Raises:
        ValueError: naming `file:line`, what is wrong and what to do.
    """
    for where, record in json_lines(path, broken=broken):
        if not isinstance(record.get("paraphrase"), str) or not record["paraphrase"].strip():
            raise ValueError(f"{where}: `paraphrase` is {quoted(record.get('paraphrase'))}: give the other wording.")
        yield where, record


def _parse(path: Path, kind: str) -> Iterator[_Line]:
    if not path.is_file():
        raise ValueError(f"FileParaphrases.path is {str(path)!r}, which is not a file: give the path of a .jsonl file.")
    for where, record in read_wordings(path):
        said = {key: record.get(key) for key in ("set", "id", "original")}
        said["id"] = None if said["id"] is None else id_of(said["id"], 0, where)
        for key, value in said.items():
            if value is not None and not isinstance(value, str):
                raise ValueError(f"{where}: `{key}` is {quoted(value)}: give text, or leave the key out.")
        if said["id"] is None and said["original"] is None:
            raise ValueError(f"{where}: neither `id` nor `original`: say which prompt this rewords.")
        (own,) = check_kinds([record.get("kind", kind)], where)
        yield _Line(where, own, record["paraphrase"].strip(), said["set"], said["id"], said["original"])
