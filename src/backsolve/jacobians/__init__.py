"""How `J = df/dy` is represented and solved: one file a structure."""

from backsolve.jacobians.banded import Banded
from backsolve.jacobians.base import Assembled, Jacobian, Linearized
from backsolve.jacobians.default import Default
from backsolve.jacobians.dense import Dense
from backsolve.jacobians.diagonal import Diagonal
from backsolve.jacobians.differences import find_false_curvature, find_false_derivative
from backsolve.jacobians.equations import Constrained, Equations, LowerTriangular, MinimumNorm, Symmetric
from backsolve.jacobians.matrix_free import MatrixFree, MatrixFreeAt, Trial
from backsolve.jacobians.probe import find_coupling, find_lost_input, find_wrong_entries
from backsolve.jacobians.triangular import Triangular

__all__ = [
    "Assembled",
    "Banded",
    "Constrained",
    "Default",
    "Dense",
    "Diagonal",
    "Equations",
    "Jacobian",
    "Linearized",
    "LowerTriangular",
    "MatrixFree",
    "MatrixFreeAt",
    "MinimumNorm",
    "Symmetric",
    "Trial",
    "Triangular",
    "find_coupling",
    "find_false_curvature",
    "find_false_derivative",
    "find_lost_input",
    "find_wrong_entries",
]
