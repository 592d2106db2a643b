"""What is asked of J and what it cannot give: a square matrix, an inverse, a solution, a derivative."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from backsolve.errors.exceptions import (
    ConvergenceError,
    DerivativeError,
    ForwardOutputError,
    SingularJacobianError,
    StructureError,
)
from backsolve.errors.layout import count, document


def not_square(call: str, y_shape: Sequence[int], z_shape: Sequence[int]) -> ForwardOutputError:
    """f maps events of one size to events of another: J is not square."""
    return ForwardOutputError(
        document(
            call,
            "J = df/dy is not square.",
            expected=f"f(y) with the event shape of y, {tuple(y_shape)}",
            got=f"f(y) with the event shape {tuple(z_shape)}",
            remedy="f alone does not determine dg then. With fewer equations than unknowns, many g satisfy f(g(x)) = "
            "x, with different derivatives: say which is yours, jacobian=Dense(gauge=MinimumNorm()) or "
            "Dense(gauge=Constrained(h)) of backsolve.jacobians. With more, only some x have a y",
        )
    )


def gauge_does_not_fit(unknowns: int, equations: int, constraints: int) -> ForwardOutputError:
    """f and its gauge do not have as many equations as there are unknowns."""
    return ForwardOutputError(
        document(
            "Dense(gauge=...)",
            "f and the gauge together must have as many equations as unknowns.",
            expected=f"{unknowns} equations for the {unknowns} elements of an event of y",
            got=f"{equations} from f and {constraints} from the gauge",
            remedy="let h return one number for each equation that f lacks",
        )
    )


def no_square_map(call: str, claim: Any) -> DerivativeError:
    """Something was asked for that only a map between spaces of one dimension has."""
    return DerivativeError(
        document(
            call,
            "there is no square dy/dx.",
            expected="x and y with equally many coordinates",
            got=f"jacobian={claim!r}",
            remedy="use torch.func.jacrev or torch.autograd.functional.jacobian for dy/dx; it has no determinant",
        )
    )


def singular(
    call: str, noun: str, failed: int, total: int, index: tuple[int, ...], numbers: str
) -> SingularJacobianError:
    """J has no inverse in some events."""
    return SingularJacobianError(
        document(
            call,
            "J = df/dy is singular, so dg/dx = J^-1 does not exist.",
            expected=f"an invertible J in every {noun}",
            got=f"{count(failed, total, noun)} singular, the first at index {index}: {numbers}",
            remedy='keep x away from such points, or choose on_failure="nan" to lose only these derivatives',
        )
    )


def singular_values(matrix: Any) -> str:
    """How near a matrix is to a singular one, for a message."""
    values = matrix.detach().nan_to_num().svd().S
    return f"the singular values of J reach from {values[0].item():.3g} down to {values[-1].item():.3g}"


def indefinite(index: tuple[int, ...], lowest: float, highest: float) -> StructureError:
    """A J that was declared positive definite has a negative eigenvalue."""
    return StructureError(
        document(
            "Dense(positive_definite=True)",
            "J is not positive definite.",
            expected="only positive eigenvalues in every event",
            got=f"eigenvalues from {lowest:.3g} to {highest:.3g} at index {index}",
            remedy="use Dense(), or Dense(positive_definite=True) for -f if J is negative definite",
        )
    )


def negative_curvature(index: tuple[int, ...]) -> StructureError:
    """Conjugate gradients met a direction of negative curvature."""
    return StructureError(
        document(
            "MatrixFree('cg')",
            "J is not positive definite.",
            expected="p . J p > 0 for every direction p, in every event",
            got=f"a direction with p . J p < 0 at index {index}",
            remedy="use MatrixFree('gmres'), or the negative of f if J is negative definite",
        )
    )


def krylov(
    method: str, failed: int, total: int, index: tuple[int, ...], residual: float, products: int
) -> ConvergenceError:
    """A Krylov method did not solve the linear system of a derivative."""
    return ConvergenceError(
        document(
            f"MatrixFree({method!r})",
            "the linear system of a derivative, J^T w = v or J u = b, is not solved.",
            expected="a relative residual of at most rtol, or of the rounding errors of a direct solver",
            got=f"{count(failed, total, 'event')} not converged after {products} products with J, the first at index "
            f"{index}: a relative residual of {residual:.3g}",
            remedy="raise maxiter or restart, pass a preconditioner, or say what solves instead: fallback=Dense(). A "
            "singular J has no solution at all",
        )
    )


def ill_conditioned(
    method: str, failed: int, total: int, index: tuple[int, ...], condition: float, limit: float
) -> ConvergenceError:
    """A Krylov space showed J to be worse conditioned than is believed."""
    return ConvergenceError(
        document(
            f"MatrixFree({method!r})",
            "J is ill-conditioned: a solution with a small residual may be far off.",
            expected=f"a condition of J of at most max_condition = {limit:g}",
            got=f"{count(failed, total, 'event')} refused, the first at index {index}: a condition of {condition:.3g}, "
            "as far as it was seen",
            remedy="pass a preconditioner, say what solves instead: fallback=Dense(), or raise max_condition with a "
            "smaller rtol",
        )
    )


def needs_matrix(
    purpose: str,
    n: int,
    limit: int,
    structure: str = "MatrixFree()",
    remedy: str = "declare a structure that has it (Banded, Triangular, Diagonal), or Dense() if the memory is there",
) -> StructureError:
    """Something that takes all of J was asked for, and J is too large to be formed."""
    return StructureError(
        document(
            structure,
            f"{purpose} needs all of J.",
            expected=f"events of at most {limit} elements, for which J is formed",
            got=f"events of {n} elements",
            remedy=remedy,
        )
    )


def constant_jacobian(call: str) -> DerivativeError:
    """A second derivative was asked for, but J is a given constant."""
    return DerivativeError(
        document(
            call,
            "a second derivative needs dJ/dy, and forward_jacobian is a constant.",
            expected="forward_func=f, from which J and its derivatives follow",
            got="a bare forward_jacobian tensor, which fixes the first derivative only",
            remedy="pass forward_func=f instead, or differentiate once",
        )
    )
