"""Does f(g(x)) give x back?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from backsolve._diagnose.finding import Finding
from backsolve._diagnose.subject import Subject
from backsolve._solution import PERIODS


@dataclass(frozen=True)
class Residual:
    """How far `f(g(x))` is from x.

    Attributes:
        worst: the largest `|f(y) - x|`.
        index: where in the batch; empty for a 0-d batch.
        relative: that residual divided by the largest |x| of its event.
        failed: how many events fail the residual test of the inverse.
        total: how many there are.
        period: "2 pi", "360", ... if the residuals of the failed events are whole multiples of it.
        each: `|f(y) - x|` of each event, shape `(*batch,)`.
    """

    worst: float
    index: tuple[int, ...]
    relative: float
    failed: int
    total: int
    period: str | None
    each: Tensor

    def findings(self) -> Iterator[Finding]:
        """Whether it is small enough for the inverse."""
        text = f"|f(g(x)) - x| <= {self.worst:.2g} (relative {self.relative:.2g}), worst at index {self.index}"
        if not self.failed:
            yield Finding("residual", "good", text if self.total else "an empty sample proves nothing")
            return
        text = f"{self.failed} of {self.total} events fail the residual test: {text}"
        advice = "is g the inverse of f, with the same arguments in the same order, and converged? refine=5 polishes y"
        if self.period:
            text += f"; the differences are whole multiples of {self.period}"
            advice = "f(y) and x agree up to a period: reduce x to the principal period, or return y on its revolution"
        yield Finding("residual", "wrong", text, advice)


def measure_residual(subject: Subject) -> Residual:
    """Compare f(y) with x in every event."""
    residual, failed = subject.solution.residual, ~subject.solution.converged
    if not residual.numel():
        return Residual(0.0, (), 0.0, 0, 0, None, residual)
    ranked = residual.nan_to_num(torch.inf, torch.inf)
    index = tuple(int(i) for i in torch.unravel_index(ranked.argmax(), residual.shape))
    size = subject.x[index].abs().max().item()
    worst = residual[index].item()
    relative = worst / size if size else worst
    return Residual(worst, index, relative, int(failed.sum()), failed.numel(), _period(subject, failed), residual)


def _period(subject: Subject, failed: Tensor) -> str | None:
    if not failed.any():
        return None
    with torch.no_grad():
        difference = (subject.f(subject.y) - subject.x)[failed].flatten()
    for name, period in PERIODS.items():
        turns = difference / period
        if (turns - turns.round()).abs().max() < 1e-4 and (turns.round() != 0).any():
            return name
    return None
