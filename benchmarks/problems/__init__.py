"""The problems, one file each: f, g and what hand-written code knows about them."""

from benchmarks.problems.arcsin import ARCSIN
from benchmarks.problems.dense import DENSE
from benchmarks.problems.implied_volatility import IMPLIED_VOLATILITY
from benchmarks.problems.quantiles import GAMMA, MIXTURE

__all__ = ["ARCSIN", "DENSE", "GAMMA", "IMPLIED_VOLATILITY", "MIXTURE"]
