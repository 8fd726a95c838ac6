"""A run's folder written by hand: wide images, long rewrites, markup in a prompt."""

from __future__ import annotations

import json
from pathlib import Path

import yaml
from PIL import Image

from callbacks.reporting.gallery import Gallery, Group, Rating, Sample, Slot

MARKUP = "<script>document.title = 'hacked'</script> & a <b>bold</b> cat"
REWRITE = "a wide photograph of a cat on a mat in front of a window, " * 6 + "extraordinarily" * 12
STEPS = (0, 10, 20, 30)


def made_run(folder: Path, *, refines: bool = True, scored: bool = True, size: tuple[int, int] = (1024, 512)) -> Path:
    """Writes the files of a fit of 30 steps with two prompts; one of them is an edit.

    Args:
        folder: the run's folder.
        refines: True for a run with a refiner.
        scored: True for a run with a benchmark.
        size: width and height of the images.
    """
    folder.mkdir(parents=True)
    modes = ["without_pe", "with_pe"] if refines else ["without_pe"]
    agents = {name: {"init_args": {"learning_rate": 1e-4, "model": f"models/{name}"}} for name in ("flow", "language")}
    agents["language"] = agents["language"] if refines else None  # type: ignore[assignment]
    config = {"experiment": "cats", "seed_everything": 7, "model": {"class_path": "P", "init_args": agents}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    history = [
        {
            "step": step,
            "rollouts": 64 * step,
            "seconds": 5.0 * step,
            "results": {"geneval": {mode: {"overall": 0.2 + step / 100} for mode in modes}} if scored else {},
        }
        for step in STEPS
    ]
    results = {"rollouts": 1920, "seconds": 150.0, "history": {"GenEvalBenchmark": history}}
    if scored:
        results |= history[-1]["results"] | {
            "headlines": {"geneval": "overall"},
            "before": history[0]["results"],
            "intervals": {"geneval": {mode: {"overall": [0.45, 0.55]} for mode in modes}},
            "changes": {"geneval": {mode: {"overall": [0.111, 0.444]} for mode in modes}},
            "sets": {"geneval": {"prompts": 24}},
        }
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "results.md").write_text("done")
    lines = ["step,rollouts,reward,reward/geneval,format,train/flow/skipped"]
    lines += [f"{step},{64 * (step + 1)},1.{step:02d},0.{step:02d},1,{int(step == 5)}" for step in range(30)]
    (folder / "metrics.csv").write_text("\n".join(lines) + "\n")
    gallery = Gallery(folder)
    for step in STEPS:
        for number, prompt in enumerate((MARKUP, "make it blue")):
            for mode in modes:
                image = Image.radial_gradient("L").resize(size).convert("RGB")
                source = gallery.keep(image, f"{number}_source") if number else None
                file = gallery.keep(image, f"{number}_{mode}_{step}")
                ratings = (Rating("correct", float(step > 0), step > 0),) if scored else ()
                drawn = prompt if mode == "without_pe" else REWRITE
                gallery.samples.append(
                    Sample(step, 64 * step, "geneval", mode, str(number), prompt, drawn, file, source, ratings)
                )
    slots = tuple(
        Slot(
            gallery.keep(Image.new("RGB", size, "red"), f"group_{i}"), REWRITE, i < 2, 1.5 + i, 0.5 + i, i - 1.5, i > 2
        )
        for i in range(4)
    )
    gallery.group = Group(30, 1920, MARKUP, None, slots)
    gallery.write()
    return folder
