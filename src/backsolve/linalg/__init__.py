"""What torch.linalg lacks: factorisations that solve, transpose, and stay right under every transform and order."""

from backsolve.linalg.concrete import concretely
from backsolve.linalg.dense import LU, spectral_radius
from backsolve.linalg.factored import Factored, Structure

__all__ = ["LU", "Factored", "Structure", "concretely", "spectral_radius"]
