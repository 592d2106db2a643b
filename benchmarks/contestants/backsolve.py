"""backsolve as a user writes it: from f and g, with a residual test; and with the derivative of f given."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from backsolve import Dense, Diagonal, inverse
from benchmarks.case import Case, Run


def from_f(case: Case) -> Run:
    """Everything on."""
    return _run(case)


def from_entries(case: Case) -> Run | None:
    """The derivative of f is given; f itself is evaluated for the residual test only."""
    return _run(case, **_entries(case))


def from_entries_unchecked(case: Case) -> Run | None:
    """The derivative of f is given and the residual is not tested, so that f is not evaluated but for the probe."""
    return _run(case, **_entries(case), residual_tol=math.inf)


def untested(case: Case) -> Run:
    """Nothing is tested."""
    return _run(case, residual_tol=math.inf, on_failure="ignore", verify=False)


def with_structure(name: str) -> Callable[[Case], Run | None]:
    """With a structure of J declared, and everything on."""

    def contestant(case: Case) -> Run | None:
        structure = case.problem.structures.get(name)
        return None if structure is None else _run(case, jacobian=structure)

    return contestant


def _run(case: Case, **options: Any) -> Run:
    return case.run(inverse(case.problem.f, case.g, event_dim=case.problem.event_dim, **options))


def _entries(case: Case) -> dict[str, Any]:
    structure = Dense if case.problem.event_dim else Diagonal
    return {"jacobian": structure(entries=case.problem.entries)}
