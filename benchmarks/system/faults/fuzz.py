"""Fuzzing: hypothesis makes hostile bytes from real ones, and a reader must refuse them in one sentence or be right."""

from __future__ import annotations

import random
import signal
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from benchmarks.system.faults.outcome import Outcome, Tick
from lightning_modules.cli.errors import raised_by_us

LIMIT = 5
"""Seconds after which a case counts as hanging."""
LONGEST = 2000
"""Longest error message, in characters."""
TOKENS = (
    *(b"\0", b"\xff", b"\xef\xbb\xbf", b"\xff\xfe", b"\xed\xa0\x80", b"\\ud800", b"\r\n", b"\t", b"\n", b"../../../x"),
    *(b"null", b"true", b"NaN", b"-Infinity", b"1e999", b"-0", b"0.1", b"9" * 5000, b"1" * 30, b"0x1f", b"2024-13-01"),
    *(b'"', b"'", b"{", b"}", b"[", b"]", b":", b",", b"#", b"&a ", b"*a", b"? ", b"- ", b"|", b"%", b"!!", b"${"),
    *(b"[" * 100_000, b'{"a":' * 50_000, b"{}", b"[]", b'""', b"http://user:secret@host/", b"${oc.env:HOME}"),
    *(b"!!int ''", b"!!python/object/apply:os.system", b"<<: *a", b"a: &a [*a]", b"${eval:1}"),
)
"""Pieces that are put into the bytes."""

Read = Callable[[bytes], object]
"""Reads one case; returns if the result is right, raises `Wrong` if it is not, or the reader's own error."""


class Wrong(Exception):
    """A result that is not right, or an error that says too little."""


class Hang(BaseException):
    """Raised by the alarm after `LIMIT` seconds; no reader may catch it."""


EDITS = ("insert", "overwrite", "delete", "truncate", "repeat", "flip")


def edited(base: bytes, draws: random.Random, kinds: Sequence[str] = EDITS) -> bytes:
    """Makes one to four edits at random places.

    Args:
        base: a whole file.
        draws: generator of places and pieces.
        kinds: edits to choose from.
    """
    for _ in range(draws.randint(1, 4)):
        kind = draws.choice(kinds)
        low, high = sorted(draws.randrange(len(base) + 1) for _ in range(2))
        token = draws.choice(TOKENS) if draws.random() < 0.7 else draws.randbytes(draws.randint(1, 6))
        if kind == "insert":
            base = base[:low] + token + base[low:]
        elif kind == "overwrite":
            base = base[:low] + token + base[low + len(token) :]
        elif kind == "delete":
            base = base[:low] + base[high:]
        elif kind == "truncate":
            base = base[:low]
        elif kind == "repeat":
            base = base[:high] + base[low:high] + base[high:]
        elif low < len(base):  # flip
            base = base[:low] + bytes([base[low] ^ 1 << draws.randrange(8)]) + base[low + 1 :]
    return base


def mutated(seeds: Sequence[bytes], kinds: Sequence[str] = EDITS) -> st.SearchStrategy[bytes]:
    """Makes a strategy of whole files with some edits; see `edited`.

    Hypothesis draws two numbers a case: that it draws each edit makes fuzzing five times as long.
    """
    number = st.integers(0, 2**64)
    return st.builds(lambda base, chosen: edited(base, random.Random(chosen), kinds), st.sampled_from(seeds), number)


def any_bytes() -> st.SearchStrategy[bytes]:
    """Makes a strategy of bytes and texts that are like no file."""
    text = st.text(st.characters(codec=None), max_size=200).map(lambda one: one.encode("utf-8", "surrogatepass"))
    return st.one_of(st.binary(max_size=200), text)


@contextmanager
def alarm() -> Iterator[None]:
    """Context manager: raises `Hang` when its block takes too long; in the main thread alone."""

    def ring(*_: object) -> None:
        raise Hang(f"over {LIMIT} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, LIMIT)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def loss(read: Read, case: bytes, names: str = "") -> str | None:
    """Reads a case; returns what is wrong with the way it was read, None if nothing is.

    Args:
        read: the reader.
        case: its input.
        names: what the message of a refusal must hold, such as the file's name.
    """
    try:
        with alarm():
            read(case)
    except (Wrong, Hang) as error:
        return f"{type(error).__name__}: {error}"
    except (Exception, SystemExit) as error:  # anything but our own ValueError is what is looked for
        ours = raised_by_us(error)
        if ours is None:
            return f"{type(error).__name__} from {_place(error)}"
        if names not in str(ours) or len(str(ours)) > LONGEST:
            return f"a message without {names!r} or of over {LONGEST} characters: {str(ours)[:100]}"
    return None


def _place(error: BaseException) -> str:
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    return "nowhere" if frame is None else f"{frame.tb_frame.f_globals.get('__name__')}:{frame.tb_lineno}"


def fuzz(
    name: str,
    cases: st.SearchStrategy[bytes],
    reader: AbstractContextManager[Read],
    number: int,
    tick: Tick,
    *,
    names: str = "",
    marker: Path | None = None,
    kept: Path | None = None,
    start: int = 0,
) -> Outcome:
    """Reads many cases.

    Args:
        name: name of the surface.
        cases: strategy of its input.
        reader: opens the reader.
        number: how many cases.
        tick: called after each.
        names: see `loss`.
        marker: folder that exists once code of an input has run.
        kept: folder for the first case of each kind of loss.
        start: seed of hypothesis.
    """
    outcome, began = Outcome(f"fuzz: {name}"), time.perf_counter()

    def attack(read: Read, case: bytes) -> None:
        found = loss(read, case, names)
        if marker is not None and marker.exists():
            marker.rmdir()
            found = "code of the input was run"
        if found is not None and found not in outcome.notes and kept is not None:
            kept.mkdir(parents=True, exist_ok=True)
            path = kept / f"{name.replace(' ', '_')}-{len(outcome.notes)}"
            path.write_bytes(case)
            outcome.add([(found, f"{str(path)}, which is {_shown(case)}")])
        else:
            outcome.add([] if found is None else [(found, _shown(case))])
        tick()

    def attack_all(read: Read) -> None:
        # A surface of few different cases ends early: hypothesis does not repeat them.
        chosen: Any = given(cases)(lambda case: attack(read, case))
        quick = settings(
            max_examples=number, phases=[Phase.generate], deadline=None, database=None,
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        seed(start)(quick(chosen))()

    with reader as read, warnings.catch_warnings(action="ignore"):
        attack_all(read)
    outcome.seconds = time.perf_counter() - began
    return outcome


def _shown(case: bytes) -> str:
    return repr(case) if len(case) <= 120 else f"{case[:80]!r} and so on, {len(case)} bytes"
