"""The table for people: as Markdown, and a row in words."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .reply import NO_REPLY
from .rule import Action, Rule
from .rules import DEFAULT_RULES
from .stage import Stage

if TYPE_CHECKING:
    from collections.abc import Iterable


def markdown_table(rules: Iterable[Rule] = DEFAULT_RULES) -> str:
    """The table for a README: one row for each rule, in their order, with its reason and source."""
    rows = [
        "| reply | at | action | whom | wait | why | source |",
        "|---|---|---|---|---|---|---|",
    ]
    for rule in rules:
        cells = (*described(rule).values(), rule.why, rule.source)
        rows.append("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |")
    return "\n".join(rows) + "\n"


def described(rule: Rule) -> dict[str, str]:
    """A row in words a person reads: the replies, the stages, the action, the scope and the wait."""
    codes = "any code" if rule.code is None else _codes(rule.code)
    status = (rule.enhanced,) if isinstance(rule.enhanced, str) else rule.enhanced or ()
    reply = " ".join(filter(None, (codes, ", ".join(status), "by its words" * (rule.text is not None))))
    action = rule.action.name + (f", else {rule.otherwise.name}" if rule.otherwise else "")
    if rule.action in (Action.RETRY, Action.RECONNECT):
        wait = "the backoff" if rule.wait is None else "none" if rule.wait == 0 else f"{rule.wait:g} s"
    else:
        wait = ""
    return {
        "reply": reply + " (token sessions)" * rule.token + " (not logged in yet)" * rule.login,
        "at": "any stage" if rule.stages is None else ", ".join(stage.name for stage in Stage if stage in rule.stages),
        "action": action,
        "whom": ("by stage" if rule.scope is None else rule.scope.name) + ", or one connection" * rule.fewer,
        "wait": wait,
    }


def _codes(code: int | range | tuple[int, ...]) -> str:
    if isinstance(code, range) and code.step == 1 and code.start % 100 == 0 == code.stop % 100:
        return ", ".join(f"{hundred}xx" for hundred in range(code.start // 100, code.stop // 100))
    codes = (code,) if isinstance(code, int) else code
    return ", ".join("no reply" if each == NO_REPLY else str(each) for each in codes)
