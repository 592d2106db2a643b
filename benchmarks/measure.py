"""Times of a case's contestants, interleaved in random order, after each answer was compared with the truth."""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

from benchmarks.case import Case, Run
from benchmarks.contestants import CONTESTANTS, asked
from benchmarks.sampling import NoAnswerError, first_call, prepare, seconds

Key = TypeVar("Key")
Clock = Callable[[int], float]  # seconds that so many calls take

SHORTEST_SAMPLE = 2e-2  # seconds
FEWEST_ROUNDS = 3
FIRST_CALLS = 16
LONGEST_FIRST_CALLS = 4.0  # seconds


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
    runs = {name: run for name in case.contestants if (run := prepare(name, case))}
    answers = {name: judge(asked(name, case), run) for name, run in runs.items()}
    clocks = {name: partial(seconds, case, run) for name, run in runs.items() if not answers[name].failure}
    times = interleave(clocks, budget, order)
    reference = times[case.contestants[0]]
    return {name: _timed(outcome, times.get(name), reference) for name, outcome in answers.items()}


def judge(case: Case, run: Run) -> Outcome:
    """Compare an answer with the truth."""
    try:
        results = first_call(run)
    except NoAnswerError as reason:
        return Outcome(failure=str(reason))
    error = case.error(results)
    missing = sum(r is None for r in results)
    return Outcome(error=error, missing=missing, wrong=not error <= case.tolerance)


def interleave(clocks: Mapping[Key, Clock], budget: float, order: random.Random) -> dict[Key, list[float]]:
    """Seconds a call, for each clock and each round; in a round each is used once, in random order.

    A disturbance of the machine that lasts longer than a round hits all of them, and cancels in the ratio of two times
    of one round.
    """
    gc.freeze()  # what is there by now is not searched for garbage before each sample
    calls = {name: _calls_in_a_sample(clock) for name, clock in clocks.items()}
    times: dict[Key, list[float]] = {name: [] for name in clocks}
    names = list(clocks)
    end, rounds = time.perf_counter() + budget, 0
    while rounds < FEWEST_ROUNDS or time.perf_counter() < end:
        order.shuffle(names)
        for name in names:
            times[name].append(clocks[name](calls[name]) / calls[name])
        rounds += 1
    gc.unfreeze()
    return times


def grow(cases: Sequence[Case], budget: float, order: random.Random) -> dict[str, Any]:
    """Time against size, with the exponent that fits each round best."""
    names, sizes = cases[0].contestants, [case.size[0] for case in cases]
    runs = {(name, case.size[0]): (case, CONTESTANTS[name](case)) for case in cases for name in names}
    times = interleave({key: partial(seconds, *pair) for key, pair in runs.items()}, budget, order)
    rounds = {name: list(zip(*(times[name, n] for n in sizes), strict=True)) for name in names}
    exponents = {name: statistics.median(_exponent(sizes, r) for r in rounds[name]) for name in names}
    medians = {name: [statistics.median(times[name, n]) for n in sizes] for name in names}
    return {"sizes": sizes, "seconds": medians, "exponents": exponents}


def _calls_in_a_sample(clock: Clock) -> int:
    """How many calls take long enough to be timed; found after the first ones.

    backsolve probes f at the calls 1, 2, 4, 8, 16, 32, ...: with few rounds of one call these would be the median.
    """
    end = time.perf_counter() + LONGEST_FIRST_CALLS
    for _ in range(FIRST_CALLS):
        clock(1)
        if time.perf_counter() > end:
            break
    calls = 1
    while (taken := clock(calls)) < SHORTEST_SAMPLE:
        calls *= 4 if taken < SHORTEST_SAMPLE / 4 else 2
    return calls


def _timed(outcome: Outcome, times: list[float] | None, reference: list[float]) -> Outcome:
    if times is None:
        return outcome
    ratios = [t / r for t, r in zip(times, reference, strict=True)]
    low, ratio, high = statistics.quantiles(ratios, n=4)
    return replace(outcome, seconds=statistics.median(times), ratio=ratio, spread=(high - low) / 2 / ratio)


def _exponent(sizes: Sequence[int], seconds: Sequence[float]) -> float:
    return statistics.linear_regression([math.log(n) for n in sizes], [math.log(s) for s in seconds]).slope
