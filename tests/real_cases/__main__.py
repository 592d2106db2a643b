"""Print how exact the derivatives of every real case are, as a Markdown table."""

import importlib

from tests.real_cases import PACKAGES
from tests.real_cases.case import measure

if __name__ == "__main__":
    print("| g | worst relative error of first derivatives | of second derivatives |\n|---|---|---|")
    for name in PACKAGES:
        for case in importlib.import_module(f"tests.real_cases.{name}").CASES:
            _, first, second = measure(case).relative
            print(f"| {case.title} | {first:.0e} | {second:.0e} |", flush=True)
