"""The vectors of a Krylov space: as many as are needed, for a batch of events."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_BLOCK = 2**20  # numbers that are allocated at a time: memory for all would be new in each solve, and dear as such


class Space:
    """Vectors of shape `(events, n)`, which are added one by one.

    Args:
        like: such a vector.
        most: how many there may be.
    """

    def __init__(self, like: Tensor, most: int) -> None:
        self.like = like
        self.each = min(most, max(1, _BLOCK // max(like.numel(), 1)))
        self.blocks: list[Tensor] = []
        self.count = 0

    def place(self) -> Tensor:
        """Where to write the next vector."""
        index = self.count % self.each
        if not index:
            self.blocks.append(self.like.new_empty(self.each, *self.like.shape))
        self.count += 1
        return self.blocks[-1][index]

    def projections(self, w: Tensor) -> Tensor:
        """The scalar products of w with each vector, shape `(k, events)`."""
        if len(w) == 1:
            parts = [block[:, 0].conj() @ w[0, :, None] for block in self._filled()]
        else:
            parts = [(block.conj() * w).sum(-1) for block in self._filled()]
        return torch.cat(parts) if parts else w.new_zeros(0, len(w))

    def combination(self, factors: Tensor) -> Tensor:
        """The sum of factors times vectors, for factors of shape `(k, events)`."""
        return self.without(factors.neg(), torch.zeros_like(self.like))

    def gram(self) -> Tensor:
        """The scalar products of all vectors with each other, shape `(events, k, k)`."""
        vectors = torch.cat(list(self._filled())).transpose(0, 1)
        return vectors.conj() @ vectors.mT

    def without(self, factors: Tensor, w: Tensor) -> Tensor:
        """w less that sum."""
        for block, own in zip(self._filled(), factors.split(self.each), strict=False):
            w = torch.addmm(w, own.mT, block[:, 0], alpha=-1) if len(w) == 1 else w - (own[..., None] * block).sum(0)
        return w

    def _filled(self) -> Iterator[Tensor]:
        for k, block in enumerate(self.blocks):
            yield block[: self.count - k * self.each]
