"""The probe of declared structure: every coupling is found, and none is imagined."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from backsolve import Dense, Diagonal, errors, inverse

SEEDS = 400


def gradient(f: Callable[[Tensor], Tensor], y: Tensor, **options: object) -> Tensor:
    """The gradient of sum(g(x)) at x = f(y)."""
    x = f(y).detach().requires_grad_()
    return torch.autograd.grad(inverse(f, lambda x: y.clone(), residual_tol=float("inf"), **options)(x).sum(), x)[0]


def weakly_coupled(seed: int) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    return lambda y: y + 1e-6 * (w @ y), torch.randn(6, generator=generator, dtype=torch.float64)


def test_weak_coupling_is_found_at_every_seed() -> None:
    for seed in range(SEEDS):
        f, y = weakly_coupled(seed)
        with pytest.raises(errors.StructureError, match="f is not elementwise"):
            gradient(f, y)


def test_a_single_pair_is_found_wherever_it_is() -> None:
    """One element that reads one other: a single split into halves would miss half of such pairs."""
    for seed in range(100):
        i, j = np.random.default_rng(seed).choice(9, 2, replace=False)

        def f(y: Tensor, i: int = i, j: int = j) -> Tensor:
            return y + 1e-9 * torch.zeros(9, dtype=y.dtype).index_fill(0, torch.tensor(i), 1.0) * y[j]

        with pytest.raises(errors.StructureError, match=rf"element \({j},\) of y changes another element"):
            gradient(f, torch.ones(9, dtype=torch.float64))


COUPLED = {
    "mean": lambda y: y + y.mean(),
    "batch norm": lambda y: (y - y.mean(0)) / y.std(0) + y,
    "cumsum": lambda y: y.cumsum(0),
    "antisymmetric, J^T 1 = 1": lambda y: y + 0.3 * (y - y.flip(0)),
    "softmax": lambda y: y.softmax(0),
}


@pytest.mark.parametrize("f", COUPLED.values(), ids=COUPLED.keys())
def test_couplings_are_found(f: Callable[[Tensor], Tensor]) -> None:
    y = torch.randn(5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with pytest.raises(errors.StructureError) as caught:
        gradient(f, y)
    for part in ("f is not elementwise", "element (", "raise event_dim", "must find 0"):
        assert part in str(caught.value)


@pytest.mark.parametrize("f", [COUPLED["mean"], COUPLED["batch norm"]])
def test_coupled_batches_of_vectors_are_found(f: Callable[[Tensor], Tensor]) -> None:
    y = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with pytest.raises(errors.StructureError, match=r"f is not independent across the batch(.|\n)*event \(0,\) of y"):
        gradient(f, y, event_dim=1)


LARGE = {torch.float64: 1e8, torch.float32: 1e3}  # with 1e8 in float32 no digit of the sine would be left

INDEPENDENT = {
    "sinh": torch.sinh,
    "where": lambda y: torch.where(y > 0, y.exp(), y - 5),
    "cancelling terms": lambda y: (LARGE[y.dtype] * y + y.sin()) - LARGE[y.dtype] * y + 0.1 * y,
    "huge range": lambda y: (40 * y).sinh(),
    "several branches": lambda y: y * y.sin() + (y**2 + 1).log() * y.exp() - y.tanh() / (1 + y**2),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("f", INDEPENDENT.values(), ids=INDEPENDENT.keys())
def test_no_false_alarm_for_elementwise_functions(f: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    for seed in range(SEEDS):
        y = torch.randn(50, generator=torch.Generator().manual_seed(seed)).to(dtype)
        gradient(f, y, on_failure="ignore")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_false_alarm_for_independent_vectors(dtype: torch.dtype) -> None:
    for seed in range(SEEDS):
        generator = torch.Generator().manual_seed(seed)
        w, y = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((8, 8), (5, 8)))
        gradient(lambda y, w=w: y + torch.tanh(y @ w.T) * 1e3 - y.sum(-1, keepdim=True), y, event_dim=1)


def test_a_single_element_proves_nothing() -> None:
    """With one element mean-coupling is invisible; the mark must stay open for the next call."""
    inv = inverse(lambda y: y + y.mean(), lambda x: x - x.mean() / 2)
    one = torch.ones(1, dtype=torch.float64, requires_grad=True)
    torch.autograd.grad(inv(one).sum(), one)
    several = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    with pytest.raises(errors.StructureError):
        inv(several).sum().backward()


def test_each_kind_of_input_is_probed_at_the_1st_2nd_4th_and_8th_time() -> None:
    calls: list[int] = []

    class Counted(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, y: Tensor) -> Tensor:
            return 2 * y

        @staticmethod
        def backward(ctx: object, v: Tensor) -> Tensor:
            calls.append(1)
            return 2 * v

    inv = inverse(Counted.apply, lambda x: x / 2)

    def backward_passes(dtype: torch.dtype) -> int:
        calls.clear()
        x = torch.ones(3, dtype=dtype, requires_grad=True)
        inv(x).sum().backward()
        return len(calls)

    assert [backward_passes(torch.float64) for _ in range(9)] == [2, 2, 1, 2, 1, 1, 1, 2, 1]
    assert [backward_passes(torch.float32) for _ in range(3)] == [2, 2, 1]


def test_a_coupling_that_starts_at_zero_is_found_once_it_is_there() -> None:
    """The last layer of a flow: zero at first, trained away from it."""
    weight = torch.zeros(3, 3, dtype=torch.float64)
    inv = inverse(lambda y: y + y @ weight.T, lambda x: torch.linalg.solve(torch.eye(3, dtype=x.dtype) + weight, x))
    x = torch.ones(3, dtype=torch.float64, requires_grad=True)
    inv(x).sum().backward()
    weight += 0.1 * torch.ones(3, 3, dtype=torch.float64)
    with pytest.raises(errors.StructureError, match="f is not elementwise"):
        inv(x).sum().backward()


@pytest.mark.parametrize(("first", "then", "event_dim"), [((4, 1), (4, 3), 0), ((1, 2), (4, 2), 1)])
def test_a_dimension_of_size_one_proves_nothing_about_longer_ones(
    first: tuple[int, ...], then: tuple[int, ...], event_dim: int
) -> None:
    axis = -1 if event_dim == 0 else 0
    inv = inverse(
        lambda y: y + 0.5 * y.mean(axis, keepdim=True),
        lambda x: x - x.mean(axis, keepdim=True) / 3,
        event_dim=event_dim,
    )
    for shape, expectation in ((first, None), (first, None), (first, None), (then, errors.StructureError)):
        x = torch.rand(shape, dtype=torch.float64, requires_grad=True)
        if expectation is None:
            inv(x).sum().backward()
        else:
            with pytest.raises(expectation):
                inv(x).sum().backward()


def test_verify_off_trusts_the_claim() -> None:
    gradient(COUPLED["mean"], torch.ones(3, dtype=torch.float64), verify=False)


def test_the_global_random_state_does_not_change() -> None:
    state = torch.get_rng_state()
    gradient(torch.sinh, torch.ones(3, dtype=torch.float64))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    "jacobian", [Diagonal(entries=torch.sin), Diagonal(entries=lambda y: torch.cos(y) * (1 + 1e-6))]
)
def test_wrong_entries_are_found(jacobian: Diagonal) -> None:
    with pytest.raises(errors.StructureError, match="known entries of J are not the derivative of f"):
        gradient(torch.sin, torch.tensor([0.2, 0.4], dtype=torch.float64), jacobian=jacobian)


def test_wrong_dense_entries_are_found() -> None:
    a = torch.tensor([[2.0, 1.0], [0.0, 3.0]], dtype=torch.float64)
    forgot_to_transpose = Dense(entries=lambda y: a.T.expand(*y.shape[:-1], 2, 2))
    with pytest.raises(errors.StructureError, match="known entries"):
        gradient(lambda y: y @ a.T, torch.ones(1, 2, dtype=torch.float64), event_dim=1, jacobian=forgot_to_transpose)


def test_entries_of_the_wrong_shape_are_refused() -> None:
    with pytest.raises(errors.ForwardOutputError, match=r"entries(.|\n)*shape \(3,\)"):
        gradient(torch.sin, torch.ones(3, dtype=torch.float64), jacobian=Diagonal(entries=lambda y: y.sum()))


def test_f_that_does_not_depend_on_y() -> None:
    x = torch.ones(3, dtype=torch.float64, requires_grad=True)
    for f in (lambda y: torch.ones_like(y), lambda y: y.detach() * 1, lambda y: torch.ones_like(y) * x):
        with pytest.raises(errors.StructureError, match=r"f\(y\) does not depend on y"):
            inverse(f, lambda x: x.clone())(x)
