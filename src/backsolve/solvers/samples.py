"""A foreign solver that takes one sample at a time, run over a batch by any executor."""

from __future__ import annotations

import math
import os
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, as_completed
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from backsolve import errors
from backsolve._linearize import Forward
from backsolve.solvers.base import Found, NumericalSolver, prototype
from backsolve.solvers.foreign import name_of

_CHUNKS = 32  # for each worker: few enough to cost little, many enough to even out

Sample = tuple[tuple[Any, ...], dict[str, Any]]
Outcome = tuple[Any, str | None]  # what fn returned, or the traceback of what it raised


@dataclass(frozen=True)
class EachSample(NumericalSolver):
    """A solver of single samples; made by `each_sample`."""

    fn: Callable[..., Any]
    executor: Executor | None = None
    chunk: int | None = None
    progress: bool = False
    param_event_dims: Sequence[int] | Mapping[str, int] | None = None

    def find(self, forward: Forward, x: Tensor | None) -> Found:
        """Call fn for each event of the batch; see `NumericalSolver`."""
        batch = _Batch(self.param_event_dims, forward, x)
        outcomes: list[Outcome] = [(None, "")] * batch.count
        with _bar(batch.count, self.progress) as advance:
            for start, part in self._run([batch.sample(i) for i in range(batch.count)]):
                outcomes[start : start + len(part)] = part
                advance(len(part))
        call = f"each_sample({name_of(self.fn)})"
        return _collected(outcomes, batch.shape, batch.event, prototype(forward, x), call)

    def _run(self, samples: list[Sample]) -> Iterator[tuple[int, list[Outcome]]]:
        """The outcomes, chunk by chunk, in the order in which they are done."""
        if self.executor is None:
            for i, sample in enumerate(samples):
                yield i, solve_all(self.fn, [sample])
            return
        workers = getattr(self.executor, "_max_workers", None) or os.cpu_count() or 1
        size = self.chunk or max(1, math.ceil(len(samples) / (_CHUNKS * workers)))
        chunks: dict[Future[list[Outcome]], range] = {}
        try:
            for i in range(0, len(samples), size):
                indices = range(i, min(i + size, len(samples)))
                chunks[self._submit(samples[i : indices.stop])] = indices
            for future in as_completed(chunks):
                yield chunks[future].start, _outcomes(future, len(chunks[future]))
        finally:
            for future in chunks:  # after an interrupt nobody waits for the rest
                future.cancel()

    def _submit(self, samples: list[Sample]) -> Future[list[Outcome]]:
        assert self.executor is not None
        try:
            return self.executor.submit(solve_all, self.fn, samples)
        except Exception as error:  # noqa: BLE001 (an executor that is broken by now, or cannot pickle)
            failed: Future[list[Outcome]] = Future()
            failed.set_exception(error)
            return failed


def each_sample(
    fn: Callable[..., Any],
    executor: Executor | None = None,
    *,
    chunk: int | None = None,
    progress: bool = False,
    param_event_dims: Sequence[int] | Mapping[str, int] | None = None,
) -> EachSample:
    """Wrap a function of single samples, so that it can be the solver g of a batch.

    fn is called once for each event, with NumPy arrays of the event's shape (NumPy numbers if `event_dim = 0`), by the
    executor if there is one. A sample for which it raises, or returns something of the wrong shape, is NaN and not
    converged, or an error with its index and traceback: as `on_failure` says. If a worker dies, that is reported, and
    the samples that were finished are kept; under `on_failure="raise"` the error has them as its attribute `y`.

    Args:
        fn: called as `fn(x, *params, **kwargs)`; for another process it must be picklable, so no lambda.
        executor: any `concurrent.futures.Executor`: threads, processes, `loky`, `dask.distributed`'s
            `client.get_executor()`, ... It is not shut down. Default: one sample after the other, here.
        chunk: how many samples are sent to a worker at once; by default there are 32 chunks for each worker.
        progress: show a progress bar (needs tqdm: the extra `progress`).
        param_event_dims: how many rightmost dimensions of a param belong to one sample; a tuple for positional params,
            a dict for keywords. What is not named broadcasts against y if `event_dim = 0`; else it is split if it
            begins with the batch dimensions of x, and given to every sample as a whole otherwise.

    Raises:
        SampleError: when called, if fn fails for a sample.

    Example:
        >>> import math, torch
        >>> from scipy.optimize import brentq
        >>> from backsolve import inverse
        >>> from backsolve.solvers import each_sample
        >>> solver = each_sample(lambda x: brentq(lambda y: y + math.exp(y) - x, -50, 50))
        >>> omega = inverse(lambda y: y + y.exp(), solver)
        >>> omega(torch.tensor([1 + math.e], dtype=torch.float64))
        tensor([1.], dtype=torch.float64)
    """
    if not callable(fn):
        raise errors.bad_setting("each_sample", "fn", "a function of NumPy arrays", fn)
    if executor is not None and not hasattr(executor, "submit"):
        raise errors.bad_setting("each_sample", "executor", "a concurrent.futures.Executor, or None", executor)
    if chunk is not None and (not isinstance(chunk, int) or chunk < 1):
        raise errors.bad_setting("each_sample", "chunk", "a positive integer, or None", chunk)
    return EachSample(fn, executor, chunk, progress, param_event_dims)


def solve_all(fn: Callable[..., Any], samples: list[Sample]) -> list[Outcome]:
    """Call fn for some samples: what a worker does."""
    outcomes: list[Outcome] = []
    for args, kwargs in samples:
        try:
            outcomes.append((fn(*args, **kwargs), None))
        except Exception:  # noqa: BLE001, PERF203 (fn may raise whatever it likes, for one sample only)
            outcomes.append((None, traceback.format_exc()))
    return outcomes


def _outcomes(future: Future[list[Outcome]], count: int) -> list[Outcome]:
    """What a worker returned; if it died, or what it was sent or returned cannot be pickled, every sample failed."""
    try:
        return future.result()
    except Exception as error:  # noqa: BLE001 (each kind of executor has its own)
        return [(None, f"the worker did not return: {type(error).__name__}: {error}")] * count


class _Batch:
    """The samples of one call, as arrays."""

    def __init__(self, dims: Any, forward: Forward, x: Tensor | None) -> None:
        k = forward.model.event_dim
        args, kwargs = forward.arguments.rebuild([t.detach() for t in forward.arguments.tensors])
        named = dims if isinstance(dims, Mapping) else {}
        positional = [*(() if isinstance(dims, Mapping) else dims or ()), *[None] * len(args)]
        leaves: list[tuple[Any, int | None]] = [] if x is None else [(x, k)]
        self._structure = pytree.tree_structure((args if x is None else (x, *args), kwargs))
        for value, dim in [*zip(args, positional, strict=False), *((v, named.get(name)) for name, v in kwargs.items())]:
            leaves += [(leaf, dim) for leaf in pytree.tree_leaves(value)]
        self.shape = _batch_shape(leaves, k, x)
        self.count = math.prod(self.shape)
        self.event = None if x is None else x.shape[x.dim() - k :]
        self._leaves = [_split(leaf, dim, self.shape, k) for leaf, dim in leaves]

    def sample(self, i: int) -> Sample:
        """The arguments of one call of fn."""
        return pytree.tree_unflatten([leaf[i] if split else leaf for leaf, split in self._leaves], self._structure)


def _batch_shape(leaves: list[tuple[Any, int | None]], k: int, x: Tensor | None) -> torch.Size:
    """The batch dimensions that the tensors have together."""
    shapes = [
        leaf.shape[: leaf.dim() - (dim or 0)]
        for leaf, dim in leaves
        if isinstance(leaf, Tensor) and (dim is not None or not k)
    ]
    if x is not None and not k:  # a param that does not broadcast is no param of elements
        shapes = [s for s in shapes if _broadcasts(s, shapes[0])]
    return torch.broadcast_shapes(*shapes)


def _broadcasts(shape: torch.Size, other: torch.Size) -> bool:
    try:
        torch.broadcast_shapes(shape, other)
    except RuntimeError:
        return False
    return True


def _split(leaf: Any, dim: int | None, batch: torch.Size, k: int) -> tuple[Any, bool]:
    """An array with one row for each sample and True, or what all samples are given as a whole and False."""
    if not isinstance(leaf, Tensor):
        return leaf, False
    array = leaf.detach().cpu()
    array = array.float() if array.dtype is torch.bfloat16 else array  # NumPy has no bfloat16
    if dim is None and not k:
        dim = 0 if _broadcasts(array.shape, batch) else None
    elif dim is None and len(batch) and array.shape[: len(batch)] == batch:
        dim = array.dim() - len(batch)
    if dim is None:
        return array.numpy().copy(), False
    event = array.shape[array.dim() - dim :]
    return array.expand((*batch, *event)).reshape(math.prod(batch), *event).numpy().copy(), True


def _collected(outcomes: list[Outcome], batch: torch.Size, event: torch.Size | None, like: Tensor, call: str) -> Found:
    """The results as one tensor, NaN where there is none."""
    rows: list[Tensor | None] = []
    reasons: list[str | None] = []
    for result, reason in outcomes:
        row = None if reason is not None else _row(result, event)
        event = row.shape if row is not None and event is None else event
        rows.append(row)
        expected = "a real array" if event is None else f"a real array of shape {tuple(event)}"
        wrong = f"fn returned {errors.describe(result)}, expected {expected}"
        reasons.append(wrong if row is None and reason is None else reason)
    event = torch.Size() if event is None else event
    nothing = torch.full(event, math.nan, dtype=torch.float64)
    y = torch.stack([nothing if row is None else row for row in rows]) if rows else torch.empty((0, *event))
    y = y.reshape((*batch, *event)).to(like)
    if all(row is not None for row in rows):
        return Found(y)
    failed = torch.tensor([row is None for row in rows], device=y.device).reshape(batch)

    def error() -> errors.SampleError:
        i = next(i for i, row in enumerate(rows) if row is None)
        index = tuple(int(n) for n in torch.unravel_index(torch.tensor(i), batch))
        return errors.sample_failed(call, int(failed.sum()), len(rows), index, reasons[i] or "", y)

    return Found(y, failed, None, error)


def _row(result: Any, event: torch.Size | None) -> Tensor | None:
    """What fn returned as a tensor of the shape of an event; None if it cannot be one."""
    import numpy as np

    try:
        array = np.asarray(result.detach().cpu() if isinstance(result, Tensor) else result)
    except ValueError:  # a ragged list
        return None
    if array.dtype.kind not in "fiu" or (event is not None and array.shape != event):
        return None
    return torch.from_numpy(array.astype(np.float64))


def _bar(total: int, wanted: bool) -> AbstractContextManager[Callable[[int], Any]]:
    """A context with a function that moves the progress bar on."""
    if not wanted:
        return nullcontext(lambda _: None)
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        raise errors.missing_extra("progress=True", "tqdm", "progress") from error
    return _Bar(tqdm(total=total, unit="sample"))


class _Bar:
    def __init__(self, bar: Any) -> None:
        self.bar = bar

    def __enter__(self) -> Callable[[int], Any]:
        return self.bar.update

    def __exit__(self, *_: object) -> None:
        self.bar.close()
