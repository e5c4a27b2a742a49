"""The state of a client: `Stats`. A plain value."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Stats:
    """The state of a client now, and counts of its recipients so far. `dataclasses.asdict` makes JSON of it.

    Attributes:
        at: when, in seconds since the epoch, on the policy's clock.
        server: the mail server, as "host:port"; "" if it is not known yet, or if there are several.
        open: connections that are open.
        in_use: connections that a send is using, or opening.
        waiting: sends that wait, for a connection or for their next try.
        paused_until: until when the client leaves the server alone, in seconds since the epoch; None if it does not. If
            there are several servers and all are left alone: until the first of them is tried again.
        reason: why the server is left alone, such as "CONNECT: 421 4.3.2 Service shutting down"; "" if it is not.
        pace: the largest number of messages a second that the server is sent; None for no limit.
        accepted: recipients for whom the server took the message.
        refused: recipients for whom it did not.
        uncertain: recipients that may have the message or not.
        deferred: recipients that the queue took.
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
