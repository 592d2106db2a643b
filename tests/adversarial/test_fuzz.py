"""Random problems with random faults. A sound one must be right to second order, a faulty one right or refused.

By default a fixed set of examples, for some seconds. `make fuzz` draws new ones for BACKSOLVE_FUZZ_SECONDS.
"""

from __future__ import annotations

import math
import os
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from backsolve import BacksolveError, Banded, Dense, Diagonal, MatrixFree, Triangular, inverse
from backsolve.solvers import numpy_solver
from tests.adversarial.outcome import derivatives, difference

SECONDS = float(os.environ.get("BACKSOLVE_FUZZ_SECONDS", "0"))
EXAMPLES = 120  # of each property when there is no time given

Family = tuple[Any, Any, Tensor, Tensor, int]  # f, its inverse in closed form, x, p, event_dim
FAULTS = ("none", "none", "none", "detach", "coupling", "hidden coupling", "wrong g", "some wrong g", "NaN", "scaled J")


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
def situations(draw: Callable[[Any], Any], structures: tuple[str, ...]) -> Situation:
    batch = draw(st.lists(st.integers(0, 4), max_size=3).map(tuple))
    return Situation(
        seed=draw(st.integers(0, 10**6)),
        batch=batch,
        param_batch=draw(broadcastable(batch)),
        strides=draw(st.sampled_from(["plain", "reversed", "every second"])),
        held=draw(st.sampled_from(["param", "keyword", "pytree", "closure", "closure with a history"])),
        fault=draw(st.sampled_from(FAULTS)),
        on_failure=draw(st.sampled_from(["raise", "nan"])),
        refine=draw(st.integers(0, 2)),
        wanted=draw(st.sampled_from([(True, True), (True, False), (False, True)])),
        structure=draw(st.sampled_from(structures)),
        n=draw(st.integers(1, 6)),
    )  # fmt: skip


# ---- the two families ---------------------------------------------------------------------------------------------


def elementwise(s: Situation) -> Family:
    """y + p y^3 = x with p > 0, in closed form; x away from 0, so that y^3 matters."""
    x = (s.random(*s.batch) + 0.7) * torch.sign(s.random(*s.batch, 1)[..., 0] - 0.5)
    p = s.random(*s.param_batch) + 0.5

    def root(x: Any, p: Any, m: Any = torch) -> Any:
        return 2 / m.sqrt(3 * p) * m.sinh(m.arcsinh(1.5 * x * m.sqrt(3 * p)) / 3)

    def f(y: Tensor, p: Tensor) -> Tensor:
        cubed = y.detach() ** 3 if s.fault == "detach" else y**3
        return faulty(s, y, y + p * cubed, root(x, p), 0)

    return f, root, s.laid_out(x), s.laid_out(p), 0


def mixing(s: Situation) -> Family:
    """A matrix times sinh(y) is x."""
    i, j = np.indices((s.n, s.n))
    mask = {"Triangular": i >= j, "Banded": abs(i - j) <= 1}.get(s.structure, i >= 0)
    where = torch.from_numpy(mask.astype(float))
    x = s.random(*s.batch, s.n) + 0.7
    p = 2 * torch.eye(s.n, dtype=torch.float64) + 0.6 * s.random(*s.param_batch, s.n, s.n) / s.n

    def g(x: Any, p: Any, m: Any = torch) -> Any:
        matrix = p * (where if m is torch else where.numpy())
        return m.arcsinh(m.linalg.solve(matrix, x[..., None])[..., 0])

    def f(y: Tensor, p: Tensor) -> Tensor:
        seen = torch.sinh(y.detach()) + y - y.detach() if s.fault == "detach" else torch.sinh(y)
        return faulty(s, y, ((p * where) @ seen[..., None])[..., 0], g(x, p), 1)

    return f, g, s.laid_out(x), s.laid_out(p), 1


def faulty(s: Situation, y: Tensor, z: Tensor, solution: Tensor, event_dim: int) -> Tensor:
    """Plant a fault that leaves f(y) as it is at the solution."""
    batch = tuple(range(y.dim() - event_dim))
    if "coupling" in s.fault and math.prod(y.shape[: len(batch)]) > 1 and y.numel():
        seen = y.detach() if s.fault == "hidden coupling" else y
        return z + 0.2 * (seen.mean(batch) - solution.detach().mean(batch))
    if s.fault == "scaled J" and z.requires_grad:
        z.register_hook(lambda v: 1.01 * v)
    return z


STRUCTURES = {"Diagonal": Diagonal(), "Dense": Dense(), "Triangular": Triangular(), "Banded": Banded(1, 1),
              "MatrixFree": MatrixFree(fallback=Dense()), "default": None}  # fmt: skip


def check(s: Situation, family: Callable[[Situation], Family]) -> str:
    """Run one situation: "right" or "refused", or an AssertionError."""
    f, root, x, p, event_dim = family(s)
    batch = x.shape[: x.dim() - event_dim]
    wrong = torch.zeros(batch, dtype=torch.bool)
    if s.fault in ("wrong g", "NaN"):
        wrong[...] = True
    elif s.fault == "some wrong g" and wrong.numel():
        wrong.view(-1)[:: max(1, wrong.numel() // 2)] = True
    spoil = wrong.reshape(wrong.shape + (1,) * event_dim)

    def g(x: Any, p: Any) -> Any:
        y = root(x, p, np)
        return np.where(spoil.numpy(), np.nan if s.fault == "NaN" else y * 1.01, y)

    options = {"event_dim": event_dim, "on_failure": s.on_failure, "refine": 0 if "wrong" in s.fault else s.refine}
    actual = held(s, f, g, {**options, "jacobian": STRUCTURES[s.structure]})
    try:
        ours = compare_wanted(s, actual, x, p)
    except BacksolveError:
        if s.fault == "none":
            raise
        return "refused"
    exact = compare_wanted(s, root, x, p)
    size = max((t.abs().max().item() for t in exact if t.numel()), default=0.0)  # second derivatives cancel to any size
    for mine, right in zip(ours, exact, strict=True):
        if s.on_failure == "nan" and wrong.any():
            keep = ~spoil.expand_as(x)
            if mine.shape == x.shape and mine.dim():
                mine, right = mine[keep], right[keep]
            else:
                continue  # a sum over events of which some are NaN
        assert not (text := difference(mine, right, size)), f"{s.fault}: {text}"
    return "right"


def held(s: Situation, f: Any, g: Any, options: dict[str, Any]) -> Any:
    """The inverse as a function of x and p, with p given in one of many ways."""
    if s.held == "keyword":
        inv = inverse(lambda y, *, p: f(y, p), numpy_solver(lambda x, *, p: g(x, p)), **options)
        return lambda x, p: inv(x, p=p)
    if s.held == "pytree":
        inv = inverse(lambda y, o: f(y, o["p"][0]), numpy_solver(lambda x, o: g(x, o["p"][0])), **options)
        return lambda x, p: inv(x, {"p": [p, "text"]})
    if s.held.startswith("closure"):

        def closing(x: Tensor, p: Tensor) -> Tensor:
            value, read = p.detach().numpy(), p * 1.0 if "history" in s.held else p
            return inverse(lambda y: f(y, read), numpy_solver(lambda x: g(x, value)), **options)(x)

        return closing
    return inverse(f, numpy_solver(g), **options)


def compare_wanted(s: Situation, function: Any, x: Tensor, p: Tensor) -> list[Tensor]:
    """Derivatives by those inputs that are wanted."""
    if s.wanted == (True, True):
        return derivatives(function, x, p)
    if s.wanted[0]:
        return derivatives(lambda x: function(x, p), x)
    return derivatives(lambda p: function(x, p), p)


def fuzz(family: Any, structures: tuple[str, ...]) -> Counter[str]:
    """Run a fixed set of examples, or new ones for half of the given time."""
    counts: Counter[str] = Counter()

    def run(s: Situation) -> None:
        counts[check(s, family)] += 1

    options = {"deadline": None, "suppress_health_check": list(HealthCheck), "database": None, "print_blob": True}
    end = time.monotonic() + SECONDS / 2
    while True:
        examples = settings(max_examples=500 if SECONDS else EXAMPLES, derandomize=not SECONDS, **options)
        examples(given(situations(structures))(run))()
        if time.monotonic() >= end:
            break
    print(f"{family.__name__}: {counts['right']} right, {counts['refused']} refused, 0 silent")
    return counts


def test_elementwise() -> None:
    counts = fuzz(elementwise, ("default", "Diagonal"))
    assert min(counts["right"], counts["refused"]) > EXAMPLES / 10


def test_mixing() -> None:
    counts = fuzz(mixing, ("default", "Dense", "Triangular", "Banded", "MatrixFree"))
    assert min(counts["right"], counts["refused"]) > EXAMPLES / 10


def test_a_fault_that_nobody_catches_would_show() -> None:
    """The harness itself: with the witness switched off a hidden coupling is silent, and check says so."""
    s = Situation(1, (3,), (), "plain", "param", "hidden coupling", "raise", 0, (True, True), "default", 1)
    assert check(s, elementwise) == "refused"
    found = derivatives(
        inverse(lambda y: y + y.detach() ** 3, lambda x: root_of_one(x), verify=False), torch.ones(2).double(), order=1
    )
    exact = derivatives(root_of_one, torch.ones(2).double(), order=1)
    assert difference(found[1], exact[1])


def root_of_one(x: Tensor) -> Tensor:
    return 2 / math.sqrt(3) * torch.sinh(torch.asinh(1.5 * x * math.sqrt(3)) / 3)
