"""The examples run, print the right numbers and draw their figure."""

import importlib.util
import math
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import mpmath
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd.functional import hessian, jacobian

from backsolve import BacksolveError, inverse
from backsolve.solvers import numpy_solver

EXAMPLES = Path(__file__).parents[1] / "examples"
EPS = float(np.finfo(float).eps)
PI = math.pi


def run(script: str, *arguments: str) -> list[str]:
    """The lines that an example prints, run as its reader runs it."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, str(EXAMPLES / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def block(lines: list[str], header: str) -> list[list[str]]:
    """The rows of the table under the line that starts with `header`, split at blanks."""
    start = next(i for i, line in enumerate(lines) if line.strip().startswith(header)) + 1
    stop = next((i for i in range(start, len(lines)) if not lines[i].startswith("  ")), len(lines))
    return [line.split() for line in lines[start:stop]]


def test_arcsin_prints_both_derivatives():
    rows = [[float(number) for number in line.split()] for line in run("arcsin.py")[1:]]
    assert [row[0] for row in rows] == [-0.9, -0.6, -0.3, 0.0, 0.3, 0.6, 0.9]
    for x, first, closed_first, second, closed_second in rows:
        assert first == closed_first == pytest.approx(1 / math.sqrt(1 - x * x), abs=5.01e-10)  # nine decimals
        assert second == closed_second == pytest.approx(x / math.sqrt(1 - x * x) ** 3, abs=5.01e-10)


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> tuple[list[str], Path]:
    figure = tmp_path_factory.mktemp("demo") / "figure.png"
    return run("k2_24.py", str(figure)), figure


@pytest.fixture(scope="module")
def k2_24() -> ModuleType:
    spec = importlib.util.spec_from_file_location("k2_24", EXAMPLES / "k2_24.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["k2_24"] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


def test_demo_derivatives_agree_with_finite_differences(demo, k2_24):
    rows = block(demo[0], "p  ")
    assert [row[0] for row in rows] == list(k2_24.PARAMETERS)
    # Differences over 2^-12 of a chi^2 of some 100 to 1000 times its derivatives, with phases of some 100 radians.
    rounding = 1e3 * EPS * 2**12
    for _, *numbers in rows:
        for derivative, difference, relative in (map(float, numbers[:3]), map(float, numbers[3:])):
            assert derivative == pytest.approx(difference, rel=1e-8)  # nine digits are printed
            assert relative < rounding


def test_demo_converges_quadratically(demo):
    lines = demo[0]
    for title in ("2. Circular", "3. Eccentric"):
        steps = block(lines[next(i for i, line in enumerate(lines) if line.startswith(title)) :], "step")
        gradients = [float(row[2]) for row in steps if row[0].isdigit()]
        assert gradients[-1] < 1e-6 < 1e-3 < gradients[-3]  # each step squares the error


@pytest.mark.parametrize("title", ["2. Circular", "3. Eccentric"])
def test_demo_fits_like_radvel(demo, title):
    lines = demo[0]
    section = lines[next(i for i, line in enumerate(lines) if line.startswith(title)) :]
    text = "\n".join(section[: section.index("")])
    gain = float(text.split(" here, ")[1].split()[0])
    assert 0 < gain < 0.01  # RadVel's simplex and Powell searches stop a little above the minimum
    rows = [row for row in block(section, "quantity") if "published" not in row]
    assert {"k1", "k2", "gamma", "jit", "dvdt", "curv"} <= {row[0] for row in rows}
    for *_, value, sigma, radvel, difference in rows:
        assert abs(float(value) - float(radvel)) < 0.1 * float(sigma)
        assert abs(float(difference)) < 0.1
    masses = [row for row in block(section, "quantity") if "published" in row]
    assert [row[0] for row in masses] == ["m1", "m2"]
    assert all(abs(float(row[-3])) < 1.5 for row in masses)


def test_demo_draws(demo):
    from matplotlib.image import imread

    image = (255 * imread(demo[1])[..., :3]).astype(int) @ [1, 256, 65536]
    height, width = image.shape
    assert height > 800
    assert width > 1000
    panels = image[: height // 2], image[height // 2 :, : width // 2], image[height // 2 :, width // 2 :]
    for panel in panels:
        assert len(np.unique(panel)) > 100  # axes, points, two coloured curves and their anti-aliasing


# ---- The parts of the demo --------------------------------------------------------------------------------------


def anomalies() -> Tensor:
    """Mean anomalies over a hundred revolutions, crowded around periastron, apastron and zero."""
    random = torch.Generator().manual_seed(0)
    spread = 600 * torch.rand(2000, generator=random, dtype=torch.float64) - 300
    near = torch.logspace(-12, 0, 100, dtype=torch.float64)
    return torch.cat([spread, *(turn * PI + sign * near for turn in (-21, -1, 0, 1, 2, 35) for sign in (1, -1))])


@pytest.mark.parametrize("e", [0.0, 0.0002, 0.3, 0.9, 0.99])
def test_eccentric_anomaly_solves_keplers_equation(k2_24, e):
    M, e = anomalies(), torch.tensor(e, dtype=torch.float64)
    E = k2_24.eccentric_anomaly(M, e)
    assert ((E - e * E.sin() - M).abs() <= 2 * EPS * (M.abs() + E.abs())).all()
    mp = mpmath.mp.clone()
    mp.dps = 30
    for m, ours in zip(M[::50].tolist(), E[::50].tolist(), strict=True):
        exact = mp.findroot(lambda x, m=m: x - mp.mpf(e.item()) * mp.sin(x) - m, ours)
        slope = 1 - e.item() * math.cos(ours)
        assert abs(float(exact - ours)) <= 2 * EPS * (abs(m) + abs(ours)) / slope


@pytest.mark.parametrize("e", [0.0, 0.3, 0.99])
def test_compiled_solver_lands_on_the_right_revolution(k2_24, e):
    M = anomalies().numpy()
    E = k2_24.compiled_eccentric_anomaly(M, np.float64(e))
    assert np.abs(E - M).max() < e + 2e-5  # |E - M| = e |sin E|; the solver rounds to E = pi within 1.4e-5


def test_compiled_solver_alone_is_refused_next_to_apastron(k2_24):
    unrefined = inverse(k2_24.mean_anomaly, numpy_solver(k2_24.compiled_eccentric_anomaly))
    M, e = torch.tensor([1.0, PI - 1e-5], dtype=torch.float64), torch.tensor(0.5, dtype=torch.float64)
    with pytest.raises(BacksolveError, match=r"refine"):
        unrefined(M, e)


@pytest.fixture
def theta(k2_24) -> Tensor:
    eccentric = {"secosw1": 0.5, "secosw2": -0.3, "sesinw1": -0.5, "sesinw2": 0.5, "jit": 2.0, "curv": 0.002}
    return k2_24.replace(k2_24.START, eccentric)


def test_derivatives_agree_with_autograd_through_an_unrolled_solver(k2_24, theta, monkeypatch):
    data = k2_24.Data.load()
    ours = jacobian(data.chi2, theta), hessian(data.chi2, theta)

    def unrolled(M: Tensor, e: Tensor) -> Tensor:
        E = M + e * M.sin()
        for _ in range(8):
            E = E - (E - e * E.sin() - M) / (1 - e * E.cos())
        return E

    monkeypatch.setattr(k2_24, "eccentric_anomaly", unrolled)
    theirs = jacobian(data.chi2, theta), hessian(data.chi2, theta)
    for a, b in zip(ours, theirs, strict=True):
        # Phases of some 100 radians carry errors of 100 eps; sums of 32 terms of both signs, another factor of 10.
        assert ((a - b).abs() / (b.abs() + 1e-3 * b.abs().max())).max() < 1e3 * EPS


def test_velocity_at_transit_and_mean_velocity(k2_24, theta):
    per, tc, k, e, w = k2_24.orbits(theta)
    at_transit = k2_24.keplerian(tc, theta).diagonal()
    assert at_transit == pytest.approx(k * e * w.cos(), abs=2e1 * EPS)
    # A closed orbit brings the star back: the mean of the velocity over a period is zero. Equal steps integrate an
    # analytic periodic function to rounding.
    for planet in range(2):
        times = tc[planet] + per[planet] * torch.arange(256, dtype=torch.float64) / 256
        assert abs(float(k2_24.keplerian(times, theta)[:, planet].mean())) < 1e2 * EPS


def test_circular_orbit_is_a_sine(k2_24):
    theta = k2_24.replace(k2_24.START, {"secosw1": 1e-9, "sesinw1": 0.0})
    per, tc, k, _, _ = (values[0] for values in k2_24.orbits(theta))
    t = torch.linspace(2360, 2470, 50, dtype=torch.float64)
    expected = -k * torch.sin(2 * PI * (t - tc) / per)
    assert (k2_24.keplerian(t, theta)[:, 0] - expected).abs().max() < 1e3 * EPS


@pytest.mark.parametrize("fit", ["CIRCULAR", "ECCENTRIC"])
def test_model_reproduces_radvels_zero_point(k2_24, fit):
    # gamma follows in closed form from the printed parameters, whose six digits allow five decimals.
    printed = getattr(k2_24, fit).radvel
    gamma = k2_24.Data.load().gamma(k2_24.replace(k2_24.START, printed))
    assert float(gamma) == pytest.approx(printed["gamma"], abs=2e-5)


@pytest.mark.parametrize("fit", ["CIRCULAR", "ECCENTRIC"])
def test_covariance_is_the_curvature_of_the_posterior(k2_24, fit, theta):
    fit, data = getattr(k2_24, fit), k2_24.Data.load()
    start = k2_24.replace(theta if fit is k2_24.ECCENTRIC else k2_24.START, fit.radvel)
    result = k2_24.solve(fit, start, data)
    free = [k2_24.PARAMETERS.index(name) for name in fit.free]
    cholesky = torch.linalg.cholesky(result.covariance[free][:, free])
    here, step = fit.neg_log_posterior(result.theta, data), 1e-2
    for column in cholesky.T:
        move = torch.zeros_like(result.theta)
        move[free] = step * column
        up, down = (fit.neg_log_posterior(result.theta + sign * move, data) - here for sign in (1, -1))
        assert min(up, down) > 0
        assert float(up + down) / step**2 == pytest.approx(1, abs=1e-2)  # quartic terms are step^2 smaller
