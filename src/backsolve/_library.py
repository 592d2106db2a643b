"""How custom operations are registered, into which a compiler traces nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

library: Any = torch.library  # whose decorators have incomplete types
Rule = TypeVar("Rule", bound=Callable[..., Any])


def operation(name: str, schema: str) -> Callable[[Rule], Rule]:
    """Register an operation that has no derivative; `torch.library.custom_op` takes 20 us a call to say so."""

    def register(function: Rule) -> Rule:
        library.define(f"backsolve::{name}", schema, tags=torch.Tag.pt2_compliant_tag)
        library.impl(f"backsolve::{name}", "CompositeExplicitAutograd", function)
        if schema.endswith("()"):
            library.register_fake(f"backsolve::{name}", lambda *_: None)
        return function

    return register
