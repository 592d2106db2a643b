"""One failure policy everywhere: what the page about it says is what happens."""

import pytest

from tests.failures_page import FAILURES, PAGE, POLICIES, Failure, is_repeated, observe, page, written

pytestmark = [  # of torch's own making, while it traces
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:.*:DeprecationWarning"),
]


@pytest.mark.parametrize("failure", FAILURES, ids=lambda f: f.name)
def test_policies(failure: Failure) -> None:
    """The principle behind the table; `observe` compares the other events with a closed form."""
    seen = {policy: observe(failure, policy, "eager") for policy in POLICIES}
    assert "raises" in "".join(seen["raise"])
    assert not any("raises" in cell for policy in POLICIES[1:] for cell in seen[policy])
    assert any("warns" in cell for cell in seen["warn"])
    assert not any("warns" in cell for policy in ("nan", "ignore") for cell in seen[policy])
    assert seen["nan"][2:] == ("NaN",) * 3, "every derivative of a failed event is NaN"


def test_the_page_is_up_to_date() -> None:
    def look(failure: Failure, policy: str, context: str) -> tuple[str, ...]:
        return (observe if is_repeated(policy, context) else written)(failure, policy, context)

    assert PAGE.read_text(encoding="utf-8") == page(look), "python -m tests.failures_page"
