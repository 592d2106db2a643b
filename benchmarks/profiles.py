"""Where the time goes: the call is interrupted at regular moments of CPU time, and the place is written down."""

from __future__ import annotations

import inspect
import signal
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import FrameType

import backsolve
from benchmarks.case import Case
from benchmarks.sampling import cpu_seconds, prepare

PACKAGE = str(Path(backsolve.__file__).parent)
INTERVAL = 1e-3  # seconds of CPU time; the system may make it longer


def profile(case: Case, contestant: str, seconds: float) -> dict[str, float]:
    """Microseconds of CPU time of one call, by the innermost function of backsolve (or f, or g) that was at work.

    A statistical profile costs nothing between two samples, so that cheap functions weigh what they weigh.
    """
    run = prepare(contestant, _named(case))
    if run is None:
        raise ValueError(f"{contestant} cannot do {case.name}")
    run()
    places: Counter[str] = Counter()

    def sample(_: int, frame: FrameType | None) -> None:
        places[_place(frame)] += 1

    before = signal.signal(signal.SIGPROF, sample)
    signal.setitimer(signal.ITIMER_PROF, INTERVAL, INTERVAL)
    calls, spent, end = 0, 0.0, time.process_time() + seconds
    while time.process_time() < end:
        spent += cpu_seconds(run, 10)
        calls += 10
    signal.setitimer(signal.ITIMER_PROF, 0)
    signal.signal(signal.SIGPROF, before)
    total = sum(places.values())
    return {place: count / total * spent / calls * 1e6 for place, count in places.most_common()}


def _named(case: Case) -> Case:
    """The case with f and g as Python functions, whose frames can be seen."""
    f, g = case.problem.f, case.problem.g
    return replace(case, problem=replace(case.problem, f=lambda *args: f(*args), g=lambda *args: g(*args)))


def _place(frame: FrameType | None) -> str:
    here = inspect.getsourcefile(_named)
    while frame is not None:
        file = frame.f_code.co_filename
        if file == here and frame.f_code.co_name == "<lambda>":
            return "f or g"
        if file.startswith(PACKAGE):
            return f"{frame.f_code.co_name} in {Path(file).relative_to(PACKAGE)}"
        frame = frame.f_back
    return "torch's engine, and the caller"
