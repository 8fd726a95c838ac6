"""Line charts as SVG, for pages that open without a network."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import pandas as pd
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#000000")
"""Colours that people with any colour vision tell apart (Okabe and Ito), the first two for without and with PE."""
_DASHES = ("-", "--", "-.", ":")
_STYLE: dict[Any, Any] = {
    "font.size": 11,
    "svg.fonttype": "none",  # letters stay letters: the reader's font, a tenth of the bytes
    "svg.hashsalt": "report",
    "axes.grid": True,
    "grid.color": "#e4e4e4",
}
_WIDTH, _PLOT, _BELOW, _LINE = 5.2, 2.6, 0.6, 0.25
"""Width of a chart; heights of its plot, of the axis' numbers and name, and of a line of the legend, in inches."""
_POINTS = 300
"""Points of a curve; a longer one is averaged over equal stretches."""


def line_chart(curves: Mapping[str, pd.Series], order: Sequence[str], *, noisy: bool = False) -> str:
    """Draws curves over rollouts.

    Args:
        curves: label -> values by rollouts, without gaps.
        order: all labels of a page, so that each has the same colour in every chart.
        noisy: draw a running mean over a tenth of the curve, and pale the values themselves.

    Returns:
        The chart as a `data:` address.
    """
    columns = max(1, min(len(curves), 52 // (max(map(len, curves)) + 6)))
    legend = _LINE * math.ceil(len(curves) / columns) if len(curves) > 1 else 0.0
    height = _PLOT + _BELOW + legend
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, height))
        FigureCanvasSVG(figure)
        # Fixed margins: a layout engine would draw every chart twice to measure its letters.
        axes = figure.add_axes((0.17, (_BELOW + legend) / height, 0.75, 1 - (_BELOW + legend + 0.1) / height))
        for label, curve in curves.items():
            number, curve = list(order).index(label), _short(curve)
            color, dash = COLORS[number % len(COLORS)], _DASHES[number % len(_DASHES)]  # equal curves both show
            marker = "o" if len(curve) <= 25 else ""
            if noisy and len(curve) >= 10:
                axes.plot(curve.index, curve, color=color, alpha=0.25, linewidth=1)
                curve, marker = curve.rolling(max(len(curve) // 10, 3), center=True, min_periods=1).mean(), ""
            axes.plot(curve.index, curve, dash, label=label, color=color, linewidth=2, marker=marker, markersize=4)
        axes.set_xlabel("images drawn for training (rollouts)")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}"))
        axes.spines[["top", "right"]].set_visible(False)
        if legend:
            figure.legend(loc="lower center", ncols=columns, frameon=False, borderaxespad=0)
        file = io.BytesIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    return f"data:image/svg+xml;base64,{base64.b64encode(file.getvalue()).decode()}"


def _short(curve: pd.Series) -> pd.Series:
    if len(curve) <= _POINTS:
        return curve
    place = pd.Series(range(len(curve))) * _POINTS // len(curve)
    means = pd.DataFrame({"x": curve.index.to_numpy(), "y": curve.to_numpy()}).groupby(place).mean()
    return pd.Series(means["y"].to_numpy(), index=means["x"])
