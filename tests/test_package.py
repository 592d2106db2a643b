"""What is shipped, what importing it does, and which module may import which."""

import ast
import email
import re
import subprocess
import sys
import tarfile
import textwrap
import zipfile
from pathlib import Path

import pytest

import backsolve

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src"
PACKAGE = SOURCE / "backsolve"
MODULES = sorted(PACKAGE.rglob("*.py"))

# The rooms, from the ground up: a module imports only from rooms that stand before its own. ARCHITECTURE.md says why.
ROOMS = (
    "errors",
    "_torch",
    "_functorch",
    "_library",
    "_levels",
    "_foreign",
    "_arguments",
    "_random",
    "_reduce",
    "linalg",
    "_nearby",
    "_solution",
    "jacobians",
    "_places",
    "_closure",
    "_linearize",
    "_two_levels",
    "_attach",
    "solvers",
    "_solve",
    "_mapped",
    "_mapped_solver",
    "_products",
    "_functional",
    "_one_level",
    "_beneath",
    "_operations",
    "_compiled",
    "_sharded",
    "_inverse",
    "_diagnose",
    "special",
    "distributions",
    "nn",
    "__init__",
    "__main__",
)


def python(code: str) -> str:
    """Run code in a fresh interpreter with the same import path and return what it prints."""
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_table_of_rooms_is_that_of_the_documents() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    named = [n for n in re.findall(r"^\| `(\w+)(?:\.py|/)`", text, re.MULTILINE) if n in ROOMS]
    assert named == [room for room in ROOMS if room in named]
    modules = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in MODULES}
    assert modules <= {*named, "__init__", "__main__"}


# ---- importing ------------------------------------------------------------------------------------------------------


def test_works_without_numpy_and_scipy() -> None:
    slope = python(
        """
        import sys

        class Blocker:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] in ("numpy", "scipy"):
                    raise ModuleNotFoundError(f"No module named {name!r}", name=name)

        sys.meta_path.insert(0, Blocker())
        import torch
        import backsolve, backsolve.solvers, inverse_differentiation_layer

        x = torch.tensor([0.6], dtype=torch.float64, requires_grad=True)
        y = backsolve.inverse(torch.sin, lambda x: torch.asin(x.detach()))(x)
        assert not {"numpy", "scipy"} & set(sys.modules)
        print(*torch.autograd.grad(y.sum(), x)[0].tolist())
        """
    )
    assert float(slope) == pytest.approx(1.25, rel=4 * sys.float_info.epsilon)  # 1 / sqrt(1 - 0.6^2)


def test_import_has_no_side_effects() -> None:
    changed = python(
        """
        import os, random, sys, warnings
        import numpy, scipy, torch
        import torch.autograd.functional, torch.func, torch.utils._pytree  # torch may load its own modules lazily

        MISSING = object()
        torch_modules = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "torch"}
        owners = dict(torch_modules)
        for module in torch_modules.values():
            for name, value in list(vars(module).items()):
                if isinstance(value, type):
                    owners[f"{module.__name__}.{name}"] = value

        def attributes():
            return {
                (owner, name): value
                for owner, holder in owners.items()
                for name, value in list(vars(holder).items())
                if callable(value) or isinstance(value, (staticmethod, classmethod, property))
            }

        def state():
            return {
                "torch's random state": torch.get_rng_state().tolist(),
                "numpy's random state": numpy.random.get_state()[1].tolist(),
                "Python's random state": random.getstate(),
                "default dtype": torch.get_default_dtype(),
                "default device": torch.get_default_device(),
                "grad mode": torch.is_grad_enabled(),
                "anomaly mode": torch.is_anomaly_enabled(),
                "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
                "threads": torch.get_num_threads(),
                "numpy's error handling": numpy.geterr(),
                "warning filters": list(warnings.filters),
                "environment": dict(os.environ),
            }

        state_before, attributes_before = state(), attributes()
        import backsolve, backsolve.solvers, inverse_differentiation_layer
        state_after, attributes_after = state(), attributes()

        print(*[name for name in state_before if state_before[name] != state_after[name]])
        print(*[k for k, v in attributes_before.items() if attributes_after.get(k, MISSING) is not v])
        print(*[k for k, v in attributes_after.items() if k not in attributes_before])
        """
    )
    assert changed == ""


# ---- what is shipped ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The wheel and the source distribution."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--target", "sdist", "-d", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return next(folder.glob("*.whl")), next(folder.glob("*.tar.gz"))


def test_wheel_holds_the_package_and_the_module(built: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(built[0]) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    sources = {path.relative_to(SOURCE).as_posix() for path in SOURCE.rglob("*.py")}
    assert names == sources | {"backsolve/py.typed"}
    assert {"backsolve/__init__.py", "inverse_differentiation_layer.py"} < names


def test_source_distribution_can_be_tested(built: tuple[Path, Path]) -> None:
    with tarfile.open(built[1]) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    sources = {path.relative_to(ROOT).as_posix() for path in SOURCE.rglob("*.py")}
    needed = {
        "LICENSE",
        "Makefile",
        "requirements/test.txt",
        "tests/test_package.py",
        "test_implicit_differentiation.py",
    }
    assert sources | needed | {"src/backsolve/py.typed"} <= names


def test_metadata(built: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(built[0]) as wheel:
        (name,) = (name for name in wheel.namelist() if name.endswith("METADATA"))
        fields = email.message_from_bytes(wheel.read(name))
    always = [line for line in fields.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert always == ["torch>=2.13.0"]
    assert set(fields.get_all("Provides-Extra", [])) == {"numpy", "scipy", "diagnose", "progress", "demo"}
    assert fields["Version"] == backsolve.__version__
    assert (fields["License-Expression"], fields["Requires-Python"]) == ("MIT", ">=3.10")


def test_changelog_knows_the_version() -> None:
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert headings[0] == "Unreleased"
    ours, *released = (tuple(map(int, name.split("."))) for name in (backsolve.__version__, *headings[1:]))
    assert released == sorted(released, reverse=True)
    assert not released or ours >= released[0], "the changelog has a later version than the package"


# ---- the rooms ------------------------------------------------------------------------------------------------------


def room_of(parts: tuple[str, ...]) -> str:
    """The room of `backsolve.<parts>`: a module or a package right below backsolve, or backsolve itself."""
    return parts[0] if parts else "__init__"


def imported_rooms(tree: ast.Module) -> set[str]:
    """The rooms that a module imports from, at its top or anywhere inside."""
    rooms = set[str]()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "backsolve":
            names = [f"backsolve.{a.name}" if a.name in ROOMS else "backsolve" for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        else:
            continue
        rooms |= {room_of(tuple(name.split(".")[1:])) for name in names if name.split(".")[0] == "backsolve"}
    return rooms


def imported_at_the_top(tree: ast.Module) -> set[str]:
    names = [alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in tree.body if isinstance(node, ast.ImportFrom)]
    return {name.split(".")[0] for name in names}


def parse(path: Path) -> tuple[str, ast.Module]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return room_of(path.relative_to(PACKAGE).with_suffix("").parts), tree


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_modules_import_only_from_rooms_before_theirs(path: Path) -> None:
    room, tree = parse(path)
    assert room in ROOMS, f"{room} is new: give it a place in ARCHITECTURE.md and in ROOMS here"
    allowed = {room, *ROOMS[: ROOMS.index(room)]}
    assert imported_rooms(tree) <= allowed
    assert imported_at_the_top(tree) <= {*sys.stdlib_module_names, "torch", "backsolve"}, "extras: import where used"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_autograd_functions_live_in_their_rooms(path: Path) -> None:
    room, tree = parse(path)
    bases = [ast.unparse(base) for node in ast.walk(tree) if isinstance(node, ast.ClassDef) for base in node.bases]
    own = [base for base in bases if base == "Function" or base.endswith("autograd.Function")]
    assert not own or room in {"_attach", "_functional", "_one_level", "_compiled", "linalg"}
