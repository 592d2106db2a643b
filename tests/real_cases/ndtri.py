"""The normal quantile: `Phi(y) = p`, from the lower tail at 1e-100 to the upper."""

import math

import scipy.special
import torch
from mpmath import mp
from torch import Tensor

from backsolve import inverse
from tests.real_cases.case import Case


def normal_cdf(y: Tensor) -> Tensor:
    """Phi by erfc, which keeps its digits in the lower tail; torch.special.ndtr is 2 % off at y = -8."""
    return torch.erfc(-y / math.sqrt(2)) / 2


CASES = [
    Case(
        "scipy.special.ndtri",
        inverse(normal_cdf, scipy.special.ndtri),
        mp.ncdf,
        (torch.tensor([1e-100, 1e-20, 1e-8, 0.02, 0.3, 0.5, 0.84, 0.999, 1 - 1e-9], dtype=torch.float64),),
    )
]
