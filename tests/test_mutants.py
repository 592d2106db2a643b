"""The table of mutants does not rot: each patch still fits the code, and its tests exist. `make mutants` runs them."""

import ast
from pathlib import Path

import pytest

from tests.mutants.table import MUTANTS, Mutant

ROOT = Path(__file__).parents[1]


def defines(path: Path, names: list[str]) -> bool:
    """Whether a file defines a function, or a class with a method, of these names."""
    body = ast.parse(path.read_text(encoding="utf-8")).body
    for name in names:
        found = [node for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name]
        if not found:
            return False
        body = found[0].body
    return True


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_mutant_still_fits(mutant: Mutant) -> None:
    patched = mutant.applied(ROOT / "src")
    compile(patched, mutant.file, "exec")
    assert mutant.new != mutant.old
    assert mutant.tests
    for test in mutant.tests:
        file, *names = test.partition("[")[0].split("::")
        assert defines(ROOT / file, names), f"{test} does not exist"


def test_names_are_unique() -> None:
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)


def test_a_patch_that_fits_no_place_or_two_is_refused(tmp_path: Path) -> None:
    (tmp_path / "module.py").write_text("a = 1\nb = 1\n")
    with pytest.raises(ValueError, match="stands 0 times"):
        Mutant("none", "module.py", "c = 1", "", ()).applied(tmp_path)
    with pytest.raises(ValueError, match="stands 2 times"):
        Mutant("two", "module.py", "= 1", "= 2", ()).applied(tmp_path)
    assert Mutant("one", "module.py", "b = 1", "b = 2", ()).applied(tmp_path) == "a = 1\nb = 2\n"
