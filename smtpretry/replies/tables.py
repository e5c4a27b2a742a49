"""The table for people: as Markdown, by kinds, and a row in words."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .delays import duration
from .kinds import KINDS, Kind
from .reply import NO_REPLY
from .rule import WAITING, Rule
from .rules import DEFAULT_RULES
from .stage import Stage

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


def markdown_table(rules: Iterable[Rule] = DEFAULT_RULES) -> str:
    """The whole table: one row for each rule, in their order, with its reason and source."""
    titles = ("name", "reply", "at", "action", "whom", "wait", "for", "why", "source")
    return _markdown(titles, [(rule.name, *described(rule).values(), rule.why, rule.source) for rule in rules])


def kinds_table(kinds: Iterable[Kind] = KINDS, rules: Iterable[Rule] = DEFAULT_RULES) -> str:
    """The table by kinds of reply, some dozen lines: what is done, how soon again, for how long, and why."""
    named = {rule.name: rule for rule in rules}
    rows = []
    for kind in kinds:
        mine = [named[name] for name in kind.rows]
        rows.append((kind.title, kind.done, _soon(mine), _long(mine), kind.why))
    return _markdown(("the server says", "what is done", "first wait", "given up after", "why"), rows)


def described(rule: Rule) -> dict[str, str]:
    """A row in words a person reads: the replies, the stages, the action, the scope, the wait and the patience."""
    codes = "any code" if rule.code is None else _codes(rule.code)
    status = (rule.enhanced,) if isinstance(rule.enhanced, str) else rule.enhanced or ()
    reply = " ".join(filter(None, (codes, ", ".join(status), "by its words" * (rule.text is not None))))
    return {
        "reply": reply + " (token sessions)" * rule.token + " (not logged in yet)" * rule.login,
        "at": "any stage" if rule.stages is None else ", ".join(stage.name for stage in Stage if stage in rule.stages),
        "action": rule.action.name + (f", else {rule.otherwise.name}" if rule.otherwise else ""),
        "whom": ("by stage" if rule.scope is None else rule.scope.name) + ", or one connection" * rule.fewer,
        "wait": (_soon([rule]) + ", then slower" * rule.slower) if rule.action in WAITING else "",
        "for": "" if rule.patience is None else duration(rule.patience),
    }


def _soon(rules: Sequence[Rule]) -> str:
    """How long the rows wait before the second attempt."""
    waits = {rule.wait for rule in rules if rule.action in WAITING}
    words = [duration(wait) if wait else "none" for wait in sorted(wait for wait in waits if wait is not None)]
    return ", ".join(words + ["the backoff"] * (None in waits))


def _long(rules: Sequence[Rule]) -> str:
    """How long the rows are patient."""
    waiting = [rule for rule in rules if rule.action in WAITING or rule.patience is not None]
    limits = sorted({rule.patience for rule in waiting if rule.patience is not None})
    words = [duration(limit) for limit in limits] + ["`give_up_after`"] * any(rule.patience is None for rule in waiting)
    return ", ".join(words)


def _markdown(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    lines += ["| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _codes(code: int | range | tuple[int, ...]) -> str:
    if isinstance(code, range) and code.step == 1 and code.start % 100 == 0 == code.stop % 100:
        return ", ".join(f"{hundred}xx" for hundred in range(code.start // 100, code.stop // 100))
    if isinstance(code, range) and code.step == 1:
        return f"{code[0]} to {code[-1]}"
    codes = (code,) if isinstance(code, int) else code
    return ", ".join("no reply" if each == NO_REPLY else str(each) for each in codes)
