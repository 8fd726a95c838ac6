"""Whether a refiner helps beyond Flow-GRPO: every objective, flow-only and jointly, by three rewards.

    python -m benchmarks.objectives --processes 2

In the small world each objective gets the same search: four learning rates of the flow model, one seed and 3,840
rollouts. At the one with the best last validation two more seeds are trained, and all three tested on scenes that no
rate was chosen on. The same command goes on where it was cut off, and writes the table and the figure of what is there
(`--report-only` runs nothing). `--pack FILE` also writes what they rest on, without weights and images: unpacked with
`tar xJf FILE`, these runs count as done.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import matplotlib.pyplot as plt

from benchmarks.paper.modes import NAMES, config_of
from benchmarks.paper.runs import GENEVAL, REWARDS, Score, Setting, Study, contrast
from benchmarks.records import pack
from callbacks.reporting.tables import Row, Table, markdown
from callbacks.runs.curves import band
from datamodules.atomic_write import write_atomically
from datamodules.local_path import local_path
from lightning_modules.sweep.plan import Sweep
from lightning_modules.sweep.run import endable, run_all

ROOT = Path("runs/objectives")
OBJECTIVES: dict[str, str | None] = {
    "Flow-GRPO": None,
    "DiffusionNFT": "diffusion_nft",
    "AWM": "awm",
    "DGPO": "dgpo",
    "DPO": "dpo",
    "best of a group": "reward_weighted",
}
"""Objective -> its file in `configs/objectives`; null is what the experiments have."""
CHANGES = {"diffusion_nft": {"model.init_args.objective.init_args.advantage_range": 1.0}}
"""File -> settings beside it: the published range of 5 is of advantages that are not divided by their group's std."""
RATES = (7.5e-5, 1.5e-4, 3e-4, 6e-4)
RATE = "model.init_args.flow.init_args.learning_rate"
SEARCHED, SEEDS = (42,), (42, 43, 44)
STEPS = {"trainer.max_steps": 60, "trainer.val_check_interval": 20}
MODES = {"flow_only": "without_pe", "promptrl": "with_pe"}
"""Config's name without the reward -> the mode that is scored."""
COLORS = dict(zip(OBJECTIVES, ("#000000", "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7"), strict=True))
"""Okabe and Ito's palette, which the colour-blind can tell apart."""


@dataclass(frozen=True)
class Cell:
    """An objective by a reward, flow-only or jointly."""

    objective: str
    reward: str
    stem: str

    def plan(self, rates: Sequence[float], seeds: Sequence[int], *, test: bool) -> Sweep:
        """Returns the runs at some learning rates of the flow model."""
        overlay = OBJECTIVES[self.objective]
        return Sweep(
            configs=[f"configs/miniature/{config_of(self.reward, self.stem)}.yaml"],
            overlays=[overlay and f"configs/objectives/{overlay}.yaml"],
            seeds=list(seeds),
            root=str(ROOT),
            grid={"flow": {RATE: list(rates)}},
            overrides=STEPS | CHANGES.get(overlay or "", {}),
            test_configs=[] if test else None,
            test_overrides={"data.init_args.eval_prompts": 384},
        )

    def setting(self, study: Study, rate: float) -> Setting:
        """Returns the runs at a learning rate."""
        parts = (config_of(self.reward, self.stem), OBJECTIVES[self.objective], f"flow{rate:g}")
        return study["-".join(filter(None, parts))]

    @property
    def column(self) -> str:
        """Name of the validation scores."""
        return f"val/{self.reward}/{MODES[self.stem]}"

    def best(self, study: Study) -> float | None:
        """Returns the learning rate with the best last validation of the search; None while that is not finished."""
        finals = {
            rate: float(series.iloc[-1])
            for rate in RATES
            for series in self.setting(study, rate).only(SEARCHED).curves(self.column).values()
        }
        return max(finals, key=finals.__getitem__) if len(finals) == len(RATES) else None

    def score(self, study: Study) -> Score | None:
        """Returns the tests at the best learning rate; None unless all seeds have one."""
        rate = self.best(study)
        benchmark = {"geneval": GENEVAL, **REWARDS}[self.reward]
        found = rate and Score(self.setting(study, rate), self.reward, MODES[self.stem], benchmark)
        return found if found and len(found.tests) == len(SEEDS) else None


CELLS = [Cell(*names) for names in product(OBJECTIVES, NAMES, MODES)]


def table(study: Study) -> Table:
    """Makes the table of test scores, flow-only, jointly, and what the refiner adds."""
    rows = []
    for objective in OBJECTIVES:
        values, ends = {}, {}
        for reward in NAMES:
            alone, joint = (Cell(objective, reward, stem).score(study) for stem in MODES)
            for column, score in ((f"{reward}, flow-only", alone), (f"{reward}, joint", joint)):
                if score is not None:
                    values[column] = score.value.value
            if alone is not None and joint is not None:
                gap = contrast((1, joint), (-1, alone))
                values[f"{reward}, gain"], ends[f"{reward}, gain"] = gap.value, (gap.low, gap.high)
        if values:
            rows.append(Row(objective, values, intervals=ends))
    kinds = ("flow-only", "joint", "gain")
    return Table(
        "Objectives, flow-only and with a trained refiner",
        tuple(f"{reward}, {kind}" for reward in NAMES for kind in kinds),
        rows,
        headings={f"{reward}, {kind}": f"{name}, {kind}" for reward, name in NAMES.items() for kind in kinds},
        signed=tuple(f"{reward}, gain" for reward in NAMES),
        note=(
            "Test scores after 3,840 rollouts at each one's best learning rate, mean of three seeds; gain: joint, with "
            "PE, minus flow-only, with its 95 % interval for other seeds, noise and prompts."
        ),
    )


def draw(study: Study, path: Path) -> None:
    """Draws validation scores by rollouts, one panel a reward; lines are jointly trained, dashes flow-only."""
    figure, axes = plt.subplots(1, len(NAMES), figsize=(12, 3.8), sharey=True, layout="constrained")
    for axis, (reward, name) in zip(axes, NAMES.items(), strict=True):
        for objective, (stem, line) in product(OBJECTIVES, zip(MODES, ("--", "-"), strict=True)):
            cell = Cell(objective, reward, stem)
            rate = cell.best(study)
            if rate is not None:
                mean = band(cell.setting(study, rate).curves(cell.column))["mean"]
                label = objective if line == "-" else f"{objective}, flow-only"
                axis.plot(mean.index, mean, line, color=COLORS[objective], label=label)
        axis.set(title=name, xlabel="rollouts")
        axis.grid(axis="y", alpha=0.3)
    axes[0].set_ylabel("score of validation prompts")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(OBJECTIVES), frameon=False, fontsize="small")
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def train(processes: int) -> bool:
    """Runs the search, then the further seeds and tests at the best rates; True if all is done."""

    def run(plans: Sequence[Sweep]) -> bool:
        jobs = [job for plan in plans for job in plan.jobs()]
        print(f"--- {len(jobs)} runs", flush=True)
        outcomes = run_all(jobs, processes, lambda one: print(f"{one.name}: {one.state} {one.note}", flush=True))
        return all(one.state in ("done", "was done") for one in outcomes)

    searched = run(searches())
    return run(compared()) and searched


def searches() -> list[Sweep]:
    """Returns the runs of the search."""
    return [cell.plan(RATES, SEARCHED, test=False) for cell in CELLS]


def compared() -> list[Sweep]:
    """Returns the runs at the best rates, of what has been searched."""
    study = Study(ROOT)
    return [cell.plan([rate], SEEDS, test=True) for cell in CELLS if (rate := cell.best(study)) is not None]


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("miniature/OBJECTIVES.md"), help="the report")
    parser.add_argument("--processes", type=int, default=2, help="runs side by side")
    parser.add_argument("--report-only", action="store_true", help="run nothing")
    parser.add_argument("--pack", type=Path, metavar="FILE", help="archive of the runs' records, such as study.tar.xz")
    options = parser.parse_args(args)
    try:
        local_path(options.out, "--out")
        local_path(options.pack or "", "--pack")
    except ValueError as error:
        parser.error(str(error))
    with endable():
        done = options.report_only or train(options.processes)
    study = Study(ROOT)
    report = table(study)
    if report.rows:
        figure = options.out.with_suffix(".png")
        draw(study, figure)
        text = f"# {report.title}\n{markdown(report)}\n\n![validation scores by rollouts]({figure.name})\n"
        write_atomically(options.out, text)
        print(f"{options.out} is written.")
    if options.pack is not None:
        pack([*searches(), *compared()], options.pack)
        print(f"{options.pack} is written.")
    if not done:
        sys.exit("not all runs are done; the same command tries again.")


if __name__ == "__main__":
    main()
