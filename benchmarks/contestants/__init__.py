"""The contestants, by name: each makes of a case what is timed, or None where it has no way to say it."""

from collections.abc import Callable

from benchmarks.case import Case, Run
from benchmarks.contestants import backsolve, by_hand

CONTESTANTS: dict[str, Callable[[Case], Run | None]] = {
    "g alone": by_hand.solver_alone,
    "g, then f": by_hand.solver_and_f,
    "closed form": by_hand.closed_form,
    "hand-written": by_hand.hand_written,
    "floor": by_hand.floor,
    "backsolve": backsolve.from_f,
    "backsolve, f' given": backsolve.from_entries,
    "backsolve, f' given, no test": backsolve.from_entries_unchecked,
    "dense autograd.functional": by_hand.original,
}
