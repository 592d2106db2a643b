"""Which elements of y does each element of f(y) depend on?

Measured at the sample and at other points of its range, where a gate that is closed at the sample may be open: by
cotangents that vanish on one half of the indices of a dimension, with a Gaussian other half. An f that keeps the
indices apart returns exact zeros there. Each index differs from each other one in some bit of its number, so as many
pairs of halves as there are bits find every coupling.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from backsolve._diagnose.finding import Finding
from backsolve._diagnose.subject import Subject, direction
from backsolve._linearize import Linearization
from backsolve._random import gaussian_like
from backsolve.jacobians import Jacobian

_ALL_ROWS = 256  # events of up to so many elements are looked at entry by entry
_SOME_ROWS = 64  # larger ones by so many rows
_ENTRIES = 2**24  # as many entries of J as are kept at a time


@dataclass(frozen=True)
class Structure:
    """The structure of J as it was measured.

    Attributes:
        name: what to declare: "Diagonal()", "Triangular()", "Triangular(upper=True)", "Banded(1, 1)" or "Dense()".
        event_dim: how many rightmost dimensions f mixes.
        certain: False if only a part of J was seen, if other points of the sample's range show more couplings than the
            sample, or if couplings are as small as rounding errors.
        why: what makes it uncertain.
        coupled: the dimensions of y, counted from the left, along which f mixes.
        only_elsewhere: whether the batch is kept apart at the sample, though perhaps not at other points.
        coupling: the largest influence of one unit on another that the probes saw, relative to the largest entry of
            what they returned; 0 if there is none.
        hidden: whether f mixes along a dimension in its values, and not for autograd.
        lower: how many diagonals below the main one are not zero.
        upper: the same above.
        symmetric: whether every J is symmetric, up to rounding; None if only some rows were seen.
        magnitude: the largest `|J_ij|` over the sample for the rows that were seen, shape `(rows, n)`; None if f is
            elementwise.
        rows: the numbers of these rows.
    """

    name: str
    event_dim: int
    certain: bool
    why: str
    coupled: tuple[int, ...]
    only_elsewhere: bool
    coupling: float
    hidden: bool
    lower: int
    upper: int
    symmetric: bool | None
    magnitude: Tensor | None
    rows: Tensor | None
    declared: Jacobian
    declared_event_dim: int

    def findings(self) -> Iterator[Finding]:
        """Whether the declaration holds, and whether a cheaper one would."""
        yield self._batch()
        if self.event_dim <= self.declared_event_dim:
            yield self._event()

    @property
    def option(self) -> str:
        """What to write: `jacobian=...`, and `event_dim=...` where that is another one."""
        event_dim = f"event_dim={self.event_dim}, " if self.event_dim > self.declared_event_dim else ""
        return f"{event_dim}jacobian={self.name}"

    def _batch(self) -> Finding:
        k, declared = self.event_dim, self.declared_event_dim
        topic = "independence"
        if k <= declared:
            return Finding(topic, "good", f"f keeps the {'events' if declared else 'elements'} of a batch apart")
        how = "in its values, though not for autograd" if self.hidden else f"coupling {self.coupling:.1g}"
        text = f"f mixes dimensions {self.coupled} of y ({how}); event_dim={declared} declares some independent"
        if self.only_elsewhere:
            text = f"at the sample f keeps the batch apart; elsewhere it mixes dimensions {self.coupled}"
            return Finding(topic, "not certain", text, f"declare event_dim={k} if your x reach there")
        advice = f"declare event_dim={k}; in a network, look for batch normalisation or a mean over the batch"
        return Finding(topic, "wrong", text, advice)

    def _event(self) -> Finding:
        sure = "" if self.certain else f"; {self.why}"
        claim = type(self.declared).__name__
        text = f"J is {self.name}{' and symmetric' * bool(self.symmetric and self.event_dim)}{sure}; declared {claim}"
        if self.hidden:
            return Finding("structure", "wrong", f"{text}; autograd does not see all of it", "see derivatives below")
        if not _has_room(self.declared, self.lower, self.upper):
            return Finding("structure", "wrong", text, f"declare {self.option}")
        if not self.certain:
            return Finding("structure", "not certain", text, "diagnose with a sample that covers more of what you use")
        if self.name.startswith(f"{claim}("):
            return Finding("structure", "good", text)
        return Finding("structure", "note", f"{text}, which has room for it")


def _has_room(declared: Any, lower: int, upper: int) -> bool:
    """Whether a declared structure has a place for so many diagonals."""
    kind = type(declared).__name__
    if kind == "Diagonal":
        return not lower and not upper
    if kind == "Triangular":
        return not (lower if declared.upper else upper)
    if kind == "Banded":
        return lower <= declared.lower and upper <= declared.upper
    return True


def measure_structure(subject: Subject) -> Structure:
    """Find out what f mixes, and in which pattern."""
    here = subject.linearization
    seen = _mixed_by(lambda u: here.pull(u), subject.y)
    values = _mixed_by(_response(subject), subject.y)
    elsewhere: dict[int, float] = {}
    points: list[Linearization] = []
    for y in _other_points(subject):
        with suppress(Exception):  # f may raise outside its domain, whatever it likes
            at = subject.at(y)
            if at.depends_on_y and at.value.isfinite().all():
                elsewhere |= _mixed_by(lambda u, at=at: at.pull(u), y)
                points.append(at)
    coupled = sorted({*seen, *values, *elsewhere})
    event_dim = subject.y.dim() - coupled[0] if coupled else 0
    hidden = not {*values} <= {*seen}
    sizes = [*seen.values(), *elsewhere.values(), *values.values()]
    why = _doubts(subject, set(seen) | set(values), set(elsewhere), max(sizes, default=0.0))
    pattern = _pattern(subject, [here, *points], max(event_dim, subject.event_dim) if coupled else 0)
    if hidden:
        why = f"autograd sees {pattern.name} only, the values of f show more"
    return Structure(
        name="Dense()" if hidden else pattern.name,
        event_dim=event_dim,
        certain=not (why or pattern.why),
        why="; ".join(filter(None, (why, pattern.why))),
        coupled=tuple(coupled),
        only_elsewhere=not {*seen, *values} & {*range(subject.y.dim() - subject.event_dim)},
        coupling=max(sizes, default=0.0),
        hidden=hidden,
        lower=pattern.lower,
        upper=pattern.upper,
        symmetric=pattern.symmetric,
        magnitude=pattern.magnitude,
        rows=pattern.rows,
        declared=subject.jacobian,
        declared_event_dim=subject.event_dim,
    )


def _doubts(subject: Subject, seen: set[int], others: set[int], coupling: float) -> str:
    eps = torch.finfo(subject.y.dtype).eps
    doubts = {
        "it mixes more at other points than at the sample": others - seen,
        "one element or event alone cannot show a coupling": subject.y.numel() < 2,
        "the couplings are as small as rounding errors": 0 < coupling < 64 * eps,
    }
    return "; ".join(text for text, applies in doubts.items() if applies)


def _mixed_by(push: Callable[[Tensor], Tensor], y: Tensor) -> dict[int, float]:
    """The dimensions along which a linear map carries something from one index to another, with its relative size."""
    u = gaussian_like(y)
    mixed: dict[int, float] = {}
    for dim, n in enumerate(y.shape):
        numbers = torch.arange(n, device=y.device).reshape(n, *(1,) * (y.dim() - dim - 1))
        leak = 0.0
        for bit in range((n - 1).bit_length()):
            for side in (0, 1):
                silent = (numbers >> bit & 1) == side
                result = push(torch.where(silent, 0.0, u)).abs().nan_to_num(0.0, 0.0, 0.0)
                largest = result.max().item()
                leak = max(leak, (result * silent).max().item() / largest if largest else 0.0)
        if leak:
            mixed[dim] = leak
    return mixed


def _response(subject: Subject) -> Callable[[Tensor], Tensor]:
    """How the values of f change with y, whatever autograd says."""
    size = direction(subject.y).abs() * 1e-2

    @torch.no_grad()
    def value(y: Tensor) -> Tensor:
        with torch.random.fork_rng(devices=[]):  # dropout must not look like a coupling
            return subject.f(y)

    before = value(subject.y)
    return lambda u: value(subject.y + size * u) - before


def _other_points(subject: Subject) -> list[Tensor]:
    """Points of the sample's range: its elements or events in another order, and scattered; and points beside it."""
    y = subject.y
    if not y.numel():
        return []
    order = gaussian_like(y.new_empty(y.shape[: y.dim() - subject.event_dim])).flatten().argsort()
    shuffled = y.reshape(order.numel(), -1)[order].reshape(y.shape)
    spread = (y.max() - y.min()).item() or y.abs().max().item() or 1.0
    low, high = y.min(), y.max()
    scattered = (y + spread * gaussian_like(y)).clamp(low, high)
    away = (y + spread, y - spread, y + spread * gaussian_like(y), -y)
    return [t for t in (shuffled, scattered, *away) if t.isfinite().all()]


@dataclass(frozen=True)
class _Pattern:
    """The non-zero entries of J within one event."""

    name: str = "Diagonal()"
    lower: int = 0
    upper: int = 0
    symmetric: bool | None = True
    magnitude: Tensor | None = None
    rows: Tensor | None = None
    why: str = ""


def _pattern(subject: Subject, points: list[Linearization], event_dim: int) -> _Pattern:
    if not event_dim or not subject.y.numel():
        return _Pattern()
    n = math.prod(subject.y.shape[subject.y.dim() - event_dim :])
    rows = torch.arange(n) if n <= _ALL_ROWS else _spread_rows(n)
    some = len(rows) < n
    matrices = [rows_of_jacobian(at, rows, event_dim) for at in (points if n <= _SOME_ROWS else points[:1])]
    magnitude = torch.stack([m.abs().reshape(-1, *m.shape[-2:]).amax(0) for m in matrices]).amax(0).nan_to_num(0.0)
    symmetric = None if some else all(_is_symmetric(m) for m in matrices)
    lower, upper = _bandwidths(magnitude > 0, rows)
    rounding = 8 * n * torch.finfo(subject.y.dtype).eps * magnitude.max()
    clear = _bandwidths(magnitude > rounding, rows)
    why = ""
    if _name(n, *clear) != _name(n, lower, upper):
        why = f"the entries outside of {_name(n, *clear)} are as small as rounding errors"
        lower, upper = clear
    elif some:
        why = f"{len(rows)} of {n} rows were seen"
    return _Pattern(_name(n, lower, upper), lower, upper, symmetric, magnitude, rows, why)


def rows_of_jacobian(at: Linearization, rows: Tensor, event_dim: int) -> Tensor:
    """Some rows of J for each event, shape `(*batch, rows, n)`, by one vector-Jacobian product each."""
    y = at.y
    batch, event = y.shape[: y.dim() - event_dim], y.shape[y.dim() - event_dim :]
    n = math.prod(event)
    found = []
    for chunk in rows.split(max(1, _ENTRIES // max(1, y.numel()))):
        units = torch.zeros(len(chunk), n, dtype=y.dtype, device=y.device)
        units[torch.arange(len(chunk)), chunk] = 1
        units = units.reshape(len(chunk), *(1,) * len(batch), *event).expand(len(chunk), *batch, *event)
        with torch.no_grad():
            found.append(at.pull_many(units).reshape(len(chunk), *batch, n))
    return torch.cat(found).movedim(0, -2)


def _spread_rows(n: int) -> Tensor:
    """The first, the last and random rows between."""
    inner = torch.randperm(n - 2, generator=torch.Generator().manual_seed(0))[: _SOME_ROWS - 2] + 1
    return torch.cat([torch.tensor([0]), inner.sort().values, torch.tensor([n - 1])])


def _bandwidths(mask: Tensor, rows: Tensor) -> tuple[int, int]:
    offsets = torch.arange(mask.shape[-1]) - rows[:, None]
    inside = offsets[mask.cpu()]
    return (max(0, -int(inside.min())), max(0, int(inside.max()))) if inside.numel() else (0, 0)


def _name(n: int, lower: int, upper: int) -> str:
    if not lower and not upper:
        return "Diagonal()"
    if 2 * (lower + upper + 1) <= n:
        return f"Banded({lower}, {upper})"
    if not upper:
        return "Triangular()"
    return "Dense()" if lower else "Triangular(upper=True)"


def _is_symmetric(matrix: Tensor) -> bool:
    tolerance = 64 * torch.finfo(matrix.dtype).eps * matrix.abs().amax((-2, -1), keepdim=True)
    return bool(((matrix - matrix.mT).abs() <= tolerance).all())
