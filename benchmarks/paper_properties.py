"""What the single modes gain beside what joint training gains, for `paper_in_miniature`."""

from __future__ import annotations

from benchmarks.paper_modes import FLOW, JOINT, PROMPT, Comparison, comparisons, other_bases
from benchmarks.paper_runs import Studies, contrast, shared_seeds
from callbacks.tables import Row, Table

EARLY = 10
"""Steps that still show the untrained agents."""
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
    """What wording and image model can bring each on its own, what both bring together, how alike a group's are."""
    rows = [_row(one.name, one) for one in comparisons(studies)]
    rows += [_row(f"GenEval, {label}", one) for label, one in other_bases(studies).items()]
    return Table(
        "When joint training is worth it",
        tuple(COLUMNS),
        [row for row in rows if "joint" in row.scores],
        headings=COLUMNS,
        signed=("enhancer", "flow", "prompt", "joint", "over_best", "over_sum"),
        note=(
            "Canonical prompts of the test: gains over the base without PE; those of the refiners with PE; PromptRL's "
            "gain minus that of the better single mode, and minus the sum of theirs. Alike: cosine of two pictures of "
            f"a group, by pixels, in the first {EARLY} steps. Brackets: 95 % interval for other seeds, noise and "
            "prompts of the test's scenes."
        ),
    )


def _row(label: str, one: Comparison) -> Row:
    base = one.untrained("without_pe")
    flow, prompt, joint = one.score(FLOW), one.score(PROMPT), one.score(JOINT)
    scores = {"flow": flow, "prompt": prompt, "joint": joint, "enhancer": one.untrained("with_pe")}
    gaps = {name: contrast((1, score), (-1, base)) for name, score in scores.items() if score.there and base.there}
    if {"flow", "prompt", "joint"} <= gaps.keys() and shared_seeds(flow, prompt, joint):
        better = max((flow, prompt), key=lambda score: score.value.value)
        gaps["over_best"] = contrast((1, joint), (-1, better))
        gaps["over_sum"] = contrast((1, joint), (-1, flow), (-1, prompt), (1, base))
    values = {name: gap.value for name, gap in gaps.items()}
    values |= {"base": base.value.value} if base.there else {}
    for name, arm in (("alike_flow", FLOW), ("alike_joint", JOINT)):
        curves = one.arms[arm].setting.curves("group/image_similarity").values()
        early = [float(series.iloc[:EARLY].mean()) for series in curves]
        values |= {name: sum(early) / len(early)} if early else {}
    return Row(label, values, intervals={name: (gap.low, gap.high) for name, gap in gaps.items()})
