"""Folders as fits and tests leave them, with made-up scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from benchmarks.paper.runs import GENEVAL, Studies
from lightning_modules.sweep.plan import Sweep

MODES = {"promptrl": (1e-4, 1e-4), "flow_only": (1e-4, None), "prompt_only": (None, 1e-4)}


def fitted(
    folder: Path, stem: str, seed: int, curve: list[float], enhancer: float = 0.0, reward: str = "geneval"
) -> Path:
    """A finished fit; validations every 64 rollouts, with PE, and `enhancer` less without."""
    run = folder / f"{stem}-s{seed}" / "x" / "version_0"
    run.mkdir(parents=True)
    flow, language = ({"init_args": {"learning_rate": rate}} for rate in MODES[stem])
    agents = {"flow": flow, "language": None if stem == "flow_only" else language}
    model = {"class_path": "lightning_modules.prompt_rl.PromptRL", "init_args": agents | {"seed": seed}}
    (run / "config.yaml").write_text(yaml.safe_dump({"model": model, "trainer": {"max_steps": len(curve) - 1}}))
    sets = {reward: 1.0, "unseen": 0.5}
    modes = {"without_pe": enhancer, "with_pe": 0.0}
    scores = [
        {name: {mode: {"overall": x * (v - less)} for mode, less in modes.items()} for name, x in sets.items()}
        for v in curve
    ]
    entries = [{"step": i, "rollouts": 64 * i, "seconds": i, "results": one} for i, one in enumerate(scores)]
    results = {"headlines": dict.fromkeys(sets, "overall"), "history": {"GenEval": entries}} | scores[-1]
    (run / "results.json").write_text(json.dumps(results))
    (run / "checkpoints").mkdir()
    (run / "checkpoints" / "last.ckpt").touch()
    return run


def score_test(run: Path, ratings: dict[tuple[str, str], str], benchmark: str = GENEVAL) -> None:
    """A finished test of a fit; `ratings` has a digit for every tenth of 40 prompts: 1 is right."""
    about = {"ckpt_path": str(run / "checkpoints" / "last.ckpt"), "images": {}}
    write_scores(run.parents[1] / "test" / "x" / "version_0", about, ratings, benchmark)


def write_scores(
    folder: Path, config: dict[str, Any], ratings: dict[tuple[str, str], str], benchmark: str = GENEVAL
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    for name in ("results.json", "results.md"):
        (folder / name).write_text("{}")
    kind, _, by = benchmark.partition(" by ")
    title = f"{kind} of geneval" + (f" by {by}" if by else "")
    lines = [
        {"benchmark": title, "set": name, "mode": mode, "id": f"test-{i:05}", "tag": "colors"}
        | {"correct" if benchmark == GENEVAL else "table": float(rating), "images": 1}
        for (name, mode), digits in ratings.items()
        for i, rating in enumerate(digits * 4)
    ]
    (folder / "scores.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def tenths(right: int) -> str:
    """Marks of which so many tenths are right."""
    return "1" * right + "0" * (10 - right)


def studies_in(folder: Path, *names: str) -> Studies:
    config = folder / "any.yaml"
    config.write_text("model: {}\n")
    return Studies({name: Sweep(configs=[str(config)], root=str(folder / name)) for name in names})
