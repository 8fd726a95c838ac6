"""Readers of files as fuzzing reads them: prompts, configurations, run folders, checkpoints."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from hypothesis import strategies as st

from benchmarks.system.faults.fuzz import Read, Wrong, any_bytes, mutated
from benchmarks.system.faults.kills import same
from callbacks.runs.loading import Run, overview
from datamodules.editing.prompts import EditPrompts
from datamodules.geneval import GenEvalPrompts
from datamodules.ocr import OCRPrompts
from datamodules.text import TextPrompts
from lightning_modules.checkpoints import CheckpointIO, check_whole, is_checkpoint, read
from lightning_modules.cli import main
from lightning_modules.cli.misspelt import misspelt
from lightning_modules.cli.texts import load_config

JSONL = (
    b'{"prompt": "a photo of a bench", "tag": "single_object", "include": [{"class": "bench", "count": 1}]}\n'
    b'{"id": 7, "prompt": "two \\u00e9 clocks", "tag": "counting", "include": [{"class": "clock", "count": 2}], '
    b'"exclude": [{"class": "clock", "count": 3}]}\n',
    b'{"prompt": "a sign \\"No Parking\\"", "text": ["No Parking"]}\n{"id": "b", "prompt": "x", "text": 1}\n',
    b'{"prompt": "make it red", "image": "a.png", "category": "swap", "media": [{"uri": "a.png"}]}\n',
)
TEXT = ('a photo of a caf\u00e9\n\na sign that reads "No Parking"\n'.encode(), b"two green crosses\n")


@dataclass
class _Evil:
    """A pickle that makes a folder when it is loaded without care."""

    marker: Path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


@dataclass(frozen=True)
class Surface:
    """A reader and its input.

    Args:
        cases: strategy of the input.
        reader: opens the reader, given a folder for its files.
        names: what the message of a refusal holds.
    """

    cases: st.SearchStrategy[bytes]
    reader: Callable[[Path], contextlib.AbstractContextManager[Read]]
    names: str = ""


def surfaces(run: Path, marker: Path) -> dict[str, Surface]:
    """Returns the readers of files by name.

    Args:
        run: folder of a finished run with a checkpoint.
        marker: path that code in an input would make.
    """
    configs = [path.read_bytes() for path in (Path("configs/quickstart.yaml"), run / "config.yaml")]
    pairs = zip("abcdefgh", "bcdefghi", strict=True)
    levels = [f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]" for before, name in pairs]
    bomb = "\n".join(["a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1]", *levels]).encode()
    code = f"model: !!python/object/apply:os.mkdir ['{marker}']\n".encode()
    return {
        "prompts, .jsonl": Surface(
            st.one_of(mutated(JSONL), mutated(JSONL), mutated(JSONL), records(), any_bytes()),
            _prompts("x.jsonl"),
            "x.jsonl",
        ),
        "prompts, .txt": Surface(st.one_of(mutated(TEXT), any_bytes()), _prompts("x.txt"), "x.txt"),
        "prompts, .parquet": Surface(mutated([_parquet()]), _prompts("x.parquet"), "x.parquet"),
        "configuration (YAML)": Surface(
            st.one_of(mutated(configs), mutated([*configs, bomb, code]), any_bytes()), _config, ""
        ),
        "run folder (config.yaml, results.json, metrics.csv)": Surface(_run_cases(run, code), _run_reader(run), ""),
        "checkpoint": Surface(_checkpoint_cases(run, marker), _checkpoint_reader(run), "x.ckpt"),
    }


def records() -> st.SearchStrategy[bytes]:
    """Makes a strategy of JSON lines with the keys of prompts and any values."""
    keys = st.sampled_from("id prompt tag include exclude text image class count color x".split())
    scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=12))
    values = st.recursive(
        scalars, lambda one: st.lists(one, max_size=3) | st.dictionaries(keys, one, max_size=4), max_leaves=8
    )
    lines = st.lists(st.dictionaries(keys, values, max_size=6) | values, min_size=1, max_size=3)
    return lines.map(lambda found: "\n".join(map(json.dumps, found)).encode())


def _prompts(name: str) -> Callable[[Path], contextlib.AbstractContextManager[Read]]:
    kinds: Mapping[str, tuple[Any, ...]] = {
        ".jsonl": (TextPrompts, GenEvalPrompts, OCRPrompts, EditPrompts),
        ".txt": (TextPrompts, OCRPrompts),
        ".parquet": (EditPrompts,),
    }

    @contextmanager
    def opened(folder: Path) -> Iterator[Read]:
        path = folder / name
        modules = [kind(str(path), str(path)) for kind in kinds[path.suffix]]

        def read_one(case: bytes) -> None:
            path.write_bytes(case)
            for sample in modules[len(case) % len(modules)].read(path):
                if not isinstance(sample.prompt, str) or not sample.prompt.strip():
                    raise Wrong(f"the prompt {sample.prompt!r}")
                sample.prompt.encode()
                json.dumps(sample.metadata)

        yield read_one

    return opened


def _parquet() -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    png, buffer = io.BytesIO(), io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(png, "PNG")
    columns = {"prompt": ["make it red", "add a dog"], "image": [png.getvalue()] * 2, "task": ["swap", "addition"]}
    pq.write_table(pa.table(columns), buffer)
    return buffer.getvalue()


@contextmanager
def _config(folder: Path) -> Iterator[Read]:
    """Reads a configuration as the command does before it builds anything; one of 500 by the command itself."""
    path = folder / "x.yaml"
    turn = 0

    def read_one(case: bytes) -> None:
        nonlocal turn
        turn += 1
        path.write_bytes(case)
        said = misspelt(["fit", f"--config={path}"])
        if said is not None:
            _check_sentence(said)
        elif turn % 500 == 0:
            _command(path)
        else:
            with contextlib.suppress(yaml.YAMLError):  # which the parser makes one line of
                load_config(case.decode())

    yield read_one


def _command(path: Path) -> None:
    """Runs `lightning fit --config PATH --print_config`, which ends with 0, or with 2 and one line."""
    out, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        try:
            main(["fit", f"--config={path}", "--print_config"])
        except SystemExit as ended:
            if ended.code not in (0, None):
                _check_sentence(errors.getvalue().strip())


def _check_sentence(said: str) -> None:
    if "\n" in said or not said:
        raise Wrong(f"not one line but {said[:200]!r}")


SMALL_CONFIG = b"seed_everything: 42\ntrainer: {max_steps: 2}\n"
RUN_FILES = ("config.yaml", "results.json", "metrics.csv")


def _run_cases(run: Path, code: bytes) -> st.SearchStrategy[bytes]:
    """Makes a strategy of the number of a file, as a byte, and its content."""
    contents = [(run / name).read_bytes() for name in RUN_FILES]
    contents[0] += code
    damaged = [mutated([content]).map(bytes([number]).__add__) for number, content in enumerate(contents)]
    other = st.builds(lambda number, case: bytes([number]) + case, st.integers(0, 2), any_bytes())
    return st.one_of(*damaged, damaged[1], damaged[1], other)  # tables take ten times as long as results


def _run_reader(run: Path) -> Callable[[Path], contextlib.AbstractContextManager[Read]]:
    @contextmanager
    def opened(folder: Path) -> Iterator[Read]:
        copy = folder / "experiment" / "version_0"
        copy.mkdir(parents=True)
        # A whole configuration, which is parsed in each case, would take longer than all else.
        contents = [SMALL_CONFIG, *((run / name).read_bytes() for name in RUN_FILES[1:])]
        for name, content in zip(RUN_FILES, contents, strict=True):
            (copy / name).write_bytes(content)

        def read_one(case: bytes) -> None:
            name = RUN_FILES[case[0]]
            (copy / name).write_bytes(case[1:])
            try:
                found = Run.read(copy)
                overview([found])
                assert found.training is not None and found.validations is not None
            finally:
                (copy / name).write_bytes(contents[case[0]])

        yield read_one

    return opened


def small_checkpoint(run: Path) -> dict[str, Any]:
    """Returns a run's last checkpoint with its three smallest weights and their optimizer state alone."""
    checkpoint: dict[str, Any] = torch.load(next(run.rglob("last.ckpt")), weights_only=True)
    names = sorted(checkpoint["state_dict"], key=lambda name: checkpoint["state_dict"][name].numel())[:3]
    checkpoint["state_dict"] = {name: checkpoint["state_dict"][name].clone() for name in names}
    for state in checkpoint["optimizer_states"]:
        state["state"] = {}
    return checkpoint


def _saved(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _checkpoint_cases(run: Path, marker: Path) -> st.SearchStrategy[bytes]:
    whole, evil = _saved(small_checkpoint(run)), _saved({"loops": _Evil(marker), "state_dict": {}})
    old = pickle.dumps({"loops": _Evil(marker)})
    foreign = _saved({"weights": torch.zeros(3)})
    damage = mutated([whole], ["flip", "truncate", "overwrite", "delete"])
    return st.one_of(damage, damage, mutated([evil, old, foreign], ["flip"]), st.sampled_from([evil, old, foreign]))


def _checkpoint_reader(run: Path) -> Callable[[Path], contextlib.AbstractContextManager[Read]]:
    @contextmanager
    def opened(folder: Path) -> Iterator[Read]:
        path, expected = folder / "x.ckpt", small_checkpoint(run)

        def read_one(case: bytes) -> None:
            path.write_bytes(case)
            if not is_checkpoint(path):
                return  # the command refuses it in one sentence
            check_whole(path)
            if "loops" not in read(path, record_only=True):
                return  # so it does here
            if not same(CheckpointIO().load_checkpoint(path), expected):
                raise Wrong("other numbers than were saved, and no error")

        yield read_one

    return opened
