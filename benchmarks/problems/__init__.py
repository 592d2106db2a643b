"""The problems, one file each: f, g and what hand-written code knows about them."""

from benchmarks.problems.arcsin import ARCSIN
from benchmarks.problems.dense import DENSE
from benchmarks.problems.implied_volatility import IMPLIED_VOLATILITY
from benchmarks.problems.quantiles import GAMMA, MIXTURE
from benchmarks.problems.reaction_diffusion import REACTION_DIFFUSION
from benchmarks.problems.residual_blocks import CONVOLUTION, DENSE_FLOAT32
from benchmarks.problems.shooting import SHOOTING

__all__ = [
    "ARCSIN",
    "CONVOLUTION",
    "DENSE",
    "DENSE_FLOAT32",
    "GAMMA",
    "IMPLIED_VOLATILITY",
    "MIXTURE",
    "REACTION_DIFFUSION",
    "SHOOTING",
]
