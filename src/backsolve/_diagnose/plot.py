"""The report as a picture: what f mixes, how far f(g(x)) is from x, and how far derivatives are off."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from backsolve import errors

if TYPE_CHECKING:
    from backsolve._diagnose.report import Report


def plot(report: Report, path: str | None = None) -> Any:
    """Draw three panels; save them if there is a path; return the figure of matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise errors.missing_extra("report.plot()", "matplotlib", "diagnose") from error
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    _sparsity(figure, left, report)
    _residuals(middle, report)
    _derivatives(right, report)
    figure.suptitle(f"{report.call}: {'ok' if report.ok else 'not ok'}", color="black" if report.ok else "firebrick")
    if path is not None:
        figure.savefig(path, dpi=120)
    return figure


def _sparsity(figure: Any, axes: Any, report: Report) -> None:
    """log10 |J_ij|, the largest over the sample; white where it is exactly 0."""
    from matplotlib.ticker import MaxNLocator

    axes.set_title("structure of J")
    structure = report.structure
    if structure is None or structure.magnitude is None or structure.rows is None:
        name = "not measured" if structure is None else structure.name
        _say(axes, f"{name}\n{'f is elementwise' if name == 'Diagonal()' else ''}")
        return
    rows, magnitude = structure.rows, structure.magnitude.detach().cpu().double()
    logarithm = torch.where(magnitude > 0, magnitude.log10(), torch.nan)
    image = axes.imshow(logarithm.numpy(), cmap="viridis", interpolation="nearest", aspect="auto")
    axes.set_xlabel(f"element of y   ({structure.name}{'' if structure.certain else ', not certain'})")
    axes.set_ylabel("element of f(y)")
    if len(rows) < magnitude.shape[-1]:
        axes.set_ylabel("element of f(y): some rows")
        ticks = range(0, len(rows), max(1, len(rows) // 6))
        axes.set_yticks(list(ticks), [str(int(rows[i])) for i in ticks])
    else:
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.colorbar(image, ax=axes, label="log10 |J|, largest of the sample")


def _residuals(axes: Any, report: Report) -> None:
    axes.set_title("residual |f(g(x)) - x|")
    residual = report.residual
    if residual is None or not residual.total:
        _say(axes, "not measured")
        return
    _histogram(axes, {f"{residual.failed} of {residual.total} fail": residual.each}, "events")


def _derivatives(axes: Any, report: Report) -> None:
    axes.set_title("derivatives: analytic against differences")
    found = report.derivatives.comparisons if report.derivatives else ()
    each = {c.what: c.each for c in found if c.each is not None and c.each.isfinite().any()}
    if not each:
        _say(axes, "not measured")
        return
    _histogram(axes, each, "events, or sums over events")


def _histogram(axes: Any, values: dict[str, Tensor], what: str) -> None:
    """Stacked counts by decade; what is exactly 0 stands in a bin of its own, at the left."""
    decades = {name: t.flatten().double().nan_to_num(torch.inf).log10().clamp(-18, 6) for name, t in values.items()}
    low = min(float(t.min()) for t in decades.values())
    high = max(float(t.max()) for t in decades.values())
    edges = torch.arange(int(low // 1), int(high // 1) + 2).tolist()
    axes.hist(
        [t.cpu().numpy() for t in decades.values()], bins=edges, stacked=True, label=list(decades), edgecolor="white"
    )
    shown = edges[:: math.ceil(len(edges) / 6)]
    axes.set_xticks(shown, ["0" if e <= -18 else f"1e{e}" for e in shown])
    axes.set_ylabel(f"number of {what}")
    axes.legend(fontsize=8)


def _say(axes: Any, text: str) -> None:
    axes.text(0.5, 0.5, text, ha="center", va="center", transform=axes.transAxes)
    axes.set_xticks([])
    axes.set_yticks([])
