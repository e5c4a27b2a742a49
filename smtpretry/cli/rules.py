"""``rules``: the table, for people."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from smtpretry.replies.rules import DEFAULT_RULES
from smtpretry.replies.tables import described, markdown_table

from . import UNREADABLE, wrapped

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    from smtpretry.replies.rule import Rule

_MARKS = re.compile(r"(?<=<!-- rules -->\n).*?(?=<!-- /rules -->)", re.DOTALL)


def add_to(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the parser's."""
    rules = commands.add_parser("rules", help="print the table", description="Print the table, first match first.")
    rules.add_argument("--patterns", action="store_true", help="with the words that each row looks for")
    rules.add_argument("--markdown", action="store_true", help="as a Markdown table")
    rules.add_argument(
        "--into", type=Path, metavar="FILE", help="as Markdown, between <!-- rules --> and <!-- /rules --> in that file"
    )
    rules.set_defaults(run=_rules)


def _rules(options: argparse.Namespace) -> int:
    if options.into:
        try:
            page = options.into.read_text(encoding="utf-8")
        except OSError as error:
            print(f"{options.into}: {error.strerror}", file=sys.stderr)
            return UNREADABLE
        if not _MARKS.search(page):
            print(f"{options.into}: no line <!-- rules --> with a later <!-- /rules -->", file=sys.stderr)
            return UNREADABLE
        options.into.write_text(_MARKS.sub(lambda _: markdown_table(), page), encoding="utf-8")
    elif options.markdown:
        print(markdown_table(), end="")
    else:
        for number, rule in enumerate(DEFAULT_RULES, start=1):
            print("\n".join(_row(number, rule, patterns=options.patterns)))
    return 0


def _row(number: int, rule: Rule, *, patterns: bool) -> Iterator[str]:
    about = described(rule)
    whom = "" if rule.scope is None else f"; concerns: {about['whom']}"
    wait = "" if rule.wait is None else f"; wait: {about['wait']}"
    yield f"{number:>3}  {about['reply']}; at: {about['at']}"
    yield f"     -> {about['action']}{whom}{wait}"
    yield from wrapped("", f"{rule.why} [{rule.source}]", indent=8)
    for name in ("text", "unless") if patterns else ():
        for phrase in _phrases(getattr(rule, name)):
            yield f"        {name}: {phrase}"


def _phrases(pattern: str | None) -> list[str]:
    """The alternatives of a pattern, one by one."""
    phrases, depth = [""], 0
    for part in re.split(r"(\\.|[()|])", pattern or ""):
        depth += {"(": 1, ")": -1}.get(part, 0)
        if part == "|" and depth == 0:
            phrases.append("")
        else:
            phrases[-1] += part
    return [phrase for phrase in phrases if phrase]
