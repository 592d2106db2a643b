"""What does a call cost, and what would another structure cost?"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from backsolve import jacobians
from backsolve._diagnose.finding import Finding
from backsolve._diagnose.structure import Structure
from backsolve._diagnose.subject import Subject
from backsolve._inverse import Inverse

_PATIENCE = 0.1  # seconds for each quantity
_WORTHWHILE = 1.3  # a smaller gain may be noise of the clock


@dataclass(frozen=True)
class Cost:
    """Median seconds.

    Attributes:
        g: one call of the solver.
        f: one call of f.
        gradient: the backward pass for x, by structure: the declared one, and the one that was measured.
        declared: which of these was declared.
    """

    g: float
    f: float
    gradient: dict[str, float]
    declared: str

    def findings(self) -> Iterator[Finding]:
        """The times, and what a cheaper structure saves."""
        gradients = ", ".join(f"{name} {_show(t)}" for name, t in self.gradient.items())
        text = f"g {_show(self.g)}, f {_show(self.f)}, gradient: {gradients}"
        best = min(self.gradient, key=lambda name: self.gradient[name], default=self.declared)
        gain = self.gradient.get(self.declared, 0.0) / self.gradient[best] if self.gradient else 1.0
        advice = f"declare jacobian={best}: the gradient is {gain:.2g} x cheaper" if gain > _WORTHWHILE else ""
        yield Finding("cost", "note", text, advice)


def _show(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def measure_cost(subject: Subject, structure: Structure) -> Cost:
    """Time g, f and the gradient under the structures that hold."""
    with torch.no_grad():
        g, f = (_seconds(run) for run in (lambda: subject.g(subject.x), lambda: subject.f(subject.y)))
    declared = type(subject.jacobian).__name__
    options = {declared: subject.jacobian}
    kind, _, rest = structure.name.partition("(")
    made = getattr(jacobians, kind, None)
    if structure.event_dim <= subject.event_dim and made is not None and kind != declared:
        numbers = [int(n) for n in rest.rstrip(")").split(", ")] if kind == "Banded" else []
        flags = {"upper": True} if "upper=True" in rest else {}
        options[structure.name] = made(*numbers, **flags)
    return Cost(g, f, {name: _gradient_time(subject, option) for name, option in options.items()}, declared)


def _gradient_time(subject: Subject, jacobian: jacobians.Jacobian) -> float:
    """The backward pass alone, with a solver that knows the answer."""
    changes = {"jacobian": jacobian, "on_failure": "ignore", "verify": False, "refine": 0}
    inv = Inverse(subject.inv._f, lambda *_, **__: subject.y.clone(), {**subject.inv._options, **changes})
    args, kwargs = subject.arguments.rebuild(subject.tensors)
    x = subject.x.clone().requires_grad_()

    def both() -> None:
        torch.autograd.grad(inv(x, *args, **kwargs).sum(), x)

    def forward() -> None:
        inv(x, *args, **kwargs)

    with torch.enable_grad():
        return max(_seconds(both) - _seconds(forward), 1e-7)


def _seconds(run: Callable[[], object]) -> float:
    run()  # the first call may compile or load something
    times: list[float] = []
    begin = time.perf_counter()
    while not times or (time.perf_counter() - begin < _PATIENCE and len(times) < 50):
        start = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times)
