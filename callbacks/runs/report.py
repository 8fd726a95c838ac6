"""`python -m callbacks.runs.report RUN RUN ...`: one page that compares runs; of one run its own page, drawn again."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from callbacks.reporting.animation import animate
from callbacks.reporting.gallery import Gallery
from callbacks.reporting.page import comparison_page, run_page
from callbacks.runs.loading import load


def main(args: list[str] | None = None) -> None:
    """Entry point of the command.

    Args:
        args: the words after the command; None takes the process's own.
    """
    parser = argparse.ArgumentParser(prog="python -m callbacks.runs.report", description=__doc__.partition(":")[2])
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder, one above several, or a pattern")
    parser.add_argument("--output", type=Path, default=Path("comparison.html"), help="the page that compares several")
    parser.add_argument(
        "--gif", type=Path, help="also write one run's evaluations as an animation: same prompts and noise"
    )
    options = parser.parse_args(args)
    try:
        runs = load(*options.runs, stage=None, skip_broken=True)
        if options.gif is not None:
            animate(Gallery.read(runs[0].folder), options.gif)
        page = run_page(runs[0].folder) if len(runs) == 1 else comparison_page(runs, options.output)
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(page)


if __name__ == "__main__":
    main()
