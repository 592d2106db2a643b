"""Kepler's equation, `E - e sin E = M`, solved by the C++ code of exoplanet-core; e up to 0.99."""

import exoplanet_core
import numpy as np
import torch
from mpmath import mp
from torch import Tensor

from backsolve import inverse
from backsolve.solvers import numpy_solver
from tests.real_cases.case import Case


def mean_anomaly(anomaly: Tensor, eccentricity: Tensor) -> Tensor:
    return anomaly - eccentricity * anomaly.sin()


def eccentric_anomaly(mean: np.ndarray, eccentricity: np.ndarray) -> np.ndarray:
    """E from the sine and cosine of the true anomaly, which is what the solver returns."""
    sine, cosine = exoplanet_core.kepler(mean, eccentricity)
    return np.arctan2(np.sqrt(1 - eccentricity**2) * sine, eccentricity + cosine)


M = torch.tensor([-3.0, -1.0, -0.1, 0.01, 0.3, 1.5, 3.0], dtype=torch.float64)
ECCENTRICITY = torch.tensor([0.0, 0.3, 0.9, 0.99], dtype=torch.float64)

CASES = [
    Case(
        "exoplanet_core.kepler",
        inverse(mean_anomaly, numpy_solver(eccentric_anomaly)),
        lambda anomaly, eccentricity: anomaly - eccentricity * mp.sin(anomaly),
        tuple(torch.cartesian_prod(M, ECCENTRICITY).T),
    )
]
