"""Draws `docs/images/step.png`, one training step: python docs/images/step.py (needs matplotlib)."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

INK, GREY, PAPER = "#1f2933", "#7b8794", "#ffffff"
LANGUAGE, FLOW, REWARD = "#2563a8", "#b4530a", "#2f7d4f"
PALE = {LANGUAGE: "#e3eefa", FLOW: "#fdeedd", REWARD: "#e2f3e8", GREY: "#f1f4f7"}


def box(axes: Axes, x: float, y: float, width: float, height: float, color: str, text: str, **style: object) -> None:
    """Draws a rounded box with text in its middle."""
    shape = FancyBboxPatch(
        (x, y), width, height, boxstyle="round,pad=0,rounding_size=0.12", facecolor=PALE[color], edgecolor=color, lw=1.4
    )
    axes.add_patch(shape)
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", color=INK, **style)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], color: str = GREY, bend: float = 0) -> None:
    """Draws an arrow, straight unless bent."""
    curve = f"arc3,rad={bend}"
    axes.add_patch(
        FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=13, lw=1.4, color=color, connectionstyle=curve)
    )


def brace(axes: Axes, x: float, top: float, color: str, text: str, count: int) -> None:
    """Draws a bracket beside so many rows of the group, with text above its left end."""
    bottom = top - 0.82 * count + 0.26
    axes.plot([x + 0.8, x + 0.68, x + 0.68, x + 0.8], [top, top, bottom, bottom], color=color, lw=1.3)
    axes.text(x + 0.55, top, text, ha="right", va="top", fontsize=8.5, color=color)


def scene(axes: Axes, x: float, y: float, blue: bool, left: bool) -> None:
    """Draws one small image: a red circle and a square, which may be wrong."""
    size = 0.62
    axes.add_patch(plt.Rectangle((x, y), size, size, facecolor=PAPER, edgecolor=GREY, lw=1))
    square = (0.08, 0.1) if left else (0.36, 0.34)
    circle = (0.46, 0.4) if left else (0.2, 0.2)
    axes.add_patch(plt.Circle((x + circle[0], y + circle[1]), 0.11, color="#d64545"))
    color = "#3d7edb" if blue else "#e0b73a"
    axes.add_patch(plt.Rectangle((x + square[0], y + square[1]), 0.2, 0.2, color=color))


def main() -> None:
    """Draws and saves the figure."""
    figure, axes = plt.subplots(figsize=(11, 5.2), dpi=150)
    axes.set(xlim=(0, 16.8), ylim=(-0.5, 7.3), aspect="equal")
    axes.axis("off")

    box(axes, 0.1, 4.0, 2.5, 1.3, GREY, "prompt\n“a red circle and\na blue square”", fontsize=9)
    box(axes, 2.6, 1.9, 2.4, 1.3, LANGUAGE, "language model\nrewrites it", fontsize=9.5)
    arrow(axes, (1.35, 3.95), (2.55, 2.6), bend=0.25)

    colors = [GREY] * 2 + [LANGUAGE] * 6
    scores = [0, 0, 1, 0, 1, 1, 0, 1]
    for number, color in enumerate(colors):
        y = 6.15 - 0.82 * number
        text = "the prompt" if color == GREY else f"rewrite {number - 1}"
        box(axes, 6.2, y, 1.9, 0.56, color, text, fontsize=8.5)
        arrow(axes, (8.15, y + 0.28), (8.75, y + 0.28))
        arrow(axes, (10.45, y + 0.28), (10.95, y + 0.28))
        scene(axes, 11.0, y - 0.03, blue=bool(scores[number]), left=number % 3 == 1)
        arrow(axes, (11.67, y + 0.28), (12.2, y + 0.28))
        advantage = "+1" if scores[number] else "−1"
        axes.text(14.4, y + 0.28, f"{scores[number]}", ha="center", va="center", fontsize=9, color=INK)
        axes.text(15.95, y + 0.28, advantage, ha="center", va="center", fontsize=9, color=INK)
    brace(axes, 5.3, 6.71, GREY, "m = 2 originals\n(retained)", count=2)
    brace(axes, 5.3, 5.07, LANGUAGE, "n − m = 6\nrewrites", count=6)
    arrow(axes, (2.65, 4.9), (5.68, 6.02), bend=-0.15)
    arrow(axes, (5.05, 2.74), (5.68, 2.74))

    box(axes, 8.8, 0.35, 1.6, 6.4, FLOW, "flow\nmodel\ndraws n\nimages", fontsize=9.5)
    box(axes, 12.25, 0.35, 1.5, 6.4, REWARD, "one\nreward\njudges all\nagainst\nthe\nprompt", fontsize=9.5)
    axes.text(14.4, 7.0, "reward", ha="center", fontsize=9, color=INK)
    axes.text(15.95, 7.0, "advantage", ha="center", fontsize=9, color=INK)
    axes.text(7.15, 7.0, "a group of n = 8", ha="center", fontsize=9, color=INK)

    axes.plot([14.1, 14.1, 16.25, 16.25], [0.25, 0.12, 0.12, 0.25], color=GREY, lw=1.2)
    axes.text(15.17, 3.4, "compared within the group", rotation=90, ha="center", va="center", fontsize=8.5, color=GREY)
    axes.plot([15.17, 15.17], [0.12, -0.35], color=FLOW, lw=1.4)
    axes.plot([15.17, 9.6], [-0.35, -0.35], color=FLOW, lw=1.4)
    arrow(axes, (9.6, -0.35), (9.6, 0.33), FLOW)
    axes.plot([9.6, 3.8], [-0.35, -0.35], color=LANGUAGE, lw=1.4)
    arrow(axes, (3.8, -0.35), (3.8, 1.85), LANGUAGE)
    axes.text(12.0, -0.26, "update of the flow model: all n", ha="center", va="bottom", fontsize=8.5, color=FLOW)
    said = "update of the language model: its n − m"
    axes.text(6.7, -0.26, said, ha="center", va="bottom", fontsize=8.5, color=LANGUAGE)

    figure.savefig(Path(__file__).with_suffix(".png"), bbox_inches="tight", pad_inches=0.05, facecolor="white")


if __name__ == "__main__":
    main()
