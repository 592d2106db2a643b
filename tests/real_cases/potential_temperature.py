"""Potential temperature from Conservative Temperature and Absolute Salinity, as in TEOS-10.

gsw's one and a half Newton steps leave a residual of 4e-14 deg C at most, so nothing needs to be refined.
"""

import gsw
import torch

from backsolve import inverse
from backsolve.solvers import numpy_solver
from tests.real_cases.case import Case

HEAT_CAPACITY = 3991.86795711963  # J/(kg K), by definition of Conservative Temperature
SALINITY_UNIT = 40 * 35.16504 / 35  # g/kg
TEMPERATURE_UNIT = 40  # deg C

# The potential enthalpy of seawater in J/kg: g - T dg/dT, at the surface, of the Gibbs function of IAPWS-08.
# Row i, column j is the coefficient of s^i t^j.
POTENTIAL_ENTHALPY = [
    [
        *(61.01362420681071, 168776.46138048015, -2735.2785605119625, 2574.2164453821433),
        *(-1536.6644434977543, 545.7340497931629, -50.91091728474331, -18.30489878927802),
    ],
    [0.0],
    [
        *(268.5520265845071, -12019.028203559312, 3734.858026725145, -2046.7671145057618),
        *(465.28655623826234, -0.6370820302376359, -10.650848542359153),
    ],
    [937.2099110620707, 588.1802812170108, 248.39476522971285, -3.871557904936333, -2.6268019854268356],
    [
        *(-1687.914374187449, 936.3206544460336, -942.7827304544439, 369.4389437509002),
        *(-33.83664947895248, -9.987880382780322),
    ],
    [246.9598888781377],
    [123.59576582457964],
    [-48.5891069025409],
]


def conservative_temperature(potential_temperature, salinity):
    """Potential enthalpy over a fixed heat capacity, in deg C; for tensors and for mpmath's numbers."""
    s, t = (salinity / SALINITY_UNIT) ** 0.5, potential_temperature / TEMPERATURE_UNIT
    return _polynomial(s, [_polynomial(t, row) for row in POTENTIAL_ENTHALPY]) / HEAT_CAPACITY


def _polynomial(variable, coefficients):
    total = 0.0
    for c in reversed(coefficients):
        total = total * variable + c
    return total


def potential_temperature(conservative_temperature, salinity):
    return gsw.pt_from_CT(salinity, conservative_temperature)


TEMPERATURES = torch.tensor([-1.5, 0.0, 4.0, 10.0, 25.0, 38.0], dtype=torch.float64)
SALINITIES = torch.tensor([34.2, 0.5, 7.0, 35.16504, 36.5, 42.0], dtype=torch.float64)

CASES = [
    Case(
        "gsw.pt_from_CT",
        inverse(conservative_temperature, numpy_solver(potential_temperature)),
        conservative_temperature,
        (TEMPERATURES, SALINITIES),
    )
]
