"""The table of rows. To add one, write its problem in `problems/` and name it here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from benchmarks.case import UNDER_TORCH_FUNC, Case
from benchmarks.problems import (
    ARCSIN,
    CONVOLUTION,
    DENSE,
    DENSE_FLOAT32,
    GAMMA,
    IMPLIED_VOLATILITY,
    MIXTURE,
    REACTION_DIFFUSION,
    SHOOTING,
)

PEERS = ("dense autograd.functional", "TorchOpt", "xitorch", "torchdeq", "zuko", "jaxopt", "optimistix")
GIVEN = ("backsolve, f' given", "backsolve, f' given, no test")
UNTESTED = ("backsolve", "backsolve, no test")
ARCSINS = ("hand-written", "floor", "closed form", *UNTESTED, *GIVEN)
OTHERS = ("hand-written", "floor", "g alone", *UNTESTED)
INVERSION = ("one evaluation of f", "Bracket", "50 bisections", "SciPy's find_root")
BY_SAMPLES = ("executor.map", "each_sample, 2 processes", "each_sample")
KRYLOV = ("backsolve, GMRES", "backsolve, BiCGSTAB")
DECLARED = ("backsolve, Dense", "backsolve, f' given", "backsolve, GMRES")
CROSSOVER = [(16, 64), (64, 1), (64, 64), (64, 256), (256, 1), (256, 64), (1024, 1)]  # where products overtake
COMPILED = ("closed form", "backsolve", "backsolve, no test")
TRANSFORMED = ("backsolve, eager", "closed form", "hand-written, for torch.func", "backsolve")
SECOND = ("hand-written", "closed form", "backsolve")

WORKLOADS = [
    Case(ARCSIN, (1,), (*ARCSINS, *PEERS), quick=True),
    Case(ARCSIN, (1000,), (*ARCSINS, *PEERS)),
    Case(ARCSIN, (1_000_000,), (*ARCSINS, *PEERS), memory=True, quick=True),
    Case(ARCSIN, (512, 64), (*ARCSINS, *PEERS)),
    Case(IMPLIED_VOLATILITY, (1,), (*OTHERS, *PEERS)),
    Case(IMPLIED_VOLATILITY, (100_000,), (*OTHERS, *PEERS), memory=True, quick=True),
    Case(DENSE, (3, 1), (*OTHERS, *PEERS)),
    *(Case(DENSE, (4, batch), (*OTHERS, *PEERS)) for batch in (1, 64, 256)),
    *(Case(DENSE, (32, batch), (*OTHERS, *PEERS), quick=batch == 64) for batch in (1, 64, 256)),
    *(Case(DENSE, (128, batch), (*OTHERS, *DECLARED, *PEERS), memory=batch == 64) for batch in (1, 64, 256)),
    *(Case(DENSE, (512, batch), (*OTHERS, *DECLARED, *PEERS)) for batch in (1, 64)),
    Case(DENSE, (512, 256), (*OTHERS, *DECLARED, *PEERS)),
    *(Case(DENSE, size, ("hand-written", "backsolve", *DECLARED)) for size in CROSSOVER),
    Case(REACTION_DIFFUSION, (1000,), ("hand-written", "floor", "backsolve", "backsolve, Banded")),
    Case(REACTION_DIFFUSION, (100_000,), ("hand-written", "floor", "backsolve, Banded"), memory=True),
    Case(CONVOLUTION, (4096,), ("hand-written", "backsolve", *KRYLOV)),
    Case(CONVOLUTION, (65_536,), ("hand-written", *KRYLOV), memory=True),
    *(Case(DENSE_FLOAT32, (128, batch), ("hand-written", *UNTESTED, *KRYLOV)) for batch in (64, 256)),
    Case(DENSE, (128, 64), ("hand-written", "backsolve", *KRYLOV), "Hessian-vector product"),
    Case(ARCSIN, (1,), (*SECOND, *PEERS), "Hessian-vector product", quick=True),
    Case(ARCSIN, (1000,), (*SECOND, *PEERS), "Hessian-vector product"),
    Case(IMPLIED_VOLATILITY, (1000,), (*SECOND, *PEERS), "Hessian-vector product"),
    Case(DENSE, (32, 64), (*SECOND, *PEERS), "Hessian-vector product"),
    Case(ARCSIN, (1,), ("hand-written", "backsolve", *PEERS), "call only"),
    Case(DENSE, (3, 1), ("hand-written", "backsolve", *PEERS), "call only"),
    Case(ARCSIN, (1,), ("hand-written", "backsolve", *PEERS), "no gradient", quick=True),
    Case(ARCSIN, (1_000_000,), ("hand-written", "backsolve", *PEERS), "no gradient"),
    Case(ARCSIN, (1_000_000,), COMPILED, "compiled", quick=True),
    *(Case(ARCSIN, (1,), TRANSFORMED, task, quick=True) for task in UNDER_TORCH_FUNC),
    Case(GAMMA, (1_000_000,), INVERSION, "inversion"),
    Case(MIXTURE, (1_000_000,), INVERSION, "inversion"),
    Case(SHOOTING, (256,), BY_SAMPLES, "no gradient", processes=True),
]

# How the time grows, from sizes where the calls themselves no longer count to sizes whose memory malloc still keeps.
COMPARED = ("hand-written", "floor", "backsolve")
GROWTH = [
    [Case(ARCSIN, (n,), COMPARED) for n in (100_000, 200_000, 400_000, 800_000, 1_600_000)],
    [Case(DENSE, (n, 1), (*COMPARED, "backsolve, Dense")) for n in (512, 1024, 2048)],
    [Case(REACTION_DIFFUSION, (n,), (*COMPARED[:2], "backsolve, Banded")) for n in (50_000, 100_000, 200_000, 400_000)],
]

PROFILED = [Case(ARCSIN, (n,), ("backsolve",)) for n in (1, 1_000_000)]


def _on_every_device(cases: Sequence[Case]) -> list[Case]:
    """The cases, and once more on the GPU if there is one, for those contestants that are torch's."""
    if not torch.cuda.is_available():
        return list(cases)
    in_torch = [tuple(c for c in case.contestants if c not in ("jaxopt", "optimistix")) for case in cases]
    return [*cases, *(replace(c, device="cuda", contestants=t) for c, t in zip(cases, in_torch, strict=True))]


CASES = {case.name: case for case in _on_every_device(WORKLOADS)}
