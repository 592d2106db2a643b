"""Two processes that talk by gloo: data parallel training, and DTensors, of which each process has a part.

The processes are started once; each test is a function that both of them run. It asserts for itself.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo
from torch import Tensor, distributed, multiprocessing, nn

from backsolve import errors, implicit_function, inverse
from backsolve.solvers import Bracket, numpy_solver

pytestmark = pytest.mark.skipif(not distributed.is_gloo_available(), reason="this torch was built without gloo")

X = torch.linspace(-2, 3, 5, dtype=torch.float64)  # five events: the processes have three and two
A = torch.tensor(1.5, dtype=torch.float64)
WEIGHT = torch.tensor([[3.0, 1.0, 0.0], [-1.0, 2.0, 0.5], [0.2, 0.0, 1.5]], dtype=torch.float64)
ROWS = torch.linspace(-1, 2, 12, dtype=torch.float64).reshape(4, 3)


# ------------------------------------------------------------------------------------------------ in the processes


def scaled_sinh(y: Tensor, a: Tensor) -> Tensor:
    return a * y.sinh()


def scaled_asinh(x: Tensor, a: Tensor) -> Tensor:
    return (x / a).asinh()


def mixed(y: Tensor, weight: Tensor) -> Tensor:
    return y.sinh() @ weight.mT


def unmixed(x: Tensor, weight: Tensor) -> Tensor:
    return (x @ torch.linalg.inv(weight).mT).asinh()


by_numpy = inverse(scaled_sinh, numpy_solver(lambda x, a: np.arcsinh(x / a)))
by_torch = inverse(scaled_sinh, scaled_asinh)


class Model(nn.Module):
    """A linear layer, then an `Inverse` whose f closes over a weight and whose g is NumPy code."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3, dtype=torch.float64)
        self.weight = nn.Parameter(WEIGHT.clone())
        self.inverse = inverse(lambda y: mixed(y, self.weight), numpy_solver(self.solve), event_dim=1)

    def solve(self, x: np.ndarray) -> np.ndarray:
        return np.arcsinh(x @ np.linalg.inv(self.weight.detach().numpy()).T)

    def forward(self, x: Tensor) -> Tensor:
        return self.inverse(self.first(x))


def data_parallel(rank: int) -> None:
    torch.manual_seed(0)
    alone, parallel = Model(), nn.parallel.DistributedDataParallel(twin := Model())
    twin.load_state_dict(alone.state_dict())
    for _ in range(2):  # the second time with the buckets that the first has laid out
        for model in (alone, twin):
            model.zero_grad()
        alone(ROWS).square().mean().backward()
        parallel(ROWS[2 * rank : 2 * rank + 2]).square().mean().backward()
        for ours, right in zip(twin.parameters(), alone.parameters(), strict=True):
            close(ours.grad, right.grad)


def close(ours: Any, right: Any) -> None:
    torch.testing.assert_close(ours, right, rtol=1e-13, atol=1e-13)


def mesh() -> Any:
    return distributed.device_mesh.init_device_mesh("cpu", (2,))


def leaf(tensor: Tensor, *placements: Any) -> Any:
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.clone(), mesh(), placements).requires_grad_()


def shard(dim: int = 0) -> Any:
    from torch.distributed.tensor import Shard

    return Shard(dim)


def replicate() -> Any:
    from torch.distributed.tensor import Replicate

    return Replicate()


def check(h: Callable[..., Any], exact: Callable[..., Tensor], *inputs: Any) -> None:
    """Values, gradients and second derivatives of DTensors are those of the whole tensors in one process."""
    whole = [t.full_tensor().detach().requires_grad_() for t in inputs]
    y, expected = h(*inputs), exact(*whole)
    assert y.placements == inputs[0].placements
    close(y.full_tensor(), expected)
    first = torch.autograd.grad((y * y.cos()).sum(), inputs, create_graph=True)
    right = torch.autograd.grad((expected * expected.cos()).sum(), whole, create_graph=True)
    for ours, theirs in zip(first, right, strict=True):
        close(ours.full_tensor(), theirs)
    second = torch.autograd.grad(sum((g.full_tensor() ** 2).sum() for g in first), inputs)
    right = torch.autograd.grad(sum((g**2).sum() for g in right), whole)
    for ours, theirs in zip(second, right, strict=True):
        close(ours.full_tensor(), theirs)


def sharded_elementwise(rank: int) -> None:  # noqa: ARG001
    check(by_torch, scaled_asinh, leaf(X, shard()), leaf(A, replicate()))
    check(by_torch, scaled_asinh, leaf(X, shard()), leaf(1 + X**2, shard()))
    check(by_torch, scaled_asinh, leaf(X, replicate()), leaf(A, replicate()))
    check(by_torch, scaled_asinh, leaf(ROWS, shard(1)), leaf(1 + X[:3] ** 2, shard()))
    check(by_torch, scaled_asinh, leaf(ROWS, shard()), leaf(1 + X[:3] ** 2, replicate()))
    searched = inverse(scaled_sinh, Bracket(-10.0, 10.0))
    check(searched, scaled_asinh, leaf(X, shard()), leaf(A, replicate()))


def sharded_dense(rank: int) -> None:  # noqa: ARG001
    inv = inverse(mixed, unmixed, event_dim=1)
    check(inv, unmixed, leaf(ROWS, shard()), leaf(WEIGHT, replicate()))


def compiled(rank: int) -> None:  # noqa: ARG001
    """The call breaks the graph."""
    h = torch.compile(lambda x, a: 2 * by_torch(x, a) + a, backend="eager")
    check(h, lambda x, a: 2 * scaled_asinh(x, a) + a, leaf(X, shard()), leaf(A, replicate()))


def sharded_without_a_gradient(rank: int) -> None:  # noqa: ARG001
    with torch.no_grad():
        y = by_torch(leaf(X, shard()), leaf(A, replicate()))
    close(y.full_tensor(), scaled_asinh(X, A))


def local_map_recipe(rank: int) -> None:  # noqa: ARG001
    from torch.distributed.tensor import Partial
    from torch.distributed.tensor.experimental import local_map

    sharded = local_map(
        by_numpy,
        in_placements=([shard()], [replicate()]),
        in_grad_placements=([shard()], [Partial()]),
        out_placements=[shard()],
        device_mesh=mesh(),
    )
    check(sharded, scaled_asinh, leaf(X[:4], shard()), leaf(A, replicate()))


def refuse(words: str, h: Callable[..., Any], *args: Any) -> None:
    with pytest.raises(errors.TransformError, match=words):
        h(*args)


def refusals(rank: int) -> None:  # noqa: ARG001
    from torch.distributed.tensor import DTensor, Partial

    x, a = leaf(X, shard()), leaf(A, replicate())
    refuse("local_map", by_numpy, x, a)
    refuse("Tensor.numpy", inverse(torch.sin, lambda x: torch.from_numpy(np.arcsin(x.numpy()))), x)
    refuse("Tensor.__array__", inverse(torch.sin, lambda x: torch.from_numpy(np.arcsin(np.asarray(x)))), x)
    refuse("the value of y alone", by_torch.solve, x, a)
    refuse("the value of y alone", by_torch.with_log_det, x, a)
    refuse("the value of y alone", by_torch.jacobian, x, a)
    refuse("DTensors on the mesh of x", by_torch, x, A)
    refuse("x that is a DTensor, too", by_torch, X, a)
    refuse("x that is a DTensor, too", implicit_function(lambda y, a: y - a, torch.clone), a)
    refuse("closes over some", inverse(lambda y: y * weight, lambda x: x / weight.detach()), x)
    for transform in (torch.vmap, lambda h: torch.func.grad(lambda x: h(x).sum())):
        refuse("eager call", transform(inverse(torch.sinh, torch.asinh)), x)
        refuse("x that is a DTensor, too", transform(lambda x: by_torch(x, a)), x)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(by_torch, backend="eager", fullgraph=True)(x, a)
    partial = DTensor.from_local(X, x.device_mesh, [Partial()], run_check=False)
    refuse("replicated, or sharded", by_torch, partial, a)
    refuse("replicated, or sharded", inverse(mixed, unmixed, event_dim=1), leaf(ROWS, shard(1)), leaf(WEIGHT, shard()))
    refuse("without the sharded dimension", by_torch, x, leaf(1 + X**2, replicate()))
    refuse("without the sharded dimension", by_torch, leaf(ROWS, shard()), leaf(1 + X[:3] ** 2, shard()))
    larger = leaf(X[:2, None] ** 2 + 1, replicate())  # with one event a process, x is broadcast to it
    inv = inverse(lambda y, a: a * y, lambda x, a: x / a, event_dim=1)
    refuse("the shape of x", inv, leaf(ROWS[:2], shard()), larger)


weight = nn.Parameter(A.clone())


def failures_of_one(rank: int) -> None:
    """Only the process whose g is wrong raises; the index counts in its part."""
    wrong = inverse(torch.sinh, lambda x: torch.where(x > 2.9, 0.0, x.asinh()))
    x = leaf(X, shard())
    if rank:
        with pytest.raises(errors.ResidualError, match=r"at index \(1,\)"):
            wrong(x)
    else:
        wrong(x)


TASKS = (
    data_parallel,
    sharded_elementwise,
    sharded_dense,
    sharded_without_a_gradient,
    compiled,
    local_map_recipe,
    refusals,
    failures_of_one,
)


def process(rank: int, meeting: str, results: Any) -> None:
    """What runs in each of the two processes."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    for task in TASKS:
        try:
            task(rank)
            failure = ""
        except BaseException:  # noqa: BLE001
            failure = traceback.format_exc()
        results.put((task.__name__, rank, failure))
        distributed.barrier()
    distributed.destroy_process_group()


# ------------------------------------------------------------------------------------------------ the tests


@pytest.fixture(scope="module")
def failures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[int, str]]:
    """What each task raised in each process."""
    meeting: Path = tmp_path_factory.mktemp("gloo") / "meeting"
    results = multiprocessing.get_context("spawn").SimpleQueue()
    both = multiprocessing.spawn(process, (str(meeting), results), nprocs=2, join=False)
    found: dict[str, dict[int, str]] = {}
    for _ in range(2 * len(TASKS)):
        task, rank, failure = results.get()
        found.setdefault(task, {})[rank] = failure
    while not both.join():
        pass
    return found


@pytest.mark.parametrize("task", [task.__name__ for task in TASKS])
def test_in_two_processes(task: str, failures: dict[str, dict[int, str]]) -> None:
    assert failures[task] == {0: "", 1: ""}, "\n".join(failures[task].values())
