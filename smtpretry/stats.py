"""How a client is doing: `Stats`. A plain value."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Stats:
    """How a client is doing now, and what became of its recipients so far. `dataclasses.asdict` makes JSON of it.

    Attributes:
        at: when, in seconds since the epoch, on the policy's clock.
        server: the mail server, as "host:port"; "" where it is not known yet, or where there are several.
        open: connections that are open.
        in_use: connections that a send is using, or opening.
        waiting: sends that wait, for a connection or for their next try.
        paused_until: until when the client leaves the server alone, in seconds since the epoch; None where it does not.
            Of several servers: until the first of them is tried again, where all are left alone.
        reason: why it does, such as "CONNECT: 421 4.3.2 Service shutting down"; "" where it does not.
        pace: messages a second that the server is sent at most; None where it has no limit.
        accepted: recipients for whom the message was taken.
        refused: recipients for whom it was not.
        uncertain: recipients for whom nobody knows.
        deferred: recipients that were handed over to a queue.
        servers: the stats of each server, where there are several (`Failover`).
    """

    at: float
    server: str
    open: int
    in_use: int
    waiting: int
    paused_until: float | None
    reason: str
    pace: float | None
    accepted: int
    refused: int
    uncertain: int
    deferred: int
    servers: tuple[Stats, ...] = ()
