"""One call under torch.func, made beneath its levels.

Where one level differentiates, perhaps with an eager graph beneath, or one of grad over one of jvp, nothing has to be
made of operations that compose: g, f with its graph, the residual test and the products are those of an eager call, on
plain tensors with the mapped dimensions on the left, and one node (or tangent) at the level hands the derivatives out.
All other calls go to `_functional`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import BackwardCFunction

from backsolve import _functional, errors
from backsolve._arguments import Arguments
from backsolve._attach import attach, differentiable_jvp, jvp
from backsolve._closure import Capture, Graph, Traced, trace
from backsolve._foreign import Foreign, Hidden, Unprepared
from backsolve._functional import Solved
from backsolve._functorch import Beneath, Idle, Level, active_levels, is_functorch_wrapped, over_first_dims
from backsolve._levels import Mapping, Peeled, at_level, dress, split, spread
from backsolve._linearize import Forward, Linearization
from backsolve._mapped import Mapped
from backsolve._mapped_solver import MOST_READS, MappedCall, Reads
from backsolve._one_level import Attachment, attach_for_grad, grad_mode_beneath, requiring_grad
from backsolve._places import places_of
from backsolve._solution import Check, spoil
from backsolve._solve import Problem, judge
from backsolve._torch import GradMode, in_forward_mode, no_function_modes, sequence_number, without_autocast
from backsolve.solvers.base import Found

_MOST = 32  # tensors that f reads and that a vmap maps


class _Elsewhere(BaseException):
    """This call needs rules that compose. No Exception: f must not catch it."""


def solve(problem: Problem, x: Tensor | None, arguments: Arguments, *, report: bool = False) -> Solved:
    """Solve `f(y, *params) = x` and attach the derivatives to y; the arguments are those of `_solve.solve`."""
    levels = active_levels()
    kinds = {level.kind for level in levels}
    usual = bool(levels) and kinds <= {"vmap", "grad", "jvp"} and no_function_modes()
    dual = in_forward_mode() and "jvp" not in kinds  # by torch.autograd.forward_ad
    if not usual or dual or torch.is_inference_mode_enabled():
        return _functional.solve(problem, x, arguments, report=report)
    call = _Call(problem, x, arguments, levels)
    try:
        return call.solve(report)
    except _Elsewhere:
        pass
    return _functional.solve(problem, x, arguments, report=report, solution=call.found_above())


class _Given:
    """A tensor that y depends on: x, a param, or one of a level that f closes over.

    Attributes:
        tensor: the tensor.
        peeled: what is inside of its wrappers.
        differentiated: whether a level, or an eager graph, differentiates it.
        pushed: the levels of vmap that map its tangent, if the level is one of jvp.
        leading: the levels whose dimensions its plain tensor has on the left, for f.
    """

    __slots__ = ("differentiated", "leading", "peeled", "pushed", "tensor")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.peeled = Peeled(tensor)
        self.differentiated = False
        self.pushed: Sequence[int] | None = None
        self.leading: Sequence[int] = ()


class _Call:
    """One call; what it finds out on the way is kept, for the case that the rest is done elsewhere.

    Attributes:
        found: what g returned, a plain y with the dimensions of `mapped` on the left.
        mapped: the levels of vmap that map y, outermost first.
        sizes: the sizes of mapped dimensions, by level.
        grad_level: the level of grad that differentiates, 0 if there is none.
        jvp_level: the same of jvp; beneath that of grad, if there is one.
        eager: whether an eager graph leads to something.
    """

    def __init__(self, problem: Problem, x: Tensor | None, arguments: Arguments, levels: Sequence[Level]) -> None:
        self.problem = problem
        self.arguments = arguments
        self.levels = levels
        self.kinds = {level.number: level.kind for level in levels}
        self.inner = problem.bind(arguments, implicit=x is None)
        self.eager_grad = grad_mode_beneath(levels)
        self.x = None if x is None else _Given(x)
        self.inputs = [_Given(t) for t in arguments.tensors]
        self.captures: list[Capture] = []
        self.found: Found | None = None
        self.mapped: list[int] = []
        self.sizes: dict[int, int] = {}
        self.grad_level = self.jvp_level = 0
        self.eager = False

    def solve(self, report: bool) -> Solved:
        """Solve, check and attach."""
        given = self._given()
        for t in given:
            self._note(t)
        self.found = found = self._run_g(given)
        shape = found.y.shape[len(self.mapped) :]
        if self.x is not None and self.x.tensor.shape != shape:
            self.x = _Given(self.x.tensor.expand(shape))
            self._note(self.x)
        at = self._linearized(found.y)
        found = self.found
        forward = at.forward
        with Beneath(), GradMode(False), without_autocast(found.y.device):
            x = None if self.x is None else self._plain(self.x, self.mapped).detach()
            y, _, check = judge(self.problem, forward, found, x, report=report, at=at)
        if y is not found.y:
            at = self._linearized(y)
        result = self._attached(at, y)
        if check is not None:
            check = Check(dress(check.failed, self.mapped), dress(check.residual, self.mapped))
            if self.problem.rule.on_failure == "nan":
                result = spoil(check.failed, self.problem.rule.event_dim, result)
        return self._solved(result, at, check)

    def found_above(self) -> Found | None:
        """What g returned, as tensors of the levels."""
        if (found := self.found) is None:
            return None
        y, failed, iterations = (None if t is None else dress(t, self.mapped) for t in _tensors_of(found))
        assert y is not None
        return Found(y, failed, iterations, found.error)

    def _note(self, given: _Given) -> None:
        """Note what differentiates a tensor."""
        given.differentiated = self._is_eager(given.peeled)
        for number, wrapper in given.peeled.wrappers:
            tangent = self._tangent(wrapper, number) if self.kinds[number] == "jvp" else None
            if tangent is not None:
                peeled = Peeled(tangent)
                self._is_eager(peeled)
                if any(self._differentiates(n, w) for n, w in peeled.wrappers if n != number):
                    raise _Elsewhere
                given.pushed = peeled.levels
                given.differentiated = True
                self._differentiate(number, self.grad_level, number)
            elif wrapper.requires_grad:
                given.differentiated = True
                self._differentiate(number, number, self.jvp_level)

    def _differentiate(self, number: int, grad_level: int, jvp_level: int) -> None:
        """Note a level, unless it is one too many."""
        if number in (self.grad_level, self.jvp_level):
            return
        taken = self.jvp_level if number == jvp_level else self.grad_level
        if taken or (jvp_level and grad_level and jvp_level > grad_level):
            raise _Elsewhere
        self.grad_level, self.jvp_level = grad_level, jvp_level

    def _differentiates(self, number: int, wrapper: Tensor) -> bool:
        return wrapper.requires_grad or (self.kinds[number] == "jvp" and self._tangent(wrapper, number) is not None)

    @staticmethod
    def _tangent(dual: Tensor, level: int) -> Tensor | None:
        with Beneath(level):
            return forward_ad.unpack_dual(dual).tangent

    def _is_eager(self, peeled: Peeled) -> bool:
        eager = self.eager_grad and peeled.plain.requires_grad
        self.eager |= eager
        return eager

    # ---- g ----------------------------------------------------------------------------------------------------------

    def _run_g(self, given: Sequence[_Given]) -> Found:
        """Run g on plain tensors; those of levels that it closes over are found by running it."""
        peeled, reads = [t.peeled for t in given], list[Tensor]()
        while True:
            try:
                with Beneath(), GradMode(False):
                    plain = [p.stacked.detach() for p in peeled]
                    mapping = self._mapping(peeled)
                    call = MappedCall(self.problem, self.arguments, self.x is not None, reads)
                    return call.solve(plain[: len(given)], plain[len(given) :], mapping)
            except Reads as found:  # noqa: PERF203
                if any(found.tensor is r for r in reads):  # this call is made by the g of another Inverse
                    raise
                if len(reads) >= MOST_READS:
                    raise errors.made_anew(self.problem.call) from None
                reads.append(found.tensor)
                peeled.append(Peeled(found.tensor))

    def _mapping(self, peeled: Sequence[Peeled]) -> Mapping:
        """Note the levels that map these tensors."""
        for p in peeled:
            if p.levels:
                self.sizes.update(p.sizes)
        self.mapped = sorted(self.sizes)
        flags = tuple(tuple(n in p.levels for n in self.mapped) for p in peeled)
        return Mapping(tuple(self.sizes[n] for n in self.mapped), flags)

    # ---- f ----------------------------------------------------------------------------------------------------------

    def _linearized(self, y: Tensor) -> Linearization:
        """f at y, with what it closes over."""
        while True:
            try:
                with Beneath():
                    return self._linearize(y)
            except Unprepared as found:  # noqa: PERF203
                before, is_found = self.mapped, self.found is not None and y is self.found.y
                self._add(found.tensor)
                assert self.found is not None
                y = self.found.y if is_found else spread(y, before, self.mapped, self.sizes)
            except Hidden:
                raise _Elsewhere from None
            except RuntimeError:
                if self.inner.model.closes_over_nothing:
                    raise
                raise _Elsewhere from None

    def _add(self, tensor: Tensor) -> None:
        """Make a tensor that f closes over one of its inputs."""
        if len(self.captures) >= _MOST:  # f makes it anew each time
            raise _Elsewhere
        given = _Given(tensor)
        self._note(given)
        before = self.mapped
        with Beneath():
            self._mapping([given.peeled])
        self.inputs.append(given)
        self._capture([tensor])
        if self.found is not None and before != self.mapped:
            y, failed, iterations = (
                None if t is None else spread(t, before, self.mapped, self.sizes) for t in _tensors_of(self.found)
            )
            assert y is not None
            self.found = Found(y, failed, iterations, self.found.error)

    def _capture(self, tensors: Sequence[Tensor]) -> None:
        model = self.inner.model
        places = places_of(tensors, (model.f, model.jacobian.entries))
        self.captures += [Capture(t, t, places[id(t)]) for t in tensors]

    def _linearize(self, y: Tensor) -> Linearization:
        model = self.inner.model
        for given in self.inputs:
            given.leading = self._leading(given)
        inputs = [self._plain(t, t.leading) for t in self.inputs]
        forward = self._forward(inputs)
        wanted = self._is_differentiated()
        to_y = wanted and (model.jacobian.entries is None or (self.grad_level > 0 and self.jvp_level > 0))
        leaf = _leaf(y, to_y)
        leaves = [_leaf(t, given.differentiated) for t, given in zip(inputs, self.inputs, strict=True)]
        with GradMode(True):
            if model.closes_over_nothing:
                values = forward.with_entries(leaf, leaves)
                return Linearization(forward, leaf, leaves, values, depends_on_y=leaf.requires_grad)
            foreign = Foreign(len(self.levels), [leaf, *leaves], self._stand_in)
            traced = self._trace(forward, foreign, leaves)
        self.eager |= self.eager_grad and bool(traced.captures)
        if foreign.found:
            for tensor, _, _ in foreign.found:
                self.inputs.append(_Given(tensor))
                self._note(self.inputs[-1])
            self._capture([tensor for tensor, _, _ in foreign.found])
            forward = self._forward([*inputs, *(p.plain for _, p, _ in foreign.found)])
        if not wanted and self._is_differentiated():  # by way of what f closes over
            return self._linearize(y)
        leaves = (*leaves, *(stand_in for _, _, stand_in in foreign.found), *traced.leaves)
        return Linearization(forward, leaf, leaves, traced.values, traced.captures, traced.depends_on_y)

    def _is_differentiated(self) -> bool:
        return self.eager or self.grad_level > 0 or self.jvp_level > 0

    def _trace(self, forward: Forward, foreign: Foreign, leaves: Sequence[Tensor]) -> Traced:
        idle = Idle([level.randomness if level.kind == "vmap" else "same" for level in self.levels])

        def evaluate() -> Sequence[Tensor]:
            with idle, foreign:
                return forward.with_entries(foreign.known[0], leaves)

        since = sequence_number()
        traced = trace(evaluate, foreign.known, self.problem.call)
        graph = Graph(traced.values)
        seen = bool(self.mapped) or all(map(foreign.has_seen, traced.values))  # a vmap makes them anew
        seen = seen and graph.made_between(since, sequence_number())
        foreign.forget()
        if not seen or any(map(is_functorch_wrapped, traced.values)):  # by a level that nothing was seen to belong to
            raise _Elsewhere
        nested = self.grad_level and self.jvp_level
        twice = nested or (self.jvp_level and any(t.pushed is not None for t in self.inputs))
        # Its backward is differentiated here, and need not be differentiable; and where f is evaluated once more,
        # without a level, no mode sees what it is given.
        if (twice or foreign.found or self.captures) and any(isinstance(n, BackwardCFunction) for n in graph.nodes):
            raise _Elsewhere
        return traced

    def _stand_in(self, tensor: Tensor, peeled: Peeled) -> Tensor | None:
        """A leaf for a tensor of a level that f reads; None if f must be given it."""
        if any(self.kinds[number] == "jvp" for number, _ in peeled.wrappers):
            return None  # whether it has a tangent can only be seen with the level
        given = _Given(tensor)
        self._note(given)
        if peeled.levels or self._leading(given):
            return None
        with Beneath():
            return _leaf(peeled.plain, given.differentiated)

    def _leading(self, given: _Given) -> Sequence[int]:
        """The levels that the plain tensor must have dimensions for: each sample has its own derivative."""
        own = given.peeled.levels
        if not given.differentiated or not self.mapped:
            return own
        leading = set(own) | ({*given.pushed} & {*self.mapped} if given.pushed else set())
        if any(number == self.grad_level and wrapper.requires_grad for number, wrapper in given.peeled.wrappers):
            leading |= {n for n in self.mapped if n < self.grad_level}
        return sorted(leading)

    def _plain(self, given: _Given, levels: Sequence[int]) -> Tensor:
        """The plain tensor with dimensions for these levels on the left."""
        return spread(given.peeled.stacked, given.peeled.levels, levels, self.sizes)

    def _forward(self, inputs: Sequence[Tensor]) -> Forward:
        """f with plain params."""
        if not self.mapped and not self.captures:
            return Forward(self.inner.model, self.arguments.with_tensors(inputs), self.inner.implicit)
        flags = tuple(tuple(n in t.leading for n in self.mapped) for t in self.inputs)
        mapping = Mapping(tuple(self.sizes[n] for n in self.mapped), flags)
        randomness = [level.randomness for level in self.levels if level.number in self.mapped]
        return Mapped(self.inner, self.captures, mapping, inputs, randomness)

    # ---- the derivatives --------------------------------------------------------------------------------------------

    def _attached(self, at: Linearization, y: Tensor) -> Tensor:
        """y, plain, as a differentiable tensor of all levels."""
        rule = self.problem.rule
        result = y
        levels = [n for n in (self.jvp_level, self.grad_level) if n]
        if (levels or self.eager) and not at.depends_on_y and rule.jacobian.entries is None:
            raise errors.no_dependence(rule.call)
        nested = len(levels) == 2
        formed = rule.jacobian.is_formed(y, rule.event_dim)
        if nested and (self.eager or not (formed and at.y.requires_grad)):
            raise _Elsewhere
        if self.eager:
            with Beneath(), GradMode(True):
                x = None if self.x is None else self._plain(self.x, self.mapped)
                result = attach(rule, at, y, x)
        beneath = 0
        for level in levels:
            outer = [n for n in self.mapped if beneath < n < level]
            with_derivative = self._with_tangent if level == self.jvp_level else self._with_node
            result = with_derivative(at, result, outer)
            beneath = level
        return dress(result, [n for n in self.mapped if n > beneath])

    def _with_node(self, at: Linearization, y: Tensor, between: Sequence[int]) -> Tensor:
        """y as a tensor of the level of grad; it has the dimensions of the levels `between` on the left."""
        level = self.grad_level
        outer, inner = ([n for n in self.mapped if (n < level) == below] for below in (True, False))
        with Beneath(level):
            x = None
            if self.x is not None and self.x.differentiated:
                x = spread(*at_level(self.x.tensor, level), inner, self.sizes)
            known = [at_level(t.tensor, level) for t in self.inputs]
            flags = [tuple(n in own for n in inner) for _, own in known] + [(False,) * len(inner)] * len(at.captures)
            attachment = Attachment(
                rule=self.problem.rule,
                at=at,
                level=level,
                pushed=self.jvp_level,
                outer=outer,
                leading=[[n for n in t.leading if n < level] for t in self.inputs],
                inner=Mapping(tuple(self.sizes[n] for n in inner), tuple(flags)),
                forward=self.inner,
                captures=self._all_captures(at),
                sizes=self.sizes,
                eager=self.eager,
            )
            inputs = [*(t for t, _ in known), *(c.tensor for c in at.captures)]
            return attach_for_grad(attachment, dress(y, between), x, inputs)

    def _with_tangent(self, at: Linearization, y: Tensor, outer: Sequence[int]) -> Tensor:
        """y as a tensor of the level of jvp; it has the dimensions of the levels `outer` on the left."""
        level, given = self.jvp_level, self._given()
        extra = sorted({n for t in given for n in t.pushed or () if n not in self.mapped})
        if (extra or self.eager) and not self.problem.rule.jacobian.is_formed(y, self.problem.rule.event_dim):
            raise _Elsewhere
        tangents = [None if t.pushed is None else split(t.tensor, level)[1] for t in given]
        with Beneath(), GradMode(self.eager), without_autocast(y.device):
            sizes = dict(self.sizes)
            for t in tangents:
                sizes.update({} if t is None else t.sizes)
            moved = [
                None if t is None else t.spread([*extra, *own], sizes)
                for t, own in zip(tangents, self._leadings(), strict=True)
            ]
            t_x, *t_inputs = moved if self.x is not None else [None, *moved]
            t_inputs += [None] * len(at.captures)
            if self.eager:
                pushed = [t is not None for t in t_inputs]
                tensors = requiring_grad(at.forward.arguments.tensors, pushed) + [c.tensor for c in at.captures]
                (at_y,) = requiring_grad([y], [True])  # J is a function of it
                t = differentiable_jvp(at_y, t_x, t_inputs, self.problem.rule, at, tensors, _over(len(extra)))
            else:
                t = jvp(t_x, t_inputs, self.problem.rule, at, _over(len(extra)))
        primal, tangent = dress(y, outer), dress(t, [*extra, *outer])
        with Beneath(level):
            return forward_ad.make_dual(primal, tangent)

    def _given(self) -> list[_Given]:
        return self.inputs if self.x is None else [self.x, *self.inputs]

    def _leadings(self) -> list[Sequence[int]]:
        of_inputs = [t.leading for t in self.inputs]
        return of_inputs if self.x is None else [self.mapped, *of_inputs]

    def _all_captures(self, at: Linearization) -> list[Capture]:
        """What f closes over, by the objects that it reads."""
        return [
            *self.captures,
            *(Capture(c.tensor, c.tensor if c.read is None else c.read, c.places) for c in at.captures),
        ]

    def _solved(self, y: Tensor, at: Linearization, check: Check | None) -> Solved:
        assert self.found is not None
        captures = self._all_captures(at)
        inputs = [*(t.tensor for t in self.inputs), *(c.tensor for c in at.captures)]
        forward = Mapped(self.inner, captures, Mapping(), inputs)
        z = None if self.inner.model.closes_over_nothing else dress(at.value, self.mapped)
        iterations = None if self.found.iterations is None else dress(self.found.iterations, self.mapped)
        return Solved(y, z, check, self.problem.rule, forward, iterations)


def _leaf(t: Tensor, requires_grad: bool) -> Tensor:
    """A leaf on the memory of t; autograd cannot record what inference mode made, so that is copied."""
    return (t.clone() if t.is_inference() else t.detach()).requires_grad_(requires_grad)


def _over(number: int) -> Callable[..., Tensor]:
    """Map a function over the first few dimensions of its tangents, of which some may be None."""

    def mapped(function: Callable[..., Tensor], *tangents: Tensor | None) -> Tensor:
        def of_some(*chosen: Tensor) -> list[Tensor]:
            rest = iter(chosen)
            return [function(*(None if t is None else next(rest) for t in tangents))]

        return over_first_dims(number, of_some, [t for t in tangents if t is not None])[0]

    return mapped


def _tensors_of(found: Found) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    return found.y, found.failed, found.iterations
