"""Random problems with random faults: what hypothesis draws, and the functions that follow from it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from backsolve import Banded, Dense, Diagonal, Inverse, MatrixFree, Triangular, inverse


@dataclass(frozen=True)
class Situation:
    """What hypothesis draws; the numbers come from the seed."""

    seed: int
    batch: tuple[int, ...]
    param_batch: tuple[int, ...]
    strides: str
    held: str
    fault: str
    on_failure: str
    refine: int
    wanted: tuple[bool, bool]
    structure: str
    n: int
    quantity: str
    knows_event_dims: bool
    transforms: tuple[str, ...]

    def random(self, *shape: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed + len(shape) + sum(shape))
        return torch.rand(shape, dtype=torch.float64, generator=generator)

    def laid_out(self, t: Tensor) -> Tensor:
        """The same values in other memory."""
        if self.strides == "reversed" and t.dim() > 1:
            return t.permute(*range(t.dim() - 1, -1, -1)).contiguous().permute(*range(t.dim() - 1, -1, -1))
        if self.strides == "every second" and t.dim():
            return torch.repeat_interleave(t, 2, -1)[..., ::2]
        return t


def broadcastable(batch: tuple[int, ...]) -> st.SearchStrategy[tuple[int, ...]]:
    """Shapes that broadcast with a batch without making it larger."""
    return st.integers(0, len(batch)).flatmap(
        lambda cut: st.tuples(*(st.sampled_from([n, 1]) for n in batch[cut:])).map(tuple)
    )


@st.composite
def situations(
    draw: Callable[[Any], Any],
    structures: tuple[str, ...],
    faults: tuple[str, ...],
    transforms: tuple[str, ...] = (),
    size: int = 4,
) -> Situation:
    batch = draw(st.lists(st.integers(0, size), max_size=size - 1).map(tuple))
    return Situation(
        seed=draw(st.integers(0, 10**6)),
        batch=batch,
        param_batch=draw(broadcastable(batch)),
        strides=draw(st.sampled_from(["plain", "reversed", "every second"])),
        held=draw(st.sampled_from(["param", "keyword", "pytree", "closure", "closure with a history"])),
        fault=draw(st.sampled_from(faults)),
        on_failure=draw(st.sampled_from(["raise", "nan"])),
        refine=draw(st.integers(0, 2)),
        wanted=draw(st.sampled_from([(True, True), (True, False), (False, True)])),
        structure=draw(st.sampled_from(structures)),
        n=draw(st.integers(1, size + 2)),
        knows_event_dims=draw(st.booleans()),
        quantity=draw(st.sampled_from(["y", "y", "log_det", "jacobian"])),
        transforms=tuple(draw(st.lists(st.sampled_from(transforms), min_size=1, max_size=3))) if transforms else (),
    )  # fmt: skip


# ---- the two families ---------------------------------------------------------------------------------------------


class Family(NamedTuple):
    """f and x, p; and in closed form, by torch or numpy, the y, log|det dy/dx| or dy/dx of `f(y, p) = x`."""

    f: Any
    exact: dict[str, Any]
    x: Tensor
    p: Tensor
    event_dim: int


def elementwise(s: Situation) -> Family:
    """y + p y^3 = x with p > 0; x away from 0, so that y^3 matters."""
    x = (s.random(*s.batch) + 0.7) * torch.sign(s.random(*s.batch, 1)[..., 0] - 0.5)
    p = s.random(*s.param_batch) + 0.5

    def root(x: Any, p: Any, m: Any = torch) -> Any:
        return 2 / m.sqrt(3 * p) * m.sinh(m.arcsinh(1.5 * x * m.sqrt(3 * p)) / 3)

    def slope(x: Tensor, p: Tensor) -> Tensor:
        return 1 / (1 + 3 * p * root(x, p) ** 2)

    def f(y: Tensor, p: Tensor) -> Tensor:
        cubed = y.detach() ** 3 if s.fault == "detach" else y**3
        return faulty(s, y, y + p * cubed, root(x, p), 0)

    exact = {"y": root, "jacobian": slope, "log_det": lambda x, p: slope(x, p).log()}
    return Family(f, exact, s.laid_out(x), s.laid_out(p), 0)


def mixing(s: Situation) -> Family:
    """A matrix times sinh(y) is x."""
    i, j = np.indices((s.n, s.n))
    mask = {"Triangular": i >= j, "Banded": abs(i - j) <= 1}.get(s.structure, i >= 0)
    where = torch.from_numpy(mask.astype(float))
    x = s.random(*s.batch, s.n) + 0.7
    p = 2 * torch.eye(s.n, dtype=torch.float64) + 0.6 * s.random(*s.param_batch, s.n, s.n) / s.n

    def linear(x: Any, p: Any, m: Any = torch) -> Any:
        inverted = m.linalg.inv(p * (where if m is torch else where.numpy()))  # torch's solve is wrong in some vmaps
        return (inverted @ x[..., None])[..., 0]

    def root(x: Any, p: Any, m: Any = torch) -> Any:
        return m.arcsinh(linear(x, p, m))

    def jacobian(x: Tensor, p: Tensor) -> Tensor:
        return torch.linalg.inv(p * where) / (1 + linear(x, p) ** 2).sqrt()[..., None]

    def log_det(x: Tensor, p: Tensor) -> Tensor:
        return -(1 + linear(x, p) ** 2).log().sum(-1) / 2 - log_abs_det(p * where)

    def f(y: Tensor, p: Tensor) -> Tensor:
        seen = torch.sinh(y.detach()) + y - y.detach() if s.fault == "detach" else torch.sinh(y)
        return faulty(s, y, ((p * where) @ seen[..., None])[..., 0], root(x, p), 1)

    return Family(f, {"y": root, "jacobian": jacobian, "log_det": log_det}, s.laid_out(x), s.laid_out(p), 1)


def log_abs_det(a: Tensor) -> Tensor:
    """By elimination without pivots, for a dominant diagonal: torch's own is wrong under grad(jvp)."""
    pivot = a[..., 0, 0]
    rest = a[..., 1:, 1:] - a[..., 1:, :1] * a[..., :1, 1:] / pivot[..., None, None]
    return pivot.abs().log() + (log_abs_det(rest) if rest.shape[-1] else 0)


def faulty(s: Situation, y: Tensor, z: Tensor, solution: Tensor, event_dim: int) -> Tensor:
    """Plant a fault that leaves f(y) as it is at the solution."""
    batch = tuple(range(y.dim() - event_dim))
    if "coupling" in s.fault and math.prod(y.shape[: len(batch)]) > 1 and y.numel():
        seen = y.detach() if s.fault == "hidden coupling" else y
        return z + 0.2 * (seen.mean(batch) - solution.detach().mean(batch))
    if s.fault == "scaled J" and z.requires_grad:
        z.register_hook(lambda v: 1.01 * v)
    return z


# ---- the Inverse --------------------------------------------------------------------------------------------------

STRUCTURES = {"Diagonal": Diagonal(), "Dense": Dense(), "Triangular": Triangular(), "Banded": Banded(1, 1),
              "MatrixFree": MatrixFree(fallback=Dense()), "default": None}  # fmt: skip


def actual(s: Situation, family: Family, g: Any) -> Any:
    """What backsolve makes of f and g, as a function of x and p, with p given in one of many ways."""
    f, k = family.f, family.event_dim
    options: dict[str, Any] = {
        "event_dim": k,
        "jacobian": STRUCTURES[s.structure],
        "on_failure": s.on_failure,
        "refine": 0 if "wrong" in s.fault else s.refine,
    }
    if s.held == "keyword":
        known = {"p": 2 * k} if s.knows_event_dims else None
        inv = inverse(lambda y, *, p: f(y, p), lambda x, *, p: g(x, p), param_event_dims=known, **options)
        return lambda x, p: asked(s, inv, x, p=p)
    if s.held.startswith("closure"):

        def closing(x: Tensor, p: Tensor) -> Tensor:
            read = p * 1.0 if "history" in s.held else p
            return asked(s, inverse(lambda y: f(y, read), lambda x: g(x, p.detach()), **options), x)

        return closing
    options["param_event_dims"] = (2 * k,) if s.knows_event_dims else None
    if s.held == "pytree":
        inv = inverse(lambda y, o: f(y, o["p"][0]), lambda x, o: g(x, o["p"][0]), **options)
        return lambda x, p: asked(s, inv, x, {"p": [p, "text"]})
    inv = inverse(f, g, **options)
    return lambda x, p: asked(s, inv, x, p)


def asked(s: Situation, inv: Inverse, x: Tensor, *params: Any, **kwargs: Any) -> Tensor:
    """The drawn quantity."""
    if s.quantity == "y":
        return inv(x, *params, **kwargs)
    if s.quantity == "jacobian":
        return inv.jacobian(x, *params, **kwargs)
    return inv.with_log_det(x, *params, **kwargs)[1]
