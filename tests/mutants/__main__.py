"""Break the code on purpose and demand that the named tests notice."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.mutants.table import MUTANTS, Mutant

ROOT = Path(__file__).parents[2]
PASSED, FAILED = 0, 1  # pytest's exit codes; all others mean that the tests could not be run
LIMIT = 600  # seconds for the tests of one mutant


class MutantError(Exception):
    """The tests of a mutant did not run, or did not do what they must."""


def run_tests(source: Path, tests: Sequence[str]) -> list[dict[str, str | bool]]:
    """Run tests against the code in a folder and return how they failed; an empty list if they passed."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        environment = os.environ | {
            "PYTHONPATH": str(source),
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, "-m", "tests.mutants.observe", str(report), *tests]
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=LIMIT
        )
        if done.returncode not in (PASSED, FAILED) or not report.exists():
            raise MutantError(f"the tests could not be run:\n{done.stdout}{done.stderr}")
        result = json.loads(report.read_text(encoding="utf-8"))
    if Path(result["imported"]).resolve() != source.resolve():
        raise MutantError(f"the tests imported backsolve from {result['imported']}, not from the copy")
    if bool(result["failures"]) != (done.returncode == FAILED):
        raise MutantError(f"the tests failed in a way that was not observed:\n{done.stdout}")
    return result["failures"]


def exceptions_raised(mutant: Mutant) -> list[str]:
    """Run a mutant's tests against a patched copy of src and return the exceptions with which they noticed it."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "src"
        shutil.copytree(ROOT / "src", source, ignore=shutil.ignore_patterns("__pycache__"))
        (source / mutant.file).write_text(mutant.applied(source), encoding="utf-8")
        failures = run_tests(source, mutant.tests)
    crashed = [f"{failure['test']} ({failure['raised']})" for failure in failures if not failure["noticed"]]
    if crashed:
        raise MutantError(f"crashes instead of being wrong: {', '.join(crashed)}")
    red = [str(failure["test"]) for failure in failures]
    green = [
        test for test in mutant.tests if not any(r == test or r.startswith((f"{test}[", f"{test}::")) for r in red)
    ]
    if green:
        raise MutantError(f"survives {', '.join(green)}")
    return sorted({str(failure["raised"]) for failure in failures})


def judge(mutant: Mutant) -> bool:
    """Print and return whether the mutant was caught."""
    try:
        verdict = f"caught    {mutant.name} ({', '.join(exceptions_raised(mutant))})"
        caught = True
    except (MutantError, ValueError, subprocess.TimeoutExpired) as error:
        verdict = f"NOT CAUGHT  {mutant.name}: {error}"
        caught = False
    print(verdict, flush=True)
    return caught


def main(words: Sequence[str]) -> int:
    mutants = [m for m in MUTANTS if not words or any(word in m.name for word in words)]
    tests = sorted({test for mutant in mutants for test in mutant.tests})
    if not mutants:
        print(f"no mutant's name contains any of {list(words)}")
        return 1
    try:
        failures = run_tests(ROOT / "src", tests)
    except MutantError as error:
        print(error)
        return 1
    if failures:
        print("these tests fail already without a mutant:", *sorted({str(f["test"]) for f in failures}), sep="\n  ")
        return 1
    with ThreadPoolExecutor(os.cpu_count()) as workers:
        caught = list(workers.map(judge, mutants))
    print(f"{sum(caught)} of {len(caught)} mutants caught")
    return 0 if all(caught) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
