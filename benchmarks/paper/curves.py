"""Tables and the figure of validation curves in the report of `benchmarks.paper`."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt

from benchmarks.paper.modes import ARMS, FACTORS, FLOW, JOINT, PLAIN, PROMPT, comparisons, geneval_arms, other_bases
from benchmarks.paper.runs import PROBED, Setting, Studies
from callbacks.reporting.tables import Row, Table
from callbacks.runs.comparison import ceiling_ratio, compare
from callbacks.runs.curves import Curves, band


def curves_of(settings: Mapping[str, Setting], reward: str) -> dict[str, Curves]:
    """Returns arm -> validation curves by a reward, of the seeds that all arms have."""
    there = {label: setting for label, setting in settings.items() if setting.fits}
    shared = set.intersection(*(set(setting.fits) for setting in there.values())) if there else set()
    return {
        label: setting.only(sorted(shared)).curves(f"val/{reward}/{ARMS[label][1]}") for label, setting in there.items()
    }


def curve_sets(studies: Studies) -> dict[str, dict[str, Curves]]:
    """Returns title -> arm -> curves, for every comparison that has some."""
    sets = {}
    for one in comparisons(studies):
        sets[one.name] = curves_of({label: arm.runs["1"] for label, arm in one.arms.items()}, one.reward)
        if any(arm.factor != "1" for arm in one.arms.values()):
            sets[f"{one.name}, best rates"] = curves_of(one.settings, one.reward)
    others = {label: one.settings for label, one in other_bases(studies).items()}
    others["three times as long"] = geneval_arms(studies["long"])
    for label, settings in others.items():
        curves = curves_of(settings, "geneval")
        if JOINT in curves:
            sets[f"GenEval, {label}"] = curves
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
    """Makes the table of final validation scores by learning rate, the same factors for each mode."""
    rows = [
        Row(f"{one.name}: {arm.label}", arm.searched)
        for one in comparisons(studies)
        for arm in one.arms.values()
        if len(arm.searched) > 1
    ]
    headings = {factor: f"{factor} x" for factor in FACTORS}
    return Table("Learning rates, last validation of seed 42", FACTORS, rows, headings=headings)


def sensitivity_table(studies: Studies) -> Table:
    """Makes the table of how settings change the comparison of flow-only with PromptRL, on validation."""
    rows: list[Row] = []
    for label, settings in _varied(studies).items():
        compared = {name: setting for name, setting in settings.items() if name != PROMPT}
        curves = curves_of(compared, "geneval")
        if not {FLOW, JOINT} <= curves.keys() or not curves[FLOW]:
            continue
        table = compare(curves, FLOW)
        ends = {name: (table.loc[name, "low"], table.loc[name, "high"]) for name in curves}
        values = {name: table.loc[name, "final"] for name in curves}
        for column, scored in (("gap", curves), ("unseen", curves_of(compared, "unseen"))):
            gaps = [float(series.iloc[-1] - scored[FLOW][seed].iloc[-1]) for seed, series in scored[JOINT].items()]
            values[column], ends[column] = math.fsum(gaps) / len(gaps), (min(gaps), max(gaps))
        values["ratio"] = ceiling_ratio(band(curves[JOINT])["mean"], band(curves[FLOW])["mean"], share=0.95)
        rows.append(Row(f"{label} ({len(curves[FLOW])})", values, intervals=ends))
    headings = {"gap": "with PE - flow-only", "unseen": "the same, unseen wording", "ratio": "share"}
    return Table(
        "What it depends on, GenEval, validation",
        (FLOW, PLAIN, JOINT, *headings),
        rows,
        note=(
            "Parentheses: number of seeds; brackets: their range. Share: of flow-only's rollouts to 95 % of its gain, "
            "that PromptRL with PE needs (0: it begins there, with an untrained refiner). Elsewhere a group has 8 "
            "samples, 3 of 8 steps are SDE steps, noise is 0.8, and 960 prompts are drawn, about 170 distinct ones."
        ),
        digits={"ratio": 2},
        headings=headings,
        signed=("gap", "unseen"),
    )


def _varied(studies: Studies) -> dict[str, Mapping[str, Setting]]:
    """Returns changed setting -> arm -> runs; first the unchanged ones, by all seeds and by those the others have."""
    found: dict[str, dict[str, Setting]] = {}
    for name in studies:
        if name.startswith("sensitivity"):
            for setting in studies[name].settings:
                stem, _, value = setting.partition("-")
                words = re.sub(r"_|(?<=[a-z])(?=\d)", " ", value)  # a sweep's name of a value: `noise_level0.4`
                runs = {label: studies[name][setting] for label, (own, _) in ARMS.items() if own == stem}
                found.setdefault(words, {}).update(runs)
    usual = geneval_arms(studies["geneval"])
    return {
        "as elsewhere": usual,
        "as elsewhere, seeds 42 to 44": {label: setting.only(PROBED) for label, setting in usual.items()},
        **dict(sorted(found.items(), key=lambda item: _by_number(item[0]))),
        **{label: one.settings for label, one in other_bases(studies).items()},
    }


def _by_number(label: str) -> tuple[str, float]:
    """Returns a sort key that puts `group 4` before `group 16`."""
    name, _, number = label.rpartition(" ")
    return (name, float(number)) if re.fullmatch(r"[\d.]+", number) else (label, 0.0)


def draw_curves(studies: Studies, path: Path) -> bool:
    """Draws the paper's Figure 5: validation scores by rollouts, mean and range of the seeds.

    Returns:
        False if there are no curves, and nothing was drawn.
    """
    sets = curve_sets(studies)
    if not sets:
        return False
    across = min(3, len(sets))
    down = -(-len(sets) // across)
    figure, axes = plt.subplots(down, across, figsize=(4.5 * across, 3.4 * down), squeeze=False, layout="constrained")
    colors = dict(zip(ARMS, mpl.color_sequences["tab10"], strict=False))
    for axis in axes.flat[len(sets) :]:
        axis.set_axis_off()
    for axis, (title, curves) in zip(axes.flat, sets.items(), strict=False):
        for label, seeds in curves.items():
            table = band(seeds)
            axis.plot(table.index, table["mean"], marker="o", markersize=3, label=label, color=colors[label])
            axis.fill_between(table.index, table["low"], table["high"], alpha=0.15, color=colors[label], linewidth=0)
        counts = "-".join(map(str, sorted({len(seeds) for seeds in curves.values()})))
        axis.set(title=f"{title} ({counts} seeds)", xlabel="rollouts")
    for row in axes:
        row[0].set_ylabel("held-out score")
    axes[0, 0].legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90, metadata={"Software": None})
    plt.close(figure)
    return True
