"""The orbits of the two planets of K2-24, fitted to 32 real radial velocities through a compiled Kepler solver.

Kepler's equation E - e sin E = M gives the eccentric anomaly E of a planet at mean anomaly M. Its solution g has no
closed form; here it is a compiled routine of exoplanet-core, which autograd cannot see into. Its inverse f is one
line of torch. That is all that backsolve needs: the gradient of chi^2, the Hessian of the posterior, hence Newton's
method and the error bars, all come from differentiating the compiled solver, twice.

The first fit (circular orbits) and the second (eccentric ones) are those of RadVel's tutorial "K2-24 Fitting & MCMC",
same data, model, fixed ephemerides and priors, so the results can be compared number by number.

    python examples/k2_24.py [figure.png]
"""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import exoplanet_core
import numpy as np
import torch
from torch import Tensor
from torch.autograd.functional import hessian, jacobian

from backsolve import inverse
from backsolve.solvers import numpy_solver

HERE = Path(__file__).parent
TIME_BASE = 2420.0  # days; RadVel's tutorial counts trend and curvature from here

# Times are BJD - 2454833 (days), velocities m/s, angles radians. Planets b and c are 1 and 2, RadVel's names.
PARAMETERS = (
    *("per1", "per2", "tc1", "tc2", "secosw1", "secosw2", "sesinw1", "sesinw2", "logk1", "logk2"),
    *("dvdt", "curv", "jit"),
)
DERIVED = ("k1", "k2", "e1", "e2", "w1", "w2", "gamma", "m1", "m2")
UNITS = {"dvdt": "m/s/d", "curv": "m/s/d^2", "w1": "rad", "w2": "rad"} | dict.fromkeys(
    ("k1", "k2", "gamma", "jit"), "m/s"
)
STAR_MASS, STAR_MASS_ERROR = 1.12, 0.05  # solar masses, as in RadVel's example
PUBLISHED_MASSES = {"m1": (21.0, 5.4), "m2": (27.0, 6.9)}  # Earth masses; Petigura et al. 2016, abstract, own fit
STYLES = (("tab:orange", "--", "s"), ("tab:blue", "-", "o"))  # colour, line and marker of the two fits

# The transits fix periods and transit times. sqrt(e) cos w = sqrt(e) sin w = 0.01 is RadVel's e = 0.0002.
START = torch.tensor(
    [20.885258, 42.363011, 2072.79438, 2082.62516, 0.01, 0.01, 0.01, 0.01, 1.1, 1.1, -0.02, 0.01, 1.0],
    dtype=torch.float64,
)


# ---- Kepler's equation ------------------------------------------------------------------------------------------


def mean_anomaly(eccentric_anomaly: Tensor, e: Tensor) -> Tensor:
    """f: Kepler's equation, M = E - e sin E."""
    return eccentric_anomaly - e * torch.sin(eccentric_anomaly)


def compiled_eccentric_anomaly(M: np.ndarray, e: np.ndarray) -> np.ndarray:
    """g: E from the true anomaly nu of the compiled solver, on the revolution of M (which is not wrapped)."""
    sin_nu, cos_nu = exoplanet_core.kepler(M, e)
    E = np.arctan2(np.sqrt(1 - e**2) * sin_nu, e + cos_nu)
    return E + 2 * np.pi * np.round((M - (E - e * np.sin(E))) / (2 * np.pi))


# The compiled solver answers nu = pi for every E within 1.4e-5 of pi (it guards tan(E/2) there) and loses digits
# around; without `refine`, backsolve refuses those answers. One Newton step on f makes them right to the last bits.
eccentric_anomaly = inverse(mean_anomaly, numpy_solver(compiled_eccentric_anomaly), refine=1)


# ---- The model --------------------------------------------------------------------------------------------------


def orbits(theta: Tensor) -> tuple[Tensor, ...]:
    """Period, transit time, semi-amplitude K, eccentricity e and argument of periastron w, each of shape (2,)."""
    per, tc, secosw, sesinw, logk = theta[:10].reshape(5, 2)
    return per, tc, logk.exp(), secosw**2 + sesinw**2, torch.atan2(sesinw, secosw)


def keplerian(t: Tensor, theta: Tensor) -> Tensor:
    """The star's velocity K [cos(nu + w) + e cos w] due to each planet: (n,) -> (n, 2)."""
    per, tc, k, e, w = orbits(theta)
    root = torch.sqrt(1 - e**2)
    # In transit the planet is in front of the star: nu + w = pi/2. This gives M at tc, from which time is counted.
    half = (math.pi / 2 - w) / 2
    E_tc = 2 * torch.atan2(torch.sqrt(1 - e) * torch.sin(half), torch.sqrt(1 + e) * torch.cos(half))
    M = 2 * math.pi * (t[:, None] - tc) / per + mean_anomaly(E_tc, e)
    E = eccentric_anomaly(M, e)
    distance = 1 - e * torch.cos(E)  # from the star, in semi-major axes
    cos_nu, sin_nu = (torch.cos(E) - e) / distance, root * torch.sin(E) / distance
    return k * (cos_nu * torch.cos(w) - sin_nu * torch.sin(w) + e * torch.cos(w))


def trend(t: Tensor, theta: Tensor) -> Tensor:
    """Acceleration and curvature from whatever else pulls at the star."""
    dvdt, curv = theta[10:12]
    return dvdt * (t - TIME_BASE) + curv * (t - TIME_BASE) ** 2


@dataclass(frozen=True)
class Data:
    """Times, velocities and their errors, each of shape (n,)."""

    t: Tensor
    velocity: Tensor
    error: Tensor

    @classmethod
    def load(cls) -> "Data":
        table = np.loadtxt(HERE / "data" / "k2-24_radial_velocities.csv", delimiter=",", skiprows=1)
        error, t, velocity = torch.from_numpy(table[:, 1:].T.copy())
        return cls(t, velocity, error)

    def weights(self, theta: Tensor) -> Tensor:
        """Inverse variances; the star's own jitter adds to the errors in quadrature."""
        return 1 / (self.error**2 + theta[12] ** 2)

    def gamma(self, theta: Tensor) -> Tensor:
        """The zero point of the velocities, linear and therefore solved for in closed form, as RadVel does."""
        weights = self.weights(theta)
        residual = self.velocity - keplerian(self.t, theta).sum(1) - trend(self.t, theta)
        return (weights * residual).sum() / weights.sum()

    def residual(self, theta: Tensor) -> Tensor:
        return self.velocity - self.gamma(theta) - keplerian(self.t, theta).sum(1) - trend(self.t, theta)

    def chi2(self, theta: Tensor) -> Tensor:
        return (self.weights(theta) * self.residual(theta) ** 2).sum()


def derived(theta: Tensor, data: Data) -> Tensor:
    """What `DERIVED` names; masses m sin i in Earth masses, for the star's published mass."""
    per, _, k, e, w = orbits(theta)
    gm_star, gm_earth = STAR_MASS * 1.3271244e20, 3.986004e14  # m^3/s^2
    mass = k * torch.sqrt(1 - e**2) * (per * 86400 / (2 * math.pi * gm_star)) ** (1 / 3) * gm_star / gm_earth
    return torch.cat([k, e, w, data.gamma(theta)[None], mass])


# ---- The two fits of RadVel's tutorial --------------------------------------------------------------------------


@dataclass(frozen=True)
class Fit:
    """What varies, the Gaussian priors (mean, width), and the values that RadVel's tutorial prints."""

    title: str
    free: tuple[str, ...]
    priors: dict[str, tuple[float, float]]
    radvel: dict[str, float]

    def neg_log_posterior(self, theta: Tensor, data: Data) -> Tensor:
        """Up to a constant. The likelihood is marginalised over gamma, which is where log(sum of weights) is from."""
        if (orbits(theta)[3] >= 0.99).any():  # RadVel's prior on e; an ellipse ends at 1
            return theta.new_tensor(math.inf)
        weights = data.weights(theta)
        named = dict(zip(PARAMETERS, theta, strict=True)) | {"gamma": data.gamma(theta)}
        prior = sum(((named[name] - mean) / width) ** 2 for name, (mean, width) in self.priors.items())
        return (data.chi2(theta) - weights.log().sum() + weights.sum().log() + prior) / 2


# The tutorial centres its priors of the jitter, a velocity, on log 3 and log 2 and gives the second one the width
# log 0.1. That is kept: the comparison is with what RadVel computes.
CIRCULAR = Fit(
    "circular orbits",
    free=("logk1", "logk2", "dvdt", "curv", "jit"),
    priors={
        "jit": (math.log(3), 0.5),
        "logk1": (math.log(5), 10.0),
        "logk2": (math.log(5), 10.0),
        "gamma": (0.0, 10.0),
    },
    radvel={"k1": 4.71289, "k2": 3.92875, "logk1": 1.5503, "logk2": 1.36832}
    | {"dvdt": -0.0295124, "curv": 0.00183616, "gamma": -4.013, "jit": 2.08458},
)
ECCENTRIC = Fit(
    "eccentric orbits",
    free=("secosw1", "secosw2", "sesinw1", "sesinw2", *CIRCULAR.free),
    priors={"jit": (math.log(2), math.log(0.1))},
    radvel={"secosw1": 0.398562, "secosw2": -0.1305, "sesinw1": -0.403908, "sesinw2": 0.367332}
    | {"e1": 0.321993, "e2": 0.151963, "w1": -0.792059, "w2": 1.91215}
    | {"k1": 6.12836, "k2": 4.40803, "logk1": 1.81293, "logk2": 1.48343}
    | {"dvdt": -0.0299603, "curv": 0.00205612, "gamma": -4.51743, "jit": 1.956},
)


def replace(theta: Tensor, values: dict[str, float]) -> Tensor:
    """theta with the parameters that `values` names set to its values; other names are passed over."""
    return theta.new_tensor([values.get(name, old) for name, old in zip(PARAMETERS, theta.tolist(), strict=True)])


def newton(objective: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """Minimise by Newton's method, printing each step; returns the minimum and the Hessian there.

    Far away the Hessian is often indefinite: |eigenvalues| point the step downhill, and it is halved until it descends.
    """
    print("  step   -log posterior     |gradient|   expected decrease   fraction taken")
    fraction = 1.0
    for step in range(100):
        value, gradient, H = objective(x), jacobian(objective, x), hessian(objective, x)
        scale = H.diagonal().abs().rsqrt()  # the parameters' units differ by orders of magnitude
        curvatures, axes = torch.linalg.eigh(scale[:, None] * H * scale)
        direction = -scale * (axes @ (axes.T @ (scale * gradient) / curvatures.abs()))
        decrease = -gradient @ direction / 2
        print(f"  {step:4d} {value:16.10f}   {gradient.norm():12.3e}   {decrease:17.3e}   {fraction:14.4g}")
        if decrease < torch.finfo(x.dtype).eps * value.abs() and curvatures.min() > 0:
            return x, H
        rounding = 1e-12 * value.abs()
        for fraction in (0.5**halvings for halvings in range(30)):
            if objective(x + fraction * direction) < value + rounding:
                break
        else:
            raise RuntimeError("no step in Newton's direction descends")
        x = x + fraction * direction
    raise RuntimeError("Newton's method did not reach a minimum in 100 steps")


@dataclass(frozen=True)
class Result:
    """The best theta (13,) and the covariance of its parameters (13, 13), zero where they are fixed."""

    theta: Tensor
    covariance: Tensor

    def sigma(self, function: Callable[[Tensor], Tensor]) -> Tensor:
        """One-sigma error of each component of function(theta), to first order."""
        J = jacobian(function, self.theta)
        return torch.einsum("ij,jk,ik->i", J, self.covariance, J).sqrt()

    def summary(self, data: Data) -> dict[str, list[float]]:
        """[value, one-sigma error] of every parameter and every derived quantity."""
        values = torch.cat([self.theta, derived(self.theta, data)])
        sigma = torch.cat([self.covariance.diagonal().sqrt(), self.sigma(lambda theta: derived(theta, data))])
        table = dict(zip(PARAMETERS + DERIVED, torch.stack([values, sigma], 1).tolist(), strict=True))
        # Two errors that the covariance of theta does not hold: gamma's own, and that of the star's mass.
        gamma, error = table["gamma"]
        table["gamma"] = [gamma, math.hypot(error, float(data.weights(self.theta).sum()) ** -0.5)]
        for name in ("m1", "m2"):
            mass, error = table[name]
            table[name] = [mass, math.hypot(error, mass * 2 / 3 * STAR_MASS_ERROR / STAR_MASS)]
        return table


def solve(fit: Fit, start: Tensor, data: Data) -> Result:
    """Maximise the posterior from `start`; the inverse Hessian at the maximum is the covariance."""
    index = torch.tensor([PARAMETERS.index(name) for name in fit.free])
    x, H = newton(lambda x: fit.neg_log_posterior(start.index_copy(0, index, x), data), start[index])
    covariance = start.new_zeros(len(PARAMETERS), len(PARAMETERS))
    covariance[index[:, None], index] = torch.linalg.inv(H)
    return Result(start.index_copy(0, index, x), covariance)


# ---- What is printed --------------------------------------------------------------------------------------------


def finite_difference(function: Callable[[Tensor], Tensor], x: Tensor, step: float = 2**-12) -> Tensor:
    """d function / dx along the last dimension, from central differences of order four.

    A power of two keeps x + h and x - h exact, which matters beside transit times of 2000 days.
    """
    columns = []
    for h in step * torch.eye(len(x), dtype=x.dtype):
        near, far = function(x + h) - function(x - h), function(x + 2 * h) - function(x - 2 * h)
        columns.append((8 * near - far) / (12 * step))
    return torch.stack(columns, dim=-1)


def print_derivatives(theta: Tensor, data: Data) -> None:
    """Gradient and one row of the Hessian of chi^2 beside finite differences of values and of gradients."""

    def gradient(theta: Tensor) -> Tensor:
        return jacobian(data.chi2, theta)

    g, g_fd = gradient(theta), finite_difference(data.chi2, theta)
    h, h_fd = (H[PARAMETERS.index("sesinw1")] for H in (hessian(data.chi2, theta), finite_difference(gradient, theta)))
    print("  p             d chi2/dp  finite difference  relative  d2 chi2/dp dsesinw1  finite difference  relative")
    for name, *row in zip(PARAMETERS, g, g_fd, h, h_fd, strict=True):
        a, b, c, d = (float(number) for number in row)
        first, second = abs(b / a - 1), abs(d / c - 1)
        print(f"  {name:7s} {a:15.8e}    {b:15.8e}   {first:.1e}   {c:17.8e}    {d:15.8e}   {second:.1e}")


def print_comparison(fit: Fit, result: Result, data: Data) -> None:
    """Every fitted number with its error, beside RadVel's and the published one."""
    table, radvel = result.summary(data), replace(result.theta, fit.radvel)
    here, there = (float(fit.neg_log_posterior(theta, data)) for theta in (result.theta, radvel))
    print(f"  chi2 = {float(data.chi2(result.theta)):.3f} (jitter included), {len(data.t)} velocities")
    print(f"  -log posterior: {here:.5f} here, {there - here:+.5f} at RadVel's printed values")
    print("  quantity            this fit    1 sigma       RadVel   difference / sigma")
    for name, theirs in fit.radvel.items():
        value, sigma = table[name]
        label = f"{name} ({UNITS[name]})" if name in UNITS else name
        print(f"  {label:16s} {value:11.5f} {sigma:10.5f} {theirs:12.5f}   {(value - theirs) / sigma:+8.2f}")
    for name, (published, error) in PUBLISHED_MASSES.items():
        value, sigma = table[name]
        print(
            f"  {name} (Earth masses) {value:9.2f} {sigma:10.2f}   published {published} +- {error}: "
            f"{(value - published) / error:+.2f} published sigma"
        )


# ---- The figure -------------------------------------------------------------------------------------------------


def draw(fits: dict[str, Result], data: Data, path: Path) -> None:
    """Velocities, residuals and the two phase-folded orbits."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(10, 9.5), layout="constrained")
    grid = figure.add_gridspec(3, 2, height_ratios=[3, 1.2, 2.6])
    above = figure.add_subplot(grid[0, :])
    draw_velocities(above, figure.add_subplot(grid[1, :], sharex=above), fits, data)
    folded = figure.add_subplot(grid[2, 0])
    for planet, axes in enumerate([folded, figure.add_subplot(grid[2, 1], sharey=folded)]):
        draw_folded(axes, planet, fits, data)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def draw_velocities(axes, below, fits: dict[str, Result], data: Data) -> None:
    t = torch.linspace(float(data.t.min()) - 4, float(data.t.max()) + 4, 500, dtype=data.t.dtype)

    def model(theta: Tensor) -> Tensor:
        return data.gamma(theta) + keplerian(t, theta).sum(1) + trend(t, theta)

    for (title, result), (colour, line, marker) in zip(fits.items(), STYLES, strict=True):
        residual = data.residual(result.theta)
        label = f"{title}: rms of the residuals {residual.square().mean().sqrt():.2f} m/s"
        axes.plot(t, model(result.theta), line, color=colour, label=label)
        below.plot(data.t, residual, marker, color=colour, ms=5, mfc="none", label=title)
    theta = result.theta
    sigma = torch.sqrt(result.sigma(model) ** 2 + 1 / data.weights(theta).sum())  # the latter is gamma's own
    band = model(theta) - sigma, model(theta) + sigma
    axes.fill_between(t, *band, color=colour, alpha=0.15, lw=0, label="its 1 sigma band")
    axes.plot(t, data.gamma(theta) + trend(t, theta), ":", color="0.5", label="its zero point, trend and curvature")
    error_bars(axes, data.t, data.velocity, theta, data, "black")
    error_bars(below, data.t, residual, theta, data, colour)
    axes.set(title="K2-24: 32 radial velocities (Keck/HIRES), error bars without and with jitter")
    axes.set(ylabel="radial velocity (m/s)", xlim=t[[0, -1]].tolist(), ylim=(-19, 20))
    axes.legend(ncols=2, fontsize=9, loc="upper right")
    below.axhline(0, color="0.5", lw=0.8)
    below.set(xlabel="BJD - 2454833 (days)", ylabel="data - model (m/s)", ylim=(-9, 12))
    below.legend(ncols=2, fontsize=9, loc="upper right")


def draw_folded(axes, planet: int, fits: dict[str, Result], data: Data) -> None:
    for (title, result), (colour, line, _) in zip(fits.items(), STYLES, strict=True):
        per, tc, k, e, _ = (values[planet] for values in orbits(result.theta))
        phase = torch.linspace(-0.5, 0.5, 300, dtype=data.t.dtype) * per
        label = f"{title}: K = {k:.2f} m/s, e = {e:.2f}"
        axes.plot(phase, keplerian(tc + phase, result.theta)[:, planet], line, color=colour, label=label)
    days = torch.remainder(data.t - tc + per / 2, per) - per / 2
    alone = data.residual(result.theta) + keplerian(data.t, result.theta)[:, planet]
    error_bars(axes, days, alone, result.theta, data, "black")
    axes.set(title=f"planet {'bc'[planet]}, {per:.3f} days; the rest of the eccentric fit removed")
    axes.set(xlabel="time from transit (days)", ylabel="radial velocity (m/s)", ylim=(-13, 17))
    axes.title.set_fontsize(10.5)
    axes.legend(fontsize=9, loc="upper right")


def error_bars(axes, x: Tensor, y: Tensor, theta: Tensor, data: Data, colour: str) -> None:
    """Points with the measured error (thick) and with the jitter added to it (thin)."""
    axes.errorbar(x, y, data.weights(theta) ** -0.5, fmt="none", ecolor=colour, elinewidth=0.6)
    axes.errorbar(x, y, data.error, fmt="o", color=colour, ms=4, elinewidth=1.4)


def main(figure: Path = HERE / "output" / "k2_24.png") -> None:
    data = Data.load()

    print("1. chi^2 differentiated through the compiled Kepler solver, at e = 0.50 and 0.34")
    shapes = {"secosw1": 0.5, "sesinw1": -0.5, "secosw2": -0.3, "sesinw2": 0.5}
    print_derivatives(replace(START, shapes | {"logk1": 1.5, "logk2": 1.2, "jit": 2.0, "curv": 0.002}), data)

    print("\n2. Circular orbits, as in RadVel's tutorial")
    circular = solve(CIRCULAR, START, data)
    print_comparison(CIRCULAR, circular, data)

    print("\n3. Eccentric orbits, as in RadVel's tutorial")
    # From e = 0.02: at e = 0 the posterior, a function of sqrt(e) cos w and sqrt(e) sin w, has no second derivative.
    start = replace(circular.theta, dict.fromkeys(shapes, 0.1))
    eccentric = solve(ECCENTRIC, start, data)
    print_comparison(ECCENTRIC, eccentric, data)
    print("Each sigma is the curvature at the maximum: rough for e2 and w2, which the velocities hardly constrain.")

    draw({CIRCULAR.title: circular, ECCENTRIC.title: eccentric}, data, figure)
    print(f"\nfigure: {figure}")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
