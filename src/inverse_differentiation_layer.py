"""The original module of Jonathan Külz (MIT, 2024), on top of backsolve.

The same names do the same things, without the faults: g runs once, second derivatives are right or refused, a
singular Jacobian is an error, and tensors that f reads get their gradients. New code is better off with
`backsolve.inverse`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from backsolve import Dense, errors, inverse
from backsolve._solve import as_solution
from backsolve._torch import versions
from backsolve.linalg import LU, Factored
from backsolve.solvers import as_solver

__all__ = [
    "ImplicitInverseLayer",
    "ImplicitInverseLayerAuto",
    "ImplicitInverseLayerAutomatic",
    "ImplicitInverseLayerBase",
    "batch_jacobian",
    "implicit_inverse_layer",
]

Function = Callable[[Tensor], Tensor]


def implicit_inverse_layer(
    x: Tensor,
    inverse_func: Function,
    *,
    forward_func: Function | None = None,
    forward_jacobian: Tensor | None = None,
) -> Tensor:
    """Return `y = g(x)`, differentiable although autograd cannot see into g.

    By the inverse function theorem `dg/dx = J^-1` with `J = df/dy` at y, where `f(g(x)) = x`.

    Args:
        x: shape `(b, n)`.
        inverse_func: g, called once with a detached x; returns y of shape `(b, n)`.
        forward_func: f in torch, from `(b, n)` to `(b, n)`. Derivatives of any order, and gradients for every tensor
            that f reads.
        forward_jacobian: J at y, shape `(b, n, n)`, `J[b, i, j] = df_i / dy_j`, instead of f. First derivatives only.

    Raises:
        ValueError: both of forward_func and forward_jacobian are given, or neither.
        backsolve.BacksolveError: f(g(x)) is not x, J is singular, or a shape is wrong.

    Example:
        >>> data = torch.tensor([[0.0, 0.6]], dtype=torch.float64, requires_grad=True)
        >>> y = implicit_inverse_layer(data, torch.asin, forward_func=torch.sin)
        >>> torch.autograd.grad(y.sum(), data)[0]  # 1 / sqrt(1 - x^2)
        tensor([[1.0000, 1.2500]], dtype=torch.float64)
    """
    if forward_func is not None and forward_jacobian is not None:
        raise ValueError("implicit_inverse_layer got both forward_func and forward_jacobian: pass one of the two")
    if forward_func is not None:
        return ImplicitInverseLayerAutomatic.apply(x, inverse_func, forward_func)
    if forward_jacobian is not None:
        return ImplicitInverseLayer.apply(x, inverse_func, forward_jacobian)
    raise ValueError("implicit_inverse_layer got neither forward_func nor forward_jacobian: pass one of the two")


class ImplicitInverseLayerBase(torch.autograd.Function):
    """The common ancestor of the layers: the backward pass `w = J^-T v` for a given Jacobian."""

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Solve with the transpose of the saved Jacobian, which is a constant."""
        x, jacobian = ctx.saved_tensors
        matrix = jacobian.float() if jacobian.dtype in (torch.float16, torch.bfloat16) else jacobian
        factors = Factored(LU(), matrix)
        singular = factors.singular()
        if singular is not None and singular.any():
            index = tuple(int(i) for i in singular.nonzero()[0])
            numbers = errors.singular_values(jacobian[index])
            raise errors.singular(_CALL, "event", int(singular.sum()), len(jacobian), index, numbers)
        w = factors.solve(grads[0][..., None].to(matrix.dtype), adjoint=True)[..., 0].to(x.dtype)
        return _FirstDerivative.apply(w, x) if torch.is_grad_enabled() else w, None, None


class ImplicitInverseLayer(ImplicitInverseLayerBase):
    """`ImplicitInverseLayer.apply(x, inverse_func, forward_jacobian)`: g with J of shape `(b, n, n)`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, inverse_func: Function, forward_jacobian: Tensor) -> Tensor:
        """Run g and keep the Jacobian."""
        expected = (*x.shape, x.shape[-1])
        if tuple(forward_jacobian.shape) != expected or forward_jacobian.dtype != x.dtype:
            raise _bad_jacobian(
                f"shape (b, n, n) = {expected} and dtype {x.dtype} for x of shape {tuple(x.shape)}",
                errors.describe(forward_jacobian),
                "batch_jacobian(f, y) makes it; J[b, i, j] is df_i / dy_j of batch element b",
            )
        if forward_jacobian.requires_grad:
            raise _bad_jacobian(
                "a constant: no gradient flows to forward_jacobian",
                "a tensor that requires a gradient",
                "pass forward_func=f for gradients of its parameters, or forward_jacobian.detach() to do without",
            )
        before = versions([x])
        y = as_solution(_CALL, as_solver(inverse_func)(x.detach()), x)
        if versions([x]) != before:
            raise errors.solver_changed_input(_CALL, "x")
        if y.shape != x.shape:
            raise errors.bad_solver_output(
                _CALL, f"the shape of x, {tuple(x.shape)}", errors.describe(y), "let g return one y for each x"
            )
        ctx.save_for_backward(x, forward_jacobian)
        return y.clone()


class ImplicitInverseLayerAutomatic(ImplicitInverseLayerBase):
    """`ImplicitInverseLayerAutomatic.apply(x, inverse_func, forward_func)`: g with f; see `implicit_inverse_layer`."""

    @classmethod
    def apply(cls, x: Tensor, inverse_func: Function, forward_func: Function) -> Tensor:
        """Hand over to `backsolve.inverse` with a dense Jacobian for each row."""
        return inverse(forward_func, inverse_func, event_dim=1, jacobian=Dense())(x)


ImplicitInverseLayerAuto = ImplicitInverseLayerAutomatic


def batch_jacobian(func: Function, inputs: Tensor, reduce_with_sum: bool = True, **kwargs: Any) -> Tensor:
    """Return the Jacobian of func for each batch element, shape `(b, *out, *in)`.

    Args:
        func: from `(b, *in)` to `(b, *out)`, each row on its own.
        inputs: shape `(b, *in)`; the first dimension is the batch.
        reduce_with_sum: sum over the batch before differentiating, which is right if rows are independent and needs one
            backward pass for each output element. False differentiates each row against all rows and keeps the
            diagonal: b times the work, right for dependent rows too.
        **kwargs: those of torch.autograd.functional.jacobian (`create_graph`, `strict`, `vectorize`, `strategy`).

    Example:
        >>> batch_jacobian(torch.sin, torch.zeros(2, 1, dtype=torch.float64))
        tensor([[[1.]],
        <BLANKLINE>
                [[1.]]], dtype=torch.float64)
    """
    from torch.autograd.functional import jacobian

    if reduce_with_sum:
        summed = jacobian(lambda t: func(t).sum(0), inputs, **kwargs)  # (*out, b, *in)
        return summed.movedim(summed.dim() - inputs.dim(), 0)
    full = jacobian(func, inputs, **kwargs)  # (b, *out, b, *in)
    return full.diagonal(dim1=0, dim2=full.dim() - inputs.dim()).movedim(-1, 0)


class _FirstDerivative(torch.autograd.Function):
    """The identity on w, connected to x; its derivative is refused, as J is a constant where it should depend on x."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, x: Tensor) -> Tensor:
        return w.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        raise errors.constant_jacobian(_CALL)


def _bad_jacobian(expected: str, got: str, remedy: str) -> errors.ArgumentError:
    problem = "forward_jacobian cannot be used."
    return errors.ArgumentError(errors.document(_CALL, problem, expected=expected, got=got, remedy=remedy))


_CALL = "ImplicitInverseLayer"
