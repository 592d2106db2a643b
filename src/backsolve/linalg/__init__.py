"""What torch.linalg lacks: factorisations whose solves are differentiable to any order and share one LU."""

from backsolve.linalg.lu import LU, spectral_radius

__all__ = ["LU", "spectral_radius"]
