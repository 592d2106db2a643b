"""The measurements as SVG figures."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt

mpl.use("svg")
mpl.rcParams |= {
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": 9,
    "grid.color": "0.9",
    "legend.frameon": False,
    "savefig.bbox": "tight",
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "backsolve",  # the same numbers make the same file
}

# Colours that the colour-blind can tell apart (Okabe and Ito), and shapes for those who print in grey.
STYLES = {
    "closed form": ("#999999", "|"),
    "hand-written": ("#000000", "|"),
    "floor": ("#56b4e9", "D"),
    "backsolve": ("#d55e00", "o"),
    "backsolve, Dense": ("#d55e00", "s"),
    "backsolve, Banded": ("#d55e00", "d"),
    "backsolve, GMRES": ("#d55e00", "p"),
    "dense autograd.functional": ("#009e73", "s"),
    "TorchOpt": ("#0072b2", "v"),
    "xitorch": ("#0072b2", "^"),
    "torchdeq": ("#0072b2", "<"),
    "zuko": ("#0072b2", ">"),
    "jaxopt": ("#cc79a7", "P"),
    "optimistix": ("#cc79a7", "X"),
}


def draw(result: Mapping[str, Any], folder: Path) -> None:
    """Write ratios.svg, and growth.svg if growth was measured."""
    _ratios(result["rows"]).savefig(folder / "ratios.svg", metadata={"Date": None})
    if result["growth"]:
        _growth(result["growth"]).savefig(folder / "growth.svg", metadata={"Date": None})
    plt.close("all")


def _ratios(rows: Mapping[str, Any]) -> plt.Figure:
    """One line a case: a mark for each contestant at its time relative to hand-written code, hollow if it is wrong."""
    rows = {name: row for name, row in rows.items() if next(iter(row["outcomes"])) == "hand-written"}
    figure, axes = plt.subplots(figsize=(8, 1 + 0.27 * len(rows)))
    for name, (colour, marker) in STYLES.items():
        for right in (True, False):
            points = [(_time(row["outcomes"].get(name), right), line) for line, row in enumerate(rows.values())]
            axes.plot(
                [time for time, _ in points],
                [line for _, line in points],
                linestyle="none",
                color=colour,
                marker=marker,
                markerfacecolor=colour if right else "none",
                markersize=8 if name == "backsolve" else 6,
                label=name if right else None,
                zorder=3 if name == "backsolve" else 2,
            )
    axes.set(xscale="log", xlabel="CPU time / hand-written code", yticks=range(len(rows)), yticklabels=list(rows))
    axes.invert_yaxis()
    axes.xaxis.set_major_formatter("{x:g}")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), title="hollow: wrong, or\ngradients missing")
    return figure


def _time(outcome: Mapping[str, Any] | None, right: bool) -> float:
    """The relative time of an outcome that is as right as asked for, else NaN, which is not drawn."""
    if outcome is None or outcome["ratio"] is None or right == (outcome["wrong"] or outcome["missing"] > 0):
        return math.nan
    return outcome["ratio"]


def _growth(growth: Mapping[str, Any]) -> plt.Figure:
    figure, panels = plt.subplots(1, len(growth), figsize=(4 * len(growth), 3), squeeze=False)
    for axes, (title, g) in zip(panels.flat, growth.items(), strict=True):
        for name, seconds in g["seconds"].items():
            colour, marker = STYLES[name]
            label = f"{name}, n^{g['exponents'][name]:.2f}"
            axes.loglog(g["sizes"], [s * 1e3 for s in seconds], color=colour, marker=marker, label=label)
        axes.set(
            title=title,
            xlabel="n",
            ylabel="CPU time, ms",
            xticks=g["sizes"],
            xticklabels=[f"{n:,}" for n in g["sizes"]],
        )
        axes.minorticks_off()
        axes.legend()
    figure.tight_layout()
    return figure
