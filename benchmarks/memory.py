"""The peak of memory that a contestant takes above its inputs: `python -m benchmarks.memory CASE CONTESTANT`.

Measured in a process of its own, as the highest resident set of the one call minus the resident set before it, so that
NumPy's and JAX's memory counts like torch's. Only Linux can forget an earlier peak.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.case import Case
from benchmarks.sampling import prepare
from benchmarks.workloads import CASES

# Freed blocks go back to the system at once: the reuse of those that stay would not show.
RETURNING = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}


def peaks(case: Case) -> dict[str, float | None]:
    """MiB for each contestant; None for those that have no answer."""
    return {name: peak(case, name) for name in case.contestants}


def peak(case: Case, contestant: str) -> float | None:
    """MiB above the inputs, measured in a new process."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.memory", case.name, contestant]
    done = subprocess.run(command, env=os.environ | RETURNING, capture_output=True, text=True, check=False)
    return float(done.stdout) if done.returncode == 0 and done.stdout.strip() else None


def _peak_here(case: Case, contestant: str) -> float | None:
    run = prepare(contestant, case)
    if run is None:
        return None
    for _ in range(2):  # what is built once and kept is no cost of a call
        run()
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # forget the peak
    before = _resident("VmRSS")
    run()
    return (_resident("VmHWM") - before) / 1024


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


if __name__ == "__main__":
    torch.set_num_threads(1)
    result = _peak_here(CASES[sys.argv[1]], sys.argv[2])
    print("" if result is None else result)
