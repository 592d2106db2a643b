"""The table of mutants. A row is a patch of one place and the tests that must notice it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Mutant:
    """A patch of one file.

    Attributes:
        name: what the patch breaks.
        file: relative to src.
        old: the text to replace, which must stand in the file exactly once.
        new: what to replace it with.
        tests: pytest's ids of the tests that must fail. If an id stands for many tests, one of them must.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    def applied(self, source: Path) -> str:
        """Return the patched text of the file, given the folder that src is or was copied to."""
        text = (source / self.file).read_text(encoding="utf-8")
        if (found := text.count(self.old)) != 1:
            raise ValueError(f"mutant {self.name!r}: {self.old!r} stands {found} times in {self.file}, not once")
        return text.replace(self.old, self.new)


MUTANTS = (
    Mutant(
        name="dense: the transpose is dropped",
        file="backsolve/jacobians/factored.py",
        old="self.a.solve(self._column(v), adjoint=True)",
        new="self.a.solve(self._column(v))",
        tests=("tests/test_derivatives.py::test_orders_0_to_3_against_closed_form",),
    ),
    Mutant(
        name="the sign of the params' gradient is flipped",
        file="backsolve/_attach.py",
        old="return [w, *at.pull_inputs(-w, wanted)] if any(wanted)",
        new="return [w, *at.pull_inputs(w, wanted)] if any(wanted)",
        tests=(
            "tests/test_derivatives.py::test_orders_0_to_3_against_closed_form",
            "test_implicit_differentiation.py::test_parameters_that_f_reads_get_gradients",
        ),
    ),
    Mutant(
        name="the seed's layer: the transpose is dropped",
        file="inverse_differentiation_layer.py",
        old=".to(matrix.dtype), adjoint=True)",
        new=".to(matrix.dtype))",
        tests=(
            "test_implicit_differentiation.py::ImplicitDifferentiation::test_inverse_layer",
            "test_implicit_differentiation.py::test_apply[two_angles]",
            "test_implicit_differentiation.py::test_apply[shear]",
        ),
    ),
    Mutant(
        name="the seed's layer: its second derivative is not refused",
        file="inverse_differentiation_layer.py",
        old="_FirstDerivative.apply(w, x) if torch.is_grad_enabled() else w",
        new="w",
        tests=("test_implicit_differentiation.py::test_second_derivatives_with_a_jacobian_are_refused",),
    ),
    Mutant(
        name="the rule is differentiated at a detached y",
        file="backsolve/_attach.py",
        old="results = _OnLeaves.apply(pulled, in_place, y, v, *tensors)",
        new="results = _OnLeaves.apply(pulled, in_place, y.detach().requires_grad_(), v, *tensors)",
        tests=("tests/test_derivatives.py::test_first_and_second_derivatives_by_finite_differences",),
    ),
    Mutant(
        name="the residual test is skipped",
        file="backsolve/_solve.py",
        old="    tested = report or problem.is_tested",
        new="    tested = report",
        tests=("tests/test_residual.py::test_wrong_y_is_refused_with_numbers_index_and_remedy",),
    ),
    Mutant(
        name="the free residual test looks at the mean, not the maximum",
        file="backsolve/_solution.py",
        old="    low, high = extremes(torch.div, z, x.detach())",
        new="    low = high = (z / x).mean().item()",
        tests=("tests/test_residual.py::test_one_wrong_element_among_many",),
    ),
    Mutant(
        name="events that fail the free test pass without a Newton step",
        file="backsolve/_solution.py",
        old="    return Check(failed & ~passed, residual, step_norm)",
        new="    return Check(failed & ~residual.isfinite(), residual, step_norm)",
        tests=("tests/test_residual.py::test_conditions_of_a_large_scale",),
    ),
    Mutant(
        name="a tiny x passes with any tiny y",
        file="backsolve/_solution.py",
        old="        return torch.where((x_norm < eps) | (residual > eps), 0.0, eps)",
        new="        return torch.where(residual > eps, 0.0, eps)",
        tests=("tests/test_residual.py::test_a_wrong_y_at_a_tiny_probability",),
    ),
    Mutant(
        name="refine keeps every step",
        file="backsolve/_solve.py",
        old="y = torch.where(better.reshape(better.shape + (1,) * k), trial, y)",
        new="y = trial",
        tests=("tests/test_residual.py::test_refine_keeps_a_step_only_where_it_helps",),
    ),
    Mutant(
        name="a failed event is overwritten by a NaN without a graph",
        file="backsolve/_solution.py",
        old="    return result * factor.reshape(factor.shape + (1,) * event_dim)",
        new="    return torch.where(failed.reshape(factor.shape + (1,) * event_dim), torch.nan, result)",
        tests=("tests/test_residual.py::test_nan_spoils_only_the_failed_events_in_value_and_every_gradient",),
    ),
    Mutant(
        name="one singular event spoils its whole batch",
        file="backsolve/_solution.py",
        old="factor = torch.where(failed, torch.nan, 1.0)",
        new="factor = torch.where(failed.any() | failed, torch.nan, 1.0)",
        tests=("tests/test_singular.py::test_a_singular_event_leaves_the_others_unharmed",),
    ),
    Mutant(
        name="closures are not looked for",
        file="backsolve/_closure.py",
        old="    closed = [t for t in graph.leaves if id(t) not in given]",
        new="    closed = [t for t in graph.leaves if id(t) not in given and not t.requires_grad]",
        tests=(
            "tests/test_derivatives.py::test_module_parameters_get_their_gradients",
            "tests/test_closures.py::test_scripted_module",
        ),
    ),
    Mutant(
        name="tensors with a history are differentiated where they stand",
        file="backsolve/_closure.py",
        old="        return len(numbers) == len(self.nodes) and all(since <= n < until for n in numbers)",
        new="        return True",
        tests=("tests/test_closures.py::test_the_gradient_reaches_the_tensor_itself",),
    ),
    Mutant(
        name="gradient hooks run twice",
        file="backsolve/_closure.py",
        old="[t for t in closed if not t._backward_hooks],\n        [get_gradient_edge(t)[:2] for t in closed if",
        new="closed,\n        [get_gradient_edge(t)[:2] for t in () if",
        tests=("tests/test_closures.py::test_gradient_hooks_of_a_leaf_run_once",),
    ),
    Mutant(
        name="a changed f is not noticed",
        file="backsolve/_linearize.py",
        old="        _check_same(first, again)\n",
        new="        pass\n",
        tests=("tests/test_closures.py::test_f_that_changed_before_a_second_derivative_is_refused",),
    ),
    Mutant(
        name="the probe accepts any coupling",
        file="backsolve/jacobians/probe.py",
        old="            if leak.any():",
        new="            if False:",
        tests=("tests/test_structure.py::test_couplings_are_found",),
    ),
    Mutant(
        name="the probe uses ones",
        file="backsolve/jacobians/probe.py",
        old="    off = (at.pull(u)",
        new="    u = torch.ones_like(u)\n    off = (at.pull(u)",
        tests=("tests/test_structure.py::test_couplings_are_found",),
    ),
    Mutant(
        name="suspects are taken for couplings",
        file="backsolve/jacobians/probe.py",
        old="at.pull(u.masked_fill(mask, 0.0))",
        new="at.pull(u)",
        tests=("tests/test_structure.py::test_no_false_alarm_for_elementwise_functions",),
    ),
    Mutant(
        name="wrong entries are not noticed",
        file="backsolve/_attach.py",
        old="            if wrong is not None:",
        new="            if False:",
        tests=("tests/test_structure.py::test_wrong_entries_are_found",),
    ),
    Mutant(
        name="turning points are not noticed",
        file="backsolve/jacobians/diagonal.py",
        old="        if not (self.at.implicit or self._is_suspect()):",
        new="        if True:",
        tests=("tests/test_singular.py::test_arcsin_at_its_ends",),
    ),
    Mutant(
        name="every suspected turning point is one",
        file="backsolve/jacobians/diagonal.py",
        old="suspects & ~((near - d).abs() < d.abs() / 2)",
        new="suspects",
        tests=("tests/test_singular.py::test_a_small_y_is_no_singularity",),
    ),
    Mutant(
        name="only an exactly zero pivot is singular",
        file="backsolve/linalg/dense.py",
        old="pivots.amin().item() > 1e-3",
        new="pivots.amin().item() > 0",
        tests=("tests/test_singular.py::test_rounded_singular_matrices_are_found_and_scaled_good_ones_are_not",),
    ),
    Mutant(
        name="singularity depends on the scale of the rows",
        file="backsolve/linalg/dense.py",
        old="        return _singular(self, entries, factors, factors[0])",
        new="        return torch.linalg.cond(entries) * torch.finfo(entries.dtype).eps >= 0.1",
        tests=("tests/test_singular.py::test_rounded_singular_matrices_are_found_and_scaled_good_ones_are_not",),
    ),
    Mutant(
        name="the log-determinant has the sign of f's",
        file="backsolve/_inverse.py",
        old="lambda j: -j.log_abs_det()",
        new="lambda j: j.log_abs_det()",
        tests=("tests/test_calls.py::test_log_det_and_jacobian",),
    ),
    Mutant(
        name="the solver's buffer becomes y",
        file="backsolve/solvers/foreign.py",
        old="    tensor = torch.from_numpy(array.copy() if copy or not array.flags.writeable else array)",
        new="    tensor = torch.from_numpy(array)",
        tests=("tests/test_calls.py::test_numpy_solver_may_write_into_its_arrays_and_reuse_its_buffer",),
    ),
    Mutant(
        name="a y that is x itself shares its storage",
        file="backsolve/_solve.py",
        old="    return Found(y if fresh or (owns_its_memory(y) and not held) else y.clone())",
        new="    return Found(y)",
        tests=("tests/test_calls.py::test_g_that_returns_its_argument",),
    ),
    Mutant(
        name="the graph is never released",
        file="backsolve/_attach.py",
        old="        if not graph_is_kept():\n            ctx.at = None",
        new="        if False:\n            ctx.at = None",
        tests=("tests/test_calls.py::test_backward_frees_the_graph_of_f_unless_it_is_retained",),
    ),
    Mutant(
        name="an infinite component lends its size to the others",
        file="backsolve/_solution.py",
        old="(difference.abs() <= rtol * size) & difference.isfinite()",
        new="(difference.abs() <= rtol * size)",
        tests=("tests/test_residual.py::test_infinity_does_not_solve_a_finite_x",),
    ),
    Mutant(
        name="f passes x at a pole, too",
        file="backsolve/_solution.py",
        old="((low < z) & (z < high) & (low <= target) & (target <= high))",
        new="((low <= target) & (target <= high))",
        tests=("tests/test_residual.py::test_a_pole_between_two_places_is_no_root",),
    ),
    Mutant(
        name="every small Newton step is believed",
        file="backsolve/_solution.py",
        old="    believed = event_norm(step, event_dim) == 0",
        new="    believed = event_norm(step, event_dim) >= 0",
        tests=("tests/test_residual.py::test_a_small_newton_step_beside_a_pole_is_not_believed",),
    ),
    Mutant(
        name="an event is probed once for all",
        file="backsolve/_attach.py",
        old="        return not times & (times - 1) or not times % 64",
        new="        return times == 1",
        tests=("tests/test_structure.py::test_a_coupling_that_starts_at_zero_is_found_once_it_is_there",),
    ),
    Mutant(
        name="a dense turning point is not looked for",
        file="backsolve/jacobians/factored.py",
        old="        if not self._is_suspect():",
        new="        if True:",
        tests=("tests/test_singular.py::test_a_dense_turning_point",),
    ),
    Mutant(
        name="J may be computed under autocast",
        file="backsolve/_torch.py",
        old="return torch.autocast(device.type, enabled=False) if _C._is_any_autocast_enabled() else _NO_CONTEXT",
        new="return _NO_CONTEXT",
        tests=("tests/test_calls.py::test_nothing_of_ours_runs_under_autocast",),
    ),
    Mutant(
        name="a length of eps is small in every unit",
        file="backsolve/_solution.py",
        old="        return torch.where((x_norm < eps) | (residual > eps), 0.0, eps)",
        new="        return torch.where(x_norm < eps, 0.0, eps)",
        tests=("tests/test_residual.py::test_a_y_that_is_small_by_its_unit",),
    ),
    Mutant(
        name="linalg: the gradient of the entries forgets to exchange its factors for the adjoint",
        file="backsolve/linalg/factored.py",
        old="-(a.structure.outer(u, h) if adjoint else a.structure.outer(h, u))",
        new="-a.structure.outer(h, u)",
        tests=("tests/test_linalg.py::test_transforms",),
    ),
    Mutant(
        name="linalg: tangents of tangents are lost",
        file="backsolve/_torch.py",
        old="return forward_ad._set_fwd_grad_enabled(True)",
        new="return nullcontext()",
        tests=("tests/test_linalg.py::test_transforms",),
    ),
    Mutant(
        name="linalg: right-hand sides of one matrix are solved with copies of it",
        file="backsolve/linalg/factored.py",
        old="        if b_dim is not None and all(",
        new="        if False and all(",
        tests=("tests/test_linalg.py::test_right_hand_sides_of_one_matrix_share_a_factorisation_and_a_solve",),
    ),
    Mutant(
        name="Bracket: one point too near to the root counts as proof",
        file="backsolve/solvers/chandrupatla.py",
        old="pinched = (room < grain) | ((room <= 4 * grain) & straight)",
        new="pinched = (room < grain) | straight",
        tests=("tests/test_bracket.py::test_scipys_root_finder_functions",),
    ),
    Mutant(
        name="Bracket: a stalled search is not halved",
        file="backsolve/solvers/chandrupatla.py",
        old="        return torch.where(stalled, from_ordinal(middle, y.dtype), y)",
        new="        return y",
        tests=("tests/test_bracket.py::test_scipys_root_finder_functions",),
    ),
    Mutant(
        name="Bracket: a root outside is taken for the bound",
        file="backsolve/solvers/bracket.py",
        old="        why = torch.where((signs[0] * signs[1] > 0) | x.isnan(), _OUTSIDE, why)\n",
        new="",
        tests=("tests/test_bracket.py::test_a_root_outside",),
    ),
    Mutant(
        name="Bracket: a slope from afar is believed, where f is flat",
        file="backsolve/solvers/secant.py",
        old=" & (distance < _CLOSE * far)",
        new="",
        tests=("tests/test_bracket.py::test_gamma_by_its_survival_function",),
    ),
    Mutant(
        name="Bracket: what was not solved from a guess is kept",
        file="backsolve/solvers/secant.py",
        old="        return state._rest(note, 1.0).index",
        new="        note(state.index, state.y, state.steps)\n        return state.index[:0]",
        tests=("tests/test_bracket.py::test_what_fails_among_many",),
    ),
    Mutant(
        name="Bracket: the guess is of no use",
        file="backsolve/solvers/guess.py",
        old="        return domain.inverse(_polynomial(",
        new="        return 2 * domain.inverse(_polynomial(",
        tests=("tests/test_bracket.py::test_evaluations_are_few",),
    ),
    Mutant(
        name="Bracket: a param is taken for that of an element",
        file="backsolve/solvers/elements.py",
        old="    return found if _is_divisible(found, points) else whole",
        new="    return found",
        tests=("tests/test_bracket.py::test_params_that_are_not_the_elements",),
    ),
    Mutant(
        name="numerical solvers: the state of f moves",
        file="backsolve/solvers/state.py",
        old="        if module.training\n",
        new="        if False\n",
        tests=("tests/test_newton.py::test_f_with_a_state_is_frozen",),
    ),
    Mutant(
        name="Newton: no line search",
        file="backsolve/solvers/newton.py",
        old="(foreseen <= (1 - fraction / 4) * length)",
        new="(foreseen <= torch.inf)",
        tests=("tests/test_newton.py::test_line_search_where_the_full_step_overshoots",),
    ),
    Mutant(
        name="FixedPoint: no acceleration",
        file="backsolve/solvers/fixed_point.py",
        old="        return r - ((torch.stack(self.dy, -1) + changes) @ c)[..., 0]",
        new="        return r",
        tests=("tests/test_newton.py::test_anderson_needs_fewer_steps",),
    ),
    Mutant(
        name="each_sample: chunks in the order in which they are done",
        file="backsolve/solvers/samples.py",
        old="            outcomes[start : start + len(part)] = part",
        new="            outcomes[-start - len(part) : len(outcomes) - start] = part",
        tests=("tests/test_each_sample.py::test_chunks_come_back_in_order",),
    ),
    Mutant(
        name="the free residual test looks at one side",
        file="backsolve/_solution.py",
        old="return 1 - rtol <= low and high <= 1 + rtol",
        new="return high <= 1 + rtol",
        tests=("tests/test_residual.py::test_one_wrong_element_among_many",),
    ),
    Mutant(
        name="known entries are compared with nothing",
        file="backsolve/_attach.py",
        old="at = linearize(at.forward, at.y, to_y=True)\n            if not at.depends_on_y:  # an opaque f",
        new="at = linearize(at.forward, at.y, to_y=False)\n            if not at.depends_on_y:  # an opaque f",
        tests=("tests/test_structure.py::test_wrong_entries_are_found",),
    ),
    Mutant(
        name="bands: a cotangent for each band but one",
        file="backsolve/jacobians/banded.py",
        old="n, m = math.prod(event), self.lower + self.upper + 1",
        new="n, m = math.prod(event), max(self.lower + self.upper, 1)",
        tests=("tests/test_jacobians.py::test_orders_0_to_3_against_closed_form",),
    ),
    Mutant(
        name="bands: a log-determinant is differentiated through singular blocks",
        file="backsolve/linalg/banded.py",
        old="                good = holds(self._without_corners(entries), gradient)",
        new="                good = True",
        tests=("tests/test_band_inverse.py::test_singular_blocks_of_a_good_matrix",),
    ),
    Mutant(
        name="bands: what couples two halves is forgotten in the second",
        file="backsolve/linalg/band_inverse.py",
        old="second - pad(self._in_bands(back, upper), (0, half - upper))",
        new="second",
        tests=("tests/test_band_inverse.py::test_matrices_that_need_pivots",),
    ),
    Mutant(
        name="bands: NaN spreads to the event beside it",
        file="backsolve/linalg/banded.py",
        old="        if usable.all() and (u.sum().isfinite() or u.isfinite().all()):",
        new="        if usable.all():",
        tests=("tests/test_linalg.py::test_events_side_by_side_do_not_mix",),
    ),
    Mutant(
        name="a claim about the inside of an event is believed",
        file="backsolve/_attach.py",
        old="        if contradiction is not None:",
        new="        if False:",
        tests=("tests/test_jacobians.py::test_wrong_claims_are_found_at_every_seed",),
    ),
    Mutant(
        name="Krylov: what the recurrence says of the residual is believed",
        file="backsolve/linalg/krylov.py",
        old="        converged = norm <= self.tolerance(u_norm)  # NaN compares false",
        new="        converged = torch.ones_like(norm, dtype=torch.bool)",
        tests=(
            "tests/test_matrix_free.py::test_what_is_reported_is_true",
            "tests/test_matrix_free.py::test_not_converged_is_an_error_or_the_fallback",
        ),
    ),
    Mutant(
        name="Krylov: a huge solution excuses any residual",
        file="backsolve/linalg/krylov.py",
        old="rounding = torch.minimum(4 * self.eps * self.stretch * u_norm, self.eps**0.5 * self.size)",
        new="rounding = 4 * self.eps * self.stretch * u_norm",
        tests=("tests/test_matrix_free.py::test_a_singular_jacobian_does_not_converge",),
    ),
    Mutant(
        name="conjugate gradients: negative curvature is not looked for",
        file="backsolve/linalg/krylov.py",
        old="        negative = negative | active & (curvature.real < -16 * system.eps * p_norm * v_norm)",
        new="",
        tests=("tests/test_krylov_choices.py::test_negative_curvature_is_an_error",),
    ),
    Mutant(
        name="conjugate gradients: symmetry is believed",
        file="backsolve/jacobians/matrix_free.py",
        old='        if self.method != "cg" or not at.y.numel():',
        new="        if True:",
        tests=("tests/test_krylov_choices.py::test_an_asymmetry_is_found_at_every_seed_and_no_false_alarm_is_raised",),
    ),
    Mutant(
        name="default: a huge solution by products is believed",
        file="backsolve/jacobians/matrix_free.py",
        old="            converged = converged & ~(found.growth * torch.finfo(b.dtype).eps ** 0.5 > 1)",
        new="            pass",
        tests=("tests/test_krylov_choices.py::test_a_fallback_judges_solutions_that_are_too_large",),
    ),
    Mutant(
        name="matrix-free: what the fallback finds singular is believed",
        file="backsolve/jacobians/matrix_free.py",
        old="        return None if self.direct is None else self.direct.singular()",
        new="        return None",
        tests=("tests/test_krylov_choices.py::test_a_singular_event_is_found_by_default",),
    ),
    Mutant(
        name="transforms: J as products is not tested for singularity",
        file="backsolve/_functional.py",
        old='assembled = rule.assemble(at).formed("a transform of torch")',
        new="assembled = rule.assemble(at)",
        tests=("tests/test_krylov_choices.py::test_a_singular_event_is_found_under_torch_func",),
    ),
    Mutant(
        name="bands: a vanishing column of J is not looked for",
        file="backsolve/jacobians/factored.py",
        old="return not min(least_magnitude(change) for change in self._changes()) > 4 * self._eps",
        new="return not least_magnitude(self._changes()[0]) > 4 * self._eps",
        tests=("tests/test_singular.py::test_a_direction_of_y_that_no_equation_sees",),
    ),
    Mutant(
        name="matrix-free: a second derivative takes w for a constant",
        file="backsolve/_attach.py",
        old="        w = _attach_transposed(rule, assembled.transposed_structure(), at, w, v)",
        new="        pass",
        tests=("tests/test_matrix_free.py::test_module_parameters_to_third_order",),
    ),
    Mutant(
        name="minimum norm: f's curvature is forgotten",
        file="backsolve/jacobians/equations.py",
        old="            j = torch.vmap(pull)(units.expand(n, *z.shape))[0].movedim(0, -2)",
        new="            j = torch.vmap(pull)(units.expand(n, *z.shape))[0].movedim(0, -2).detach()",
        tests=("tests/test_equations.py::test_minimum_norm_of_a_curved_f",),
    ),
    Mutant(
        name="J is not compared with the values of f",
        file="backsolve/_attach.py",
        old="false = find_false_derivative(at, assembled, self.unit_dims)",
        new="false = None",
        tests=(
            "tests/adversarial/test_adversarial.py::test_case[f detaches a part of y]",
            "tests/adversarial/test_adversarial.py::test_case[f couples by a detached mean]",
            "tests/test_differences.py::test_what_autograd_does_not_see_is_found",
        ),
    ),
    Mutant(
        name="noise passes for a false derivative",
        file="backsolve/jacobians/differences.py",
        old="lasting & ((off > self.noticed) & (ahead != behind)).all(0)",
        new="clear.any(0)",
        tests=("tests/test_differences.py::test_no_honest_f_is_refused",),
    ),
    Mutant(
        name="matrix-free: what has not converged is used",
        file="backsolve/jacobians/matrix_free.py",
        old="return torch.where(mask, u, torch.nan)",
        new="return u",
        tests=("tests/test_failures.py::test_the_page_is_up_to_date",),
    ),
    Mutant(
        name="diagnose: f is looked at in the sample only",
        file="backsolve/_diagnose/structure.py",
        old="    for y in _other_points(subject):",
        new="    for y in _other_points(subject)[:0]:",
        tests=("tests/test_diagnose.py::test_structures[gated, closed at the sample]",),
    ),
    Mutant(
        name="diagnose: the values of f are not looked at",
        file="backsolve/_diagnose/structure.py",
        old="values = _mixed_by(_response(subject), subject.y)",
        new="values = dict[int, float]()",
        tests=("tests/test_diagnose.py::test_structures[detach-coupled]",),
    ),
    Mutant(
        name="diagnose: a wrong derivative is within the error of the differences",
        file="backsolve/_diagnose/derivatives.py",
        old="agrees = False if wrong.any() else True if clear.any() else None",
        new="agrees = True if clear.any() else None",
        tests=("tests/test_diagnose.py::test_a_lost_second_derivative_is_found",),
    ),
    Mutant(
        name="DTensor: the gradient of a replicated param is that of the own events",
        file="backsolve/_sharded.py",
        old="_partial() if of_x.is_shard() and of_t.is_replicate() else of_t",
        new="of_t",
        tests=("tests/test_distributed.py::test_in_two_processes",),
    ),
    Mutant(
        name="DTensor: a replicated param may be as large as x",
        file="backsolve/_sharded.py",
        old="return same < 0 or t.shape[same] == 1",
        new="return True",
        tests=("tests/test_distributed.py::test_in_two_processes",),
    ),
)
