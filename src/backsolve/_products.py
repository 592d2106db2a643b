"""J under torch.func and forward mode where it is never formed: its linear systems are inverse problems themselves.

`J^T w = v` is solved `concretely`, by a Krylov method on plain numbers with mapped dimensions as batch, and the
implicit rule is attached to w as to any y: its f is `w -> J^T w`, with y and the inputs of the original f as params. A
tangent solves `J u = t`, and f is `u -> J u`. The derivative of such a solve is another one with J or its transpose at
the same y, so that two functions serve all orders.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from backsolve import errors
from backsolve._arguments import Arguments
from backsolve._attach import Rule
from backsolve._functorch import depth_of_transforms, fold_batched_grads, is_grads_batched
from backsolve._levels import Mapping, Outputs, concretely
from backsolve._linearize import Forward, Linearization, Model, check_value, linearize
from backsolve._mapped import Mapped
from backsolve._torch import without_autocast
from backsolve.jacobians import Assembled, Jacobian, Linearized, MatrixFree, MatrixFreeAt, Trial

Attach = Callable[..., Tensor]  # attach(rule, forward, y, None, x, *inputs): y with the derivatives of the rule


@dataclass(frozen=True)
class Product(Jacobian):
    """The Jacobian of `u -> J u` or of `w -> J^T w`, J being that of another f at a y which is the first input.

    Attributes:
        original: how the other f is solved with.
        forward: the other f.
        transposed: whether it is `w -> J^T w`.
        trial: what is known of products with it, if nobody asked for them.
    """

    original: MatrixFree
    forward: Mapped
    transposed: bool
    trial: Trial | None = None

    def entries_shape(self, y: torch.Size, event_dim: int) -> torch.Size:
        """There are none."""
        raise NotImplementedError

    def assemble(self, at: Linearized) -> Assembled:
        """Never formed either."""
        return MatrixFreeAt(self.original, at, self.trial)

    def __call__(self, u: Tensor, y: Tensor, *inputs: Tensor) -> Tensor:
        """The product."""
        transposed: Callable[[Tensor], tuple[Tensor]] = torch.func.vjp(lambda y: self.forward(y, inputs), y)[1]
        if self.transposed:
            return transposed(u)[0]
        # J u is the transpose of v -> J^T v: torch refuses a jvp inside of forward-mode AD
        return torch.func.vjp(lambda v: transposed(v)[0], torch.zeros_like(u))[1](u)[0]


def linearize_again(rule: Rule, forward: Mapped, y: Tensor, values: Iterable[Tensor]) -> Linearization:
    """f at a plain y; refuse an f whose value is no longer one of the values, or that reads what nobody saw it read."""
    at = linearize(forward, y)
    for before in values:
        check_value(at, torch.where(y.isnan(), at.value, before.expand(y.shape)))
    if at.captures:
        what = f"a tensor that only autograd sees, {errors.describe(at.captures[0].tensor)}"
        raise errors.untraceable(rule.call, what)
    return at


def spoiled(result: Tensor, factor: Tensor | None, trailing_dims: int) -> Tensor:
    """The result times a factor for each event, which is NaN for those to spoil; None: for none of them."""
    return result if factor is None else result * factor.reshape(factor.shape + (1,) * trailing_dims)


def solve_by_products(
    rule: Rule, assembled: MatrixFreeAt, forward: Mapped, z: Tensor | None, b: Tensor, transposed: bool, attach: Attach
) -> Tensor:
    """`J^-1 b` or `J^-T b`, differentiable at every level in b, y and the inputs; failed events as the policy says.

    Args:
        rule: what happens to events that fail.
        assembled: J.
        forward: f.
        z: what f(y) was in the call, if f could have changed since.
        b: the right-hand side.
        transposed: whether to solve with `J^T`.
        attach: attaches a rule.
    """
    if is_grads_batched(b):

        def each(b: Tensor) -> Tensor:
            return solve_by_products(rule, assembled, forward, z, b, transposed, attach)

        return fold_batched_grads(torch.vmap(each, -1, -1), b)
    y, inputs, own = assembled.at.y, assembled.at.inputs, rule.jacobian
    if isinstance(own, Product):  # solve with the J behind it
        mapping, (y, *inputs) = forward.mapping, inputs
        y = mapping.fill(y, 0) if mapping else y
        forward, transposed = own.forward.within(mapping[1:], inputs), transposed != own.transposed
    u, factor = _solve(rule, assembled, forward, y, z, inputs, b, transposed)
    product, given = Product(assembled.options, forward, transposed, assembled.trial), (y, *inputs)
    model = Model(product, product, rule.event_dim, rule.call)
    own_forward = Mapped(Forward(model, Arguments(given, {}), False), (), Mapping(), given)
    own_rule = Rule(product, rule.event_dim, rule.on_failure, False, rule.call)
    u = attach(own_rule, own_forward, u, None, b, *given)
    return spoiled(u, factor, rule.event_dim)


def _solve(
    rule: Rule, assembled: MatrixFreeAt, forward: Mapped, y: Tensor, z: Tensor | None, inputs: Sequence[Tensor],
    b: Tensor, transposed: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The solution without a derivative, and a factor of NaN for the events to spoil, if there are any."""
    given = (y, b) if z is None else (y, b, z)
    n, twice = len(given), depth_of_transforms() > 1

    def run(plain: Sequence[Tensor], mapping: Mapping) -> Outputs:
        y, b, *values = (mapping.fill(t, k) for k, t in enumerate(plain[:n]))
        with without_autocast(y.device):
            at = linearize_again(rule, forward.within(mapping[n:], plain[n:]), y, values)
            here = MatrixFreeAt(assembled.options, at, assembled.trial)
            rule.examine(at, here, differentiated=twice)
            u = here.solve_transposed(b) if transposed else here.solve(b)
            if here.singular() is None:
                return [u, None]
            good = torch.ones(y.shape[: y.dim() - rule.event_dim], dtype=y.dtype, device=y.device)
            return [u, rule.spoil_singular(here, good, 0)]

    u, factor = concretely(run, (*given, *inputs))
    assert u is not None
    return u, factor
