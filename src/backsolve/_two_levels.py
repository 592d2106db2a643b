"""The derivative of the implicit rule's gradients along a tangent, as forward mode over reverse mode asks for it.

That is what `torch.func.hessian` is, and a Hessian-vector product by `jvp(grad)`. A level of jvp lies beneath the level
of grad. The gradients are worked out on plain tensors from the graph that the call stored, and with a graph of their
own, from which their derivative along the tangents follows: it is the transpose of the map from their cotangents to
those of y, v and the inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from backsolve._functorch import Beneath, over_first_dims
from backsolve._levels import Plain, dress, split
from backsolve._linearize import gradients
from backsolve._torch import GradMode, gradient_edge

Gradients = Sequence[Tensor | None]


def pull_along_tangents(
    pull: Callable[[Tensor, int], Gradients],
    leaves: Sequence[Tensor],
    tensors: Sequence[Tensor],
    v: Tensor,
    level: int,
    outer: Sequence[int],
    leading: Sequence[Sequence[int]],
    sizes: dict[int, int],
) -> list[Tensor | None] | None:
    """The gradients, as tensors of the level of jvp with their tangents.

    Args:
        pull: gives the gradients for a plain v with some more dimensions on the left, differentiable in `leaves`.
        leaves: those that stand for y and the inputs of f.
        tensors: y and the inputs, wrapped.
        v: the cotangent of y, wrapped.
        level: the one of jvp.
        outer: the levels of vmap whose dimensions y has on the left.
        leading: the same for each leaf.
        sizes: those of the levels' dimensions.

    Returns:
        The gradients; None if something else is differentiated, too, or the mapped dimensions are intertwined: these
        need rules that compose.
    """
    *of_leaves, (v_primal, v_tangent) = (split(t, level) for t in (*tensors, v))
    tangents = [tangent for _, tangent in of_leaves]
    for part in (v_primal, v_tangent, *tangents):
        if part is not None and (part.wrapped or part.tensor.requires_grad):
            return None
    along = sorted({n for t in tangents if t is not None for n in t.levels if n not in outer})
    of_both = {*v_primal.levels, *(() if v_tangent is None else v_tangent.levels)}
    extra = sorted(n for n in of_both if n not in outer and n not in along)
    if set(v_primal.levels) & set(along) or any(n > level for n in along):
        return None
    sizes = dict(sizes)
    for part in (v_primal, v_tangent, *tangents):
        sizes.update({} if part is None else part.sizes)
    order = [*extra, *outer]
    with Beneath(), GradMode(True):
        v_leaf = v_primal.spread(order, sizes).detach().requires_grad_()
        results = pull(v_leaf, len(extra))
        directions = [
            None if t is None else t.spread([*along, *own], sizes) for t, own in zip(tangents, leading, strict=True)
        ]
        directions.append(None if v_tangent is None else v_tangent.spread([*along, *order], sizes))
        pushed = iter(_push(results, [*leaves, v_leaf], directions, len(along)))
        moved = [None if r is None or not r.requires_grad else next(pushed) for r in results]
        values = [None if r is None else r.detach() for r in results]
    return [
        None if r is None else _dual(Plain(r, order), _plain(t, [*along, *order]), level, sizes)
        for r, t in zip(values, moved, strict=True)
    ]


def _plain(tensor: Tensor | None, levels: Sequence[int]) -> Plain | None:
    return None if tensor is None else Plain(tensor, levels)


def _push(
    results: Gradients, leaves: Sequence[Tensor], directions: Sequence[Tensor | None], number: int
) -> Sequence[Tensor | None]:
    """The derivatives along the directions, which have some more dimensions; None for what does not change."""
    live = [r for r in results if r is not None and r.requires_grad]
    edges = tuple(gradient_edge(r) for r in live)
    cotangents = [torch.zeros_like(r, requires_grad=True) for r in live]
    chosen = [leaf if d is not None else None for leaf, d in zip(leaves, directions, strict=True)]
    pulled = gradients(edges, chosen, tuple(cotangents))
    pairs = [(p, d) for p, d in zip(pulled, directions, strict=True) if p is not None and d is not None]
    pairs = [(p, d) for p, d in pairs if p.requires_grad]
    starts = tuple(gradient_edge(p) for p, _ in pairs)

    def transposed(*directions: Tensor) -> list[Tensor]:
        found = gradients(starts, cotangents, directions)
        return [torch.zeros_like(c) if r is None else r for r, c in zip(found, cotangents, strict=True)]

    with GradMode(False):
        if not pairs:
            return [None for _ in cotangents]
        return over_first_dims(number, transposed, [d for _, d in pairs])


def _dual(primal: Plain, tangent: Plain | None, level: int, sizes: dict[int, int]) -> Tensor:
    """A tensor of the level of jvp; further levels map it from outside of that."""
    inside = [n for n in sorted(primal.levels) if n > level]
    parts: list[Tensor] = []
    for part in (primal, tangent):
        if part is not None:
            outside = [n for n in sorted(part.levels) if n < level]
            with Beneath():
                plain = part.spread([*outside, *inside], sizes)
            parts.append(dress(plain, outside))
    if tangent is None:
        return dress(parts[0], inside)
    with Beneath(level):
        dual = forward_ad.make_dual(*parts)
    return dress(dual, inside)
