"""What became of a case: right, refused, or silently wrong."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from backsolve import BacksolveError
from backsolve.solvers import numpy_solver

Must = Literal["right", "refused"]
Function = Callable[..., Tensor]


@dataclass(frozen=True)
class Case:
    """One hostile situation.

    Attributes:
        name: what is hostile about it.
        must: how it must end. "right" leaves no way out; "refused" is for what has no right answer, or none that can
            be had, and means `error`.
        run: returns pairs of what backsolve gave and what is true.
        error: the error that counts as refusal: backsolve's, or torch's own for what torch itself forbids.
        match: words that the message must contain.
    """

    name: str
    must: Must
    run: Callable[[], Sequence[tuple[Tensor, Tensor]]]
    error: type[Exception] = BacksolveError
    match: str = ""

    def __str__(self) -> str:
        return self.name


def outcome(case: Case) -> str:
    """Run a case and say how it ended: "right", "refused", "silent: ..." or "crash: ..."."""
    try:
        pairs = case.run()
    except case.error as error:
        return "refused" if case.match in str(error) else f"crash: another message: {error}"
    except Exception as error:  # noqa: BLE001 (an error that nobody meant to raise)
        return f"crash: {type(error).__name__}: {error}"
    assert pairs, "a case that compares nothing proves nothing"
    wrong = [text for pair in pairs if (text := difference(*pair))]
    return f"silent: {wrong[0]}" if wrong else "right"


def difference(actual: Tensor, exact: Tensor, size: float = 0.0) -> str:
    """What differs; nothing if they agree to 512 units in the last place of the largest element, or of that size."""
    if actual.shape != exact.shape:
        return f"shapes {tuple(actual.shape)}, {tuple(exact.shape)}"
    if not actual.numel():
        return ""
    actual, rtol = actual.detach().double(), 512 * torch.finfo(actual.dtype).eps
    exact = exact.detach().double()
    same = (actual == exact) | (actual.isnan() & exact.isnan())
    off = torch.where(same, 0.0, (actual - exact).abs())
    scale = exact.abs().nan_to_num(0.0, 0.0, 0.0).max()
    return "" if bool((off <= rtol * scale.clamp(min=size)).all()) else f"{actual.tolist()} for {exact.tolist()}"


def derivatives(function: Function, *inputs: Tensor, order: int = 2) -> list[Tensor]:
    """The value, and the gradients by all inputs of weighted sums, up to an order.

    The first ones twice, without a graph and with one: these are two ways through the code.
    """
    leaves = [t.detach().requires_grad_() for t in inputs]
    results = [function(*leaves)]
    found = list(results)
    for create_graph in [False] * (order > 0) + [True] * (order if order > 1 else 0):
        total = sum((weights(t) * t).sum() for t in results)
        grads: Sequence[Tensor | None] = [None] * len(leaves)
        if total.requires_grad:
            grads = torch.autograd.grad(total, leaves, retain_graph=True, create_graph=create_graph, allow_unused=True)
        grads = [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(grads, leaves, strict=True)]
        found += grads
        if create_graph:
            results = grads
    return found


def weights(t: Tensor) -> Tensor:
    """Different weights for all elements, so that no two errors cancel."""
    return torch.linspace(0.5, 1.5, t.numel(), dtype=t.dtype).reshape(t.shape) if t.numel() > 1 else torch.ones_like(t)


def compare(actual: Function, exact: Function, *inputs: Tensor, order: int = 2) -> list[tuple[Tensor, Tensor]]:
    """The value and all derivatives of both, side by side."""
    pairs = zip(derivatives(actual, *inputs, order=order), derivatives(exact, *inputs, order=order), strict=True)
    return list(pairs)


def tensor(*values: float, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(values, dtype=dtype)


# ---- the function of most cases: w (y + y^3) = x -------------------------------------------------------------------


def cubic(y: Tensor, w: Any = 2.0) -> Tensor:
    return w * (y + y**3)


def cubic_root(x: Any, w: Any = 2.0, m: Any = torch) -> Any:
    """The inverse of `cubic` in closed form; m is numpy or torch."""
    return 2 / math.sqrt(3) * m.sinh(m.arcsinh(1.5 * math.sqrt(3) * x / w) / 3)


BLACK_BOX = numpy_solver(lambda x, w=2.0: cubic_root(x, w, np))
X = tensor(0.3, 1.2, -2.0)
W = tensor(1.5)[0]
