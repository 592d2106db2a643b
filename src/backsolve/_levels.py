"""Plain tensors from inside the levels of torch.func, and the way back.

Under `vmap`, `grad` and `jvp` torch hands out wrapped tensors, one wrapper a level, whose values cannot be looked at.
`concretely` takes all wrappers off: each mapped dimension becomes a dimension on the left, outermost level first.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import _get_current_function_mode_stack, handle_torch_function, has_torch_function_unary

from backsolve._functorch import Beneath, add_mapped_dim, alive, is_functorch_wrapped, level_of, unwrap_once
from backsolve._torch import GradMode

Outputs = Sequence[Tensor | None]


@dataclass(frozen=True)
class Mapping:
    """Which of some tensors are mapped by which levels of vmap.

    Attributes:
        sizes: the size of each mapped dimension, outermost first.
        mapped: for each tensor and level, whether that tensor has that dimension.
    """

    sizes: tuple[int, ...] = ()
    mapped: tuple[tuple[bool, ...], ...] = ()

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, which: slice) -> Mapping:
        """The same for some of the tensors."""
        return Mapping(self.sizes, self.mapped[which])

    def inner(self) -> Mapping:
        """What remains inside of the outermost level."""
        return Mapping(self.sizes[1:], tuple(m[1:] for m in self.mapped))

    def within(self, outer: Mapping) -> Mapping:
        """With the dimensions of another mapping on the outside."""
        if not outer:
            return self
        mine = self.mapped if self.sizes else ((),) * len(outer.mapped)
        mapped = tuple(m + inner for m, inner in zip(outer.mapped, mine, strict=True))
        return Mapping(outer.sizes + self.sizes, mapped)

    def lift(self, tensor: Tensor, position: int, extra: int = 0) -> Tensor:
        """Give a tensor every mapped dimension, of size 1 where it lacks it, and `extra` batch dimensions behind."""
        index: list[Any] = [slice(None) if m else None for m in self.mapped[position]]
        return tensor[(*index, *[None] * extra)] if index or extra else tensor

    def fill(self, tensor: Tensor, position: int) -> Tensor:
        """Give a tensor every mapped dimension in full size."""
        lifted = self.lift(tensor, position)
        return lifted.expand((*self.sizes, *lifted.shape[len(self) :]))


def concretely(run: Callable[[Sequence[Tensor], Mapping], Outputs], tensors: Sequence[Tensor]) -> list[Tensor | None]:
    """Run a function on plain tensors, outside of all levels and without a graph.

    Args:
        run: called with the plain tensors and their mapping; returns tensors that have all mapped dimensions.
        tensors: wrapped or not.

    Returns:
        What `run` returned, as tensors of the levels, without a derivative.
    """
    detached = [t.detach() for t in tensors]
    with Beneath(), GradMode(False):
        stripped = [_strip(t) for t in detached]
        levels = sorted({level for _, owned in stripped for level in owned})
        sizes = tuple(next(t.shape[owned.index(n)] for t, owned in stripped if n in owned) for n in levels)
        mapping = Mapping(sizes, tuple(tuple(n in owned for n in levels) for _, owned in stripped))
        with _unread():
            outputs = run([t for t, _ in stripped], mapping)
        return [None if o is None else _dress(o, levels) for o in outputs]


@contextmanager
def _unread() -> Generator[None]:
    """A context whose reads have no derivative, those of a solver, and are nobody's captures."""
    modes: list[Any] = [m for m in _get_current_function_mode_stack() if getattr(m, "paused", None) is False]
    for mode in modes:
        mode.paused = True
    try:
        yield
    finally:
        for mode in modes:
            mode.paused = False


def _strip(tensor: Tensor) -> tuple[Tensor, list[int]]:
    """The plain tensor with its mapped dimensions on the left, and the levels that they belong to, outermost first."""
    peeled = Peeled(tensor)
    return peeled.stacked.detach(), peeled.levels


def _dress(tensor: Tensor, levels: Sequence[int]) -> Tensor:
    if has_torch_function_unary(tensor):  # inside the f of another Inverse, which must know this tensor for its own
        return handle_torch_function(_dress, (tensor,), tensor, levels)
    return dress(tensor, levels)


class Peeled:
    """What is inside of the wrappers of a tensor.

    Attributes:
        plain: the innermost tensor, with its graph.
        wrappers: the levels of grad and jvp that wrap it, and the wrappers; innermost level first.
        levels: those of vmap that map it, outermost first.
    """

    __slots__ = ("_dims", "levels", "plain", "wrappers")

    def __init__(self, tensor: Tensor) -> None:
        self.wrappers: list[tuple[int, Tensor]] = []
        self.levels: list[int] = []
        self._dims: list[int] = []
        while is_functorch_wrapped(tensor):
            level = level_of(tensor)
            if level < 0:  # it has ended
                tensor = alive(tensor)
                continue
            wrapper = tensor
            tensor, dim = unwrap_once(tensor)
            if dim is None:
                self.wrappers.append((level, wrapper))
            else:
                self.levels.insert(0, level)
                self._dims.insert(0, dim)
        self.plain = tensor

    @property
    def stacked(self) -> Tensor:
        """The plain tensor with its mapped dimensions on the left, outermost level first; to be asked for beneath."""
        return _to_the_left(self.plain, self._dims)

    @property
    def sizes(self) -> dict[int, int]:
        """The size of the dimension that each level maps."""
        return dict(zip(self.levels, self.stacked.shape, strict=False)) if self.levels else {}


def _to_the_left(tensor: Tensor, dims: Sequence[int]) -> Tensor:
    for k, dim in enumerate(dims):
        if dim:
            tensor = tensor.movedim(dim + k, k)
    return tensor


def at_level(tensor: Tensor, level: int) -> tuple[Tensor, list[int]]:
    """A tensor as a level knows it, without the inner ones: these come first, as plain dimensions.

    To be called with no inner levels active.

    Returns:
        The tensor, and the inner levels, outermost first.
    """
    dims: list[int] = []
    levels: list[int] = []
    while is_functorch_wrapped(tensor) and not 0 <= level_of(tensor) <= level:
        if level_of(tensor) < 0:
            tensor = alive(tensor)
            continue
        levels.insert(0, level_of(tensor))
        tensor, dim = unwrap_once(tensor)
        if dim is None:
            del levels[0]
        else:
            dims.insert(0, dim)
    return _to_the_left(tensor, dims), levels


def spread(tensor: Tensor, own: Sequence[int], target: Sequence[int], sizes: dict[int, int]) -> Tensor:
    """Bring the leading dimensions, which belong to the levels `own`, into the order `target`, with those it lacks."""
    if list(own) == list(target):
        return tensor
    order = [own.index(n) for n in target if n in own]
    if order != sorted(order):
        tensor = tensor.permute(*order, *range(len(own), tensor.dim()))
    tensor = tensor[tuple(slice(None) if n in own else None for n in target)]
    return tensor.expand(*(sizes[n] for n in target), *tensor.shape[len(target) :])


def dress(tensor: Tensor, levels: Sequence[int]) -> Tensor:
    """Let levels of vmap map the leading dimensions of a tensor."""
    left = list(levels)
    for level in sorted(levels):
        tensor = add_mapped_dim(tensor, level, left.index(level))
        left.remove(level)
    return tensor


@dataclass(slots=True)
class Plain:
    """A plain tensor whose leading dimensions belong to levels of vmap.

    `wrapped` says whether it came from a level of grad or jvp, beside that which was asked for.
    """

    tensor: Tensor
    levels: Sequence[int]
    wrapped: bool = False

    @property
    def sizes(self) -> dict[int, int]:
        """The size of the dimension of each level."""
        return dict(zip(self.levels, self.tensor.shape, strict=False))

    def spread(self, levels: Sequence[int], sizes: dict[int, int]) -> Tensor:
        """The tensor with the dimensions of these levels on the left."""
        return spread(self.tensor, self.levels, levels, sizes)


def split(tensor: Tensor, level: int) -> tuple[Plain, Plain | None]:
    """The primal and the tangent of a tensor at a level."""
    with Beneath(level):
        at, inner = at_level(tensor, level)
        dual = forward_ad.unpack_dual(at)
    with Beneath():
        tangent: Tensor | None = dual.tangent
        return _plain(dual.primal, level, inner), None if tangent is None else _plain(tangent, level, inner)


def _plain(tensor: Tensor, level: int, inner: Sequence[int]) -> Plain:
    peeled = Peeled(tensor)
    return Plain(peeled.stacked, [*peeled.levels, *inner], any(n != level for n, _ in peeled.wrappers))


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in arbitrarily nested tuples (named ones too), lists and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for v in value:
            yield from tensors_in(v)
    elif type(value) is dict:
        yield from tensors_in(tuple(value.values()))
