"""The measurements as SVG figures."""

from __future__ import annotations

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
    """One line a case: a mark for each contestant that is right, at its time relative to hand-written code."""
    rows = {case: row["outcomes"] for case, row in rows.items() if "hand-written" in row["outcomes"]}
    figure, axes = plt.subplots(figsize=(8, 1 + 0.27 * len(rows)))
    for name, (colour, marker) in STYLES.items():
        points = [(o["ratio"], line) for line, row in enumerate(rows.values()) if _right(o := row.get(name))]
        if points:
            look = {"s": 60, "zorder": 3} if name == "backsolve" else {"s": 30, "zorder": 2}
            axes.scatter(*zip(*points, strict=True), c=colour, marker=marker, label=name, **look)
    axes.set(xscale="log", xlabel="CPU time / hand-written code", yticks=range(len(rows)), yticklabels=list(rows))
    axes.invert_yaxis()
    axes.xaxis.set_major_formatter("{x:g}")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _right(outcome: Mapping[str, Any] | None) -> bool:
    return outcome is not None and not (outcome["failure"] or outcome["wrong"] or outcome["missing"])


def _growth(growth: Mapping[str, Any]) -> plt.Figure:
    figure, panels = plt.subplots(1, len(growth), figsize=(8, 3), squeeze=False)
    for axes, (title, g) in zip(panels.flat, growth.items(), strict=True):
        for name, seconds in g["seconds"].items():
            colour, marker = STYLES[name]
            label = f"{name}, n^{g['exponents'][name]:.2f}"
            axes.loglog(g["sizes"], [s * 1e3 for s in seconds], color=colour, marker=marker, label=label)
        axes.set(title=title, xlabel="n", ylabel="CPU time, ms")
        axes.legend()
    figure.tight_layout()
    return figure
