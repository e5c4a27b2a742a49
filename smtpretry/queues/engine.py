"""What a `RetryingSMTP` asks of a durable queue: `Engine`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Protocol

from smtpretry.delivery import Delivery

if TYPE_CHECKING:
    from smtpretry.policy import RetryPolicy

OnEnd = Callable[[Delivery], Awaitable[None]]
Save = Callable[[Delivery], Awaitable[None]]


class SupportsAttempt(Protocol):
    """What a worker needs to send with: a `RetryingSMTP`, or what stands for several."""

    @property
    def policy(self) -> RetryPolicy:
        """It decides when to come again."""

    async def attempt(self, delivery: Delivery, save: Save | None = None) -> Delivery:
        """Make one pass over the recipients that are due; see `RetryingSMTP.attempt`."""


class Engine(Protocol):
    """A durable queue that keeps deliveries for days, and calls `RetryingSMTP.attempt` when they are due.

    It stores `Delivery.to_dict`, and from then on `Delivery.state`. It shows neither in a log.
    """

    async def submit(self, delivery: Delivery, /, *, connection: Any = None) -> None:  # noqa: ANN401 - each engine's own
        """Take a delivery over, to be tried at `delivery.next_at`.

        It is durable when this returns; a second time with the same `delivery.id` changes nothing.

        Args:
            delivery: what is pending in it is to be sent.
            connection: a database connection of the application, to submit in its transaction.

        Raises:
            TypeError: it cannot do so with that `connection`.
            Whatever else kept it from taking the delivery.
        """

    async def work(self, smtp: SupportsAttempt, /, *, on_end: OnEnd | None = None) -> None:
        """Be a worker: make the attempts that are due, until stopped or cancelled.

        A delivery whose worker dies is taken up by another one. The policy of `smtp` alone decides when to come again
        and when to give up.

        Args:
            smtp: the client to send with.
            on_end: a coroutine function, called with each delivery that has ended with recipients refused, uncertain or
                expired. It may be called twice, where the worker dies just then; where it raises, it is called again.
        """
