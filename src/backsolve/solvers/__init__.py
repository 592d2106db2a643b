"""What can stand for g: numerical inversion, and code of other libraries."""

from backsolve.solvers.base import NumericalSolver
from backsolve.solvers.bracket import Bracket
from backsolve.solvers.foreign import NumpySolver, as_solver, numpy_solver

__all__ = ["Bracket", "NumericalSolver", "NumpySolver", "as_solver", "numpy_solver"]
