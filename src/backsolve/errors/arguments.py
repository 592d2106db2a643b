"""The options and arguments of a call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from backsolve.errors.exceptions import ArgumentError
from backsolve.errors.layout import describe, document


def bad_option(option: str, expected: str, got: Any) -> ArgumentError:
    """An option of `inverse`, `inverse_of` or `implicit_function` that makes no sense."""
    return ArgumentError(
        document(
            "inverse(...)",
            f"the option {option} is not usable.",
            expected=expected,
            got=f"{option}={got!r}",
            remedy=f"pass one of the expected values for {option}",
        )
    )


def bad_setting(call: str, setting: str, expected: str, got: Any) -> ArgumentError:
    """A setting of a solver that makes no sense."""
    return ArgumentError(
        document(
            f"{call}(...)",
            f"the setting {setting} is not usable.",
            expected=expected,
            got=f"{setting}={got!r}",
            remedy=f"pass one of the expected values for {setting}",
        )
    )


def bad_input(call: str, x: Any) -> ArgumentError:
    """An x that is no floating-point tensor."""
    return ArgumentError(
        document(
            call,
            "x cannot be inverted.",
            expected="a floating-point torch.Tensor x, dense and with data, of 16, 32 or 64 bits, or a complex one",
            got=describe(x),
            remedy="convert it first, for example torch.as_tensor(x, dtype=torch.float64)",
        )
    )


def too_few_dimensions(call: str, shape: Sequence[int], event_dim: int) -> ArgumentError:
    """An x with fewer dimensions than one event has."""
    return ArgumentError(
        document(
            call,
            "x has fewer dimensions than one event.",
            expected=f"at least event_dim = {event_dim} dimensions",
            got=f"x of shape {tuple(shape)}",
            remedy="add the missing dimensions, or lower event_dim",
        )
    )


def bad_subject(got: Any) -> ArgumentError:
    """Something else than an Inverse is to be diagnosed."""
    return ArgumentError(
        document(
            "diagnose(...)",
            "there is nothing to diagnose.",
            expected="an Inverse, as inverse(...) and inverse_of(...) make it",
            got=describe(got),
            remedy="write diagnose(inverse(f, g), x, *params); for c(y, p) = 0 diagnose inverse(c, lambda x, p: g(p)) "
            "at x = 0",
        )
    )


def mixed_devices(call: str, x: Any, other: Any) -> ArgumentError:
    """A parameter that lives on another device than x."""
    return ArgumentError(
        document(
            call,
            "the tensors of the call are on different devices.",
            expected=f"every tensor with dimensions on {x.device}, the device of x",
            got=describe(other),
            remedy=f"move it with .to({str(x.device)!r})",
        )
    )


def complex_bracket(call: str, solver: Any) -> ArgumentError:
    """A numerical solver was given complex numbers."""
    return ArgumentError(
        document(
            call,
            "backsolve's own solvers invert real functions.",
            expected="a real x",
            got=f"a complex x with {solver!r}",
            remedy="give a g for complex numbers, or write f over the real and imaginary parts",
        )
    )


def missing_extra(feature: str, package: str, extra: str) -> ImportError:
    """An optional dependency is not installed."""
    return ImportError(f"{feature} needs {package}, which is not installed: pip install 'backsolve[{extra}]'")
