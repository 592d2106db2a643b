"""The cases are imported by the test that names them and not collected: each needs a package that may be missing."""

from tests.real_cases import PACKAGES

collect_ignore = ["__main__.py", "case.py", "oracle.py", *(f"{name}.py" for name in PACKAGES)]
