"""The 31 ways in which torch's transforms are applied to a function, as one table.

Each entry takes a function h of x and params and sample inputs, and returns a tree of tensors. The tests compare that
of an `Inverse` with that of the closed form.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

Function = Callable[..., Tensor]
Inputs = tuple[Tensor, ...]
Transform = Callable[[Function, Inputs], Any]


def total(y: Tensor) -> Tensor:
    """A number with derivatives of every order in each element; no inverse of any problem makes it simple."""
    return (y * y.cos()).sum()


def loss(h: Function) -> Function:
    """A scalar function of the same inputs."""
    return lambda *inputs: total(h(*inputs))


def everything(inputs: Inputs) -> tuple[int, ...]:
    return tuple(range(len(inputs)))


def tangents(inputs: Inputs) -> Inputs:
    return tuple(torch.linspace(-1.0, 2.0, t.numel(), dtype=t.dtype).reshape(t.shape) for t in inputs)


def batch(inputs: Inputs, size: int = 3, dim: int = 0) -> Inputs:
    """Copies of each input, every one a little different."""
    return tuple(torch.stack([t * (1 - 0.03 * k) for k in range(size)], dim) for t in inputs)


def mapped(inputs: Inputs, which: int) -> tuple[Inputs, tuple[int | None, ...]]:
    """Inputs of which one alone is mapped, and the in_dims that say so."""
    batched = batch(inputs)
    given = tuple(b if k == which else t for k, (b, t) in enumerate(zip(batched, inputs, strict=True)))
    return given, tuple(0 if k == which else None for k in range(len(inputs)))


def vmap_one(h: Function, inputs: Inputs, which: int, inner: Callable[[Function], Function] = lambda h: h) -> Any:
    given, in_dims = mapped(inputs, which)
    return vmap(inner(h), in_dims)(*given)


def nested_vmap(h: Function, inputs: Inputs) -> Any:
    if len(inputs) == 1:
        return vmap(vmap(h))(torch.stack(batch(inputs) * 2))
    x, *params = batch(inputs)
    return vmap(vmap(h, (0, *(None for _ in params))), (None, *(0 for _ in params)))(x, *params)


def vmap_second_dim(h: Function, inputs: Inputs) -> Any:
    x = batch(inputs[:1], dim=1)[0] if inputs[0].dim() else batch(inputs[:1])[0]
    return vmap(h, (1 if inputs[0].dim() else 0, *(None for _ in inputs[1:])))(x, *inputs[1:])


def grad_of_vmap(h: Function, inputs: Inputs, which: int) -> Any:
    given, in_dims = mapped(inputs, which)
    return grad(lambda *inputs: vmap(loss(h), in_dims)(*inputs).sum(), everything(inputs))(*given)


def third_gradient(h: Function, inputs: Inputs) -> Any:
    """In x; at each order the gradient is summed with weights, so that every element takes part."""
    function = loss(h)
    for _ in range(2):
        function = loss(grad(function))
    return grad(function)(*inputs)


def jvp_of_vmap_of_grad(h: Function, inputs: Inputs) -> Any:
    batched = batch(inputs)
    return jvp(vmap(grad(loss(h), everything(inputs))), batched, tangents(batched))


def eager_backward_of_vmap(h: Function, inputs: Inputs) -> Any:
    leaves = [t.requires_grad_() for t in batch(inputs)]
    total(vmap(h)(*leaves)).backward()
    return [t.grad for t in leaves]


def eager_second_backward(h: Function, inputs: Inputs) -> Any:
    leaves = [t.detach().requires_grad_() for t in inputs]
    gradients = grad(loss(h), everything(inputs))(*leaves)
    sum(total(g) for g in gradients).backward()
    return [t.grad for t in leaves]


def grads_batched(h: Function, inputs: Inputs) -> Any:
    leaves = [t.detach().requires_grad_() for t in inputs]
    y = h(*leaves)
    cotangents = torch.eye(y.numel(), dtype=y.dtype).reshape(-1, *y.shape)
    return torch.autograd.grad(y, leaves, cotangents, is_grads_batched=True)


def nested_jvp(h: Function, inputs: Inputs) -> Any:
    direction = tangents(inputs)
    return jvp(
        lambda *inputs: jvp(h, inputs, direction)[1], inputs, tuple(t.flip(0) if t.dim() else t for t in direction)
    )


OF_X: dict[str, Transform] = {
    "grad x": lambda h, i: grad(loss(h))(*i),
    "vjp": lambda h, i: (lambda y, pull: pull(tangents((y,))[0]))(*vjp(h, *i)),
    "jvp x": lambda h, i: jvp(lambda x: h(x, *i[1:]), i[:1], tangents(i[:1])),
    "jvp all": lambda h, i: jvp(h, i, tangents(i)),
    "jacrev": lambda h, i: jacrev(h, everything(i))(*i),
    "jacfwd": lambda h, i: jacfwd(h, everything(i))(*i),
    "hessian": lambda h, i: hessian(loss(h), everything(i))(*i),
    "jacfwd(jacrev)": lambda h, i: jacfwd(jacrev(h))(*i),
    "jacrev(jacfwd)": lambda h, i: jacrev(jacfwd(h))(*i),
    "jacrev(jacrev)": lambda h, i: jacrev(jacrev(h))(*i),
    "jacfwd(jacfwd)": lambda h, i: jacfwd(jacfwd(h))(*i),
    "jvp(jvp)": nested_jvp,
    "jvp(grad)": lambda h, i: jvp(grad(loss(h), everything(i)), i, tangents(i)),
    "grad(grad(grad))": third_gradient,
    "vmap x": lambda h, i: vmap_one(h, i, 0),
    "vmap x, in_dims=1": vmap_second_dim,
    "vmap all, out_dims=1": lambda h, i: vmap(h, out_dims=1 if i[0].dim() else 0)(*batch(i)),
    "vmap(vmap)": nested_vmap,
    "vmap(grad) all": lambda h, i: vmap(grad(loss(h), everything(i)))(*batch(i)),
    "grad(vmap)": lambda h, i: grad_of_vmap(h, i, 0),
    "vmap(hessian)": lambda h, i: vmap(hessian(loss(h), everything(i)))(*batch(i)),
    "vmap(jacfwd)": lambda h, i: vmap(jacfwd(h, everything(i)))(*batch(i)),
    "jvp(vmap(grad))": jvp_of_vmap_of_grad,
    "eager backward of vmap": eager_backward_of_vmap,
    "eager second backward of func.grad": eager_second_backward,
    "is_grads_batched": grads_batched,
}
"""Those that need no params."""

OF_PARAMS: dict[str, Transform] = {
    "grad params": lambda h, i: grad(loss(h), everything(i)[1:])(*i),
    "vmap one param": lambda h, i: vmap_one(h, i, 1),
    "vmap another param": lambda h, i: vmap_one(h, i, len(i) - 1),
    "vmap(grad) one param": lambda h, i: vmap_one(h, i, 1, lambda h: grad(loss(h), everything(i))),
    "grad(vmap) one param": lambda h, i: grad_of_vmap(h, i, 1),
}
"""Those of a function with at least one param besides x."""
