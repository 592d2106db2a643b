"""Is f smooth where it is used? The graph names what has kinks; a walk along a line finds where a slope jumps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from backsolve._closure import Graph
from backsolve._diagnose.finding import Finding
from backsolve._diagnose.subject import Subject
from backsolve._random import gaussian_like

_KINKED = (
    "Abs", "Ceil", "Clamp", "Cummax", "Cummin", "Elu", "Floor", "Fmax", "Fmin", "Frac", "Hardshrink", "Hardsigmoid",
    "Hardswish", "Hardtanh", "LeakyRelu", "Max", "Maximum", "Median", "Min", "Minimum", "Prelu", "Relu", "Remainder",
    "Round", "Sign", "Softshrink", "Sort", "Threshold", "Topk", "Trunc", "Where",
)  # fmt: skip
_STEPS = 32  # of the walk
_HALVINGS = 40  # of the step with the largest jump


@dataclass(frozen=True)
class Smoothness:
    """Where f is not smooth.

    Attributes:
        operations: operations in the graph of f(y) that have kinks or jumps, such as "Relu".
        jump: the largest jump of `u . J t`, relative to the slopes around it, that does not shrink with the step; 0 if
            every slope is continuous on the line that was walked.
        y: an element of y at the jump, if f is elementwise and there is one.
    """

    operations: tuple[str, ...]
    jump: float
    y: float | None

    def findings(self) -> Iterator[Finding]:
        """What that means for derivatives."""
        names = ", ".join(self.operations)
        inside = f"f contains {names}" if names else "f contains nothing with kinks"
        if not self.jump:
            yield Finding("smoothness", "note" if names else "good", f"{inside}; no kink was met in the sample's range")
            return
        place = "" if self.y is None else f" at y = {self.y:.4g}"
        text = f"{inside}; the derivative of f jumps{place} by {self.jump:.1g} of its size"
        advice = "first derivatives are one-sided there, and second derivatives miss the jump"
        yield Finding("smoothness", "warning", text, advice)


def measure_smoothness(subject: Subject) -> Smoothness:
    """Look at the graph, then walk through the range of the sample."""
    if not subject.y.numel():
        return Smoothness((), 0.0, None)
    with torch.enable_grad():
        z = subject.f(subject.y.clone().requires_grad_())
    nodes = {type(node).__name__.removesuffix("0").removesuffix("Backward") for node in Graph([z]).nodes}
    jump, y = _walk(subject)
    return Smoothness(tuple(sorted(nodes & {*_KINKED})), jump, y)


def _walk(subject: Subject) -> tuple[float, float | None]:
    """The largest lasting jump of the slope on the way from the sample to its mirror image in its own range."""
    start = subject.y
    end = start.max() + start.min() - start if start.numel() > 1 else start * 2
    u = gaussian_like(start)
    slopes = [_slope(subject, torch.lerp(start, end, i / _STEPS), end - start, u) for i in range(_STEPS + 1)]
    stack = torch.stack(slopes)  # (steps, *batch)
    jumps = stack.diff(dim=0).abs().nan_to_num(0.0, 0.0)
    if not jumps.max() > 0:
        return 0.0, None
    step, *index = (int(i) for i in torch.unravel_index(jumps.argmax(), jumps.shape))
    low, high = step / _STEPS, (step + 1) / _STEPS
    left, right = stack[(step, *index)], stack[(step + 1, *index)]
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        slope = _slope(subject, torch.lerp(start, end, middle), end - start, u)[tuple(index)]
        if (slope - left).abs() > (right - slope).abs():
            high, right = middle, slope
        else:
            low, left = middle, slope
    jump = ((right - left).abs() / torch.maximum(left.abs(), right.abs())).item()
    if not jump > 1e-3:
        return 0.0, None
    where = torch.lerp(start, end, low)[tuple(index)]
    return jump, where.item() if where.dim() == 0 else None


def _slope(subject: Subject, y: Tensor, t: Tensor, u: Tensor) -> Tensor:
    try:
        at = subject.at(y)
        return subject.per_unit(at.pull(u) * t)
    except Exception:  # noqa: BLE001 (f may raise outside its domain, whatever it likes)
        return subject.per_unit(torch.full_like(y, torch.nan))
