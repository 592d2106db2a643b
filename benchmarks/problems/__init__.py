"""The problems, one file each: f, g and what hand-written code knows about them."""

from benchmarks.problems.arcsin import ARCSIN
from benchmarks.problems.dense import DENSE
from benchmarks.problems.implied_volatility import IMPLIED_VOLATILITY

__all__ = ["ARCSIN", "DENSE", "IMPLIED_VOLATILITY"]
