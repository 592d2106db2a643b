"""The table of rows. To add one, write its problem in `problems/` and name it here."""

from __future__ import annotations

from benchmarks.case import Case
from benchmarks.problems import ARCSIN, DENSE, IMPLIED_VOLATILITY

BY_HAND = ("hand-written", "floor")
PEERS = ("dense autograd.functional",)
GIVEN = ("backsolve, f' given", "backsolve, f' given, no test")
ELEMENTWISE = (*BY_HAND, "closed form", "backsolve", *GIVEN, *PEERS)
EVENTS = (*BY_HAND, "g alone", "backsolve", *PEERS)

WORKLOADS = [
    Case(ARCSIN, (1,), ELEMENTWISE, quick=True),
    Case(ARCSIN, (1000,), ELEMENTWISE),
    Case(ARCSIN, (1_000_000,), ELEMENTWISE, memory=True, quick=True),
    Case(IMPLIED_VOLATILITY, (100_000,), (*BY_HAND, "g alone", "backsolve", *PEERS), memory=True, quick=True),
    Case(DENSE, (4, 64), EVENTS, quick=True),
    Case(DENSE, (32, 64), EVENTS, quick=True),
    Case(DENSE, (128, 64), EVENTS),
    Case(DENSE, (512, 64), EVENTS),
    Case(ARCSIN, (1,), ("closed form", "hand-written", "backsolve", *PEERS), "Hessian-vector product", quick=True),
    Case(IMPLIED_VOLATILITY, (1000,), ("hand-written", "backsolve", *PEERS), "Hessian-vector product"),
    Case(ARCSIN, (1,), ("hand-written", "backsolve", *PEERS), "call only"),
    Case(ARCSIN, (1,), ("g, then f", "backsolve"), "no gradient", quick=True),
]
