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


def gradient(f: Callable[[Tensor], Tensor], y: Tensor, **options: Any) -> Tensor:
    """The gradient at a known y."""
    with torch.no_grad():
        x = f(y)
    leaf = x.clone().requires_grad_()
    inverse(f, lambda _: y.clone(), **options)(leaf).sum().backward()
    assert leaf.grad is not None
    return leaf.grad


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", HONEST)
def test_no_honest_f_is_refused(name: str, dtype: torch.dtype) -> None:
    f, points = HONEST[name]
    for seed in range(SEEDS):
        gradient(f, points(seed, dtype), on_failure="ignore")


def test_an_f_that_raises_outside_its_domain_is_not_refused() -> None:
    def f(y: Tensor) -> Tensor:
        if (y > 1).any():
            raise ValueError("outside")
        return y * 2

    gradient(f, torch.ones(3, dtype=torch.float64))
