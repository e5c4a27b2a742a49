"""`Failover`: the sending methods for several servers. If one is in trouble, the next one sends."""

# ruff: noqa: SLF001 - its clients are next door

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING, Self

from aiosmtplib.typing import Default

from .checks import check_timeout, current_task
from .client import RetryingSMTP
from .ledger import Position
from .outcome import Status
from .sending import Sends
from .stats import Stats

if TYPE_CHECKING:
    from collections.abc import Awaitable, Sequence
    from types import TracebackType

    from .attempt import Save
    from .delivery import Delivery
    from .queues.engine import Engine
    from .queues.site import Site
    from .session.connection import Timeout


class Failover(Sends):
    """Sends through the first server. If that one is in trouble, sends through the next one at once.

    A server is in trouble if it cannot be reached, does not let the client log in, gives a reply that concerns the
    whole client (a row of `Scope.SERVER`: 421, a quota that is used up), or breaks the connections of two messages in a
    row. It is left alone for as long as a single `RetryingSMTP` would leave it alone. Then one message tries it, and if
    it works, all messages go back to it. While it answers nothing, and another one is ready, nobody waits longer than
    ten seconds for a connection to it.

    A recipient that was accepted is never offered the message again, and one that was refused stays refused; but what
    a server refuses before MAIL, or cannot do (SMTPUTF8, a message of that size), is its own trouble, and ends nothing
    while another server may work later. An uncertain recipient moves to the next server, at once, only if the policy
    says "resend". One that a server refuses for now (450: greylisting knows the client) waits for that server, and
    moves when that server's policy gives up, or when that server can do nothing for it any more.

    Events of no single server, such as a delivery that the queue took, go to the hooks (`on_step=`) of all clients; a
    hook that several clients have is called once.

    Args:
        servers: a `RetryingSMTP` for each, the preferred one first; each has its own credentials, connections and
            policy. The first one's policy says how long a delivery is tried.
        defer: a durable queue, an `Engine`; its workers send through a Failover too.
        max_wait: the longest wait in process, in seconds, where there is an engine.

    Raises:
        TypeError: one of them is no RetryingSMTP.
        ValueError: there are fewer than two, one of them twice, or one that has a queue of its own.
    """

    def __init__(self, *servers: RetryingSMTP, defer: Engine | None = None, max_wait: float = 60) -> None:
        if wrong := [one for one in servers if not isinstance(one, RetryingSMTP)]:
            msg = f"Failover takes RetryingSMTP clients, not {wrong[0]!r}"
            raise TypeError(msg)
        if len(servers) < 2 or len(set(map(id, servers))) < len(servers):  # noqa: PLR2004 - one is no choice
            msg = "Failover takes two clients or more, each of them once"
            raise ValueError(msg)
        if any(server._engine is not None for server in servers):
            msg = "give the queue to the Failover, defer=, not to one of its clients"
            raise ValueError(msg)
        hooks = {id(hook): hook for server in servers for hook in server._observer.hooks}
        super().__init__(servers[0].policy, defer, max_wait, tuple(hooks.values()))
        self.servers = servers

    async def attempt(
        self, delivery: Delivery, save: Save | None = None, *, timeout: Timeout = Default.token
    ) -> Delivery:
        """Make one pass over the recipients that are due, through as many servers as it takes.

        See `RetryingSMTP.attempt`.
        """
        check_timeout(timeout)
        with delivery.sent_by(current_task()):
            began = self.policy.clock()
            delivery.take_up(began, late=True)
            self._forget_servers(delivery)
            positions = self._positions()
            ready = [number for number, server in enumerate(self.servers) if server._is_ready]
            for place, number in enumerate(ready, start=1):
                position = positions[number]._replace(others_are_ready=place < len(ready))
                await self.servers[number]._make_pass(delivery, save, position, timeout)
            for number in sorted(range(len(self.servers)), key=self._promise):
                left = any(delivery.outcomes[who].server is None for who in delivery.due(began))
                if left or number not in ready:  # who waits for that one waits on
                    position = positions[number]._replace(only_its_own=not left)
                    await self.servers[number]._make_pass(delivery, save, position, timeout)
            self._come_back(delivery)
        return delivery

    def _positions(self) -> list[Position]:
        """The position of each server, with what all of them need to know of each other."""
        refused = [set[str]() for _ in self.servers]

        def others_may(number: int, who: str) -> bool:
            others = (one for one in range(len(self.servers)) if one != number)
            return any(who not in refused[one] and not self.servers[one]._is_hopeless for one in others)

        return [
            Position(
                number,
                is_followed=number + 1 < len(self.servers),
                patience=self.policy.patience,
                refused=refused[number],
                others_may=partial(others_may, number),
            )
            for number in range(len(self.servers))
        ]

    def _promise(self, number: int) -> tuple[bool, float]:
        """What makes a server the one to wait for: the least."""
        return self.servers[number]._is_hopeless, self.servers[number]._resumes_at

    def _forget_servers(self, delivery: Delivery) -> None:
        """Let those who wait for a server that is no longer there wait for any: there were more of them once."""
        for who in delivery.pending:
            if (delivery.outcomes[who].server or 0) >= len(self.servers):
                delivery.outcomes[who].server = None

    def _come_back(self, delivery: Delivery) -> None:
        """Where all servers are left alone, let those who wait for any wait for the first that may work again."""
        soonest = min(server._resumes_at for server in self.servers)
        if soonest <= self.policy.clock():
            return
        for who in delivery.pending:
            if delivery.outcomes[who].server is None:
                delivery.outcomes[who].next_at = min(delivery.outcomes[who].next_at, soonest)

    def stats(self) -> Stats:
        """How the clients are doing, all together, and each in `Stats.servers`."""
        each = tuple(server.stats() for server in self.servers)
        first = min(each, key=lambda one: one.paused_until or 0.0)
        paces = [one.pace for one in each]
        return Stats(
            at=self.policy.clock(),
            server="",
            open=sum(one.open for one in each),
            in_use=sum(one.in_use for one in each),
            waiting=sum(one.waiting for one in each),
            paused_until=first.paused_until,
            reason=first.reason,
            pace=None if None in paces else sum(filter(None, paces)),
            accepted=sum(one.accepted for one in each),
            refused=sum(one.refused for one in each),
            uncertain=sum(one.uncertain for one in each),
            deferred=self._observer.counts[Status.DEFERRED] + sum(one.deferred for one in each),
            servers=each,
        )

    async def aclose(self) -> None:
        """Close all clients; see `RetryingSMTP.aclose`."""
        await asyncio.gather(*(server.aclose() for server in self.servers))

    @property
    def sites(self) -> Sequence[Site]:
        """Its servers, for the workers of a queue."""
        return [site for server in self.servers for site in server.sites]

    @property
    def is_connected(self) -> bool:
        """Whether a connection to one of the servers is open now."""
        return any(server.is_connected for server in self.servers)

    async def __aenter__(self) -> Self:
        """Open all clients for sending."""
        for server in self.servers:
            await server.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close all clients; without QUIT where something broke off."""
        await asyncio.gather(*(server.__aexit__(kind, error, traceback) for server in self.servers))

    def _alarm(self, seconds: float) -> Awaitable[None]:
        return self.servers[0]._alarm(seconds)

    async def _room(self) -> None:
        await next((server for server in self.servers if server._is_ready), self.servers[0])._room()
