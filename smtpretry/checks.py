"""What is wrong with a call, said at once: its arguments, and where it is made."""

from __future__ import annotations

import asyncio
import email.message
from typing import TYPE_CHECKING, Any

from aiosmtplib.typing import Default

from .delivery import Delivery

if TYPE_CHECKING:
    from .session.conversation import Timeout


def check_messages(messages: object) -> None:
    """Refuse a single message where many are to come."""
    if isinstance(messages, (email.message.Message, str, bytes, Delivery)):
        msg = "messages is an iterable of messages: for a single one call send_message or deliver"
        raise TypeError(msg)


def check_number(name: str, number: int) -> None:
    """Refuse what is no number from 1 on."""
    if not isinstance(number, int) or number < 1:
        msg = f"{name} is a whole number from 1 on, not {number!r}"
        raise ValueError(msg)


def check_seconds(name: str, seconds: float | None, none: str = "", *, positive: bool = False) -> None:
    """Refuse what is no time to wait.

    Args:
        name: the argument's.
        seconds: what was given.
        none: what None means; "" where it means nothing.
        positive: whether 0 is refused, too.

    Raises:
        TypeError: it is no number.
        ValueError: it is below zero, or zero where it may not be, or NaN.
    """
    if seconds is None and none:
        return
    kind: type[Exception] = ValueError
    try:
        if seconds > 0 or (seconds == 0 and not positive):  # type: ignore[operator] # what cannot be compared is no number
            return
    except TypeError:
        kind = TypeError
    msg = (
        f"{name} is a {'positive ' * positive}number of seconds{f', or None for {none}' * bool(none)}, not {seconds!r}"
    )
    raise kind(msg)


def check_timeout(timeout: Timeout) -> None:
    """Refuse what is no time-out."""
    if timeout is not Default.token:
        check_seconds("timeout", timeout, "no limit", positive=True)


def current_task() -> asyncio.Task[Any] | None:
    """The task that asks.

    Raises:
        RuntimeError: it runs in no event loop of asyncio.
    """
    try:
        return asyncio.current_task()
    except RuntimeError:
        msg = (
            "smtpretry sends in an event loop of asyncio, and none runs here: begin with asyncio.run(...), or use "
            "smtpretry.Blocking; under trio, call that in a thread (trio.to_thread.run_sync)"
        )
        raise RuntimeError(msg) from None
