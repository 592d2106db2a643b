"""The page of the documents that says what works under which transform. `python -m tests.transforms_page` writes it.

Its table has a row for each transform that `test_transforms.py` and `test_compiled.py` run.
"""

from __future__ import annotations

from pathlib import Path

from tests.transforms import OF_PARAMS, OF_X

PAGE = Path(__file__).parents[1] / "docs" / "transforms.md"

AUTOGRAD_IN_GRAPH = ("eager backward of vmap", "eager second backward of func.grad", "is_grads_batched")
"""`torch.compile` traces no autograd calls, unless `torch._dynamo.config.trace_autograd_ops` is set."""

NESTED_FORWARD = ("jvp(jvp)", "vmap(jacfwd)", "vmap(hessian)")
"""torch 2.13 fails to trace forward mode inside of another transform, in some closed forms as well."""

COMPILED = {n: t for n, t in {**OF_X, **OF_PARAMS}.items() if n not in AUTOGRAD_IN_GRAPH + NESTED_FORWARD}

TEXT = """# Transforms

An `Inverse` is an ordinary torch function: everything in `torch.func`, forward-mode automatic differentiation and
`torch.compile(fullgraph=True)` apply to it, in any order, although g is code that torch cannot see into. The table is
made by the tests: each "right" is a comparison with the closed form (float64, 10⁻¹⁰). Eager, that is done for every
Jacobian structure, with f taking its params as arguments and with f closing over them, and for every method of
`MatrixFree`; compiled, for an elementwise and a dense f in both ways, and for the other structures for vjp, jvp,
vmap(grad) and `backward`.

{table}

¹ `torch.compile` traces no calls of `backward` or `autograd.grad`; take these derivatives outside of the graph, or with
  torch.func.
² torch 2.13 fails while it traces forward mode inside of another transform, with an error of its own: vmap(hessian) of
  `sin`, vmap(jacfwd) of `cos(2 sin x)`, jvp(jvp) of `c x` with a tensor c. Such a failure can leave torch in a state in
  which later compilations of the same process fail as well.

## What to know

* **g under `vmap`.** g sees plain tensors. If the event dimensions of all mapped params are known (always, if f is
  elementwise; else by `param_event_dims`), it is called once with the mapped dimension as one more batch dimension on
  the left; if not, once for each sample. Tensors of a transform that g closes over are found and given to it.
* **Errors.** g, the residual test, the probes and the test for a singular J run on plain numbers, also under `vmap`:
  `on_failure="raise"` raises, with the index of the event, the mapped dimensions first.
* **Large events.** `MatrixFree` never forms J under torch.func and forward mode, at any order: `func.grad`, `jvp`,
  `vmap(grad)` and `jvp(grad)` of 65,536 unknowns take products, as many as eager code does, with the same tolerance,
  preconditioner and fallback. What does not converge raises `ConvergenceError` with the index of the event, the mapped
  dimensions first. Compiled, with a backward pass or with torch.func inside of the graph, `MatrixFree` and `Banded`
  need no matrix either: [structures of J](structures.md).
* **Under `torch.compile`** g is one custom operation, and the residual test raises from inside the graph, too. What
  cannot raise there is a singular J, met in the backward pass: its derivative is NaN. Under `func.grad`, `jvp` and
  `vmap` the value of such an event is NaN as well. (`MatrixFree`, and the default from 2¹⁸ entries of J on, solve in an
  operation, which raises; so does `Banded` under torch.func.) g runs outside of the graph, so
  `torch.func.functional_call` inside of it is refused; so is a dual level of forward mode that is entered after
  tracing. `torch.export` and saved graphs do not contain g: they look for the `Inverse` in the process that made them.
  A param that is changed in place after the call, outside of the graph, is an error there, as in eager code; a
  change of a tensor that f closes over goes unnoticed if J is formed in the backward pass, and the gradient is that of
  the new tensor: pass what you change as a param. The probe of how known `entries` depend on the params, which finds a
  `.detach()` in them before a second derivative or a log-determinant is taken, is made in eager code and under
  torch.func, not in a compiled function.
* **Make the `Inverse` outside** of the compiled function: in `__init__` of a module, or at module level.
  Keep it until the backward pass has run: the graph knows it by name. `Inverse.solve` (which returns a verdict),
  gauges, subspaces, and an `implicit_function` with `event_dim > 0` (whose shape cannot be foreseen) break the graph.
  With `fullgraph=True` all of these are errors that say so.
* **Closures.** Under torch.func the tensors that f closes over must be read by ordinary torch functions. One that only
  TorchScript code reads is refused, as is code that torch.func refuses: old-style autograd.Functions, `autograd.grad`
  or `torch.utils.checkpoint` inside f. All of these work with `backward`. f may use torch.func itself, as the gradient
  of a potential does; what it closes over and hands to such a transform as an argument must be a param, or is refused.
  A g that runs such an f, as `Bracket`, `Newton` and `FixedPoint` do, needs the residual test: torch numbers the levels
  of f like those around the call, so that a tensor from outside can be taken for one of f's, and y is then refused.
* **Params that f detaches** have no gradient there, as anywhere in torch: derivatives by y are compared with finite
  differences of f, those by params and by what f closes over are taken as autograd finds them.
* **The double backward of a compiled function** is refused by torch ("torch.compile with aot_autograd does not
  currently support double backward"): take second derivatives inside of the graph, as `func.hessian` does.
* **What it costs** is in the tables *Compiled* and *Transforms* of the benchmarks (`make bench`). CPU, one thread,
  arcsin, medians of interleaved runs, torch 2.13.0. Compiled, n = 1,000,000, forward and backward: 1.9 times the
  compiled torch.asin, and 1.2 times without the tests (`residual_tol=math.inf, on_failure="ignore", verify=False`). At
  n = 1, as multiples of the eager call with its backward pass (93 µs): `grad` 4.0, `jvp` 3.0, `vmap(grad)` 5.0;
  a hand-written autograd.Function that torch.func can transform takes 4.4, 3.3 and 6.0, torch.asin itself 1.9,
  0.9 and 2.5. `hessian` takes 6.2 times as long as two eager backward passes; that of a hand-written Function 5.8,
  of torch.asin 4.5. Measured by hand, not by a row, of an f of one's own: with a param 3.0, 2.8 and 4.2 times its
  eager call; with a trainable weight, which an eager graph must reach as well, 4.6, 4.1 and 5.8.
* **What is fast.** One level of `grad`, `vjp` or `jvp` among any `vmap`s, forward over reverse mode (`hessian`,
  `jvp(grad)`), and an eager graph around a single level work on plain tensors, with one evaluation of f, and one more
  for each tensor that f closes over and that a `vmap` maps or that has a tangent; a weight with a history takes more.
  Other stacks, such as `grad(grad)`, `jvp(jvp)`, a third level, or a Hessian with trainable weights, and forward over
  reverse mode or more right-hand sides than y for `MatrixFree`, are made of torch.func's own products, in about twice
  the time or more. A first derivative is that of f as it was at the call: what f reads may be replaced before it is
  taken, but not changed in place.
* **Autocast** is off while f runs: J in bfloat16 would be wrong by a percent. In a compiled function torch traces the
  backward pass under the autocast of the call: gradients then have the two digits of bfloat16, as closed forms have.
  Switch it off around the compiled function, not inside.

## Several processes

`DistributedDataParallel` over a module that holds an `Inverse` needs nothing: the gradients are those of one process.

**DTensors.** If g is torch code, or works with f alone (`Bracket`, `Newton`, `FixedPoint`), an `Inverse` takes an eager
DTensor x that is sharded along batch dimensions, with params that are replicated, or sharded along the same dimension.
Each process inverts its own events: f and g see plain tensors, nothing is gathered, and y is sharded as x is. Values,
first and second derivatives are tested against those of one process. What f closes over must be passed as a param
instead, and an error is that of one process, with an index that counts in its part; the others go on. A compiled
function breaks its graph at the call.

With a foreign g the same is said by hand:

```python
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.experimental import local_map

sharded = local_map(
    inv,
    in_placements=([Shard(0)], [Replicate()]),  # of x and of one param
    in_grad_placements=([Shard(0)], [Partial()]),
    out_placements=[Shard(0)],
    device_mesh=mesh,
)
y = sharded(x, a)
```

`Partial()` matters: each process finds the part of the param's gradient that its own events contribute. Without
`in_grad_placements`, `local_map` takes that part for the whole, and the gradient is silently wrong. Everything else
that is a DTensor (`solve`, `with_log_det`, `jacobian`, an `implicit_function`, torch.func, events that are cut in
pieces) is a `TransformError` that names this recipe.
"""


def table() -> str:
    """One row for each transform."""
    rows = ["| transform | `torch.func`, eager | inside `torch.compile` |", "|---|---|---|"]
    for name in {**OF_X, **OF_PARAMS}:
        refused = "not compiled ¹" if name in AUTOGRAD_IN_GRAPH else "not compiled ²" if name in NESTED_FORWARD else ""
        rows.append(f"| {name} | right | {refused or 'right'} |")
    return "\n".join(rows)


def page() -> str:
    """The whole page."""
    return TEXT.format(table=table())


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
