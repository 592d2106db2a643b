"""The gradient of the log-determinant of band matrices: the entries of A^-H within the bands, without the others."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from backsolve.linalg import BandLU, Factored, band_inverse, banded

EPS = torch.finfo(torch.float64).eps


def bands(seed: int, lower: int, upper: int, n: int, *batch: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*batch, lower + upper + 1, n, generator=generator, dtype=dtype)


def gradient(structure: BandLU, entries: Tensor) -> Tensor:
    leaf = entries.detach().requires_grad_()
    return torch.autograd.grad(Factored(structure, leaf).log_abs_det().sum(), leaf)[0]


def by_slogdet(structure: BandLU, entries: Tensor) -> Tensor:
    return torch.linalg.slogdet(structure.matrix(entries))[1]


def never(*_: object) -> Tensor:
    raise AssertionError("the columns of the identity were solved for")


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize(("lower", "upper"), [(1, 1), (2, 1), (1, 3), (4, 4), (0, 2), (1, 0), (0, 0)])
@pytest.mark.parametrize(("n", "batch"), [(127, ()), (128, (2,)), (257, (2, 2)), (300, ())])
def test_against_the_whole_inverse(
    lower: int, upper: int, dtype: torch.dtype, n: int, batch: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sizes on both sides of a power of two, so that all, some or none of a block is filled up."""
    monkeypatch.setattr(
        BandLU, "_log_det_gradient_by_columns", never if n > 127 else BandLU._log_det_gradient_by_columns
    )
    structure, entries = BandLU(lower, upper), bands(n, lower, upper, n, *batch, dtype=dtype)
    entries[..., upper, :] += 4 * (lower + upper) + 4
    found, whole = gradient(structure, entries), torch.linalg.inv(structure.matrix(entries)).mH
    torch.testing.assert_close(structure.matrix(found), structure.matrix(torch.ones_like(entries)) * whole)
    column = torch.arange(n)
    for d in range(lower + upper + 1):
        outside = (column - upper + d < 0) | (column - upper + d >= n)
        assert (found[..., d, outside] == 0).all()


def test_matrices_that_need_pivots() -> None:
    """Gaussian entries: blocks of the matrix are about as ill-conditioned as it is."""
    for seed in range(40):
        structure, entries = BandLU(1 + seed % 2, 1), bands(seed, 1 + seed % 2, 1, 200)
        a = structure.matrix(entries)
        whole = torch.linalg.inv(a)
        bound = 100 * EPS * torch.linalg.cond(a) * whole.abs().max()
        found = structure.matrix(gradient(structure, entries))
        assert ((found - structure.matrix(torch.ones_like(entries)) * whole.mH).abs() <= bound).all()


def test_singular_blocks_of_a_good_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    """A zero diagonal: every block of odd size is singular."""
    structure, entries = BandLU(1, 1), bands(0, 1, 1, 500)
    entries[1] = 0.0
    found, whole = structure.matrix(gradient(structure, entries)), torch.linalg.inv(structure.matrix(entries))
    size = torch.linalg.cond(structure.matrix(entries)) * whole.abs().max()
    assert ((found - structure.matrix(torch.ones_like(entries)) * whole.mH).abs() <= 100 * EPS * size).all()
    monkeypatch.setattr(BandLU, "_log_det_gradient_by_columns", never)
    with pytest.raises(AssertionError, match="were solved for"):
        gradient(structure, entries)


@pytest.mark.parametrize(
    "transform",
    [
        lambda h: torch.func.hessian(lambda e: h(e[0])),
        lambda h: torch.vmap(torch.func.grad(h)),
        lambda h: torch.func.jacfwd(lambda e: h(e).sum()),
        lambda h: lambda e: torch.func.jvp(torch.func.grad(lambda e: h(e).sum()), (e,), (e.cos(),))[1],
    ],
    ids=["hessian", "vmap(grad)", "jacfwd(sum)", "jvp(grad)"],
)
def test_transforms(transform: object, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (banded, band_inverse):
        monkeypatch.setattr(module, "SMALLEST", 4)
    structure, entries = BandLU(1, 2), bands(3, 1, 2, 20, 2)
    entries[:, 2] += 9
    found, expected = (
        transform(h)(entries)  # type: ignore[operator]
        for h in (lambda e: Factored(structure, e).log_abs_det(), lambda e: by_slogdet(structure, e))
    )
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)


def test_third_order() -> None:
    structure, entries = BandLU(1, 1), bands(5, 1, 1, 130)
    entries[1] += 5
    orders = []
    for h in (lambda e: Factored(structure, e).log_abs_det(), lambda e: by_slogdet(structure, e)):
        leaf = entries.clone().requires_grad_()
        value = h(leaf)
        for _ in range(3):
            (slope,) = torch.autograd.grad(value, leaf, create_graph=True)
            value = (slope * leaf.detach().sin()).sum()
        orders.append(slope)
    torch.testing.assert_close(*orders, rtol=1e-11, atol=1e-12)


def test_a_hundred_thousand_unknowns() -> None:
    """All of the inverse would take 80 GB. `(A^-1 A)_jj = 1` needs its bands only."""
    structure, entries = BandLU(1, 1), bands(0, 1, 1, 100_000)
    entries[1] += 6
    found = gradient(structure, entries)
    torch.testing.assert_close((entries * found).sum(0), torch.ones(100_000, dtype=torch.float64), rtol=1e-13, atol=0)
