"""Run tests and write down how each failed: `python -m tests.mutants.observe REPORT TEST ...`."""

from __future__ import annotations

import json
import sys
from collections.abc import Generator
from pathlib import Path

import pytest

CRASHES = (ImportError, SyntaxError, NameError, AttributeError, TypeError)  # the patch is broken, not found out


class Observer:
    """A pytest plugin that collects what failed, with which exception, and whether it was a test that noticed."""

    def __init__(self) -> None:
        self.failures: list[dict[str, str | bool]] = []

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        if call.excinfo and report.failed:
            noticed = report.when == "call" and not issubclass(call.excinfo.type, CRASHES)
            self.failures.append({"test": item.nodeid, "raised": call.excinfo.typename, "noticed": noticed})
        return report


def main(report: str, *tests: str) -> int:
    observer = Observer()
    code = pytest.main(["-q", "-p", "no:cacheprovider", "--tb=short", *tests], plugins=[observer])
    import backsolve

    result = {"imported": str(Path(backsolve.__file__).parents[1]), "failures": observer.failures}
    Path(report).write_text(json.dumps(result), encoding="utf-8")
    return code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
