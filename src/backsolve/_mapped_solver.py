"""g under `vmap`: one call for all samples where the event dimensions are known, else one call a sample."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from backsolve import errors
from backsolve._arguments import Arguments
from backsolve._functorch import active_levels, is_functorch_wrapped, is_mapped_wrapper, level_of
from backsolve._levels import Mapping, Outputs, concretely
from backsolve._solve import Problem, run_solver
from backsolve.solvers.base import Found

MOST_READS = 32  # tensors of levels that g closes over; with more, it makes them anew in each run


class Reads(BaseException):
    """g reads a tensor of a level of torch.func without being given it. No Exception: g must not catch it."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        self.tensor = tensor


class _Giving(TorchFunctionMode):
    """While active, torch functions see plain tensors in the place of wrapped ones that g closes over."""

    def __init__(self, plain: dict[int, Tensor], problem: Problem) -> None:
        super().__init__()
        self.plain = plain
        self.problem = problem

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*self._give(args), **self._give(kwargs or {}))

    def _give(self, value: Any) -> Any:
        if isinstance(value, Tensor) and is_functorch_wrapped(value):
            if id(value) in self.plain:
                return self.plain[id(value)]
            if _may_be_own(value):
                if not self.problem.is_tested:
                    raise errors.untested_levels(self.problem.call)
                return value
            raise Reads(value)
        if type(value) in (tuple, list):
            return type(value)(self._give(v) for v in value)
        if type(value) is dict:
            return {k: self._give(v) for k, v in value.items()}
        return value


def _may_be_own(wrapped: Tensor) -> bool:
    """Whether a level that g has opened may have made a wrapper; those around g are not active while it runs.

    Both are numbered from 1, so a tensor from outside may be taken for one of g's. Then y is wrong, which the residual
    test sees: there f is evaluated where the levels are told apart.
    """
    number, is_mapped = level_of(wrapped), is_mapped_wrapper(wrapped)
    return any(level.number == number and (level.kind == "vmap") == is_mapped for level in active_levels())


def solve_mapped(problem: Problem, x: Tensor | None, arguments: Arguments, reads: tuple[Tensor, ...] = ()) -> Found:
    """Run g on plain tensors; the wrapped ones that it closes over, `reads`, are found by running it."""
    given = arguments.tensors if x is None else (x, *arguments.tensors)

    reasons: list[Callable[[], errors.BacksolveError]] = []

    def run(plain: Sequence[Tensor], mapping: Mapping) -> Outputs:
        n = len(given)
        found = MappedCall(problem, arguments, x is not None, reads).solve(plain[:n], plain[n:], mapping)
        reasons.extend([] if found.error is None else [found.error])
        return [found.y, found.failed, found.iterations]

    try:
        y, failed, iterations = concretely(run, (*given, *reads))
    except Reads as found:
        if any(found.tensor is r for r in reads):  # this call is made by the g of another Inverse, to which it is new
            raise
        if len(reads) >= MOST_READS:
            raise errors.made_anew(problem.call) from None
        return solve_mapped(problem, x, arguments, (*reads, found.tensor))
    assert y is not None
    return Found(y, failed, iterations, reasons[0] if reasons else None)


class MappedCall:
    """One call of g with plain tensors, some of which have mapped dimensions on the left."""

    def __init__(self, problem: Problem, arguments: Arguments, has_x: bool, reads: Sequence[Tensor]) -> None:
        self.problem = problem
        self.arguments = arguments
        self.has_x = has_x
        self.reads = reads

    def solve(self, given: Sequence[Tensor], closure: Sequence[Tensor], mapping: Mapping) -> Found:
        """y with all mapped dimensions on the left."""
        if not mapping:
            return self._run(given, closure)
        folded = self._fold(given, closure, mapping)
        return self._loop(given, closure, mapping) if folded is None else folded

    def _run(self, given: Sequence[Tensor], closure: Sequence[Tensor]) -> Found:
        x, tensors = (given[0], given[1:]) if self.has_x else (None, given)
        arguments = self.arguments.with_tensors(tensors)
        forward = self.problem.bind(arguments, implicit=x is None)
        if self.problem.g_is_pure:  # it reads nothing but what it is given
            return run_solver(self.problem, x, arguments, forward)
        with _Giving({id(r): t for r, t in zip(self.reads, closure, strict=True)}, self.problem):
            return run_solver(self.problem, x, arguments, forward)

    def _fold(self, given: Sequence[Tensor], closure: Sequence[Tensor], mapping: Mapping) -> Found | None:
        """One call of g for all samples; None if the event dimensions are unknown, or g does not broadcast."""
        k = self.problem.rule.event_dim
        if self.has_x and len(given) == 1 and not closure:  # the common case, without 20 us of looking at params
            lifted = list(given), given[0].dim() - len(mapping) - k
        else:
            lifted = self._lifted(given, mapping)
        if lifted is None or lifted[1] < 0:
            return None
        folded, most = lifted
        try:
            found = self._run(folded, closure)
        except (errors.SolverOutputError, errors.ForwardOutputError):  # one sample at a time has a clearer error
            return None
        except errors.BacksolveError:
            raise
        except Exception:  # noqa: BLE001 (g may not broadcast; any other reason will show with one sample, too)
            return None
        rank = len(mapping) + most + k
        return found if found.y.dim() == rank and found.y.shape[: len(mapping)] == mapping.sizes else None

    def _lifted(self, given: Sequence[Tensor], mapping: Mapping) -> tuple[list[Tensor], int] | None:
        """The tensors with all mapped dimensions, and the number of batch dimensions behind them."""
        inside = [t.dim() - sum(m) for t, m in zip(given, mapping.mapped, strict=False)]
        batch_dims = [None if k is None else n - k for n, k in zip(inside, self._event_dims(), strict=True)]
        mapped = [any(m) for m in mapping.mapped]
        unknown = any(m and b is None for m, b in zip(mapped, batch_dims, strict=False))
        if unknown or any(mapped[len(given) :]) or min((b for b in batch_dims if b is not None), default=0) < 0:
            return None
        most = max((b for b in batch_dims if b is not None), default=0)
        folded = [
            mapping.lift(t, i, most - b) if b is not None and (mapped[i] or self._is_x(i)) else t
            for i, (t, b) in enumerate(zip(given, batch_dims, strict=True))
        ]
        if self.has_x:
            folded[0] = folded[0].expand((*mapping.sizes, *folded[0].shape[len(mapping) :]))
        return folded, most

    def _loop(self, given: Sequence[Tensor], closure: Sequence[Tensor], mapping: Mapping) -> Found:
        """One call of g for each index of the outermost mapped dimension."""
        tensors, n = (*given, *closure), len(given)
        found: list[Found] = []
        for i in range(mapping.sizes[0]):
            sample = [t[i] if m[0] else t for t, m in zip(tensors, mapping.mapped, strict=True)]
            found.append(self.solve(sample[:n], sample[n:], mapping.inner()))
        if not found:
            raise errors.empty_map(self.problem.call)
        return _stacked(found, self.problem.rule.event_dim)

    def _is_x(self, position: int) -> bool:
        return self.has_x and position == 0

    def _event_dims(self) -> list[int | None]:
        """Of each tensor that g is given; None where it is unknown."""
        k = self.problem.rule.event_dim
        of_params = self.arguments.event_dims(self.problem.param_event_dims, None if k else 0)
        return [k, *of_params] if self.has_x else of_params


def _stacked(found: Sequence[Found], event_dim: int) -> Found:
    """One for all samples."""
    y = torch.stack([f.y for f in found])
    failed = [torch.zeros(_batch(f.y, event_dim), dtype=torch.bool) if f.failed is None else f.failed for f in found]
    counts = [f.iterations for f in found if f.iterations is not None]
    return Found(
        y,
        torch.stack(failed).to(y.device) if any(f.failed is not None for f in found) else None,
        torch.stack(counts) if len(counts) == len(found) else None,
        next((f.error for f in found if f.error is not None), None),
    )


def _batch(y: Tensor, event_dim: int) -> torch.Size:
    return y.shape[: y.dim() - event_dim]
