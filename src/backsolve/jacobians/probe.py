"""The probe that finds a coupling which was declared absent, and reports none for an f that acts unit by unit.

If no unit of f(y) (an element, or an event) depends on another unit of y, then `J^T u` is given by the assembled J. One
Gaussian u screens for units where it is not (vectors of +-1 miss half of the single couplings: they cancel). Rounding
could explain a small difference, so each suspect is confirmed by an exact test: with u = 0 on a unit, `J^T u` on that
unit is a sum of zeros, exactly 0 in floating point, unless another unit reaches it. (An f that normalises by something
global and undoes it again does reach it, by rounding errors. It is reported, and needs `verify=False`.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from backsolve._random import gaussian_like
from backsolve.jacobians.base import Assembled, Linearized


def find_coupling(at: Linearized, assembled: Assembled, unit_dims: int) -> tuple[tuple[int, ...], float] | None:
    """Look for a unit of y that changes another unit of f(y).

    Args:
        at: f at y.
        assembled: J as the declared structure has it.
        unit_dims: the number of rightmost dimensions that form one unit; 0: each element.

    Returns:
        The index of the first such unit and the size of what reaches it, or None if there is none.
    """
    u = gaussian_like(at.y)
    off = (at.pull(u) - assembled.transposed_times(u)).abs() > assembled.rounding(u)  # NaN compares false
    suspects = _per_unit(off, unit_dims)
    ranks = suspects.flatten().cumsum(0).sub(1).reshape(suspects.shape)
    number = int(suspects.sum())
    # Two suspects differ in some bit of their ranks, so in some round one is silent while the other speaks.
    for bit in range((number - 1).bit_length() or 1 if number else 0):
        for side in (0, 1):
            silent = suspects & (ranks.bitwise_right_shift(bit).bitwise_and(1) == side)
            mask = silent.reshape(silent.shape + (1,) * unit_dims)
            leak = torch.where(mask, at.pull(u.masked_fill(mask, 0.0)), 0.0).abs().nan_to_num(0.0, 0.0, 0.0)
            if leak.any():
                first = tuple(int(i) for i in _per_unit(leak != 0, unit_dims).nonzero()[0])
                return first, leak[first].max().item()
    return None


def find_wrong_entries(at: Linearized, assembled: Assembled) -> tuple[tuple[int, ...], float, float] | None:
    """Compare J from the user's formula with the J of autograd, through one Gaussian cotangent.

    Returns:
        The index of the first element of `J^T u` that differs, its value by autograd and by the formula; None if
        none does.
    """
    u = gaussian_like(at.y)
    by_autograd, by_formula = at.pull(u), assembled.transposed_times(u)
    # Two formulas for one derivative agree to rounding, times whatever cancels in one of them: half of the digits
    # are granted.
    loose = assembled.rounding(u) / torch.finfo(u.dtype).eps ** 0.5
    wrong = (by_autograd - by_formula).abs() > loose
    if not wrong.any():
        return None
    first = tuple(int(i) for i in wrong.nonzero()[0])
    return first, by_autograd[first].item(), by_formula[first].item()


def find_lost_input(at: Linearized, assembled: Assembled) -> tuple[int, float, float] | None:
    """Compare how J from the user's formula depends on the params, and on what f closes over, with how autograd's does.

    `entries` that detach a param are right in value, and lose a term of each second derivative.

    Args:
        at: f at y, with the graph of the known entries.
        assembled: J of these entries.

    Returns:
        The number of the input of f whose derivative of `c . J^T u` differs, for Gaussian u and c, and the size of that
        derivative by autograd and by the formula; None if none does, or f's own cannot be had, or the formula reads
        tensors that f does not, from which these may have been made.
    """
    u, c = gaussian_like(at.y.detach().expand(2, *at.y.shape))
    inputs = [t for t in at.inputs if t.requires_grad]
    if not inputs or not at.y.numel():
        return None
    try:
        with torch.enable_grad():
            terms = [(c * product).real for product in (at.pull(u), assembled.transposed_times(u))]
            by_autograd, by_formula = (_slopes(t.sum(), inputs) for t in terms)
    except RuntimeError:  # a backward that is not differentiable
        return None
    eps, size = torch.finfo(u.dtype).eps, terms[0].detach().abs().sum()
    found = None
    for number, (t, one, other) in enumerate(zip(inputs, by_autograd, by_formula, strict=True)):
        off, reach = (one - other).abs(), torch.where(t == 0, 1.0, t.detach().abs())
        # Half of the digits of the derivative, and no less than the rounding of the terms explains.
        differs = (off > eps**0.25 * torch.maximum(one.abs(), other.abs())) & (off * reach > eps**0.75 * size)
        if not differs.any():  # NaN compares false
            continue
        if not (differs & (one.abs() > eps**0.25 * off)).any():  # the formula reads this in the place of another tensor
            return None
        first = tuple(differs.nonzero()[0])
        found = found or (number, one[first].item(), other[first].item())
    return found


def _slopes(total: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
    if not total.requires_grad:
        return [torch.zeros_like(t) for t in inputs]
    return list(torch.autograd.grad(total, inputs, retain_graph=True, materialize_grads=True))


_EXAMINED, _AT_ONCE = 64, 8


def find_outside(at: Linearized, assembled: Assembled, reaches: Callable[[Tensor, Tensor], Tensor]) -> str | None:
    """Look for an entry of J outside of the declared pattern, within an event.

    One Gaussian cotangent screens as in `find_coupling`. A suspected column of J is confirmed by a cotangent that is
    zero on all the rows which the column may reach: what is left of it there comes from other rows. The worst suspects
    are examined.

    Args:
        at: f at y.
        assembled: J as the declared structure has it.
        reaches: for columns `(k, 1)` and rows `(n,)`, which rows of J may have an entry in which column.

    Returns:
        What was found, in words; None if there is nothing.
    """
    n = math.prod(at.y.shape[at.y.dim() - at.event_dim :])
    if not at.y.numel():
        return None
    u = gaussian_like(at.y)
    rounding = assembled.rounding(u)
    excess = (at.pull(u) - assembled.transposed_times(u)).abs() / rounding
    if not (excess > 1).any():  # NaN compares false
        return None
    worst = excess.nan_to_num(0.0, torch.inf).reshape(-1, n).amax(0).topk(min(_EXAMINED, n))
    rows = torch.arange(n, device=u.device)
    for columns in worst.indices[worst.values > 1].split(_AT_ONCE):
        batch = u.dim() - at.event_dim
        silent = reaches(columns[:, None], rows).reshape(-1, *(1,) * batch, *u.shape[batch:])
        leaks = at.pull_many(torch.where(silent, 0.0, u)).abs()
        for column, leak in zip(columns.tolist(), leaks, strict=True):
            found = (leak > rounding).reshape(-1, n)[:, column]
            if found.any():
                size = leak.reshape(-1, n)[:, column].max().item()
                return f"element {column} of y changes elements of f(y) outside of that: the probe found {size:.3g}"
    return None


def _per_unit(mask: Tensor, unit_dims: int) -> Tensor:
    return mask.flatten(-unit_dims).any(-1) if unit_dims else mask
