"""All that the package logs, under the name "smtpretry": one constant message for each kind, with fields in `extra`.

A person reads who, what and why in the line; Sentry groups by the message; JSON formatters show the fields
`delivery_id`, `recipients`, `server`, `stage`, `code`, `enhanced`, `action`, `wait` and `row`, each where it is known.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
import traceback
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from .outcome import rounded
from .replies.rule import Action

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from .outcome import Outcome, Step
    from .replies.reply import Reply
    from .replies.stage import Stage

LONG: Final = 30.0
"""Seconds; a longer wait is worth a warning."""

SOON: Final = 5.0
"""Seconds that a connection may take where there never was one: perhaps host, port or TLS are wrong."""

_log = logging.getLogger("smtpretry")

relay: Final[ContextVar[Callable[[Callable[[], None]], None] | None]] = ContextVar("relay", default=None)
"""Gives what is to be logged to the thread that waits for this one: it may hold the lock of a handler."""


class _Here(threading.local):
    """Whether this thread is logging a line of ours: a handler may be mailing it."""

    speaks = False


here: Final = _Here()


def say(level: int, message: str, *args: object, error: BaseException | None = None, **fields: Any) -> None:  # noqa: ANN401 - what a field holds
    """Log a message of its own kind. If a handler raises, that is shown as `logging` does, and the send goes on.

    Where the application's record factory has a field of that name (`server`, `stage`), the application's stands.
    """
    if (hand_over := relay.get()) is None:
        _say(level, message, args, error, fields)
    elif _log.isEnabledFor(level):
        hand_over(partial(_say, level, message, args, error, fields))


def _say(level: int, message: str, args: Sequence[object], error: BaseException | None, fields: dict[str, Any]) -> None:
    if here.speaks:  # a handler mails what is logged of a mail: that would never end
        if level >= logging.WARNING and sys.stderr:
            with suppress(OSError):
                sys.stderr.write(f"{message % tuple(args)}\n")
        return
    here.speaks = True
    try:
        _log_it(level, message, args, error, fields)
    finally:
        here.speaks = False


def _log_it(
    level: int, message: str, args: Sequence[object], error: BaseException | None, fields: dict[str, Any]
) -> None:
    try:
        _log.log(level, message, *args, exc_info=error, extra=fields)
    except Exception as wrong:  # noqa: BLE001 - whatever a handler raises
        taken = fields.keys() & vars(logging.makeLogRecord({})) if _is_clash(wrong) else ()
        if taken:
            free = {name: value for name, value in fields.items() if name not in taken}
            _log_it(level, message, args, error, free)
        elif logging.raiseExceptions and sys.stderr:
            traceback.print_exc()


def _is_clash(wrong: Exception) -> bool:
    """Whether `logging` refused a field, before any handler saw the record."""
    return isinstance(wrong, KeyError) and "Attempt to overwrite" in str(wrong)


@contextmanager
def besides_the_story() -> Iterator[None]:
    """Meanwhile, show on standard error only what is about no delivery and no reply: somebody tells that already."""
    shown = logging.StreamHandler()
    shown.addFilter(lambda record: not {"delivery_id", "stage"} & vars(record).keys())
    before, _log.propagate = _log.propagate, False
    _log.addHandler(shown)
    try:
        yield
    finally:
        _log.removeHandler(shown)
        _log.propagate = before


def decided(delivery_id: str, step: Step, server: str) -> None:
    """A reply decided something."""
    level = logging.WARNING if step.action is Action.FAIL else logging.INFO
    if _log.isEnabledFor(level):
        to = ", ".join(step.recipients)
        message = "smtp reply decided: %s (delivery %s, to %s)"
        say(level, message, step, delivery_id, to, **fields_of(step), delivery_id=delivery_id, server=server)


def fields_of(step: Step) -> dict[str, Any]:
    """A step, as fields."""
    return {
        **said(step.stage, step.reply),
        "action": step.action.value if step.action else None,
        "wait": step.wait,
        "row": step.row,
        "recipients": list(step.recipients),
    }


def said(stage: Stage | None, reply: Reply | None) -> dict[str, Any]:
    """What a server said, as fields."""
    return {
        "stage": stage.value if stage else None,
        "code": reply.code if reply else None,
        "enhanced": reply.enhanced if reply else None,
    }


def gave_up(delivery_id: str, recipient: str, why: str, stage: Stage, reply: Reply) -> None:
    """The policy allows no other attempt."""
    message = "smtp recipient given up: %s: %s; last: %s: %s (delivery %s)"
    fields = {**said(stage, reply), "delivery_id": delivery_id, "recipients": [recipient]}
    say(logging.WARNING, message, recipient, why, stage.value, reply, delivery_id, **fields)


def lost(delivery_id: str, recipient: str, outcome: Outcome) -> None:
    """Somebody did not get the message, and no exception says so."""
    message, end = "smtp message %s for %s: %s (delivery %s)", outcome.status.value.lower()
    fields = {**said(outcome.stage, outcome.reply), "delivery_id": delivery_id, "recipients": [recipient]}
    say(logging.WARNING, message, end, recipient, outcome.reply, delivery_id, **fields)


def remarked(delivery_id: str, stage: Stage, reply: Reply) -> None:
    """Something that the caller should know of."""
    message = "smtp remark: %s: %s (delivery %s)"
    say(logging.WARNING, message, stage.value, reply.text, delivery_id, **said(stage, reply), delivery_id=delivery_id)


def calls_again(function: str, last: str, *, wait: float, until: float) -> None:
    """A function that sends is called again. Where that takes long, it shows without any set-up of logging."""
    level = logging.WARNING if wait > LONG else logging.INFO
    say(level, "smtp call of %s waits %.0f s, until %s: %s", function, wait, at(until), last, wait=wait)


def broken_off(delivery_id: str, pending: Sequence[str], why: str) -> None:
    """A send was cancelled: whoever did that may not look at what is pending."""
    message = "smtp send broken off; pending: %s (delivery %s, %s)"
    say(logging.WARNING, message, ", ".join(pending), delivery_id, why, delivery_id=delivery_id, recipients=[*pending])


def handed_over(delivery_id: str, recipients: Sequence[str]) -> None:
    """A queue took the rest."""
    if _log.isEnabledFor(logging.INFO):
        message, to = "smtp delivery handed over to the queue: to %s (delivery %s)", ", ".join(recipients)
        say(logging.INFO, message, to, delivery_id, delivery_id=delivery_id, recipients=[*recipients])


def not_handed_over(delivery_id: str, why: str) -> None:
    """The queue says that it does not have it."""
    message = "smtp delivery not handed over to the queue, goes on in process: %s (delivery %s)"
    say(logging.WARNING, message, why, delivery_id, delivery_id=delivery_id)


def queue_is_silent(delivery_id: str, why: str) -> None:
    """The queue may have it."""
    say(logging.WARNING, "smtp delivery in doubt: %s (delivery %s)", why, delivery_id, delivery_id=delivery_id)


# Nobody waits in the dark


def waits(delivery_id: str, recipient: str, stage: Stage, reply: Reply, *, wait: float, until: float) -> None:
    """A send waits for long."""
    message = "smtp send waits %.0f s, until %s: %s: %s (delivery %s, to %s)"
    fields = {**said(stage, reply), "wait": wait, "delivery_id": delivery_id, "recipients": [recipient]}
    say(logging.WARNING, message, wait, at(until), stage.value, reply, delivery_id, recipient, **fields)


def pauses(server: str, stage: Stage, reply: Reply, *, wait: float, until: float) -> None:
    """The client waits for long: the server is in trouble."""
    message = "smtp server left alone for %.0f s, until %s: %s says %s: %s"
    fields = {**said(stage, reply), "wait": wait, "server": server}
    say(logging.WARNING, message, wait, at(until), server or "it", stage.value, reply, **fields)


def still_connecting(server: str, seconds: float) -> None:
    """A server does not answer."""
    message = (
        "smtp connection to %s is not there after %.0f s; where it stays so, check hostname= and port=, and "
        "use_tls=True for a port that begins with TLS, such as 465"
    )
    say(logging.WARNING, message, server or "the server", seconds, server=server)


def never_connected(server: str, stage: Stage, reply: Reply, *, wait: float, until: float) -> None:
    """The client waits, and has never had a connection."""
    message = "smtp has no connection to %s yet, and tries again in %s s, at %s: %s: %s"
    fields = {**said(stage, reply), "wait": wait, "server": server}
    say(logging.WARNING, message, server or "the server", rounded(wait), at(until), stage.value, reply, **fields)


def hook_failed(hook: str, error: BaseException) -> None:
    """A hook raised; the send goes on."""
    message = "smtp hook %s raised %s; the send goes on, and what this hook raises from now on is not logged"
    say(logging.ERROR, message, hook, type(error).__name__, error=error, hook=hook)


def pace_failed(error: BaseException) -> None:
    """What `pace=` holds raised when it was left; the send goes on."""
    message = "smtp pace= raised %s on exit; the send goes on"
    say(logging.ERROR, message, type(error).__name__, error=error)


def at(when: float) -> str:
    """A time, as the clock on the wall has it."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(when))
