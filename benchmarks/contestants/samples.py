"""Who runs a solver that takes one sample at a time."""

from __future__ import annotations

import functools
import multiprocessing
import time
from concurrent.futures import Executor, ProcessPoolExecutor

import torch

from backsolve import inverse
from backsolve.solvers import each_sample
from benchmarks.case import Case, Run

_PROCESSES = 2


@functools.cache
def _executor() -> Executor:
    """Processes that have started and imported what they need."""
    executor = ProcessPoolExecutor(_PROCESSES, mp_context=multiprocessing.get_context("spawn"))
    list(executor.map(time.sleep, [1.0] * _PROCESSES))
    return executor


def here(case: Case) -> Run | None:
    """One after the other."""
    if case.problem.by_samples is None:
        return None
    return case.run(inverse(case.problem.f, each_sample(case.problem.by_samples)))


def in_processes(case: Case) -> Run | None:
    """By two processes."""
    if case.problem.by_samples is None:
        return None
    return case.run(inverse(case.problem.f, each_sample(case.problem.by_samples, _executor())))


def bare(case: Case) -> Run | None:
    """By the same processes without backsolve: what can be had."""
    shoot = case.problem.by_samples
    if shoot is None:
        return None
    x = case.inputs[0].detach()
    return lambda: [torch.tensor(list(_executor().map(shoot, x.tolist())), dtype=x.dtype)]
