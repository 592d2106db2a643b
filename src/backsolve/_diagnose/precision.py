"""In which precision is everything computed, and on which device?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from backsolve._arguments import Arguments
from backsolve._diagnose.closure import Closure
from backsolve._diagnose.finding import Finding
from backsolve._diagnose.subject import Subject
from backsolve._linearize import linearize

_VISIBLE = 2.0**-30  # a relative change of y that float64 shows and float32 does not


@dataclass(frozen=True)
class Precision:
    """Surprises of dtype and device.

    Attributes:
        others: tensors of another floating dtype than x, by name.
        devices: tensors with dimensions on another device than x, by name.
        coarse: whether f of float64 values is rounded to float32 somewhere inside.
        slope_error: the largest relative difference between f' in the dtype of x and in float64; None if x is float64,
            or f does not run in float64.
    """

    dtype: torch.dtype
    others: tuple[str, ...]
    devices: tuple[str, ...]
    coarse: bool
    slope_error: float | None

    def findings(self) -> Iterator[Finding]:
        """What to convert."""
        eps = torch.finfo(self.dtype).eps
        name = str(self.dtype).removeprefix("torch.")
        if self.others:
            text = f"x is {name}, but {', '.join(self.others)} have another dtype"
            yield Finding("precision", "warning", text, "convert them: .to(x.dtype); the coarser one decides")
        if self.devices:
            yield Finding(
                "precision", "warning", f"on another device than x: {', '.join(self.devices)}", ".to(x.device)"
            )
        if self.coarse:
            text = f"f of {name} values is rounded to a lower precision inside"
            yield Finding("precision", "wrong", text, "look for .float(), float32 constants or tables in f")
        if self.slope_error is not None and self.slope_error > eps**0.5:
            text = f"f' in {name} is up to {self.slope_error:.1g} off its value in float64"
            yield Finding("precision", "wrong", text, "compute in float64 here, or write f in a form that keeps digits")
        if not (self.others or self.devices or self.coarse or (self.slope_error or 0.0) > eps**0.5):
            yield Finding("precision", "good", f"all {name}" + _accuracy(self.slope_error))


def _accuracy(slope_error: float | None) -> str:
    return "" if slope_error is None else f"; f' agrees with float64 to {slope_error:.1g}"


def measure_precision(subject: Subject, closure: Closure) -> Precision:
    """Compare dtypes and devices, and f with itself in another precision."""
    x = subject.x
    tensors = [*zip(subject.names, subject.tensors, strict=True), *closure.read]
    return Precision(
        x.dtype,
        tuple(name for name, t in tensors if t.is_floating_point() and t.dtype != x.dtype),
        tuple(name for name, t in tensors if t.dim() and t.device != x.device),
        x.dtype is torch.float64 and _is_coarse(subject),
        None if x.dtype is torch.float64 else _slope_error(subject),
    )


@torch.no_grad()
def _is_coarse(subject: Subject) -> bool:
    """Whether f answers a change of y that only float64 can show with nothing, or with a leap, nearly everywhere."""
    at, y = subject.linearization, subject.y
    if not at.depends_on_y or not y.numel():
        return False
    step = y * _VISIBLE
    change = subject.per_unit((subject.f(y + step) - subject.f(y)).abs())
    answers = (change > 0) | (subject.per_unit(step.abs()) == 0)
    return bool(answers.to(torch.float64).mean() < 0.5)


def _slope_error(subject: Subject) -> float | None:
    def widened(t: Tensor) -> Tensor:
        return t.double() if t.is_floating_point() else t

    try:
        args, kwargs = subject.arguments.rebuild([widened(t) for t in subject.tensors])
        forward = subject.inv._problem.bind(Arguments(args, kwargs), implicit=False)
        wide = linearize(forward, subject.y.double())
        u = subject.cotangent()
        exact, actual = wide.pull(u.double()), subject.linearization.pull(u).double()
    except Exception:  # noqa: BLE001 (f closes over tensors of its own dtype, or raises whatever it likes)
        return None
    difference = torch.where(u == 0, 0.0, (actual - exact).abs()) / exact.abs().clamp(min=1e-300)
    return difference.nan_to_num(0.0, 0.0).max().item() if u.numel() else None
