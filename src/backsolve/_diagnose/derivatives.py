"""Are the analytic derivatives those of the functions that are really computed?"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from backsolve._diagnose.closure import Closure
from backsolve._diagnose.finding import Finding, Level
from backsolve._diagnose.finite import Estimate, derivative
from backsolve._diagnose.subject import Subject, direction, moved

_BELIEVED = 30.0  # how many times its own error bound a finite difference may be off
_VAGUE = 1e-2  # a finite difference with a larger relative error decides nothing
_LEVELS_OF_F = 7

Inputs = Sequence[Tensor]  # x or y, then the tensors of the params


@dataclass(frozen=True)
class Comparison:
    """One derivative, analytic against finite differences, along a Gaussian direction.

    Attributes:
        what: the function and the variable, "g by x".
        error: the largest relative difference over the events.
        bound: how large a relative difference the finite differences can explain there.
        index: where in the batch.
        agrees: True, False, or None if the finite differences are too rough to tell.
        problem: why there is no analytic derivative, if there is none.
        each: the relative difference of each event.
    """

    what: str
    error: float
    bound: float
    index: tuple[int, ...]
    agrees: bool | None
    problem: str = ""
    each: Tensor | None = None

    def finding(self, advice: str) -> Finding:
        """Whether they agree."""
        topic = f"derivative of {self.what}" if " by " in self.what else self.what
        if self.problem:
            return Finding(topic, "not certain", self.problem)
        where = f" at index {self.index}" if self.index else ""
        text = f"analytic and finite differences differ by {self.error:.1g}{where}"
        if self.agrees is None:
            return Finding(topic, "not certain", f"{text}; these are only good to {self.bound:.1g}")
        level: Level = "good" if self.agrees else "wrong"
        return Finding(topic, level, f"{text}; these are good to {self.bound:.1g}", "" if self.agrees else advice)


@dataclass(frozen=True)
class Derivatives:
    """All the comparisons: f by y, f by its params, g by x, by each param and closed-over tensor, and second ones."""

    comparisons: tuple[Comparison, ...]

    def __getitem__(self, what: str) -> Comparison:
        """The comparison of that name, for example `report.derivatives["g by x"]`."""
        return next(c for c in self.comparisons if c.what == what)

    def findings(self) -> Iterator[Finding]:
        """Whether all agree."""
        if not self.comparisons:
            yield Finding("derivatives", "not certain", "no event passed the residual test: nothing to compare")
        for comparison in self.comparisons:
            yield comparison.finding(_ADVICE[comparison.what[0]])


_ADVICE = {
    "f": "f has no .detach(), no_grad, .item() or numpy on what varies? Its torch derivative may be inaccurate too",
    "g": "f and g have different arguments or branches; or g fills a cache that f reads; or a wrong entries formula",
    "s": "f is not smooth enough for a second derivative, or hides a part of it from autograd",
}


def measure_derivatives(subject: Subject, closure: Closure, levels: int) -> Derivatives:
    """Compare every first derivative, and second derivatives along one direction."""
    if not subject.y.numel() or not subject.good.any():
        return Derivatives(())

    def f(inputs: Inputs) -> Tensor:
        return subject.f(inputs[0], inputs[1:])

    def g(inputs: Inputs) -> Tensor:
        args, kwargs = subject.arguments.rebuild(inputs[1:])
        return inv(inputs[0], *args, **kwargs)

    def run_g(inputs: Inputs) -> Tensor:
        return subject.g(inputs[0], inputs[1:])

    inv = subject.twin()
    x, y, params = subject.x, subject.y, subject.tensors
    return Derivatives((
        *_first(subject, ("f by y", *(f"f by {n}" for n in subject.names)), [y, *params], f, f, _LEVELS_OF_F),
        *_first(subject, ("g by x", *(f"g by {n}" for n in subject.names)), [x, *params], g, run_g, levels),
        *_by_closed_over(subject, closure, lambda: g([x, *params]), lambda: run_g([x, *params]), levels),
        _second(subject, [x, *params], g, levels),
    ))  # fmt: skip


def _first(
    subject: Subject,
    names: Sequence[str],
    inputs: Inputs,
    analytic: Callable[[Inputs], Tensor],
    run: Callable[[Inputs], Tensor],
    levels: int,
) -> Iterator[Comparison]:
    """The derivative by each input: of `analytic` by autograd, of `run` by finite differences.

    By the first input it is compared event by event; the params may be shared by events.
    """
    u = subject.cotangent()
    for i, (name, value) in enumerate(zip(names, inputs, strict=True)):
        if not value.is_floating_point() or not value.numel():
            continue

        def put(t: Tensor, i: int = i) -> Inputs:
            return [*inputs[:i], t, *inputs[i + 1 :]]

        leaf, t = value.detach().clone().requires_grad_(), direction(value)
        reduce = subject.per_unit if i == 0 else torch.sum
        gradient = _gradient(lambda put=put, leaf=leaf: analytic(put(leaf)), leaf, u)
        if isinstance(gradient, str):
            yield _without(name, gradient)
            continue
        slope = reduce(gradient * t)
        if i == 0:
            slope = torch.where(subject.good, slope, 0.0)
        elif not slope.isfinite() and not subject.good.all():
            yield _without(name, "the events that fail spoil a sum over events: diagnose the others alone")
            continue
        yield _compare(name, lambda h, put=put, v=value, t=t: run(put(v + h * t)), u, reduce, slope, levels)


def _by_closed_over(
    subject: Subject, closure: Closure, analytic: Callable[[], Tensor], run: Callable[[], Tensor], levels: int
) -> Iterator[Comparison]:
    """By each leaf that f closes over, and by those that f or g can see although f(y) does not lead to them."""
    u = subject.cotangent()
    for name, leaf in closure.leaves:
        t = direction(leaf.detach())

        def moved_g(h: float, leaf: Tensor = leaf, t: Tensor = t) -> Tensor:
            with moved([leaf], [h * t]):
                return run()

        if torch.equal(moved_g(1e-2), moved_g(-1e-2)):  # g holds another tensor, or none: it cannot be compared
            continue
        gradient = _gradient(analytic, leaf, u)
        if isinstance(gradient, str):
            yield _without(f"g by {name}", gradient)
        else:
            yield _compare(f"g by {name}", moved_g, u, torch.sum, (gradient * t).sum(), levels)


def _second(subject: Subject, inputs: Inputs, analytic: Callable[[Inputs], Tensor], levels: int) -> Comparison:
    """The slope of `u . g` along one direction of all inputs, differentiated once more along it."""
    what, u = "second derivative of g", subject.cotangent()
    steps = [direction(t) if t.is_floating_point() else torch.zeros_like(t) for t in inputs]

    def slope(h: float) -> tuple[Tensor, list[Tensor]]:
        leaves = [t + h * d if t.is_floating_point() else t for t, d in zip(inputs, steps, strict=True)]
        chosen = [t.requires_grad_() for t in leaves if t.is_floating_point()]
        return _along(analytic(leaves), u, chosen, steps_of_chosen, create_graph=True), chosen

    steps_of_chosen = [d for t, d in zip(inputs, steps, strict=True) if t.is_floating_point()]
    try:
        with torch.enable_grad():
            first, leaves = slope(0.0)
            second = _along(first, torch.ones_like(first), leaves, steps_of_chosen, create_graph=False)
    except Exception as error:  # noqa: BLE001 (torch has no such derivative, or backsolve refuses: the report says so)
        return _without(what, _first_line(error))

    def numeric(h: float) -> Tensor:
        with torch.enable_grad():
            return slope(h)[0].detach()

    return _compare(what, numeric, torch.ones_like(first), torch.sum, second.detach(), levels)


def _along(value: Tensor, u: Tensor, leaves: list[Tensor], steps: list[Tensor], *, create_graph: bool) -> Tensor:
    """The slope of `u . value` along the steps."""
    value = torch.where(u == 0, 0.0, u * value).sum()
    if not value.requires_grad:
        return value * 0
    found = torch.autograd.grad(value, leaves, create_graph=create_graph, materialize_grads=True)
    return torch.stack([(v * d).sum() for v, d in zip(found, steps, strict=True)]).sum()


def _gradient(evaluate: Callable[[], Tensor], leaf: Tensor, u: Tensor) -> Tensor | str:
    """The gradient of `u . value`, zero if there is no path; what the error says if it cannot be had."""
    try:
        with torch.enable_grad():
            value = torch.where(u == 0, 0.0, u * evaluate()).sum()
            if not value.requires_grad:
                return torch.zeros_like(leaf)
            (gradient,) = torch.autograd.grad(value, [leaf], materialize_grads=True)
    except Exception as error:  # noqa: BLE001 (torch has no such derivative, or backsolve refuses: the report says so)
        return _first_line(error)
    return gradient.detach()


def _compare(
    what: str,
    phi: Callable[[float], Tensor],
    u: Tensor,
    reduce: Callable[[Tensor], Tensor],
    analytic: Tensor,
    levels: int,
) -> Comparison:
    """Compare the slope of `u . phi(h)` at h = 0 with the analytic one, after a reduction of both."""

    @torch.no_grad()
    def reduced(h: float) -> Tensor:
        with torch.random.fork_rng(devices=[]):
            return reduce(torch.where(u == 0, 0.0, u * phi(h)))

    with torch.no_grad():
        noise = torch.finfo(u.dtype).eps * reduce(torch.where(u == 0, 0.0, u * phi(0.0)).abs())
    return _verdict(what, derivative(reduced, noise, levels=levels), analytic.detach())


def _verdict(what: str, estimate: Estimate, analytic: Tensor) -> Comparison:
    difference = (estimate.value - analytic).abs()
    scale = torch.maximum(estimate.value.abs(), analytic.abs()).nan_to_num(0.0, 0.0)
    scale = torch.where(scale > 0, torch.maximum(scale, 1e-3 * scale.mean()), 1.0)
    relative, bound = difference / scale, _BELIEVED * estimate.error / scale
    clear = bound <= _VAGUE  # NaN compares false
    wrong = clear & ~(relative <= bound + 64 * torch.finfo(scale.dtype).eps)
    # The worst event of the worst kind: wrong, then clear, then vague.
    rank = relative.nan_to_num(0.0, 0.0).clamp(max=0.5) + torch.where(clear, 1.0, 0.0) + torch.where(wrong, 1.0, 0.0)
    index = tuple(int(i) for i in torch.unravel_index(rank.argmax(), rank.shape))
    agrees = False if wrong.any() else True if clear.any() else None
    return Comparison(what, relative[index].item(), bound[index].item(), index, agrees, each=relative)


def _without(what: str, problem: str) -> Comparison:
    return Comparison(what, math.nan, math.inf, (), None, problem)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0]
