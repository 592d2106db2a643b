"""The command: measure the rows that were asked for, print them, and write the full set of them down."""

from __future__ import annotations

import argparse
import json
import platform
import random
import sys
from collections.abc import Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.case import Case
from benchmarks.measure import grow, measure
from benchmarks.memory import peaks
from benchmarks.profiles import profile
from benchmarks.report import markdown
from benchmarks.sampling import settle
from benchmarks.workloads import CASES, GROWTH, PROFILED

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "numpy", "backsolve", "torchopt", "xitorch", "torchdeq", "zuko", "jax", "jaxopt", "optimistix")


def main(arguments: Sequence[str]) -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("words", nargs="*", help="only rows whose name contains one of these; all if there is none")
    parser.add_argument("--quick", action="store_true", help="fewer rows and shorter, in about two minutes")
    parser.add_argument("--seconds", type=float, help="time for each row (14, or 8 if quick)")
    parser.add_argument("--output", type=Path, help="folder to write to (benchmarks/results if all is measured)")
    parser.add_argument("--redraw", action="store_true", help="measure nothing; make the documents anew")
    options = parser.parse_args(arguments)
    complete = not options.words and not options.quick
    output = options.output or (RESULTS if complete else None)
    if options.redraw:
        result = json.loads((output or RESULTS).joinpath("results.json").read_text(encoding="utf-8"))
    else:
        result = measure_all(options.words, options.quick, options.seconds or (8.0 if options.quick else 14.0))
    if output:
        write(result, output)  # first of all: it took long
    print(markdown(result))


def measure_all(words: Sequence[str], quick: bool, seconds: float) -> dict[str, Any]:
    """Everything that results.json holds."""
    settle()
    order = random.Random()
    cases = [c for c in CASES.values() if (c.quick or not quick) and any(w in c.name for w in words or [""])]
    result: dict[str, Any] = {"complete": not words and not quick, "versions": versions()}
    result["rows"] = {case.name: row(case, seconds, order) for case in cases}
    result["memory"] = (
        {} if quick else {case.name: peaks(case) for case in cases if case.memory and case.device == "cpu"}
    )
    result["growth"] = {} if quick or words else {title(g): grow(g, 2 * seconds, order) for g in GROWTH}
    result["profile"] = {} if quick or words else {c.name: profile(c, "backsolve", seconds / 2) for c in PROFILED}
    return result


def row(case: Case, seconds: float, order: random.Random) -> dict[str, Any]:
    """The outcomes of one case."""
    print(case.name, file=sys.stderr, flush=True)
    return {"group": case.group, "outcomes": {name: asdict(o) for name, o in measure(case, seconds, order).items()}}


def title(cases: Sequence[Case]) -> str:
    """What is common to cases of many sizes."""
    _, *batch = cases[0].size
    return ", ".join([cases[0].problem.name, *(f"batch {b}" for b in batch)])


def versions() -> dict[str, str]:
    """Python's and those of the packages that are installed."""
    installed = [p for p in PACKAGES if any(metadata.distributions(name=p))]
    return {"Python": platform.python_version()} | {p: metadata.version(p) for p in installed}


def write(result: dict[str, Any], folder: Path) -> None:
    """Write the numbers, the document and the figures."""
    from benchmarks.figures import draw

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (folder / "results.md").write_text(markdown(result), encoding="utf-8")
    draw(result, folder)


if __name__ == "__main__":
    main(sys.argv[1:])
