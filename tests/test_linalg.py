"""The structured solve and log-determinant through every transform of torch, against `inv(A) @ b`.

The oracle is written in operations whose rules are right in torch 2.13: `torch.linalg.solve` itself is not.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from backsolve.linalg import LU, BandLU, Cholesky, Factored, Structure, Substitution, band_lu, concretely

EPS = torch.finfo(torch.float64).eps
N = 4

STRUCTURES: dict[str, Structure] = {
    "LU": LU(),
    "Cholesky": Cholesky(),
    "lower triangle": Substitution(),
    "upper triangle": Substitution(upper=True),
    "bands (1, 1)": BandLU(1, 1),
    "bands (2, 1)": BandLU(2, 1),
}
each_structure = pytest.mark.parametrize("structure", STRUCTURES.values(), ids=STRUCTURES.keys())
each_direction = pytest.mark.parametrize("adjoint", [False, True], ids=["A", "A^H"])


def sample(*batch: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """Full matrices, clearly not symmetric, with a condition number of a few; a structure takes its entries of them."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(*batch, N, N, generator=generator, dtype=dtype)
    return 2 * torch.eye(N, dtype=dtype) + 0.3 * noise


def vector(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def entries_of(structure: Structure, a: Tensor) -> Tensor:
    """`outer` with the columns of A: `sum_k a_k e_k^H` is A, and `outer` keeps the entries of the structure."""
    return structure.outer(a, torch.eye(N, dtype=a.dtype).expand_as(a)).contiguous()


def admissible(structure: Structure, entries: Tensor) -> Tensor:
    return (entries + entries.mH) / 2 if isinstance(structure, Cholesky) else entries


def functions(structure: Structure, adjoint: bool) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """A scalar function of entries and b that uses a solve and the log-determinant; and the same by `inv`."""

    def ours(entries: Tensor, b: Tensor) -> Tensor:
        a = Factored(structure, admissible(structure, entries))
        u = a.solve(b[..., None], adjoint=adjoint)[..., 0]
        return (u.sin() * b).sum(-1) + a.log_abs_det() * u[..., 0]

    def reference(entries: Tensor, b: Tensor) -> Tensor:
        a = structure.matrix(admissible(structure, entries))
        inverse = torch.linalg.inv(a)
        u = ((inverse.mH if adjoint else inverse) @ b[..., None])[..., 0]
        return (u.sin() * b).sum(-1) + log_abs_det(a) * u[..., 0]

    return ours, reference


def log_abs_det(a: Tensor) -> Tensor:
    """By Leibniz's sum over permutations: torch.linalg.det, too, is wrong under nested forward mode."""
    terms = []
    for permutation in itertools.permutations(range(N)):
        inversions = sum(p > q for p, q in itertools.combinations(permutation, 2))
        terms.append((-1) ** inversions * a[..., range(N), permutation].prod(-1))
    return torch.stack(terms).sum(0).abs().log()


def flat(results: object) -> Tensor:
    return torch.cat([t.flatten() for t in torch.utils._pytree.tree_leaves(results)])


def assert_same(transform: Callable[[Callable[..., Tensor]], object], ours: object, reference: object) -> None:
    actual, expected = flat(transform(ours)), flat(transform(reference))
    assert expected.abs().max() > 1e-3  # the oracle is no zero
    assert (actual - expected).abs().max() <= 1e-10 * expected.abs().max()


BOTH = (0, 1)
SINGLE: dict[str, Callable[..., object]] = {
    "grad": lambda h, e, b, te, tb: grad(h, BOTH)(e, b),
    "vjp": lambda h, e, b, te, tb: vjp(h, e, b)[1](torch.ones((), dtype=e.dtype)),
    "jvp": lambda h, e, b, te, tb: jvp(h, (e, b), (te, tb)),
    "jvp b": lambda h, e, b, te, tb: jvp(lambda b: h(e, b), (b,), (tb,)),
    "jacrev": lambda h, e, b, te, tb: jacrev(h, BOTH)(e, b),
    "jacfwd": lambda h, e, b, te, tb: jacfwd(h, BOTH)(e, b),
    "hessian": lambda h, e, b, te, tb: hessian(h, BOTH)(e, b),
    "jacfwd(jacrev)": lambda h, e, b, te, tb: jacfwd(jacrev(h, BOTH), BOTH)(e, b),
    "jacrev(jacfwd)": lambda h, e, b, te, tb: jacrev(jacfwd(h, BOTH), BOTH)(e, b),
    "jacrev(jacrev)": lambda h, e, b, te, tb: jacrev(jacrev(h, BOTH), BOTH)(e, b),
    "jacfwd(jacfwd)": lambda h, e, b, te, tb: jacfwd(jacfwd(h, BOTH), BOTH)(e, b),
    "jvp(jvp)": lambda h, e, b, te, tb: jvp(lambda e, b: jvp(h, (e, b), (te, tb))[1], (e, b), (tb * te, tb)),
    "jvp(grad)": lambda h, e, b, te, tb: jvp(grad(h, BOTH), (e, b), (te, tb)),
    "grad^3": lambda h, e, b, te, tb: grad(
        lambda b: (grad(lambda b: (grad(h, 1)(e, b) * tb).sum())(b) * tb).sum()
    )(b),
}  # fmt: skip
MAPPED: dict[str, Callable[..., object]] = {
    "vmap": lambda h, e, b: vmap(h)(e, b),
    "vmap, other dimensions": lambda h, e, b: vmap(h, in_dims=(1, 1))(e.movedim(0, 1), b.movedim(0, 1)),
    "vmap b": lambda h, e, b: vmap(h, in_dims=(None, 0))(e[0], b),
    "vmap A": lambda h, e, b: vmap(h, in_dims=(0, None))(e, b[0]),
    "vmap(vmap)": lambda h, e, b: vmap(vmap(h, (None, 0)), (0, None))(e, b),
    "vmap(vmap), shared A": lambda h, e, b: vmap(vmap(h, (None, 0)), (0, 0))(e, b.expand(3, 3, N)),
    "vmap(grad)": lambda h, e, b: vmap(grad(h, BOTH))(e, b),
    "vmap(grad) A": lambda h, e, b: vmap(grad(h, BOTH), (0, None))(e, b[0]),
    "vmap(hessian)": lambda h, e, b: vmap(hessian(h, BOTH))(e, b),
    "vmap(jacfwd)": lambda h, e, b: vmap(jacfwd(h, BOTH))(e, b),
    "vmap(jacfwd(jacfwd))": lambda h, e, b: vmap(jacfwd(jacfwd(h, BOTH), BOTH))(e, b),
    "jvp(vmap(grad))": lambda h, e, b: jvp(vmap(grad(h, BOTH)), (e, b), (e.sin(), b.cos())),
    "jacfwd(vmap)": lambda h, e, b: jacfwd(vmap(h), BOTH)(e, b),
    "jacrev(vmap)": lambda h, e, b: jacrev(vmap(h), BOTH)(e, b),
    "grad(vmap) A": lambda h, e, b: grad(lambda e: vmap(h, (None, 0))(e, b).sum())(e[0]),
}  # fmt: skip


@each_structure
@each_direction
@pytest.mark.parametrize("transform", SINGLE.values(), ids=SINGLE.keys())
def test_transforms(structure: Structure, adjoint: bool, transform: Callable[..., object]) -> None:
    e, te = (entries_of(structure, sample(seed=s)) for s in (0, 2))
    b, tb = vector(N), vector(N, seed=3)
    assert_same(lambda h: transform(h, e, b, te, tb), *functions(structure, adjoint))


@each_structure
@each_direction
@pytest.mark.parametrize("transform", MAPPED.values(), ids=MAPPED.keys())
def test_mapped_transforms(structure: Structure, adjoint: bool, transform: Callable[..., object]) -> None:
    e, b = entries_of(structure, sample(3)), vector(3, N)
    assert_same(lambda h: transform(h, e, b), *functions(structure, adjoint))


@each_structure
@each_direction
@pytest.mark.parametrize("batch", [(), (2,)])
def test_eager_orders_0_to_3(structure: Structure, adjoint: bool, batch: tuple[int, ...]) -> None:
    leaves = (entries_of(structure, sample(*batch)).requires_grad_(), vector(*batch, N).requires_grad_())

    def orders(h: Callable[..., Tensor]) -> list[Tensor]:
        found = [h(*leaves)]
        for order in range(3):
            mix = vector(found[-1].numel(), seed=order).reshape(found[-1].shape)
            grads = torch.autograd.grad((found[-1] * mix).sum(), leaves, create_graph=True)
            found.append(flat(grads))
        return found

    for actual, expected in zip(*(orders(h) for h in functions(structure, adjoint)), strict=True):
        assert (actual - expected).abs().max() <= 1e-10 * expected.abs().max()


@each_structure
@each_direction
def test_eager_forward_mode_and_batched_cotangents(structure: Structure, adjoint: bool) -> None:
    e, b, t = entries_of(structure, sample(2)), vector(2, N), vector(2, N, seed=5)

    def forward(h: Callable[..., Tensor]) -> Tensor:
        with forward_ad.dual_level():
            tangent = forward_ad.unpack_dual(h(forward_ad.make_dual(e, e.cos()), forward_ad.make_dual(b, t))).tangent
            assert tangent is not None
            return tangent

    def reverse(h: Callable[..., Tensor]) -> list[Tensor]:
        leaves = e.clone().requires_grad_(), b.clone().requires_grad_()
        return list(torch.autograd.grad(h(*leaves), leaves, torch.eye(2, dtype=b.dtype), is_grads_batched=True))

    assert_same(forward, *functions(structure, adjoint))
    assert_same(reverse, *functions(structure, adjoint))


@each_structure
@each_direction
def test_complex_matrices(structure: Structure, adjoint: bool) -> None:
    """A real function of complex entries: torch's convention for its gradient, by the same formulas."""
    e, b = entries_of(structure, sample(2, dtype=torch.complex128)), vector(2, N, dtype=torch.complex128)
    ours, reference = (lambda e, b, h=h: h(e, b).abs().sum() for h in functions(structure, adjoint))
    for transform in (
        lambda h: grad(h, BOTH)(e, b),
        lambda h: jvp(grad(h, BOTH), (e, b), (e.sin(), b.cos()))[1],
        lambda h: torch.autograd.grad(h(*(leaves := (e.clone().requires_grad_(), b.clone().requires_grad_()))), leaves),
    ):
        actual, expected = flat(transform(ours)), flat(transform(reference))
        assert (actual - expected).abs().max() <= 1e-10 * expected.abs().max()


@each_structure
def test_compiled_code_is_made_of_plain_operations(structure: Structure) -> None:
    ours, reference = functions(structure, False)
    e, b = entries_of(structure, sample(3)), vector(3, N)
    transform = vmap(grad(ours, BOTH))
    compiled = torch.compile(lambda e, b: transform(e, b), backend="aot_eager", fullgraph=True)
    assert_same(lambda h: compiled(e, b) if h is ours else vmap(grad(h, BOTH))(e, b), ours, reference)


@each_structure
def test_right_hand_sides_of_one_matrix_share_a_factorisation_and_a_solve(structure: Structure) -> None:
    seen: list[torch.Size] = []

    class Counting(type(structure)):
        def factor(self, entries: Tensor) -> tuple[Tensor, ...]:
            seen.append(entries.shape)
            return super().factor(entries)

        def solve(self, factors: tuple[Tensor, ...], b: Tensor, adjoint: bool) -> Tensor:
            seen.append(b.shape)
            return super().solve(factors, b, adjoint)

    counting = Counting(**vars(structure))
    e, b = admissible(structure, entries_of(structure, sample())), vector(5, 3, N)
    u = vmap(vmap(lambda b: Factored(counting, e).solve(b[:, None])[:, 0]))(b)
    assert seen == [e.shape, torch.Size([N, 15])]
    expected = torch.linalg.solve(structure.matrix(e), b.reshape(15, N).mT).mT.reshape(5, 3, N)
    torch.testing.assert_close(u, expected, rtol=1e-12, atol=1e-12)


@each_structure
def test_singular_matrices_are_found_under_vmap(structure: Structure) -> None:
    a = sample(2, 3)
    a[1, 2, 0] = a[1, 2, :, 0] = 0.0
    e = entries_of(structure, a)
    expected = torch.zeros(2, 3, dtype=torch.bool)
    expected[1, 2] = True

    def singular(e: Tensor) -> tuple[Tensor]:
        found = Factored(structure, e).singular()
        return (torch.zeros(e.shape[:-2], dtype=torch.bool) if found is None else found,)

    def mask(e: Tensor) -> Tensor:
        return concretely(singular, e)[0]

    assert torch.equal(vmap(vmap(mask))(e), expected)
    assert torch.equal(vmap(mask, in_dims=1, out_dims=1)(e), expected)
    assert torch.equal(mask(e), expected)
    assert torch.equal(Factored(structure, e).singular(), expected)
    assert Factored(structure, e[0]).singular() is None
    assert not vmap(mask)(e[0]).any()


@each_structure
def test_the_gradient_of_a_solve_with_known_entries_only(structure: Structure) -> None:
    """Wanted gradients only: neither leaf may be missed when the other one needs none."""
    e, b = entries_of(structure, sample()), vector(N)
    for wants in ((True, False), (False, True)):
        ours, reference = functions(structure, False)
        results = []
        for h in (ours, reference):
            leaves = [t.clone().requires_grad_(w) for t, w in zip((e, b), wants, strict=True)]
            results.append(torch.autograd.grad(h(*leaves), [t for t in leaves if t.requires_grad])[0])
        torch.testing.assert_close(results[0], results[1], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex128])
@pytest.mark.parametrize(("lower", "upper"), [(0, 0), (1, 1), (2, 0), (0, 3), (2, 1), (1, 3), (4, 4)])
@pytest.mark.parametrize("scipy", [True, False], ids=["LAPACK", "torch"])
def test_band_matrices_that_need_pivots(
    lower: int, upper: int, dtype: torch.dtype, scipy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gaussian entries: the largest of a column is as likely below the diagonal as on it."""
    if not scipy:
        monkeypatch.setattr(band_lu, "_lapack", lambda: None)
    structure = BandLU(lower, upper)
    for n in (1, 2, 3, 12):
        for batch in ((), (3,), (2, 2)):
            e, b = vector(*batch, lower + upper + 1, n, dtype=dtype), vector(*batch, n, 2, dtype=dtype)
            a = structure.matrix(e)
            factored = Factored(structure, e)
            for adjoint, matrix in ((False, a), (True, a.mH)):
                u = factored.solve(b, adjoint=adjoint)
                size = torch.linalg.matrix_norm(matrix)[..., None, None] * u.abs().amax((-2, -1), keepdim=True)
                assert ((matrix @ u - b).abs() <= 64 * torch.finfo(dtype).eps * size).all()  # backward stable
                once = Factored(structure, e).solve(b[..., :1], adjoint=adjoint)  # may have a way of its own
                assert ((matrix @ once - b[..., :1]).abs() <= 64 * torch.finfo(dtype).eps * size).all()
                assert torch.equal(structure.matrix(e), a)
                torch.testing.assert_close(structure.times(e, b, adjoint), matrix @ b)
            if dtype != torch.float32:  # ill-conditioned ones have no digits of a pivot left there
                torch.testing.assert_close(factored.log_abs_det(), torch.linalg.slogdet(a)[1], rtol=1e-9, atol=1e-9)


def test_events_side_by_side_do_not_mix() -> None:
    """LAPACK gets all events as one band matrix: NaN, zero pivots and overflow must stay where they are."""
    structure = BandLU(1, 1)
    e, b = vector(4, 3, 5), vector(4, 5, 1)
    good = Factored(structure, e).solve(b)
    spoiled = b.clone()
    spoiled[1, 3] = torch.nan
    found = Factored(structure, e).solve(spoiled)
    assert found.isnan().any(1).flatten().tolist() == [False, True, False, False]
    assert torch.equal(found[[0, 2, 3]], good[[0, 2, 3]])
    e[1, 1, 2] = torch.nan
    e[2] = 0.0
    b[0, 3] = torch.nan
    found = Factored(structure, e).solve(b)
    assert torch.equal(found[3], good[3])
    assert found[:3].isnan().any(1).all()
