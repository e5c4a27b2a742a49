"""How long a relay that limits its clients takes to get all messages, against one who knows its limits."""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import aiosmtplib

from smtpretry import Delivery, RetryingSMTP, prepare

from .harness import Table, letter
from .relay import HOST, Limits, Seen, relay

if TYPE_CHECKING:
    from collections.abc import Iterable

QUOTA_ALLOWED = 3
PATIENCE = 3  # times the ideal, until it is broken off
EACH = 5  # messages on a connection
LINGERS = 0.2  # seconds
USED_UP = {
    "421, and why": Limits(messages=EACH),
    "421, and not why": Limits(messages=EACH, used_up=b"421 4.3.0 Closing connection"),
    "452 4.5.3": Limits(messages=EACH, used_up=b"452 4.5.3 Too many messages sent"),
    "421, to more than 3 connections, too": Limits(messages=EACH, connections=3, lingers=LINGERS),
}


@dataclass(frozen=True)
class Case:
    """Messages for a relay, all of them there at the start.

    Attributes:
        limits: the relay's.
        messages: how many.
        ideal: seconds that one who knows the limits needs at least.
        allowed: how many times that is good.
        refusals: how many for the rate are good; None where that is no question.
        connections: how many the client may open.
    """

    limits: Limits
    messages: int
    ideal: float
    allowed: float = 1.4
    refusals: int | None = 15
    connections: int = 3


def windows(messages: int, number: int, period: float = 1) -> float:
    """The seconds that so many messages take at least, where so many go in any period."""
    return (messages - 1) // number * period


def cases(*, quick: bool) -> dict[str, Case]:
    some, many = (100, 500) if quick else (300, 5000)
    if quick:
        counted, number, period = b"450 4.7.1 Error: too many messages, try again in 12 seconds", 30, 12
    else:
        counted, number, period = b"451 4.7.1 Rate limit exceeded: 100 messages per minute", 100, 60
    slow_down = b"421 4.7.0 too many messages, slow down"
    return {
        "14 in any second": Case(Limits(14), some, windows(some, 14)),
        "14 a second, burst 50": Case(Limits(50, drip=14), some, (some - 50) / 14),
        f"{number} in any {period} seconds, and says so": Case(
            Limits(number, period, counted), some, windows(some, number, period)
        ),
        "14 in any second, 3 connections of 8": Case(
            Limits(14, connections=3), some, windows(some, 14), refusals=None, connections=8
        ),
        "newsletter: 50 in any second, 20 on a connection": Case(
            Limits(50, refusal=slow_down, messages=20), many, windows(many, 50), allowed=2, refusals=None
        ),
    }


def prepared(messages: int) -> list[Delivery]:
    return [prepare(letter(f"user{number}@example.com")) for number in range(messages)]


async def send_all(port: int, deliveries: list[Delivery], patience: float | None, **settings: Any) -> float:
    """Send messages that are there at once; return the seconds until the last of them has its end."""
    began = time.perf_counter()
    async with RetryingSMTP(partial(aiosmtplib.SMTP, hostname=HOST, port=port), **settings) as smtp:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience):
                await asyncio.gather(*map(smtp.deliver, deliveries))
    return time.perf_counter() - began


async def meet(case: Case, deliveries: list[Delivery]) -> tuple[float, Seen]:
    """Return the seconds that it took, and what the relay saw."""
    with relay(case.limits) as running:
        took = await send_all(running.port, deliveries, PATIENCE * case.ideal, max_connections=case.connections)
    return took, running.seen


async def meet_all(found: Iterable[Case]) -> list[tuple[float, Seen]]:
    """All at the same time: they do little but wait."""
    there = [(case, prepared(case.messages)) for case in found]
    return await asyncio.gather(*[meet(case, deliveries) for case, deliveries in there])


def with_a_rate(*, quick: bool) -> Table:
    asked = cases(quick=quick)
    table = Table(
        "As fast as the relay allows",
        "All messages are there at the start, and go through one RetryingSMTP with its default policy and three connections. "
        f"It is told nothing. After {PATIENCE} times the ideal it is broken off. All relays but the last run at the same time.",
        ("relay", "messages", "in", "seconds", "ideal", "x ideal", "too fast", "otherwise refused", "connections"),
    )
    *relays, newsletter = asked.values()
    found = [*asyncio.run(meet_all(relays)), *asyncio.run(meet_all([newsletter]))]
    for (name, case), (took, seen) in zip(asked.items(), found, strict=True):
        times = took / case.ideal
        table.rows.append(
            (name, case.messages, seen.taken, took, case.ideal, times, seen.too_fast, seen.refused, seen.connections)
        )
        what = f"{name}: all in ({seen.taken}) within {case.allowed:g} times the ideal ({times:.2f})"
        table.targets[what] = seen.taken == case.messages and times <= case.allowed
        if case.refusals is not None:
            what = f"{name}: at most {case.refusals} refused as too fast ({seen.too_fast})"
            table.targets[what] = seen.too_fast <= case.refusals and seen.taken == case.messages
    return table


def stream(limits: Limits, messages: int, **settings: Any) -> tuple[float, Seen]:
    """Return the seconds that so many messages took over three connections, and what the relay saw."""
    with relay(limits) as running:
        took = asyncio.run(send_all(running.port, prepared(messages), PATIENCE * 10, max_connections=3, **settings))
    return took, running.seen


def with_a_quota(*, messages: int = 80) -> Table:
    table = Table(
        f"{messages} messages, {EACH} on a connection",
        f"Three connections; in the last line a connection counts for {LINGERS:g} s after its end. It stands beside one who "
        "knows: the same client with `max_messages_per_connection`, and the time that its connections linger.",
        ("the relay says", "in", "seconds", "x who knows", "refused", "connections"),
    )
    told, _ = stream(Limits(messages=EACH), messages, max_messages_per_connection=EACH)
    for name, limits in USED_UP.items():
        took, seen = stream(limits, messages)
        knows = told + limits.lingers * (messages // EACH // 3)
        table.rows.append((name, seen.taken, took, took / knows, seen.refused, seen.connections))
        what = (
            f"{name}: all in ({seen.taken}) within {QUOTA_ALLOWED} times the time of one who knows ({took / knows:.2f})"
        )
        table.targets[what] = seen.taken == messages and took <= QUOTA_ALLOWED * knows
    return table


def run(*, quick: bool) -> list[Table]:
    return [with_a_rate(quick=quick), with_a_quota()]
