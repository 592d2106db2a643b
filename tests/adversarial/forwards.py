"""Hostile f's: dead branches, detach, changes in place, autograd inside, caches, state, randomness, hooks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from backsolve import errors, inverse
from tests.adversarial.outcome import BLACK_BOX, Case, W, X, compare, cubic, cubic_root, tensor

Pairs = Sequence[tuple[Tensor, Tensor]]


def with_f(f: Any, *, order: int = 2) -> Callable[[], Pairs]:
    """The cubic by another f; with its weight as a param."""
    return lambda: compare(inverse(f, BLACK_BOX), cubic_root, X, W, order=order)


def closing(hold: Callable[[Tensor], Any], *, order: int = 2) -> Callable[[], Pairs]:
    """The cubic by an f that holds its weight; g knows its value."""

    def actual(x: Tensor, w: Tensor) -> Tensor:
        value = w.detach()
        return inverse(hold(w), lambda x: cubic_root(x, value))(x)

    return lambda: compare(actual, cubic_root, X, W, order=order)


# ---- what must be right -------------------------------------------------------------------------------------------


def in_place_on_its_own(y: Tensor, w: Tensor) -> Tensor:
    z = y.clone()
    z.pow_(3).add_(y).mul_(w)
    return z


def written_into_a_buffer(y: Tensor, w: Tensor) -> Tensor:
    z = torch.empty_like(y)
    z[..., ::2] = cubic(y[..., ::2], w)
    z[..., 1::2] = cubic(y[..., 1::2], w)
    return z


def gradient_of_an_energy(y: Tensor, w: Tensor) -> Tensor:
    """As in convex-potential flows: f = dE/dy."""
    with torch.enable_grad():
        y = y if y.requires_grad else y.detach().requires_grad_()
        energy = (w * (y**2 / 2 + y**4 / 4)).sum()
        (z,) = torch.autograd.grad(energy, y, create_graph=True)
    return z


def element_by_element(y: Tensor, w: Tensor) -> Tensor:
    return torch.stack([cubic(v, w) for v in y.unbind()])


def until_it_converges(y: Tensor, w: Tensor) -> Tensor:
    """Data-dependent control flow: y^3 by a loop."""
    z, k = y, 1
    while k < 3:
        z, k = z * y, k + 1
    return w * (y + z)


def under_autocast(y: Tensor, w: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return cubic(y, w)


def choosing(y: Tensor, w: Tensor) -> Tensor:
    """In torch 2.13 the gradient of torch.cond has no graph: a second derivative is refused, as that of `Forgetful`."""
    return torch.cond(w > 0, cubic, lambda y, w: w * y, (y, w))


def scripted(y: Tensor, w: Tensor) -> Tensor:
    return w * (y + y**3)


class Counted(torch.nn.Module):
    """A buffer that every call moves, and that does not matter."""

    def __init__(self, w: Tensor) -> None:
        super().__init__()
        self.w = w
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, y: Tensor) -> Tensor:
        self.calls += 1
        return cubic(y, self.w)


def safe_where(y: Tensor, w: Tensor) -> Tensor:
    """Both branches safe on both sides."""
    inside = torch.where(y > 0, y, 1.0)
    return w * torch.where(y > 0, inside + torch.exp(3 * torch.log(inside)), y + y**3)


class Scaled(torch.autograd.Function):
    """Multiplies by 2, by a backward of its own."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        return 2 * y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return 2 * grads[0]


class Opaque:
    """A callable object with slots, and without a name."""

    __slots__ = ("w",)

    def __init__(self, w: Tensor) -> None:
        self.w = w

    def __call__(self, y: Tensor) -> Tensor:
        return cubic(y, self.w)


def on_cpu(y: Tensor, w: Tensor) -> Tensor:
    with save_on_cpu():
        return cubic(y, w)


def identity() -> Pairs:
    return compare(inverse(lambda y: y, lambda x: x), lambda x: x * 1, X, order=1)


def a_view() -> Pairs:
    y = X.reshape(3, 1)
    return compare(inverse(lambda y: y.view(3, 1), lambda x: x), lambda x: x * 1, y, order=1)


def keeps_what_it_saw() -> Pairs:
    """f appends every y to a list; the list must do no harm."""
    seen: list[Tensor] = []

    def f(y: Tensor, w: Tensor) -> Tensor:
        seen.append(y)
        return cubic(y, w)

    return compare(inverse(f, BLACK_BOX), cubic_root, X, W)


def weights_change_after_use() -> Pairs:
    """A training step between two calls; each call has the weights of its time."""
    w = W.clone().requires_grad_()
    inv = inverse(lambda y: cubic(y, w), lambda x: cubic_root(x, w.detach()))
    pairs = []
    for _ in range(3):
        (slope,) = torch.autograd.grad(inv(X).sum(), w)
        (exact,) = torch.autograd.grad(cubic_root(X, w).sum(), w)
        pairs.append((slope, exact))
        with torch.no_grad():
            w.sub_(0.1 * slope)
    return pairs


def module_in_eval_mode() -> Pairs:
    """Dropout and batch normalisation in eval mode are plain functions."""
    net = torch.nn.Sequential(torch.nn.Dropout(0.5), torch.nn.BatchNorm1d(3)).double().eval()
    net[1].running_var.fill_(0.25)  # type: ignore[union-attr]
    slope = 1 / (0.25 + net[1].eps) ** 0.5  # type: ignore[operator]
    inv = inverse(lambda y: net(y) + y**3, lambda x: BLACK_BOX(x / slope**1.5) * 0 + root(x, slope), event_dim=1)

    def root(x: Tensor, a: float) -> Tensor:
        return cubic_root(x / a**1.5, 1.0) * a**0.5

    return compare(inv, lambda x: root(x, slope), X[None])


RIGHT: dict[str, Callable[[], Pairs]] = {
    "returns y itself": identity,
    "returns a view of y": a_view,
    "changes its own intermediates in place": with_f(in_place_on_its_own),
    "writes into a buffer of its own": with_f(written_into_a_buffer),
    "is the gradient of an energy": with_f(gradient_of_an_energy),
    "loops over elements": with_f(element_by_element),
    "loops": with_f(until_it_converges),
    "enables grad": with_f(lambda y, w: torch.enable_grad()(cubic)(y, w)),
    "has its own autocast, in float64": with_f(under_autocast),
    "chooses by torch.cond, once": with_f(choosing, order=1),
    "is compiled": with_f(torch.compile(cubic, backend="aot_eager"), order=1),
    "is scripted": with_f(torch.jit.script(scripted)),
    "counts its calls in a buffer": closing(Counted),
    "closes over a weight and a function of it": closing(lambda w: lambda y, v=w * 1.0: w * y + v * y**3),
    "branches by a safe where": with_f(safe_where),
    "is checkpointed": with_f(lambda y, w: checkpoint(cubic, y, w, use_reentrant=False)),
    "saves its tensors elsewhere": with_f(on_cpu),
    "is vmapped": with_f(lambda y, w: torch.vmap(cubic, (0, None))(y, w)),
    "differentiates by torch.func": with_f(
        lambda y, w: torch.func.vmap(torch.func.grad(lambda v, w: w * (v**2 / 2 + v**4 / 4)), (0, None))(y, w)
    ),
    "has a Function of its own": with_f(lambda y, w: Scaled.apply(cubic(y, w)) / 2),
    "is a partial": closing(lambda w: functools.partial(cubic, w=w)),
    "is a bound method": closing(lambda w: Opaque(w).__call__),
    "is an object with slots": closing(Opaque),
    "has its weight as a default": closing(lambda w: lambda y, w=w: cubic(y, w)),
    "computes its weight anew": closing(lambda w: lambda y: cubic(y, (w**2).sqrt())),
    "closes over a tensor with a history": closing(lambda w: functools.partial(cubic, w=w * 1.0)),
    "detaches a constant": with_f(lambda y, w: cubic(y, w) + w.detach() * 0),
    "keeps what it saw": keeps_what_it_saw,
    "is trained between calls": weights_change_after_use,
    "is a module in eval mode": module_in_eval_mode,
    "returns a broadcast constant beside y": with_f(lambda y, w: cubic(y, w) + torch.zeros(()).expand(3)),
    "registers a hook that only looks": with_f(lambda y, w: look(cubic(y, w))),
    "is deterministic by a seed of its own": with_f(lambda y, w: seeded(y, w)),
}  # fmt: skip


def look(z: Tensor) -> Tensor:
    if z.requires_grad:
        z.register_hook(lambda v: None)
    return z


def seeded(y: Tensor, w: Tensor) -> Tensor:
    noise = torch.rand(y.shape, generator=torch.Generator().manual_seed(0), dtype=y.dtype)
    return cubic(y, w) + noise - noise


# ---- what must be refused -----------------------------------------------------------------------------------------


class Lying(torch.autograd.Function):
    """y + y^3 with the derivative of y + y^2."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        ctx.save_for_backward(y)
        return y + y**3

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] * (1 + 2 * ctx.saved_tensors[0])


class Forgetful(torch.autograd.Function):
    """y + y^3, whose derivative is right, and is itself a constant to autograd."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        ctx.save_for_backward(y)
        return y + y**3

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return grads[0] * (1 + 3 * y.detach() ** 2)


class Drifting(torch.nn.Module):
    """Its scale grows by 1e-9 at each call, as a running average does."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", W.clone())

    def forward(self, y: Tensor) -> Tensor:
        self.scale *= 1 + 1e-9
        return cubic(y, self.scale)


def drifting() -> Pairs:
    return compare(inverse(Drifting(), lambda x: cubic_root(x, W)), lambda x: cubic_root(x, W), X)


def unfaithful(f: Any, **options: Any) -> Callable[[], Pairs]:
    """The values are the cubic's, the derivatives are not."""
    return lambda: compare(inverse(f, BLACK_BOX, **options), lambda x: cubic_root(x), X, order=1)


def partly_without_grad(y: Tensor) -> Tensor:
    with torch.no_grad():
        cube = y**3
    return 2 * (y + cube)


def bent_by_a_hook(y: Tensor) -> Tensor:
    z = cubic(y)
    if z.requires_grad:
        z.register_hook(lambda v: 2 * v)
    return z


class Counting:
    """Another function at each call."""

    def __init__(self, rate: float) -> None:
        self.calls, self.rate = 0, rate

    def __call__(self, y: Tensor) -> Tensor:
        self.calls += 1
        return cubic(y) * (1 + self.rate * self.calls)


class Memo:
    """Remembers f(y) by the values of y, with whatever graph the first call had."""

    def __init__(self) -> None:
        self.results: dict[tuple[float, ...], Tensor] = {}

    def __call__(self, y: Tensor) -> Tensor:
        key = tuple(y.flatten().tolist())
        if key not in self.results:
            self.results[key] = cubic(y)
        return self.results[key]


def memoised_twice() -> Pairs:
    """The second call gets the graph of the first one's y."""
    inv = inverse(Memo(), BLACK_BOX)
    return [pair for _ in range(2) for pair in compare(inv, lambda x: cubic_root(x), X, order=1)]


def dead_branch() -> Pairs:
    """sqrt has no value at y < 0: autograd makes 0 * NaN of the branch not taken."""
    inv = inverse(lambda y: torch.where(y > 0, torch.sqrt(y), y), lambda x: torch.where(x > 0, x**2, x))
    return compare(inv, lambda x: torch.where(x > 0, x**2, x), tensor(0.5, -1.0), order=1)


def coupled_by_detach(event_dim: int) -> Callable[[], Pairs]:
    """y + mean(y) / 2, but autograd sees y only."""
    x = tensor(0.3, 1.2, -2.0)

    def run() -> Pairs:
        inv = inverse(lambda y: y + y.detach().mean() / 2, lambda x: x - x.mean() / 3, event_dim=event_dim)
        return compare(inv, lambda x: x - x.mean() / 3, x, order=1)

    return run


def coupled(f: Any, g: Any, **options: Any) -> Callable[[], Pairs]:
    return lambda: compare(inverse(f, g, **options), g, X, order=1)


def in_training_mode() -> Pairs:
    net = torch.nn.BatchNorm1d(2, affine=False).double()
    x = tensor(0.3, 1.2, -2.0, 0.4, 0.5, 2.5).reshape(3, 2)
    y = x / 2
    inv = inverse(lambda y: y + 0 * net(y) + net(y) * 1e-3, lambda x: y, event_dim=1, on_failure="ignore")
    return compare(inv, lambda x: x / 2, x, order=1)


def drop() -> Pairs:
    torch.manual_seed(0)
    return compare(
        inverse(torch.nn.Dropout(0.5), lambda x: x), lambda x: x, torch.ones(64, dtype=torch.float64), order=1
    )


REFUSED: dict[str, tuple[Callable[[], Pairs], type[Exception]]] = {
    "has a dead branch without a derivative": (dead_branch, errors.SingularJacobianError),
    "detaches y altogether": (unfaithful(lambda y: cubic(y.detach())), errors.StructureError),
    "detaches a part of y": (unfaithful(lambda y: 2 * (y + y.detach() ** 3)), errors.StructureError),
    "runs in part without grad": (unfaithful(partly_without_grad), errors.StructureError),
    "goes through numpy in part": (
        unfaithful(lambda y: 2 * (y + torch.from_numpy(y.detach().numpy() ** 3))), errors.StructureError
    ),
    "goes through .item()": (
        unfaithful(lambda y: 2 * (y + torch.tensor([v.item() ** 3 for v in y], dtype=y.dtype))), errors.StructureError
    ),
    "goes through .data": (unfaithful(lambda y: 2 * (y + y.data**3)), errors.StructureError),
    "has a Function with a wrong backward": (unfaithful(lambda y: 2 * Lying.apply(y)), errors.StructureError),
    "is bent by a hook": (unfaithful(bent_by_a_hook), errors.StructureError),
    "couples by a detached mean": (coupled_by_detach(0), errors.StructureError),
    "couples by a detached mean, as a vector": (coupled_by_detach(1), errors.StructureError),
    "couples by a mean": (coupled(lambda y: y + y.mean() / 2, lambda x: x - x.mean() / 3), errors.StructureError),
    "couples by 1e-6": (
        coupled(lambda y: y + 1e-6 * y.mean(), lambda x: x - 1e-6 * x.mean() / (1 + 1e-6)), errors.StructureError
    ),
    "has no second derivative": (
        lambda: compare(inverse(lambda y: 2 * Forgetful.apply(y), BLACK_BOX), lambda x: cubic_root(x), X),
        errors.StructureError,
    ),
    "moves a buffer that it reads": (drifting, RuntimeError),  # torch's own: changed in place
    "does not use y": (unfaithful(lambda y: torch.ones_like(y)), errors.BacksolveError),
    "changes y in place": (unfaithful(lambda y: y.mul_(2.0)), RuntimeError),
    "is checkpointed with reentry": (
        with_f(lambda y, w: checkpoint(cubic, y, w, use_reentrant=True), order=1), RuntimeError
    ),
    "returns another shape": (unfaithful(lambda y: cubic(y)[:2]), errors.ForwardOutputError),
    "returns another dtype": (unfaithful(lambda y: cubic(y).float()), errors.ForwardOutputError),
    "returns a list": (unfaithful(lambda y: [cubic(y)]), errors.ForwardOutputError),
    "returns nothing": (unfaithful(lambda y: None), errors.ForwardOutputError),
    "returns complex numbers": (unfaithful(lambda y: torch.complex(cubic(y), y)), errors.ForwardOutputError),
    "raises": (unfaithful(lambda y: {}["no such key"]), KeyError),
    "is another one at each call": (unfaithful(Counting(0.1)), errors.BacksolveError),
    "is another one, by 1e-12, before a second derivative": (
        lambda: compare(inverse(Counting(1e-6), BLACK_BOX, residual_tol=1e-3), lambda x: cubic_root(x), X),
        errors.StructureError,
    ),
    "is memoised by value": (memoised_twice, errors.BacksolveError),
    "drops out": (drop, errors.ResidualError),
    "normalises over the batch": (in_training_mode, errors.BacksolveError),
}  # fmt: skip

FORWARDS = [
    *(Case(f"f {name}", "right", run) for name, run in RIGHT.items()),
    *(Case(f"f {name}", "refused", run, error) for name, (run, error) in REFUSED.items()),
]
