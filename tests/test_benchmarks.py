"""The benchmarks measure what they say: right answers, everybody equally often, and wrong answers called wrong."""

import random
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks import measure, sampling
from benchmarks.__main__ import title, write
from benchmarks.case import TASKS, UNDER_TORCH_FUNC, Case
from benchmarks.contestants import CONTESTANTS, asked
from benchmarks.measure import Outcome, interleave, judge
from benchmarks.problems import (
    ARCSIN,
    CONVOLUTION,
    DENSE,
    DENSE_FLOAT32,
    GAMMA,
    IMPLIED_VOLATILITY,
    MIXTURE,
    REACTION_DIFFUSION,
    SHOOTING,
)
from benchmarks.promises import PROMISES
from benchmarks.sampling import NoAnswerError, first_call
from benchmarks.workloads import BY_SAMPLES, CASES, COMPILED, GROWTH, INVERSION, PROFILED, TRANSFORMED, WORKLOADS

TINY = {
    "arcsin": (5,),
    "implied volatility": (4,),
    "dense": (3, 2),
    "dense in float32": (3, 2),
    "reaction-diffusion": (7,),
    "convolution": (16,),
}
STRUCTURES = {"Dense", "Banded", "GMRES", "BiCGSTAB"}
PEERS = {"TorchOpt", "xitorch", "torchdeq", "zuko", "jaxopt", "optimistix"}

# Who is wrong, or has no answer and says so.
FIRST_ORDER_ONLY = {"floor", "dense autograd.functional", "torchdeq", "zuko"}
WRONG_SECOND_ORDER = {("TorchOpt", "implied volatility"), ("TorchOpt", "dense")}


def tiny(problem, task="gradients") -> Case:
    return Case(problem, TINY[problem.name], ("hand-written",), task)


def tolerance(name: str, case: Case) -> float:
    """Iterative solvers keep their own tolerance; all others make rounding errors, some of which add up."""
    if name in PEERS | {"backsolve, GMRES", "backsolve, BiCGSTAB"}:
        return case.tolerance
    return 1000 * torch.finfo(case.problem.dtype).eps


@pytest.mark.parametrize("task", [task for task in TASKS if task not in ("compiled", *UNDER_TORCH_FUNC)])
@pytest.mark.parametrize("problem", [ARCSIN, DENSE, IMPLIED_VOLATILITY], ids=lambda p: p.name)
@pytest.mark.parametrize("name", CONTESTANTS)
@pytest.mark.filterwarnings("default")  # the peers' own
def test_contestants_are_right(name, problem, task) -> None:
    case = tiny(problem, task)
    try:
        run = CONTESTANTS[name](case)
    except ImportError as error:
        pytest.skip(str(error))
    if run is None:
        assert name in {
            "closed form",
            "torchdeq",
            "zuko",
            "hand-written, for torch.func",
            *(f"backsolve, {structure}" for structure in STRUCTURES),
            *INVERSION,
            *BY_SAMPLES,
            *(("jaxopt", "optimistix") if task == "inversion" else ()),  # they find y where it is known
        }
        return
    outcome = judge(asked(name, case), run)
    if task == "Hessian-vector product" and name in FIRST_ORDER_ONLY:
        assert outcome.failure or outcome.wrong
    elif task == "Hessian-vector product" and (name, problem.name) in WRONG_SECOND_ORDER:
        assert outcome.wrong
    else:
        assert not outcome.failure
        assert outcome.error <= tolerance(name, case)
        params = len(case.inputs) - 1
        assert outcome.missing == (params if (name, task) == ("dense autograd.functional", "gradients") else 0)


@pytest.mark.parametrize("task", ["compiled", *UNDER_TORCH_FUNC])
@pytest.mark.filterwarnings("default")  # the compiler's own
def test_transformed_contestants_are_right(task) -> None:
    torch._dynamo.reset()
    case = tiny(ARCSIN, task)
    for name in COMPILED if task == "compiled" else TRANSFORMED:
        outcome = judge(asked(name, case), CONTESTANTS[name](case))
        assert not outcome.failure
        assert outcome.error <= tolerance(name, case), name


@pytest.mark.parametrize("problem", [ARCSIN, DENSE, IMPLIED_VOLATILITY], ids=lambda p: p.name)
def test_oracles_against_finite_differences(problem) -> None:
    inputs = tuple(t.double().requires_grad_() for t in problem.inputs(*TINY[problem.name]))
    assert torch.autograd.gradcheck(problem.exact, inputs)
    assert torch.autograd.gradgradcheck(problem.exact, inputs)


@pytest.mark.parametrize("problem", [DENSE, IMPLIED_VOLATILITY, ARCSIN], ids=lambda p: p.name)
def test_solvers_solve(problem) -> None:
    inputs = problem.inputs(*TINY[problem.name])
    x, *params = (t.double() for t in inputs)
    y = problem.g(x, *params)
    torch.testing.assert_close(problem.f(y, *params), x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("problem", [GAMMA, MIXTURE], ids=lambda p: p.name)
@pytest.mark.parametrize("name", INVERSION)
def test_inversions_are_right(name, problem) -> None:
    case = Case(problem, (500,), INVERSION, "inversion")
    outcome = judge(asked(name, case), CONTESTANTS[name](case))
    assert not outcome.failure
    assert outcome.error <= 1e-11


@pytest.mark.parametrize("name", BY_SAMPLES)
def test_solutions_by_samples_are_right(name) -> None:
    case = Case(SHOOTING, (3,), BY_SAMPLES, "no gradient", processes=True)
    outcome = judge(case, CONTESTANTS[name](case))
    assert not outcome.failure
    assert outcome.error <= 1e-13  # a bisection to 4 / 2^50


@pytest.mark.parametrize("problem", [REACTION_DIFFUSION, CONVOLUTION, DENSE_FLOAT32], ids=lambda p: p.name)
def test_structures_are_right(problem) -> None:
    case = tiny(problem)
    inputs = tuple(t.double().requires_grad_() for t in problem.inputs(*TINY[problem.name]))
    assert torch.autograd.gradcheck(problem.exact, inputs)
    ours = [f"backsolve, {structure}" for structure in problem.structures]
    for name in ("hand-written", "backsolve", *(["floor"] if problem.floor else []), *ours):
        outcome = judge(case, CONTESTANTS[name](case))
        assert not outcome.failure
        assert outcome.error <= torch.finfo(problem.dtype).eps ** 0.6, name
    x, *params = inputs
    torch.testing.assert_close(problem.f(problem.g(x, *params), *params), x, rtol=1e-12, atol=1e-12)


def test_a_wrong_answer_is_called_wrong() -> None:
    case = tiny(IMPLIED_VOLATILITY)
    right = CONTESTANTS["hand-written"](case)

    def wrong_by(relative: float) -> Outcome:
        return judge(case, lambda: [(1 + relative) * right()[0], *right()[1:]])

    assert not wrong_by(case.tolerance / 2).wrong
    assert wrong_by(case.tolerance * 2).wrong
    assert wrong_by(torch.nan).wrong


def test_missing_answers_are_counted() -> None:
    case = tiny(DENSE)
    right = CONTESTANTS["hand-written"](case)
    assert judge(case, lambda: [right()[0], None]).missing == 1
    assert judge(case, lambda: [None, None]).failure == "no gradient"
    assert judge(case, lambda: [1 / 0]).failure == "raises ZeroDivisionError"


def test_endless_answers_are_stopped(monkeypatch) -> None:
    def endless() -> None:
        while True:
            pass

    monkeypatch.setattr(sampling, "LONGEST_FIRST_CALL", 0.05)
    with pytest.raises(NoAnswerError, match=">"):
        first_call(endless)


def test_everybody_runs_equally_often_in_random_order() -> None:
    log: list[str] = []

    def clock(name: str, calls: int) -> float:
        log.append(name)
        return 3.0 * calls

    times = interleave({name: partial(clock, name) for name in "abc"}, 0.0, random.Random(0))
    before = 3 * (measure.FIRST_CALLS + 1)  # the first calls of each, and one sample to find its length
    rounds = [tuple(log[i : i + 3]) for i in range(before, len(log), 3)]
    assert len(rounds) == measure.FEWEST_ROUNDS
    assert all(sorted(r) == ["a", "b", "c"] for r in rounds)
    assert len(set(rounds)) > 1
    assert times == {name: [3.0] * len(rounds) for name in "abc"}


def test_samples_are_long_enough() -> None:
    """A clock that counts the seconds of calls that take a millisecond each."""
    calls_asked_for: list[int] = []

    def clock(calls: int) -> float:
        calls_asked_for.append(calls)
        return 1e-3 * calls

    interleave({"a": clock}, 0.0, random.Random(0))
    assert set(calls_asked_for[-measure.FEWEST_ROUNDS :]) == {32}


@pytest.mark.parametrize(("each", "first"), [(0.0, measure.FIRST_CALLS), (0.9 * measure.LONGEST_FIRST_CALLS, 2)])
def test_the_first_calls_do_not_count(monkeypatch, each: float, first: int) -> None:
    """As many as must be, unless these take too long."""
    now, asked_for = 0.0, 0

    def clock(calls: int) -> float:
        nonlocal now, asked_for
        now, asked_for = now + each * calls, asked_for + 1
        return 1.0

    monkeypatch.setattr(measure.time, "perf_counter", lambda: now)
    interleave({"a": clock}, 0.0, random.Random(0))
    assert asked_for == first + 1 + measure.FEWEST_ROUNDS


def test_the_ratio_is_taken_within_a_round(monkeypatch) -> None:
    """Here the ratio of the medians would be 6."""
    case = replace(tiny(ARCSIN), contestants=("hand-written", "floor"))
    times = {"hand-written": [1.0, 2.0, 10.0], "floor": [3.0, 20.0, 12.0]}
    monkeypatch.setattr(measure, "judge", lambda *_: Outcome())
    monkeypatch.setattr(measure, "interleave", lambda *_: times)
    outcomes = measure.measure(case, 0.0, random.Random(0))
    assert (outcomes["hand-written"].ratio, outcomes["hand-written"].seconds) == (1.0, 2.0)
    assert (outcomes["floor"].ratio, outcomes["floor"].seconds) == (3.0, 12.0)


def test_the_tables_name_contestants_that_exist() -> None:
    cases = [*WORKLOADS, *PROFILED, *(case for growth in GROWTH for case in growth)]
    assert {name for case in cases for name in case.contestants} <= set(CONTESTANTS)
    names = [case.name for case in WORKLOADS]
    assert len(set(names)) == len(names)
    assert any(case.quick for case in WORKLOADS)


def test_a_full_run_can_be_written_down(tmp_path: Path) -> None:
    """Every row that there is, with made-up numbers; rows of a table may have different contestants."""
    outcome = asdict(Outcome(1e-3, 1.0, 0.1, 1e-8))
    rows = {n: {"group": c.group, "outcomes": dict.fromkeys(c.contestants, outcome)} for n, c in CASES.items()}
    growth = {
        title(cases): {
            "sizes": [case.size[0] for case in cases],
            "seconds": {name: [1e-3 * case.size[0] for case in cases] for name in cases[0].contestants},
            "exponents": dict.fromkeys(cases[0].contestants, 1.0),
        }
        for cases in GROWTH
    }
    memory = {name: dict.fromkeys(case.contestants, 1.0) for name, case in CASES.items() if case.memory}
    profile = {case.name: {"module.py:function": 1.0} for case in PROFILED}
    result = {"complete": True, "versions": {}, "rows": rows, "memory": memory, "growth": growth, "profile": profile}
    assert all(isinstance(promise.measured(result), float) for promise in PROMISES)
    write(result, tmp_path)
    document = (tmp_path / "results.md").read_text(encoding="utf-8")
    assert all(promise.what in document for promise in PROMISES)
    assert {path.name for path in tmp_path.iterdir()} == {"growth.svg", "ratios.svg", "results.json", "results.md"}
