"""Tables of results as Markdown, LaTeX and Rich: pure functions from records to text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from rich import table as rich
from rich.text import Text

from lightning_modules.run_folder import MODE_LABELS, key_label

HEADINGS = {
    "single_object": "1 obj.",
    "two_object": "2 obj.",
    "counting": "count",
    "colors": "color",
    "position": "pos.",
    "color_attr": "attr.",
    "overall": "avg.",
    "addition": "add",
    "attribute_modification": "attr.",
    "image_similarity": "image-image",
    "text_similarity": "text-image",
}
INTERVAL_NOTE = "Brackets: 95% bootstrap interval over prompts."
PAPER_NOTE = (
    "Rows marked PromptRL are that paper's (arXiv 2602.01382), for orientation only: its detector, OCR engine and "
    "sampling settings differ from ours or are unknown."
)
_TEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "\n": " ",
    **{character: f"\\{character}" for character in "_%&#${}"},
}


@dataclass(frozen=True)
class Row:
    """One line of a table.

    Args:
        label: name of the model or setting that was measured.
        scores: column -> value; None, NaN and absent ones are missing.
        source: paper that figures come from; empty marks a row of ours. Others' rows stand below ours, with the two or
            three digits that are printed there.
        intervals: column -> (low, high). Without a value it is a range, as read off a figure.
    """

    label: str
    scores: Mapping[str, float | None]
    source: str = ""
    intervals: Mapping[str, Sequence[float | None]] = field(default_factory=dict)


@dataclass(frozen=True)
class Table:
    """A table before it is rendered.

    Args:
        title: heading or caption.
        columns: keys of the rows' scores, left to right.
        rows: our rows and others', in any order.
        note: sentences below the table.
        digits: column -> decimals; else 3, or 2 where a value reaches 10.
        headings: column -> its heading; else as in `HEADINGS`, or the key with spaces.
        signed: columns whose positive values show a plus.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Row]
    note: str = ""
    digits: Mapping[str, int] = field(default_factory=dict)
    headings: Mapping[str, str] = field(default_factory=dict)
    signed: Sequence[str] = ()


# --- renderers --------------------------------------------------------------------------------------------------------


def markdown(table: Table) -> str:
    """Renders a table in GitHub's Markdown with its notes, without the title."""
    head, *rows = cells(table)
    lines = [head, ("---", *("---:" for _ in table.columns)), *rows]
    pipes = "\n".join(f"| {' | '.join(map(escape_markdown, line))} |" for line in lines)
    return "\n\n".join([pipes, *_notes(table)])


def cells(table: Table) -> list[tuple[str, ...]]:
    """Returns headings and rows as texts, the labels first."""
    rows = [row for part in _parts(table) for row in part]
    texts = [(_label(row), *(_plain(*_cell(table, row, column)) for column in table.columns)) for row in rows]
    return [("", *_headings(table)), *texts]


def latex(table: Table) -> str:
    """Renders a `table` environment for booktabs: our rows, a rule, others' rows, the notes."""
    blocks = [[("", *map(_escape_latex, _headings(table)))]]
    for part in _parts(table):
        blocks.append([])
        for row in part:
            label = _escape_latex(_label(row))
            if label.startswith(("[", "*")):  # would be an argument of the \\ or \midrule before it
                label = "{}" + label
            blocks[-1].append((label, *(_latex_cell(*_cell(table, row, column)) for column in table.columns)))
    body = "\n\\midrule\n".join("\n".join(" & ".join(cells) + r" \\" for cells in block) for block in blocks)
    lines = [
        r"\begin{table}[t]",
        r"\centering",
        rf"\caption{{{_escape_latex(table.title)}}}",
        rf"\begin{{tabular}}{{l{'r' * len(table.columns)}}}",
        r"\toprule",
        body,
        r"\bottomrule",
        r"\end{tabular}",
        *(rf"\par\smallskip{{\footnotesize {_escape_latex(note)}}}" for note in _notes(table)),
        r"\end{table}",
    ]
    return "\n".join(lines)


def report(tables: Sequence[Table]) -> tuple[str, str]:
    r"""Renders several tables as Markdown with headings, and as LaTeX for `\input`."""
    sections = [f"## {escape_markdown(table.title)}\n\n{markdown(table)}" for table in tables]
    head = r"% Needs \usepackage{booktabs} in the preamble."
    return "\n\n".join(sections) + "\n", "\n\n".join([head, *map(latex, tables)]) + "\n"


def rich_table(table: Table) -> rich.Table:
    """Renders a table for the console, without the notes."""
    shown = rich.Table(title=Text(table.title))
    shown.add_column()
    for heading in _headings(table):
        shown.add_column(Text(heading), justify="right")
    for part in _parts(table):
        for row in part:
            # Text, not str: brackets in labels are no markup
            cells = (Text(_plain(*_cell(table, row, column))) for column in table.columns)
            shown.add_row(Text(_label(row)), *cells)
        shown.add_section()
    return shown


# --- tables -----------------------------------------------------------------------------------------------------------


def benchmark_table(
    title: str,
    key: str,
    results: Mapping[str, Mapping[str, float | None]],
    intervals: Mapping[str, Mapping[str, Sequence[float | None]]],
    columns: Sequence[str],
    paper: Sequence[Row],
    label: str,
) -> Table:
    """Makes the table of one evaluation set's scores, with and without the refiner.

    Args:
        title: beginning of the table's title; may be empty.
        key: key of `results.json`: `geneval`, `geneval.typos`, `drawbench/hps`.
        results: mode -> score -> value.
        intervals: mode -> score -> (low, high).
        columns: scores to show.
        paper: rows of others.
        label: the run's name, which begins the labels of our rows.

    >>> table = benchmark_table("", "geneval", {"with_pe": {"overall": 0.61}}, {}, ("overall",), (), "run")
    >>> print(markdown(table))
    |  | avg. |
    | --- | ---: |
    | run with PE | 0.610 |
    """
    ours = [
        Row(f"{label} {MODE_LABELS.get(mode, mode)}", scores, intervals=intervals.get(mode, {}))
        for mode, scores in results.items()
    ]
    return _finished(Table(": ".join(dict.fromkeys(filter(None, (title, key_label(key))))), columns, [*ours, *paper]))


def robustness_table(title: str, results: Mapping[str, Mapping[str, Any]]) -> Table:
    """Makes a table of the scores of prompts as they are and paraphrased.

    Args:
        title: title of the table.
        results: kind of paraphrase (and mode) -> `{"prompts": number, "rejected": number of paraphrases that lost what
            the prompt asks for, "original": score, "paraphrase": score, "difference": their paired difference, "low",
            "high": its interval, "by_tag": {tag: difference}}`; what is missing stays empty.
    """
    plain = ("prompts", "rejected", "original", "paraphrase", "difference")
    tags = list(dict.fromkeys(tag for result in results.values() for tag in result.get("by_tag", {})))
    rows = []
    for kind, result in results.items():
        # prefixed, as a tag may be called like a column
        by_tag = {f"by_tag/{tag}": value for tag, value in result.get("by_tag", {}).items()}
        scores = {column: result.get(column) for column in plain} | by_tag
        rows.append(Row(kind, scores, intervals={"difference": (result.get("low"), result.get("high"))}))
    return _finished(
        Table(
            title,
            (*plain, *(f"by_tag/{tag}" for tag in tags)),
            rows,
            note="Difference: paraphrase - original, also by tag." if tags else "Difference: paraphrase - original.",
            digits={"prompts": 0, "rejected": 0},
            headings={f"by_tag/{tag}": _heading(tag) for tag in tags},
            signed=("difference", *(f"by_tag/{tag}" for tag in tags)),
        )
    )


def diversity_table(
    title: str,
    results: Mapping[str, Mapping[str, float | None]],
    intervals: Mapping[str, Mapping[str, Sequence[float | None]]],
) -> Table:
    """Makes a table of how similar the images of one prompt are.

    Args:
        title: title of the table.
        results: arm (`same_prompt`, `rewrites`, ...) -> score -> value.
        intervals: arm -> score -> (low, high).
    """
    rows = [
        Row(MODE_LABELS.get(arm, arm.replace("_", " ")), scores, intervals=intervals.get(arm, {}))
        for arm, scores in results.items()
    ]
    columns = tuple(dict.fromkeys(column for scores in results.values() for column in scores))
    return _finished(Table(title, columns, rows))


# --- parts ------------------------------------------------------------------------------------------------------------


def _finished(table: Table) -> Table:
    """Drops others' rows that have nothing in these columns, and notes what the brackets of our rows are, if any."""
    cells = {id(row): [_cell(table, row, column) for column in table.columns] for row in table.rows}
    rows = [row for row in table.rows if not row.source or any(value or ends for value, ends in cells[id(row)])]
    brackets = any(ends for row in rows if not row.source for _, ends in cells[id(row)])
    return replace(table, rows=rows, note=" ".join(filter(None, (table.note, INTERVAL_NOTE if brackets else ""))))


def _notes(table: Table) -> list[str]:
    return [note for note in (table.note, PAPER_NOTE if any(row.source for row in table.rows) else "") if note]


def _parts(table: Table) -> list[list[Row]]:
    """Returns our rows, then others'; a part without rows is left out."""
    parts = [[row for row in table.rows if not row.source], [row for row in table.rows if row.source]]
    return [part for part in parts if part]


def _label(row: Row) -> str:
    return f"{row.label} ({row.source})" if row.source else row.label


def _heading(column: str) -> str:
    return HEADINGS.get(column, column.replace("_", " "))


def _headings(table: Table) -> list[str]:
    return [table.headings.get(column) or _heading(column) for column in table.columns]


def _cell(table: Table, row: Row, column: str) -> tuple[str, tuple[str, ...]]:
    """Formats a value (empty if missing) and the two ends of its interval (none if missing)."""
    values = _finite(other.scores.get(column) for other in table.rows)
    digits = table.digits.get(column, 2 if max(map(abs, values), default=0.0) >= 10 else 3)
    sign = "+" if column in table.signed else ""

    def text(value: float) -> str:
        if row.source:  # no digits that the source does not have
            digits_known = 2 if f"{value:.3f}".endswith("0") else 3
            return f"{value:{sign}z.{digits_known}f}"
        return f"{value:{sign}z.{digits}f}"

    value = [text(value) for value in _finite([row.scores.get(column)])]
    ends = tuple(text(end) for end in _finite(row.intervals.get(column) or ()))
    return "".join(value), ends if len(ends) == 2 else ()


def _finite(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None and math.isfinite(value)]


def _plain(value: str, ends: tuple[str, ...]) -> str:
    if not ends:
        return value or "–"
    return f"{value} [{', '.join(ends)}]" if value else " to ".join(ends)


def _latex_cell(value: str, ends: tuple[str, ...]) -> str:
    if not ends:
        return _signs(value) or "--"
    if not value:
        return "--".join(map(_signs, ends))
    short = (end.replace("0.", ".", 1) if end.lstrip("+-").startswith("0.") else end for end in ends)
    return rf"{_signs(value)} {{\scriptsize [{', '.join(map(_signs, short))}]}}"


def _signs(number: str) -> str:
    """Sets a number's sign in math mode, as text would show a hyphen for a minus."""
    return f"${number[0]}${number[1:]}" if number.startswith(("-", "+")) else number


def _escape_latex(text: str) -> str:
    return "".join(_TEX.get(character, character) for character in text)


def escape_markdown(text: str) -> str:
    """Escapes a text for a cell of a Markdown table."""
    return "".join(f"\\{character}" if character in "\\|<" else character for character in text).replace("\n", " ")
