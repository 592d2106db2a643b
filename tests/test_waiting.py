"""Numerical solvers as they run on a device: Python looks at values once in several steps, as each look waits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from backsolve import Dense, Diagonal, inverse
from backsolve.solvers import Bracket, FixedPoint, Newton, base, bracket, fixed_point, newton, secant

WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_linalg_check_errors")


class Waits(TorchDispatchMode):
    """Counts the operations whose result, or the shape of it, Python must know before it goes on."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket.__name__ in WAITS
        return func(*args, **(kwargs or {}))


@pytest.fixture
def on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU is treated as any other device."""
    device = torch.device("meta")
    for module in (bracket, secant, fixed_point, newton):
        monkeypatch.setattr(module, "may_look", lambda _, step: base.may_look(device, step))


def cubic(y: Tensor) -> Tensor:
    return y**3 / 50 + y


def mixing(y: Tensor) -> Tensor:
    return y + 0.5 * torch.tanh(y.flip(-1) + y.roll(1, -1))


CASES = [
    pytest.param(cubic, Bracket(), {}, id="Bracket"),
    pytest.param(cubic, Newton(30.0), {"jacobian": Diagonal()}, id="Newton, elementwise"),
    pytest.param(mixing, Newton(20.0), {"jacobian": Dense(), "event_dim": 1}, id="Newton, dense"),
    pytest.param(mixing, FixedPoint(), {"event_dim": 1}, id="FixedPoint"),
]
PREPARATION = 8  # evaluations: the shape of f, its ends, where to start


def shares_of_waits(f: Callable[[Tensor], Tensor], solver: Any, options: dict[str, Any]) -> float:
    """After how many of the evaluations of f Python waits before the next one."""
    waited: list[int] = []

    def watched(y: Tensor) -> Tensor:
        waited.append(waits.count)
        return f(y)

    y = torch.linspace(-9, 9, 60, dtype=torch.float64).reshape(10, 6)
    with torch.no_grad(), Waits() as waits:
        solution = inverse(watched, solver, residual_tol=float("inf"), **options)(f(y))
    torch.testing.assert_close(solution, y, rtol=1e-13, atol=1e-13)
    assert len(waited) >= PREPARATION + 6
    return (torch.tensor(waited[PREPARATION:]).diff() > 0).double().mean().item()


@pytest.mark.usefixtures("on_a_device")
@pytest.mark.parametrize(("f", "solver", "options"), CASES)
def test_one_look_in_several_steps(f: Callable[[Tensor], Tensor], solver: Any, options: dict[str, Any]) -> None:
    assert shares_of_waits(f, solver, options) <= 1 / 3


@pytest.mark.parametrize(("f", "solver", "options"), CASES)
def test_looks_are_counted(f: Callable[[Tensor], Tensor], solver: Any, options: dict[str, Any]) -> None:
    """On a CPU, where they cost nothing, there are more."""
    assert shares_of_waits(f, solver, options) > 1 / 3


@pytest.mark.usefixtures("on_a_device")
def test_a_line_search_without_looks() -> None:
    x = torch.tensor([-1.5, 0.3, 1.5, 1.55], dtype=torch.float64)
    y = inverse(torch.atan, Newton(lambda x: 10 * x))(x)  # full steps diverge from |y| > 1.39
    torch.testing.assert_close(y, x.tan(), rtol=1e-12, atol=0)


@pytest.mark.usefixtures("on_a_device")
def test_many_elements() -> None:
    x = torch.rand(2**17, dtype=torch.float64)
    y = inverse(torch.special.ndtr, Bracket())(x)
    torch.testing.assert_close(torch.special.ndtr(y), x, rtol=1e-14, atol=0)
