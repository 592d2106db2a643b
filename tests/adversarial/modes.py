"""Hostile modes: hooks, checkpoints, contexts that change what torch does, tracers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, func
from torch.autograd.graph import (
    allow_mutation_on_saved_tensors,
    register_multi_grad_hook,
    save_on_cpu,
    saved_tensors_hooks,
)
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

from backsolve import errors, inverse
from backsolve.solvers import Bracket, Newton, numpy_solver
from tests.adversarial.outcome import BLACK_BOX, Case, W, X, compare, cubic, cubic_root, derivatives

Pairs = Sequence[tuple[Tensor, Tensor]]
PLAIN = inverse(cubic, BLACK_BOX)


def changed(by: Callable[[Callable[..., Tensor]], Callable[..., Tensor]], order: int = 2) -> Callable[[], Pairs]:
    """The same surroundings around the inverse and around its closed form."""
    return lambda: compare(by(PLAIN), by(cubic_root), X, W, order=order)


# ---- hooks and modes -----------------------------------------------------------------------------------------------


def hooked() -> Pairs:
    """Hooks on x, w and y see each gradient once, and may change it."""

    def run(function: Any) -> list[Tensor]:
        x, w = X.clone().requires_grad_(), W.clone().requires_grad_()
        seen: dict[str, list[Tensor]] = {name: [] for name in ("x", "w", "y", "after")}
        x.register_hook(seen["x"].append)
        w.register_hook(lambda v: seen["w"].append(v) or 3 * v)
        y = function(x, w)
        y.register_hook(lambda v: seen["y"].append(v) or 2 * v)
        y.retain_grad()
        x.register_post_accumulate_grad_hook(lambda t: seen["after"].append(t.grad))
        (y**2).sum().backward()
        assert all(len(grads) == 1 for grads in seen.values())
        return [*(v for grads in seen.values() for v in grads), x.grad, w.grad, y.grad]  # type: ignore[list-item]

    return list(zip(run(PLAIN), run(cubic_root), strict=True))


def moved_while_saved(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Saved tensors leave as bytes and come back as other objects."""

    def run(x: Tensor, w: Tensor) -> Tensor:
        with saved_tensors_hooks(
            lambda t: (t.dtype, t.detach().numpy().copy()), lambda p: torch.from_numpy(p[1]).to(p[0])
        ):
            return function(x, w)

    return run


def on_cpu(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(x: Tensor, w: Tensor) -> Tensor:
        with save_on_cpu():
            return function(x, w)

    return run


def checkpointed(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda x, w: checkpoint(lambda x, w: function(x, w) ** 2, x, w, use_reentrant=False)


def checkpointed_with_reentry() -> Pairs:
    def run(function: Any) -> list[Tensor]:
        x, w = X.clone().requires_grad_(), W.clone().requires_grad_()
        checkpoint(lambda x, w: function(x, w) ** 2, x, w, use_reentrant=True).sum().backward()
        return [x.grad, w.grad]  # type: ignore[list-item]

    return list(zip(run(PLAIN), run(cubic_root), strict=True))


def with_anomaly_mode() -> Pairs:
    with torch.autograd.set_detect_anomaly(True, check_nan=True):
        return compare(PLAIN, cubic_root, X, W)


def with_deterministic_algorithms() -> Pairs:
    torch.use_deterministic_algorithms(True)
    try:
        return compare(PLAIN, cubic_root, X, W)
    finally:
        torch.use_deterministic_algorithms(False)


def under_device_and_dtype() -> Pairs:
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("cpu"):
            return compare(PLAIN, cubic_root, X, W)
    finally:
        torch.set_default_dtype(torch.float32)


def jacobians() -> Pairs:
    """torch.autograd's own helpers, vectorised and not."""
    pairs = []
    for vectorize in (False, True):
        ours, exact = (
            torch.autograd.functional.jacobian(lambda x, f=f: f(x, W), X, vectorize=vectorize)
            for f in (PLAIN, cubic_root)
        )
        pairs.append((ours, exact))
    ours, exact = (torch.autograd.functional.hessian(lambda x, f=f: f(x, W).sum(), X) for f in (PLAIN, cubic_root))
    return [*pairs, (ours, exact)]


def by_gradcheck() -> Pairs:
    x, w = X.clone().requires_grad_(), W.clone().requires_grad_()
    assert torch.autograd.gradcheck(PLAIN, (x, w))
    assert torch.autograd.gradgradcheck(PLAIN, (x, w))
    return compare(PLAIN, cubic_root, X, W)


def mutating(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Everything that was saved is written over, in the mode that allows it."""

    def run(x: Tensor, w: Tensor) -> Tensor:
        with allow_mutation_on_saved_tensors():
            v = w * 1
            y = function(x, v)
            z = 2 * y
            y.mul_(5)
            v.mul_(3)
            leaves = (x, w)
            grads = torch.autograd.grad(y.sum() + (z**2).sum() + v, leaves, retain_graph=True)
            return torch.cat([g.reshape(-1) for g in grads])

    return run


def hooks_on_nodes() -> Pairs:
    """A hook before the node of y, one after it, and one for the gradients of x and w together."""

    def run(function: Any) -> list[Tensor]:
        x, w = X.clone().requires_grad_(), W.clone().requires_grad_()
        seen: list[Tensor] = []
        register_multi_grad_hook((x, w), lambda grads: seen.extend(g for g in grads if g is not None))
        y = function(x, w)
        y.grad_fn.register_prehook(lambda grads: tuple(2 * g for g in grads))
        y.sum().backward()
        return [x.grad, w.grad, *seen]  # type: ignore[list-item]

    return list(zip(run(PLAIN), run(cubic_root), strict=True))


def in_inference_mode() -> Pairs:
    """The value, the log-determinant and the Jacobian, made there and afterwards."""
    inv = inverse(cubic, BLACK_BOX)
    with torch.inference_mode():
        solution = inv.solve(X, W)
        found = [inv(X, W), inv.with_log_det(X, W)[1], inv.jacobian(X, W)]
    slope = 1 / (W * (1 + 3 * cubic_root(X, W) ** 2))
    exact = [cubic_root(X, W), slope.log(), slope, slope.log()]
    return [(f.clone(), e) for f, e in zip([*found, solution.log_abs_det_jacobian], exact, strict=True)]


def on_a_default_device() -> Pairs:
    """Whatever backsolve makes must stand beside x, not on the default device."""
    with torch.device("meta"):
        actual = [derivatives_of_sum(inverse(cubic, g)) for g in (BLACK_BOX, Bracket(), Newton())]
    exact = derivatives_of_sum(cubic_root)
    return [pair for found in actual for pair in zip(found, exact, strict=True)]


def derivatives_of_sum(function: Any) -> list[Tensor]:
    x, w = X.clone().requires_grad_(), W.clone().requires_grad_()
    y = function(x, w)
    return [y, *torch.autograd.grad(y.sum(), (x, w))]


def under_autocast() -> Pairs:
    """Neither J nor its solution may be in bfloat16; the call and the backward pass are inside."""
    a, x = 0.1 * torch.sin(torch.arange(16.0)).reshape(4, 4) + torch.eye(4), torch.linspace(-1, 1, 4)
    inv = inverse(lambda y, a: a @ y, numpy_solver(lambda x, a: np.linalg.solve(a, x)), event_dim=1, residual_tol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = derivatives(inv, x, a)
    return list(zip(found, derivatives(lambda x, a: torch.linalg.solve(a, x), x.double(), a.double()), strict=True))


def by_torch_func() -> Pairs:
    """An Inverse made inside of transforms, whose f is a lambda in a lambda that holds tensors of two levels."""
    pairs = []
    for make in (
        lambda h: func.jacrev(func.jacfwd(lambda w: h(X, w)))(W),
        lambda h: func.vmap(lambda w: func.hessian(lambda x: h(x, w).sum())(X))(torch.stack([W, 2 * W])),
        lambda h: func.grad(lambda w: func.grad(lambda x: h(x, w).sum())(X).sum())(W),
    ):
        ours = make(lambda x, w: inverse(lambda y: (lambda z: cubic(z, w))(y), lambda x: cubic_root(x, w))(x))
        pairs.append((ours, make(cubic_root)))
    return pairs


RIGHT: dict[str, Callable[[], Pairs]] = {
    "hooks": hooked,
    "saved tensors that come back as others": changed(moved_while_saved, order=1),
    "saved tensors on the CPU": changed(on_cpu),
    "a checkpoint": changed(checkpointed),
    "a checkpoint with reentry": checkpointed_with_reentry,
    "anomaly mode": with_anomaly_mode,
    "deterministic algorithms": with_deterministic_algorithms,
    "default dtype and device": under_device_and_dtype,
    "torch.autograd.functional": jacobians,
    "gradcheck and gradgradcheck": by_gradcheck,
    "saved tensors that are written over": changed(mutating, order=0),
    "hooks on nodes": hooks_on_nodes,
    "inference mode": in_inference_mode,
    "a default device without data": on_a_default_device,
    "autocast": under_autocast,
    "torch.func, and lambdas in lambdas": by_torch_func,
}


def recorded(by: Callable[..., Any]) -> Callable[[], Pairs]:
    """A tracer would make a constant of y; g is not seen by it."""

    def run() -> Pairs:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.jit is deprecated
            again = by(lambda x: PLAIN(x, W))
        return [(again(2 * X), cubic_root(2 * X, W))]

    return run


REFUSED: dict[str, tuple[Callable[[], Pairs], type[Exception]]] = {
    "torch.jit.trace": (recorded(lambda f: torch.jit.trace(f, (X,), check_trace=False)), errors.TransformError),
    "make_fx": (recorded(lambda f: make_fx(f)(X)), errors.TransformError),
    "torch.func.linearize": (lambda: [(func.linearize(lambda x: PLAIN(x, W), X)[1](X), X)], errors.TransformError),
    "vectorised forward mode": (  # torch has no rule for this
        lambda: [
            (
                torch.autograd.functional.jacobian(lambda x: PLAIN(x, W), X, vectorize=True, strategy="forward-mode"),
                torch.diag(derivatives(lambda x: cubic_root(x, W), X, order=1)[1]),
            )
        ],
        RuntimeError,
    ),
}

MODES = [
    *(Case(f"around: {name}", "right", run) for name, run in RIGHT.items()),
    *(Case(f"around: {name}", "refused", run, error) for name, (run, error) in REFUSED.items()),
]
