"""Code of other libraries as the solver g: tensors in, NumPy arrays between, tensors out."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from backsolve import errors

Solver = Callable[..., Any]


@dataclass(frozen=True)
class NumpySolver:
    """A function of NumPy arrays as a solver; made by `numpy_solver`."""

    fn: Callable[..., Any]
    may_write: bool = True
    """Whether fn could write into its arguments or hand out a buffer of its own; ufuncs do neither."""

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """Convert the tensors to arrays, call fn, and give its result the dtype and device of the first tensor."""
        leaves, structure = pytree.tree_flatten((args, kwargs))
        like = next((t for t in leaves if isinstance(t, Tensor) and (t.is_floating_point() or t.is_complex())), None)
        arrays = [self._to_array(t) if isinstance(t, Tensor) else t for t in leaves]
        args, kwargs = pytree.tree_unflatten(arrays, structure)
        return to_tensor(self.fn(*args, **kwargs), like, copy=self.may_write, call=f"numpy_solver({name_of(self.fn)})")

    def _to_array(self, t: Tensor) -> Any:
        known = t.float() if t.dtype is torch.bfloat16 else t  # NumPy has no bfloat16
        array = known.numpy(force=True)  # from any device, also of a view that is a lazy conjugate or negative
        return array.copy() if self.may_write else array


def numpy_solver(fn: Callable[..., Any]) -> NumpySolver:
    """Wrap a function of NumPy arrays, so that it can be the solver g.

    fn gets the whole batch at once: arrays of the shapes of x and of the params' tensors (copies, which it may write
    into), on the CPU; other arguments as they are. What it returns gets the dtype and the device of x back. NumPy
    and SciPy ufuncs (`numpy.arcsin`, `scipy.special.ndtri`) need no wrapping.

    Args:
        fn: called as `fn(x, *params, **kwargs)`; returns an array of the shape of y.

    Raises:
        SolverOutputError: when called, if fn returns something that is no real array.

    Example:
        >>> import torch
        >>> from backsolve import inverse
        >>> from backsolve.solvers import numpy_solver
        >>> cube_root = inverse(lambda y: y**3, numpy_solver(lambda x: abs(x) ** (1 / 3)))
        >>> x = torch.tensor([8.0], dtype=torch.float64, requires_grad=True)
        >>> cube_root(x).backward()
        >>> x.grad
        tensor([0.0833], dtype=torch.float64)
    """
    if not callable(fn):
        raise errors.bad_option("fn", "a function of NumPy arrays", fn)
    return NumpySolver(fn)


def as_solver(g: Any) -> Solver:
    """Recognise NumPy ufuncs (all of scipy.special) and convert them; leave everything else as it is."""
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(g, numpy.ufunc):
        return NumpySolver(g, may_write=False)
    return g


def to_tensor(result: Any, like: Tensor | None, *, copy: bool, call: str) -> Tensor:
    """The result of foreign code as a tensor of the dtype and device of `like`."""
    if isinstance(result, Tensor):
        return result.to(like, copy=True) if like is not None else result.clone()
    try:
        import numpy as np
    except ImportError as error:
        raise errors.missing_extra("a solver that returns NumPy arrays", "numpy", "numpy") from error
    try:
        array = np.asarray(result)
    except ValueError:  # a ragged list
        array = None
    kinds = "fiuc" if like is not None and like.is_complex() else "fiu"
    if array is None or array.dtype.kind not in kinds:
        raise errors.bad_solver_output(
            call,
            "a real floating-point array",
            errors.describe(result),
            "take .real of a result that is complex in type only; return one array, not a list of several",
        )
    known = np.complex128 if array.dtype.kind == "c" else np.float64
    if array.dtype.itemsize > np.dtype(known).itemsize or not array.dtype.isnative:  # long double, foreign byte order
        array, copy = array.astype(known), False
    tensor = torch.from_numpy(array.copy() if copy or not array.flags.writeable else array)
    return tensor.to(like) if like is not None else tensor


def name_of(function: Any) -> str:
    """What a message calls a function."""
    inner = getattr(function, "fn", function)
    return getattr(inner, "__name__", type(inner).__name__)
