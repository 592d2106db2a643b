"""Times of a case's contestants: interleaved in random order, and each answer compared with the truth first."""

from __future__ import annotations

import gc
import math
import random
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from benchmarks.case import Case, Run
from benchmarks.contestants import CONTESTANTS

Key = TypeVar("Key")
Sampler = Callable[[Run, int], float]  # seconds that so many calls take

SHORTEST_SAMPLE = 2e-3  # seconds; the clock of process CPU time ticks in microseconds or less
FEWEST_ROUNDS = 5
LONGEST_FIRST_CALL = 20.0  # seconds


@dataclass(frozen=True)
class Outcome:
    """What one contestant did with one case: an answer, and the time that it takes.

    Attributes:
        seconds: the median of a call; None if it was not measured.
        ratio: the median, over the rounds, of its time in that round to the reference's.
        spread: half the distance of the quartiles of those ratios, relative to the ratio.
        error: of the answer, relative; None if there was none.
        missing: how many of the gradients do not exist.
        wrong: whether fewer than half of the digits are right.
        failure: why there is no answer.
    """

    seconds: float | None = None
    ratio: float | None = None
    spread: float | None = None
    error: float | None = None
    missing: int = 0
    wrong: bool = False
    failure: str = ""


def measure(case: Case, budget: float, order: random.Random) -> dict[str, Outcome]:
    """Ask every contestant for its answer, then time those who have one."""
    runs: dict[str, Run] = {}
    answers: dict[str, Outcome] = {}
    for name in case.contestants:
        try:
            run = CONTESTANTS[name](case)
        except ImportError:
            continue  # not installed
        if run is None:
            continue
        answers[name] = answer(run)
        if not answers[name].failure:
            runs[name] = run
    times = interleave(runs, budget, order, cuda_seconds if case.device == "cuda" else cpu_seconds)
    reference = times[case.contestants[0]]
    return {name: _outcome(first, times.get(name), reference) for name, first in answers.items()}


def answer(run: Run) -> Outcome:
    """Let a contestant answer once, within a time limit, and compare."""
    try:
        with limit(LONGEST_FIRST_CALL):
            results = run.call()
    except TimeoutError:
        return Outcome(failure=f"> {LONGEST_FIRST_CALL:.0f} s")
    except Exception as error:  # noqa: BLE001  whatever another package raises is its answer
        return Outcome(failure=f"raises {type(error).__name__}")
    missing = sum(r is None for r in results)
    if missing == len(results):
        return Outcome(failure="no gradient")
    error = run.case.error(results)
    return Outcome(error=error, missing=missing, wrong=not error <= run.case.tolerance)


def interleave(runs: Mapping[Key, Run], budget: float, order: random.Random, clock: Sampler) -> dict[Key, list[float]]:
    """Seconds a call, for each of the runs and each round; in a round each runs once, in random order.

    A disturbance of the machine that lasts longer than a round then hits all of them, and cancels in the ratio of two
    times of one round.
    """
    calls = {name: _calls_in_a_sample(run, clock) for name, run in runs.items()}
    times: dict[Key, list[float]] = {name: [] for name in runs}
    names = list(runs)
    gc.collect()
    gc.freeze()  # what was there before is not searched for garbage again while somebody is timed
    end, rounds = time.perf_counter() + budget, 0
    while rounds < FEWEST_ROUNDS or time.perf_counter() < end:
        order.shuffle(names)
        for name in names:
            times[name].append(clock(runs[name], calls[name]) / calls[name])
        rounds += 1
    gc.unfreeze()
    return times


def grow(cases: Sequence[Case], budget: float, order: random.Random) -> dict[str, Any]:
    """Time against size, with the exponent that fits each round best."""
    names = cases[0].contestants
    runs = {(name, case.size[0]): CONTESTANTS[name](case) for case in cases for name in names}
    times = interleave(runs, budget, order, cpu_seconds)
    sizes = [case.size[0] for case in cases]
    logs = [math.log(n) for n in sizes]
    rounds = {name: list(zip(*(times[name, n] for n in sizes), strict=True)) for name in names}
    exponents = {
        name: statistics.median(statistics.linear_regression(logs, list(map(math.log, r))).slope for r in rounds[name])
        for name in names
    }
    seconds = {name: [statistics.median(times[name, n]) for n in sizes] for name in names}
    return {"sizes": sizes, "seconds": seconds, "exponents": exponents}


def cpu_seconds(run: Run, calls: int) -> float:
    """CPU time of the process, all its threads together."""
    start = time.process_time()
    for _ in range(calls):
        run.call()
    return time.process_time() - start


def cuda_seconds(run: Run, calls: int) -> float:
    """Time between two events on the GPU."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(calls):
        run.call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def _calls_in_a_sample(run: Run, clock: Sampler) -> int:
    calls = 1
    while (seconds := clock(run, calls)) < SHORTEST_SAMPLE:  # the first ones warm up as well
        calls *= 4 if seconds < SHORTEST_SAMPLE / 4 else 2
    return calls


def _outcome(first: Outcome, times: list[float] | None, reference: list[float]) -> Outcome:
    if times is None:
        return first
    ratios = [t / r for t, r in zip(times, reference, strict=True)]
    low, ratio, high = statistics.quantiles(ratios, n=4)
    return Outcome(statistics.median(times), ratio, (high - low) / 2 / ratio, first.error, first.missing, first.wrong)


@contextmanager
def limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError after so much time, at the next moment when Python is in charge."""

    def stop(*_: Any) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
