"""What g and f returned, and what a solver did not find."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from backsolve.errors.exceptions import (
    BracketError,
    ConvergenceError,
    ForwardOutputError,
    ResidualError,
    SampleError,
    SolverOutputError,
)
from backsolve.errors.layout import count, describe, document


def bad_solver_output(call: str, expected: str, got: str, remedy: str) -> SolverOutputError:
    """g's return value cannot be y."""
    problem = "the solver g returned something that cannot be y."
    return SolverOutputError(document(call, problem, expected=expected, got=got, remedy=remedy))


def solver_changed_input(call: str, which: str) -> SolverOutputError:
    """g wrote into one of the tensors that it was given."""
    return SolverOutputError(
        document(
            call,
            f"the solver g changed its argument {which} in place.",
            expected="a solver that leaves its arguments as they are",
            got=f"another version of {which} after the call; its values are now those that g wrote",
            remedy=f"let g work on a copy, {which}.clone()",
        )
    )


def sample_failed(call: str, failed: int, total: int, index: tuple[int, ...], reason: str, y: Any) -> SampleError:
    """A solver of single samples raised, or returned something that cannot be y, or its worker died."""
    error = SampleError(
        document(
            call,
            "the solver failed for some samples.",
            expected="one y for each sample",
            got=f"{count(failed, total, 'sample')} failed, the first at index {index}:\n{reason.rstrip()}",
            remedy='mend the solver for this sample, or keep the others with on_failure="nan"; they are in error.y',
        )
    )
    error.y = y
    return error


def no_bracket(call: str, problem: str, got: str, remedy: str) -> BracketError:
    """The bounds do not enclose a root."""
    expected = "bounds lower <= upper between which f(y) - x, continuous, changes its sign"
    return BracketError(document(call, problem, expected=expected, got=got, remedy=remedy))


def not_converged(call: str, problem: str, expected: str, got: str, remedy: str) -> ConvergenceError:
    """A numerical solver gave up."""
    return ConvergenceError(document(call, problem, expected=expected, got=got, remedy=remedy))


def residual_failed(call: str, criterion: str, got: str, remedy: str) -> ResidualError:
    """f(g(x)) differs from x in some events."""
    return ResidualError(
        document(call, "f(g(x)) is not x.", expected=criterion, got=got, remedy=remedy),
    )


def bad_forward_output(call: str, expected: str, got: str, remedy: str) -> ForwardOutputError:
    """f's return value cannot be x."""
    problem = "the forward function f returned something that cannot be x."
    return ForwardOutputError(document(call, problem, expected=expected, got=got, remedy=remedy))


def forward_changed_input(call: str) -> ForwardOutputError:
    """f wrote into y or into one of its params."""
    return ForwardOutputError(
        document(
            call,
            "the forward function f changed y or a param in place.",
            expected="an f that leaves its arguments as they are",
            got="another version of an argument after the call of f",
            remedy="use the variants without underscore (torch.relu for torch.relu_), or inplace=False in a module",
        )
    )


def bad_entries(call: str, shape: Sequence[int], dtype: Any, got: Any) -> ForwardOutputError:
    """The user's formula for the entries of J returned something that cannot be them."""
    return ForwardOutputError(
        document(
            call,
            "the function entries returned something that cannot be J.",
            expected=f"a tensor of shape {tuple(shape)} and dtype {dtype}",
            got=describe(got),
            remedy="return what the structure's docstring says: a derivative for each element (Diagonal), a matrix for "
            "each event (Dense, Triangular), or its bands (Banded)",
        )
    )
