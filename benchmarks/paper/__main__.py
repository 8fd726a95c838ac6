"""The whole paper in the miniature: runs every study, then writes one report in the layout of the paper's tables.

    python -m benchmarks.paper --processes 2

Every study is a sweep in `configs/sweeps/paper/` (`python -m lightning_modules.sweep --config ...` runs one alone). The
same command goes on where it was cut off; what is finished is skipped. `--report-only` writes the report of what is
there. `--pack FILE` also writes what it rests on, without weights and images: unpacked with `tar xJf FILE`, these runs
count as done.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.paper import curves as paper_curves
from benchmarks.paper import tables as paper_tables
from benchmarks.paper.claims import verdicts
from benchmarks.paper.runs import Studies
from benchmarks.records import pack
from callbacks.reporting.tables import Table, markdown
from datamodules.atomic_write import write_atomically
from datamodules.local_path import local_path
from lightning_modules.sweep.run import endable, read, sweep

PLANS = Path("configs/sweeps/paper")
ORDER = (
    "base",
    "search_flow_only",
    "search_prompt_only",
    "search_promptrl",
    "geneval",
    "preference",
    "ocr",
    "retention",
    "swap",
    "probes_base",
    "probes_flow_only",
    "probes_promptrl",
    "transfer",
    "base_lucky",
    "lucky",
    "multi_reward",
    "long",
)
"""Order in which the studies run: those of swaps and probes need GenEval's; studies not named come last."""
LUCKY = Path("runs/paper/lucky_flow")
"""Base of `lucky` and `base_lucky`, which `configs/sweeps/paper/lucky.yaml` says how to make."""
ABOUT = (
    "GenEval starts from `miniature/flow` and `miniature/language`; OCR, preference and training by tags from "
    "`miniature/words_flow` (the second flow model, a descendant of the first that also knows signs) and "
    "`miniature/words_language` (the second refiner). Validation scores are of the scenes that learning rates were "
    "chosen on, tests of others. Editing is in `RESULTS_EDIT.md`."
)
TABLES: tuple[Callable[[Studies], Table], ...] = (
    paper_tables.geneval_table,
    paper_tables.wording_table,
    paper_tables.rewards_table,
    paper_tables.gain_table,
    paper_curves.efficiency_table,
    paper_tables.multi_reward_table,
    paper_tables.retention_table,
    paper_tables.swap_table,
    paper_tables.long_table,
    paper_tables.base_table,
    paper_tables.similarity_table,
    paper_curves.search_table,
    paper_tables.settings_table,
)


def report(studies: Studies, figure: Path, folder: Path) -> str:
    """Writes the whole report as Markdown.

    Args:
        studies: finished runs.
        figure: file that the curves are drawn to.
        folder: folder of the report, for the link to the figure.
    """
    parts = [f"# The paper in the miniature\n{studies.heading()}\n\n{ABOUT}", "## Claims\n" + verdicts(studies)]
    if paper_curves.draw_curves(studies, figure):
        parts.append(
            "## Curves (the paper's Figure 5)\nMean of the seeds, shaded their range.\n\n"
            f"![validation scores by rollouts]({figure.relative_to(folder)})"
        )
    tables = [table(studies) for table in TABLES]
    parts += [f"## {table.title}\n{markdown(table)}" for table in tables if any(not row.source for row in table.rows)]
    return "\n\n".join(parts) + "\n"


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command.

    Args:
        args: command-line arguments; None is those of the process.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plans", type=Path, default=PLANS, help="folder of the studies' sweeps")
    parser.add_argument("--out", type=Path, default=Path("miniature/PAPER.md"), help="the report")
    parser.add_argument("--only", nargs="*", help="names of studies to run; all by default")
    parser.add_argument("--processes", type=int, help="runs side by side, in place of the plans' own number")
    parser.add_argument("--report-only", action="store_true", help="run nothing")
    parser.add_argument("--pack", type=Path, metavar="FILE", help="archive of the runs' records, such as study.tar.xz")
    options = parser.parse_args(args)
    try:
        local_path(options.out, "--out")
        local_path(options.pack or "", "--pack")
    except ValueError as error:
        parser.error(str(error))
    names = sorted(path.stem for path in options.plans.glob("*.yaml"))
    names.sort(key=lambda name: ORDER.index(name) if name in ORDER else len(ORDER))
    unknown = sorted(set(options.only or ()) - set(names))
    if unknown or not names:
        parser.error(f"{options.plans} has no study {', '.join(unknown)}: choose from {', '.join(names) or 'none'}.")
    plans = {name: read(["--config", str(options.plans / f"{name}.yaml")]) for name in names}
    failed = []
    with endable():
        for name, plan in plans.items():
            if options.report_only or (options.only and name not in options.only):
                continue
            print(f"--- {name}", flush=True)
            if name in ("lucky", "base_lucky") and not LUCKY.is_dir():
                print(f"{name}: left out, as {LUCKY} is missing: {options.plans / 'lucky.yaml'} says how to make it.")
                continue
            try:
                done = sweep(replace(plan, processes=options.processes or plan.processes))
            except ValueError as error:
                print(f"{name}: {error}", file=sys.stderr)
                done = False
            failed += [] if done else [name]
    studies = Studies(plans)
    figure = options.out.with_suffix("").with_name(f"{options.out.stem.lower()}_curves.png")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(options.out, report(studies, figure, options.out.parent))
    print(f"{options.out} is written.")
    if options.pack is not None:
        pack(plans.values(), options.pack)
        print(f"{options.pack} is written.")
    if failed:
        sys.exit(f"not all runs of {', '.join(failed)} are done; the same command tries again.")


if __name__ == "__main__":
    main()
