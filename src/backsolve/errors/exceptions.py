"""The exceptions, each named after what went wrong."""

from __future__ import annotations

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


for _kind in (BacksolveError, *BacksolveError.__subclasses__(), BacksolveWarning):
    _kind.__module__ = "backsolve.errors"  # where they are public: the name in tracebacks and pickles
