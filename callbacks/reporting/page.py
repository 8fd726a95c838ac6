"""`run_page` and `comparison_page`: what runs left, as one HTML file that needs no network."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from callbacks.reporting.charts import line_chart
from callbacks.reporting.gallery import Gallery, Group, Rating, Sample
from callbacks.reporting.html import Card, Tile, render
from callbacks.reporting.observations import observations
from callbacks.runs.curves import curve
from callbacks.runs.loading import Run
from lightning_modules.run_folder import MODE_LABELS, NAMES, headlines, key_label

_HEALTH = {
    "Well-formed rewrites (share)": "format",
    "Different rewrites in a group (share)": "refine/distinct",
    "Rewrites that copy the prompt (share)": "refine/copies",
    "Rewrites cut off at their length limit (share)": "refine/truncated",
    "Groups without any difference in reward (share)": "group/zero_std_share",
    "Likeness of a group's images (cosine)": "group/image_similarity",
    "Images that could not be scored (share)": "group/invalid_share",
    "KL of the refiner to its start": "train/language/kl",
    "KL of the image model to its start": "train/flow/kl",
    "Entropy of the refiner (nats a token)": "train/language/entropy",
    "Gradient norm of the refiner": "train/language/grad_norm",
    "Gradient norm of the image model": "train/flow/grad_norm",
}
_PLACES = {"without_pe": "as written", "with_pe": "rewritten (PE)"}
MODES = tuple(MODE_LABELS)


def run_page(folder: Path) -> Path:
    """Writes `report.html` into a run's folder from the files there.

    Args:
        folder: folder of a fit, validation or test.

    Returns:
        The page.

    Raises:
        ValueError: if a file is damaged.
    """
    run, gallery = Run.read(folder), Gallery.read(folder)
    path = folder / "report.html"
    fit = len(run.history) > 1
    groups = [] if gallery.group is None else [_group(gallery.group, folder)]
    render(
        path,
        title=_name(run),
        lead=_lead(run),
        facts=_facts(run),
        scores=_scores({_name(run): run}),
        changes=fit,
        curves=_curves({"": run}),
        gallery=_samples(gallery),
        groups=groups,
        notes=observations(run) if fit else [],
        health=_health({"": run}),
        settings=_settings(run),
    )
    return path


def comparison_page(runs: Sequence[Run], path: Path) -> Path:
    """Writes a page that compares runs.

    Args:
        runs: fits or tests.
        path: the page.
    """
    named = _labels(runs)
    galleries = {label: Gallery.read(run.folder) for label, run in named.items()}
    groups = [_group(one.group, one.folder, label) for label, one in galleries.items() if one.group is not None]
    render(
        path,
        title=" · ".join(named),
        lead=f"{len(runs)} runs side by side; the images have the same prompts and the same noise.",
        facts=[(label, f"{_lead(run).removeprefix(f'{run.mode}: ')} ({run.folder})") for label, run in named.items()],
        scores=_scores(named),
        changes=any(len(run.history) > 1 for run in runs),
        curves=_curves(named),
        gallery=_side_by_side(galleries),
        groups=groups,
        notes=[(fine, f"{label}: {said}") for label, run in named.items() for fine, said in observations(run)],
        health=_health(named),
        settings=[],
    )
    return path


# --- what a run is ----------------------------------------------------------------------------------------------------


def _name(run: Run) -> str:
    return str(run.get("experiment") or run.folder.name)


def _labels(runs: Sequence[Run]) -> dict[str, Run]:
    """Names runs by their modes, or by mode and folder where two have one mode."""
    modes = [run.mode for run in runs]
    labels = [
        mode if mode and modes.count(mode) == 1 else f"{mode} {_name(run)}/{run.folder.name}".strip()
        for mode, run in zip(modes, runs, strict=True)
    ]
    labels = [
        label if labels.count(label) == 1 else f"{label} ({number})" for number, label in enumerate(labels, start=1)
    ]
    return dict(zip(labels, runs, strict=True))


def _lead(run: Run) -> str:
    """Says in a line which command, which agents, how long."""
    last = run.history[-1] if run.history else {"step": 0, "rollouts": 0, "seconds": 0}
    if run.stage == "test" or len(run.history) < 2:
        what = f"test of {run.mode or 'a model'}" if run.stage == "test" else f"evaluation of {run.mode or 'a model'}"
        return what + (f", checkpoint {run.get('ckpt_path')}" if run.get("ckpt_path") else "")
    minutes = last["seconds"] / 60
    time = f"{minutes:.0f} min" if minutes >= 2 else f"{last['seconds']:.0f} s"
    seed = f", seed {run.seed}" if run.seed is not None else ""
    return f"{run.mode or 'fit'}: {last['step']:,} steps, {last['rollouts']:,} rollouts, {time}{seed}"


def _facts(run: Run) -> list[tuple[str, str]]:
    part = "model.init_args"
    found = {
        "image model": run.get(f"{part}.flow.init_args.model"),
        "refiner": run.get(f"{part}.language.init_args.model"),
        "reward": str(run.get(f"{part}.reward.class_path") or "").rpartition(".")[2],
        "data": str(run.get("data.class_path") or "").rpartition(".")[2],
        "made with": _made_with(run.results.get("run", {})),
        "resumed from": str(run.continues) if run.continues else None,
        "folder": str(run.folder),
    }
    return [(name, str(value)) for name, value in found.items() if value]


def _made_with(record: Mapping[str, Any]) -> str:
    """Says in a line device, commit and versions, as `callbacks.record` has noted them."""
    device, code = record.get("device", {}), record.get("code") or {}
    parts = [f"{device['processes']} x {device['name']}, {device['precision']}"] if device else []
    parts += [f"commit {code['commit'][:10]}{' with changes' * code['changed']}"] if code else []
    return "; ".join([*parts, *(f"{name} {one}" for name, one in record.get("versions", {}).items())])


def _settings(run: Run) -> list[tuple[str, str]]:
    part = "model.init_args"
    names = {
        "group size n": f"{part}.group_size",
        "retained m": f"{part}.num_retained",
        "prompts a step": "data.init_args.batch_size",
        "learning rate, image model": f"{part}.flow.init_args.learning_rate",
        "learning rate, refiner": f"{part}.language.init_args.learning_rate",
        "KL weight, image model": f"{part}.flow.init_args.kl_weight",
        "KL weight, refiner": f"{part}.language.init_args.kl_weight",
        "sampler steps": f"{part}.flow.init_args.sampling.num_steps",
        "SDE steps": f"{part}.flow.init_args.sampling.sde_steps",
        "noise level": f"{part}.flow.init_args.sampling.noise_level",
    }
    return [(label, str(run.get(name))) for label, name in names.items() if run.get(name) is not None]


# --- numbers ----------------------------------------------------------------------------------------------------------


def _scores(runs: Mapping[str, Run]) -> list[dict[str, Any]]:
    """Lists the headline scores, set by set: with one run a line for each mode, else for each run and mode."""
    blocks: dict[str, list[dict[str, Any]]] = {}
    for label, run in runs.items():
        results = run.results
        before = headlines(results.get("before", {}), results)
        for (key, mode), score in run.headlines.items():
            name = next((name for name in (results.get("headlines", {}).get(key),) if name), None)
            was = before.get((key, mode)) if len(run.history) > 1 else None
            place = "changes" if was is not None else "intervals"
            ends = results.get(place, {}).get(key, {}).get(mode, {}).get(name)
            blocks.setdefault(key, []).append(
                {
                    "label": MODE_LABELS.get(mode, mode)
                    if len(runs) == 1
                    else f"{label}, {MODE_LABELS.get(mode, mode)}",
                    "before": _number(was),
                    "after": _number(score),
                    "change": "" if was is None else f"{score - was:+.3f}",
                    "interval": _interval(ends, signed=was is not None),
                    "certain": was is not None and ends is not None and None not in ends and ends[0] * ends[1] > 0,
                    "better": was is not None and score > was,
                }
            )
    sets: dict[str, Any] = {}
    for run in runs.values():
        sets |= run.results.get("sets", {})
    return [
        {"title": key_label(key), "prompts": sets.get(key, {}).get("prompts"), "rows": rows}
        for key, rows in blocks.items()
    ]


def _number(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else f"{value:.3f}"


def _interval(ends: Sequence[float | None] | None, *, signed: bool) -> str:
    if ends is None or None in ends:
        return ""
    sign = "+" if signed else ""
    return f"[{ends[0]:{sign}.3f}, {ends[1]:{sign}.3f}]"


def _curves(runs: Mapping[str, Run]) -> list[tuple[str, str]]:
    """Draws scores and task rewards by rollouts: both modes of one run in a chart, or one chart for each mode."""
    found: dict[str, dict[str, pd.Series]] = {}
    rewards: dict[str, dict[str, pd.Series]] = {}
    for label, run in runs.items():
        if len(run.history) < 2 and not len(run.training):
            continue
        for key, mode in run.headlines:
            series = _series(run, f"val/{key}/{mode}")
            if len(runs) == 1:
                found.setdefault(key_label(key), {})[MODE_LABELS[mode]] = series
            else:
                found.setdefault(f"{key_label(key)}, {MODE_LABELS[mode]}", {})[label] = series
        for column in map(str, run.training):
            if column.startswith("reward/") and column.count("/") == 1:
                rewards.setdefault(f"Task reward in training: {column[7:]}", {})[label] = _series(run, column)
    labels = list(runs)
    return _charts(found, labels if len(runs) > 1 else list(MODE_LABELS.values())) + _charts(rewards, labels)


def _health(runs: Mapping[str, Run]) -> list[tuple[str, str]]:
    columns = dict(_HEALTH)
    for run in runs.values():
        columns |= {str(name): str(name) for name in run.training if str(name).startswith("health/")}
    return _charts(
        {
            title: {label: _series(run, column) for label, run in runs.items() if column in run.training}
            for title, column in columns.items()
        },
        list(runs),
        flat=False,
    )


def _series(run: Run, column: str) -> pd.Series:
    known = column in run.validations or column in run.training
    return curve(run, column) if known else pd.Series(dtype=float)


def _charts(
    found: Mapping[str, Mapping[str, pd.Series]], order: Sequence[str], *, flat: bool = True
) -> list[tuple[str, str]]:
    """Draws charts of at least two points, and where `flat` is False of those alone that are not 0 throughout."""
    charts = []
    for title, curves in found.items():
        shown = {label: series for label, series in curves.items() if len(series) > 1}
        if shown and (flat or any((series != 0).any() for series in shown.values())):
            charts.append((title, line_chart(shown, order, noisy=max(map(len, shown.values())) > 25)))
    return charts


# --- images -----------------------------------------------------------------------------------------------------------


def _samples(gallery: Gallery) -> dict[str, list[Card]]:
    """Lays out a run's evaluations: set -> a card for each prompt, with columns for the first, middle and last step."""
    steps = gallery.steps
    chosen = sorted({steps[0], steps[len(steps) // 2], steps[-1]}) if steps else []
    heads = [f"step {step:,}" for step in chosen]
    cards: dict[str, list[Card]] = {}
    for (name, _), samples in _by_prompt([gallery]).items():
        at = {(sample.mode, sample.step): _tile(sample, gallery.folder) for sample in samples}
        if len(chosen) == 1:  # a test: both modes side by side
            modes = [mode for mode in MODES if (mode, chosen[0]) in at]
            rows = [("", [at.get((mode, chosen[0])) for mode in modes])]
            columns = [_PLACES[mode] for mode in modes]
        else:
            modes = [mode for mode in MODES if any(own == mode for own, _ in at)]
            rows = [(_PLACES[mode], [at.get((mode, step)) for step in chosen]) for mode in modes]
            columns = heads
        cards.setdefault(key_label(name), []).append(_card(samples[-1], gallery.folder, columns, rows))
    return cards


def _side_by_side(galleries: Mapping[str, Gallery]) -> dict[str, list[Card]]:
    """Lays out the last evaluation of several runs: set -> a card for each prompt, with a column for each run."""
    cards: dict[str, list[Card]] = {}
    folders = {label: one.folder for label, one in galleries.items()}
    for (name, prompt), samples in _by_prompt(list(galleries.values())).items():
        at: dict[tuple[str, str], Tile] = {}
        for label, gallery in galleries.items():
            for sample in gallery.samples:
                if (sample.name, sample.id, sample.step) == (name, prompt, gallery.steps[-1]):
                    at[sample.mode, label] = _tile(sample, gallery.folder)
        labels = [label for label in galleries if any(own == label for _, own in at)]
        modes = [mode for mode in MODES if any(own == mode for own, _ in at)]
        rows = [(_PLACES[mode], [at.get((mode, label)) for label in labels]) for mode in modes]
        if labels:
            cards.setdefault(key_label(name), []).append(_card(samples[-1], folders[labels[-1]], labels, rows))
    return cards


def _by_prompt(galleries: Sequence[Gallery]) -> dict[tuple[str, str], list[Sample]]:
    """Groups samples by set and prompt, in order."""
    found: dict[tuple[str, str], list[Sample]] = {}
    for gallery in galleries:
        for sample in gallery.samples:
            found.setdefault((sample.name, sample.id), []).append(sample)
    return found


def _card(sample: Sample, folder: Path, columns: list[str], rows: list[tuple[str, list[Tile | None]]]) -> Card:
    source = None if sample.source is None else Tile(folder / sample.source, text="the image to edit")
    return Card(sample.prompt, columns, rows, source)


def _tile(sample: Sample, folder: Path) -> Tile:
    said = [_said(rating) for rating in sample.ratings]
    rights = [rating.right for rating in sample.ratings if rating.right is not None]
    return Tile(
        folder / sample.file,
        lead=" · ".join(filter(None, said)),
        right=all(rights) if rights else None,
        text="" if sample.mode == MODES[0] and sample.drawn == sample.prompt else sample.drawn,
    )


def _said(rating: Rating) -> str:
    if rating.right is not None:
        return "right" if rating.right else "wrong"
    name = NAMES.get(rating.name, rating.name)
    return f"{name}: not scored" if rating.value is None else f"{name} {rating.value:.3g}"


def _group(group: Group, folder: Path, label: str = "") -> Card:
    """Lays out a group: one tile for each image, the reward first."""
    tiles: list[Tile | None] = []
    for slot in group.slots:
        if slot.reward is None or slot.task is None:
            said = "not scored"
        else:
            task = f" (task {slot.task:.2f})" if abs(slot.task - slot.reward) > 1e-6 else ""
            said = f"reward {slot.reward:.2f}{task}, advantage {slot.advantage:+.2f}".replace("-", "\N{MINUS SIGN}")
        badge = "retained" if slot.retained else ""
        tiles.append(Tile(folder / slot.file, said, slot.right, slot.drawn, badge))
    source = None if group.source is None else Tile(folder / group.source, text="the image to edit")
    about = f"{label}, step {group.step:,}" if label else f"step {group.step:,}"
    return Card(group.prompt, [], [(about, tiles)], source)
