"""The tensors that f reads without being given them."""

from __future__ import annotations

from backsolve.errors.exceptions import StructureError
from backsolve.errors.layout import document


def untraceable(call: str, what: str) -> StructureError:
    """f reads a tensor that requires a gradient in a way that cannot be followed."""
    return StructureError(
        document(
            call,
            "f reads a tensor that requires a gradient, but not through a torch function that can be followed.",
            expected="every such tensor to be an argument of f, a leaf, or read by ordinary torch functions",
            got=what,
            remedy="pass the tensor explicitly: f(y, tensor) and the call inverse(...)(x, tensor)",
        )
    )


def late_hook() -> StructureError:
    """A gradient hook appeared on a closed-over leaf between the call and the backward pass."""
    return StructureError(
        document(
            "the backward pass of an inverse",
            "a gradient hook was registered after the call, on a leaf that f closes over.",
            expected="hooks that are registered before the call",
            got="a hook that would run twice, on an inner gradient and on the final one",
            remedy="register the hook earlier, or pass the tensor explicitly as a param of f",
        )
    )


def changed_between(call: str, difference: float) -> StructureError:
    """f gave another value in backward than in the call."""
    return StructureError(
        document(
            call,
            "f gave another value at the same y when it was evaluated again for a derivative.",
            expected="a deterministic f whose tensors do not change between the call and the backward pass",
            got=f"values that differ by up to {difference:.3g}",
            remedy="do not change what f reads before the backward pass (torch.func.functional_call does: pass the "
            "tensors as params, f(y, tensor), instead); switch off dropout and other randomness",
        )
    )


def no_longer_read(call: str, what: str) -> StructureError:
    """f read a tensor in the call, and does not read it when it is evaluated again for the derivative."""
    return StructureError(
        document(
            call,
            "f does not read the same tensors in the derivative as in the call.",
            expected="every tensor that f closes over to be the same object until the derivative is taken",
            got=f"{what} that f no longer reads; was it swapped, as by torch.func.functional_call?",
            remedy="pass the tensor explicitly: f(y, tensor) and the call inverse(...)(x, tensor)",
        )
    )
