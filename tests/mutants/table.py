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
        file="backsolve/jacobians/dense.py",
        old="self.lu.solve(self._column(v), transposed=True)",
        new="self.lu.solve(self._column(v))",
        tests=("tests/test_derivatives.py::test_orders_0_to_3_against_closed_form",),
    ),
    Mutant(
        name="the sign of the params' gradient is flipped",
        file="backsolve/_attach.py",
        old="return [w, *at.pull_inputs(-w, wanted)]",
        new="return [w, *at.pull_inputs(w, wanted)]",
        tests=(
            "tests/test_derivatives.py::test_orders_0_to_3_against_closed_form",
            "test_implicit_differentiation.py::test_parameters_that_f_reads_get_gradients",
        ),
    ),
    Mutant(
        name="the seed's layer: the transpose is dropped",
        file="inverse_differentiation_layer.py",
        old="factors.solve(grads[0][..., None], transposed=True)",
        new="factors.solve(grads[0][..., None])",
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
)
