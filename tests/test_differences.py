"""The witness: an f whose values do not change as autograd says is refused, and no honest f is."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from backsolve import Diagonal, errors, inverse

SEEDS = 10
EPS = torch.finfo(torch.float64).eps


def gradient(f: Callable[[Tensor], Tensor], y: Tensor, create_graph: bool = False, **options: Any) -> Tensor:
    """The gradient at a known y."""
    with torch.no_grad():
        x = f(y)
    leaf = x.clone().requires_grad_()
    found = inverse(f, lambda _: y.clone(), **options)(leaf)
    return torch.autograd.grad(found.sum(), leaf, create_graph=create_graph)[0]


def gaussian(n: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


FALSE: dict[str, Callable[[Tensor], Tensor]] = {
    "all of a term": lambda y: y + y.detach() ** 3,
    "a coupling": lambda y: y + y.detach().mean() / 2,
    "a percent": lambda y: y + 0.01 * y.detach(),
    "a factor": lambda y: y * (1 + y.detach() ** 2),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [1, 2, 1000])
@pytest.mark.parametrize("f", FALSE.values(), ids=FALSE.keys())
def test_what_autograd_does_not_see_is_found(f: Callable[[Tensor], Tensor], n: int, dtype: torch.dtype) -> None:
    if f is FALSE["a percent"] and dtype is torch.float32:
        f = lambda y: y + 0.1 * y.detach()  # noqa: E731 (a quarter of the digits of float32 is two percent)
    for seed in range(SEEDS):
        with pytest.raises(errors.StructureError, match="J is not the derivative of the values of f"):
            gradient(f, gaussian(n, seed, dtype).abs() + 0.1)


def test_it_is_found_in_events_and_with_known_entries() -> None:
    mix = 2 * torch.eye(3, dtype=torch.float64) + 0.3
    y = gaussian(12, 0).reshape(4, 3)
    with pytest.raises(errors.StructureError, match="values of f"):
        gradient(lambda y: y @ mix + y.detach().sum(-1, keepdim=True), y, event_dim=1)
    opaque = Diagonal(entries=lambda y: 1 + 2 * y**2)
    with pytest.raises(errors.StructureError, match="values of f"):
        gradient(lambda y: y.detach() + y.detach() ** 3, y, jacobian=opaque)
    gradient(lambda y: y.detach() + y.detach() ** 3, y, jacobian=Diagonal(entries=lambda y: 1 + 3 * y**2))


def test_verify_off_trusts_it() -> None:
    torch.testing.assert_close(gradient(FALSE["a factor"], gaussian(3, 0), verify=False), 1 / (1 + gaussian(3, 0) ** 2))


HONEST: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[int, torch.dtype], Tensor]]] = {
    "sinh, far and wide": (torch.sinh, lambda s, d: 30 * gaussian(500, s, d)),
    "a kink": (lambda y: y + torch.relu(y), lambda s, d: gaussian(500, s, d)),
    "a kink at y": (lambda y: torch.where(y > 0, y, y / 2), lambda s, d: torch.zeros(4, dtype=d)),
    "many kinks": (lambda y: y + 0.1 * (50 * y).remainder(1.0), lambda s, d: gaussian(500, s, d)),
    "steps": (lambda y: y + (1e3 * y).floor() * 1e-5, lambda s, d: gaussian(500, s, d)),
    "rounded terms": (lambda y: (y + 300.0) - 300.0, lambda s, d: gaussian(500, s, d)),
    "float32 inside": (lambda y: y.float().sin().to(y) + y, lambda s, d: gaussian(500, s, d)),
    "noise": (lambda y: y + 1e-7 * torch.rand(y.shape, dtype=y.dtype), lambda s, d: gaussian(500, s, d)),
    "oscillations": (lambda y: y + 1e-3 * (900 * y).sin(), lambda s, d: gaussian(500, s, d)),
    "a steep step": (lambda y: y + (1e4 * y).tanh(), lambda s, d: gaussian(500, s, d)),
    "beside a turning point": (torch.sin, lambda s, d: math.pi / 2 - gaussian(50, s, d).abs() * 1e-4),
    "beside a pole": (torch.tan, lambda s, d: math.pi / 2 - 1e-3 * gaussian(50, s, d).abs() - 1e-3),
    "the end of a domain": (torch.log, lambda s, d: gaussian(500, s, d).abs() * 1e-30),
    "both ends of a domain": (torch.logit, lambda s, d: 1 - gaussian(50, s, d).abs().clamp(1e-3, 0.9) * 1e-3),
    "tails": (torch.special.ndtr, lambda s, d: -5 * gaussian(500, s, d).abs()),
    "zeros": (torch.sinh, lambda s, d: torch.zeros(4, dtype=d)),
    "mixed sizes": (lambda y: y**3 + y, lambda s, d: gaussian(500, s, d) * 10 ** (4 * gaussian(500, s + 1, d))),
}  # fmt: skip


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", HONEST)
def test_no_honest_f_is_refused(name: str, dtype: torch.dtype, create_graph: bool) -> None:
    f, points = HONEST[name]
    if create_graph and name == "noise":
        f = HONEST["steps"][0]  # with a graph of its own a derivative needs an f that repeats itself
    for seed in range(SEEDS):
        gradient(f, points(seed, dtype), create_graph, on_failure="ignore")


def test_what_oscillates_is_no_lie() -> None:
    """Large steps agree on the mean slope, 1; the derivative is that of the smallest, which only some of them see."""
    f, points = HONEST["oscillations"]
    for seed in range(4 * SEEDS):
        gradient(f, points(seed, torch.float32), on_failure="ignore")


def test_an_f_that_raises_outside_its_domain_is_not_refused() -> None:
    def f(y: Tensor) -> Tensor:
        if (y > 1).any():
            raise ValueError("outside")
        return y * 2

    gradient(f, torch.ones(3, dtype=torch.float64))


# ---- the derivative of J -------------------------------------------------------------------------------------------


class ForgetsY(torch.autograd.Function):
    """y + y^3, whose backward takes what it saved for constants: right once, without a second derivative."""

    @staticmethod
    def forward(y: Tensor) -> Tensor:
        return y + y**3

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return grads[0] * (1 + 3 * y.detach() ** 2)


class ForgetsBoth(torch.autograd.Function):
    """w y in the same manner: what is lost is the mixed derivative."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(y, w)
        return w * y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        y, w = (t.detach() for t in ctx.saved_tensors)
        return grads[0] * w, (grads[0] * y).sum()


Y = gaussian(4, 0).abs() + 0.1


def test_first_derivatives_of_a_forgetful_f_are_right() -> None:
    torch.testing.assert_close(gradient(ForgetsY.apply, Y), 1 / (1 + 3 * Y**2), rtol=8 * EPS, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_lost_second_derivative_is_found(dtype: torch.dtype) -> None:
    for seed in range(SEEDS):
        with pytest.raises(errors.StructureError, match="second derivatives of f"):
            gradient(ForgetsY.apply, gaussian(4, seed, dtype).abs() + 0.1, create_graph=True)


def test_it_is_found_by_what_needs_it_at_first_order() -> None:
    """The gradient of a log-determinant, of the Jacobian, and torch.func.grad twice."""
    inv = inverse(lambda y: ForgetsY.apply(y), lambda _: Y.clone())
    x = ForgetsY.apply(Y).requires_grad_()
    for ask in (lambda: inv.with_log_det(x)[1], lambda: inv.jacobian(x)):
        with pytest.raises(errors.StructureError, match="second derivatives of f"):
            ask()
    inv.with_log_det(x.detach())  # the value needs none
    with pytest.raises(errors.StructureError, match="second derivatives of f"):
        torch.func.grad(torch.func.grad(inverse(ForgetsY.apply, lambda _: Y[0].clone())))(x[0].detach())


@pytest.mark.parametrize("closed_over", [False, True])
def test_a_lost_mixed_derivative_is_found(closed_over: bool) -> None:
    w = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    x = (2 * Y).requires_grad_()
    if closed_over:
        y = inverse(lambda y: ForgetsBoth.apply(y, w), lambda x: x / 2)(x)
    else:
        y = inverse(lambda y, w: ForgetsBoth.apply(y, w), lambda x, w: x / w)(x, w)
    with pytest.raises(errors.StructureError, match="in all, along a random direction: 0 by autograd"):
        torch.autograd.grad(y.sum(), w, create_graph=True)


def test_known_entries_are_watched_in_the_place_of_j() -> None:
    """The entries are differentiated, so a detach in them is a lost second derivative."""
    with pytest.raises(errors.StructureError, match="second derivatives of f"):
        gradient(lambda y: y + y**3, Y, True, jacobian=Diagonal(entries=lambda y: 1 + 3 * y.detach() ** 2))
    gradient(lambda y: y.detach() + y.detach() ** 3, Y, True, jacobian=Diagonal(entries=lambda y: 1 + 3 * y**2))
