"""The measurements as Markdown."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.promises import PROMISES

Result = Mapping[str, Any]  # what __main__ measured, as it stands in results.json
Cells = Sequence[str]


def markdown(result: Result) -> str:
    """The whole document."""
    parts = [
        "# Benchmarks",
        "Made by `make bench`; the numbers that this page and the figures are made from are in `results.json`.",
        _versions(result),
        "## Time",
        _READ_TIMES + " " + _noise(result["rows"]),
    ]
    for group in dict.fromkeys(row["group"] for row in result["rows"].values()):
        rows = {case: row["outcomes"] for case, row in result["rows"].items() if row["group"] == group}
        parts += [f"### {group}", _times(rows)]
    if result["complete"]:
        parts += _section("What the project promises itself", _READ_PROMISES, _promises(result))
    if result["memory"]:
        parts += _section("Peak memory", _READ_MEMORY, _memory(result["memory"]))
    if result["growth"]:
        parts += _section("Growth", _READ_GROWTH, _growth(result["growth"]))
    for case, places in result["profile"].items():
        parts += _section(f"Where the time goes: {case}", _READ_PROFILE, _profile(places))
    return "\n\n".join(parts) + "\n"


_READ_TIMES = """\
CPU time of forward and backward pass together, unless the row says otherwise, as a multiple of the hand-written code's,
which is given in microseconds. Below it stands the largest relative error of any result; **wrong** means that fewer
than half of the digits are right, *missing* how many of the gradients do not exist, and a dot that there is no way to
say it. One thread; the contestants of a row run interleaved in random order, and a ratio is the median over the rounds:
what happens seldom is not in it, such as the probe of f's structure that backsolve makes at the calls 1, 2, 4, 8, ...
Where g alone is listed, the others are given g's answer from memory, so that a long solver hides nothing: add it to
each. *hand-written* knows the derivatives of f; *floor* is the shortest code that sees f only through autograd, and
tests nothing; *backsolve, no test* has its tests switched off, so the difference is what they cost. Under *Compiled*
the unit is the compiled closed form, under *Transforms* the eager call of backsolve that computes the same: with a
backward pass, for the Hessian with two; *hand-written, for torch.func* is what an autograd.Function costs there that
knows everything. jaxopt and optimistix are compiled as a whole beforehand, which is not counted."""

_READ_PROMISES = """\
Ratios of times, unless another unit is named. What bounds those that are missed is in
[docs/speed.md](../../docs/speed.md)."""

_READ_MEMORY = "MiB of resident memory that one call takes at its highest, above its inputs, results included."

_READ_GROWTH = "Exponents p of time ~ n^p, fitted to each round; the median over the rounds."

_READ_PROFILE = """\
CPU time of one forward and backward pass of backsolve, by the module whose function is the
innermost one at work; `results.json` has the functions."""


def _section(title: str, text: str, table: str) -> list[str]:
    return [f"## {title}", text, table]


def _table(head: Cells, rows: Iterable[Cells]) -> str:
    aligned = ["---", *["--:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, aligned, *rows))


def _versions(result: Result) -> str:
    return "Versions: " + ", ".join(f"{name} {version}" for name, version in result["versions"].items()) + "."


def _noise(rows: Mapping[str, Any]) -> str:
    spreads = [o["spread"] for row in rows.values() for o in row["outcomes"].values() if o["spread"]]
    return f"Half of the rounds lie within {statistics.median(spreads):.0%} of a ratio, for the typical ratio."


def _times(rows: Mapping[str, Mapping[str, Any]]) -> str:
    contestants = list(dict.fromkeys(name for outcomes in rows.values() for name in outcomes))
    body = []
    for case, outcomes in rows.items():
        reference, *_ = outcomes.values()
        body.append([case, _short(reference["seconds"] * 1e6), *(_cell(outcomes.get(c)) for c in contestants)])
    return _table(["", "µs", *contestants], body)


def _cell(outcome: Mapping[str, Any] | None) -> str:
    if outcome is None:
        return "·"
    if outcome["failure"]:
        return outcome["failure"]
    error = f"{outcome['error']:.0e}".replace("e-0", "e-").replace("e+0", "e+")
    notes = f"**wrong** {error}" if outcome["wrong"] else error
    if outcome["missing"]:
        notes += f"<br>{outcome['missing']} missing"
    return f"{_short(outcome['ratio'])}<br>{notes}"


def _short(number: float) -> str:
    """Three digits."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.1f}" if number >= 10 else f"{number:.2f}"


def _promises(result: Result) -> str:
    body = []
    for promise in PROMISES:
        try:
            measured = promise.measured(result)
        except KeyError:  # a row that is younger than the result
            body.append([promise.what, f"≤ {promise.limit:g}", "·", "·"])
            continue
        kept = "yes" if measured <= promise.limit else "**no**"
        body.append([promise.what, f"≤ {promise.limit:g}", f"{measured:.3g}", kept])
    return _table(["", "promised", "measured", "kept"], body)


def _memory(memory: Mapping[str, Mapping[str, float | None]]) -> str:
    contestants = list(dict.fromkeys(name for row in memory.values() for name in row))
    rows = [
        [case, *("·" if row.get(c) is None else f"{row[c]:.0f}" for c in contestants)] for case, row in memory.items()
    ]
    return _table(["", *contestants], rows)


def _growth(growth: Mapping[str, Any]) -> str:
    contestants = list(dict.fromkeys(name for g in growth.values() for name in g["exponents"]))
    rows = (
        [title, *(f"{g['exponents'][c]:.2f}" if c in g["exponents"] else "·" for c in contestants)]
        for title, g in growth.items()
    )
    return _table(["", *contestants], rows)


def _profile(places: Mapping[str, float]) -> str:
    total, modules = sum(places.values()), Counter()
    for place, microseconds in places.items():
        modules[place.rpartition(" in ")[2]] += microseconds
    return _table(["", "µs", ""], ([m, _short(t), f"{t / total:.0%}"] for m, t in modules.most_common()))
