"""``rules``: the table, for people."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from smtpretry.replies.rules import DEFAULT_RULES
from smtpretry.replies.tables import described, kinds_table, markdown_table

from . import UNREADABLE, policies, wrapped

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    from smtpretry.replies.rule import Rule

_TABLES = {"rules": markdown_table, "kinds": kinds_table}


def add_to(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the parser's."""
    rules = commands.add_parser("rules", help="print the table", description="Print the table, first match first.")
    policies.add_to(rules)
    how = rules.add_mutually_exclusive_group()
    how.add_argument("--patterns", action="store_true", help="with the words that each row looks for")
    how.add_argument("--markdown", action="store_true", help="as a Markdown table")
    how.add_argument("--kinds", action="store_true", help="as a Markdown table of some dozen lines, by kind of reply")
    how.add_argument(
        "--into",
        type=Path,
        metavar="FILE",
        help="as Markdown, between <!-- rules --> and <!-- /rules --> in that file; kinds likewise",
    )
    rules.set_defaults(run=_rules)


def _rules(options: argparse.Namespace) -> int:
    if (options.into or options.kinds) and options.policy.rules != DEFAULT_RULES:
        print("--kinds and --into are about the table as it comes: leave --policy out", file=sys.stderr)
        return UNREADABLE
    if options.into:
        try:
            return _write_into(options.into)
        except (OSError, UnicodeDecodeError) as error:
            print(f"{options.into}: {getattr(error, 'strerror', None) or error}", file=sys.stderr)
            return UNREADABLE
    if options.kinds:
        print(kinds_table(), end="")
    elif options.markdown:
        print(markdown_table(options.policy.rules), end="")
    else:
        for number, rule in enumerate(options.policy.rules, start=1):
            print("\n".join(_row(number, rule, patterns=options.patterns)))
    return 0


def _write_into(file: Path) -> int:
    with file.open(encoding="utf-8") as opened:
        page = opened.read()
        ends = opened.newlines
    found = 0
    for name, table in _TABLES.items():
        marks = rf"(?<=<!-- {name} -->\n).*?(?=<!-- /{name} -->)"
        page, times = re.subn(marks, lambda _, table=table: table(), page, flags=re.DOTALL)  # type: ignore[misc]
        found += times
    if not found:
        print(f"{file}: no line <!-- rules --> with a later <!-- /rules -->, nor <!-- kinds -->", file=sys.stderr)
        return UNREADABLE
    file.write_text(page, encoding="utf-8", newline=ends if isinstance(ends, str) else "\n")
    return 0


def _row(number: int, rule: Rule, *, patterns: bool) -> Iterator[str]:
    about = described(rule)
    whom = "" if rule.scope is None else f"; concerns: {about['whom']}"
    wait = "" if rule.wait is None and not rule.slower else f"; wait: {about['wait']}"
    patience = f"; for: {about['for']}" if about["for"] else ""
    yield f"{number:>3}  {rule.name or '-'}: {about['reply']}; at: {about['at']}"
    yield f"     -> {about['action']}{whom}{wait}{patience}"
    yield from wrapped("", f"{rule.why} [{rule.source}]" if rule.source else rule.why, indent=8)
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
