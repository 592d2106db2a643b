"""each_sample: a foreign solver that takes one sample at a time, over a batch and over processes."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import brentq, fsolve
from torch import Tensor

from backsolve import errors, implicit_function, inverse
from backsolve.solvers import each_sample


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def omega(x: Any, a: Any = 1.0) -> float:
    """The root of a y + exp(y) = x."""
    return brentq(lambda y: a * y + np.exp(y) - x, -100, 100, xtol=1e-15, rtol=1e-15)


def forward(y: Tensor, a: Tensor | float = 1.0) -> Tensor:
    return a * y + y.exp()


def system(x: Any, matrix: Any) -> Any:
    """The root of M y + y^3 = x."""
    return fsolve(lambda y: matrix @ y + y**3 - x, np.zeros_like(x), xtol=1e-12)


def system_forward(y: Tensor, matrix: Tensor) -> Tensor:
    return (matrix @ y[..., None])[..., 0] + y**3


def picky(x: Any) -> float:
    if x < 0:
        raise ValueError(f"cannot solve for {x}")
    return omega(x)


def deadly(x: Any) -> float:
    if x < 0:
        os._exit(1)
    return omega(x)


@pytest.fixture(scope="module")
def processes() -> Iterator[Executor]:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, mp_context=context) as executor:
        yield executor


@pytest.fixture
def threads() -> Iterator[Executor]:
    with ThreadPoolExecutor(2) as executor:
        yield executor


@pytest.fixture(params=["here", "threads", "processes"])
def executor(request: pytest.FixtureRequest) -> Executor | None:
    return None if request.param == "here" else request.getfixturevalue(request.param)


@pytest.mark.parametrize("shape", [(), (0,), (5,), (2, 1, 3)])
def test_elementwise(executor: Executor | None, shape: tuple[int, ...]) -> None:
    x = (torch.rand(shape, dtype=torch.float64) * 5 + 0.1).requires_grad_()
    a = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    y = inverse(forward, each_sample(omega, executor))(x, a)
    assert y.shape == shape
    torch.testing.assert_close(forward(y, a), x, rtol=1e-13, atol=0)
    slopes = torch.autograd.grad(y.sum(), (x, a))
    torch.testing.assert_close(slopes[0], 1 / (a + y.exp()), rtol=1e-12, atol=0)
    torch.testing.assert_close(slopes[1], (-y / (a + y.exp())).sum(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("chunk", [None, 1, 3, 100])
def test_chunks_come_back_in_order(processes: Executor, chunk: int | None) -> None:
    x = torch.linspace(0.1, 9, 20, dtype=torch.float64)
    y = inverse(forward, each_sample(omega, processes, chunk=chunk))(x)
    torch.testing.assert_close(forward(y), x, rtol=1e-13, atol=0)


def test_params_broadcast() -> None:
    x, a = torch.rand(3, 1, dtype=torch.float64) + 0.5, torch.rand(4, dtype=torch.float64) + 0.5
    y = inverse(forward, each_sample(omega))(x, a=a)
    assert y.shape == (3, 4)
    torch.testing.assert_close(forward(y, a), x.expand(3, 4), rtol=1e-13, atol=0)


@pytest.mark.parametrize("shared", [True, False])
def test_vectors_with_matrices(shared: bool) -> None:
    matrix = 3 * torch.eye(2, dtype=torch.float64) + torch.rand(*([] if shared else [4]), 2, 2, dtype=torch.float64)
    y = torch.randn(4, 2, dtype=torch.float64)
    x = system_forward(y, matrix)
    solved = inverse(system_forward, each_sample(system), event_dim=1)
    torch.testing.assert_close(solved(x, matrix), y, rtol=1e-10, atol=1e-10)


def test_event_dims_of_params_can_be_named() -> None:
    """A batch of as many events as a shared matrix has rows: only a name tells them apart."""
    matrix = 3 * torch.eye(2, dtype=torch.float64) + torch.rand(2, 2, dtype=torch.float64)
    y = torch.randn(2, 2, dtype=torch.float64)
    x = system_forward(y, matrix)
    for solver, params, named in (
        (each_sample(system, param_event_dims=(2,)), (matrix,), {}),
        (each_sample(system, param_event_dims={"matrix": 2}), (), {"matrix": matrix}),
    ):
        solved = inverse(system_forward, solver, event_dim=1)
        torch.testing.assert_close(solved(x, *params, **named), y, rtol=1e-10, atol=1e-10)


def test_implicit_function() -> None:
    x = double(1.0, 2.0, 3.0).requires_grad_()
    y = implicit_function(lambda y, x: forward(y) - x, each_sample(omega))(x)
    torch.testing.assert_close(forward(y), x, rtol=1e-13, atol=0)


def test_float32_and_integers_come_back_like_x() -> None:
    x = torch.tensor([1.0, 4.0])
    assert inverse(lambda y: y**2, each_sample(lambda x: round(float(np.sqrt(x)))))(x).dtype is torch.float32


# ------------------------------------------------------------------------------------------------ failures


def test_a_failing_sample(executor: Executor | None) -> None:
    x = torch.linspace(1, 2, 12, dtype=torch.float64).reshape(3, 4)
    x[1, 2] = -1.0
    message = (
        r"(?s)each_sample\(picky\).*1 of 12 samples failed, the first at index \(1, 2\).*Traceback.*cannot solve for -1"
    )
    with pytest.raises(errors.SampleError, match=message) as caught:
        inverse(forward, each_sample(picky, executor))(x)
    assert caught.value.y.isnan().nonzero().tolist() == [[1, 2]]
    x.requires_grad_()
    solution = inverse(forward, each_sample(picky, executor), on_failure="nan").solve(x)
    assert (~solution.converged).nonzero().tolist() == [[1, 2]]
    assert solution.y.isnan().nonzero().tolist() == [[1, 2]]
    good = solution.converged
    (slope,) = torch.autograd.grad(solution.y[good].sum(), x)
    torch.testing.assert_close(slope[good], 1 / (1 + solution.y[good].exp()), rtol=1e-12, atol=0)
    with pytest.warns(errors.BacksolveWarning, match=message):
        inverse(forward, each_sample(picky, executor), on_failure="warn")(x)


def test_a_worker_that_dies() -> None:
    x = torch.linspace(1, 2, 20, dtype=torch.float64)
    x[-1] = -1.0
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as executor:
        with pytest.raises(errors.SampleError, match=r"(?s)did not return: BrokenProcessPool") as caught:
            inverse(forward, each_sample(deadly, executor, chunk=1))(x)
        with pytest.raises(errors.SampleError, match=r"20 of 20 samples failed.*\n.*BrokenProcessPool"):
            inverse(forward, each_sample(deadly, executor))(x)  # the pool stays broken: every sample says so
    y = caught.value.y
    finished = ~y.isnan()
    assert not finished[-1]
    assert finished.sum() >= 10
    torch.testing.assert_close(forward(y[finished]), x[finished], rtol=1e-13, atol=0)


@pytest.mark.parametrize("result", [np.zeros(2), "text", None, 1j, [[1.0], [1.0, 2.0]]])
def test_what_cannot_be_y(result: Any) -> None:
    with pytest.raises(errors.SampleError, match=r"(?s)2 of 2 samples failed.*fn returned"):
        inverse(forward, each_sample(lambda _: result))(double(1.0, 2.0))


def test_what_cannot_be_sent(processes: Executor) -> None:
    with pytest.raises(errors.SampleError, match=r"(?s)did not return:.*[Pp]ickle"):
        inverse(forward, each_sample(lambda x: omega(x), processes))(double(1.0, 2.0))


@pytest.mark.parametrize(
    ("arguments", "name"),
    [({"fn": 3}, "fn"), ({"fn": omega, "executor": 2}, "executor"), ({"fn": omega, "chunk": 0}, "chunk")],
)
def test_settings(arguments: dict[str, Any], name: str) -> None:
    with pytest.raises(errors.ArgumentError, match=name):
        each_sample(**arguments)


# ------------------------------------------------------------------------------------------------ other packages


def test_progress(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tqdm", reason="tqdm is an extra")
    inverse(forward, each_sample(omega, progress=True))(double(1.0, 2.0, 3.0))
    assert "3/3" in capsys.readouterr().err


def test_progress_without_tqdm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tqdm.auto", None)
    with pytest.raises(ImportError, match=r"backsolve\[progress\]"):
        inverse(forward, each_sample(omega, progress=True))(double(1.0))


@pytest.mark.filterwarnings("ignore")  # of dask's own
def test_dask() -> None:
    distributed = pytest.importorskip("distributed", reason="dask is part of the test requirements")
    x = torch.linspace(0.1, 9, 20, dtype=torch.float64)
    x[3] = -1.0
    with (
        distributed.LocalCluster(n_workers=1, threads_per_worker=2, processes=False, dashboard_address=None) as cluster,
        distributed.Client(cluster) as client,
    ):
        solution = inverse(forward, each_sample(picky, client.get_executor()), on_failure="nan").solve(x)
    assert (~solution.converged).nonzero().tolist() == [[3]]
    good = solution.converged
    torch.testing.assert_close(forward(solution.y[good]), x[good], rtol=1e-13, atol=0)
