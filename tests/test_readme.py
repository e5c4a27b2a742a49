"""The README keeps its word: it fits on a screen, its links lead somewhere, and its code is smtpretry's."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import smtpretry
from smtpretry import RetryPolicy, instrumentation, testing

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
LONG = ("|", "![", "```", "python3 -m venv")  # tables, pictures, and the commands that are run as they stand


def test_no_line_is_longer_than_a_screen() -> None:
    """A hundred characters, but for tables, pictures and commands on one line."""
    assert [line for line in PAGE.splitlines() if len(line) > 100 and not line.startswith(LONG)] == []


def test_every_link_leads_somewhere() -> None:
    """Files are in the repository, and headings on the page."""
    headings = {
        re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in re.findall(r"^#+ (.*)", PAGE, re.MULTILINE)
    }
    for target in re.findall(r"\]\(([^)]+)\)", PAGE):
        if target.startswith("#"):
            assert target[1:] in headings, target
        elif not target.startswith("https://"):
            assert (ROOT / target).exists(), target


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_every_snippet_is_python_of_names_that_exist(snippet: str) -> None:
    """It compiles, and what it takes from smtpretry is there."""
    tree = compile(snippet, "README.md", "exec", ast.PyCF_ONLY_AST | ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    spaces = {"smtpretry": smtpretry, "RetryPolicy": RetryPolicy, "instrumentation": instrumentation}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in spaces:
            assert node.attr == "queues" or hasattr(spaces[node.value.id], node.attr), ast.unparse(node)
        if isinstance(node, ast.ImportFrom) and node.module in ("smtpretry", "smtpretry.testing"):
            space = testing if node.module.endswith("testing") else smtpretry
            assert all(hasattr(space, each.name) for each in node.names), ast.unparse(node)
