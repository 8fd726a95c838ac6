"""Table of the gains of single modes and of joint training, in the report of `benchmarks.paper`."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.paper.modes import FLOW, JOINT, PROMPT, Comparison, comparisons, other_bases
from benchmarks.paper.runs import Studies, contrast, shared_seeds
from callbacks.reporting.tables import Row, Table

EARLY = 10
"""Number of first steps whose rollouts still show the untrained agents."""
COLUMNS = {
    "base": "base",
    "enhancer": "untrained PE",
    "flow": "flow-only",
    "prompt": "prompt-only",
    "joint": "PromptRL",
    "over_best": "over the better one",
    "over_sum": "over both",
    "alike_flow": "alike, flow-only",
    "alike_joint": "alike, PromptRL",
}


def properties_table(studies: Studies) -> Table:
    """Makes the table of gains of each mode over the base, and of how similar the images of a group are."""
    every = {one.name: one for one in comparisons(studies)}
    every |= {f"GenEval, {label}": one for label, one in other_bases(studies).items()}
    rows = [_row(label, one) for label, one in every.items()]
    return Table(
        "When joint training is worth it",
        tuple(COLUMNS),
        [row for row in rows if row is not None],
        headings=COLUMNS,
        signed=("enhancer", "flow", "prompt", "joint", "over_best", "over_sum"),
        note=(
            "Canonical prompts of the test; parentheses: seeds, those that all modes have. Gains over the base without "
            "PE; those of the refiners with PE; PromptRL's gain minus that of the better single mode, and minus the "
            f"sum of theirs. Alike: cosine of two images of a group, by pixels, in the first {EARLY} steps. "
            "Brackets: 95 % interval for other seeds, noise and prompts of the test's scenes."
        ),
    )


def _row(label: str, one: Comparison) -> Row | None:
    """Makes a comparison's row, of the seeds that all modes have; None without any, or without a test of the base."""
    trained = {"flow": one.score(FLOW), "prompt": one.score(PROMPT), "joint": one.score(JOINT)}
    base, seeds = one.untrained("without_pe"), shared_seeds(*trained.values())
    if not base.there or not seeds or not all(score.there for score in trained.values()):
        return None
    trained = {name: replace(score, setting=score.setting.only(seeds)) for name, score in trained.items()}
    scores = trained | {"enhancer": one.untrained("with_pe")}
    gaps = {name: contrast((1, score), (-1, base)) for name, score in scores.items() if score.there}
    flow, prompt, joint = trained.values()
    better = max((flow, prompt), key=lambda score: score.value.value)
    gaps["over_best"] = contrast((1, joint), (-1, better))
    gaps["over_sum"] = contrast((1, joint), (-1, flow), (-1, prompt), (1, base))
    values = {"base": base.value.value} | {name: gap.value for name, gap in gaps.items()}
    for name, score in (("alike_flow", flow), ("alike_joint", joint)):
        curves = score.setting.curves("group/image_similarity").values()
        early = [float(series.iloc[:EARLY].mean()) for series in curves]
        values |= {name: sum(early) / len(early)} if early else {}
    return Row(f"{label} ({len(seeds)})", values, intervals={name: (gap.low, gap.high) for name, gap in gaps.items()})
