"""What a hook is told (`on_step=`): plain values, without a message body and without a credential.

A `Step` is a reply that decided something. Beside it: a recipient has its end (`Ended`), a send was broken off
(`BrokenOff`), the whole client pauses and goes on (`Paused`, `Resumed`), a connection was opened or closed (`Opened`,
`Closed`). Times are seconds since the epoch, on the policy's clock; a server is named as "host:port".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .delivery import Delivery
from .outcome import Status, Step

if TYPE_CHECKING:
    from .replies.reply import Reply
    from .replies.stage import Stage


@dataclass(frozen=True, slots=True)
class Ended:
    """A recipient has its end.

    Attributes:
        at: when.
        recipient: whose end it is.
        status: which one: ACCEPTED, REFUSED, UNCERTAIN or DEFERRED.
        stage: when the last reply that concerned it was said; None where none was, for a queue took it at once.
        reply: that reply.
        server: who said it.
        elapsed: seconds since the delivery was first tried.
        left: how many recipients of the delivery have no end yet; with 0 the delivery has ended.
    """

    at: float
    recipient: str
    status: Status
    stage: Stage | None
    reply: Reply | None
    server: str
    elapsed: float
    left: int


@dataclass(frozen=True, slots=True)
class BrokenOff:
    """A send was broken off: it was cancelled, or the client was closed. Those who are pending have no end.

    Attributes:
        at: when.
        pending: who has no end.
        why: the name of the exception that the send raises.
    """

    at: float
    pending: tuple[str, ...]
    why: str


@dataclass(frozen=True, slots=True)
class Paused:
    """The client leaves the server alone, because the server is in trouble: a pause begins, or lasts longer.

    Attributes:
        at: when.
        until: when one send finds out whether the server works again.
        stage: when the server said the reply.
        reply: why.
        server: who said it.
    """

    at: float
    until: float
    stage: Stage
    reply: Reply
    server: str


@dataclass(frozen=True, slots=True)
class Resumed:
    """The server works again: the pause has ended."""

    at: float
    server: str


@dataclass(frozen=True, slots=True)
class Opened:
    """A connection was opened, and is encrypted where `tls` says so."""

    at: float
    server: str
    tls: bool


@dataclass(frozen=True, slots=True)
class Closed:
    """A connection was closed, by either side."""

    at: float
    server: str


Event = Step | Ended | BrokenOff | Paused | Resumed | Opened | Closed
Hook = Callable[[Delivery | None, Event], None]
"""What `on_step=` takes. The delivery is None where the event concerns none."""
