"""What the project promises itself about speed, as numbers that can be missed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Result = Mapping[str, Any]


@dataclass(frozen=True)
class Promise:
    """A number that must not exceed its limit."""

    what: str
    limit: float
    measured: Callable[[Result], float]


def _ratio(case: str, contestant: str, reference: str, limit: float) -> Promise:
    def measured(result: Result) -> float:
        outcomes = result["rows"][case]["outcomes"]
        return outcomes[contestant]["ratio"] / outcomes[reference]["ratio"]

    return Promise(f"{case}: {contestant} / {reference}", limit, measured)


def _extra_microseconds(case: str, contestant: str, reference: str, limit: float) -> Promise:
    def measured(result: Result) -> float:
        outcomes = result["rows"][case]["outcomes"]
        return (outcomes[contestant]["seconds"] - outcomes[reference]["seconds"]) * 1e6

    return Promise(f"{case}: {contestant} less {reference}, µs", limit, measured)


def _exponent(growth: str, limit: float) -> Promise:
    def measured(result: Result) -> float:
        exponents = result["growth"][growth]["exponents"]
        return abs(exponents["backsolve"] - exponents["hand-written"])

    return Promise(f"growth, {growth}: difference of the exponents of backsolve and hand-written", limit, measured)


_MILLION, _GIVEN, _UNTESTED = "arcsin, n = 1,000,000", "backsolve, f' given", "backsolve, f' given, no test"
_SHOOTING = "shooting, n = 256, no gradient"
_GAMMA, _MIXTURE = (f"{name}, n = 1,000,000, inversion" for name in ("gamma quantile", "quantile of a mixture"))

PROMISES = [
    _ratio("arcsin, n = 1", "backsolve", "floor", 1.3),
    _ratio(_MILLION, "backsolve", "floor", 1.05),
    _ratio("implied volatility, n = 100,000", "backsolve", "floor", 1.1),
    *(_ratio(case, _UNTESTED, "hand-written", 1.3) for case in ("arcsin, n = 1", _MILLION)),
    *(_ratio(case, _GIVEN, "hand-written", 2.0) for case in ("arcsin, n = 1", _MILLION)),
    _extra_microseconds("arcsin, n = 1, no gradient", "backsolve", "hand-written", 10.0),
    *(_ratio(f"dense, n = {n}, batch {b}", "backsolve", "hand-written", 2.2) for n in (4, 32) for b in (1, 64, 256)),
    _ratio("arcsin, n = 1, Hessian-vector product", "backsolve", "closed form", 2.7),
    _ratio(_GAMMA, "Bracket", "one evaluation of f", 16.0),
    _ratio(_GAMMA, "Bracket", "SciPy's find_root", 1 / 1.7),
    _ratio(_MIXTURE, "Bracket", "one evaluation of f", 30.0),
    _ratio(_MIXTURE, "Bracket", "SciPy's find_root", 1 / 4),
    *(_ratio(case, "Bracket", "50 bisections", 1 / 3) for case in (_GAMMA, _MIXTURE)),
    _ratio(_SHOOTING, "each_sample, 2 processes", "each_sample", 1 / 1.7),
    _ratio(_SHOOTING, "each_sample, 2 processes", "executor.map", 1.1),
    Promise(f"{_MILLION}: peak memory of backsolve, MiB", 25.0, lambda result: result["memory"][_MILLION]["backsolve"]),
    _exponent("arcsin", 0.1),
    _exponent("dense, batch 1", 0.1),
]
