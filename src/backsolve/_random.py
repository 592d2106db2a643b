"""Random numbers for probes."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def gaussian_like(t: Tensor) -> Tensor:
    """Gaussian numbers, the same at each call, that leave the global random state as it is.

    torch refuses its generators under vmap; there the numbers come from a hash of their positions, at several times the
    cost.
    """
    try:
        generator = torch.Generator(t.device).manual_seed(0)
        return torch.randn(t.shape, generator=generator, device=t.device, dtype=torch.float32).to(t.dtype)
    except RuntimeError:  # "vmap: We do not yet support calling random operations"
        pass
    position = torch.arange(t.numel(), device=t.device)
    first, second = (_uniform(position * 2 + k) for k in (0, 1))
    return ((-2 * first.log()).sqrt() * (2 * math.pi * second).cos()).reshape(t.shape).to(t.dtype)  # Box, Muller 1958


def _uniform(n: Tensor) -> Tensor:
    """Numbers in (0, 1) from integers, by the finaliser of MurmurHash3 on 32 bits."""
    n = n + 0x9E3779B9 & 0xFFFFFFFF
    for factor, shift in ((0x85EBCA6B, 16), (0xC2B2AE35, 13)):
        n = (n ^ n >> shift) * factor & 0xFFFFFFFF
    return (((n ^ n >> 16) >> 8).to(torch.float32) + 0.5) / 2**24  # 24 bits are exact in float32, so never 0 or 1
