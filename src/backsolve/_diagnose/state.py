"""Do f and g give the same twice? Dropout, moving buffers, random numbers, iterations that remember."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from backsolve._diagnose.closure import modules_of
from backsolve._diagnose.finding import Finding
from backsolve._diagnose.subject import Subject
from backsolve._inverse import Inverse

Modules = tuple[tuple[str, Module], ...]


@dataclass(frozen=True)
class State:
    """What f and g remember or draw.

    Attributes:
        f_repeats: whether f gives the same value twice.
        g_repeats: whether g does, up to the tolerance of the residual test.
        draws: which of "f" and "g" advance the global random state of torch.
        buffers: the buffers and closed-over tensors that a call of f changes, by name.
        training: the dropout and batch normalisation modules in training mode, by name.
    """

    f_repeats: bool
    g_repeats: bool
    draws: tuple[str, ...]
    buffers: tuple[str, ...]
    training: tuple[str, ...]

    def findings(self) -> Iterator[Finding]:
        """Whether anything has to be frozen."""
        mend = "freeze it: module.eval(), or fixed seeds; a solve and its derivatives must see one f"
        if not self.f_repeats:
            yield Finding("state", "wrong", "f gives another value at the same y", mend)
        if not self.g_repeats:
            yield Finding("state", "wrong", "g gives another value for the same x", mend)
        if self.buffers:
            text = f"each call of f changes {', '.join(self.buffers)}"
            yield Finding("state", "wrong" if not self.f_repeats else "warning", text, mend)
        if self.training:
            text = f"in training mode: {', '.join(self.training)}"
            yield Finding("state", "warning", text, "call .eval() on it, unless the batch statistics are meant")
        if self.draws:
            yield Finding("state", "warning", f"{' and '.join(self.draws)} draw random numbers", mend)
        if self == State(True, True, (), (), ()):
            yield Finding("state", "good", "f and g give the same twice, and change nothing")


def measure_state(subject: Subject) -> State:
    """Run f and g twice, and look at what has moved."""
    modules = modules_of(subject.inv)
    before = _snapshot(modules)
    f_repeats, f_draws = _repeats(lambda: subject.f(subject.y), 0.0)
    after = _snapshot(modules)
    g_repeats, g_draws = _repeats(lambda: subject.g(subject.x), torch.finfo(subject.y.dtype).eps ** 0.5)
    return State(
        f_repeats,
        g_repeats,
        tuple(name for name, draws in (("f", f_draws), ("g", g_draws)) if draws),
        tuple(name for name, old in before.items() if not torch.equal(old, after[name])),
        tuple(name for name, m in modules if m.training and isinstance(m, _BatchNorm | _DropoutNd)),
    )


@torch.no_grad()
def _repeats(run: Callable[[], Tensor], rtol: float) -> tuple[bool, bool]:
    before = torch.get_rng_state()
    first, second = run(), run()
    draws = not torch.equal(before, torch.get_rng_state())
    return torch.allclose(first, second, rtol=rtol, atol=0.0, equal_nan=True), draws


def _snapshot(modules: Modules) -> dict[str, Tensor]:
    """Copies of the buffers; parameters stand still, and are large."""
    return {f"{name}.{b}": t.clone() for name, module in modules for b, t in module.named_buffers(recurse=False)}


@contextmanager
def left_as_found(inv: Inverse) -> Generator[None]:
    """A context after which buffers and torch's random state are as they were: a diagnosis leaves no trace."""
    buffers = [(t, t.clone()) for _, module in modules_of(inv) for t in module.buffers(recurse=False)]
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            for t, old in buffers:
                t.data.copy_(old)
