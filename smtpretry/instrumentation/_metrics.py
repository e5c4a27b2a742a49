"""What the metrics have in common: names, help, labels, buckets, and which of them an event is about."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple
from weakref import WeakMethod

from smtpretry.events import BrokenOff, Closed, Ended, Event, Opened, Paused
from smtpretry.outcome import Status, Step
from smtpretry.replies.reply import NO_REPLY

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from smtpretry.delivery import Delivery
    from smtpretry.stats import Stats

COUNTERS: Final = {  # what is counted, and by which labels
    "replies": ("Replies that decided something.", ("server", "stage", "code", "action", "row")),
    "recipients": ("Recipients that have their end.", ("server", "status")),
    "pauses": ("Pauses that began or were prolonged.", ("server",)),
    "broken_off": ("Sends that were cancelled, or whose client was closed.", ()),
    "connections_opened": ("Connections that were opened.", ("server",)),
    "connections_closed": ("Connections that were closed.", ("server",)),
}
ACCEPTANCE: Final = "Seconds from the first try to the acceptance."
BUCKETS: Final = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800, 3600, 14400, 86400)
GAUGES: Final[dict[str, tuple[str, Callable[[Stats], float | None]]]] = {
    "connections_open": ("Connections that are open.", lambda stats: stats.open),
    "connections_in_use": ("Connections that a send is using, or opening.", lambda stats: stats.in_use),
    "waiting": ("Sends that wait, for a connection or for their next try.", lambda stats: stats.waiting),
    "pause_seconds": (
        "For how long the server is still left alone.",
        lambda stats: 0.0 if stats.paused_until is None else max(0.0, stats.paused_until - stats.at),
    ),
    "pace": ("Messages a second that the server is sent at most.", lambda stats: stats.pace),
}


class Count(NamedTuple):
    """One more of a counter, with the values of its labels."""

    name: str
    labels: tuple[str, ...]


def counts(delivery: Delivery | None, event: Event) -> Iterator[Count]:
    """What an event adds to the counters."""
    match event:
        case Step():
            server = delivery.attempts[-1].server if delivery is not None else ""
            code = "none" if event.reply.code == NO_REPLY else str(event.reply.code)
            action = event.action.value if event.action else "OK"
            yield Count("replies", (server, event.stage.value, code, action, event.row))
        case Ended():
            yield Count("recipients", (event.server, event.status.value))
        case Paused():
            yield Count("pauses", (event.server,))
        case BrokenOff():
            yield Count("broken_off", ())
        case Opened():
            yield Count("connections_opened", (event.server,))
        case Closed():
            yield Count("connections_closed", (event.server,))


def acceptance(event: Event) -> Ended | None:
    """The event, where it is an acceptance."""
    return event if isinstance(event, Ended) and event.status is Status.ACCEPTED else None


class Clients:
    """The clients that are watched, for as long as somebody else holds them."""

    def __init__(self) -> None:
        self._stats: list[WeakMethod[Callable[[], Stats]]] = []

    def watch(self, stats: Callable[[], Stats]) -> None:
        """One more, by its method `stats`."""
        self._stats = [*(one for one in self._stats if one() is not None), WeakMethod(stats)]

    def __iter__(self) -> Iterator[Stats]:
        """How each of them is doing."""
        for one in self._stats:
            if (stats := one()) is not None:
                yield stats()


def gauges(name: str, clients: Iterable[Stats]) -> dict[str, float]:
    """The value for each server: of several clients of the same one, the sum, and of their pauses the longest."""
    of = GAUGES[name][1]
    found: dict[str, float] = {}
    for stats in clients:
        if (value := of(stats)) is not None:
            before = found.get(stats.server, 0.0)
            found[stats.server] = max(before, value) if name == "pause_seconds" else before + value
    return found
