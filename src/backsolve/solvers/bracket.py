"""The inverse of an elementwise monotone f, from a bracket of y."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from backsolve import errors
from backsolve._linearize import Forward
from backsolve._torch import GradMode, without_autocast
from backsolve.solvers.base import Found, NumericalSolver, may_look, of_params, prototype
from backsolve.solvers.chandrupatla import NEAR, Brackets, Level, joined, part
from backsolve.solvers.domain import Domain
from backsolve.solvers.elements import Elements, alike, each_its_own
from backsolve.solvers.guess import Guess, Scale, Surface, Table
from backsolve.solvers.secant import Secants
from backsolve.solvers.state import frozen

Bound = float | Tensor | Callable[..., Any]

_BLOCK = 2**17  # elements for each thread: fewer, and Python's share counts; more, and the state leaves the cache
_FEW = 0.05  # of a block: they are left for later, and joined with those of the other blocks
_MANY = 2**16  # elements: a few of them are worth a study
_STUDIED = 2**11
_OUTLIERS = 0.0005  # the share of the elements on either side that a table need not hold
_TRIES = 5  # steps from a guess: then most elements are done
_EARLIEST = 3  # before this step hardly an element is done
_OUTSIDE, _UNREACHED, _NAN, _SLOW, _BOUNDS = range(1, 6)  # why there is no solution


@dataclass(frozen=True)
class Bracket(NumericalSolver):
    """Solve `f(y, *params) = x` for each element, given that y lies between two bounds; f is continuous and monotone.

    f may increase or decrease. A bound may be infinite: both ends are looked at first, and the search starts well
    inside. It is Chandrupatla's, in coordinates in which the tails of a distribution function are straight lines; an
    element counts as solved if f(y) meets x to four units in the last place, or if the sign of f(y) - x changes within
    four units in the last place of y.

    Of very many elements a few are solved first, and tell where to start with the others: from there Newton's method
    and inverse interpolation need no bracket, and what they do not solve is searched as ever. On a CPU the elements are
    worked on in blocks that stay in the cache; finished elements are not evaluated again. All this needs an f that can
    be evaluated for a part of the elements, as a vector: one whose params broadcast against y and that closes over
    nothing that has a value for each element. It is tried, and any other f is evaluated for all of them until the last
    one is done.

    Args:
        lower: the lower bound of y: a number, a tensor that broadcasts against y, or a function of the params.
        upper: the upper bound.
        open: whether f cannot be evaluated at the bounds themselves, such as log at 0. At infinite bounds f may raise,
            or return NaN, without being asked.
        maxiter: how often f is evaluated at most, for an element.
        init: where to start, as far as it lies between the bounds: what a bound may be.

    Raises:
        BracketError: when called, if the bounds are reversed, or f(y) - x has the same sign at both.
        ConvergenceError: when called, if f returns NaN between them, or after `maxiter` evaluations.

    Example:
        >>> import math, torch
        >>> from backsolve import inverse
        >>> from backsolve.solvers import Bracket
        >>> W = inverse(lambda y: y * y.exp(), Bracket(0.0, math.inf))
        >>> x = torch.tensor(math.e, dtype=torch.float64, requires_grad=True)
        >>> y = W(x)
        >>> y.backward()
        >>> y.item(), x.grad.item() * 2 * math.e  # W(e) = 1, W'(e) = 1 / (2 e)
        (1.0, 1.0)

    Reference:
        T. R. Chandrupatla, Advances in Engineering Software 28 (1997) 145-149.
    """

    lower: Bound = -math.inf
    upper: Bound = math.inf
    open: bool = False
    maxiter: int = 200
    init: Bound | None = None

    def __post_init__(self) -> None:
        for name in ("lower", "upper", "init"):
            value = getattr(self, name)
            if name == "init" and value is None:
                continue
            if not (callable(value) or isinstance(value, int | float | Tensor)) or isinstance(value, bool):
                raise errors.bad_setting("Bracket", name, "a number, a tensor, or a function of the params", value)
        if not isinstance(self.maxiter, int) or self.maxiter < 1:
            raise errors.bad_setting("Bracket", "maxiter", "a positive integer", self.maxiter)

    def find(self, forward: Forward, x: Tensor | None) -> Found:
        """Search every element; see `NumericalSolver`."""
        like = prototype(forward, x)
        lower, upper = (of_params(bound, forward, like) for bound in (self.lower, self.upper))
        x = torch.zeros_like(like[(0,) * like.dim()]) if x is None else x
        with GradMode(False), without_autocast(like.device), frozen(forward) as forward:
            init = None if self.init is None else of_params(self.init, forward, like)
            return _Search(self, _divide(forward, x, lower, upper), x, lower, upper, init).run()


class _Search:
    """One call of a Bracket. Its tensors are flat, of shape `(n,)`, or `()` if all elements share them."""

    def __init__(
        self,
        bracket: Bracket,
        elements: Elements,
        x: Tensor,
        lower: Tensor,
        upper: Tensor,
        init: Tensor | None = None,
    ) -> None:
        self.bracket, self.elements = bracket, elements
        self.init = None if init is None else _flat(init, elements.shape)
        self.call = elements.forward.model.call
        self.x = _flat(x, elements.shape).expand(elements.count)
        self.domain = Domain.between(_flat(lower, elements.shape), _flat(upper, elements.shape))
        self.y = torch.full_like(self.x, math.nan)
        self.steps = torch.zeros_like(self.x, dtype=torch.int32)
        self.why = torch.zeros_like(self.x, dtype=torch.int8)

    def run(self) -> Found:
        """Search block by block, and then the last few elements of all blocks together."""
        n, shape = self.elements.count, self.elements.shape
        size = _BLOCK * torch.get_num_threads() if self.x.device.type == "cpu" and self.elements.divisible else n
        blocks = [slice(i, min(i + size, n)) for i in range(0, n, max(size, 1))]
        guess = self._learn() if self.elements.divisible and self.init is None and n >= _MANY else None
        if guess is not None:
            rest = torch.cat([self._approach(block, *guess) for block in blocks])
            blocks = rest.split(size) if len(rest) else []
        left = [self._advance(self._begin(block), 0, _FEW) for block in blocks]
        if left := [brackets for brackets in left if brackets is not None]:
            self._advance(joined(left), NEAR[-1] + 1, 0.0)
        failed = self.why.reshape(shape) > 0
        y, steps = self.y.reshape(shape), self.steps.reshape(shape)
        return Found(y, failed, steps, self._error) if bool(failed.any()) else Found(y, None, steps)

    def _begin(self, block: slice | Tensor) -> Brackets:
        """Evaluate f inside and at the ends, and find the elements that have no root, or have it at an end."""
        x, domain, params = part(self.x, block), part(self.domain, block), part(self.elements.own_params(), block)
        start = domain.start()
        if self.init is not None:
            wish = part(self.init, block)
            start = torch.where((wish > domain.lower) & (wish < domain.upper), wish, start)  # NaN compares false
        z = self._value(start, params, len(x))
        ends = [self._at_bound(bound, params, len(x)) for bound in (domain.lower, domain.upper)]
        signs = [(end - x).sign() for end in ends]
        if bool((ends[0].isnan() | ends[1].isnan()).any()):
            signs = self._guessed_signs(ends, signs, z, start, domain, params)
        level = Level.of(x, *_range(signs, ends))
        c, v = start.expand(x.shape), level(z, near=False)
        o = _finite(torch.where(v * signs[1] < 0, domain.upper, domain.lower))  # the first: the root is above the start
        v_o = torch.full_like(v, -math.inf).copysign(-v)
        for bound, sign in zip((domain.lower, domain.upper), signs, strict=True):
            c, v = torch.where(sign == 0, bound, c), torch.where(sign == 0, 0.0, v)
        why = torch.where(v.isnan(), _NAN, 0)
        why = torch.where((signs[0] * signs[1] > 0) | x.isnan(), _OUTSIDE, why)
        why = torch.where(domain.lower <= domain.upper, why, _BOUNDS)
        self.why[block] = why.to(torch.int8)
        c = torch.where(why > 0, math.nan, c)
        return _brackets(self._index(block), (c, o, o), (v, v_o, v_o), (v == 0) | (why > 0), domain, level, params)

    def _index(self, block: slice | Tensor) -> Tensor:
        return torch.arange(block.start, block.stop, device=self.x.device) if isinstance(block, slice) else block

    def _learn(self) -> tuple[Guess, Scale] | None:
        """Solve a few elements, and learn from them where the solutions of the others are, on which scale of y."""
        chosen = torch.arange(0, self.elements.count, self.elements.count // _STUDIED, device=self.x.device)
        elements, domain, x = self.elements.part(chosen), part(self.domain, chosen), self.x[chosen]
        params, scale = elements.own_params(), _scale_of(self.domain)
        ends = torch.stack([self._at_bound(bound, params, len(x)) for bound in (domain.lower, domain.upper)])
        low, high = (e[0] if bool((e == e[0]).all() & e[0].isfinite()) else None for e in ends.aminmax(dim=0))
        image = Scale(low, high)
        if scale is None or x.dtype not in (torch.float32, torch.float64) or not bool(image(x).isfinite().any()):
            return None
        shared = self.elements.alike and not domain.start().dim()
        if shared:
            image = image.fitted(x, _OUTLIERS)
            x = image.inverse(torch.linspace(-1, 1, len(x), dtype=x.dtype, device=x.device))
        try:  # the first step is Newton's
            elements.value_and_slope(domain.start().expand(len(x)), params)
        except Exception:  # noqa: BLE001 (f may hide its derivative in any way)
            return None
        few = _Search(self.bracket, elements, x, domain.lower, domain.upper)
        few.run()
        guess = Table.learned(few.y, image) if shared else Surface.learned(few.y, x, params, part(scale, chosen), image)
        return None if guess is None else (guess, scale)

    def _approach(self, block: slice, guess: Guess, scale: Scale) -> Tensor:
        """Go from the guesses to the solutions, and note these; return the index of the elements that are left."""
        x, domain, params = (part(s, block) for s in (self.x, self.domain, self.elements.own_params()))
        y, slope = guess(x, params, part(scale, block))
        y = domain.inside(y, domain.start())
        if slope is None:
            z, rise = self.elements.value_and_slope(y, params)
            slope = 1 / rise
        else:
            z = self._evaluate(y, params)
        return Secants.at(self._index(block), x, params, domain, y, z, slope).run(self._evaluate, _TRIES, self._keep)

    def _keep(self, index: Tensor, y: Tensor, steps: Tensor) -> None:
        self.y.index_copy_(0, index, y)
        self.steps.index_copy_(0, index, steps)

    def _advance(self, brackets: Brackets, first: int, few: float) -> Brackets | None:
        """Go on until all are done, or only a few; note the solutions, and return those that are left.

        Args:
            brackets: where to begin.
            first: how many steps to regard as done.
            few: the share of the elements that is left for later.
        """
        at_first = len(brackets.c)
        for count in range(first, self.bracket.maxiter + first):
            if count >= _EARLIEST and may_look(self.x.device, count):
                left = (~brackets.done).nonzero()[:, 0]
                if not len(left):
                    break
                if self.elements.divisible and len(left) < 0.8 * len(brackets.c):
                    self._note(part(brackets, brackets.done.nonzero()[:, 0]))
                    brackets = part(brackets, left)
                    if len(left) < few * at_first:
                        return brackets
            brackets.step(self._evaluate, count)
        self._note(brackets)
        return None

    def _note(self, brackets: Brackets) -> None:
        """Keep what has been found."""
        y, v = brackets.best()
        index = brackets.index
        self.y[index], self.steps[index] = y, brackets.steps
        doubtful = ~(v.abs() <= brackets.level.resolution) & (brackets.v_o.isinf() | v.isnan() | ~brackets.done)
        if not bool(doubtful.any()):
            return
        near_o = (y - brackets.o).abs() <= 4 * torch.finfo(y.dtype).eps * y.abs()
        is_bound = (brackets.o == _finite(brackets.domain.lower)) | (brackets.o == _finite(brackets.domain.upper))
        why = torch.where(brackets.v_o.isinf() & near_o & is_bound, _UNREACHED, 0)
        why = torch.where(brackets.done, why, _SLOW)
        why = torch.where(v.isnan(), _NAN, why)
        self.why[index] = torch.where(doubtful & (self.why[index] == 0), why, self.why[index]).to(torch.int8)

    def _evaluate(self, y: Tensor, params: list[Tensor]) -> Tensor:
        return self.elements.value(y, params)

    def _value(self, y: Tensor, params: list[Tensor], n: int) -> Tensor:
        """f at one y for each of n elements, or at one y that all share: evaluated once if f is the same, too."""
        if self.elements.alike and not y.dim():
            return self._evaluate(y.reshape(1), params).expand(n)
        return self._evaluate(y.expand(n), params)

    def _at_bound(self, bound: Tensor, params: list[Tensor], n: int) -> Tensor:
        """f at one of the bounds; NaN where f cannot say."""
        unknown = torch.full((n,), math.nan, dtype=bound.dtype, device=bound.device)
        if self.bracket.open and bool(bound.isfinite().all()):
            return unknown
        try:
            z = self._value(bound, params, n)
        except Exception:
            if not self.bracket.open and bool(bound.isfinite().any()):
                raise
            return unknown
        return torch.where(bound.isfinite(), math.nan, z) if self.bracket.open else z

    def _guessed_signs(
        self, ends: list[Tensor], signs: list[Tensor], z: Tensor, start: Tensor, domain: Domain, params: list[Tensor]
    ) -> list[Tensor]:
        """The signs of f(y) - x at the ends; where f cannot say, those that the other end or f's slope suggests."""
        beside = start + domain.step(start, torch.full_like(start, 0.3))
        slope = ((self._value(beside, params, len(z)) - z) * (beside - start)).sign()
        known = [torch.where(end.isnan(), 0.0, sign) for end, sign in zip(ends, signs, strict=True)]
        return [
            torch.where(end.isnan(), torch.where(other == 0, fallback, -other), sign)
            for end, sign, other, fallback in zip(ends, known, reversed(known), (-slope, slope), strict=True)
        ]

    def _error(self) -> errors.BacksolveError:
        """Say why the first of those elements that failed has no solution."""
        failed = self.why > 0
        i = int(failed.nonzero()[0, 0])
        index = tuple(int(k) for k in torch.unravel_index(torch.tensor(i), self.elements.shape))
        lower, upper = (
            bound[i].item() if bound.dim() else bound.item() for bound in (self.domain.lower, self.domain.upper)
        )
        z_lower, z_upper, z = (self._value_of(i, y) for y in (lower, upper, self.y[i].item()))
        what, remedy = _REASONS[int(self.why[i])]
        got = (
            f"{errors.count(int(failed.sum()), len(self.x), 'element')} failed, the first at index {index}: "
            f"x = {self.x[i].item():.9g}, f({lower:.9g}) = {z_lower:.9g}, f({upper:.9g}) = {z_upper:.9g}"
        )
        if int(self.why[i]) in (_OUTSIDE, _BOUNDS):
            return errors.no_bracket(self.call, what, got, remedy)
        got += f"; at last y = {self.y[i].item():.9g}, f(y) = {z:.9g} after {int(self.steps[i])} evaluations"
        if int(self.why[i]) == _UNREACHED:
            return errors.no_bracket(self.call, what, got, remedy)
        expected = f"f(y) = x to rounding after at most maxiter = {self.bracket.maxiter} evaluations"
        return errors.not_converged(self.call, what, expected, got, remedy)

    def _value_of(self, i: int, y: float) -> float:
        """f at y for one element, NaN if it raises there."""
        at = self.x.new_tensor([y])
        try:
            if self.elements.divisible:
                return self._evaluate(at, part(self.elements.own_params(), torch.tensor([i], device=at.device))).item()
            return self._evaluate(at.expand(len(self.x)), [])[i].item()
        except Exception:  # noqa: BLE001 (outside its domain f may raise whatever it likes)
            return math.nan


_REASONS = {
    _OUTSIDE: (
        "f(y) - x has the same sign at both bounds, so there is no root between them.",
        "widen the bounds, or leave one out for an infinite one; check x, which may lie outside of the range of f",
    ),
    _UNREACHED: (
        "f(y) - x keeps its sign as far as y can be moved towards a bound.",
        "check x, which may lie outside of the range of f; or give a bound at which f can be evaluated",
    ),
    _NAN: (
        "f returned NaN between the bounds.",
        "narrow the bounds to where f is defined; write f such that it does not overflow, as exp(a) / exp(b) does",
    ),
    _SLOW: (
        "the search did not end.",
        "raise maxiter; check that f is continuous, and that it does not change its own state or draw random numbers",
    ),
    _BOUNDS: ("the bounds are no interval.", "let the lower bound be the smaller one; neither may be NaN"),
}


def _divide(forward: Forward, x: Tensor, lower: Tensor, upper: Tensor) -> Elements:
    """Find out the shape of y, and how f can be evaluated for a part of the elements."""
    shape = torch.broadcast_shapes(x.shape, lower.shape, upper.shape)
    domain = Domain.between(lower, upper)
    start = domain.start()
    points = [start, start + domain.step(start, torch.full_like(start, 0.3))]
    if not start.dim() and (found := alike(forward, shape, torch.stack(points))):
        return found
    shape = _shape_of_f(forward, start.expand(shape))
    return each_its_own(forward, shape, torch.stack([_flat(p, shape).expand(math.prod(shape)) for p in points]))


def _shape_of_f(forward: Forward, y: Tensor) -> torch.Size:
    """The shape of y as the params broadcast it."""
    args, kwargs = forward.arguments.rebuild([t.detach() for t in forward.arguments.tensors])
    z = forward.model.f(y.clone(), *args, **kwargs)
    return torch.broadcast_shapes(y.shape, z.shape) if isinstance(z, Tensor) else y.shape


def _flat(t: Tensor, shape: torch.Size) -> Tensor:
    """One number for each element, or one for all."""
    return (
        t.reshape(())
        if t.numel() == 1 and t.dim() <= len(shape) and math.prod(shape) != 1
        else t.expand(shape).reshape(-1)
    )


def _brackets(
    index: Tensor,
    points: tuple[Tensor, Tensor, Tensor],
    levels: tuple[Tensor, Tensor, Tensor],
    done: Tensor,
    domain: Domain,
    level: Level,
    params: list[Tensor],
) -> Brackets:
    """Brackets before their first step; the points and levels are those of c, o and p."""
    (c, o, p), (v, v_o, v_p) = points, levels
    none, one = torch.full_like(v, math.inf), torch.ones_like(index, dtype=torch.int32)
    return Brackets(index, c, v, o, v_o, p, v_p, done, one, none, none, domain, level, params)


def _scale_of(domain: Domain) -> Scale | None:
    """The interval in which y lies; None if it has ends for some elements only."""
    finite = [end.isfinite() for end in (domain.lower, domain.upper)]
    if any(bool(f.any() & ~f.all()) for f in finite):
        return None
    low, high = (end if bool(f.all()) else None for end, f in zip((domain.lower, domain.upper), finite, strict=True))
    return Scale(low, high)


def _finite(bound: Tensor) -> Tensor:
    """As far as y may go, so that differences and sums of two y do not overflow."""
    farthest = torch.finfo(bound.dtype).max / 4
    return bound.clamp(-farthest, farthest)


def _range(signs: list[Tensor], ends: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The smallest and the largest value of f; infinite where f cannot say."""
    rising = (signs[0] < 0) | (signs[1] > 0)
    low, high = torch.where(rising, ends[0], ends[1]), torch.where(rising, ends[1], ends[0])
    return low.nan_to_num(-math.inf, math.inf, -math.inf), high.nan_to_num(math.inf, math.inf, -math.inf)
