"""What a case consists of, and the comparison of its derivatives with the oracle's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from backsolve import Inverse
from tests.real_cases.oracle import Derivatives, exact


@dataclass(frozen=True)
class Case:
    """One inverse, and points to try it at.

    Attributes:
        title: the function and the package that it is from.
        inverse: f in torch, g from the package.
        forward: f in mpmath, `forward(y, *params)`, of one event; vectors and matrices are arrays of mpf.
        args: x and the params, each with the batch as its first dimension.
    """

    title: str
    inverse: Inverse
    forward: Callable[..., Any]
    args: tuple[Tensor, ...]


@dataclass(frozen=True)
class Measured:
    """The worst error among the entries of y, of its first derivatives, and of its second.

    Attributes:
        relative: relative to the entry itself.
        roundings: in units of what becomes of the entry when each argument, and y, is rounded once.
    """

    relative: tuple[float, ...]
    roundings: tuple[float, ...]


def measure(case: Case) -> Measured:
    """Compare backsolve's derivatives with the oracle's."""
    ours = differentiate(case)
    theirs = [_exact_sample(case, y, s) for s, y in enumerate(ours.value)]
    truth, condition = (map(np.stack, zip(*samples, strict=True)) for samples in zip(*theirs, strict=True))
    relative, roundings = [], []
    for mine, true, unit in zip(ours, truth, condition, strict=True):
        error = abs(mine - true)
        relative.append(_worst(error, abs(true)))
        roundings.append(_worst(error, unit * np.finfo(float).eps))
    return Measured(tuple(relative), tuple(roundings))


def differentiate(case: Case) -> Derivatives:
    """What backsolve gives: y and its derivatives by all arguments, (n, m), (n, m, k) and (n, m, k, k)."""
    args = [a.detach().clone().requires_grad_() for a in case.args]
    n = len(args[0])

    def gradients(columns: Tensor) -> Tensor:  # (n, m) -> (n, m, k)
        rows = []
        for column in columns.T:
            grads = torch.autograd.grad(column.sum(), args, create_graph=True, materialize_grads=True)
            rows.append(torch.cat([g.reshape(n, -1) for g in grads], 1))
        return torch.stack(rows, 1)

    value = case.inverse(*args).reshape(n, -1)
    first = gradients(value)
    second = gradients(first.reshape(n, -1)).reshape(*first.shape, -1)
    return Derivatives(*(t.detach().numpy() for t in (value, first, second)))


def _exact_sample(case: Case, y: np.ndarray, s: int) -> tuple[Derivatives, Derivatives]:
    """The oracle's derivatives and their conditions at the s-th point."""
    shapes = [a.shape[1:] for a in case.args]
    ends = np.cumsum([shape.numel() for shape in shapes])

    def equations(y: np.ndarray, z: np.ndarray) -> np.ndarray:
        parts = np.split(z, ends[:-1])
        x, *params = (_event(part.reshape(shape)) for part, shape in zip(parts, shapes, strict=True))
        return np.ravel(case.forward(_event(y.reshape(shapes[0])), *params) - x)

    return exact(equations, y, np.concatenate([a[s].numpy().ravel() for a in case.args]))


def _event(array: np.ndarray) -> Any:
    """A number for a 0-d array."""
    return array if array.ndim else array.item()


def _worst(error: np.ndarray, unit: np.ndarray) -> float:
    """The largest error in its unit; where the unit is nothing, so must the error be."""
    return float(np.max(np.divide(error, unit, out=np.where(error > 0, np.inf, 0.0), where=unit > 0)))
