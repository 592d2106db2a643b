"""Random problems with random faults. A sound one must be right, a faulty one right or refused.

By default a fixed set of examples, for some seconds. `make fuzz` draws new ones for BACKSOLVE_FUZZ_SECONDS.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from hypothesis import HealthCheck, given, reject, settings
from torch import Tensor

from backsolve import BacksolveError, inverse
from backsolve.solvers import numpy_solver
from tests.adversarial.outcome import cubic_root, derivatives, difference, weights
from tests.adversarial.situations import Family, Situation, actual, elementwise, mixing, situations

SECONDS = float(os.environ.get("BACKSOLVE_FUZZ_SECONDS", "0"))
EXAMPLES = 120  # of each property when there is no time given
MIXING = ("default", "Dense", "Triangular", "Banded", "MatrixFree")


def fuzz(check: Callable[[Situation], str], name: str, *drawn: Any, **more: Any) -> Counter[str]:
    """Run a fixed set of examples, or new ones for a quarter of the given time."""
    counts: Counter[str] = Counter()

    def run(s: Situation) -> None:
        counts[check(s)] += 1

    options = {"deadline": None, "suppress_health_check": list(HealthCheck), "database": None, "print_blob": True}
    end = time.monotonic() + SECONDS / 4
    while True:
        examples = settings(max_examples=500 if SECONDS else EXAMPLES, derandomize=not SECONDS, **options)
        examples(given(situations(*drawn, **more))(run))()
        if time.monotonic() >= end:
            break
    print(f"{name}: {counts['right']} right, {counts['refused']} refused, 0 silent")
    assert min(counts["right"], counts["refused"]) > EXAMPLES / 10, "neither may starve"
    return counts


# ---- eager: values and derivatives to second order ----------------------------------------------------------------

FAULTS = ("none", "none", "none", "detach", "coupling", "hidden coupling", "wrong g", "some wrong g", "NaN", "scaled J")


def check(s: Situation, make: Callable[[Situation], Family]) -> str:
    """Run one situation: "right" or "refused", or an AssertionError."""
    family = make(s)
    x, p, batch = family.x, family.p, family.x.shape[: family.x.dim() - family.event_dim]
    wrong = torch.zeros(batch, dtype=torch.bool)
    if s.fault in ("wrong g", "NaN"):
        wrong[...] = True
    elif s.fault == "some wrong g" and wrong.numel():
        wrong.view(-1)[:: max(1, wrong.numel() // 2)] = True
    spoil = wrong.reshape(wrong.shape + (1,) * family.event_dim).numpy()

    @numpy_solver
    def g(x: np.ndarray, p: np.ndarray) -> np.ndarray:
        y = family.exact["y"](x, p, np)
        return np.where(spoil, np.nan if s.fault == "NaN" else y * 1.01, y)

    try:
        ours = by_wanted(s, actual(s, family, g), x, p)
    except BacksolveError:
        if s.fault == "none":
            raise
        return "refused"
    exact = by_wanted(s, family.exact[s.quantity], x, p)
    size = max((t.abs().max().item() for _, t in exact if t.numel()), default=0.0)  # second derivatives cancel
    for (what, mine), (_, right) in zip(ours, exact, strict=True):
        if s.on_failure == "nan" and wrong.any():
            if what == "by p":
                continue  # a sum over events of which some are NaN
            mine, right = mine[~wrong], right[~wrong]
        assert not (text := difference(mine, right, size)), f"{s.fault}: {what}: {text}"
    return "right"


def by_wanted(s: Situation, function: Any, x: Tensor, p: Tensor) -> list[tuple[str, Tensor]]:
    """The value, and derivatives by those inputs that are wanted, with what they are."""
    if s.wanted == (True, True):
        found, names = derivatives(function, x, p), ["by x", "by p"]
    elif s.wanted[0]:
        found, names = derivatives(lambda x: function(x, p), x), ["by x"]
    else:
        found, names = derivatives(lambda p: function(x, p), p), ["by p"]
    return list(zip(["value", *names * 3], found, strict=True))


def test_elementwise() -> None:
    fuzz(lambda s: check(s, elementwise), "elementwise", ("default", "Diagonal"), FAULTS)


def test_mixing() -> None:
    fuzz(lambda s: check(s, mixing), "mixing", MIXING, FAULTS)


# ---- under torch.func ---------------------------------------------------------------------------------------------

TRANSFORMS = ("vmap first", "vmap last", "grad by x", "grad by p", "jacrev by p", "jacfwd by x", "jvp")
PLAIN_FAULTS = ("none", "none", "none", "detach", "wrong g", "NaN")  # the others need the whole batch at once


def transformed(h: Any, name: str, family: Family) -> Any:
    """A function of x and p from another one."""
    if name == "jvp":
        return lambda x, p: torch.func.jvp(h, (x, p), (weights(x), weights(p)))[1]
    if "vmap" in name:
        return mapped(h, name == "vmap first", family)
    argnums = 0 if name.endswith("x") else 1
    if "jac" in name:
        return (torch.func.jacrev if "rev" in name else torch.func.jacfwd)(h, argnums)
    return torch.func.grad(lambda x, p: (weights(z := h(x, p)) * z).sum(), argnums)


def mapped(h: Any, first: bool, family: Family) -> Any:
    """vmap along the first or last batch dimension of x, and along that of p which broadcasts with it."""
    k = family.event_dim

    def run(x: Tensor, p: Tensor) -> Tensor:
        batch_dims = x.dim() - k
        dim = 0 if first else batch_dims - 1
        if not batch_dims or not x.shape[dim]:
            return h(x, p)
        of_p = dim - batch_dims + p.dim() - 2 * k
        if of_p < 0:
            return torch.vmap(h, (dim, None))(x, p)
        if p.shape[of_p] == x.shape[dim]:
            return torch.vmap(h, (dim, of_p))(x, p)
        return torch.vmap(h, (dim, None))(x, p.squeeze(of_p))

    return run


def check_transformed(s: Situation, make: Callable[[Situation], Family]) -> str:
    """The same under nested transforms, the innermost of which is the last."""
    family = make(s)
    root = family.exact["y"]
    spoil = {"wrong g": 1.01, "NaN": torch.nan}.get(s.fault, 1.0)
    if s.held.startswith("closure"):  # what it closes over is wrapped: no NumPy
        g = lambda x, p: root(x, p) * spoil  # noqa: E731
    else:
        g = numpy_solver(lambda x, p: root(x, p, np) * spoil)
    ours, exact = actual(s, family, g), family.exact[s.quantity]
    for name in reversed(s.transforms):
        ours, exact = transformed(ours, name, family), transformed(exact, name, family)
    try:
        right = exact(family.x, family.p)
    except (IndexError, RuntimeError):  # of torch, at some empty tensors
        reject()
    try:
        found = ours(family.x, family.p)
    except BacksolveError:
        if s.fault == "none":
            raise
        return "refused"
    if s.on_failure == "nan" and spoil != 1.0 and family.x.numel():
        assert found.isnan().all()
        return "refused"
    assert not (text := difference(found, right, 1.0)), f"{s.fault}: {text}"
    return "right"


def test_elementwise_transforms() -> None:
    structures = ("default", "Diagonal")
    check = lambda s: check_transformed(s, elementwise)  # noqa: E731
    fuzz(check, "elementwise, torch.func", structures, PLAIN_FAULTS, transforms=TRANSFORMS, size=2)


def test_mixing_transforms() -> None:
    check = lambda s: check_transformed(s, mixing)  # noqa: E731
    fuzz(check, "mixing, torch.func", MIXING, PLAIN_FAULTS, transforms=TRANSFORMS, size=2)


# ---- the harness itself -------------------------------------------------------------------------------------------


def test_a_fault_that_nobody_catches_would_show() -> None:
    """With the witness switched off a hidden derivative is silent, and `difference` says so."""
    found = derivatives(
        inverse(lambda y: y + y.detach() ** 3, lambda x: cubic_root(x, 1.0), verify=False),
        torch.ones(2).double(),
        order=1,
    )
    exact = derivatives(lambda x: cubic_root(x, 1.0), torch.ones(2).double(), order=1)
    assert difference(found[1], exact[1])
