"""First and second derivatives of real inverses, against mpmath, to the last digits of double precision."""

import importlib

import pytest
import torch

from backsolve.errors import ResidualError
from tests.real_cases import PACKAGES

pytest.importorskip("mpmath", reason="the oracle of the real cases needs mpmath")

EPS = torch.finfo(torch.float64).eps
ROUNDINGS = 64  # f with its first two derivatives is some dozens of operations, and each rounds once


def load(name: str):
    """The module of a case, or a skip that names the optional package it lacks."""
    package = PACKAGES[name]
    pytest.importorskip(package, reason=f"{name} takes its g from {package}, which is not installed")
    return importlib.import_module(f"tests.real_cases.{name}")


@pytest.mark.parametrize("name", PACKAGES)
def test_first_and_second_derivatives(name):
    from tests.real_cases.case import measure

    for case in load(name).CASES:
        measured = measure(case)
        assert max(measured.roundings) <= ROUNDINGS, (case.title, measured)
        assert max(measured.relative) <= 1e-8, (case.title, measured)


def test_opencv_default_is_refused_with_the_remedy():
    """Five rounds of its iteration miss; CASES has the same g with `refine=5`, which makes it exact."""
    undistort = load("undistort_points")
    with pytest.raises(ResidualError, match=r"(?s)first at index \(1,\).*refine=5"):
        undistort.sloppy(undistort.POINTS, undistort.COEFFICIENTS)


def test_conservative_temperature_is_that_of_gsw():
    """The polynomial has all its published digits, over the whole range of the ocean."""
    module = load("potential_temperature")
    temperature, salinity = torch.cartesian_prod(
        torch.linspace(-2, 40, 43, dtype=torch.float64), torch.linspace(0, 42, 43, dtype=torch.float64)
    ).T
    expected = torch.as_tensor(module.gsw.CT_from_pt(salinity.numpy(), temperature.numpy()))
    actual = module.conservative_temperature(temperature, salinity)
    torch.testing.assert_close(actual, expected, rtol=0, atol=ROUNDINGS * EPS * expected.max().item())
