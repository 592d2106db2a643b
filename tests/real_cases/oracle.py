"""Derivatives of an inverse to 50 digits, found without the implicit function theorem.

The equations `f(y, *params) = x` are solved anew, with 130 digits, wherever arguments are shifted by a
relative 1e-30, and the solutions differenced: truncation and rounding stay near 1e-60. No torch in here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from mpmath import mp

DIGITS = 130  # ten of them for the conditioning of f
STEP = mp.mpf(10) ** -30
LAST = mp.mpf(10) ** -90  # a Newton step this small (relative to y) leaves an error 1e30 times smaller

Equations = Callable[[np.ndarray, np.ndarray], np.ndarray]


class Derivatives(NamedTuple):
    """y and its first and second derivatives: shapes (m,), (m, k), (m, k, k)."""

    value: np.ndarray
    first: np.ndarray
    second: np.ndarray


def exact(equations: Equations, y: np.ndarray, z: np.ndarray) -> tuple[Derivatives, Derivatives]:
    """Differentiate the solution y of `equations(y, z) = 0`, and say how well-conditioned each result is.

    Args:
        equations: `f(y, *params) - x` in mpmath, for arrays of mpf.
        y: the m unknowns in double precision, where the search starts.
        z: all k arguments in one vector, the m elements of x first.

    Returns:
        The derivatives D; and what a rounding of every argument and of D does to them, in units of eps:
        `|D| + sum_a |dD/dz_a| size_a`. For x, rounding y counts too, as a change of x by `|J| |y|`; and its
        size is that of its largest element, as a dense solve is accurate in norm, not element by element.
    """
    with mp.workdps(DIGITS):
        z = np.array([mp.mpf(v) for v in z.tolist()])
        solve = _Solver(equations, np.array([mp.mpf(v) for v in y.tolist()]), z)
        steps = np.array([STEP * (abs(v) or 1) for v in z])
        value, first, second = found = _difference(solve, z, steps)
        shifted = [_difference(solve, z + step, steps).second for step in np.diag(steps)]
        third = np.stack([(moved - second) / step for moved, step in zip(shifted, steps, strict=True)], -1)
        size = abs(z)
        size[: len(y)] = max(*size[: len(y)], *(abs(solve.jacobian) @ abs(value)))
        moves = abs(first) @ size, abs(second) @ size, abs(third) @ size
        condition = (abs(d) + move for d, move in zip(found, moves, strict=True))
        return tuple(Derivatives(*map(_rounded, group)) for group in (found, condition))


def _rounded(d: np.ndarray) -> np.ndarray:
    """To double precision; where a derivative is zero, the differences leave an error far below 1e-40."""
    return np.where(abs(d) < 1e-40, 0, d).astype(float)


class _Solver:
    """z -> y near one solution, by Newton's method with the Jacobian of that solution."""

    def __init__(self, equations: Equations, y: np.ndarray, z: np.ndarray) -> None:
        self.equations, self.y = equations, y
        for _ in range(2):  # first with the Jacobian at a y of 16 digits, then with that at a y of 100
            self.jacobian = self._jacobian(z)
            self.inverse = np.array(mp.inverse(mp.matrix(self.jacobian.tolist())).tolist())
            self.y = self(z)

    def __call__(self, z: np.ndarray) -> np.ndarray:
        y = self.y
        for _ in range(50):
            step = self.inverse @ self.equations(y, z)
            y = y - step
            if max(abs(step)) <= LAST * max(abs(y)):
                return y
        raise ArithmeticError(f"no solution near y = {self.y} at z = {z}")

    def _jacobian(self, z: np.ndarray) -> np.ndarray:
        steps = np.diag([STEP * (abs(v) or 1) for v in self.y])
        differences = [self.equations(self.y + d, z) - self.equations(self.y - d, z) for d in steps]
        return np.stack(differences, -1) / (2 * np.diag(steps))


def _difference(solve: _Solver, z: np.ndarray, steps: np.ndarray) -> Derivatives:
    """First and second derivatives by central differences."""
    moves = np.diag(steps)
    middle = solve(z)
    ahead, behind = [solve(z + d) for d in moves], [solve(z - d) for d in moves]
    first = np.stack([(p - q) / (2 * h) for p, q, h in zip(ahead, behind, steps, strict=True)], -1)
    second = np.empty((len(middle), len(z), len(z)), dtype=object)
    for a in range(len(z)):
        for b in range(a + 1):
            corners = solve(z + moves[a] + moves[b]) + solve(z - moves[a] - moves[b])
            sides = ahead[a] + ahead[b] + behind[a] + behind[b]
            second[:, a, b] = second[:, b, a] = (corners - sides + 2 * middle) / (2 * steps[a] * steps[b])
    return Derivatives(middle, first, second)
