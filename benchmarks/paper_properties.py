"""Properties of base models and rewards beside what training made of them, for `paper_in_miniature`."""

from __future__ import annotations

from benchmarks.paper_modes import Comparison, comparisons
from benchmarks.paper_runs import GENEVAL, Score, Setting, Studies, contrast
from callbacks.tables import Row, Table

EARLY = 10
"""Steps that still show the untrained agents."""
COLUMNS = {
    "base": "base",
    "enhancer": "untrained PE",
    "std_flow": "std flow-only",
    "std_joint": "std PromptRL",
    "flow": "flow-only gains",
    "prompt": "prompt-only gains",
    "joint": "PromptRL gains",
    "over_best": "over the better one",
    "over_sum": "over both gains",
}


def properties_table(studies: Studies) -> Table:
    """What wording and image model can bring each on its own, how far a group spreads, and what both bring together."""
    rows = [_row(one.name, one) for one in comparisons(studies)]
    rows.append(_row("GenEval, second base", second_base(studies)))
    return Table(
        "When joint training is worth it",
        tuple(COLUMNS),
        [row for row in rows if "joint" in row.scores],
        headings=COLUMNS,
        signed=("enhancer", "flow", "prompt", "joint", "over_best", "over_sum"),
        note=(
            "Canonical prompts of the test; gains over the base without PE, of the refiners with PE. The last two "
            "columns are PromptRL's gain minus that of the better single mode, and minus the sum of theirs. Std: of "
            f"the rewards in a group, the mean of the first {EARLY} steps. Brackets: 95 % interval, drawn over seeds, "
            "noise and prompts for the scenes of the test."
        ),
    )


def second_base(studies: Studies) -> Comparison:
    """GenEval from the base models that know words, at the shared learning rates."""
    first, *_ = comparisons(studies)
    modes = {
        stem: type(mode)(mode.label, tuned={"1": studies["words_geneval"][stem]}) for stem, mode in first.modes.items()
    }
    return Comparison("geneval", GENEVAL, modes, studies["base_words_geneval"]["promptrl"])


def _row(label: str, one: Comparison) -> Row:
    base = one.score(one.base, "without_pe")
    scores = {
        "flow": one.score(one.flow, "without_pe"),
        "prompt": one.score(one.prompt, "with_pe"),
        "joint": one.score(one.joint, "with_pe"),
        "enhancer": one.score(one.base, "with_pe"),
    }
    gaps = {name: contrast((1, score), (-1, base)) for name, score in scores.items() if score.there and base.there}
    if {"flow", "prompt", "joint"} <= gaps.keys():
        better = max(("flow", "prompt"), key=lambda name: gaps[name].value)
        gaps["over_best"] = contrast((1, scores["joint"]), (-1, scores[better]))
        gaps["over_sum"] = contrast((1, scores["joint"]), (-1, scores["flow"]), (-1, scores["prompt"]), (1, base))
    values = {name: gap.value for name, gap in gaps.items()} | {"base": _value(base)}
    values |= {"std_flow": _early(one.flow), "std_joint": _early(one.joint)}
    return Row(label, values, intervals={name: (gap.low, gap.high) for name, gap in gaps.items()})


def _value(score: Score) -> float | None:
    return score.value.value if score.there else None


def _early(setting: Setting) -> float | None:
    """Mean over seeds and the first steps of a group's standard deviation."""
    found = [series.iloc[:EARLY].mean() for series in setting.curves("group/std").values()]
    return float(sum(found) / len(found)) if found else None
