"""What torch.linalg lacks: factorisations that solve, transpose, and stay right under every transform and order."""

from backsolve.linalg import operations as operations
from backsolve.linalg.banded import BandLU
from backsolve.linalg.concrete import concretely
from backsolve.linalg.dense import LU, Cholesky, Substitution, spectral_radius
from backsolve.linalg.factored import Factored, Structure
from backsolve.linalg.krylov import Krylov, Operator, bicgstab, cg, gmres, richardson

__all__ = [
    "LU",
    "BandLU",
    "Cholesky",
    "Factored",
    "Krylov",
    "Operator",
    "Structure",
    "Substitution",
    "bicgstab",
    "cg",
    "concretely",
    "gmres",
    "richardson",
    "spectral_radius",
]
