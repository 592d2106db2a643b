"""How much a small error of x, or of J, is amplified."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from backsolve._diagnose.finding import Finding
from backsolve._diagnose.structure import Structure, rows_of_jacobian
from backsolve._diagnose.subject import Subject

_ENTRIES = 2**22  # of J; for more, only so many events are looked at


@dataclass(frozen=True)
class Conditioning:
    """The conditioning of J over the sample.

    Attributes:
        condition: the largest 2-norm condition number of an event's J; 1 if f is elementwise; None if not measured.
        smallest: the smallest `|f'(y)|` if f is elementwise, else the smallest singular value of an event's J.
        index: the event with the smallest.
        singular: how many events the declared structure finds singular.
    """

    condition: float | None
    smallest: float | None
    index: tuple[int, ...]
    singular: int
    eps: float

    def findings(self) -> Iterator[Finding]:
        """Whether J can be trusted."""
        if self.smallest is None:
            yield Finding("conditioning", "not certain", "J is too large for singular values")
            return
        text = f"smallest |J| {self.smallest:.2g} at index {self.index}, condition number {self.condition:.2g}"
        advice = 'keep x away from such points, or on_failure="nan" loses only these derivatives'
        if self.singular:
            yield Finding("conditioning", "wrong", f"J is singular in {self.singular} events; {text}", advice)
        elif self.condition is not None and self.condition * self.eps > math.sqrt(self.eps):
            digits = math.log10(self.condition)
            yield Finding(
                "conditioning", "warning", f"{text}: {digits:.0f} digits are lost", "use float64, or other units"
            )
        else:
            yield Finding("conditioning", "good", text)


@torch.no_grad()
def measure_conditioning(subject: Subject, structure: Structure) -> Conditioning:
    """Singular values of J, event by event."""
    at, y = subject.linearization, subject.y
    eps = torch.finfo(y.dtype).eps
    failed = subject.jacobian.assemble(at).singular()
    singular = 0 if failed is None else int(failed.sum())
    k = subject.event_dim if structure.event_dim else 0
    n = math.prod(y.shape[y.dim() - k :])
    if not y.numel():
        return Conditioning(None, None, (), singular, eps)
    if not k:
        smallest = at.pull(torch.ones_like(y)).abs()
        return Conditioning(1.0, *_smallest(smallest), singular, eps)
    if n * y.numel() > _ENTRIES:
        return Conditioning(None, None, (), singular, eps)
    values = torch.linalg.svdvals(_at_least_float32(rows_of_jacobian(at, torch.arange(n), k)).nan_to_num())
    condition = (values[..., 0] / values[..., -1]).nan_to_num(math.inf).max().item()
    return Conditioning(condition, *_smallest(values[..., -1]), singular, eps)


def _smallest(t: Tensor) -> tuple[float, tuple[int, ...]]:
    ranked = t.nan_to_num(math.inf)
    return ranked.min().item(), tuple(int(i) for i in torch.unravel_index(ranked.argmin(), t.shape))


def _at_least_float32(t: Tensor) -> Tensor:
    return t.float() if t.dtype in (torch.float16, torch.bfloat16) else t
