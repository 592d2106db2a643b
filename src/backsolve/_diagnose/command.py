"""`python -m backsolve diagnose package.module:inverse --input x.npy`."""

from __future__ import annotations

import argparse
import functools
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from backsolve import errors
from backsolve._diagnose import diagnose
from backsolve._inverse import Inverse


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code: 0 if the pair fits, 1 if something is wrong, 2 if it cannot be run."""
    parser = argparse.ArgumentParser(prog="python -m backsolve", description="backsolve from the command line.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser(
        "diagnose",
        help="does f invert g, and what should be declared?",
        epilog="Exit code: 0 if nothing is wrong, 1 if something is, 2 if the diagnosis cannot be run.",
    )
    command.add_argument("inverse", help="package.module:name of what inverse(...) or inverse_of(...) made")
    command.add_argument("--input", required=True, metavar="X.npy", help="a sample of x")
    command.add_argument(
        "--params", metavar="P.npz", help="the params: arr_0, arr_1, ... by position, other names as keywords"
    )
    command.add_argument("--plot", metavar="PICTURE.png", help="where to save a picture (needs matplotlib)")
    options = parser.parse_args(arguments)
    try:
        inv = _load_inverse(options.inverse)
        params, keywords = _load_params(options.params) if options.params else ([], {})
        report = diagnose(inv, _load(options.input), *params, **keywords)
        if options.plot:
            report.plot(options.plot)
    except (errors.BacksolveError, ImportError, AttributeError, OSError, TypeError, ValueError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)  # noqa: T201
        return 2
    print(report)  # noqa: T201
    return 0 if report.ok else 1


def _load_inverse(text: str) -> Inverse:
    module, _, name = text.partition(":")
    if not name:
        raise ValueError(f"expected package.module:name, got {text!r}")
    sys.path.insert(0, os.getcwd())  # as `python -m` does for its own module
    return functools.reduce(getattr, name.split("."), importlib.import_module(module))  # type: ignore[return-value]


def _load(path: str) -> Tensor:
    return torch.from_numpy(_numpy().load(path, allow_pickle=False))


def _load_params(path: str) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Names that NumPy gives, arr_0, arr_1, ..., stand for positions."""
    with _numpy().load(path, allow_pickle=False) as arrays:
        tensors = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    positional = [tensors.pop(name) for name in (f"arr_{i}" for i in range(len(tensors))) if name in tensors]
    return positional, tensors


def _numpy() -> Any:
    try:
        import numpy
    except ImportError as error:
        raise errors.missing_extra("reading .npy files", "numpy", "diagnose") from error
    return numpy
