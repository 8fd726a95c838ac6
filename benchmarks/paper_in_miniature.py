"""The whole paper in the miniature: runs every study, then writes one report in the layout of the paper's tables.

    python -m benchmarks.paper_in_miniature --processes 2

Every study is a sweep in `configs/sweeps/paper/` (`python -m lightning_modules.sweep --config ...` runs one alone). The
same command goes on where it was cut off; what is finished is skipped. `--report-only` writes the report of what is
there. Intervals in brackets are 95 % over prompts (a bootstrap within tags, the same prompts for all seeds and models);
ranges in parentheses are over seeds.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt

from benchmarks.paper_claims import SWAPPED, verdicts
from benchmarks.paper_runs import GENEVAL, REWARDS, Score, Setting, Studies, contrast, merged, span
from callbacks import paper
from callbacks.comparison import compare
from callbacks.curves import Curves, band
from callbacks.tables import Row, Table, markdown
from datamodules.shapes_world import TAGS
from lightning_modules.sweep import read, sweep

PLANS = Path("configs/sweeps/paper")
ORDER = (
    "base",
    "geneval",
    "geneval_more_seeds",
    "base_words",
    "ocr",
    "preference",
    "words_geneval",
    "words_geneval_flow_only",
    "multi_reward",
    "retention",
    "long",
    "swap",
    "transfer",
    "search_geneval",
    "search_ocr",
    "search_preference",
)
"""What the studies of swaps need stands before them; others that lie in the folder come last, by name."""
LABELS = {"promptrl": "PromptRL", "flow_only": "flow-only", "prompt_only": "prompt-only"}
PE = {"without_pe": "without PE", "with_pe": "with PE"}
WORDINGS = ("unseen", "geneval.synonyms", "geneval.terse", "geneval.gallery", "geneval.template", "geneval.detailed")


def arms(settings: Mapping[str, Setting], base: Setting, prefix: str = "") -> dict[str, tuple[Setting, str]]:
    """Label -> setting and mode, in the order of the tables; those with nothing tested are left out."""
    named = {
        "base": (base, "without_pe"),
        "base with the untrained PE": (base, "with_pe"),
        "flow-only": (settings.get(f"{prefix}flow_only"), "without_pe"),
        "prompt-only with PE": (settings.get(f"{prefix}prompt_only"), "with_pe"),
        "PromptRL without PE": (settings.get(f"{prefix}promptrl"), "without_pe"),
        "PromptRL with PE": (settings.get(f"{prefix}promptrl"), "with_pe"),
    }
    return {label: (setting, mode) for label, (setting, mode) in named.items() if setting and setting.tests}


def _score_row(label: str, scores: Mapping[str, Score]) -> Row:
    """Columns of one setting; the range over seeds of the last one stands beside its name."""
    there = {column: score for column, score in scores.items() if score.there}
    ranges = span(next(reversed(there.values())).by_seed) if there else ""
    gaps = {column: score.value for column, score in there.items()}
    return Row(
        f"{label} ({ranges})" if ranges else label,
        {column: gap.value for column, gap in gaps.items()},
        intervals={column: (gap.low, gap.high) for column, gap in gaps.items()},
    )


# --- tables -----------------------------------------------------------------------------------------------------------


def geneval_table(studies: Studies) -> Table:
    """The paper's main results, GenEval by tag."""
    rows = []
    for label, (setting, mode) in arms(studies["geneval"].settings, studies["base"]["promptrl"]).items():
        score = Score(setting, "geneval", mode)
        if score.there:
            row = _score_row(label, {"overall": score})
            rows.append(replace(row, scores={**score.by_tag, **row.scores}))
    return Table(
        "GenEval, canonical prompts of fresh scenes", (*TAGS, "overall"), [*rows, *paper.paper_rows("geneval")]
    )


def wording_table(studies: Studies) -> Table:
    """The paper's Table 1: what other wordings, and an untrained refiner in front, change."""
    rows = []
    for label, (tested, mode) in arms(studies["geneval"].settings, studies["base"]["promptrl"]).items():
        setting = tested.having("geneval.static_pe", "without_pe")
        original = Score(setting, "geneval", mode)
        gaps = {}
        # The untrained refiner replaces a run's own, so it has no other mode.
        for name in ("geneval.static_pe", *WORDINGS):
            other = Score(setting, name, "without_pe" if name.endswith("static_pe") else mode)
            if original.there and other.there:
                gaps[name] = contrast((1, other), (-1, original))
        if gaps:
            intervals = {name: (gap.low, gap.high) for name, gap in gaps.items()}
            values = {name: gap.value for name, gap in gaps.items()}
            rows.append(Row(label, {"original": original.value.value} | values, intervals=intervals))
    columns = ("geneval.static_pe", *WORDINGS)
    headings = {name: name.removeprefix("geneval.").replace("static_pe", "untrained PE") for name in columns}
    title = "Other wordings minus the original, GenEval (the paper's Table 1)"
    return Table(title, ("original", *columns), rows, headings=headings, signed=columns)


def rewards_table(studies: Studies) -> Table:
    """OCR and preference, single reward each, canonical and unseen wording."""
    rows = []
    for reward, benchmark in REWARDS.items():
        for label, (setting, mode) in arms(
            studies[reward].settings, studies["base_words"][f"{reward}_promptrl"], f"{reward}_"
        ).items():
            own = {name: Score(setting, name, mode, benchmark) for name in ("unseen", reward)}
            row = _score_row(f"{reward}: {label}", own)
            if row.scores:
                shown = {"canonical" if column == reward else column: value for column, value in row.scores.items()}
                ends = {"canonical" if column == reward else column: value for column, value in row.intervals.items()}
                rows.append(replace(row, scores=shown, intervals=ends))
    return Table("The other rewards, single", ("canonical", "unseen"), rows)


def multi_reward_table(studies: Studies) -> Table:
    """Three rewards by tags against one each, from the same base models and with as many rollouts for each."""
    columns = {"geneval": GENEVAL, **REWARDS}
    base = studies["base_words"]["multi_reward_promptrl"]
    rows = []
    for label, mode in (("base", "without_pe"), ("base with the untrained PE", "with_pe")):
        rows.append(_score_row(label, {name: Score(base, name, mode, title) for name, title in columns.items()}))
    for stem, modes in (("flow_only", ["without_pe"]), ("prompt_only", ["with_pe"]), ("promptrl", list(PE))):
        for mode in modes:
            single = {
                "geneval": Score(studies["words_geneval"][stem], "geneval", mode),
                **{name: Score(studies[name][f"{name}_{stem}"], name, mode, title) for name, title in REWARDS.items()},
            }
            setting = studies["multi_reward"][f"multi_reward_{stem}"]
            tagged = {name: Score(setting, name, mode, title) for name, title in columns.items()}
            suffix = "" if stem == "flow_only" else f" {PE[mode]}"
            rows.append(_score_row(f"{LABELS[stem]}{suffix}, one reward each", single))
            rows.append(_score_row(f"{LABELS[stem]}{suffix}, rewards by tags", tagged))
    rows = [row for row in rows if row.scores]
    return Table("Several rewards by tags", tuple(columns), [*rows, *paper.multi_reward_rows()])


def retention_table(studies: Studies) -> Table:
    """GenEval by the number of retained prompts."""
    found = {m: studies["retention"][f"promptrl-num_retained{m}"] for m in (0, 1, 4)}
    found[2] = studies["geneval"]["promptrl"].only(SWAPPED)
    rows = []
    for m in sorted(found):
        scores = {mode: Score(found[m], "geneval", mode) for mode in ("with_pe", "without_pe")}
        row = _score_row(f"m = {m}", scores)
        if row.scores:
            rows.append(row)
    others = [replace(row, scores={"without_pe": row.scores["overall"]}) for row in paper.retention_rows()]
    return Table("Prompt retention (n = 8), GenEval", tuple(PE), [*rows, *others], headings=PE)


def swap_table(studies: Studies) -> Table:
    """Another refiner in front of PromptRL's and flow-only's flow model, and of a second flow model."""
    joint, flow = (studies["geneval"][name].only(SWAPPED) for name in ("promptrl", "flow_only"))
    swapped = merged(studies["swap"].settings.values())
    shown = {
        "PromptRL with its refiner": Score(joint, "geneval", "with_pe"),
        "PromptRL with another seed's refiner": Score(swapped, "geneval", "with_pe"),
        "PromptRL with the untrained refiner": Score(joint, "geneval.static_pe", "without_pe"),
        "flow-only": Score(flow, "geneval", "without_pe"),
        "flow-only with the untrained refiner": Score(flow, "geneval.static_pe", "without_pe"),
    }
    fresh, trained = studies.transfers()
    shown |= {
        "second flow model": Score(fresh, "geneval", "without_pe"),
        "second flow model with the untrained refiner": Score(fresh, "geneval", "with_pe"),
        "second flow model with PromptRL's refiner": Score(trained, "geneval", "with_pe"),
        "second flow model with a refiner trained for it": Score(
            studies["words_geneval"]["prompt_only"], "geneval", "with_pe"
        ),
    }
    rows = [_score_row(label, {"overall": score}) for label, score in shown.items() if score.there]
    title = "Swapped and transferred refiners, GenEval (the paper's Table 8)"
    return Table(title, ("overall",), [*rows, *paper.lm_swap_rows(), *paper.refiner_transfer_rows()])


def diversity_table(studies: Studies) -> Table:
    """Cosine of two pictures of a group (the paper's Figure 2), by pixels."""
    rows = []
    for label, (setting, _) in arms(studies["geneval"].settings, studies["base"]["promptrl"]).items():
        if label in ("base with the untrained PE", "PromptRL without PE"):
            continue
        found = [
            run.results["diversity_pixels"]["geneval"]
            for run in setting.tests.values()
            if "diversity_pixels" in run.results
        ]
        arms_of = [arm for arm in ("same_prompt", "rewrites", "rewrites_shared_noise") if found and arm in found[0]]
        means = {arm: sum(one[arm]["image_similarity"] for one in found) / len(found) for arm in arms_of}
        if means:
            rows.append(Row(label.replace(" with PE", ""), means))
    return Table(
        "Cosine of two pictures of a prompt, by pixels (the paper's Figure 2)",
        ("same_prompt", "rewrites", "rewrites_shared_noise"),
        rows,
    )


def curves_of(studies: Studies, reward: str, root: str | None = None, prefix: str = "") -> dict[str, Curves]:
    """The validation curves of a reward's three modes, with PE where there is a refiner."""
    study = studies[root or reward]
    found = {}
    for stem, mode in (
        ("flow_only", "without_pe"),
        ("prompt_only", "with_pe"),
        ("promptrl", "without_pe"),
        ("promptrl", "with_pe"),
    ):
        setting = study[f"{prefix}{stem}"]
        if setting.fits:
            label = LABELS[stem] if stem == "flow_only" else f"{LABELS[stem]} {PE[mode]}"
            found[label] = setting.curves(f"val/{reward}/{mode}")
    return found


def curve_sets(studies: Studies) -> dict[str, dict[str, Curves]]:
    """Title -> curves, of every reward that has any."""
    sets = {
        "GenEval": curves_of(studies, "geneval"),
        "OCR": curves_of(studies, "ocr", prefix="ocr_"),
        "preference": curves_of(studies, "preference", prefix="preference_"),
        "GenEval, second base": curves_of(studies, "geneval", "words_geneval"),
        "GenEval, three times as long": curves_of(studies, "geneval", "long"),
    }
    return {title: curves for title, curves in sets.items() if "flow-only" in curves}


def efficiency_table(studies: Studies) -> Table:
    """Rollouts to flow-only's best validation score, by the mean curve of the seeds (C1)."""
    rows, columns = [], ("seeds", "final", "area", "to_reference", "ratio", "gap")
    for title, curves in curve_sets(studies).items():
        for label, row in compare(curves, "flow-only").iterrows():
            values = {name: float(row.get(name, math.nan)) for name in columns}
            # The reference itself has no gap, and no setting has one beside it alone.
            ends = {"final": (row["low"], row["high"]), "gap": (row.get("gap_low"), row.get("gap_high"))}
            rows.append(Row(f"{title}: {label}", values, intervals=ends))
    return Table(
        "Rollouts to flow-only's best, validation",
        columns,
        rows,
        note="Brackets: of the final score the range over seeds, of the gap to flow-only a 95 % interval over seeds.",
        digits={"seeds": 0, "to_reference": 0, "ratio": 2},
        headings={"to_reference": "rollouts to flow-only's best", "ratio": "of flow-only's own"},
        signed=("gap",),
    )


def search_table(studies: Studies) -> Table:
    """Final validation scores of the learning rates tried, seed 42; the same factors for each mode."""
    rows = []
    factors = ("0.5", "1", "2")
    for reward, prefix in (("geneval", ""), ("ocr", "ocr_"), ("preference", "preference_")):
        for stem, mode in (("flow_only", "without_pe"), ("prompt_only", "with_pe"), ("promptrl", "with_pe")):
            finals = {}
            for factor in factors:
                setting = (
                    studies[reward][f"{prefix}{stem}"].only([42])
                    if factor == "1"
                    else studies[f"search_{reward}"][f"{prefix}{stem}-lr{factor}"]
                )
                if setting.fits:
                    (series,) = setting.curves(f"val/{reward}/{mode}").values()
                    finals[factor] = float(series.iloc[-1])
            if len(finals) > 1:
                rows.append(Row(f"{reward}: {LABELS[stem]}", finals))
    headings = {factor: f"{factor} x" for factor in factors}
    return Table("Learning rates, last validation of seed 42", factors, rows, headings=headings)


def long_table(studies: Studies) -> Table:
    """Three times the rollouts against as many as elsewhere (the paper's Table 9 gives flow-only twice as many)."""
    rows = []
    base = studies["base"]["promptrl"]
    for name, settings in (
        ("7,680", {stem: studies["geneval"][stem].only(SWAPPED) for stem in LABELS}),
        ("23,040", studies["long"].settings),
    ):
        for label, (setting, mode) in arms(settings, base).items():
            if label.startswith("base"):
                continue
            scores = {kind: Score(setting, kind, mode) for kind in ("unseen", "geneval.synonyms", "geneval")}
            row = _score_row(f"{label}, {name} rollouts", scores)
            if row.scores:
                rows.append(row)
    return Table(
        "Longer training, GenEval",
        ("geneval", "unseen", "geneval.synonyms"),
        rows,
        headings={"geneval": "canonical", "geneval.synonyms": "synonyms"},
    )


def sensitivity_table(studies: Studies) -> Table:
    """What the comparison of flow-only with PromptRL depends on, validation."""
    rows, columns = [], ("flow_only", "promptrl", "promptrl_with_pe", "ratio")
    found = {"as elsewhere": studies["geneval"].settings}
    for name in studies:
        if name.startswith("sensitivity"):
            for setting in studies[name].settings:
                stem, _, label = setting.partition("-")
                found[label] = found.get(label, {}) | {stem: studies[name][setting]}
    found["second base"] = studies["words_geneval"].settings
    for label, settings in found.items():
        if not all(stem in settings and settings[stem].fits for stem in ("flow_only", "promptrl")):
            continue
        shared = sorted(set(settings["flow_only"].fits) & set(settings["promptrl"].fits))
        curves = {
            "flow_only": settings["flow_only"].only(shared).curves("val/geneval/without_pe"),
            "promptrl": settings["promptrl"].only(shared).curves("val/geneval/without_pe"),
            "promptrl_with_pe": settings["promptrl"].only(shared).curves("val/geneval/with_pe"),
        }
        table = compare(curves, "flow_only")
        ends = {name: (table.loc[name, "low"], table.loc[name, "high"]) for name in curves}
        values = {name: table.loc[name, "final"] for name in curves}
        values["ratio"] = table.loc["promptrl_with_pe", "ratio"]
        rows.append(Row(f"{label} ({len(shared)} seeds)", values, intervals=ends))
    return Table(
        "What it depends on, GenEval, validation",
        columns,
        rows,
        note="Brackets: the range over seeds. Share: of flow-only's rollouts to its best, that PromptRL with PE needs.",
        digits={"ratio": 2},
        headings={
            "flow_only": "flow-only",
            "promptrl": "PromptRL without PE",
            "promptrl_with_pe": "PromptRL with PE",
            "ratio": "share",
        },
    )


TABLES: tuple[Callable[[Studies], Table], ...] = (
    geneval_table,
    wording_table,
    rewards_table,
    efficiency_table,
    multi_reward_table,
    retention_table,
    swap_table,
    long_table,
    diversity_table,
    search_table,
    sensitivity_table,
)


# --- the report -------------------------------------------------------------------------------------------------------


def draw_curves(studies: Studies, path: Path) -> bool:
    """The paper's Figure 5: validation scores by rollouts, mean and range of the seeds; false without any."""
    sets = curve_sets(studies)
    if not sets:
        return False
    figure, axes = plt.subplots(1, len(sets), figsize=(4.5 * len(sets), 3.6), squeeze=False, layout="constrained")
    colors = dict(
        zip(
            ("flow-only", "prompt-only with PE", "PromptRL without PE", "PromptRL with PE"),
            mpl.color_sequences["tab10"],
            strict=False,
        )
    )
    for axis, (title, curves) in zip(axes[0], sets.items(), strict=True):
        for label, seeds in curves.items():
            table = band(seeds)
            axis.plot(table.index, table["mean"], marker="o", markersize=3, label=label, color=colors[label])
            axis.fill_between(table.index, table["low"], table["high"], alpha=0.15, color=colors[label], linewidth=0)
        counts = {len(seeds) for seeds in curves.values()}
        axis.set(title=f"{title} ({min(counts)}-{max(counts)} seeds)", xlabel="rollouts")
    axes[0, 0].set_ylabel("held-out score")
    axes[0, 0].legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90, metadata={"Software": None})
    plt.close(figure)
    return True


def report(studies: Studies, figure: Path, folder: Path) -> str:
    """The whole report as Markdown.

    Args:
        studies: what was run.
        figure: where the curves are drawn to.
        folder: where the report will be, for the link to the figure.
    """
    parts = [f"# The paper in the miniature\n{studies.heading()}", "## Claims\n" + verdicts(studies)]
    if draw_curves(studies, figure):
        parts.append(
            "## Curves (the paper's Figure 5)\nMean of the seeds, shaded their range.\n\n"
            f"![validation scores by rollouts]({figure.relative_to(folder)})"
        )
    tables = [table(studies) for table in TABLES]
    parts += [f"## {table.title}\n{markdown(table)}" for table in tables if any(not row.source for row in table.rows)]
    return "\n\n".join(parts) + "\n"


def main(args: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plans", type=Path, default=PLANS, help="folder of the studies' sweeps")
    parser.add_argument("--out", type=Path, default=Path("miniature/PAPER.md"), help="the report")
    parser.add_argument("--only", nargs="*", help="names of studies to run; all by default")
    parser.add_argument("--processes", type=int, help="runs side by side, in place of the plans' own number")
    parser.add_argument("--report-only", action="store_true", help="run nothing")
    options = parser.parse_args(args)
    names = sorted(path.stem for path in options.plans.glob("*.yaml"))
    names.sort(key=lambda name: ORDER.index(name) if name in ORDER else len(ORDER))
    unknown = sorted(set(options.only or ()) - set(names))
    if unknown or not names:
        parser.error(f"{options.plans} has no study {', '.join(unknown)}: choose from {', '.join(names) or 'none'}.")
    plans = {name: read(["--config", str(options.plans / f"{name}.yaml")]) for name in names}
    failed = []
    for name, plan in plans.items():
        if options.report_only or (options.only and name not in options.only):
            continue
        print(f"--- {name}", flush=True)
        if options.processes:
            plan = replace(plan, processes=options.processes)
        try:
            done = sweep(plan)
        except ValueError as error:
            print(f"{name}: {error}", file=sys.stderr)
            done = False
        failed += [] if done else [name]
    studies = Studies(plans)
    figure = options.out.with_suffix("").with_name(f"{options.out.stem.lower()}_curves.png")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(report(studies, figure, options.out.parent), encoding="utf-8")
    print(f"{options.out} is written.")
    if failed:
        sys.exit(f"not all runs of {', '.join(failed)} are done; the same command tries again.")


if __name__ == "__main__":
    main()
