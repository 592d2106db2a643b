"""What determines y besides `f(y) = x`: a gauge where f has too few equations, a subspace on which y lives.

Either way the problem becomes `c(y, x, *params) = 0` with as many equations as unknowns, an implicit function whose
derivative `c_y` is invertible.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from backsolve import errors
from backsolve.linalg import LU, Factored

Function = Callable[..., Tensor]


class Equations(ABC):
    """Equations that are added to `f(y) = x`."""

    event_dim: ClassVar[int]
    """How many rightmost dimensions an event must have."""

    has_log_det: ClassVar[bool]
    """Whether x and y have equally many coordinates."""

    @abstractmethod
    def conditions(self, f: Function) -> Function:
        """`c(y, x, *params, **kwargs)`, of the shape of y."""


@dataclass(frozen=True)
class Constrained(Equations):
    """Among the many y with `f(y) = x` the one with `h(y) = 0`: for f from R^m to R^n, m > n, and h to R^(m - n).

    Args:
        h: in torch, of shape `(*batch, m - n)` for y of shape `(*batch, m)`. Gradients flow to what it closes over.

    Example:
        >>> import torch
        >>> from backsolve import Dense, inverse
        >>> from backsolve.jacobians import Constrained
        >>> on_the_line = Constrained(lambda y: y[..., :1] - 3 * y[..., 1:])
        >>> split = inverse(
        ...     lambda y: y.sum(-1, keepdim=True),
        ...     lambda x: torch.cat([0.75 * x, 0.25 * x], -1),
        ...     event_dim=1,
        ...     jacobian=Dense(gauge=on_the_line),
        ... )
        >>> x = torch.tensor([8.0], requires_grad=True)
        >>> split(x)[0].backward()
        >>> x.grad
        tensor([0.7500])
    """

    h: Function
    event_dim = 1
    has_log_det = False

    def conditions(self, f: Function) -> Function:
        """`f(y) - x` and `h(y)`."""

        def c(y: Tensor, x: Tensor, *params: Any, **kwargs: Any) -> Tensor:
            parts = f(y, *params, **kwargs) - x, self.h(y)
            numbers = [part.shape[-1] for part in parts]
            if sum(numbers) != y.shape[-1]:
                raise errors.gauge_does_not_fit(y.shape[-1], *numbers)
            return torch.cat(parts, -1)

        return c


@dataclass(frozen=True)
class MinimumNorm(Equations):
    """Among the many y with `f(y) = x` the one of least Euclidean norm.

    There y is orthogonal to all directions in which f does not change: with `J^+ = J^T (J J^T)^-1`,

        c(y, x) = y - J^+ J y + J^+ (f(y) - x) = 0.

    g must return this y; the residual test looks. For a linear f, `dy = J^+ dx`; for others the curvature of f counts.
    f must be one that torch.func can differentiate.

    Example:
        >>> import torch
        >>> from backsolve import Dense, inverse
        >>> from backsolve.jacobians import MinimumNorm
        >>> A = torch.tensor([[3.0, 4.0]])
        >>> least = inverse(lambda y: y @ A.T, lambda x: x @ A / 25, event_dim=1, jacobian=Dense(gauge=MinimumNorm()))
        >>> x = torch.tensor([5.0], requires_grad=True)
        >>> least(x).sum().backward()
        >>> x.grad
        tensor([0.2800])
    """

    event_dim = 1
    has_log_det = False

    def conditions(self, f: Function) -> Function:
        """As above; J is n x m for each event."""

        def c(y: Tensor, x: Tensor, *params: Any, **kwargs: Any) -> Tensor:
            linearised: Any = torch.func.vjp(lambda y: f(y, *params, **kwargs), y)
            z, pull = linearised
            n, m = z.shape[-1], y.shape[-1]
            if n > m:
                raise errors.gauge_does_not_fit(m, n, 0)
            units = torch.eye(n, dtype=y.dtype, device=y.device).reshape(n, *(1,) * (y.dim() - 1), n)
            j = torch.vmap(pull)(units.expand(n, *z.shape))[0].movedim(0, -2)
            jy = (j @ y[..., None])[..., 0]
            weights = Factored(LU(), j @ j.mT).solve((jy - (z - x))[..., None])
            return y - (j.mT @ weights)[..., 0]

        return c


class _Subspace(Equations):
    """f maps a subspace of matrices to symmetric ones: equations in the lower triangle, the space in the upper one."""

    event_dim = 2
    has_log_det = True

    @abstractmethod
    def vanishing(self, y: Tensor) -> Tensor:
        """What is zero above the diagonal if y is in the subspace."""

    def conditions(self, f: Function) -> Function:
        """The symmetric part of `f(y) - x` below, the condition on y above the diagonal."""

        def c(y: Tensor, x: Tensor, *params: Any, **kwargs: Any) -> Tensor:
            difference = f(y, *params, **kwargs) - x
            return (0.5 * (difference + difference.mT)).tril() + self.vanishing(y).triu(1)

        return c


@dataclass(frozen=True)
class Symmetric(_Subspace):
    """y and `f(y) = x` are symmetric matrices, as for the square root or the logarithm of a covariance.

    Gradients with respect to x are symmetric; of an x that is not symmetric, its symmetric part is used. The
    log-determinant is that of the map between the lower triangles.

    Example:
        >>> import torch
        >>> from scipy.linalg import sqrtm
        >>> from backsolve import Dense, inverse
        >>> from backsolve.jacobians import Symmetric
        >>> from backsolve.solvers import numpy_solver
        >>> root = inverse(lambda y: y @ y, numpy_solver(sqrtm), event_dim=2, jacobian=Dense(subspace=Symmetric()))
        >>> x = torch.tensor([[4.0, 0.0], [0.0, 9.0]], dtype=torch.float64, requires_grad=True)
        >>> root(x).sum().backward()
        >>> x.grad
        tensor([[0.2500, 0.2000],
                [0.2000, 0.1667]], dtype=torch.float64)
    """

    def vanishing(self, y: Tensor) -> Tensor:
        """The antisymmetric part."""
        return y - y.mT


@dataclass(frozen=True)
class LowerTriangular(_Subspace):
    """y is a lower triangular matrix and `f(y) = x` a symmetric one, as for Cholesky's factor.

    Gradients with respect to x are symmetric; of an x that is not symmetric, its symmetric part is used. The
    log-determinant is that of the map between the lower triangles.

    Example:
        >>> import torch
        >>> from backsolve import Dense, inverse
        >>> from backsolve.jacobians import LowerTriangular
        >>> structure = Dense(subspace=LowerTriangular())
        >>> cholesky = inverse(lambda y: y @ y.mT, torch.linalg.cholesky, event_dim=2, jacobian=structure)
        >>> x = torch.tensor([[4.0, 2.0], [2.0, 5.0]], requires_grad=True)
        >>> cholesky(x)[1, 1].backward()
        >>> x.grad
        tensor([[ 0.0625, -0.1250],
                [-0.1250,  0.2500]])
    """

    def vanishing(self, y: Tensor) -> Tensor:
        """The other triangle."""
        return y
