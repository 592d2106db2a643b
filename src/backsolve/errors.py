"""Every error that backsolve raises, and the words of each.

A message is a small document: the call it is about, what was expected, what came, and what to do about it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class BacksolveError(Exception):
    """Base class of every error that backsolve raises on purpose."""


class ArgumentError(BacksolveError, ValueError):
    """An option of `inverse` or an argument of a call is not one that backsolve can work with."""


class SolverOutputError(BacksolveError):
    """The solver g returned something that cannot be `y`: wrong type, shape, dtype or device."""


class ForwardOutputError(BacksolveError):
    """The forward function f returned something that cannot be `x`: wrong type, shape, dtype or device."""


class ResidualError(BacksolveError):
    """`f(g(x))` is not `x`: g returned a wrong or unconverged y, or f is not its inverse."""


class BracketError(BacksolveError):
    """There is no root between the bounds of a `Bracket`, or the bounds are no bracket."""


class ConvergenceError(BacksolveError):
    """A numerical solver did not find y."""


class SampleError(BacksolveError):
    """A solver that is called sample by sample failed for some of them; `y` has the others, and NaN for these."""

    y: Any = None


class SingularJacobianError(BacksolveError):
    """`J = df/dy` is singular at the solution, so `dg/dx = J^-1` does not exist there."""


class StructureError(BacksolveError):
    """f does not have the structure that was declared, or depends on tensors in a way that cannot be followed."""


class DerivativeError(BacksolveError):
    """A derivative was asked for that the given information does not determine."""


class TransformError(BacksolveError):
    """The call is inside a torch transform that backsolve does not support."""


class BacksolveWarning(UserWarning):
    """What `on_failure="warn"` issues instead of raising."""


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


# --------------------------------------------------------------------------- options and arguments of a call


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


# ------------------------------------------------------------------------------------ what g and f returned


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


def not_square(call: str, y_shape: Sequence[int], z_shape: Sequence[int]) -> ForwardOutputError:
    """f maps events of one size to events of another: J is not square."""
    return ForwardOutputError(
        document(
            call,
            "J = df/dy is not square.",
            expected=f"f(y) with the event shape of y, {tuple(y_shape)}",
            got=f"f(y) with the event shape {tuple(z_shape)}",
            remedy="f alone does not determine dg then. With fewer equations than unknowns, many g satisfy f(g(x)) = "
            "x, with different derivatives: say which is yours, jacobian=Dense(gauge=MinimumNorm()) or "
            "Dense(gauge=Constrained(h)) of backsolve.jacobians. With more, only some x have a y",
        )
    )


def gauge_does_not_fit(unknowns: int, equations: int, constraints: int) -> ForwardOutputError:
    """f and its gauge do not have as many equations as there are unknowns."""
    return ForwardOutputError(
        document(
            "Dense(gauge=...)",
            "f and the gauge together must have as many equations as unknowns.",
            expected=f"{unknowns} equations for the {unknowns} elements of an event of y",
            got=f"{equations} from f and {constraints} from the gauge",
            remedy="let h return one number for each equation that f lacks",
        )
    )


def no_square_map(call: str, claim: Any) -> DerivativeError:
    """Something was asked for that only a map between spaces of one dimension has."""
    return DerivativeError(
        document(
            call,
            "there is no square dy/dx.",
            expected="x and y with equally many coordinates",
            got=f"jacobian={claim!r}",
            remedy="use torch.func.jacrev or torch.autograd.functional.jacobian for dy/dx; it has no determinant",
        )
    )


# ------------------------------------------------------------------------------------- numerical solvers


def no_bracket(call: str, problem: str, got: str, remedy: str) -> BracketError:
    """The bounds do not enclose a root."""
    expected = "bounds lower <= upper between which f(y) - x, continuous, changes its sign"
    return BracketError(document(call, problem, expected=expected, got=got, remedy=remedy))


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


def not_converged(call: str, problem: str, expected: str, got: str, remedy: str) -> ConvergenceError:
    """A numerical solver gave up."""
    return ConvergenceError(document(call, problem, expected=expected, got=got, remedy=remedy))


# ------------------------------------------------------------------------------------- residual and structure


def residual_failed(call: str, criterion: str, got: str, remedy: str) -> ResidualError:
    """f(g(x)) differs from x in some events."""
    return ResidualError(
        document(call, "f(g(x)) is not x.", expected=criterion, got=got, remedy=remedy),
    )


def singular(
    call: str, noun: str, failed: int, total: int, index: tuple[int, ...], numbers: str
) -> SingularJacobianError:
    """J has no inverse in some events."""
    return SingularJacobianError(
        document(
            call,
            "J = df/dy is singular, so dg/dx = J^-1 does not exist.",
            expected=f"an invertible J in every {noun}",
            got=f"{count(failed, total, noun)} singular, the first at index {index}: {numbers}",
            remedy='keep x away from such points, or choose on_failure="nan" to lose only these derivatives',
        )
    )


def indefinite(index: tuple[int, ...], lowest: float, highest: float) -> StructureError:
    """A J that was declared positive definite has a negative eigenvalue."""
    return StructureError(
        document(
            "Dense(positive_definite=True)",
            "J is not positive definite.",
            expected="only positive eigenvalues in every event",
            got=f"eigenvalues from {lowest:.3g} to {highest:.3g} at index {index}",
            remedy="use Dense(), or Dense(positive_definite=True) for -f if J is negative definite",
        )
    )


def negative_curvature(index: tuple[int, ...]) -> StructureError:
    """Conjugate gradients met a direction of negative curvature."""
    return StructureError(
        document(
            "MatrixFree('cg')",
            "J is not positive definite.",
            expected="p . J p > 0 for every direction p, in every event",
            got=f"a direction with p . J p < 0 at index {index}",
            remedy="use MatrixFree('gmres'), or the negative of f if J is negative definite",
        )
    )


def krylov(
    method: str, failed: int, total: int, index: tuple[int, ...], residual: float, products: int
) -> ConvergenceError:
    """A Krylov method did not solve the linear system of a derivative."""
    return ConvergenceError(
        document(
            f"MatrixFree({method!r})",
            "the linear system of a derivative, J^T w = v or J u = b, is not solved.",
            expected="a relative residual of at most rtol, or of the rounding errors of a direct solver",
            got=f"{count(failed, total, 'event')} not converged after {products} products with J, the first at index "
            f"{index}: a relative residual of {residual:.3g}",
            remedy="raise maxiter or restart, pass a preconditioner, or say what solves instead: fallback=Dense(). A "
            "singular J has no solution at all",
        )
    )


def ill_conditioned(
    method: str, failed: int, total: int, index: tuple[int, ...], condition: float, limit: float
) -> ConvergenceError:
    """A Krylov space showed J to be worse conditioned than is believed."""
    return ConvergenceError(
        document(
            f"MatrixFree({method!r})",
            "J is ill-conditioned: a solution with a small residual may be far off.",
            expected=f"a condition of J of at most max_condition = {limit:g}",
            got=f"{count(failed, total, 'event')} refused, the first at index {index}: a condition of {condition:.3g}, "
            "as far as it was seen",
            remedy="pass a preconditioner, say what solves instead: fallback=Dense(), or raise max_condition with a "
            "smaller rtol",
        )
    )


def needs_matrix(
    purpose: str,
    n: int,
    limit: int,
    structure: str = "MatrixFree()",
    remedy: str = "declare a structure that has it (Banded, Triangular, Diagonal), or Dense() if the memory is there",
) -> StructureError:
    """Something that takes all of J was asked for, and J is too large to be formed."""
    return StructureError(
        document(
            structure,
            f"{purpose} needs all of J.",
            expected=f"events of at most {limit} elements, for which J is formed",
            got=f"events of {n} elements",
            remedy=remedy,
        )
    )


def singular_values(matrix: Any) -> str:
    """How near a matrix is to a singular one, for a message."""
    values = matrix.detach().nan_to_num().svd().S
    return f"the singular values of J reach from {values[0].item():.3g} down to {values[-1].item():.3g}"


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


def constant_jacobian(call: str) -> DerivativeError:
    """A second derivative was asked for, but J is a given constant."""
    return DerivativeError(
        document(
            call,
            "a second derivative needs dJ/dy, and forward_jacobian is a constant.",
            expected="forward_func=f, from which J and its derivatives follow",
            got="a bare forward_jacobian tensor, which fixes the first derivative only",
            remedy="pass forward_func=f instead, or differentiate once",
        )
    )


def missing_extra(feature: str, package: str, extra: str) -> ImportError:
    """An optional dependency is not installed."""
    return ImportError(f"{feature} needs {package}, which is not installed: pip install 'backsolve[{extra}]'")
