"""How a message is laid out, and how it names values and counts."""

from __future__ import annotations

from typing import Any


def document(call: str, problem: str, *, expected: str, got: str, remedy: str) -> str:
    """Lay out one message: which call, what was expected, what came, what to do."""
    return f"{call}: {problem}\n  expected: {expected}\n  got:      {got}\n  remedy:   {remedy}"


def describe(value: Any) -> str:
    """Name a value by what matters in a message: its type and, for arrays, shape, dtype and device."""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        device = f", device {value.device}" if hasattr(value, "device") else ""
        return f"a {type(value).__name__} of shape {tuple(value.shape)}, dtype {value.dtype}{device}"
    return f"{value!r} of type {type(value).__name__}"


def count(failed: int, total: int, noun: str) -> str:
    """Say how many of how many events."""
    return f"{failed} of {total} {noun}{'s' if total != 1 else ''}"
