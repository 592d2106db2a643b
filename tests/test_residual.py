"""The residual test: what passes, what is refused, and what the message says."""

import math
import warnings
from typing import Any

import numpy as np
import pytest
import scipy.special
import torch
from torch import Tensor

from backsolve import Dense, Diagonal, MatrixFree, errors, implicit_function, inverse
from backsolve._nearby import _not_between
from backsolve._solution import Tolerance, check_residual
from backsolve.jacobians import Jacobian
from backsolve.solvers import numpy_solver

EPS = torch.finfo(torch.float64).eps


def tensor(*values: float, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(values, dtype=dtype)


def test_wrong_y_is_refused_with_numbers_index_and_remedy() -> None:
    wrong = inverse(torch.sin, lambda x: torch.asin(x) + torch.tensor([0.0, 0.0, 0.7], dtype=x.dtype))
    with pytest.raises(errors.ResidualError) as caught:
        wrong(tensor(0.1, 0.5, 0.6))
    text = str(caught.value)
    assert text.startswith("inverse(sin, <lambda>): f(g(x)) is not x.")
    for part in (
        "1 of 3 elements",
        "index (2,)",
        "x = 0.6",
        "y = g(x) = 1.3435",
        "f(y) = 0.974",
        "remedy:",
        "check that",
    ):
        assert part in text


@pytest.mark.parametrize("factor", [1 + 1e-6, 1 - 1e-6])
def test_one_wrong_element_among_many(factor: float) -> None:
    x = torch.linspace(0.1, 0.9, 100_000, dtype=torch.float64)
    y = torch.asin(x)
    y[777] *= factor
    with pytest.raises(errors.ResidualError, match=r"1 of 100000 elements differ, the first at index \(777,\)"):
        inverse(torch.sin, lambda _: y)(x)


def test_x_equal_to_zero() -> None:
    """cos(pi/2) is 6e-17, not 0: no relative test can pass, a Newton step can."""
    arccos = inverse(torch.cos, torch.acos)
    assert arccos(tensor(0.0)).item() == math.pi / 2
    with pytest.raises(errors.ResidualError):
        inverse(torch.cos, lambda x: torch.acos(x) + 1e-6)(tensor(0.0))


def test_conditions_of_a_large_scale() -> None:
    """c = 1e6 (y^2 - p): rounding leaves a residual of 1e-10 where the target is 0."""
    p = torch.linspace(1.1, 2.9, 50, dtype=torch.float64)
    root = implicit_function(lambda y, p: 1e6 * (y**2 - p), torch.sqrt)
    residual = root.solve(p).residual
    assert residual.max() > 1e-11, "the case must be one that a test without scale would refuse"
    root(p)
    with pytest.raises(errors.ResidualError):
        implicit_function(lambda y, p: 1e6 * (y**2 - p), lambda p: p.sqrt() + 1e-6)(p)


def test_wright_omega_near_zero() -> None:
    """omega + log(omega) = x cancels near x = 0, and needs a relative test where omega is tiny."""
    omega = inverse(lambda y: y + torch.log(y), scipy.special.wrightomega)
    x = tensor(-700.0, -30.0, -1e-9, 0.0, 1e-17, 1e-9, 2.0).requires_grad_()
    y = omega(x)
    y.sum().backward()
    torch.testing.assert_close(x.grad, y.detach() / (1 + y.detach()), rtol=8 * EPS, atol=0)
    with pytest.raises(errors.ResidualError):
        inverse(lambda y: y + torch.log(y), numpy_solver(lambda x: scipy.special.wrightomega(x) * (1 + 1e-5)))(x)


def test_a_wrong_y_at_a_tiny_probability() -> None:
    """p = 1e-300: y must be right relatively, although any tiny y passes an absolute test."""
    quantile = inverse(lambda y: y**3, lambda p: p ** (1 / 3))
    quantile(tensor(1e-300))
    with pytest.raises(errors.ResidualError):
        inverse(lambda y: y**3, lambda p: 2 * p ** (1 / 3))(tensor(1e-300))
    with pytest.raises(errors.ResidualError):
        inverse(lambda y: y, lambda p: 0.9 * p)(tensor(1e-300))


def test_float32_passes_at_its_own_precision() -> None:
    x = torch.linspace(-0.99, 0.99, 999)
    inverse(torch.sin, np.arcsin)(x)
    with pytest.raises(errors.ResidualError):
        inverse(torch.sin, lambda x: torch.asin(x) * (1 + 1e-2))(x)
    with pytest.raises(errors.ResidualError):  # seven digits would do in float32, not in float64
        inverse(torch.sin, lambda x: torch.asin(x.float()).double())(x.double())


@pytest.mark.parametrize(("turn", "name"), [(2 * math.pi, "2 pi"), (360.0, "360")])
def test_the_message_mentions_a_period(turn: float, name: str) -> None:
    """Kepler's equation whose solver wraps the mean anomaly."""
    kepler = inverse(lambda y: y, lambda x: torch.remainder(x, turn))
    with pytest.raises(errors.ResidualError, match=f"whole multiples of {name}: f\\(y\\) and x agree up to a period"):
        kepler(tensor(1.0, 1.5 * turn, -7.25 * turn))


def test_the_message_mentions_a_period_after_refinement_too() -> None:
    def f(y: Tensor) -> Tensor:
        return y - 0.5 * torch.sin(y)

    def wrapped(x: Tensor) -> Tensor:
        y = torch.remainder(x, 2 * math.pi)
        turn = x - y
        for _ in range(60):
            y = y - (f(y) + turn - x) / (1 - 0.5 * torch.cos(y))
        return y

    with pytest.raises(errors.ResidualError, match="whole multiples of 2 pi"):
        inverse(f, wrapped, refine=1)(tensor(1.0, 70.0))


def test_a_sloppy_solver_is_told_to_refine() -> None:
    def sloppy(x: Tensor) -> Tensor:
        return torch.asin(x) + 1e-4

    x = tensor(0.1, 0.5).requires_grad_()
    with pytest.raises(errors.ResidualError, match="refine=5"):
        inverse(torch.sin, sloppy)(x)
    y = inverse(torch.sin, sloppy, refine=5)(x)
    torch.testing.assert_close(y, torch.asin(x), rtol=4 * EPS, atol=0)
    torch.testing.assert_close(*(torch.autograd.grad(t.sum(), x)[0] for t in (y, torch.asin(x))), rtol=8 * EPS, atol=0)


def test_refine_never_makes_a_float32_y_worse() -> None:
    torch.manual_seed(0)
    x = 1.98 * torch.rand(10_000) - 0.99
    rounded = inverse(torch.sin, lambda x: torch.asin(x.double()).float(), refine=3)
    plain = inverse(torch.sin, lambda x: torch.asin(x.double()).float())
    residuals = [(inv.solve(x)).residual for inv in (rounded, plain)]
    assert (residuals[0] <= residuals[1]).all()


def test_refine_keeps_a_step_only_where_it_helps() -> None:
    """From y = 1.39 Newton for arctan converges, from 3.0 it runs away: there y must stay as it was."""
    start = tensor(1.0, 3.0)
    inv = inverse(torch.atan, lambda x: start.clone(), refine=1, on_failure="ignore")
    y = inv(tensor(0.0, 0.0))
    assert abs(y[0]) < 1
    assert y[1] == 3.0


@pytest.mark.parametrize("tol", [1e-3, (1e-3, 0.0)])
def test_tolerance_can_be_relaxed_and_tightened(tol: Any) -> None:
    sloppy = inverse(torch.sin, lambda x: torch.asin(x) * (1 + 1e-5), residual_tol=tol)
    sloppy(tensor(0.1, 0.5))
    with pytest.raises(errors.ResidualError):
        inverse(torch.sin, lambda x: torch.asin(x) * (1 + 1e-10), residual_tol=(1e-12, 0.0))(tensor(0.5))


def test_infinite_tolerance_does_not_evaluate_f() -> None:
    calls: list[int] = []

    def f(y: Tensor) -> Tensor:
        calls.append(1)
        return torch.sin(y)

    with torch.no_grad():
        inverse(f, lambda x: x, residual_tol=math.inf)(tensor(0.5))
        assert not calls
        inverse(f, torch.asin)(tensor(0.5))
        assert len(calls) == 1


def test_events_are_judged_as_a_whole() -> None:
    """A small component beside a large one is within the tolerance of its event, not of itself."""
    y_error = tensor(0.0, 1e-9)
    x = tensor(1.0, 1e-6)
    inverse(lambda y: y, lambda x: x + y_error, event_dim=1)(x)
    with pytest.raises(errors.ResidualError, match=r"1 of 2 elements differ, the first at index \(1,\)"):
        inverse(lambda y: y, lambda x: x + y_error)(x)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_y_that_is_not_finite_is_refused(value: float) -> None:
    with pytest.raises(errors.ResidualError):
        inverse(torch.sin, lambda x: torch.full_like(x, value))(tensor(0.5, 0.2))


INFINITE_ANSWERS = {
    "an overflow": (torch.sinh, lambda x: torch.log(x + torch.sqrt(x * x + 1)), [1e200], 0),
    "an infinite y": (lambda y: 2 * y, lambda x: x * math.inf, [3.0], 0),
    "beside a finite component": (lambda y: 2 * y, lambda _: tensor(math.inf, 7.0), [3.0, 1.0], 1),
    "beside a rightly infinite one": (lambda y: y * 1, lambda _: tensor(math.inf, 7.0), [math.inf, 1.0], 1),
}


@pytest.mark.parametrize(("f", "g", "x", "event_dim"), INFINITE_ANSWERS.values(), ids=INFINITE_ANSWERS.keys())
def test_infinity_does_not_solve_a_finite_x(f: Any, g: Any, x: list[float], event_dim: int) -> None:
    inv = inverse(f, g, event_dim=event_dim)
    with pytest.raises(errors.ResidualError):
        inv(tensor(*x))
    assert not inverse(f, g, event_dim=event_dim, on_failure="ignore").solve(tensor(*x)).converged.all()


STEEP = {
    "a pole": (torch.tan, lambda x: torch.full_like(x, math.pi / 2), [1.0, 0.5]),
    "a clipped probability": (torch.logit, lambda x: x * 0 + 1 - 1e-12, [0.0, 1.0]),
    "a clipped logarithm": (lambda y: torch.log(y - 1), lambda x: x * 0 + 1 + 1e-10, [0.0]),
}


@pytest.mark.parametrize(("f", "g", "x"), STEEP.values(), ids=STEEP.keys())
def test_a_small_newton_step_beside_a_pole_is_not_believed(f: Any, g: Any, x: list[float]) -> None:
    with pytest.raises(errors.ResidualError):
        inverse(f, g)(tensor(*x))


VERTICAL = {
    "a square root at 0": (torch.sqrt, 0.0, [0.5, 4.0]),
    "a square root at 1": (lambda y: 1e3 * (y - 1).sqrt(), 1.0, [0.5]),
    "an arcsine at 1": (torch.asin, 1.0, [1.0]),
    "a pole whose slope overflows": (lambda y: 1 / (y - 1) ** 3, 1 + 2.0**-23, [1e5]),
}


@pytest.mark.parametrize(("f", "y", "x"), VERTICAL.values(), ids=VERTICAL.keys())
@pytest.mark.parametrize("event_dim", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("wants_gradient", [False, True])
def test_a_small_newton_step_where_the_slope_is_infinite_is_not_believed(
    f: Any, y: float, x: list[float], event_dim: int, dtype: torch.dtype, wants_gradient: bool
) -> None:
    """It is 0, however wrong y is."""
    inv = inverse(f, lambda x: torch.full_like(x, y), event_dim=event_dim)
    with pytest.raises(errors.ResidualError):
        inv(tensor(*x, dtype=dtype).requires_grad_(wants_gradient))


def test_a_vertical_end_that_is_reached_is_right() -> None:
    for f, y, x in ((torch.sqrt, 0.0, 0.0), (torch.asin, 1.0, math.pi / 2), (lambda y: 1e20 * y, 0.0, 1e-310)):
        assert inverse(f, lambda x, y=y: torch.full_like(x, y))(tensor(x)).item() == y


BESIDE_A_GOOD_ONE = {
    "a small component at the end of a logarithm": (torch.log, [1e-20, 1.0], [-3.0, 0.0], torch.float64),
    "the same in float32": (torch.log, [1e-9, 1.0], [-3.0, 0.0], torch.float32),
    "a small component beside a pole": (lambda y: 1 / y, [1e-20, 1.0], [3.0, 1.0], torch.float64),
    "a pole and a larger step": (
        torch.tan,
        [math.pi / 2 - 1e-10, math.atan(1) * (1 + 1e-9)],
        [0.3, 1.0],
        torch.float64,
    ),
}


@pytest.mark.parametrize(
    ("f", "y", "x", "dtype"), BESIDE_A_GOOD_ONE.values(), ids=[name.replace(" ", "-") for name in BESIDE_A_GOOD_ONE]
)
@pytest.mark.parametrize("jacobian", [Dense(), Diagonal(), MatrixFree()], ids=["dense", "diagonal", "products"])
def test_a_wrong_component_does_not_hide_in_its_event(
    f: Any, y: list[float], x: list[float], dtype: torch.dtype, jacobian: Jacobian
) -> None:
    """Its step and the response of f to it are small beside those of the other component."""
    inv = inverse(f, lambda _: torch.tensor(y, dtype=dtype), event_dim=1, jacobian=jacobian)
    with pytest.raises(errors.ResidualError):
        inv(tensor(*x, dtype=dtype))


def test_a_tolerance_on_the_step_does_not_make_a_steep_end_right() -> None:
    with pytest.raises(errors.ResidualError):
        inverse(torch.log, lambda x: tensor(1e-20), residual_tol=(None, 1e-12))(tensor(-3.0))


def test_a_component_at_the_end_of_the_domain_stays_there() -> None:
    """To look at f on both sides of 0 would be NaN, for a component that needs no look."""
    ends = implicit_function(
        lambda y, p: torch.stack([y[..., 0] ** 2 - p[..., 0], y[..., 1] ** 1.5 + y[..., 1] - p[..., 1]], -1),
        lambda p: torch.stack([p[..., 0].sqrt() * (1 + 1e-9), p[..., 1]], -1),
        event_dim=1,
        param_event_dims=(1,),
    )
    torch.testing.assert_close(ends(tensor(2.0, 0.0)), tensor(math.sqrt(2), 0.0), rtol=2e-9, atol=0)


def test_events_that_have_passed_are_not_moved() -> None:
    def f(y: Tensor) -> Tensor:
        if (y < 0).any():
            raise ValueError("outside of the support")
        return y * torch.exp(30 * y)

    inv = inverse(f, lambda x: tensor(0.0, 1 + 1e-9))
    assert inv(tensor(0.0, math.exp(30))).tolist() == [0.0, 1 + 1e-9]


def test_an_event_without_a_newton_step_does_not_decide_about_others() -> None:
    """Its J is NaN; f, which refuses NaN, is asked about the other event alone."""

    def f(y: Tensor) -> Tensor:
        if y.isnan().any():
            raise ValueError("NaN")
        return torch.where(y.abs() < 0.5, y.sqrt(), y * torch.exp(30 * y))

    y = tensor(0.0, 1 + 1e-9).to(torch.complex128)
    inv = inverse(f, lambda x: y.clone(), on_failure="nan")
    assert inv(tensor(0.5, math.exp(30)).to(torch.complex128))[1] == y[1]


FLAT = {
    "normal tail": (torch.special.ndtr, -25.0, [1e-300, 1e-200], torch.float64),
    "normal tail, float32": (torch.special.ndtr, -7.0, [1e-30, 1e-20], torch.float32),
    "Gumbel tail": (lambda y: 1 - torch.exp(-torch.exp(y)), -45.0, [1e-60], torch.float64),
    "Cauchy tail": (lambda y: torch.atan(y) / math.pi + 0.5, -1.63e16, [1e-300], torch.float64),
}


@pytest.mark.parametrize(("f", "y", "x", "dtype"), FLAT.values(), ids=FLAT.keys())
def test_a_tail_where_f_is_rounded_to_a_constant(f: Any, y: float, x: list[float], dtype: torch.dtype) -> None:
    """There autograd's f' is exact and f is not, and a Newton step by both is nothing."""
    with pytest.raises(errors.ResidualError):
        inverse(f, lambda x: torch.full_like(x, y))(tensor(*x, dtype=dtype))


SMALL_BY_UNIT = {
    "wavelength of a frequency": (lambda y: 2.998e8 / y, lambda x: 1.1 * 2.998e8 / x, [6e14, 5e14], torch.float32, 0),
    "charge": (lambda y: y / 1.6e-19, lambda x: 3 * 1.6e-19 * x, [1.0, 2.0], torch.float64, 0),
    "vector of charges": (lambda y: y * 1e20, lambda x: x * 1e-17, [1.0, 2.0], torch.float64, 1),
}


@pytest.mark.parametrize(("f", "g", "x", "dtype", "event_dim"), SMALL_BY_UNIT.values(), ids=SMALL_BY_UNIT.keys())
def test_a_y_that_is_small_by_its_unit(f: Any, g: Any, x: list[float], dtype: torch.dtype, event_dim: int) -> None:
    """The absolute tolerance eps is no small length if y is measured in something huge."""
    with pytest.raises(errors.ResidualError):
        inverse(f, g, event_dim=event_dim)(tensor(*x, dtype=dtype))


def test_a_wrong_component_beside_a_large_one() -> None:
    def f(y: Tensor) -> Tensor:
        return torch.stack([1e5 * torch.exp(y[..., 0]), torch.exp(y[..., 1])], -1)

    def g(x: Tensor) -> Tensor:
        return torch.stack([torch.log(x[..., 0] / 1e5), torch.log(x[..., 1]) + 1], -1)

    with pytest.raises(errors.ResidualError):
        inverse(f, g, event_dim=1)(tensor(1e5, 0.3, dtype=torch.float32))


@pytest.mark.parametrize("x", [math.inf, -math.inf])
@pytest.mark.parametrize("shape", [(), (1,), (2,)])
def test_a_finite_y_does_not_solve_infinity(x: float, shape: tuple[int, ...]) -> None:
    with pytest.raises(errors.ResidualError):
        inverse(lambda y: 2 * y, lambda x: x.clamp(-1e3, 1e3) / 2)(torch.full(shape, x))


RIGHT = {
    "logit near its end": (torch.logit, torch.sigmoid, [30.0, 33.0, -30.0]),
    "log near 1": (torch.exp, torch.log, [1 + 2**-52, 1 - 2**-53, 1.0]),
    "sin near pi": (lambda y: torch.sin(math.pi - y), lambda x: math.pi - torch.asin(x), [0.0, 1e-17, 0.5]),
    "many revolutions": (lambda y: y - 0.9 * torch.sin(y) - 1e6, lambda x: x + 1e6 + 0.9 * kepler_part(x), [0.0, 1.0]),
    "piecewise linear": (lambda y: torch.where(y > 0, y, y / 2), lambda x: torch.where(x > 0, x, 2 * x), [0.0, -1.0]),
}


def kepler_part(x: Tensor) -> Tensor:
    """sin y for y - 0.9 sin y = x + 1e6, by fixed point iteration."""
    y = x + 1e6
    for _ in range(2000):
        y = x + 1e6 + 0.9 * torch.sin(y)
    return torch.sin(y)


@pytest.mark.parametrize(("f", "g", "x"), RIGHT.values(), ids=RIGHT.keys())
def test_right_answers_pass(f: Any, g: Any, x: list[float]) -> None:
    inverse(f, g)(tensor(*x))
    with torch.no_grad():
        implicit_function(lambda y, p: f(y) - p, g)(tensor(*x))


def test_an_f_that_subtracts_large_numbers_is_judged_by_its_newton_step() -> None:
    """Its residual is rounding error, half a unit of 4e10, which no y can lower."""
    x = torch.linspace(100.0, 150.0, 100, dtype=torch.float64)
    inv = inverse(lambda y: (y.exp() + 4e10) - 4e10, torch.log)
    assert (inv.solve(x).residual / x).max() > EPS**0.5, "the case must be one that the free test refuses"
    inv(x)


def test_rounding_in_a_few_components_of_large_events_needs_no_jacobian() -> None:
    """Some x among thousands are small beside the terms of f: what is left there is rounding, and J is not needed."""
    torch.manual_seed(0)
    weight = 0.7 * 128**-0.5 * torch.randn(128, 128, dtype=torch.float64)

    def f(y: Tensor) -> Tensor:
        return y + 0.5 * torch.tanh(y @ weight.to(y).T)

    x = torch.randn(256, 128)
    y = x.double()
    for _ in range(100):
        y = x.double() - 0.5 * torch.tanh(y @ weight.T)
    y = y.float()
    off = (f(y) - x).abs()
    assert (off > Tolerance().relative(x.dtype) * x.abs()).any(), "the case must fail the free test"
    check = check_residual(y, x, f(y), 1, Tolerance(), f, lambda _: pytest.fail("J was worked out"))
    assert not check.failed.any()


POLES = {
    "tan at pi / 2": (torch.tan, math.pi / 2, 1.3e5),
    "-tan at pi / 2": (lambda y: -torch.tan(y), math.pi / 2, -1.3e5),
    "cot at pi": (lambda y: 1 / torch.tan(y), math.pi, 2.0),
    "1 / (y - 1) beside 1": (lambda y: 1 / (y - 1), 1 + 3 * EPS, 5.0),
}


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("event_dim", [0, 1])
@pytest.mark.parametrize(("f", "y", "x"), POLES.values(), ids=POLES.keys())
def test_a_pole_between_two_places_is_no_root(f: Any, y: float, x: float, event_dim: int, graph: bool) -> None:
    """f passes x there only by way of infinity; in an event the large component lends the small one nothing."""
    target = torch.stack([tensor(x)[0], f(tensor(math.atan(1e3)))[0]]).requires_grad_(graph)
    with pytest.raises(errors.ResidualError):
        inverse(f, lambda _: tensor(y, math.atan(1e3)), event_dim=event_dim)(target)


def test_doubtful_components_beside_an_infinite_one() -> None:
    """A masked logit: y is infinite in one component, and another that reads it is off by the rounding of its terms."""
    y = torch.linspace(1, 2, 64, dtype=torch.float64)
    y[0] = -math.inf
    constant = 1e3 * torch.logsumexp(y[:6], 0) + y[6]

    def f(y: Tensor) -> Tensor:
        sixth = y[..., 6:7] + 1e3 * torch.logsumexp(y[..., :6], -1, keepdim=True) - constant
        return torch.cat([y[..., :6], sixth, y[..., 7:]], -1)

    x = f(y)
    x[6] += 1e3 * EPS
    assert torch.equal(inverse(f, lambda _: y.clone(), event_dim=1)(x), y)


def test_many_components_are_judged_as_few_are() -> None:
    """Whatever f does around y: four thousand combinations of values at once, and 64 at a time."""
    values = tensor(-math.inf, -2.0, -0.0, 1e-3, 1.0, 1.02, math.inf, math.nan)
    one, middle, other, target = (t.flatten() for t in torch.meshgrid([values] * 4, indexing="ij"))
    passed = torch.ones(one.numel(), dtype=torch.bool)
    passed[_not_between(one, middle, other, target)] = False
    few = [
        (64 * k, rows) for k, rows in enumerate(zip(*(t.split(64) for t in (one, middle, other, target)), strict=True))
    ]
    by_few = torch.ones_like(passed)
    by_few[[first + k for first, rows in few for k in _not_between(*rows)]] = False
    assert torch.equal(passed, by_few)
    low, high = torch.minimum(one, other), torch.maximum(one, other)
    inside = (low < middle) & (middle < high) & (low <= target) & (target <= high)
    assert passed.any()
    assert inside[passed].all()
    assert not passed[middle.isnan() | one.isinf() | other.isinf()].any()
    assert (inside & ~passed & low.isfinite() & high.isfinite()).any()  # too near to one end: 1 and 1.02 from -2


@pytest.mark.parametrize("graph", [False, True])
def test_each_small_component_has_to_be_explained(graph: bool) -> None:
    """A difference of large terms may be off by their rounding; a small component without such terms may not."""
    evaluations = 0

    def f(y: Tensor) -> Tensor:
        nonlocal evaluations
        evaluations += 1
        y0, y1, y2 = y.unbind(-1)
        return torch.stack([y0, y0 - y1, 1e-6 * y2], -1)

    y = tensor(1.0, 1 - 1e-13, 1e-4).expand(4, 3).clone()
    x = f(y)
    x[1, 1] *= 1.001  # by 1e-16
    x.requires_grad_(graph)
    evaluations = 0
    inverse(f, lambda _: y.clone(), event_dim=1)(x)
    assert evaluations == 3  # at y, and on both sides of it
    for size in (5e-4, 2e-3):  # less than the other relative difference, and more
        wrong = y.clone()
        wrong[1, 2] *= 1 + size
        with pytest.raises(errors.ResidualError, match=r"index \(1,\)"):
            inverse(f, lambda _, y=wrong: y.clone(), event_dim=1)(x)
    wrong = y.clone()
    wrong[2, 2] *= 1.001  # alone in its event
    with pytest.raises(errors.ResidualError, match=r"index \(2,\)"):
        inverse(f, lambda _: wrong.clone(), event_dim=1)(x)


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("end", [torch.atanh, torch.logit])
def test_a_steep_end_beside_a_large_component_is_no_root(end: Any, graph: bool) -> None:
    """There J is so large that any residual is a rounding of y, and small beside the other component."""
    inv = inverse(
        lambda y: torch.cat([end(y[..., :1]), y[..., 1:]], -1), lambda x: torch.tensor([1 - 6e-8, 1e5]), event_dim=1
    )
    with pytest.raises(errors.ResidualError):
        inv(torch.tensor([5.0, 1e5], requires_grad=graph))


def test_components_are_numbered_in_any_layout() -> None:
    """Where x and y are transposed in memory the wrong component is found in its own event."""
    y = tensor(1.0, 2.0, 3.0, 4.0, 5.0, 6.0).reshape(3, 2).T
    x = 2 * y
    x[1, 0] *= 1.001
    for needs_graph in (False, True):
        with pytest.raises(errors.ResidualError, match=r"1 of 2 events differ, the first at index \(1,\)"):
            inverse(lambda y: 2 * y, lambda _: y, event_dim=1)(x.requires_grad_(needs_graph))


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_infinities_and_zeros_that_agree_are_solved(graph: bool, transposed: bool) -> None:
    x = torch.stack([tensor(math.inf, 0.0), tensor(0.5, -math.inf)])
    x = (x.T if transposed else x).requires_grad_(graph)
    torch.testing.assert_close(inverse(lambda y: 2 * y, lambda x: x / 2, event_dim=1)(x), x / 2)


def test_a_root_at_zero_is_told_how_to_allow_an_absolute_error() -> None:
    inv = inverse(torch.sinh, lambda x: torch.asinh(x) + 1e-14)
    with pytest.raises(errors.ResidualError, match=r"residual_tol=\(None, atol\)"):
        inv(tensor(0.0, 0.5))
    inverse(torch.sinh, lambda x: torch.asinh(x) + 1e-14, residual_tol=(None, 1e-12))(tensor(0.0, 0.5))


def test_no_test_no_verdict() -> None:
    solution = inverse(torch.sin, torch.asin, residual_tol=math.inf).solve(tensor(0.0, 0.5))
    assert solution.converged.all()


@pytest.mark.parametrize("on_failure", ["nan", "ignore"])
@pytest.mark.parametrize("event_dim", [0, 1])
def test_a_nan_of_g_spoils_its_event_only(on_failure: Any, event_dim: int) -> None:
    x = torch.tensor([[2.0], [0.5]], dtype=torch.float64, requires_grad=True)
    y = inverse(torch.sin, torch.asin, on_failure=on_failure, event_dim=event_dim)(x)
    (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(slope.sum(), x)
    for actual, right in ((y, math.asin(0.5)), (slope, 1 / 0.75**0.5), (second, 0.5 / 0.75**1.5)):
        assert actual[0].isnan()
        assert math.isclose(actual[1].item(), right, rel_tol=8 * EPS)


def test_nan_in_the_log_determinant_and_the_jacobian_too() -> None:
    inv = inverse(lambda y: 2 * y, lambda x: x / 2 + tensor(0.0, 1.0), on_failure="nan")
    x = tensor(1.0, 1.0)
    assert inv.with_log_det(x)[1].isnan().tolist() == inv.jacobian(x).isnan().tolist() == [False, True]


def test_infinity_solves_infinity() -> None:
    assert inverse(torch.log, torch.exp)(tensor(math.inf, 1.0))[0] == math.inf


def test_dropout_inside_f_is_noticed() -> None:
    torch.manual_seed(0)
    with pytest.raises(errors.ResidualError):
        inverse(torch.nn.Dropout(0.5), lambda x: x)(torch.rand(100, dtype=torch.float64) + 1)


def failing(on_failure: Any) -> Any:
    """y = x / a, wrong in the second element; f(y) = a y."""
    return inverse(lambda y, a: a * y, lambda x, a: x / a + tensor(0.0, 0.1, 0.0), on_failure=on_failure)


def test_nan_spoils_only_the_failed_events_in_value_and_every_gradient() -> None:
    x, a = tensor(1.0, 2.0, 3.0).requires_grad_(), tensor(2.0, 4.0, 5.0).requires_grad_()
    y = failing("nan")(x, a)
    by_x, by_a = torch.autograd.grad((y**2).sum(), (x, a), create_graph=True)
    by_xx, by_xa = torch.autograd.grad(by_x.sum(), (x, a), create_graph=True)
    exact = (x / a, 2 * x / a**2, -2 * x**2 / a**3, 2 / a**2, -4 * x / a**3)
    for actual, right in zip((y, by_x, by_a, by_xx, by_xa), exact, strict=True):
        assert actual.isnan().tolist() == [False, True, False]
        torch.testing.assert_close(actual[::2], right[::2], rtol=8 * EPS, atol=0)


def test_warn_and_ignore_keep_the_value() -> None:
    x, a = tensor(1.0, 2.0, 3.0), tensor(2.0, 4.0, 5.0)
    with pytest.warns(errors.BacksolveWarning, match="index \\(1,\\)"):
        warned = failing("warn")(x, a)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ignored = failing("ignore")(x, a)
    assert warned.tolist() == ignored.tolist() == [0.5, 0.6, 0.6]


def test_solve_reports_every_event() -> None:
    solution = failing("ignore").solve(tensor(1.0, 2.0, 3.0), tensor(2.0, 4.0, 5.0))
    assert solution.converged.tolist() == [True, False, True]
    torch.testing.assert_close(solution.residual, tensor(0.0, 0.4, 0.0), rtol=1e-14, atol=1e-15)
    assert solution.iterations is None
    assert failing("nan").solve(tensor(1.0, 2.0, 3.0), tensor(2.0, 4.0, 5.0)).y.isnan().tolist() == [False, True, False]
