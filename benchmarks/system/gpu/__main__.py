"""Measures what holds on a GPU, in one run of a few minutes: log-ratios, speed and memory of models of full size.

    python -m benchmarks.system.gpu --minutes 9 --out gpu_run [--tiny] [--device cpu] [--cases attention precision ...]

Builds models of random weights from published configurations (nothing is downloaded), takes joint steps in the
settings of `configs/`, and writes `rows.jsonl` as it goes, `table.md` at the end and what was printed into `log.txt`.
Every case has a process of its own: one that fails or hangs is a row with its error. The most important come first, and
what no longer fits the time is skipped. `--tiny` runs all cases with stand-ins of few weights, on a CPU or, with
`--device cuda`, on a GPU: it shows in minutes what would fail there.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # to ask for a GPU is not to use it

import torch
from tqdm import tqdm

from benchmarks.system.gpu import measurements
from benchmarks.system.gpu.cases import Case, Options, Row, Variant, estimated
from benchmarks.system.gpu.measurements import one_line
from benchmarks.system.recipes import recipe

SIZES = (Variant(4), Variant(1), Variant(8))
BACKENDS = ("_native_flash", "_native_cudnn", "_native_efficient", "flash", "sage")
FLUX, KLEIN, SD3 = "FLUX.1-dev", "FLUX.2-klein-base-4B", "SD3.5-medium"
QWEN_VL = "Qwen2.5-VL-3B"


def step(name: str, seconds: int, flow: str, **more: Any) -> Case:
    """A case of joint steps, flow-only unless it has a refiner."""
    return Case(name, seconds, measurements.steps, flow, **more)


CASES = (
    Case("card", 10, measurements.card),
    step("klein", 45, KLEIN, refiner="Qwen3-4B", variants=SIZES),
    step("flux1", 60, FLUX, refiner=QWEN_VL, variants=SIZES),
    step("sd3", 40, SD3, refiner=QWEN_VL, variants=SIZES),
    step("compiled blocks", 90, FLUX, changes={"flow.init_args.compile": True}),
    step("selective recomputation", 40, FLUX, changes={"flow.init_args.gradient_checkpointing": "selective"}),
    Case("precision", 30, measurements.precision, KLEIN),
    Case("decoding", 60, measurements.decoding, KLEIN, "Qwen3-4B", changes={"language.init_args.max_new_tokens": 256}),
    Case(
        "attention",
        60,
        measurements.attention,
        FLUX,
        variants=(Variant(), *(Variant(backend=name) for name in BACKENDS)),
    ),
    step("nf4", 40, FLUX, changes={"flow.init_args.quantization": "nf4"}),
    step("int8", 40, FLUX, changes={"flow.init_args.quantization": "int8"}),
    step("8-bit Adam", 40, FLUX, changes={"optimizer": {"class_path": "bitsandbytes.optim.AdamW8bit"}}),
    *(
        step(f"{name}, {memory} GB", 45, model, refiner=QWEN_VL, configs=recipe(model, memory, "promptrl"))
        for name, model in (("flux1", FLUX), ("klein", KLEIN), ("sd3", SD3))
        for memory in (48, 24)
    ),
    step("qwen-image, nf4", 60, "Qwen-Image"),
    step("z-image", 30, "Z-Image"),
    step("sana", 20, "Sana-1600M"),
    step(
        "kontext, 1024 px",
        40,
        "FLUX.1-Kontext-dev",
        source=1024,
        changes={"flow.init_args.height": 1024, "flow.init_args.width": 1024, "flow.init_args.micro_batch_size": 1},
    ),
    step(
        "klein edits, 1024 px", 60, KLEIN, refiner=QWEN_VL, configs=("edit/flux2_klein_4b_promptrl.yaml",), source=1024
    ),
    step("qwen-image-edit, nf4", 90, "Qwen-Image-Edit-2509", source=512),
    Case("tests", 60, measurements.gpu_tests),
    Case(
        "sharded",
        60,
        measurements.sharded,
        SD3,
        changes={"flow.init_args.lora": None, "flow.init_args.dtype": "float32", "flow.init_args.kl_weight": 0.0},
    ),
)
"""All cases, the most important first. Seconds are guesses until a card has run them."""

# A fork has all imports done, but cannot use a GPU that this process, or what it imports, has used.
CONTEXT: Any = multiprocessing.get_context("spawn" if torch.cuda.is_initialized() else "fork")


def run(cases: Sequence[Case], options: Options, minutes: float) -> Iterator[Row]:
    """Runs cases one after another, and yields their rows with the estimates of memory beside them.

    Args:
        cases: in the order to run.
        options: how.
        minutes: what does not fit is skipped, and what takes longer is ended.
    """
    deadline = time.monotonic() + 60 * minutes
    with tempfile.TemporaryDirectory() as folder, CONTEXT.Pool(max(1, (os.cpu_count() or 1) // 4)) as pool:
        options = replace(options, folder=Path(folder))
        estimates = {
            case.name: pool.apply_async(_estimated, (case, replace(options, folder=Path(folder, "estimates"))))
            for case in cases
            if case.measure is measurements.steps
        }
        for case in tqdm(cases, desc="cases", disable=None):
            left = deadline - time.monotonic()
            if left < case.seconds * (0 if options.tiny else 1):
                yield {"case": case.name, "error": f"skipped: about {case.seconds} s, of which {left:.0f} s are left"}
                continue
            start = time.monotonic()
            for row in run_one(case, options, left):
                if case.name in estimates and "error" not in row:
                    row["estimate"] = estimates[case.name].get().get(row["setting"])
                yield {"case": case.name, "after": round(time.monotonic() - start, 1)} | row


def run_one(case: Case, options: Options, seconds: float) -> Iterator[Row]:
    """Runs a case in a process of its own, which is ended after some seconds; what goes wrong is a row."""
    receiver, sender = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=_measure, args=(case, options, sender))
    process.start()
    sender.close()
    deadline = time.monotonic() + seconds
    try:
        while receiver.poll(max(0.0, deadline - time.monotonic())):
            yield receiver.recv()
        yield {"error": f"ended after {seconds:.0f} s"}
    except EOFError:
        process.join()
        if process.exitcode:
            yield {"error": f"its process ended with status {process.exitcode}"}
    finally:
        process.kill()
        process.join()


def _measure(case: Case, options: Options, sender: Connection) -> None:
    _write_to(options.log)
    try:
        for row in case.measure(case, options):
            sender.send(row)
    except Exception as error:
        traceback.print_exc()
        sender.send({"error": one_line(error)})


def _estimated(case: Case, options: Options) -> dict[str, int]:
    _write_to(options.log)
    torch.set_num_threads(1)
    try:
        return estimated(case, options)
    except Exception:
        traceback.print_exc()
        return {}


def _write_to(log: Path) -> None:
    """Sends what this process prints, libraries in C included, to a file."""
    sys.stdout = sys.stderr = log.open("a", buffering=1, encoding="utf-8")
    os.dup2(sys.stdout.fileno(), 1)
    os.dup2(sys.stdout.fileno(), 2)


PARTS = ("refine", "rollout", "reward", "language_update", "flow_update", "step")


def table(rows: Sequence[Row]) -> str:
    """Formats rows as Markdown: steps, other figures, and what failed."""
    rate = next((row["figures"]["TFLOP/s"] for row in rows if "TFLOP/s" in row.get("figures", {})), None)
    lines = [
        "Seconds of a joint step on one prompt (8 images, 4 sampler steps of which 1 SDE step), without the guard; GiB",
        "that PyTorch had allocated (reserved) at the peak, and preflight's estimate of it; operations of the flow",
        "model's update (those made twice count twice) a second, and their share of the rate at which the card",
        "multiplies two bf16 matrices of 8192 x 8192.",
        "",
        "| case | setting | log-ratio, flow | refiner | " + " | ".join(PARTS) + " | GiB | estimate | TFLOP/s | share |",
        "|---" * (8 + len(PARTS)) + "|",
    ]
    for row in rows:
        if "seconds" in row and "log_ratio" in row:
            ratios = [_text(row["log_ratio"].get(agent), ".1e") for agent in ("flow", "language")]
            seconds = [_text(row["seconds"].get(part), ".2f") for part in PARTS]
            memory = f"{_gib(row.get('peak'))} ({_gib(row.get('reserved'))})" if "peak" in row else ""
            flops = row.get("flops")
            share = "" if flops is None or not rate else f"{flops / rate / 1e12:.0%}"
            cells = [row["case"], row["setting"], *ratios, *seconds, memory, _gib(row.get("estimate"))]
            lines.append(f"| {' | '.join([*cells, _text(flops and flops / 1e12, '.3g'), share])} |")
    lines += ["", "| case | setting | figure | value |", "|---|---|---|---|"]
    for row in rows:
        for name, value in row.get("figures", {}).items():
            shown = f"{value:.4g}" if isinstance(value, float) else value
            lines.append(f"| {row['case']} | {row['setting']} | {name} | {shown} |")
    failed = [f"- {row['case']} {row.get('setting', '')}: {row['error']}" for row in rows if "error" in row]
    return "\n".join([*lines, "", *failed]) + "\n"


def _text(value: float | None, form: str) -> str:
    return "" if value is None else f"{value:{form}}"


def _gib(size: int | None) -> str:
    return "" if size is None else f"{size / 2**30:.3g}"


def main() -> None:
    """Runs the cases; the status is 1 if one failed in a tiny run, where all of them must hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9, help="time for all cases together")
    parser.add_argument("--out", type=Path, default=Path("gpu_run"), help="folder for rows.jsonl, table.md and log.txt")
    parser.add_argument("--tiny", action="store_true", help="tiny stand-ins")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="cuda by default, with --tiny cpu")
    names = [case.name for case in CASES]
    parser.add_argument("--cases", nargs="*", choices=names, default=names, metavar="CASE", help=", ".join(names))
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    device = torch.device(given.device or ("cpu" if given.tiny else "cuda"))
    options = Options(device, Path(), given.tiny, given.out / "log.txt")
    rows = []
    with (given.out / "rows.jsonl").open("w", encoding="utf-8") as file:
        for row in run([case for case in CASES if case.name in given.cases], options, given.minutes):
            rows.append(row)
            print(json.dumps(row), file=file, flush=True)
    text = table(rows)
    (given.out / "table.md").write_text(text, encoding="utf-8")
    print(text)
    sys.exit(given.tiny and any("error" in row and row["case"] != "attention" for row in rows))


if __name__ == "__main__":
    main()
