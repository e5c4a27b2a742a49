"""Entries for structlog. Needs the extra ``structlog``."""

from __future__ import annotations

import logging
from dataclasses import fields
from enum import Enum
from typing import TYPE_CHECKING, Any

try:
    import structlog
except ImportError as error:
    _message = "this hook needs structlog: install smtpretry with its extra 'structlog'"
    raise ImportError(_message, name=error.name) from error

from smtpretry.events import BrokenOff, Closed, Ended, Event, Opened, Paused, Resumed
from smtpretry.outcome import Status, Step
from smtpretry.replies.reply import Reply
from smtpretry.replies.rule import Action

if TYPE_CHECKING:
    from smtpretry.delivery import Delivery

_MESSAGES: dict[type, str] = {
    Step: "smtp reply decided",
    Ended: "smtp recipient ended",
    BrokenOff: "smtp send broken off",
    Paused: "smtp server left alone",
    Resumed: "smtp server works again",
    Opened: "smtp connection opened",
    Closed: "smtp connection closed",
}


class StructlogHook:
    """Writes each event with all of its fields."""

    def __init__(self, logger: Any = None) -> None:  # noqa: ANN401 - any of structlog's, which have no common type
        self._logger = structlog.get_logger("smtpretry") if logger is None else logger

    def __call__(self, delivery: Delivery | None, event: Event) -> None:
        """Write it."""
        about = {"delivery_id": delivery.id} if delivery is not None else {}
        self._logger.log(_level(event), _MESSAGES[type(event)], **about, **_fields(event))


def _level(event: Event) -> int:
    match event:
        case Step(action=Action.FAIL) | Ended(status=Status.REFUSED | Status.UNCERTAIN) | BrokenOff() | Paused():
            return logging.WARNING
        case Opened() | Closed():
            return logging.DEBUG
    return logging.INFO


def _fields(event: Event) -> dict[str, Any]:
    """The fields of an event, as JSON has them; what the server said as in the log of the standard library."""
    found: dict[str, Any] = {}
    for field in fields(event):
        value = getattr(event, field.name)
        if field.name == "at":  # structlog has its own
            continue
        if isinstance(value, Reply):
            found |= {"reply": str(value), "code": value.code, "enhanced": value.enhanced}
        elif isinstance(value, Enum):
            found[field.name] = value.value
        else:
            found[field.name] = list(value) if isinstance(value, tuple) else value
    return found
