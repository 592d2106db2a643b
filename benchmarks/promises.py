"""What the project promises itself about speed, as numbers that can be missed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.case import UNDER_TORCH_FUNC

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


def _exponent(growth: str, contestant: str, limit: float) -> Promise:
    def measured(result: Result) -> float:
        exponents = result["growth"][growth]["exponents"]
        return exponents[contestant] - exponents["hand-written"]

    return Promise(f"growth, {growth}: exponent of {contestant} less that of hand-written", limit, measured)


_LINE, _IMAGE = "reaction-diffusion, n = 100,000", "convolution, n = 65,536"
_HESSIAN = "dense, n = 128, batch 64, Hessian-vector product"
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
    _ratio(f"{_MILLION}, compiled", "backsolve", "closed form", 2.0),
    *(_ratio(f"arcsin, n = 1, {task}", "backsolve", "backsolve, eager", 5.0) for task in UNDER_TORCH_FUNC),
    _ratio(_GAMMA, "Bracket", "one evaluation of f", 16.0),
    _ratio(_GAMMA, "Bracket", "SciPy's find_root", 1 / 1.7),
    _ratio(_MIXTURE, "Bracket", "one evaluation of f", 30.0),
    _ratio(_MIXTURE, "Bracket", "SciPy's find_root", 1 / 4),
    *(_ratio(case, "Bracket", "50 bisections", 1 / 3) for case in (_GAMMA, _MIXTURE)),
    _ratio(_SHOOTING, "each_sample, 2 processes", "each_sample", 1 / 1.7),
    _ratio(_SHOOTING, "each_sample, 2 processes", "executor.map", 1.1),
    Promise(f"{_MILLION}: peak memory of backsolve, MiB", 25.0, lambda result: result["memory"][_MILLION]["backsolve"]),
    *(_ratio(f"dense in float32, n = 128, batch {b}", "backsolve", "hand-written", 1.4) for b in (64, 256)),
    *(
        _ratio(f"dense, n = {n}, batch 64", "backsolve, Dense", other, 1.2)
        for n in (128, 512)
        for other in ("hand-written", "floor")
    ),
    *(_ratio(f"dense, n = {n}, batch 64", _GIVEN, "hand-written", 1.2) for n in (128, 512)),
    _ratio(_LINE, "backsolve, Banded", "floor", 1.1),
    _ratio(_LINE, "backsolve, Banded", "hand-written", 2.5),
    _ratio(_IMAGE, "backsolve, GMRES", "hand-written", 1.3),
    _ratio(_HESSIAN, "backsolve", "hand-written", 1.6),
    _ratio(_HESSIAN, "backsolve, GMRES", "hand-written", 1.0),
    _exponent("arcsin", "backsolve", 0.1),
    _exponent("dense, batch 1", "backsolve, Dense", 0.1),
    _exponent("reaction-diffusion", "backsolve, Banded", 0.1),
]
