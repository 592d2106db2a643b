"""Every torch transform of an `Inverse` with an opaque g gives what it gives of the closed form."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

from tests.problems import PROBLEMS, Problem
from tests.transforms import OF_PARAMS, OF_X, Transform

TABLE = {**OF_X, **OF_PARAMS}
CASES = [
    pytest.param(problem, transform, id=f"{problem}-{name}")
    for problem in PROBLEMS
    for name, transform in TABLE.items()
    if name in OF_X or len(problem.inputs()) > 1
]


def assert_same(got: Any, expected: Any) -> None:
    """Equal to 1e-10 of the largest entry of each tensor, and of the same shapes."""
    got, expected = pytree.tree_leaves(got), pytree.tree_leaves(expected)
    assert len(got) == len(expected)
    for ours, exact in zip(got, expected, strict=True):
        assert ours.shape == exact.shape
        assert ours.dtype == exact.dtype
        scale = exact.abs().max() if exact.numel() else 1.0
        torch.testing.assert_close(ours, exact, rtol=1e-10, atol=1e-10 * float(scale))


def test_the_table_has_31_rows() -> None:
    assert len(TABLE) == 31


@pytest.mark.parametrize(("problem", "transform"), CASES)
def test_explicit(problem: Problem, transform: Transform) -> None:
    inputs = tuple(t.detach() for t in problem.inputs())
    assert_same(transform(problem.explicit(), inputs), transform(problem.exact, inputs))


@pytest.mark.parametrize(("problem", "transform"), [case for case in CASES if len(case.values[0].inputs()) > 1])
def test_closed_over(problem: Problem, transform: Transform) -> None:
    inputs = tuple(t.detach() for t in problem.inputs())
    assert_same(transform(problem.closed_over, inputs), transform(problem.exact, inputs))
