"""One call of a contestant: how the process is settled for it, how its answer is had, and how it is timed."""

from __future__ import annotations

import gc
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from benchmarks.case import Case, Run
from benchmarks.contestants import CONTESTANTS

LONGEST_FIRST_CALL = 20.0  # seconds
LONGEST_WARM_UP = 1.0  # what takes longer has been warm for most of its time

# Nobody may use more than one thread; what starts some all the same pays for them, since CPU time is measured.
# Freed memory stays in the heap: whether malloc returns it, and the next call pays for new pages, hangs on the layout
# of the heap, which differs from process to process and can double a time.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
    "MALLOC_MMAP_THRESHOLD_": str(2**25),
    "MALLOC_TRIM_THRESHOLD_": str(2**33),
}


class NoAnswerError(Exception):
    """Why a contestant has no answer, in a few words."""


def settle() -> None:
    """Start this program anew with the environment above, unless it has it."""
    torch.set_num_threads(1)
    if any(os.environ.get(name) != value for name, value in ENVIRONMENT.items()):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | ENVIRONMENT)


def prepare(contestant: str, case: Case) -> Run | None:
    """What is to be called; None if there is no way to say it, or the package is not installed."""
    try:
        return CONTESTANTS[contestant](case)
    except ImportError:
        return None


def first_call(run: Run) -> list[Any]:
    """The results of one call, within a time limit."""
    try:
        with limit(LONGEST_FIRST_CALL):
            results = list(run())
    except TimeoutError:
        raise NoAnswerError(f"> {LONGEST_FIRST_CALL:.0f} s") from None
    except Exception as error:  # noqa: BLE001  whatever another package raises is its answer
        raise NoAnswerError(f"raises {type(error).__name__}") from None
    if all(r is None for r in results):
        raise NoAnswerError("no gradient")
    return results


def seconds(case: Case, run: Run, calls: int) -> float:
    """The time of so many calls, where nobody pays for another's garbage, or for the caches as another left them."""
    gc.collect()
    clock = cuda_seconds if case.device == "cuda" else wall_seconds if case.processes else cpu_seconds
    first = clock(run, 1)
    return first if calls == 1 and first > LONGEST_WARM_UP else clock(run, calls)


def cpu_seconds(run: Run, calls: int) -> float:
    """CPU time of the process, all its threads together."""
    start = time.process_time()
    for _ in range(calls):
        run()
    return time.process_time() - start


def wall_seconds(run: Run, calls: int) -> float:
    """Time on the clock on the wall, where other processes do the work."""
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return time.perf_counter() - start


def cuda_seconds(run: Run, calls: int) -> float:
    """Time between two events on the GPU."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(calls):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


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
