"""The page of the documents that says what happens to events that fail. `python -m tests.failures_page` writes it.

Each row is observed, not stated: one of three events fails, the two others must be right in everything.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.func import grad

from backsolve import BacksolveError, Inverse, MatrixFree, inverse
from backsolve.solvers import Bracket, FixedPoint, Newton, numpy_solver

PAGE = Path(__file__).parents[1] / "docs" / "failures.md"
POLICIES = ("raise", "warn", "nan", "ignore")
GOOD = [0, 2]  # the event between them fails
RTOL = 1e-10


@dataclass(frozen=True)
class Failure:
    """A way to fail: the inverse, x with the failing event in the middle, and the closed form for the others."""

    name: str
    make: Callable[..., Inverse]
    x: Tensor
    exact: Callable[[Tensor, Tensor], Tensor]


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def cube_root(x: Any, a: Any, m: Any = torch) -> Any:
    return m.sign(x) * (abs(x) / a) ** (1 / 3)


def mixed(y: Tensor, a: Tensor) -> Tensor:
    """y1 + y2 and y1 + y2^3 / 3, times a; J is singular at y2 = 1."""
    return a * torch.stack([y[..., 0] + y[..., 1], y[..., 0] + y[..., 1] ** 3 / 3], -1)


def mixed_solution(x: Any, a: Any) -> Any:
    """The largest root of y2^3 / 3 - y2 = x2 - x1, and y1 = x1 - y2. The double root is 1."""
    x = x / a
    y2 = np.array([np.roots([1 / 3, 0, -1, x1 - x2]).real.max() for x1, x2 in x.reshape(-1, 2)]).reshape(x.shape[:-1])
    y2 = np.where(abs(y2 - 1) < 1e-6, 1.0, y2)
    return np.stack([x[..., 0] - y2, y2], -1)


def mixed_exact(x: Tensor, a: Tensor) -> Tensor:
    """The same by Newton's method, unrolled, from the right side."""
    x1, x2 = (x / a).unbind(-1)
    y2 = torch.full_like(x1, 3.0)
    for _ in range(60):
        y2 = y2 - (y2**3 / 3 - y2 + x1 - x2) / (y2**2 - 1)
    return torch.stack([x1 - y2, y2], -1)


def _made(f: Any, g: Any, **options: Any) -> Callable[..., Inverse]:
    return lambda policy: inverse(f, g, on_failure=policy, **options)


def bounded(y: Tensor, a: Tensor) -> Tensor:
    return a * torch.tanh(y)


THREE = tensor(0.3, 5.0, -0.4)
PAIRS = torch.tensor([[0.0, 2.0], [0.0, -2 / 3], [1.0, 4.0]], dtype=torch.float64)
FAILURES = (
    Failure(
        "`f(g(x))` is not x",
        _made(lambda y, a: a * y**3, lambda x, a: cube_root(x, a) * torch.where(x == 5.0, 1.01, 1.0)),
        THREE, cube_root,
    ),
    Failure(
        "g returns NaN",
        _made(lambda y, a: a * y**3, lambda x, a: torch.where(x == 5.0, torch.nan, cube_root(x, a))),
        THREE, cube_root,
    ),
    Failure("`Bracket` finds no root", _made(bounded, Bracket(-9.0, 9.0)), THREE, lambda x, a: torch.atanh(x / a)),
    Failure("`Newton` does not converge", _made(bounded, Newton()), THREE, lambda x, a: torch.atanh(x / a)),
    Failure(
        "`FixedPoint` does not converge",
        _made(bounded, FixedPoint()), THREE, lambda x, a: torch.atanh(x / a),
    ),
    Failure(
        "J is singular: `f'(y) = 0`",
        _made(lambda y, a: a * y**3, numpy_solver(lambda x, a: cube_root(x, a, np))), tensor(0.3, 0.0, -0.4), cube_root,
    ),
    Failure("J is a singular matrix", _made(mixed, numpy_solver(mixed_solution), event_dim=1), PAIRS, mixed_exact),
    Failure(
        "`MatrixFree()` does not converge",
        _made(mixed, numpy_solver(mixed_solution), event_dim=1, jacobian=MatrixFree()), PAIRS, mixed_exact,
    ),
)  # fmt: skip


CONTEXTS: dict[str, Callable[[Inverse], Callable[..., Tensor]]] = {
    "eager": lambda inv: inv,
    "under `torch.func.vmap`": lambda inv: torch.func.vmap(inv, (0, None)),
    "inside `torch.compile`": lambda inv: torch.compile(lambda x, a: inv(x, a), backend="aot_eager", fullgraph=True),
}


@functools.cache
def observe(failure: Failure, policy: str, context: str) -> tuple[str, ...]:
    """What happens in the call, to y, to both derivatives by x and to the gradient of a param that all events share."""
    x, a = failure.x.clone().requires_grad_(), tensor(1.0)[0].requires_grad_()
    torch.compiler.reset()
    inv = failure.make(policy)  # alive until the backward pass, which a compiled function needs
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            y = CONTEXTS[context](inv)(x, a)
        except BacksolveError as error:
            return (f"raises {type(error).__name__}", "", "", "", "")
        in_call = "warns" if caught else ""
        weights = 1 + 0.1 * torch.arange(y.numel(), dtype=y.dtype).reshape(y.shape)
        try:
            by_x, by_a = torch.autograd.grad((weights * y).sum(), (x, a), create_graph=True)
            second = _second(failure, policy, context, weights, by_x, x)
        except BacksolveError as error:
            return (in_call, kind(y[1]), f"raises {type(error).__name__}", "", "")
        in_backward = "warns, " if len(caught) and not in_call else ""
    _others_are_right(failure, (y, by_x, second), weights)
    return (in_call, kind(y[1]), in_backward + kind(by_x[1]), kind(second[1]), kind(by_a))


def _second(failure: Failure, policy: str, context: str, weights: Tensor, by_x: Tensor, x: Tensor) -> Tensor:
    """The second derivative; of a compiled function torch takes one only inside of the graph."""
    if "compile" not in context:
        return torch.autograd.grad((weights * by_x).sum(), x)[0]
    inv, a = failure.make(policy), tensor(1.0)[0]

    def first(x: Tensor) -> Tensor:
        return grad(lambda x: (weights * inv(x, a)).sum())(x)

    second = grad(lambda x: (weights * first(x)).sum())
    return torch.compile(lambda x: second(x), backend="aot_eager", fullgraph=True)(x.detach())


def kind(t: Tensor) -> str:
    """The worst that is in a tensor."""
    return "NaN" if t.isnan().any() else "inf" if t.isinf().any() else "a number"


def _others_are_right(failure: Failure, found: tuple[Tensor, ...], weights: Tensor) -> None:
    x, a = failure.x[GOOD].clone().requires_grad_(), tensor(1.0)[0]
    y = failure.exact(x, a)
    (by_x,) = torch.autograd.grad((weights[GOOD] * y).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad((weights[GOOD] * by_x).sum(), x)
    for ours, exact in zip(found, (y, by_x, second), strict=True):
        torch.testing.assert_close(ours[GOOD].detach(), exact.detach(), rtol=RTOL, atol=RTOL)


def is_repeated(policy: str, context: str) -> bool:
    """Whether the tests make this observation again; to compile takes seconds, and the others differ in words only."""
    return "compile" not in context or policy in ("raise", "nan")


HEADINGS = ("what fails", "on_failure", "in the call", "y there", "by x there", "second by x", "by a shared param")


Observe = Callable[[Failure, str, str], tuple[str, ...]]


def table(context: str, look: Observe) -> str:
    """The table for one context."""
    rows = [
        (failure.name if policy == POLICIES[0] else "", f'"{policy}"', *look(failure, policy, context))
        for failure in FAILURES
        for policy in POLICIES
    ]
    return "\n".join("|" + "|".join(f" {cell} " for cell in cells) + "|" for cells in (HEADINGS, ["---"] * 7, *rows))


def written(failure: Failure, policy: str, context: str) -> tuple[str, ...]:
    """What the page says."""
    section = PAGE.read_text(encoding="utf-8").partition(_heading(context))[2].partition("\n## ")[0]
    rows = section.partition(f"| {failure.name} |")[2].partition(f'"{policy}" |')[2]
    return tuple(cell.strip() for cell in rows.partition("\n")[0].split("|")[:-1])


def _heading(context: str) -> str:
    return f"\n## {context[0].upper()}{context[1:]}\n"


TEXT = """# What happens to events that fail

`on_failure` is one policy for everything that can fail: an event is judged by itself, and what becomes of it does not
touch the others, in value or in any derivative. "raise" names the first failing event and says what to do; "warn" says
the same and goes on; "nan" turns the event to NaN; "ignore" says nothing.

The tables are made by the tests: of three events the one in the middle fails, and the two others are compared with a
closed form, value, first and second derivative. "A number" is what g found, or the derivative at that y, right for what
it is. A gradient of a param that all events share is a sum over events: one NaN in it is a NaN. To keep it, select the
good events before the call, for example by `inv.solve(x).converged`.
"""

NOTES = """
* A derivative that does not exist is infinite or NaN under "warn" and "ignore": nothing is put in its place, as a
  pseudo-inverse would.
* A compiled graph cannot raise in its backward pass, nor warn: there a singular J gives NaN under every policy but
  "ignore". `MatrixFree()`, and the default for many entries, solve in an operation, which can. The second derivatives
  there are those of `torch.func.grad` inside of the graph; torch refuses the double backward of a compiled function. Of
  these rows the tests repeat "raise" and "nan"; the others are as seen when this page was written.
* Under a transform an index begins with the mapped dimensions.
* `residual_tol=math.inf` switches the test of `f(g(x)) = x` off, not that of J.
* Errors that are not about an event are raised under every policy: arguments, shapes and dtypes, a wrong structure, an
  f that changes or that hides a part of its derivative from autograd.
"""


def page(look: Observe = observe) -> str:
    parts = [TEXT, *(f"{_heading(context)}\n{table(context, look)}\n" for context in CONTEXTS), NOTES]
    return "".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
