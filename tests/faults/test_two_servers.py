"""One of two servers breaks in every way at every place: nothing is lost, and nothing comes twice, whoever has it."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest
import virtual

import faults
from faults import RECIPIENTS, SENDER, SMALL, copies, install, policy, server_for
from smtpretry import Delivery, Failover, RetryingSMTP, Status

if TYPE_CHECKING:
    from smtpretry.testing import ScriptedServer

CLEAR = [place for place in faults.PLACES if place.session == "clear" and not place.large and place.verb != "QUIT"]
SESSION = [
    place for place in faults.PLACES if place.session == "tls" and place.verb in ("STARTTLS", "AUTH", "CHALLENGE")
]


def client(server: ScriptedServer, mode: faults.Mode) -> RetryingSMTP:
    credentials = {"username": "app", "password": "secret"} if server.credentials else {}
    return RetryingSMTP(server.client(timeout=60), policy(mode), **credentials)


def judge(cell: faults.Cell, delivery: Delivery, servers: tuple[ScriptedServer, ScriptedServer]) -> list[str]:
    """Compare what is reported of each recipient with what both servers have."""
    problems = list[str]()
    for who, outcome in delivery.outcomes.items():
        n = sum(copies(server, who) for server in servers)
        if outcome.status is Status.PENDING:
            problems.append(f"{who} has no end")
        if outcome.status is Status.ACCEPTED and not n:
            problems.append(f"{who} is lost in silence")
        if outcome.status is Status.REFUSED and n:
            problems.append(f"{who} is reported as refused, and has it")
        if n > 1 and (cell.mode == "raise" or not cell.dot_is_out):
            problems.append(f"{who} has it {n} times")
        if outcome.status is Status.REFUSED and cell.fault.kind != "5xx" and cell.place.refusal != faults.NEVER:
            problems.append(f"{who} is given up, although the other server works: {outcome.reply}")
    return problems


async def run(cell: faults.Cell) -> list[str]:
    """Send one message through two servers, of which the first one has the fault."""
    async with (
        server_for(cell.place, ahead=cell.ahead) as first,
        server_for(cell.place) as second,
        Failover(client(first, cell.mode), client(second, cell.mode)) as smtp,
    ):
        if cell.used:
            await smtp.sendmail(SENDER, ["dave@example.com"], b"Subject: before\r\n\r\n")
            if cell.place.verb in faults.BEFORE_MAIL:
                first.disconnect()
        script = install(cell, first)
        async with asyncio.timeout(10 * faults.PATIENCE):
            delivery = await smtp.deliver(SMALL, sender=SENDER, recipients=RECIPIENTS)
        problems = judge(cell, delivery, (first, second))
        if not script.used:
            problems.append("the fault was not reached")
        first.clear()
    return [f"{cell}: {problem}" for problem in problems]


@pytest.mark.parametrize("place", [*CLEAR, *SESSION], ids=str)
def test_every_fault_of_the_first_server(place: faults.Place) -> None:
    """Each recipient ends as the two servers together show, and a server that works gets what the other cannot take."""
    assert not [problem for cell in faults.cells(place) for problem in virtual.run(run(cell))]
