"""What can stand for g: numerical inversion, and code of other libraries."""

from backsolve.solvers.base import NumericalSolver
from backsolve.solvers.bracket import Bracket
from backsolve.solvers.fixed_point import FixedPoint
from backsolve.solvers.foreign import NumpySolver, as_solver, numpy_solver
from backsolve.solvers.newton import Newton
from backsolve.solvers.samples import EachSample, each_sample

__all__ = [
    "Bracket",
    "EachSample",
    "FixedPoint",
    "Newton",
    "NumericalSolver",
    "NumpySolver",
    "as_solver",
    "each_sample",
    "numpy_solver",
]
