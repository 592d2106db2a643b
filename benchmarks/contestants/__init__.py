"""The contestants, by name: each makes of a case what is timed, or None where it has no way to say it."""

from collections.abc import Callable
from dataclasses import replace

from benchmarks.case import UNDER_TORCH_FUNC, Case, Run
from benchmarks.contestants import backsolve, by_hand, jax_peers, numerical, samples, torch_peers

CONTESTANTS: dict[str, Callable[[Case], Run | None]] = {
    "g alone": by_hand.solver_alone,
    "closed form": by_hand.closed_form,
    "hand-written": by_hand.hand_written,
    "hand-written, for torch.func": by_hand.composable,
    "floor": by_hand.floor,
    "backsolve": backsolve.from_f,
    "backsolve, eager": lambda case: backsolve.from_f(asked("backsolve, eager", case)),
    "backsolve, no test": backsolve.untested,
    "backsolve, f' given": backsolve.from_entries,
    "backsolve, f' given, no test": backsolve.from_entries_unchecked,
    **{f"backsolve, {name}": backsolve.with_structure(name) for name in ("Dense", "Banded", "GMRES", "BiCGSTAB")},
    "dense autograd.functional": by_hand.original,
    "TorchOpt": torch_peers.torchopt,
    "xitorch": torch_peers.xitorch,
    "torchdeq": torch_peers.torchdeq,
    "zuko": torch_peers.zuko,
    "jaxopt": jax_peers.jaxopt,
    "optimistix": jax_peers.optimistix,
    "one evaluation of f": numerical.evaluation,
    "Bracket": numerical.bracket,
    "50 bisections": numerical.bisection,
    "SciPy's find_root": numerical.scipy,
    "each_sample": samples.here,
    "each_sample, 2 processes": samples.in_processes,
    "executor.map": samples.bare,
}


def asked(contestant: str, case: Case) -> Case:
    """What a contestant computes of a case: g alone knows no gradients, f is no inverse of itself, eager is eager."""
    if contestant == "backsolve, eager":
        return replace(case, task=UNDER_TORCH_FUNC.get(case.task, case.task))
    if contestant == "one evaluation of f":
        return replace(case, problem=replace(case.problem, exact=lambda x, *_: x))
    return replace(case, task="no gradient") if contestant == "g alone" else case
