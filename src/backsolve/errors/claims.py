"""What f or its J was claimed to be, and is not."""

from __future__ import annotations

from typing import Any

from backsolve.errors.exceptions import StructureError
from backsolve.errors.layout import describe, document


def no_dependence(call: str) -> StructureError:
    """f(y) does not depend on y in the eyes of autograd."""
    return StructureError(
        document(
            call,
            "f(y) does not depend on y.",
            expected="an f that is differentiable in its first argument",
            got="a result of f that autograd cannot trace back to y",
            remedy="write f with torch operations and without .detach(), .item(), .numpy() or torch.no_grad() on y",
        )
    )


def not_holomorphic(call: str, index: tuple[int, ...]) -> StructureError:
    """A complex f that depends on the conjugate of y."""
    return StructureError(
        document(
            call,
            "f is not holomorphic: its derivative at a complex y is not one complex number, or matrix.",
            expected="an f of complex tensors without conj, abs, real, imag, angle and the like of y",
            got=f"a derivative that is not complex linear at index {index}",
            remedy="write f over the real and imaginary parts of y, as torch.view_as_real gives them, with event_dim=1",
        )
    )


def coupled(call: str, noun: str, index: tuple[int, ...], leak: float) -> StructureError:
    """The probe found that f mixes what was declared independent."""
    declared = "elementwise" if noun == "element" else "independent across the batch"
    hint = ", or declare jacobian=Dense()" if noun == "element" else " (batch normalisation couples a whole batch)"
    return StructureError(
        document(
            call,
            f"f is not {declared}.",
            expected=f"each {noun} of f(y) to depend on the same {noun} of y only",
            got=f"{noun} {index} of y changes another {noun} of f(y): the probe found {leak:.3g} where it must find 0",
            remedy="raise event_dim to the number of rightmost dimensions that f mixes" + hint,
        )
    )


def contradicted(call: str, claim: Any, found: str) -> StructureError:
    """The probe found that J has not the structure that was declared within an event."""
    return StructureError(
        document(
            call,
            "J does not have the declared structure.",
            expected=f"J = df/dy as {claim!r} describes it",
            got=found,
            remedy="declare a wider structure; Dense() claims nothing about the inside of an event",
        )
    )


def wrong_entries(call: str, index: tuple[int, ...], by_autograd: float, by_formula: float) -> StructureError:
    """The entries of J that the user gave are not the derivative of f."""
    return StructureError(
        document(
            call,
            "the known entries of J are not the derivative of f.",
            expected="entries(y, *params) equal to df/dy as autograd finds it",
            got=f"in J^T u at index {index}, u random: {by_formula:.9g} by entries, {by_autograd:.9g} by autograd",
            remedy="correct entries, or leave it out: autograd then differentiates f",
        )
    )


def lost_input(call: str, tensor: Any, by_autograd: float, by_formula: float) -> StructureError:
    """The entries of J that the user gave do not depend on a param, or a weight, as J does."""
    return StructureError(
        document(
            call,
            "the known entries of J lose a second derivative.",
            expected="entries(y, *params) to depend on the params, and on what f closes over, as df/dy does",
            got=f"d(c . J^T u)/dp, c and u random, p being {describe(tensor)}: {by_formula:.6g} by entries, "
            f"{by_autograd:.6g} by autograd",
            remedy="let entries read the same tensors as f, without .detach(), .data, .item(), NumPy or a cache; or "
            "leave entries out: autograd then differentiates f",
        )
    )


def false_derivative(
    call: str, noun: str, index: tuple[int, ...], by_jacobian: float, by_values: float
) -> StructureError:
    """The values of f do not change as J says."""
    return StructureError(
        document(
            call,
            "J is not the derivative of the values of f.",
            expected="f(y + h t) - f(y - h t) to be 2 h J t for small h",
            got=f"in {noun} {index}, along a random direction: {by_jacobian:.6g} by J, {by_values:.6g} by finite "
            "differences",
            remedy="let no part of f that depends on y go through .detach(), .data, .item(), NumPy, torch.no_grad(), a "
            "hook or a wrong backward; if large terms cancel in f, use float64; verify=False trusts J",
        )
    )


def false_curvature(
    call: str, noun: str, index: tuple[int, ...], by_autograd: float, by_values: float
) -> StructureError:
    """The gradients of f do not change as their own derivative says."""
    place = f"in {noun} {index}" if index else "in all"
    return StructureError(
        document(
            call,
            "the second derivatives of f are not those of its first derivatives.",
            expected="J(y + h t) - J(y - h t) to be 2 h times the derivative of J along t for small h, and df/dp alike",
            got=f"{place}, along a random direction: {by_autograd:.6g} by autograd, {by_values:.6g} by finite "
            "differences",
            remedy="some operation in f has a backward that is not differentiable (a Function that detaches what it "
            "saved, once_differentiable, torch.cond): rewrite it, or take first derivatives only, without "
            "create_graph; verify=False trusts f",
        )
    )
