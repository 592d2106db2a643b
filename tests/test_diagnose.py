"""diagnose: each fault that it promises to find is planted here, and each sound pair must come out clean."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.optimize
import torch
from torch import Tensor

from backsolve import Dense, Diagonal, Inverse, diagnose, errors, inverse
from backsolve._diagnose import Report
from backsolve._diagnose.command import main
from backsolve.solvers import numpy_solver
from tests.adversarial.forwards import Forgetful
from tests.problems import PROBLEMS, Problem

EPS = torch.finfo(torch.float64).eps
N = 8
ROOT = Path(__file__).parents[1]


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def solver_of(f: Callable[[Tensor], Tensor], start: Tensor) -> Any:
    """g by SciPy's hybrid method, for any f at all."""

    def g(x: np.ndarray) -> np.ndarray:
        def residual(y: np.ndarray) -> np.ndarray:
            with torch.no_grad():
                return f(torch.from_numpy(y.reshape(x.shape))).numpy().ravel() - x.ravel()

        return scipy.optimize.root(residual, start.numpy().ravel(), tol=1e-14).x.reshape(x.shape)

    return numpy_solver(g)


def topics(report: Report, *levels: str) -> set[str]:
    return {finding.topic for finding in report.findings if finding.level in levels}


def text_of(report: Report, topic: str) -> str:
    return " ".join(f"{f.text} {f.advice}" for f in report.findings if f.topic == topic)


# ------------------------------------------------------------------------------------------------ sound pairs


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_sound_pairs_come_out_clean(problem: Problem) -> None:
    report = diagnose(problem.explicit(), *problem.inputs())
    assert report.ok
    assert not topics(report, "wrong", "warning", "not certain")
    assert report.derivatives
    assert all(c.agrees for c in report.derivatives.comparisons)
    assert {c.what[:4] for c in report.derivatives.comparisons} == {"f by", "g by", "seco"}


def test_a_diagnosis_leaves_no_trace() -> None:
    net = torch.nn.Sequential(torch.nn.BatchNorm1d(3), torch.nn.Dropout(0.1)).double()
    w = gaussian(3).abs().requires_grad_()
    before = {k: v.clone() for k, v in net.state_dict().items()}, w.detach().clone(), w._version, torch.get_rng_state()
    diagnose(inverse(lambda y: y + 0.1 * net(y) * w, lambda x: x), gaussian(4, 3))
    assert all(torch.equal(v, before[0][k]) for k, v in net.state_dict().items())
    assert torch.equal(w, before[1])
    assert w._version == before[2]
    assert w.grad is None
    assert torch.equal(torch.get_rng_state(), before[3])


def test_an_empty_sample_and_a_0d_sample() -> None:
    assert diagnose(inverse(torch.exp, torch.log), torch.ones(0, 3, dtype=torch.float64)).ok
    report = diagnose(inverse(torch.exp, torch.log), torch.tensor(2.0, dtype=torch.float64))
    assert report.ok
    assert report.structure
    assert not report.structure.certain


@pytest.mark.parametrize(("inv", "x"), [(torch.sin, torch.ones(1)), (inverse(torch.sin, torch.asin), 0.5)])
def test_what_cannot_be_diagnosed_is_an_error(inv: Any, x: Any) -> None:
    with pytest.raises(errors.ArgumentError):
        diagnose(inv, x)


# -------------------------------------------------------------------------------------------------- structure

MIX = 2 * torch.eye(N, dtype=torch.float64) + 0.1 * gaussian(N, N)
KERNEL = torch.tensor([[[0.2, 1.0, -0.3]]], dtype=torch.float64)


def mean(y: Tensor) -> Tensor:
    return y.mean(-1, keepdim=True)


# f, declared event_dim, then what must come out: the name, the event_dim, and whether it can be certain
STRUCTURES: dict[str, tuple[Callable[[Tensor], Tensor], int, str, int, bool]] = {
    "elementwise": (torch.sinh, 0, "Diagonal()", 0, True),
    "elementwise, declared as vectors": (torch.sinh, 1, "Diagonal()", 0, True),
    "where-branch": (lambda y: torch.where(y > 0, 2 * y, y), 0, "Diagonal()", 0, True),
    "mean-coupled": (lambda y: y + 0.3 * mean(y), 0, "Dense()", 1, True),
    "1e-6-coupled": (lambda y: y + 1e-6 * mean(y), 0, "Dense()", 1, True),
    "dense": (lambda y: y @ MIX.T, 1, "Dense()", 1, True),
    "triangular": (lambda y: y @ MIX.tril().T, 1, "Triangular()", 1, True),
    "upper triangular": (lambda y: y @ MIX.triu().T, 1, "Triangular(upper=True)", 1, True),
    "cumsum": (lambda y: y.cumsum(-1), 1, "Triangular()", 1, True),
    "conv": (
        lambda y: torch.nn.functional.conv1d(y.reshape(-1, 1, N), KERNEL, padding=1).reshape(y.shape),
        1, "Banded(1, 1)", 1, True,
    ),
    "detach-coupled": (lambda y: y + 0.3 * mean(y.detach()), 0, "Dense()", 1, False),
    "symmetric-cancelling": (lambda y: 2 * y + 0.3 * (y.roll(1, -1) - y.roll(2, -1)), 0, "Dense()", 1, True),
    "batch-normed": (
        lambda y: y + 0.1 * torch.nn.functional.batch_norm(y, None, None, training=True), 1, "Dense()", 2, True
    ),
    "gated, closed at the sample": (lambda y: y + 0.2 * torch.relu(mean(y) - 3), 0, "Dense()", 1, False),
    "gated, open at the sample": (lambda y: y * torch.sigmoid(3 + mean(y)), 0, "Dense()", 1, True),
}  # fmt: skip


@pytest.mark.parametrize("name", STRUCTURES)
def test_structures(name: str) -> None:
    f, declared, structure, event_dim, certain = STRUCTURES[name]
    y = gaussian(3, N)
    x = f(y).detach()
    report = diagnose(inverse(f, solver_of(f, y), event_dim=declared, on_failure="ignore"), x)
    found = report.structure
    assert found
    assert (found.name, found.event_dim, found.certain) == (structure, event_dim, certain)
    if event_dim > declared:  # a lie is found, and named; where it cannot be certain it says so
        assert "independence" in topics(report, "wrong", "not certain")
        assert f"event_dim={event_dim}" in text_of(report, "independence")
    else:
        assert "independence" not in topics(report, "wrong", "not certain")


def test_a_cheaper_structure_is_advised() -> None:
    """A hundred elements as a dense matrix: elementwise is many times cheaper."""
    report = diagnose(inverse(torch.exp, torch.log, event_dim=1), gaussian(20, 100).exp())
    assert report.ok
    assert "J is Diagonal(); declared Dense, which has room for it" in text_of(report, "structure")
    assert any(line.startswith("declare jacobian=Diagonal(): the gradient is") for line in report.advice)


def test_a_sampled_structure_is_not_certain() -> None:
    """An event of 1000 elements is looked at by some rows; a band among them is no proof."""
    y = gaussian(1, 1000)
    report = diagnose(inverse(lambda y: 3 * y + y.roll(1, -1), lambda x: x, event_dim=1, on_failure="ignore"), y)
    assert report.structure
    assert not report.structure.certain
    assert "rows" in report.structure.why


def test_a_declared_diagonal_that_is_none() -> None:
    f = STRUCTURES["dense"][0]
    report = diagnose(inverse(f, solver_of(f, gaussian(3, N)), event_dim=1, jacobian=Diagonal()), f(gaussian(3, N)))
    assert {"structure", "derivative of g by x"} <= topics(report, "wrong")
    assert report.derivatives
    assert report.derivatives["g by x"].agrees is False
    assert "declare jacobian=Dense()" in report.advice


def test_symmetry_and_pattern() -> None:
    matrix = MIX + MIX.T
    report = diagnose(
        inverse(lambda y: y @ matrix, lambda x: x @ torch.linalg.inv(matrix), event_dim=1), gaussian(2, N)
    )
    assert report.structure
    assert report.structure.symmetric
    assert report.structure.magnitude is not None
    torch.testing.assert_close(report.structure.magnitude, matrix.abs(), rtol=4 * EPS, atol=0)
    f = STRUCTURES["dense"][0]
    other = diagnose(inverse(f, solver_of(f, gaussian(2, N)), event_dim=1), f(gaussian(2, N)))
    assert other.structure
    assert other.structure.symmetric is False


# --------------------------------------------------------------------------------------- residual, conditioning


def test_a_wrong_g_is_named_with_its_place() -> None:
    x = torch.linspace(0.1, 0.9, 9, dtype=torch.float64)
    shift = torch.zeros(9, dtype=torch.float64)
    shift[4] = 1e-3
    report = diagnose(inverse(torch.sin, lambda x: torch.asin(x) + shift[: len(x)]), x)
    assert not report.ok
    assert report.residual
    assert (report.residual.failed, report.residual.total, report.residual.index) == (1, 9, (4,))
    expected = abs(math.sin(math.asin(0.5) + 1e-3) - 0.5)
    assert math.isclose(report.residual.worst, expected, rel_tol=1e-9)


@pytest.mark.parametrize(("period", "name"), [(2 * math.pi, "2 pi"), (360.0, "360")])
def test_a_period_is_recognised(period: float, name: str) -> None:
    x = torch.tensor([0.1, 5.0, 0.3], dtype=torch.float64) + torch.tensor([0.0, 2.0, 0.0]) * period
    report = diagnose(inverse(lambda y: 1 * y, lambda x: torch.remainder(x, period)), x)
    assert report.residual
    assert report.residual.period == name
    assert name in text_of(report, "residual")


def test_conditioning_is_that_of_numpy() -> None:
    """sinh between two matrices: J is another one for each event."""
    f = STRUCTURES["dense"][0]
    y = gaussian(3, N)
    report = diagnose(
        inverse(lambda y: f(torch.sinh(y)), lambda x: torch.asinh(x @ torch.linalg.inv(MIX).T), event_dim=1),
        f(torch.sinh(y)),
    )
    jacobians = [MIX.numpy() * np.cosh(row) for row in y.numpy()]
    assert report.conditioning
    assert math.isclose(report.conditioning.condition or 0, max(map(np.linalg.cond, jacobians)), rel_tol=1e-9)
    smallest = [np.linalg.svd(j, compute_uv=False)[-1] for j in jacobians]
    assert math.isclose(report.conditioning.smallest or 0, min(smallest), rel_tol=1e-9)
    assert report.conditioning.index == (int(np.argmin(smallest)),)


def test_an_ill_conditioned_and_a_singular_jacobian() -> None:
    scale = torch.tensor([[1.0, 1.0], [1.0, 1.0 + 1e-9]], dtype=torch.float64)
    report = diagnose(inverse(lambda y: y @ scale, lambda x: torch.linalg.solve(scale, x.mT).mT, event_dim=1), scale)
    assert "conditioning" in topics(report, "warning")
    turning = diagnose(inverse(torch.sin, torch.asin), torch.tensor([0.2, 1.0], dtype=torch.float64))
    assert "conditioning" in topics(turning, "wrong")
    assert turning.conditioning
    assert (turning.conditioning.singular, turning.conditioning.index) == (1, (1,))


# -------------------------------------------------------------------------------------------------- derivatives


def cubic_root(x: Tensor) -> Tensor:
    return 2 / math.sqrt(3) * torch.sinh(torch.asinh(1.5 * math.sqrt(3) * x) / 3)


def test_a_detach_on_y_is_found() -> None:
    def f(y: Tensor) -> Tensor:
        return y + y.detach() ** 3

    report = diagnose(inverse(f, cubic_root), gaussian(5))
    assert {"derivative of f by y", "derivative of g by x"} <= topics(report, "wrong")
    assert "detach" in text_of(report, "derivative of f by y")


def test_a_param_that_f_detaches_is_found() -> None:
    x, a = gaussian(5), torch.tensor(2.0, dtype=torch.float64)
    report = diagnose(inverse(lambda y, a: y * a.detach(), lambda x, a: x / a), x, a)
    assert topics(report, "wrong") == {"derivative of f by a", "derivative of g by a", "second derivative of g"}


def test_a_param_by_keyword_in_a_pytree() -> None:
    x, scales = gaussian(5), {"rate": torch.tensor(2.0, dtype=torch.float64)}
    report = diagnose(inverse(lambda y, *, o: y * o["rate"].item(), lambda x, *, o: x / o["rate"]), x, o=scales)
    assert report.derivatives
    assert report.derivatives["g by o['rate']"].agrees is False
    assert report.derivatives["g by x"].agrees


def test_a_lost_second_derivative_is_found() -> None:
    report = diagnose(inverse(Forgetful.apply, cubic_root), gaussian(5))
    assert topics(report, "wrong") == {"second derivative of g"}


def test_wrong_entries_are_found() -> None:
    report = diagnose(inverse(torch.sin, torch.asin, jacobian=Diagonal(entries=torch.sin)), gaussian(5).tanh())
    assert "derivative of g by x" in topics(report, "wrong")


def test_a_param_without_derivative_in_torch_is_said() -> None:
    a, x = torch.tensor(2.0, dtype=torch.float64), torch.rand(4, dtype=torch.float64) * 0.8 + 0.1
    import scipy.special

    report = diagnose(
        inverse(
            lambda y, a: torch.special.gammaincc(a, y),
            lambda x, a: numpy_solver(lambda x, a: scipy.special.gammainccinv(a, x))(x, a),
        ),
        x,
        a,
    )
    assert "derivative of g by a" in topics(report, "not certain")
    assert "derivative" in text_of(report, "derivative of g by a")
    assert report.derivatives
    assert report.derivatives["g by x"].agrees


@pytest.mark.parametrize("event_dim", [0, 1])
def test_failed_events_do_not_hide_the_others(event_dim: int) -> None:
    """One NaN of g: the derivatives of the other events are still compared."""
    x = torch.tensor([[0.5], [2.0]], dtype=torch.float64)
    report = diagnose(inverse(torch.sin, torch.asin, event_dim=event_dim), x)
    assert topics(report, "wrong") == {"residual", "conditioning"}
    assert report.derivatives
    assert report.derivatives["g by x"].agrees
    a = torch.tensor(1.0, dtype=torch.float64)
    report = diagnose(inverse(lambda y, a: a * y.sin(), lambda x, a: torch.asin(x / a), event_dim=event_dim), x, a)
    assert topics(report, "wrong") == {"residual", "conditioning"}
    assert "events that fail spoil" in text_of(report, "derivative of g by a")


# ------------------------------------------------------------------------------------------------- smoothness


def test_a_kink_is_found_where_it_is() -> None:
    report = diagnose(
        inverse(lambda y: y + torch.relu(y - 0.25), lambda x: torch.where(x > 0.25, (x + 0.25) / 2, x)), gaussian(9)
    )
    assert report.smoothness
    assert report.smoothness.operations == ("Relu",)
    assert math.isclose(report.smoothness.y or 0, 0.25, abs_tol=1e-9)
    assert math.isclose(report.smoothness.jump, 0.5, abs_tol=1e-6)
    assert "smoothness" in topics(report, "warning")


def test_a_steep_but_smooth_f_has_no_kink() -> None:
    report = diagnose(inverse(lambda y: y + torch.tanh(300 * y), lambda x: x, on_failure="ignore"), gaussian(9))
    assert report.smoothness
    assert report.smoothness.jump == 0
    assert report.smoothness.operations == ()


# -------------------------------------------------------------------------------------------- closures and state


class Cached:
    """g computes a weight without a graph and f reads it: no gradient can reach `w`."""

    def __init__(self) -> None:
        self.w = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
        self.scale: Tensor = self.w

    def g(self, x: Tensor) -> Tensor:
        self.scale = self.w * 1.0
        return x / self.scale

    def f(self, y: Tensor) -> Tensor:
        return y * self.scale


def test_a_cache_that_g_fills_is_found() -> None:
    cached = Cached()
    report = diagnose(inverse(cached.f, cached.g), gaussian(5))
    assert report.derivatives
    assert report.derivatives["g by f.__self__.w"].agrees is False
    assert "cache" in text_of(report, "derivative of g by f.__self__.w")


def test_what_f_closes_over_is_named() -> None:
    net = torch.nn.Linear(3, 3).double()
    with torch.no_grad():
        net.weight += 3 * torch.eye(3)
    inv = inverse(net, lambda x: torch.linalg.solve(net.weight, (x - net.bias).mT).mT, event_dim=1)
    report = diagnose(inv, gaussian(4, 3))
    assert report.ok
    assert report.closure
    assert {name for name, _ in report.closure.read} == {"f.weight", "f.bias"}
    assert report.derivatives
    assert {c.what for c in report.derivatives.comparisons} >= {"g by f.weight", "g by f.bias"}


def test_what_f_does_not_lead_to_is_named() -> None:
    w = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    report = diagnose(inverse(lambda y: y * w.item(), lambda x: x / w.detach()), gaussian(4))
    assert report.closure
    assert [name for name, _ in report.closure.unread] == ["w"]
    assert "derivative of g by w" in topics(report, "wrong")


def test_dropout_and_batch_norm_are_found() -> None:
    dropout = torch.nn.Dropout(0.5)
    report = diagnose(inverse(dropout, lambda x: x, on_failure="ignore"), gaussian(20))
    assert report.state
    assert (report.state.f_repeats, report.state.draws, report.state.training) == (False, ("f",), ("f",))
    norm = torch.nn.BatchNorm1d(3).double()
    report = diagnose(
        inverse(lambda y: 3 * y + norm(y), lambda x: x / 3, event_dim=1, on_failure="ignore"), gaussian(4, 3)
    )
    assert report.state
    assert set(report.state.buffers) == {f"norm.{b}" for b in ("running_mean", "running_var", "num_batches_tracked")}
    assert "independence" in topics(report, "wrong")
    calm = torch.nn.BatchNorm1d(3).double().eval()
    slope = (1 / math.sqrt(1 + calm.eps)) + 3
    report = diagnose(inverse(lambda y: 3 * y + calm(y), lambda x: x / slope, event_dim=1), gaussian(4, 3))
    assert report.ok
    assert not topics(report, "warning")


def test_spectral_norm_that_moves_is_found() -> None:
    net = torch.nn.utils.parametrizations.spectral_norm(torch.nn.Linear(3, 3)).double()
    report = diagnose(inverse(lambda y: 3 * y + net(y), lambda x: x, event_dim=1, on_failure="ignore"), gaussian(4, 3))
    assert report.state
    assert report.state.buffers
    assert "state" in topics(report, "wrong")


def test_a_random_g_is_found() -> None:
    report = diagnose(
        inverse(lambda y: 2 * y, lambda x: x / 2 * (1 + 0.01 * torch.rand(())), on_failure="ignore"), gaussian(4)
    )
    assert report.state
    assert (report.state.g_repeats, report.state.draws) == (False, ("g",))


# --------------------------------------------------------------------------------------------------- precision


def test_a_float32_step_inside_f_is_found() -> None:
    report = diagnose(
        inverse(lambda y: torch.sin(y.float()).double(), torch.asin, residual_tol=1e-5), gaussian(9).tanh()
    )
    assert report.precision
    assert report.precision.coarse
    assert "precision" in topics(report, "wrong")


def test_a_param_of_another_dtype_is_named() -> None:
    a = torch.tensor(2.0)
    report = diagnose(inverse(lambda y, a: y * a, lambda x, a: x / a), gaussian(4), a)
    assert report.precision
    assert report.precision.others == ("a",)


def test_float32_sigmoid_near_one() -> None:
    """s (1 - s) keeps two digits at y = 14; the values are all right, f' is not."""
    y = torch.tensor([0.0, 14.0])
    report = diagnose(inverse(torch.sigmoid, lambda x: y.clone()), torch.sigmoid(y))
    actual, exact = torch.sigmoid(y), torch.sigmoid(y.double())
    error = (actual * (1 - actual) / (exact * torch.sigmoid(-y.double())) - 1).abs().max().item()
    assert report.precision
    assert error > 1e-3, "the case must be one where float32 fails"
    assert math.isclose(report.precision.slope_error or 0, error, rel_tol=1e-4)
    assert "precision" in topics(report, "wrong")


INACCURATE = {
    "ndtr": (torch.special.ndtr, [-8.0, -7.5]),
    "gammainc": (lambda y: torch.special.gammainc(torch.full_like(y, 30.0), y), [25.0, 33.0]),
}


@pytest.mark.parametrize("name", INACCURATE)
def test_functions_that_torch_computes_inaccurately(name: str) -> None:
    """The derivative is right and the function is not, or the other way round: finite differences see it."""
    f, values = INACCURATE[name]
    y = torch.tensor(values, dtype=torch.float64)
    report = diagnose(inverse(f, lambda x: y[: len(x)].clone()), f(y))
    assert report.derivatives
    assert report.derivatives["f by y"].agrees is not True


# ---------------------------------------------------------------------------------------------- cost and report


def test_cost_names_the_declared_structure() -> None:
    report = diagnose(inverse(torch.exp, torch.log, event_dim=1, jacobian=Dense()), gaussian(2, 20).exp())
    assert report.cost
    assert set(report.cost.gradient) == {"Dense", "Diagonal()"}
    assert min(report.cost.g, report.cost.f, *report.cost.gradient.values()) > 0


def plant() -> tuple[Inverse, Tensor]:
    return inverse(torch.sin, lambda x: torch.asin(x) + 1e-3), torch.linspace(-0.9, 0.9, 5, dtype=torch.float64)


@pytest.mark.parametrize("with_rich", [True, False])
def test_the_table(monkeypatch: pytest.MonkeyPatch, with_rich: bool) -> None:
    if not with_rich:
        monkeypatch.setitem(sys.modules, "rich.console", None)
    else:
        pytest.importorskip("rich", reason="rich is an extra")
    text = str(diagnose(*plant()))
    assert "inverse(sin, <lambda>): NOT OK" in text
    for part in ("residual", "wrong", "5 of 5 events", "refine=5", "structure", "Diagonal()"):
        assert part in text
    assert ("┃" in text) is with_rich


def test_what_g_must_not_return_is_a_finding() -> None:
    report = diagnose(inverse(torch.sin, lambda x: [1.0, 2.0]), torch.ones(2))
    assert not report.ok
    assert "something that cannot be y" in str(report)


def test_f_that_does_not_depend_on_y() -> None:
    report = diagnose(inverse(lambda y: y.detach() * 2, lambda x: x / 2), gaussian(3))
    assert not report.ok


# --------------------------------------------------------------------------------------- picture and command line


def test_the_picture(tmp_path: Path) -> None:
    """A full report, and one where nothing could be measured."""
    pytest.importorskip("matplotlib", reason="matplotlib is an extra")
    f = STRUCTURES["conv"][0]
    full = diagnose(inverse(f, solver_of(f, gaussian(3, N)), event_dim=1), f(gaussian(3, N)))
    poor = diagnose(inverse(torch.sin, lambda x: [1.0, 2.0]), torch.ones(2))
    for report in (full, poor, diagnose(*plant())):
        axes = report.plot(str(tmp_path / "picture.png")).axes
        assert (tmp_path / "picture.png").stat().st_size > 10_000
        titles = [a.get_title() for a in axes]
        assert titles[:3] == ["structure of J", "residual |f(g(x)) - x|", "derivatives: analytic against differences"]
    (image,) = full.plot().axes[0].images
    shown = ~np.isnan(np.asarray(image.get_array(), dtype=float))
    assert (shown == (abs(np.subtract.outer(range(N), range(N))) <= 1)).all(), "a band of three diagonals"


EXPORTED = inverse(lambda y, a: a * torch.sinh(y), numpy_solver(lambda x, a: np.arcsinh(x / a)))
WRONG = inverse(lambda y, a: a * torch.sinh(y), numpy_solver(lambda x, a: np.arcsinh(x)))


@pytest.mark.parametrize(
    ("name", "params", "code"),
    [
        ("EXPORTED", {"arr_0": 2.0}, 0),
        ("WRONG", {"arr_0": 2.0}, 1),
        ("EXPORTED", {"no_such_param": 2.0}, 2),
        ("MISSING", {"arr_0": 2.0}, 2),
        ("N", {"arr_0": 2.0}, 2),
    ],
)
def test_the_command_line(
    name: str, params: dict[str, float], code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "x.npy", np.linspace(-1, 1, 6))
    np.savez(tmp_path / "p.npz", **{key: np.array(value) for key, value in params.items()})
    files = ["--input", str(tmp_path / "x.npy"), "--params", str(tmp_path / "p.npz")]
    assert main(["diagnose", f"tests.test_diagnose:{name}", *files]) == code
    out, err = capsys.readouterr()
    assert ("derivative of g by x" in out, bool(err)) == (code < 2 and code == 0, code == 2)


def test_params_by_keyword_and_the_module_as_a_program(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.linspace(-1, 1, 6))
    np.savez(tmp_path / "p.npz", a=np.array(2.0))
    command = [sys.executable, "-m", "backsolve", "diagnose", "tests.test_diagnose:EXPORTED", "--input", "x.npy"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(["src", str(ROOT / "src"), str(ROOT)])}
    done = subprocess.run(
        [*command, "--params", "p.npz"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "derivative of f by a" in done.stdout
