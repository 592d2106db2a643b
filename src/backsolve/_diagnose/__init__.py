"""Does this f invert this g, and what should be declared about it? One file a measurement; each ends in findings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from torch import Tensor

from backsolve import errors
from backsolve._diagnose.closure import Closure, measure_closure
from backsolve._diagnose.conditioning import measure_conditioning
from backsolve._diagnose.cost import measure_cost
from backsolve._diagnose.derivatives import measure_derivatives
from backsolve._diagnose.finding import Finding
from backsolve._diagnose.precision import measure_precision
from backsolve._diagnose.report import Report
from backsolve._diagnose.residual import measure_residual
from backsolve._diagnose.smoothness import measure_smoothness
from backsolve._diagnose.state import left_as_found, measure_state
from backsolve._diagnose.structure import measure_structure
from backsolve._diagnose.subject import Subject, examine
from backsolve._inverse import Inverse

__all__ = ["Finding", "Report", "diagnose"]

_SLOW = 0.1  # seconds for one call of g: finite differences of a slower one get fewer steps


class Measurement(Protocol):
    """What every measurement can do."""

    def findings(self) -> Any:
        """Say what was seen, as an iterator of `Finding`."""
        ...


M = TypeVar("M", bound=Measurement)


def diagnose(inv: Inverse, x: Tensor, /, *params: Any, **kwargs: Any) -> Report:
    """Measure whether f and g fit each other at a sample, and what to declare.

    Runs g some dozens of times and f some hundreds of times around the sample, and compares: f(g(x)) with x; what f
    mixes with what was declared; analytic derivatives of f and g, first and second, with finite differences. Buffers
    of modules, closed-over tensors and torch's random state are left as they were found.

    Args:
        inv: what `inverse` or `inverse_of` made; its `on_failure` and `verify` are set aside.
        x: a sample as typical and as large as is affordable: a coupling, a kink or a bad condition that no event of
            the sample shows cannot be found.
        *params: the params of the call.
        **kwargs: more of them.

    Returns:
        A `Report`: `print` it, ask `report.ok`, read `report.advice`, or its fields.

    Raises:
        ArgumentError: inv is no `Inverse`, or x cannot be its argument.

    Example:
        >>> import torch
        >>> from backsolve import diagnose, inverse
        >>> report = diagnose(inverse(torch.exp, torch.log), torch.linspace(0.5, 2.0, 10, dtype=torch.float64))
        >>> report.ok, report.structure.name, report.derivatives["g by x"].agrees
        (True, 'Diagonal()', True)
    """
    if not isinstance(inv, Inverse):
        raise errors.bad_subject(inv)
    with left_as_found(inv):
        try:
            subject = examine(inv, x, params, kwargs)
        except errors.ArgumentError:
            raise
        except errors.BacksolveError as error:
            return Report(inv._problem.call, (Finding("the call", "wrong", str(error)),))
        return _report(subject)


def _report(subject: Subject) -> Report:
    findings: list[Finding] = []
    closure = _measured("closure", findings, lambda: measure_closure(subject))
    closed = closure or Closure((), (), ())
    residual = _measured("residual", findings, lambda: measure_residual(subject))
    state = _measured("state", findings, lambda: measure_state(subject))
    structure = _measured("structure", findings, lambda: measure_structure(subject))
    conditioning = cost = None
    if structure is not None:
        conditioning = _measured("conditioning", findings, lambda: measure_conditioning(subject, structure))
        cost = _measured("cost", findings, lambda: measure_cost(subject, structure))
    levels = 4 if cost is not None and cost.g > _SLOW else 7
    derivatives = _measured("derivatives", findings, lambda: measure_derivatives(subject, closed, levels))
    smoothness = _measured("smoothness", findings, lambda: measure_smoothness(subject))
    precision = _measured("precision", findings, lambda: measure_precision(subject, closed))
    return Report(
        subject.inv._problem.call, tuple(findings), residual, structure, conditioning, derivatives, smoothness, closure,
        state, precision, cost,
    )  # fmt: skip


def _measured(topic: str, findings: list[Finding], measure: Callable[[], M]) -> M | None:
    """Make one measurement; what cannot be measured is said, not skipped."""
    try:
        measurement = measure()
        findings.extend(measurement.findings())
    except errors.BacksolveError as error:
        findings.append(Finding(topic, "wrong", str(error)))
    except Exception as error:  # noqa: BLE001 (f and g may raise whatever they like near the sample)
        findings.append(Finding(topic, "not certain", f"not measured: {type(error).__name__}: {error}"))
    else:
        return measurement
    return None
