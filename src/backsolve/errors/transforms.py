"""Calls under torch.func and torch.compile, in a tracer or on DTensors."""

from __future__ import annotations

from typing import Any

from backsolve.errors.exceptions import TransformError
from backsolve.errors.layout import describe, document


def traced(call: str) -> TransformError:
    """torch.jit.trace or make_fx would record y as a constant."""
    return TransformError(
        document(
            call,
            "a tracer is recording.",
            expected="an eager call, torch.compile, or torch.export",
            got="torch.jit.trace or make_fx: they would record what g returns and what the tests decide as constants",
            remedy="use torch.compile or torch.export, or trace the parts around the call",
        )
    )


def empty_map(call: str) -> TransformError:
    """vmap maps no sample at all, and g cannot be asked what it returns."""
    return TransformError(
        document(
            call,
            "vmap maps a dimension of size 0, and g takes one sample at a time.",
            expected="at least one sample, or event dimensions that let g take all samples at once",
            got="a mapped dimension of size 0",
            remedy="say which dimensions of the params form one event: inverse(..., param_event_dims=(2, 1))",
        )
    )


def unseen_code(call: str) -> TransformError:
    """Under torch.func, f calls code that does not show what it reads."""
    return TransformError(
        document(
            call,
            "under a transform f calls code that does not show which tensors it reads.",
            expected="an f made of torch functions",
            got="a tensor that no torch function made, but TorchScript, or a custom Function in forward mode",
            remedy="use the Python function instead of the scripted one; or take the derivatives with backward()",
        )
    )


def made_anew(call: str) -> TransformError:
    """Under torch.func, g reads tensors of a level that it makes anew each time that it is run."""
    return TransformError(
        document(
            call,
            "under a transform g reads tensors that it makes anew in each run.",
            expected="a g that works on its arguments, and closes over a few tensors at most",
            got="more and more wrapped tensors that g was not given",
            remedy="pass what g reads as params: g(x, *params); or take the derivatives with backward()",
        )
    )


def untested_levels(call: str) -> TransformError:
    """Under torch.func, g or the f of a numerical solver opens levels of its own, and nobody looks at y."""
    return TransformError(
        document(
            call,
            "under a transform g uses torch.func itself, and the residual is not tested.",
            expected="a residual test: a tensor of the transform may be taken for one of g's own levels",
            got='residual_tol=math.inf, or on_failure="ignore"',
            remedy="leave the residual test on; or take the derivatives with backward()",
        )
    )


def hidden_tensor(call: str) -> TransformError:
    """Under torch.func, f hands a tensor that it closes over to a transform of its own."""
    return TransformError(
        document(
            call,
            "under a transform f hands a tensor that it closes over to a transform of its own.",
            expected="grad, vmap, ... inside f to take y and params of f, and the rest to be read by torch functions",
            got="a tensor whose derivative would be lost",
            remedy="pass the tensor explicitly: f(y, tensor) and the call inverse(...)(x, tensor)",
        )
    )


NOT_COMPILED = (
    "backsolve: what returns a verdict (Inverse.solve), and what has a y whose shape does not follow from that of x "
    "(implicit functions, gauges and subspaces with event_dim > 0) is not compiled; compile without fullgraph=True"
)
NEEDS_MATRIX = (
    "backsolve: this needs all of J, which is formed for events of at most 1024 elements (MatrixFree) or 4096 "
    "(Banded); declare another structure, or call the uncompiled Inverse"
)
SHARDED_NOT_COMPILED = "backsolve: a call on DTensors is not compiled; compile without fullgraph=True"
MADE_INSIDE = (
    "backsolve: no Inverse can be made inside of a compiled function; make it outside, in __init__ or at module level"
)


def uncompiled_argument(call: str, value: Any) -> TransformError:
    """A param that cannot go through a compiled call."""
    return TransformError(
        document(
            call,
            "under torch.compile a param has a type that cannot be passed to g.",
            expected="tensors, numbers, strings, None, and tuples, lists and dicts of them",
            got=describe(value),
            remedy="pass its tensors one by one, or let f and g close over the object",
        )
    )


def compiled_without_tangents(call: str) -> TransformError:
    """A compiled function is called in forward mode, for which it was not traced."""
    return TransformError(
        document(
            call,
            "this compiled function was traced for backward passes, and would lose the tangent.",
            expected="a first call inside of forward_ad.dual_level, or torch.func.jvp inside of the compiled function",
            got="a dual level that was entered after compiling",
            remedy="compile x, t -> torch.func.jvp(inv, (x,), (t,)), or call the uncompiled function",
        )
    )


def forgotten_problem() -> TransformError:
    """A compiled function outlived the Inverse that it calls."""
    return TransformError(
        document(
            "a compiled call",
            "the Inverse that it was traced with does not exist any more.",
            expected="an Inverse that lives as long as the compiled function",
            got="one that was garbage-collected",
            remedy="make the Inverse outside of the compiled function, and keep it",
        )
    )


def unforeseen_shape(call: str, expected: Any, got: Any) -> TransformError:
    """g returned another shape than the one that the compiler was told."""
    return TransformError(
        document(
            call,
            "under torch.compile the shape of y must follow from those of x and of the params.",
            expected=f"{tuple(expected)}, x broadcast with the params whose event dimensions are known",
            got=f"{tuple(got)}",
            remedy="name the event dimensions, param_event_dims=(2, 1), or expand x to the shape of y before the call",
        )
    )


def other_closure(call: str) -> TransformError:
    """f reads other numbers in the compiled graph than when it is called by itself."""
    return TransformError(
        document(
            call,
            "f(y) is not what it is in the compiled graph, so the residual test cannot tell whether g has solved it.",
            expected="an f that reads the same tensors inside and outside of the compiled function",
            got="two values of f(y); were parameters swapped, as by torch.func.functional_call?",
            remedy="pass the tensors explicitly: f(y, tensor) and the call inverse(...)(x, tensor)",
        )
    )


def distributed(call: str, expected: str, got: str) -> TransformError:
    """A call on DTensors that cannot be made part by part."""
    return TransformError(
        document(
            call,
            "a DTensor is inverted without communication, by each process its own events.",
            expected=expected,
            got=got,
            remedy="apply torch.distributed.tensor.experimental.local_map to the Inverse, with in_grad_placements: "
            "Partial() for params that are replicated while x is sharded; or redistribute x before the call",
        )
    )
