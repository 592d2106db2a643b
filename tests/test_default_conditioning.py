"""`jacobian=None` where J is ill-conditioned or singular: as right as the matrix, or its error, whatever v is."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor

from backsolve import Dense, Inverse, MatrixFree, errors, inverse
from backsolve.jacobians import Jacobian, MatrixFreeAt, matrix_free
from backsolve.linalg import gmres
from tests.test_krylov_choices import counted, product
from tests.test_matrix_free import random

EPS = {dtype: torch.finfo(dtype).eps for dtype in (torch.float32, torch.float64)}
BESIDE = 2  # roundings of |v| along the bad direction: less than any product sees


@cache
def factors(n: int, symmetric: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Those of a matrix close to the identity, `U diag(S) V`."""
    a = random(1, n, n) / n**0.5
    u, s, v = torch.linalg.svd(torch.eye(n, dtype=torch.float64) + 0.15 * ((a + a.mT) / 2**0.5 if symmetric else a))
    return u, s, v


def matrices(n: int, events: int, smallest: float, symmetric: bool = False) -> Tensor:
    """Matrices close to the identity, but for one singular value of one of them.

    If they are symmetric no product leads from other directions to the bad one.
    """
    u, s, v = factors(n, symmetric)
    bad = torch.cat([s[:-1], torch.tensor([smallest], dtype=torch.float64)])
    return torch.stack([(u * (bad if k == events // 2 else s)) @ v for k in range(events)])


def linear(a: Tensor, jacobian: Jacobian | None = None) -> tuple[Inverse, Tensor]:
    """The inverse of `y -> A y`, and an x."""
    y = random(2, *a.shape[:-1], dtype=a.dtype)
    return inverse(product(a), lambda _: y.clone(), event_dim=1, jacobian=jacobian, verify=False), product(a)(y)


def nearly_orthogonal(v: Tensor, to: Tensor, dtype: torch.dtype) -> Tensor:
    """v with hardly a component along a direction."""
    v = v - (v @ to)[:, None] * to
    return (v + BESIDE * EPS[dtype] * v.norm(dim=-1, keepdim=True) * to).to(dtype)


def exact(a: Tensor, b: Tensor) -> Tensor:
    """`A^-1 b`, by LU in float64 and residuals in 80 bits."""
    lu, wide, b = torch.linalg.lu_factor(a), a.numpy().astype(np.longdouble), b[..., None]
    u = torch.linalg.lu_solve(*lu, b).numpy().astype(np.longdouble)
    for _ in range(4):
        u = u + torch.linalg.lu_solve(*lu, torch.from_numpy((b.numpy() - wide @ u).astype(np.float64))).numpy()
    return torch.from_numpy(u.astype(np.float64))[..., 0]


def eager(inv: Inverse, x: Tensor, v: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    return torch.autograd.grad(inv(x), x, v)[0]


USES: dict[str, Callable[[Inverse, Tensor, Tensor], Tensor]] = {
    "eager": eager,
    "func.grad": lambda inv, x, v: torch.func.grad(lambda x: (inv(x) * v).sum())(x),
    "func.jvp": lambda inv, x, v: torch.func.jvp(inv, (x,), (v,))[1],
}


@pytest.mark.parametrize(
    ("hidden", "use"), [(True, "eager"), (True, "func.grad"), (True, "func.jvp"), (False, "eager")]
)
@pytest.mark.parametrize("smallest", [1e-2, 1e-4, 1e-6, 0.0])
@pytest.mark.parametrize(("n", "events"), [(64, 64), (128, 32), (512, 1)])
@pytest.mark.parametrize("dtype", EPS)
def test_as_right_as_the_matrix(
    dtype: torch.dtype, n: int, events: int, smallest: float, hidden: bool, use: str
) -> None:
    """With a v that has next to no part in the bad direction, and with any v."""
    a, b = matrices(n, events, smallest, symmetric=hidden).to(dtype), random(3, events, n).to(dtype)
    if hidden:
        b = nearly_orthogonal(b.double(), factors(n, True)[2][-1], dtype)
    run = lambda jacobian: USES[use](*linear(a, jacobian), b)  # noqa: E731
    if smallest < 10 * EPS[dtype]:
        for jacobian in (Dense(), None):
            with pytest.raises(errors.SingularJacobianError, match=rf"index \({events // 2},\)"):
                run(jacobian)
        return
    truth = exact((a if use == "func.jvp" else a.mT).double(), b.double())
    ours, by_matrix = (((run(j).double() - truth).norm(dim=-1) / truth.norm(dim=-1)).amax() for j in (None, Dense()))
    assert ours <= 10 * max(by_matrix, EPS[dtype])


def vjp_of_vjp(inv: Inverse, x: Tensor, v: Tensor, z: Tensor) -> Tensor:
    x, v = x.clone().requires_grad_(), v.clone().requires_grad_()
    (w,) = torch.autograd.grad(inv(x), x, v, create_graph=True)
    return torch.autograd.grad(w, v, z)[0]


def jvp_of_vjp(inv: Inverse, x: Tensor, v: Tensor, z: Tensor) -> Tensor:
    return torch.func.jvp(lambda v: torch.func.vjp(inv, x)[1](v)[0], (v,), (z,))[1]


@pytest.mark.parametrize("use", [vjp_of_vjp, jvp_of_vjp])
@pytest.mark.parametrize("smallest", [1e-3, 1e-4])  # conditions up to about 100 are believed
@pytest.mark.parametrize(("n", "events"), [(64, 64), (512, 1)])
@pytest.mark.parametrize("dtype", EPS)
def test_the_solves_of_derivatives_know_what_the_first_one_found(
    dtype: torch.dtype, n: int, events: int, smallest: float, use: Callable[..., Tensor]
) -> None:
    """What is differentiated once more has next to no part in the bad direction; the first solve shows it."""
    a, v = matrices(n, events, smallest, symmetric=True).to(dtype), random(3, events, n).to(dtype)
    z = nearly_orthogonal(random(4, events, n), factors(n, True)[2][-1], dtype)
    truth = exact(a.double(), z.double())
    ours, by_matrix = (
        ((use(*linear(a, j), v, z).double() - truth).norm(dim=-1) / truth.norm(dim=-1)).amax() for j in (None, Dense())
    )
    assert ours <= 10 * max(by_matrix, EPS[dtype])


@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize(("n", "events"), [(128, 32), (512, 1)])
def test_residuals_are_those_of_a_direct_solver(dtype: torch.dtype, n: int, events: int) -> None:
    """So between two probes, too, w solves `(J + E)^T w = v` with an E of a few roundings of J."""
    a = matrices(n, events, 1.0).to(dtype)
    inv, x = linear(a)
    for seed in range(3):
        v = random(seed, events, n, dtype=dtype)
        residual = (product(a.double().mT)(eager(inv, x, v).double()) - v).norm(dim=-1)
        assert (residual <= 9 * EPS[dtype] * v.norm(dim=-1)).all()


def test_when_j_is_probed(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the 1st, 2nd, 4th, ... and each 64th solve; and once more after each pause, where J was found wanting."""
    bad_at = 70
    good, bad = (matrices(64, 64, s, symmetric=True) for s in (1.0, 1e-6))
    y, v = random(2, 64, 64), nearly_orthogonal(random(3, 64, 64), factors(64, True)[2][-1], torch.float64)
    inv = inverse(lambda y, a: product(a)(y), lambda x, a: y.clone(), event_dim=1, verify=False)
    tried, probed = counted(monkeypatch, matrix_free, "richardson"), []
    for call in range(1, bad_at + 64 * 2 + 2):
        a = bad if call >= bad_at else good
        x, before = product(a)(y).requires_grad_(), len(tried)
        torch.autograd.grad(inv(x, a), x, v)
        probed += [call] * (len(tried) - before == 2)
    assert probed == [1, 2, 4, 8, 16, 32, 64, 128, 128 + 64 + 1]


@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize("smallest", [1e-1, 1e-2, 1e-3])
def test_the_condition_that_gmres_sees(dtype: torch.dtype, smallest: float) -> None:
    """Never too small; too large, at times, where residuals of the plain iteration begin the space."""
    a = matrices(64, 3, smallest).to(dtype)
    for seed in range(20):
        found = gmres(product(a), random(seed, 3, 64, dtype=dtype), rtol=EPS[dtype] ** 0.8, maxiter=200, restart=50)
        assert found.condition is not None
        assert 0.5 / smallest <= found.condition[1].item() <= 20 / smallest
        assert (found.condition[::2] <= 8).all()
        assert (found.condition >= 1).all()


def test_products_refuse_an_ill_conditioned_j_if_they_are_asked_to() -> None:
    a = torch.cat([matrices(40, 1, 1.0), matrices(40, 3, 1e-3)])
    believed, doubted, fallen, matrix = (
        linear(a, j)
        for j in (
            MatrixFree(),
            MatrixFree(max_condition=100),
            MatrixFree(max_condition=100, fallback=Dense()),
            Dense(),
        )
    )
    v = random(3, 4, 40)
    eager(*believed, v)
    with pytest.raises(errors.ConvergenceError, match=r"ill-conditioned(.|\n)*index \(2,\): a condition of \d"):
        eager(*doubted, v)
    eager(doubted[0], doubted[1], v * torch.tensor([1.0, 1.0, 0.0, 1.0], dtype=v.dtype)[:, None])  # nothing to solve
    ours, theirs = eager(*fallen, v), eager(*matrix, v)
    assert torch.equal(ours[2], theirs[2])
    assert not torch.equal(ours[1], theirs[1])
    for wrong in (1, 0.5, -3.0):
        with pytest.raises(errors.ArgumentError, match="max_condition"):
            MatrixFree(max_condition=wrong)


def test_the_condition_holds_for_the_solves_of_derivatives(monkeypatch: pytest.MonkeyPatch) -> None:
    """The options of the default go with every solve that follows from the first one."""
    seen: list[MatrixFree] = []
    run = MatrixFreeAt._run
    monkeypatch.setattr(MatrixFreeAt, "_run", lambda self, *args: (seen.append(self.options), run(self, *args))[1])
    inv, x = linear(matrices(64, 64, 1.0))
    v = random(3, 64, 64)
    torch.func.jvp(torch.func.grad(lambda x: (inv(x) ** 2 * v).sum()), (x,), (v,))
    assert len(seen) >= 3
    assert {options.max_condition for options in seen} == {64.0}
