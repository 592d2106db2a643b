"""The joint angles at which a planar arm of three links holds its hand at a given place and heading."""

import numpy as np
import scipy.optimize
import torch
from mpmath import mp
from torch import Tensor

from backsolve import inverse
from backsolve.solvers import numpy_solver
from tests.real_cases.case import Case

START = np.array([0.2, 0.7, 0.4])  # elbow down: the branch on which scipy's search ends


def pose(joints: Tensor, links: Tensor) -> Tensor:
    """Position and heading of the hand."""
    headings = joints.cumsum(-1)
    place = [(links * headings.cos()).sum(-1), (links * headings.sin()).sum(-1), headings[..., -1]]
    return torch.stack(place, -1)


def pose_mp(joints: np.ndarray, links: np.ndarray) -> np.ndarray:
    a, b, c = joints[0], joints[0] + joints[1], joints[0] + joints[1] + joints[2]
    x = links[0] * mp.cos(a) + links[1] * mp.cos(b) + links[2] * mp.cos(c)
    y = links[0] * mp.sin(a) + links[1] * mp.sin(b) + links[2] * mp.sin(c)
    return np.array([x, y, c])


def reach(poses: np.ndarray, links: np.ndarray) -> np.ndarray:
    """Search the joints of each pose from the same start; scipy sees a plain NumPy function."""

    def miss(joints: np.ndarray, goal: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        headings = np.cumsum(joints)
        return np.array([lengths @ np.cos(headings), lengths @ np.sin(headings), headings[-1]]) - goal

    rows = zip(poses, np.broadcast_to(links, poses.shape), strict=True)
    return np.stack([scipy.optimize.root(miss, START, args=row).x for row in rows])


POSES = torch.tensor([[1.5, 1.0, 1.2], [0.9, 1.6, 2.0], [2.1, 0.4, 0.1]], dtype=torch.float64)
LINKS = torch.tensor([[1.0, 1.0, 0.5], [1.0, 0.9, 0.4], [1.2, 0.8, 0.6]], dtype=torch.float64)

# scipy's default tolerance leaves joints good to 1e-10; one Newton step makes them exact.
CASES = [
    Case(
        "scipy.optimize.root, planar 3R arm",
        inverse(pose, numpy_solver(reach), event_dim=1, refine=1),
        pose_mp,
        (POSES, LINKS),
    )
]
