"""The report: all measurements, what follows from them, and a table of it."""

from __future__ import annotations

import io
import shutil
import sys
import textwrap
from dataclasses import dataclass
from typing import Any

from backsolve._diagnose.closure import Closure
from backsolve._diagnose.conditioning import Conditioning
from backsolve._diagnose.cost import Cost
from backsolve._diagnose.derivatives import Derivatives
from backsolve._diagnose.finding import Finding, Level
from backsolve._diagnose.precision import Precision
from backsolve._diagnose.residual import Residual
from backsolve._diagnose.smoothness import Smoothness
from backsolve._diagnose.state import State
from backsolve._diagnose.structure import Structure

_STYLES: dict[Level, str] = {
    "good": "green", "note": "default", "not certain": "yellow", "warning": "bold yellow", "wrong": "bold red",
}  # fmt: skip


@dataclass(frozen=True)
class Report:
    """What `diagnose` found. `print(report)` shows it as a table; the measurements are fields.

    A measurement that could not be made is None, and a finding says why.

    Attributes:
        call: how messages name the inverse.
        findings: every line of the table.
        residual: `f(g(x)) - x`.
        structure: which elements of y each element of f(y) depends on.
        conditioning: singular values of J.
        derivatives: analytic derivatives against finite differences.
        smoothness: kinks.
        closure: tensors that f reads without being given them.
        state: dropout, moving buffers, random numbers.
        precision: dtypes and devices.
        cost: times.
    """

    call: str
    findings: tuple[Finding, ...]
    residual: Residual | None = None
    structure: Structure | None = None
    conditioning: Conditioning | None = None
    derivatives: Derivatives | None = None
    smoothness: Smoothness | None = None
    closure: Closure | None = None
    state: State | None = None
    precision: Precision | None = None
    cost: Cost | None = None

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong; there may be warnings, and what is not certain."""
        return not any(finding.level == "wrong" for finding in self.findings)

    @property
    def advice(self) -> list[str]:
        """What to do, the worst first."""
        order: list[Level] = ["wrong", "warning", "not certain", "note", "good"]
        told = sorted((f for f in self.findings if f.advice), key=lambda f: order.index(f.level))
        return list(dict.fromkeys(f.advice for f in told))

    def plot(self, path: str | None = None) -> Any:
        """Draw the structure of J and histograms of residuals and of errors of derivatives; save it if path is given.

        Returns the matplotlib figure.
        """
        from backsolve._diagnose.plot import plot

        return plot(self, path)

    def __str__(self) -> str:
        try:
            from rich.console import Console
        except ImportError:
            return _plain(self)
        terminal = sys.stdout.isatty()
        width = min(shutil.get_terminal_size((120, 24)).columns, 140)
        console = Console(file=io.StringIO(), force_terminal=terminal, width=width, legacy_windows=False)
        console.print(self)
        return console.file.getvalue().rstrip("\n")  # type: ignore[attr-defined]

    def __rich__(self) -> Any:
        """The table for `rich.print`."""
        from rich.table import Table
        from rich.text import Text

        table = Table(title=Text(_title(self)), title_justify="left", show_lines=False)
        for heading in ("", "measured", "advice"):
            table.add_column(heading, overflow="fold")
        table.columns[0].no_wrap = True
        for finding in self.findings:
            style = _STYLES[finding.level]
            table.add_row(
                Text(f"{finding.topic}\n{finding.level}", style), Text(finding.text), Text(finding.advice, "italic")
            )
        return table


def _title(report: Report) -> str:
    levels = [finding.level for finding in report.findings]
    numbers = {level: levels.count(level) for level in ("wrong", "warning", "not certain") if level in levels}
    counted = ", ".join(f"{number} {level}" for level, number in numbers.items()) or "nothing to complain about"
    return f"{report.call}: {'ok' if report.ok else 'NOT OK'} ({counted})"


def _plain(report: Report) -> str:
    """The table without rich."""
    width = min(shutil.get_terminal_size((120, 24)).columns, 120)
    first = max((len(f.topic) for f in report.findings), default=0) + 2
    lines = [_title(report)]
    for finding in report.findings:
        text = finding.text + (f"\n-> {finding.advice}" if finding.advice else "")
        cells = [w for line in text.split("\n") for w in textwrap.wrap(line, width - first - 14)]
        for i, cell in enumerate(cells):
            head = f"{finding.topic:<{first}}{finding.level:<13} " if i == 0 else " " * (first + 14)
            lines.append(head + cell)
    return "\n".join(lines)
