"""What can stand for g: code of other libraries, and (later) numerical inversion."""

from backsolve.solvers.foreign import NumpySolver, as_solver, numpy_solver

__all__ = ["NumpySolver", "as_solver", "numpy_solver"]
