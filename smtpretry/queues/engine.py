"""What a `RetryingSMTP` asks of a durable queue: `Engine`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from smtpretry.delivery import Delivery
from smtpretry.replies.delays import duration

if TYPE_CHECKING:
    from smtpretry.policy import RetryPolicy
    from smtpretry.replies.reply import Reply
    from smtpretry.replies.stage import Stage

_LATE = 60.0  # seconds, from which on it is told


@dataclass(frozen=True, slots=True)
class Pause:
    """That a server said "not now" to everybody, as workers tell each other.

    Attributes:
        until: until when nothing is tried, in seconds since the epoch.
        failures: how many times in a row it said so; 0: it works.
        stage: when it said so.
        reply: what it said.
    """

    until: float = 0.0
    failures: int = 0
    stage: Stage | None = None
    reply: Reply | None = None


@dataclass(frozen=True, slots=True)
class Progress:
    """How many deliveries there are in a queue.

    Attributes:
        waiting: their time has not come.
        due: their time has come, and no worker has them yet.
        working: a worker has them.
        ended: everybody in them has got an end.
        late: the seconds for which the one that is due has been due, of several the longest: what an alert goes by. It
            grows while no worker works, or the server wants nothing. Two that differ in it alone are equal.
    """

    waiting: int
    due: int
    working: int
    ended: int
    late: float = field(default=0.0, compare=False)

    def __str__(self) -> str:
        """One line."""
        late = f" (for up to {duration(self.late)})" if self.late >= _LATE else ""
        return f"{self.waiting} waiting, {self.due} due{late}, {self.working} under way, {self.ended} ended"


class QueueError(OSError):
    """The queue cannot be used; the message says why, and what to do.

    Attributes:
        passing: whether it may be over in a while, as where the disk is full.
        untouched: whether it is certain that nothing was stored, so that a send goes on in process at once.
    """

    passing = False
    untouched = False


class TakenIdError(ValueError):
    """Another message has that id."""

    untouched = True  # as a QueueError's


OnEnd = Callable[[Delivery], Awaitable[None]]
OnProgress = Callable[[Progress], None]
Paced = Callable[[str | None], str | None]
Save = Callable[[Delivery], Awaitable[None]]


class SupportsAttempt(Protocol):
    """What a worker needs to send with: a `RetryingSMTP`, or what stands for several."""

    @property
    def policy(self) -> RetryPolicy:
        """It decides when to come again."""

    async def attempt(self, delivery: Delivery, save: Save | None = None) -> Delivery:
        """Make one pass over the recipients that are due; see `RetryingSMTP.attempt`."""


@runtime_checkable
class SupportsHas(Protocol):
    """An engine that can say whether it has a delivery. One that cannot is silent."""

    async def has(self, delivery_id: str, /) -> bool:
        """Whether it has taken the delivery over, be it waiting or ended."""


class Engine(Protocol):
    """A durable queue that keeps deliveries for days, and calls `RetryingSMTP.attempt` when they are due.

    It stores `Delivery.to_dict`, and from then on `Delivery.state`. It shows neither in a log.
    """

    async def submit(self, delivery: Delivery, /, *, connection: Any = None) -> None:  # noqa: ANN401 - each engine's own
        """Store a delivery, to be tried at `delivery.next_at`.

        When this returns, the delivery is stored durably. A second call with the same `delivery.id` changes nothing.

        Args:
            delivery: the delivery; its pending recipients are to be sent to.
            connection: a database connection of the application, to store it in its transaction.

        Raises:
            TypeError: the engine cannot use that `connection`.
            ValueError: a message from or to somebody else has that id; the engines here say so.
            Any other exception: the engine did not take the delivery. Where that is certain, the exception says so by a
                true attribute `untouched`; else `has` is asked.
        """

    async def work(self, smtp: SupportsAttempt, /, *, on_end: OnEnd | None = None) -> None:
        """Be a worker: make the attempts that are due, until stopped or cancelled.

        If a worker dies, another one takes up its deliveries. The policy of `smtp` decides when to try again and when
        to give up.

        Args:
            smtp: the client to send with.
            on_end: a coroutine function, called with each delivery that has ended with recipients refused, uncertain or
                expired. If it raises, it is called again. It may be called twice if the worker dies at that moment.
                Until it ends, its delivery counts as one that the worker is sending: limit what it waits for.
        """


def type_of(value: object) -> str:
    """The name of its type, with the module's: many a library has a `Connection`."""
    return f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
