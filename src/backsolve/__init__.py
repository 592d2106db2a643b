"""backsolve: differentiate a function through its inverse."""

from backsolve._diagnose import diagnose
from backsolve._inverse import Inverse, implicit_function, inverse, inverse_of
from backsolve._solution import Solution
from backsolve.errors import BacksolveError
from backsolve.jacobians import Banded, Dense, Diagonal, MatrixFree, Triangular

__version__ = "0.1.0"

__all__ = [
    "BacksolveError",
    "Banded",
    "Dense",
    "Diagonal",
    "Inverse",
    "MatrixFree",
    "Solution",
    "Triangular",
    "diagnose",
    "implicit_function",
    "inverse",
    "inverse_of",
]
