"""The reduction in pieces gives what the reduction in one gives."""

import math

import pytest
import torch

from backsolve._reduce import largest_magnitude


@pytest.mark.parametrize("n", [0, 1, 1000, 2**17, 2**17 + 1, 300_001])
@pytest.mark.parametrize("at", [0, -1])
@pytest.mark.parametrize("value", [7.0, -7.0, math.inf, -math.inf, math.nan])
def test_the_largest_is_found_anywhere(n: int, at: int, value: float) -> None:
    x = torch.linspace(-1, 1, n, dtype=torch.float64)
    if not n:
        assert largest_magnitude(torch.neg, x) == 0
        return
    x[at] = value
    found = [largest_magnitude(torch.neg, t) for t in (x, torch.stack([x, x], 1)[:, 0])]
    assert [str(f) for f in found] == [str(abs(value))] * 2
