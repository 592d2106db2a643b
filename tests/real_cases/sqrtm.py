"""The principal square root of matrices that are not symmetric: `Y Y = X`."""

import scipy.linalg
import torch

from backsolve import inverse
from backsolve.solvers import numpy_solver
from tests.real_cases.case import Case

X = torch.tensor(
    [
        [[1.0, 2.0, 3.0], [0.1, 5.0, -1.0], [0.2, 0.3, 0.7]],  # eigenvalues 0.04, 1.7, 5.0
        [[2.0, -3.0, 0.2], [3.0, 2.0, 0.5], [0.1, -0.4, 7.0]],  # a pair of complex eigenvalues
    ],
    dtype=torch.float64,
)

CASES = [
    Case(
        "scipy.linalg.sqrtm",
        inverse(lambda y: y @ y, numpy_solver(scipy.linalg.sqrtm), event_dim=2),
        lambda y: y @ y,
        (X,),
    )
]
