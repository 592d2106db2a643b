"""Bracket: the inverse of an elementwise f of which only f is known."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import scipy.special
import torch
from scipy.optimize import _tstutils
from torch import Tensor

from backsolve import BacksolveError, errors, implicit_function, inverse
from backsolve.solvers import Bracket

INF = math.inf
EPS = torch.finfo(torch.float64).eps
DTYPES = (torch.float64, torch.float32)
LARGE = 2**17  # elements: for so many a few are solved first, and tell where to start with the others


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@dataclass(frozen=True)
class Monotone:
    """f, its domain, and a grid of y over all of it, in units of a factor (log) or a distance (linear)."""

    name: str
    f: Callable[[Tensor], Tensor]
    lower: float = -INF
    upper: float = INF
    at: Callable[[Tensor], Tensor] = lambda t: 30 * t  # from (-1, 1) to the domain

    def __str__(self) -> str:
        return self.name


def _logs(decades: float) -> Callable[[Tensor], Tensor]:
    return lambda t: 10 ** (decades * t)


def _both(decades: float) -> Callable[[Tensor], Tensor]:
    return lambda t: t.sign() * 10 ** (decades * (2 * t.abs() - 1))


FUNCTIONS = [
    Monotone("identity", lambda y: y, at=_both(30)),
    Monotone("affine", lambda y: 3 - 2 * y),
    Monotone("cube", lambda y: y**3, at=_both(10)),
    Monotone("cube on an interval", lambda y: y**3, -10.0, 10.0, at=lambda t: 9.99 * t),
    Monotone("quintic", lambda y: y + y**5, at=_both(5)),
    Monotone("sinh", torch.sinh, at=lambda t: 80 * t),
    Monotone("asinh", torch.asinh, at=_both(20)),
    Monotone("exp", torch.exp, at=lambda t: 80 * t),
    Monotone("expm1", torch.expm1, at=_both(1.8)),
    Monotone("reciprocal", lambda y: 1 / y, 0.0, INF, at=_logs(30)),
    Monotone("log", torch.log, 0.0, INF, at=_logs(30)),
    Monotone("log1p", torch.log1p, -1.0, INF, at=lambda t: torch.expm1(12 * t)),
    Monotone("root", torch.sqrt, 0.0, INF, at=_logs(30)),
    Monotone("y exp y", lambda y: y * y.exp(), 0.0, INF, at=lambda t: 10 ** (18.5 * t - 17)),
    Monotone("tan", torch.tan, -1.5707, 1.5707, at=lambda t: 1.57 * t),
    Monotone("atan", torch.atan, at=_both(2)),
    Monotone("tanh", torch.tanh, at=lambda t: 5 * t),
    Monotone("sigmoid", torch.sigmoid, at=lambda t: -40 * (1 + t)),
    Monotone("logsigmoid", torch.nn.functional.logsigmoid, at=lambda t: 80 * t),
    Monotone("logit", torch.logit, 0.0, 1.0, at=lambda t: 0.5 + 0.4999 * t),
    Monotone("normal cdf", lambda y: torch.erfc(-y / math.sqrt(2)) / 2, at=lambda t: -6 - 5.9 * t),
    Monotone("log normal cdf", torch.special.log_ndtr, at=lambda t: -4 - 10 * t),
    Monotone("digamma", torch.digamma, 0.0, INF, at=_logs(3)),
    Monotone("kepler", lambda y: y - 0.9 * torch.sin(y), at=lambda t: 20 * t),
    Monotone("kink", lambda y: torch.where(y > 1, 1e6 * (y - 1) + 1, y), at=lambda t: 3 * t),
    Monotone("softplus", torch.nn.functional.softplus, at=lambda t: 20 * t),
    Monotone("very flat", lambda y: y**9, at=_both(3)),
    Monotone("power", lambda y: y**0.1, 0.0, 1.0, at=lambda t: 10 ** (-30 * (t + 1) / 2 - 1e-3)),
]


def is_right(f: Callable[..., Tensor], y: Tensor, x: Tensor, *params: Tensor) -> Tensor:
    """Whether y is as good as f can tell, with the elements side by side or, where that is not so, one by one.

    Most of a vector is computed by other instructions than its last few elements, so the rounding errors of an
    element change with its place: those of torch's gammainc by 15 eps. The solver and this test see different ones.
    """
    right = is_right_here(f, y, x, *params)
    for i in (~right).nonzero()[:10, 0]:
        right[i] = is_right_here(f, *(t[i, None] for t in (y, x, *params)))
    return right


def is_right_here(f: Callable[..., Tensor], y: Tensor, x: Tensor, *params: Tensor) -> Tensor:
    """Whether y is f^-1(x) to `4 eps max(1, |f / (y f')|)`, or f, rounded, changes sides of x within 4 eps of y.

    f is as torch computes it in the dtype of y; only its slope is taken in float64. Where f is rounded coarsely the
    sign may change between any two numbers, so all of those within 4 eps are looked at.
    """
    limits = torch.finfo(y.dtype)
    at = y.double().requires_grad_()
    (slope,) = torch.autograd.grad(f(at, *params).sum(), at)
    z = f(y, *params)
    close = (z - x).abs() <= 4 * limits.eps * torch.fmax(z.abs(), (y * slope).abs().to(y.dtype))
    width = 4 * limits.eps * y.abs().clamp(min=limits.tiny)
    least = most = z - x
    for end in (-INF, INF):
        other = y
        for _ in range(8):  # 4 eps are 8 units in the last place above a power of 2, and 4 below
            other = torch.nextafter(other, torch.full_like(y, end))
            r = torch.where((other - y).abs() <= width, f(other, *params) - x, z - x)
            least, most = torch.fmin(least, r), torch.fmax(most, r)
    return close | (least * most.sign() <= 0)


@pytest.mark.parametrize("n", [301, LARGE], ids=["few", "many"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("problem", FUNCTIONS, ids=str)
def test_monotone_functions_over_their_domains(problem: Monotone, dtype: torch.dtype, n: int) -> None:
    y = problem.at(torch.linspace(-1, 1, n + 2, dtype=torch.float64)[1:-1]).to(dtype)
    x = problem.f(y)
    y, x = y[x.isfinite()], x[x.isfinite()]
    solution = inverse(problem.f, Bracket(problem.lower, problem.upper), on_failure="nan").solve(x)
    right = is_right(problem.f, solution.y, x)
    assert right[solution.converged].all()
    assert solution.converged.sum() >= 0.98 * len(x), (x[~solution.converged], y[~solution.converged])


# ------------------------------------------------------------------------------------------------ SciPy's functions


SCIPYS = [test for name in ("aps", "original", "chandrupatla") for test in _tstutils.get_tests(name)]


@pytest.mark.parametrize("test", SCIPYS, ids=lambda test: test["ID"])
def test_scipys_root_finder_functions(test: dict[str, Any]) -> None:
    args = test.get("args", ())

    def f(y: Tensor) -> Tensor:
        with np.errstate(all="ignore"):
            return torch.tensor([float(test["f"](np.float64(v), *args)) for v in y.tolist()], dtype=y.dtype)

    a, b = float(test["a"]), float(test["b"])
    solution = inverse(f, Bracket(a, b), residual_tol=INF, on_failure="nan").solve(double(0.0))
    if f(double(a)) * f(double(b)) > 0:
        assert not solution.converged
        return
    assert solution.converged
    y = solution.y
    width = 4 * torch.finfo(y.dtype).eps * y.abs().clamp(min=torch.finfo(y.dtype).tiny)
    around = torch.cat([f(y + k / 4 * width) for k in range(-4, 5)])
    assert (around == 0).any() or (around.amin() < 0 < around.amax())


# ------------------------------------------------------------------------------------------------ distributions


def mixture_cdf(y: Tensor, weight: Tensor, means: Tensor, scales: Tensor) -> Tensor:
    """Of two normals; the params have an event dimension of 2."""
    z = (y[..., None] - means) / scales
    return (torch.stack([weight, 1 - weight], -1) * torch.erfc(-z / math.sqrt(2)) / 2).sum(-1)


def student_2_sf(y: Tensor) -> Tensor:
    """1 - F of Student's t with two degrees of freedom, without cancellation."""
    root = (2 + y * y).sqrt()
    tail = 1 / (root * (root + y.abs()))
    return torch.where(y > 0, tail, 1 - tail)


class Spline(torch.nn.Module):
    """A monotone cubic Hermite interpolation of a distribution function, with exponential tails."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        steps = torch.rand(31, generator=generator, dtype=torch.float64) + 0.1
        self.register_buffer("knots", torch.cat([double(0.0), steps.cumsum(0)]) - 8)
        heights = torch.rand(31, generator=generator, dtype=torch.float64) + 0.05
        levels = torch.cat([double(0.0), heights.cumsum(0)])
        self.register_buffer("levels", 0.01 + 0.98 * levels / levels[-1])
        secants = self.levels.diff() / self.knots.diff()
        inner = 2 / (1 / secants[1:] + 1 / secants[:-1])  # harmonic means keep it monotone
        self.register_buffer("slopes", torch.cat([secants[:1], inner, secants[-1:]]))

    def forward(self, y: Tensor) -> Tensor:
        first, last, s = self.knots[0], self.knots[-1], self.slopes
        i = (torch.searchsorted(self.knots, y.contiguous()) - 1).clamp(0, len(self.knots) - 2)
        h = self.knots[i + 1] - self.knots[i]
        t = (y.clamp(first, last) - self.knots[i]) / h
        low, high = self.levels[i], self.levels[i + 1]
        inside = (
            (1 + 2 * t) * (1 - t) ** 2 * low
            + t**2 * (3 - 2 * t) * high
            + h * t * (1 - t) * ((1 - t) * s[i] - t * s[i + 1])
        )
        below = 0.01 * ((y - first).clamp(max=0) * s[0] / 0.01).exp()
        above = 1 - 0.01 * (-(y - last).clamp(min=0) * s[-1] / 0.01).exp()
        return torch.where(y < first, below, torch.where(y > last, above, inside))


MANY = 250_000  # of each of four distributions: a million


def probabilities(n: int = MANY) -> Tensor:
    """Numbers between 0 and 1, one in four of which is logarithmically close to 0, and one in eight close to 1."""
    generator = torch.Generator().manual_seed(1)
    p = torch.rand(n, dtype=torch.float64, generator=generator)
    tails = 10 ** (-300 * torch.rand(n // 4, dtype=torch.float64, generator=generator))
    p[: n // 4] = tails
    p[-n // 8 :] = 1 - 1e-16 * 10 ** (15 * torch.rand(n // 8, dtype=torch.float64, generator=generator))
    return p[torch.randperm(n, generator=generator)]


@pytest.mark.parametrize("n", [20_000, MANY])
def test_mixture_of_normals(n: int) -> None:
    p = probabilities(n)
    weight, means, scales = torch.tensor(0.3, dtype=torch.float64), double(-1.0, 2.0), double(0.5, 1.0)
    quantile = inverse(mixture_cdf, Bracket())
    solution = quantile.solve(p, weight, means, scales)
    assert solution.converged.all()
    assert is_right(lambda y: mixture_cdf(y, weight, means, scales), solution.y, p).all()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Threads share a vector, and where a share ends torch's gammainc rounds otherwise.

    With two threads 2 of 250,000 elements are then off by 4.6 and 4.7 eps instead of 4.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("n", [20_000, MANY])
def test_gamma_by_its_cdf(n: int) -> None:
    p = probabilities(n)
    a = 0.5 + 14.5 * torch.rand(n, dtype=torch.float64)
    solution = inverse(lambda y, a: torch.special.gammainc(a, y), Bracket(0.0, INF), on_failure="nan").solve(p, a)
    tiny = torch.finfo(p.dtype).tiny
    underflows = (p.log() + torch.lgamma(a + 1)) / a < math.log(tiny)  # F(y) = y^a / Gamma(a + 1) near 0
    assert solution.converged[~underflows].all()
    assert underflows.sum() < n / 100
    right = is_right(lambda y, a: torch.special.gammainc(a, y), solution.y, p, a)
    assert right[solution.converged].all()


def test_gamma_by_its_survival_function() -> None:
    p, a = probabilities(), 0.5 + 14.5 * torch.rand(MANY, dtype=torch.float64)
    solution = inverse(lambda y, a: torch.special.gammaincc(a, y), Bracket(0.0, INF)).solve(p, a)
    assert solution.converged.all()
    assert is_right(lambda y, a: torch.special.gammaincc(a, y), solution.y, p, a).all()


def test_gamma_against_scipy() -> None:
    p, a = probabilities(20_000).clamp(max=0.99), 2 + 13 * torch.rand(20_000, dtype=torch.float64)
    for f, oracle in (
        (torch.special.gammainc, scipy.special.gammaincinv),
        (torch.special.gammaincc, scipy.special.gammainccinv),
    ):
        y = inverse(lambda y, a, f=f: f(a, y), Bracket(0.0, INF))(p, a)
        torch.testing.assert_close(y, torch.from_numpy(oracle(a.numpy(), p.numpy())), rtol=1e-11, atol=0)


def test_student_t_in_its_tail() -> None:
    p = probabilities()
    solution = inverse(student_2_sf, Bracket()).solve(p)
    # sf = p: t = sqrt(2) (1 - 2 p) / sqrt(1 - (1 - 2 p)^2), and 1 - (1 - 2 p)^2 = 4 p (1 - p)
    expected = math.sqrt(2) * (1 - 2 * p) / (2 * (p * (1 - p)).sqrt())
    assert solution.converged.all()
    assert is_right(student_2_sf, solution.y, p).all()
    tail = p < 0.4
    torch.testing.assert_close(solution.y[tail], expected[tail], rtol=1e-14, atol=0)


def test_spline() -> None:
    p, spline = probabilities(), Spline()
    solution = inverse(spline, Bracket()).solve(p)
    assert solution.converged.all()
    assert is_right(spline, solution.y, p).all()


# ------------------------------------------------------------------------------------------------ learned starts


class Counting:
    """f, and how many of its values were asked for."""

    def __init__(self, f: Callable[..., Tensor]) -> None:
        self.f, self.count = f, 0

    def __call__(self, y: Tensor, *params: Tensor) -> Tensor:
        self.count += y.numel()
        return self.f(y, *params)


@pytest.mark.parametrize(
    ("f", "bracket", "own"),
    [
        (torch.special.ndtr, Bracket(), False),
        (lambda y, a: torch.special.gammainc(a, y), Bracket(0.0, INF), True),
        (lambda y, a: y**a, Bracket(0.0, 1.0), True),
        (lambda y, a: 1 - y**-a, Bracket(1.0, INF), True),
        (lambda y, a: -((-y) ** a), Bracket(-INF, 0.0), True),
        (lambda y, a: a * y + y.sinh(), Bracket(), True),
    ],
    ids=["no params", "gamma", "interval", "pareto", "negative half-line", "line"],
)
def test_evaluations_are_few(f: Callable[..., Tensor], bracket: Bracket, own: bool) -> None:
    x, a = torch.rand(LARGE, dtype=torch.float64), 0.5 + 14.5 * torch.rand(LARGE, dtype=torch.float64)
    x, params = -x if bracket.upper == 0 else x, (a,) if own else ()
    counting = Counting(f)
    y = inverse(counting, bracket)(x, *params).detach()
    assert is_right(f, y, x, *params).all()
    assert counting.count < 7 * LARGE  # with those for the first few, for the ends, and for the residual test


def test_evaluations_are_few_where_there_is_no_x() -> None:
    mean, eccentricity = torch.rand(2, LARGE, dtype=torch.float64)
    kepler = implicit_function(lambda y, mean, eccentricity: y - eccentricity * y.sin() - mean, Bracket())
    solution = kepler.solve(mean, 0.9 * eccentricity)
    assert solution.iterations is not None
    assert solution.iterations.double().mean() < 6


def test_an_f_without_a_derivative() -> None:
    a = torch.rand(LARGE, dtype=torch.float64) + 0.5
    x = torch.rand(LARGE, dtype=torch.float64)
    f = inverse(lambda y, a: a * torch.from_numpy(np.sinh(y.numpy())), Bracket())
    with torch.no_grad():
        torch.testing.assert_close(f(x, a), (x / a).asinh(), rtol=8 * EPS, atol=0)


def test_an_f_whose_derivative_is_wrong() -> None:
    a = torch.rand(LARGE, dtype=torch.float64) + 0.5
    x = torch.rand(LARGE, dtype=torch.float64)
    with torch.no_grad():
        y = inverse(lambda y, a: a * y.detach().sinh() - 1e-3 * (y - y.detach()), Bracket())(x, a)
    torch.testing.assert_close(y, (x / a).asinh(), rtol=8 * EPS, atol=0)


@pytest.mark.parametrize("shared", [True, False])
def test_what_fails_among_many(shared: bool) -> None:
    x = torch.rand(LARGE, dtype=torch.float64) * 8
    a = torch.ones((), dtype=torch.float64) if shared else torch.rand(LARGE, dtype=torch.float64) / 2 + 1
    x[7], x[LARGE // 2] = 20.0, math.nan
    solution = inverse(lambda y, a: a * y**3, Bracket(0.0, 2.0), on_failure="nan").solve(x, a)
    failed = torch.zeros(LARGE, dtype=torch.bool)
    failed[[7, LARGE // 2]] = True
    assert torch.equal(solution.converged, ~failed)
    assert torch.equal(solution.y.isnan(), failed)
    right = ~failed
    torch.testing.assert_close(solution.y[right], ((x / a) ** (1 / 3))[right], rtol=8 * EPS, atol=0)
    with pytest.raises(errors.BracketError, match=r"(?s)2 of 131072 elements.*\(7,\).*x = 20"):
        inverse(lambda y, a: a * y**3, Bracket(0.0, 2.0))(x, a)


@pytest.mark.parametrize(
    "f",
    [
        lambda y: (4 * y).floor() / 4 + 1e-9 * y,
        lambda y: y + 0.5 * (1e4 * y).sin() / 1e4,
        lambda y: torch.where(y > 0.37, 1e8 * (y - 0.37) + 0.37, y),
        lambda y: y.sign() * y.abs() ** 0.01,
    ],
    ids=["steps", "wiggles", "a kink", "a vertical"],
)
@pytest.mark.parametrize("own", [False, True])
def test_functions_that_tell_nothing_from_afar(f: Callable[[Tensor], Tensor], own: bool) -> None:
    x = 0.1 + 2 * torch.rand(LARGE, dtype=torch.float64)
    scale = 1 + torch.rand(LARGE, dtype=torch.float64) if own else torch.ones((), dtype=torch.float64)
    solution = inverse(lambda y, s: s * f(y), Bracket(0.0, 1e40), residual_tol=INF, on_failure="nan").solve(x, scale)
    assert solution.converged.all()
    assert is_right(lambda y, scale: scale * f(y), solution.y, x, scale.expand_as(x)).all()


def test_tails_through_log_cdf() -> None:
    log_p = double(-1e5, -690.0, -1.0, -1e-16, -1e-300)
    y = inverse(torch.special.log_ndtr, Bracket())(log_p)
    assert is_right(torch.special.log_ndtr, y, log_p).all()
    torch.testing.assert_close(y[1].item(), scipy.special.ndtri_exp(-690.0), rtol=1e-13, atol=0)


# ------------------------------------------------------------------------------------------------ gradients


def test_gradients_of_x_and_params() -> None:
    a = double(0.5, 2.0, 30.0).requires_grad_()
    x = double(1.0, -2.0, 1e3).requires_grad_()

    def sinh(x: Tensor, a: Tensor) -> Tensor:  # the inverse of a sinh(y)
        return torch.asinh(x / a)

    solved = inverse(lambda y, a: a * y.sinh(), Bracket())
    v = double(0.3, 1.0, -2.0)
    for actual, expected in zip(
        torch.autograd.grad((solved(x, a) * v).sum(), (x, a), create_graph=True),
        torch.autograd.grad((sinh(x, a) * v).sum(), (x, a), create_graph=True),
        strict=True,
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-13, atol=0)
        torch.testing.assert_close(
            torch.autograd.grad(actual.sum(), a, retain_graph=True),
            torch.autograd.grad(expected.sum(), a, retain_graph=True),
            rtol=1e-12,
            atol=0,
        )
    y, log_det = solved.with_log_det(x, a)
    torch.testing.assert_close(log_det, -(a * y.cosh()).log(), rtol=1e-13, atol=1e-14)


def test_closed_over_weights_get_gradients() -> None:
    weight = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    y = inverse(lambda y: y**3 + weight * y, Bracket())(double(14.0))  # 8 + 3 * 2
    torch.testing.assert_close(y, double(2.0), rtol=1e-15, atol=0)
    (gradient,) = torch.autograd.grad(y.sum(), weight)
    torch.testing.assert_close(gradient.item(), -2 / 15, rtol=1e-14, atol=0)  # -y / (3 y^2 + w)


def test_implicit_function_with_bounds_from_params() -> None:
    p = double(2.0, 1e-20, 1e20).requires_grad_()
    root = implicit_function(lambda y, p: y * y - p, Bracket(0.0, lambda p: 1 + p))
    y = root(p)
    torch.testing.assert_close(y, p.sqrt(), rtol=1e-15, atol=0)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), p)[0], 0.5 / p.sqrt(), rtol=1e-14, atol=0)


# ------------------------------------------------------------------------------------------------ how it is called


@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 0, 2), (2, 1, 3, 1), (5000,), (3, 5000)])
def test_shapes(shape: tuple[int, ...]) -> None:
    x = torch.rand(shape, dtype=torch.float64)
    solution = inverse(torch.sinh, Bracket()).solve(x)
    assert solution.y.shape == solution.converged.shape == solution.iterations.shape == shape
    torch.testing.assert_close(solution.y, x.asinh(), rtol=8 * EPS, atol=0)


@pytest.mark.parametrize("n", [3, 5000])
def test_params_broadcast(n: int) -> None:
    x = torch.rand(n, 1, dtype=torch.float64)
    scale = torch.rand(4, dtype=torch.float64) + 0.5
    shift = torch.rand(n, 4, dtype=torch.float64)
    y = inverse(lambda y, scale, shift: scale * y.sinh() + shift, Bracket())(x, scale, shift)
    torch.testing.assert_close(y, ((x - shift) / scale).asinh(), rtol=8 * EPS, atol=16 * EPS)


@pytest.mark.parametrize("k", [2, 7, 5000])
def test_params_that_are_not_the_elements(k: int) -> None:
    """Of a mixture, with as many components as there are elements, too: none may be taken for that of an element."""
    generator = torch.Generator().manual_seed(3)
    shifts = torch.rand(k, dtype=torch.float64, generator=generator)
    scale = torch.rand(5000, dtype=torch.float64, generator=generator) + 0.5
    x = torch.rand(5000, dtype=torch.float64, generator=generator)

    def f(y: Tensor, shifts: Tensor, scale: Tensor) -> Tensor:
        return scale * (y + shifts.mean()) + 0 * y[..., None].expand(*y.shape, 2).sum(-1)

    y = inverse(f, Bracket())(x, shifts, scale)
    torch.testing.assert_close(y, x / scale - shifts.mean(), rtol=1e-13, atol=1e-15)


def test_what_f_closes_over_may_belong_to_elements() -> None:
    scale = torch.rand(5000, dtype=torch.float64) + 0.5
    x = torch.rand(5000, dtype=torch.float64)
    y = inverse(lambda y: scale * y.sinh(), Bracket())(x)
    torch.testing.assert_close(y, (x / scale).asinh(), rtol=8 * EPS, atol=EPS)


def test_bounds() -> None:
    x = double(8.0, 27.0)
    cubes = double(2.0, 3.0)
    for lower, upper in (
        (0, 4),
        (double(1.0, 2.0), torch.tensor(4)),
        (-INF, double(4.0, 5.0)),
        (double(1.0, -INF), INF),
    ):
        torch.testing.assert_close(inverse(lambda y: y**3, Bracket(lower, upper))(x), cubes, rtol=1e-15, atol=0)
    torch.testing.assert_close(inverse(lambda y: y**3, Bracket(2.0, 3.0))(x), cubes, rtol=0, atol=0)


def test_an_f_that_cannot_be_evaluated_at_the_bounds() -> None:
    def f(y: Tensor) -> Tensor:
        if not ((y > 0) & (y < 1)).all():
            raise ValueError("outside of the domain")
        return torch.log(y) - torch.log1p(-y)

    x = double(-30.0, 0.0, 30.0)
    torch.testing.assert_close(inverse(f, Bracket(0.0, 1.0, open=True))(x), x.sigmoid(), rtol=1e-14, atol=0)
    with pytest.raises(ValueError, match="outside of the domain"):
        inverse(f, Bracket(0.0, 1.0))(x)


def test_iterations_are_few() -> None:
    x = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    iterations = inverse(torch.sigmoid, Bracket()).solve(x).iterations
    assert iterations is not None
    assert 1 <= iterations.min() <= iterations.max() <= 14


@pytest.mark.parametrize("n", [7, 5000])
def test_warm_start(n: int) -> None:
    x, a = torch.rand(n, dtype=torch.float64) + 0.1, torch.rand(n, dtype=torch.float64) + 0.5
    quantile = inverse(lambda y, a: torch.special.gammainc(a, y), Bracket(0.0, INF))
    cold, moved = quantile.solve(x * 0.89, a), x * 0.8901
    without, warm = quantile.solve(moved, a), quantile.starting_at(cold).solve(moved, a)
    torch.testing.assert_close(warm.y, without.y, rtol=1e-12, atol=0)
    assert warm.iterations is not None
    assert without.iterations is not None
    assert warm.iterations.double().mean() < 0.8 * without.iterations.double().mean()
    lost = quantile.starting_at(torch.full_like(x, math.nan)).solve(moved, a)
    assert torch.equal(lost.y, without.y)


def test_warm_start_needs_a_solver_that_starts() -> None:
    with pytest.raises(errors.ArgumentError, match="Bracket, Newton, FixedPoint"):
        inverse(torch.sinh, torch.asinh).starting_at(double(1.0))


def test_an_f_with_a_state_is_frozen() -> None:
    torch.manual_seed(0)
    layer = torch.nn.utils.parametrizations.spectral_norm(torch.nn.Linear(1, 1, dtype=torch.float64))
    wide = torch.nn.utils.parametrizations.spectral_norm(torch.nn.Linear(4, 4, dtype=torch.float64))
    buffers = [b.clone() for b in wide.buffers()]
    calls = 0

    def f(y: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return layer(y[..., None])[..., 0] + wide.weight.norm() * y

    x = torch.rand(3, dtype=torch.float64)
    with torch.no_grad():
        y = inverse(f, Bracket(), residual_tol=INF)(x)
    assert calls > 5
    for before, after in zip(buffers, wide.buffers(), strict=True):
        assert torch.equal(before, after)
    torch.testing.assert_close(f(y), x, rtol=1e-14, atol=0)  # the first call that moves the state


# ------------------------------------------------------------------------------------------------ what cannot be solved


@pytest.mark.parametrize("on_failure", ["raise", "warn", "nan", "ignore"])
@pytest.mark.parametrize("n", [4, 5000])
def test_a_root_outside(on_failure: Any, n: int) -> None:
    x = torch.full((n,), 0.5, dtype=torch.float64)
    x[2] = 9.0
    x.requires_grad_()
    cube_root = inverse(lambda y: y**3, Bracket(0.0, 2.0), on_failure=on_failure)
    message = rf"(?s)no root between.*1 of {n} elements.*\(2,\).*x = 9, f\(0\) = 0, f\(2\) = 8.*widen"
    if on_failure == "raise":
        with pytest.raises(errors.BracketError, match=message):
            cube_root(x)
        return
    if on_failure == "warn":
        with pytest.warns(errors.BacksolveWarning, match=message):
            assert cube_root(x).isnan().nonzero().tolist() == [[2]]
        return
    y = cube_root(x)
    assert y.isnan().nonzero().tolist() == [[2]]
    (slope,) = torch.autograd.grad(y[:2].sum(), x)
    torch.testing.assert_close(slope[:2], torch.full((2,), 1 / (3 * 0.5 ** (2 / 3)), dtype=torch.float64))


@pytest.mark.parametrize(
    ("f", "bracket", "error", "message"),
    [
        (lambda y: y, Bracket(1.0, 0.0), errors.BracketError, "no interval"),
        (lambda y: y, Bracket(math.nan, 1.0), errors.BracketError, "no interval"),
        (lambda y: y * y, Bracket(), errors.BracketError, r"same sign at both.*f\(-inf\) = inf"),
        (lambda y: 0 * y + 2, Bracket(0.0, 1.0), errors.BracketError, "same sign at both"),
        (
            lambda y: torch.where((y - 0.6).abs() < 0.2, math.nan, 2 * y),
            Bracket(0.0, 1.0),
            errors.ConvergenceError,
            "NaN",
        ),
        (torch.atan, Bracket(0.0, 1e3), errors.BracketError, "same sign"),
        (lambda y: torch.where(y < 0.3, y - 5, y + 5), Bracket(0.0, 1.0), errors.ResidualError, "is not x"),
        (lambda y: 1 / (0.4 - y), Bracket(0.0, 1.0), errors.ResidualError, "is not x"),
        (lambda y: y.exp(), Bracket(0.0, 1.0, maxiter=2), errors.ConvergenceError, "maxiter = 2"),
        (lambda y: torch.log(y) + 10, Bracket(2.0, INF, open=True), errors.BracketError, "keeps its sign"),
    ],
)
def test_what_has_no_solution(f: Any, bracket: Bracket, error: type[Exception], message: str) -> None:
    x = double(1.8)
    with pytest.raises(error, match=f"(?s){message}"):
        inverse(f, bracket)(x)
    solution = inverse(f, bracket, on_failure="nan").solve(x)
    assert solution.y.isnan().all()
    assert not solution.converged.any()


def test_nan_x_is_named() -> None:
    with pytest.raises(errors.BracketError, match=r"x = nan"):
        inverse(torch.sinh, Bracket())(double(1.0, math.nan))


@pytest.mark.parametrize("settings", [{"lower": "0"}, {"upper": None}, {"maxiter": 0}, {"maxiter": 1.5}])
def test_settings(settings: dict[str, Any]) -> None:
    with pytest.raises(errors.ArgumentError, match=next(iter(settings))):
        Bracket(**settings)


def test_a_solver_is_no_g() -> None:
    with pytest.raises(TypeError, match="needs f"):
        Bracket()(double(1.0))


def test_errors_are_errors_of_the_package() -> None:
    assert issubclass(errors.BracketError, BacksolveError)
    assert issubclass(errors.ConvergenceError, BacksolveError)
