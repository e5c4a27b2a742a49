"""How a delivery's outcomes and history are stored: as JSON has them, and of a bounded size."""

from __future__ import annotations

from dataclasses import MISSING, fields
from enum import Enum
from typing import TYPE_CHECKING, Any, Final, TypeVar

from .outcome import Attempt, Outcome, Status, Step
from .replies.reply import Reply
from .replies.rule import Action
from .replies.stage import Stage

if TYPE_CHECKING:
    from collections.abc import Sequence

T = TypeVar("T")

_ATTEMPTS: Final = (2, 30)  # how many are kept: the first ones, and the last ones
_STEPS: Final = (4, 4)  # of each attempt
_RECIPIENTS: Final = (8, 0)  # of each step
_TEXT: Final = 500  # characters of a reply


def plain_outcome(outcome: Outcome) -> dict[str, Any]:
    """An outcome as JSON has it: its status, and what is not as in a new one.

    What stands behind a silence (`error`) is left to the words of the reply.
    """
    plain: dict[str, Any] = {"status": outcome.status.value}
    for name, default in _OUTCOME.items():
        if (value := getattr(outcome, name)) != default:
            plain[name] = _value(value)
    return plain


def outcome_of(plain: dict[str, Any]) -> Outcome:
    """What `plain_outcome` wrote, in this version or in the first one."""
    stage, reply = plain.get("stage"), plain.get("reply")
    known = {"stage": stage and Stage(stage), "reply": reply and Reply(*reply)}
    return Outcome(**plain | known | {"status": Status(plain["status"])})


def plain_history(attempts: Sequence[Attempt]) -> list[dict[str, Any]]:
    """The first and the last attempts as JSON has them, with their first and last steps."""
    return [
        {"at": one.at, "server": one.server, "steps": [_plain_step(step) for step in _ends(one.steps, *_STEPS)]}
        for one in _ends(attempts, *_ATTEMPTS)
    ]


def history_of(plain: list[dict[str, Any]]) -> list[Attempt]:
    """What `plain_history` wrote."""
    return [Attempt(one["at"], [_step(step) for step in one["steps"]], one.get("server", "")) for one in plain]


def _ends(items: Sequence[T], first: int, last: int) -> Sequence[T]:
    if len(items) <= first + last:
        return items
    return [*items[:first], *items[len(items) - last :]]


def _plain_step(step: Step) -> dict[str, Any]:
    plain = {field.name: _value(getattr(step, field.name)) for field in fields(step)}
    return plain | {"recipients": list(_ends(step.recipients, *_RECIPIENTS))}


def _step(plain: dict[str, Any]) -> Step:
    known = {"stage": Stage(plain["stage"]), "reply": Reply(*plain["reply"]), "recipients": tuple(plain["recipients"])}
    return Step(**plain | known | {"action": plain["action"] and Action(plain["action"])})


def _value(value: object) -> object:
    match value:
        case Enum():
            return value.value
        case Reply():
            return [value.code, value.enhanced, value.text[:_TEXT]]
    return value


_OUTCOME: Final = {
    field.name: field.default
    for field in fields(Outcome)
    if field.name not in ("status", "error") and field.default is not MISSING
}
