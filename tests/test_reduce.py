"""The reduction in pieces gives what the reduction in one gives."""

import math

import pytest
import torch

from backsolve._reduce import (
    ends_of_one_sign,
    extremes,
    greatest_magnitude,
    least_magnitude,
    least_product,
    magnitudes,
    magnitudes_of_one_sign,
)

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 1000, 2**17, 2**17 + 1, 300_001])
@pytest.mark.parametrize("at", [0, -1])
@pytest.mark.parametrize("value", [7.0, -7.0, 0.0, math.inf, -math.inf, math.nan, -math.nan])
def test_the_extremes_are_found_anywhere(n: int, at: int, value: float, dtype: torch.dtype) -> None:
    x = torch.linspace(1, 2, n).to(dtype)
    x[at] = value
    expected = [str(t.item()) for t in ((-x).amin(), (-x).amax())]
    for t in (x, torch.stack([x, x], 1)[:, 0]):
        assert [str(e) for e in extremes(torch.neg, t)] == expected


@pytest.mark.parametrize("values", [[3.0, 1.0, 2.0], [-3.0, -1.0], [-3.0, 2.0, -1.0], [0.0, 2.0], [1.0, math.nan]])
@pytest.mark.parametrize("factor", [1.0, -1.0, 1j])
def test_magnitudes(values: list[float], factor: complex) -> None:
    t = torch.tensor(values, dtype=torch.float64) * factor
    assert str(least_magnitude(t)) == str(t.abs().amin().item())
    assert str(greatest_magnitude(t)) == str(t.abs().amax().item())
    assert str(least_product(t, 2 * t)) == str((2 * t * t).abs().amin().item())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 1000, 2**17 + 1, 300_001])
@pytest.mark.parametrize("signs", [(1, 1), (-1, -1), (1, -1), (-1, 1)])
@pytest.mark.parametrize("value", [7.0, 0.0, -0.0, 0.5, math.inf, math.nan, -math.nan])
def test_magnitudes_are_found_whatever_the_signs(
    n: int, signs: tuple[int, int], value: float, dtype: torch.dtype
) -> None:
    x = signs[0] * torch.linspace(1, 2, n).to(dtype)
    x[n // 2] = signs[1] * value
    expected = [t.item() for t in torch.aminmax(x.abs())]
    for t in (x, torch.stack([x, x], 1)[:, 0]):
        assert [str(e) for e in magnitudes(torch.neg, t)] == [str(e) for e in expected]
        one_sign = bool((t > 0).all() or (t < 0).all())
        assert magnitudes_of_one_sign(t) == (tuple(expected) if one_sign else None)
        assert ends_of_one_sign(t) == (tuple(e.item() for e in torch.aminmax(t)) if one_sign else None)
        assert str(least_magnitude(t)) == str(expected[0])
        assert str(least_product(t, t)) == str((t * t).amin().item())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("n", [4, 2**16])
def test_numbers_that_are_stored_with_the_other_sign(n: int, dtype: torch.dtype) -> None:
    """The imaginary part of a conjugate is a view with a bit that says so; integers have none."""
    stored = torch.zeros(n, dtype=dtype.to_complex())
    stored.imag.copy_(torch.linspace(1, 2, n))
    t = stored.conj().imag
    assert t.is_neg()
    assert ends_of_one_sign(t) == (-2, -1)
    assert extremes(torch.positive, t) == (-2, -1)
    assert least_magnitude(t) == least_product(t, torch.ones_like(t)) == 1
    assert greatest_magnitude(t) == 2
