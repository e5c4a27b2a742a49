"""The enumeration: whatever breaks, wherever, nobody is left without an end, nothing is lost, and nothing comes twice."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import TYPE_CHECKING

import pytest
import virtual

import faults
from smtpretry.testing import ScriptedServer

if TYPE_CHECKING:
    from collections.abc import Callable

DONE: Counter[str] = Counter()  # cells by place, in this process


@pytest.mark.parametrize("place", faults.PLACES, ids=str)
def test_every_fault_at(place: faults.Place) -> None:
    """Each fault at this place ends with what the server really did, reported alike by delivery, result and exception."""
    runs = [virtual.run(faults.run(cell)) for cell in faults.cells(place)]
    DONE[str(place)] = len(runs)
    failed = [run for run in runs if run.problems]
    assert not failed, f"{len(failed)} of {len(runs)} cells:\n" + "\n".join(map(str, failed))
    assert sum(run.lost for run in runs) == 0
    assert sum(run.twice for run in runs if run.cell.mode == "raise" or not run.cell.dot_is_out) == 0


def test_the_matrix_is_large(record_property: Callable[[str, object], None]) -> None:
    """More than 2500 cells are tried: the tests' part of the matrix, which `python -m tests.reliability` runs in full."""
    number = sum(len(list(faults.cells(place))) for place in faults.PLACES)
    record_property("cells", number)
    assert number > 2500
    if len(DONE) == len(faults.PLACES):
        assert DONE.total() == number


@pytest.mark.parametrize("how", ["fin", "rst", "421", "550 and close"])
def test_the_others_go_at_once(how: str) -> None:
    """Where RCPT for one recipient ends the connection, for ever, the others have the mail without a second's wait."""

    async def scenario() -> None:
        async with ScriptedServer() as server:
            smtp = faults.client_for(server)
            bob = faults.RECIPIENTS[1]
            if how in ("fin", "rst"):
                server.fail_at("RCPT", how, bob)
            else:
                server.on("RCPT", bob, "421 4.7.0 Bye" if how == "421" else "550 5.7.1 Go away", close=True)
            send = asyncio.ensure_future(smtp.deliver(faults.SMALL, sender=faults.SENDER, recipients=faults.RECIPIENTS))
            await asyncio.sleep(1)
            assert [faults.copies(server, who) for who in faults.RECIPIENTS] == [1, 0, 1]
            delivery = await send
            assert delivery.accepted == [faults.RECIPIENTS[0], faults.RECIPIENTS[2]]
            assert list(delivery.refused) == [bob]
            await smtp.aclose()

    virtual.run(scenario())


def test_two_that_hang_up_do_not_starve_a_third() -> None:
    """Two recipients whose RCPT always ends the connection keep nobody from being tried, and taken, after them."""

    async def scenario() -> None:
        async with ScriptedServer() as server:
            smtp = faults.client_for(server)
            ann, bob, carol = faults.RECIPIENTS
            server.fail_at("RCPT", "rst", ann)
            server.fail_at("RCPT", "rst", bob)
            server.fail_at("RCPT", "fin", carol, times=1)
            delivery = await smtp.deliver(faults.SMALL, sender=faults.SENDER, recipients=faults.RECIPIENTS)
            assert delivery.accepted == [carol]
            assert sorted(delivery.refused) == [ann, bob]
            await smtp.aclose()

    virtual.run(scenario())
