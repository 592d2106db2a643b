"""Image points freed from lens distortion by OpenCV: `distort(y, coefficients) = x`, at unit depth."""

import cv2
import numpy as np
import torch
from torch import Tensor

from backsolve import inverse
from backsolve.solvers import numpy_solver
from tests.real_cases.case import Case

TIGHT = (cv2.TERM_CRITERIA_COUNT + cv2.TERM_CRITERIA_EPS, 500, 1e-16)


def distort(points: Tensor, coefficients: Tensor) -> Tensor:
    """Brown's model of a lens, with OpenCV's k1, k2, p1, p2, k3 for the coefficients."""
    return torch.stack(brown(*points.unbind(-1), *coefficients.unbind(-1)), -1)


def brown(x, y, k1, k2, p1, p2, k3):
    """The distorted coordinates, for tensors and for mpmath's numbers."""
    square = x * x + y * y
    radial = 1 + square * (k1 + square * (k2 + square * k3))
    return (
        x * radial + 2 * p1 * x * y + p2 * (square + 2 * x * x),
        y * radial + 2 * p2 * x * y + p1 * (square + 2 * y * y),
    )


def undistort(points: np.ndarray, coefficients: np.ndarray, **options) -> np.ndarray:
    """OpenCV's fixed-point iteration: five rounds of it, unless the options say otherwise."""
    rows = zip(points, np.broadcast_to(coefficients, (len(points), 5)), strict=True)  # a camera for each point
    return np.stack([cv2.undistortPoints(p, np.eye(3), camera, **options).reshape(2) for p, camera in rows])


def undistort_tightly(points: np.ndarray, coefficients: np.ndarray) -> np.ndarray:
    return undistort(points, coefficients, criteria=TIGHT)


def distort_mp(point: np.ndarray, coefficients: np.ndarray) -> np.ndarray:
    return np.array(brown(*point, *coefficients))


POINTS = torch.tensor([[0.0, 0.0], [0.3, -0.2], [-0.45, 0.31], [0.02, 0.5]], dtype=torch.float64)
COEFFICIENTS = torch.tensor([-0.28, 0.07, 1.2e-3, -5e-4, 0.01], dtype=torch.float64)
ARGS = (POINTS, COEFFICIENTS.expand(len(POINTS), 5))

sloppy = inverse(distort, numpy_solver(undistort), event_dim=1)
polished = inverse(distort, numpy_solver(undistort), event_dim=1, refine=5)
tight = inverse(distort, numpy_solver(undistort_tightly), event_dim=1)

CASES = [
    Case("cv2.undistortPoints to 1e-16", tight, distort_mp, ARGS),
    Case("cv2.undistortPoints by default, refine=5", polished, distort_mp, ARGS),
]
