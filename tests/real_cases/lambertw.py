"""Lambert's W, both real branches: `y exp(y) = x`."""

import math

import scipy.special
import torch
from mpmath import mp
from torch import Tensor

from backsolve import inverse
from backsolve.solvers import numpy_solver
from tests.real_cases.case import Case


def y_exp_y(y: Tensor) -> Tensor:
    return y * y.exp()


def branch(k: int, x: list[float]) -> Case:
    """W_k; scipy returns it with an imaginary part, which is zero for these x."""
    inv = inverse(y_exp_y, numpy_solver(lambda x: scipy.special.lambertw(x, k).real))
    points = torch.tensor(x, dtype=torch.float64)
    return Case(f"scipy.special.lambertw, branch {k}", inv, lambda y: y * mp.exp(y), (points,))


BRANCH_POINT = -1 / math.e

CASES = [
    branch(0, [BRANCH_POINT + 1e-6, -0.3, -1e-3, 0.0, 1e-8, 0.5, math.e, 1e3, 1e10]),
    branch(-1, [BRANCH_POINT + 1e-6, -0.3, -0.1, -1e-8, -1e-100]),
]
