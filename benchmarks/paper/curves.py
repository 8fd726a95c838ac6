"""Tables and the figure of validation curves in the report of `benchmarks.paper`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import matplotlib.pyplot as plt

from benchmarks.paper.modes import FLOW, JOINT, MODES, PLAIN, PROMPT, Comparison, comparisons
from benchmarks.paper.runs import Setting, Studies
from callbacks.reporting.tables import Row, Table
from callbacks.runs.comparison import ceiling_ratio, compare
from callbacks.runs.curves import Curves, band

STYLES = {FLOW: ("#0072B2", "-"), PROMPT: ("#E69F00", "-."), PLAIN: ("#009E73", ":"), JOINT: ("#D55E00", "--")}
"""Mode -> colour of Okabe and Ito's palette, which the colour-blind can tell apart, and line for prints in grey."""


def curves_of(comparison: Comparison) -> dict[str, Curves]:
    """Returns mode -> validation curves, of the seeds that all modes with runs have."""
    there = {label: comparison.curves(label) for label, setting in comparison.settings.items() if setting.fits}
    shared = set.intersection(*map(set, there.values())) if there else set()
    return {label: {seed: one for seed, one in curves.items() if seed in shared} for label, curves in there.items()}


def curve_sets(studies: Studies) -> dict[str, dict[str, Curves]]:
    """Returns title -> mode -> curves, for every comparison that has flow-only's; variants come last."""
    every = {one.name: one for one in comparisons(studies)}
    for study, title in (("long", "GenEval, three times as long"), ("lucky", "GenEval, lucky words")):
        settings: Mapping[str, Setting] = {label: studies[study][stem] for label, (stem, _) in MODES.items()}
        every[title] = Comparison("geneval", "", settings, {}, Setting({}, {}))
    sets = {title: curves_of(one) for title, one in every.items()}
    return {title: curves for title, curves in sets.items() if curves.get(FLOW)}


def efficiency_table(studies: Studies) -> Table:
    """Makes the table of rollouts to flow-only's best validation score, by the mean curve of the seeds (C1)."""
    rows, columns = [], ("seeds", "final", "area", "to_reference", "ratio", "most", "gap")
    for title, curves in curve_sets(studies).items():
        means = {label: band(seeds)["mean"] for label, seeds in curves.items()}
        for label, row in compare(curves, FLOW).iterrows():
            values = {name: float(row.get(name, math.nan)) for name in columns}
            values["most"] = ceiling_ratio(means[str(label)], means[FLOW], share=0.95)
            # The reference itself has no gap, and no setting has one beside it alone.
            ends = {"final": (row["low"], row["high"]), "gap": (row.get("gap_low"), row.get("gap_high"))}
            rows.append(Row(f"{title}: {label}", values, intervals=ends))
    return Table(
        "Rollouts to flow-only's best, validation",
        columns,
        rows,
        note=(
            "Rollouts to flow-only's best score, their share of its own, and the share to 95 % of its gain: on a "
            "plateau the best one comes by chance. Brackets: of the final score the range over seeds, of the gap to "
            "flow-only a 95 % interval over seeds."
        ),
        digits={"seeds": 0, "to_reference": 0, "ratio": 2, "most": 2},
        headings={"to_reference": "rollouts", "ratio": "share", "most": "to 95 %"},
        signed=("gap",),
    )


def search_table(studies: Studies) -> Table:
    """Makes the table of final validation scores by learning rates, as many runs for each mode."""
    rows, columns = [], ("1", "2", "3", "4")
    for one in comparisons(studies):
        for label, tried in one.tried.items():
            if tried:
                values = dict(zip(columns, tried.values(), strict=False))
                rows.append(Row(f"{one.name}: {label} ({'; '.join(tried)})", values))
    return Table(
        "Learning rates, last validation of seed 42",
        columns,
        rows,
        note="Parentheses: the rates in the order of the columns; of joint training the flow model's, the refiner's.",
    )


def draw_curves(studies: Studies, path: Path) -> bool:
    """Draws the paper's Figure 5: validation scores by rollouts, mean and range of the seeds, one panel a reward.

    Returns:
        False if there are no curves, and nothing was drawn.
    """
    names = [one.name for one in comparisons(studies)]
    sets = {title: curves for title, curves in curve_sets(studies).items() if title in names}
    if not sets:
        return False
    figure, axes = plt.subplots(
        1, len(sets), figsize=(3.6 * len(sets) + 0.6, 3.6), squeeze=False, sharey=True, layout="constrained"
    )
    for axis, (title, curves) in zip(axes.flat, sets.items(), strict=True):
        for label, seeds in curves.items():
            table, (color, line) = band(seeds), STYLES[label]
            axis.plot(table.index, table["mean"], line, marker="o", markersize=3, label=label, color=color)
            axis.fill_between(table.index, table["low"], table["high"], alpha=0.15, color=color, linewidth=0)
        axis.set(title=f"{title} ({len(curves[FLOW])} seeds)", xlabel="rollouts")
        axis.grid(axis="y", alpha=0.3)
    axes[0, 0].set_ylabel("score of validation prompts")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)
    return True
