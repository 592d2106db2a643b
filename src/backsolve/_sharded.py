"""One call on DTensors: each process inverts its own part of the batch, and no part travels.

This is right because f mixes no events: a shard of whole events is a problem by itself. A replicated param belongs to
the events of all processes, so what one process finds is a part of its gradient: `Partial`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from backsolve import errors
from backsolve._arguments import Arguments
from backsolve._linearize import linearize
from backsolve._solve import Problem
from backsolve._torch import active_transform, is_distributed
from backsolve.solvers.foreign import NumpySolver
from backsolve.solvers.samples import EachSample


class _TorchCode(TorchFunctionMode):
    """While active, no tensor becomes an array of another library: that code might look beyond its own events."""

    FOREIGN = (Tensor.numpy, Tensor.__array__, Tensor.__dlpack__, Tensor.tolist)

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        self.problem = problem

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.FOREIGN:
            raise _refused(self.problem, "a g that is torch code", f"one that calls Tensor.{func.__name__}")
        return func(*args, **(kwargs or {}))


def guarded(problem: Problem) -> Problem:
    """The same problem, with a g that is refused if it turns out to be no torch code."""
    if problem.numerical is not None:
        return problem

    def solver(*args: Any, **kwargs: Any) -> Any:
        with _TorchCode(problem):
            return problem.solver(*args, **kwargs)

    return replace(problem, solver=solver)


def call(problem: Problem, solve: Callable[..., Tensor], x: Any, params: tuple[Any, ...], kwargs: Any) -> Tensor:
    """Solve `f(y, *params) = x` for the events of this process.

    Args:
        problem: f, g and the options.
        solve: the same for plain tensors.
        x: a DTensor that is replicated, or sharded along its batch dimensions.
        params: replicated DTensors, or sharded as x is.
        kwargs: params by keyword.
    """
    from torch.distributed.tensor import DTensor  # 0.3 s to import; whoever has an x of it has imported it

    _check(problem, x)
    arguments = Arguments(params, kwargs)
    dims = arguments.event_dims(problem.param_event_dims, None if problem.rule.event_dim else 0)
    local = [_local(problem, x, t, k) for t, k in zip(arguments.tensors, dims, strict=True)]
    args, kwargs = arguments.rebuild(local)
    local_x = x.to_local()
    y = solve(local_x, *args, **kwargs)
    if y.shape != local_x.shape:
        raise _refused(problem, f"y of the shape of x, in each process {tuple(local_x.shape)}", f"{tuple(y.shape)}")
    if (
        torch.is_grad_enabled()
        and linearize(problem.bind(Arguments(args, kwargs), implicit=False), y.detach()).captures
    ):
        raise _refused(problem, "all tensors that require a gradient among the params", "an f that closes over some")
    stride = torch.empty(x.shape, device="meta").stride()
    return DTensor.from_local(
        y.contiguous(), x.device_mesh, x.placements, run_check=False, shape=x.shape, stride=stride
    )


def _check(problem: Problem, x: Any) -> None:
    """Refuse what cannot be solved part by part."""
    if active_transform():
        raise _refused(problem, "an eager call, without torch.func", "a transform around it")
    if isinstance(problem.solver, NumpySolver | EachSample):
        raise _refused(problem, "a g that is torch code", f"{problem.solver!r}, which sees one process only")
    if problem.rule.jacobian.equations is not None:
        raise _refused(problem, "a square map", f"{problem.rule.jacobian!r}")
    batch_dims = x.dim() - problem.rule.event_dim
    for p in x.placements:
        if not (p.is_replicate() or (p.is_shard() and p.dim < batch_dims)):
            raise _refused(
                problem, "an x that is replicated, or sharded along a batch dimension", f"{p} of {tuple(x.shape)}"
            )


def _local(problem: Problem, x: Any, t: Any, event_dim: int | None) -> Tensor:
    """The part of a param that the events of this process depend on."""
    if not is_distributed(t) or t.device_mesh != x.device_mesh:
        raise _refused(problem, "params that are DTensors on the mesh of x", errors.describe(t))
    placements: list[Any] = []
    for of_x, of_t in zip(x.placements, t.placements, strict=True):
        if not _fits(problem, x, of_x, t, of_t, event_dim):
            expected = "replicated params without the sharded dimension, or sharded along it as x is"
            raise _refused(problem, expected, f"{of_t} of {tuple(t.shape)}, with {of_x} of x {tuple(x.shape)}")
        placements.append(_partial() if of_x.is_shard() and of_t.is_replicate() else of_t)
    return t.to_local(grad_placements=placements)


def _fits(problem: Problem, x: Any, of_x: Any, t: Any, of_t: Any, event_dim: int | None) -> bool:
    """Whether the part of a param that a process has is the one that its part of x needs."""
    if of_x.is_replicate() or event_dim is None:  # a param of unknown dimensions can be told by the shape of y alone
        return of_t.is_replicate()
    same = of_x.dim - (x.dim() - problem.rule.event_dim) + t.dim() - event_dim  # the dimension that x is sharded along
    if of_t.is_replicate():
        return same < 0 or t.shape[same] == 1
    return type(of_t) is type(of_x) and of_t.dim == same and t.shape[same] == x.shape[of_x.dim]


def _partial() -> Any:
    from torch.distributed.tensor import Partial

    return Partial()


def _refused(problem: Problem, expected: str, got: str) -> errors.TransformError:
    return errors.distributed(problem.call, expected, got)
