"""Line charts as SVG, for pages that open without a network."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence

import matplotlib
import pandas as pd
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#000000")
"""Colours that people with any colour vision tell apart (Okabe and Ito), the first two for without and with PE."""
_DASHES = ("-", "--", "-.", ":")
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
    with matplotlib.rc_context({"font.size": 11, "svg.hashsalt": "report", "axes.grid": True, "grid.color": "#e4e4e4"}):
        figure = Figure(figsize=(5.2, 3.3), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
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
        axes.spines[["top", "right"]].set_visible(False)
        if len(curves) > 1:
            widest = max(map(len, curves))
            figure.legend(loc="outside lower center", ncols=max(1, min(len(curves), 52 // (widest + 6))), frameon=False)
        file = io.BytesIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    return f"data:image/svg+xml;base64,{base64.b64encode(file.getvalue()).decode()}"


def _short(curve: pd.Series) -> pd.Series:
    if len(curve) <= _POINTS:
        return curve
    place = pd.Series(range(len(curve))) * _POINTS // len(curve)
    means = pd.DataFrame({"x": curve.index.to_numpy(), "y": curve.to_numpy()}).groupby(place).mean()
    return pd.Series(means["y"].to_numpy(), index=means["x"])
