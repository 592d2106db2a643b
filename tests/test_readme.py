"""The README keeps its promises: its Python blocks run and print what it says, and what it points to exists."""

import contextlib
import io
import re
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = sorted(ROOT.glob("*.md"))


@dataclass(frozen=True)
class Block:
    language: str
    body: str
    line: int  # of the first line of the body


def fenced_blocks(text: str) -> list[Block]:
    fences = re.finditer(r"^```(\w*)[^\n]*\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [Block(m[1], m[2], text.count("\n", 0, m.start(2)) + 1) for m in fences]


BLOCKS = fenced_blocks(README)
EXAMPLES = [(a, b) for a, b in zip(BLOCKS, [*BLOCKS[1:], None], strict=True) if a.language == "python"]


def run(block: Block) -> str:
    """Return what a block prints, run in a namespace of its own: a reader can paste each block alone."""
    printed = io.StringIO()
    # Empty lines in front make a traceback name the line of the README.
    code = compile("\n" * (block.line - 1) + block.body, str(ROOT / "README.md"), "exec")
    with contextlib.redirect_stdout(printed):
        exec(code, {"__name__": "__main__"})
    return printed.getvalue()


@pytest.mark.parametrize(("block", "following"), EXAMPLES, ids=[f"line{block.line}" for block, _ in EXAMPLES])
def test_examples_run_and_print_what_the_readme_says(block: Block, following: Block | None) -> None:
    printed = run(block)
    if following is not None and following.language == "text":
        assert printed.rstrip() == following.body.rstrip()
    else:
        assert not printed, "the README shows no output of this block: show it in a ```text block right after it"


def test_readme_has_examples_with_output() -> None:
    assert any(following is not None and following.language == "text" for _, following in EXAMPLES)


def test_readme_is_short() -> None:
    assert README.count("\n") <= 120


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_make_targets_in_documents_exist(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    shell = "\n".join(b.body for b in fenced_blocks(text) if b.language in {"console", "bash", "sh"})
    named = re.findall(r"^(?:\$ )?make +(\w+)", shell, re.MULTILINE) + re.findall(r"`make +(\w+)[^`]*`", text)
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert set(named) <= set(targets)
    assert named or document.name != "README.md", "the README says how to test"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_relative_links_in_documents_lead_somewhere(document: Path) -> None:
    links = re.findall(r"\]\((?!\w+:|#)([^)#\s]+)", document.read_text(encoding="utf-8"))
    assert [link for link in links if not (ROOT / link).exists()] == []
