"""Hostile surroundings: Inverses inside each other, threads, processes, copies, graphs that are used up."""

from __future__ import annotations

import copy
import os
import pickle
import threading
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from backsolve import errors, implicit_function, inverse
from tests.adversarial.outcome import BLACK_BOX, Case, W, X, compare, cubic, cubic_root, derivatives, tensor

Pairs = Sequence[tuple[Tensor, Tensor]]
PLAIN = inverse(cubic, BLACK_BOX)


def changed(by: Callable[[Callable[..., Tensor]], Callable[..., Tensor]], order: int = 2) -> Callable[[], Pairs]:
    """The same surroundings around the inverse and around its closed form."""
    return lambda: compare(by(PLAIN), by(cubic_root), X, W, order=order)


# ---- one inside another --------------------------------------------------------------------------------------------


def inside_f() -> Pairs:
    """f calls an Inverse: asin(y)^3 + asin(y) = x."""
    arcsin = inverse(torch.sin, lambda x: torch.asin(x))
    outer = inverse(lambda y, w: cubic(arcsin(y), w), lambda x, w: torch.sin(cubic_root(x, w)))
    return compare(outer, lambda x, w: torch.sin(cubic_root(x, w)), X, W)


def inside_f_closing() -> Pairs:
    """The Inverse inside f closes over the weight of the outer call, which f does not name."""

    def actual(x: Tensor, w: Tensor) -> Tensor:
        inner = inverse(lambda y: cubic(y, w), lambda x: cubic_root(x, w.detach()))
        return inverse(lambda y: inner(2 * y), lambda x: cubic(x, w.detach()) / 2)(x)

    return compare(actual, lambda x, w: cubic(x, w) / 2, X, W)


def three_deep() -> Pairs:
    double = inverse(lambda y: y / 2, lambda x: 2 * x)
    half = inverse(double, lambda x: x / 2)
    again = inverse(lambda y, w: cubic(half(2 * y), w), cubic_root)
    return compare(again, cubic_root, X, W)


def of_an_inverse() -> Pairs:
    """The inverse of an inverse is the function."""
    return compare(inverse(PLAIN, cubic), cubic, X, W)


def implicit_in_inverse() -> Pairs:
    root = implicit_function(lambda y, p: y**2 - p, torch.sqrt)
    inv = inverse(lambda y, w: cubic(root(y**2 + 1) - 1, w), lambda x, w: torch.sqrt((cubic_root(x, w) + 1) ** 2 - 1))
    return compare(inv, lambda x, w: torch.sqrt((cubic_root(x, w) + 1) ** 2 - 1), X.abs(), W)


def chained(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda x, w: function(function(function(x, w), w), w + 1)


# ---- many of them --------------------------------------------------------------------------------------------------


def sum_of_many(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda x, w: sum((function(x * (1 + k / 7), w + k) for k in range(20)), x * 0)


def same_output_twice(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(x: Tensor, w: Tensor) -> Tensor:
        y = function(x, w)
        return y * y + y.sum() * y

    return run


def accumulated() -> Pairs:
    """Two backward passes add up in .grad, the first through a graph that is kept."""

    def run(function: Any) -> list[Tensor]:
        x, w = X.clone().requires_grad_(), W.clone().requires_grad_()
        y = function(x, w)
        y.sum().backward(retain_graph=True)
        (y**2).sum().backward()
        return [x.grad, w.grad]  # type: ignore[list-item]

    return list(zip(run(PLAIN), run(cubic_root), strict=True))


# ---- threads and processes -----------------------------------------------------------------------------------------


def in_threads() -> Pairs:
    """Eight threads call and differentiate one Inverse at the same time."""
    inv = inverse(cubic, BLACK_BOX)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda k: compare(inv, cubic_root, X * (1 + k), W), range(16)))
    return [pair for pairs in found for pair in pairs]


def backward_in_other_threads() -> Pairs:
    """The graph is made here and walked by four threads at once."""
    x, w = X.clone().requires_grad_(), W.clone().requires_grad_()
    y = PLAIN(x, w)
    exact = torch.autograd.grad(cubic_root(x, w).sum(), (x, w))
    found: list[tuple[Tensor, ...]] = []

    def walk() -> None:
        found.append(torch.autograd.grad(y.sum(), (x, w), retain_graph=True))

    threads = [threading.Thread(target=walk) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    return [pair for grads in found for pair in zip(grads, exact, strict=True)]


def after_a_fork() -> Pairs:
    """A child process of a process that has used the Inverse computes the same."""
    before = derivatives(PLAIN, X, W)
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # later Pythons warn that a process with threads is forked
        child = os.fork()
    if not child:  # no exception may leave the child
        try:
            text = pickle.dumps([t.tolist() for t in derivatives(PLAIN, X, W)])
        except BaseException as error:  # noqa: BLE001
            text = pickle.dumps(repr(error))
        os.write(writing, text)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        found = pickle.loads(pipe.read())
    os.waitpid(child, 0)
    assert isinstance(found, list), found
    return [(torch.tensor(f, dtype=t.dtype), t) for f, t in zip(found, before, strict=True)]


def copied_and_pickled() -> Pairs:
    inv = inverse(torch.sinh, torch.asinh)
    twins = copy.deepcopy(inv), pickle.loads(pickle.dumps(inv)), copy.copy(inv)
    return [pair for twin in twins for pair in compare(twin, torch.asinh, X)]


RIGHT: dict[str, Callable[[], Pairs]] = {
    "an Inverse inside f": inside_f,
    "an Inverse inside f that closes over a weight": inside_f_closing,
    "three Inverses inside each other": three_deep,
    "the Inverse of an Inverse": of_an_inverse,
    "an implicit function inside f": implicit_in_inverse,
    "a chain of Inverses": changed(chained),
    "a double backward through a sum of many": changed(sum_of_many),
    "one output used several times": changed(same_output_twice),
    "third derivatives": changed(lambda f: f, order=3),
    "two backward passes": accumulated,
    "threads": in_threads,
    "backward in other threads": backward_in_other_threads,
    "a fork": after_a_fork,
    "copies and pickles": copied_and_pickled,
}


def without_graph() -> Pairs:
    """Under no_grad there is nothing to differentiate, as in torch."""
    with torch.no_grad():
        y = PLAIN(X.clone().requires_grad_(), W)
    torch.autograd.grad(y.sum(), [X])
    return [(y, y)]


def freed_graph() -> Pairs:
    x = X.clone().requires_grad_()
    y = PLAIN(x, W)
    y.sum().backward()
    y.sum().backward()
    return [(y, y)]


def y_changed_in_place() -> Pairs:
    """y is needed in backward; writing into it is torch's own error."""
    x = X.clone().requires_grad_()
    y = PLAIN(x, W)
    y.detach().mul_(2)
    y.sum().backward()
    return [(x.grad, x)]  # type: ignore[list-item]


def param_changed_in_place() -> Pairs:
    x, w = X.clone().requires_grad_(), W.clone()
    y = PLAIN(x, w)
    w.mul_(2)
    y.sum().backward()
    return [(x.grad, x)]  # type: ignore[list-item]


def kept_alive_by_a_hook() -> Pairs:
    """A hook on a leaf that f closes over, registered after the call, would run twice."""
    w = W.clone().requires_grad_()
    y = inverse(lambda y: cubic(y, w), lambda x: cubic_root(x, w.detach()))(X)
    w.register_hook(lambda v: v)
    y.sum().backward()
    return [(y, y)]


REFUSED: dict[str, tuple[Callable[[], Pairs], type[Exception]]] = {
    "no_grad": (without_graph, RuntimeError),
    "a second backward through a freed graph": (freed_graph, RuntimeError),
    "y changed in place": (y_changed_in_place, RuntimeError),
    "a param changed in place": (param_changed_in_place, RuntimeError),
    "a hook registered too late": (kept_alive_by_a_hook, errors.StructureError),
    "no x at all": (lambda: [(PLAIN(), tensor(0.0))], TypeError),  # type: ignore[call-arg]
}

SURROUNDINGS = [
    *(Case(f"around: {name}", "right", run) for name, run in RIGHT.items()),
    *(Case(f"around: {name}", "refused", run, error) for name, (run, error) in REFUSED.items()),
]
