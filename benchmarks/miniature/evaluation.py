"""Tables of several seeds from what `lightning test` left: scores by tag, other wordings, enhancers, naming, diversity.

For each agent and seed S, after a fit to `runs/<mode>-S`:

    lightning test --config configs/miniature/<mode>.yaml --config configs/miniature/evaluate.yaml \
        --ckpt_path <its last.ckpt> --images.images_per_prompt 2 --trainer.default_root_dir evaluation/<mode>-S

and once without a checkpoint to `evaluation/base-0`. Then:

    python -m benchmarks.miniature.evaluation evaluation

The same with `configs/miniature/edit_<mode>.yaml` and `edit_evaluate.yaml` is read with `--set edit`. Folders of other
names (`hidden-42`) are rows of their own, below the agents'.

Numbers are means over seeds; brackets are 95 % intervals of that mean from a bootstrap over prompts (the same prompts
for all seeds, resampled within tags), so they say nothing of what other seeds would give: the range over seeds does.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from callbacks.benchmark import Benchmark
from callbacks.edit import EditBenchmark
from callbacks.geneval import GenEvalBenchmark
from callbacks.reporting.tables import Row, Table, markdown
from callbacks.runs.contrasts import prompt_table
from callbacks.runs.loading import Run
from callbacks.scores.bootstrap import interval, resample
from callbacks.scores.prompt_scores import PromptTable
from miniature.edits.naming_benchmark import COLUMNS as NAMING
from miniature.edits.reward import ShapesEditReward
from miniature.scenes.detector import ShapesDetector

MODES = ("base", "flow_only", "prompt_only", "promptrl")
BENCHMARKS: dict[str, Benchmark] = {
    "geneval": GenEvalBenchmark(ShapesDetector()),
    "edit": EditBenchmark(ShapesEditReward(), ["strict", "followed", "kept"]),
}
"""Set of original prompts -> the benchmark that scores it."""
Tables = dict[tuple[str, str], PromptTable]
"""(Set, mode) -> scores by prompt."""
Key = tuple[str, str]


def read(folder: Path, benchmark: Benchmark) -> tuple[Tables, dict[str, Any]]:
    """Reads the newest test below a folder: tables from `scores.jsonl`, and the contents of `results.json`."""
    path = max(folder.rglob("scores.jsonl"), key=lambda found: found.stat().st_mtime)
    run = Run.read(path.parent)
    own = run.scores[run.scores["benchmark"] == benchmark.title]
    keys: dict[Key, None] = dict.fromkeys(zip(own["set"], own["mode"], strict=True))
    return {key: prompt_table(run, *key, benchmark.title) for key in keys}, dict(run.results)


def over_seeds(
    benchmark: Benchmark, runs: Sequence[Tables], keys: Sequence[Key], combine: Callable[..., Tensor] = lambda x: x
) -> tuple[dict[str, float], dict[str, list[float]], dict[str, tuple[float, float]]]:
    """Averages the scores of one set and mode, or of `combine` of several, over seeds.

    Returns:
        Score name -> mean over seeds, -> both ends of its 95 % interval, and -> lowest and highest seed.
    """
    values: dict[str, list[Tensor]] = {}
    for tables in runs:
        chosen = [tables[key] for key in keys]
        common = set.intersection(*(set(table.ids) for table in chosen))
        chosen = [table.rows([i for i, name in enumerate(table.ids) if name in common]) for table in chosen]
        drawn = resample(chosen[0].tags, 2000, prompts=chosen[-1].prompts)  # the last are the originals
        weights = torch.cat([torch.ones(1, len(common), dtype=torch.float64), drawn])
        scores = [benchmark.summarize(table, weights) for table in chosen]
        for name in scores[0]:
            values.setdefault(name, []).append(combine(*(score[name] for score in scores)))
    means = {name: torch.stack(parts).mean(0) for name, parts in values.items()}
    return (
        {name: float(mean[0]) for name, mean in means.items()},
        {name: list(interval(mean[1:])) for name, mean in means.items()},
        {name: (min(float(p[0]) for p in parts), max(float(p[0]) for p in parts)) for name, parts in values.items()},
    )


def score_tables(benchmark: Benchmark, runs: Mapping[str, Sequence[Tables]]) -> list[Table]:
    """Makes a table for each evaluation set of the data module: every agent with and without the refiner, by tag."""
    tables = []
    sets = dict.fromkeys(name for seeds in runs.values() for scored in seeds for name, _ in scored)
    own_sets = [name for name in sets if "." not in name]
    for name in own_sets:
        rows = []
        for mode, seeds in runs.items():
            for pe in ("without_pe", "with_pe"):
                if all((name, pe) in tables for tables in seeds):
                    scores, ends, spread = over_seeds(benchmark, seeds, [(name, pe)])
                    low, high = spread[benchmark.headline]
                    label = f"{mode} {pe.replace('_', ' ').replace('pe', 'PE')} ({low:.2f}-{high:.2f})"
                    shown = {benchmark.headline: ends[benchmark.headline]}
                    rows.append(Row(label, scores, intervals=shown))
        columns = [column for column in rows[0].scores if column not in ("images", "invalid_share")]
        tables.append(Table(f"{name}; in brackets the range of the average over seeds", columns, rows))
    return tables


def difference_table(benchmark: Benchmark, original: str, runs: Mapping[str, Sequence[Tables]]) -> Table:
    """Makes a table of headline scores of other wordings minus those of the originals, pair by pair."""
    kinds = sorted({name for seeds in runs.values() for tables in seeds for name, _ in tables} - {original})
    scores: dict[str, dict[str, float]] = {kind: {} for kind in kinds}
    ends: dict[str, dict[str, list[float]]] = {kind: {} for kind in kinds}
    for mode, seeds in runs.items():
        for own, other in (("without_pe",) * 2, ("with_pe",) * 2, ("without_pe", "with_pe")):
            label = f"{mode} {own.replace('_', ' ').replace('pe', 'PE')}" if own == other else f"{mode}, against its PE"
            for kind in kinds:
                enhancer = not any((kind, "with_pe") in tables for tables in seeds)
                if own != other and not enhancer:
                    continue
                keys = [(kind, own), (original, other)]
                if all(set(keys) <= tables.keys() for tables in seeds):
                    mean, low_high, _ = over_seeds(benchmark, seeds, keys, lambda a, b: a - b)
                    headline = benchmark.headline
                    scores[kind][label], ends[kind][label] = mean[headline], low_high[headline]
    columns = list(dict.fromkeys(label for named in scores.values() for label in named))
    names = {kind: kind.removeprefix(f"{original}.").replace("_", " ") for kind in kinds}
    names |= {kind: f"{kind} (a set of its own)" for kind in kinds if "." not in kind}
    rows = [Row(names[kind], scores[kind], intervals=ends[kind]) for kind in kinds]
    return Table("other wording - original", columns, rows, signed=columns)


def naming_table(results: Mapping[str, Sequence[Mapping[str, Any]]]) -> Table:
    """Makes a table of how often greedy rewrites name the object meant, by kind of edit; means over seeds."""
    rows = []
    for mode, seeds in results.items():
        found = [seed["naming"]["results"] for seed in seeds if "naming" in seed]
        for name in found[0] if found else ():
            for column in NAMING:
                tags = found[0][name][column]
                shares = {tag: sum(seed[name][column][tag] for seed in found) / len(found) for tag in tags}
                each = [seed[name][column]["mean"] for seed in found]
                words = column.replace("_", " ")
                rows.append(Row(f"{mode}, {name}, {words} ({min(each):.2f}-{max(each):.2f})", shares))
    columns = list(dict.fromkeys(tag for row in rows for tag in row.scores))
    return Table("Rewrites that name the object meant; in brackets the range over seeds", columns, rows)


def diversity_table(original: str, results: Mapping[str, Sequence[Mapping[str, Any]]]) -> Table:
    """Makes a table of how similar the images of one prompt are; means over seeds."""
    rows: list[Row] = []
    columns: dict[str, None] = {}
    for mode, seeds in results.items():
        probes = [probe for probe in ("diversity", "diversity_pixels") if all(probe in seed for seed in seeds)]
        for arm in (arm for probe in probes[:1] for arm in seeds[0][probe][original] if " " not in arm):
            scores = {}
            for probe in probes:
                for score in seeds[0][probe][original][arm]:
                    name = f"{score}, {'pixels' if probe.endswith('pixels') else 'shapes'}"
                    scores[name] = sum(seed[probe][original][arm][score] for seed in seeds) / len(seeds)
            columns |= dict.fromkeys(scores)
            rows.append(Row(f"{mode}, {arm.replace('_', ' ')}", scores))
    shown = [column for column in columns if not column.startswith("distinct_rewrites, p")]
    return Table("Diversity of the 8 images of a prompt", shown, rows)


def main() -> None:
    """Prints all tables as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--set", choices=list(BENCHMARKS), default="geneval", dest="original")
    args = parser.parse_args()
    benchmark = BENCHMARKS[args.original]
    folders = sorted(path for path in args.folder.iterdir() if any(path.rglob("scores.jsonl")))
    others = [path.name.rsplit("-", 1)[0] for path in folders]
    found = {
        mode: [read(path, benchmark) for path in folders if path.name.rsplit("-", 1)[0] == mode]
        for mode in dict.fromkeys([*(mode for mode in MODES if mode in others), *others])
    }
    runs = {mode: [tables for tables, _ in seeds] for mode, seeds in found.items()}
    results = {mode: [said for _, said in seeds] for mode, seeds in found.items()}
    tables = score_tables(benchmark, runs)
    tables += [difference_table(benchmark, args.original, runs), diversity_table(args.original, results)]
    if any("naming" in said for seeds in results.values() for said in seeds):
        tables.append(naming_table(results))
    for table in tables:
        print(f"\n### {table.title}\n\n{markdown(table)}")


if __name__ == "__main__":
    main()
