"""A send can be broken off at any point: the connection is closed, nothing is forgotten, and the next send works."""

from __future__ import annotations

import asyncio
import signal
import types
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import pytest
import virtual

import faults
from faults import RECIPIENTS, SENDER, Watched, client_for, copies, probe, server_for
from smtpretry import Delivery, Status
from smtpretry.testing import ScriptedServer

if TYPE_CHECKING:
    from collections.abc import Coroutine, Generator

Moment = Literal["at once", "later", "answered"]
MOMENTS: tuple[Moment, ...] = ("at once", "later", "answered")
VERBS = ("CONNECT", "EHLO", "STARTTLS", "AUTH", "CHALLENGE", "MAIL", "RCPT", "DATA", "BODY", "END_OF_DATA", "RSET")
FEW, ENOUGH = 14, 200  # awaits: fewer and more than any send here has


@types.coroutine
def broken_off(
    send: Coroutine[Any, Any, Any], number: int, moment: Moment, cancelled: asyncio.Event
) -> Generator[Any, Any, Any]:
    """Run a send, and cancel its task at its await of that number; set `cancelled` then.

    "at once": as it begins to wait. "later": when it has waited for a second. "answered": when what it waits for has
    come, and before it can look at it.
    """
    task = asyncio.current_task()
    assert task is not None

    def cancel(_: object = None) -> None:
        cancelled.set()
        task.cancel()

    awaits, thrown = 0, None
    while True:
        try:
            waits_for = send.send(None) if thrown is None else send.throw(thrown)
        except StopIteration as end:
            return end.value
        awaits, thrown = awaits + 1, None
        if awaits == number:
            if moment == "at once" or waits_for is None:
                cancel()
            elif moment == "later":
                asyncio.get_running_loop().call_later(1, cancel)
            else:
                waits_for.add_done_callback(cancel)
        try:
            yield waits_for
        except BaseException as caught:  # noqa: BLE001 - it goes where it belongs
            thrown = caught


def judge(delivery: Delivery, server: ScriptedServer) -> list[str]:
    """Compare what is known of a broken-off delivery with what the server has."""
    problems = list[str]()
    for who, outcome in delivery.outcomes.items():
        n = copies(server, who)
        if n > 1:
            problems.append(f"{who} has it {n} times")
        if n and outcome.status is not Status.ACCEPTED and not outcome.uncertain:
            problems.append(f"{who} has it, and that is not known: {outcome}")
        if not n and outcome.status is Status.ACCEPTED:
            problems.append(f"{who} is lost in silence")
    return problems


@dataclass
class Broken:
    """What came of it."""

    reached: bool = False
    problems: list[str] = field(default_factory=list)


async def break_off(place: faults.Place, number: int, moment: Moment, *, large: bool, used: bool) -> Broken:
    """Send, break it off at one await, then send on."""
    seen = Broken()
    async with server_for(place) as server:
        smtp = client_for(server)
        if used:
            await smtp.sendmail(SENDER, ["eve@example.com"], b"Subject: before\r\n\r\n")
        server.on("RCPT", RECIPIENTS[1], "450 4.2.0 Greylisted", times=1, optional=True)
        if moment == "later":  # so that there is a second in which to break it off, after the server has acted
            for verb in VERBS:
                server.fail_at(verb, "late", delay=5, optional=True)
        cancelled = asyncio.Event()
        send = smtp.sendmail(SENDER, list(RECIPIENTS), faults.LARGE if large else faults.SMALL)
        told: list[object] = []

        async def tell() -> None:
            try:
                await broken_off(send, number, moment, cancelled)
            except asyncio.CancelledError as error:
                told.append(getattr(error, "delivery", None))
                raise

        task = asyncio.ensure_future(tell())
        await asyncio.wait({task})
        seen.reached = cancelled.is_set()
        delivery = smtp.deliveries[-1]
        if task.cancelled() != seen.reached:
            seen.problems.append(f"cancelled, and went on: {task}" if seen.reached else "cancelled by itself")
        elif seen.reached and told != [delivery]:
            seen.problems.append("the CancelledError does not carry the delivery")
        server.clear()
        seen.problems += [*judge(delivery, server), *await probe(smtp, server)]
        await smtp.aclose()
    return seen


SENDS = pytest.mark.parametrize(
    ("place", "large", "used"),
    [
        (faults.Place("MAIL"), False, False),
        (faults.Place("MAIL"), True, True),
        (faults.Place("MAIL", session="tls"), False, False),
        (faults.Place("MAIL", session="tls"), True, True),
    ],
    ids=["clear-new", "clear-large-used", "tls-new", "tls-large-used"],
)


@pytest.mark.parametrize("moment", MOMENTS)
@SENDS
def test_cancelled_at_every_await(place: faults.Place, moment: Moment, *, large: bool, used: bool) -> None:
    """Cancelled at any await, a send ends at once, knows what may have been taken, and leaves a client that works."""
    for number in range(1, ENOUGH):
        seen = virtual.run(break_off(place, number, moment, large=large, used=used))
        assert not seen.problems, f"cancelled {moment} at await {number}: {seen.problems}"
        if not seen.reached:
            break
    assert FEW < number < ENOUGH - 1, "the sweep did not come to the end of the send"


def test_cancelled_while_it_asks_for_a_token() -> None:
    """A token generator can be cancelled like any other await; the next send asks anew."""

    async def scenario() -> None:
        asked = list[str]()

        async def token() -> str:
            asked.append("token")
            if len(asked) == 1:
                await asyncio.sleep(1000)
            return "token"

        async with ScriptedServer(token="token") as server:
            smtp = Watched(server.client(), faults.policy(), username="app", oauth_token_generator=token)
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(5):
                    await smtp.sendmail(SENDER, list(RECIPIENTS), faults.SMALL)
            assert server.messages == []
            assert await probe(smtp, server) == []
            assert len(asked) == 2
            await smtp.aclose()

    virtual.run(scenario())


@pytest.mark.parametrize("seconds", [1, 7, 30, 61, 100])
def test_time_limit_around_a_send(seconds: float) -> None:
    """`asyncio.timeout` around a send raises its TimeoutError on time, whatever the server does, and loses no knowledge."""

    async def scenario(verb: str) -> None:
        async with ScriptedServer() as server:
            smtp = client_for(server)
            server.fail_at(verb, "stall", act=True, optional=True)
            began = asyncio.get_running_loop().time()
            with pytest.raises(TimeoutError) as caught:
                async with asyncio.timeout(seconds):
                    await smtp.sendmail(SENDER, list(RECIPIENTS), faults.SMALL)
            assert asyncio.get_running_loop().time() - began == pytest.approx(seconds, abs=0.01)
            delivery = smtp.deliveries[-1]
            assert getattr(caught.value.__cause__, "delivery", None) is delivery
            assert [note.count("\n") for note in getattr(caught.value.__cause__, "__notes__", [])] == [0]
            server.clear()
            assert judge(delivery, server) == []
            assert await probe(smtp, server) == []
            await smtp.aclose()

    for verb in ("CONNECT", "EHLO", "MAIL", "RCPT", "DATA", "BODY", "END_OF_DATA"):
        virtual.run(scenario(verb))


def test_cancelled_while_another_one_has_the_connection() -> None:
    """A send that waits for its turn can be cancelled; neither the one that has the connection nor the next one minds."""

    async def scenario() -> None:
        async with ScriptedServer() as server:
            smtp = client_for(server)
            server.fail_at("MAIL", "late", delay=20, times=1)
            sends = [
                asyncio.ensure_future(smtp.sendmail(SENDER, [who], b"Message-ID: <%d@x>\r\n\r\n" % number))
                for number, who in enumerate(RECIPIENTS)
            ]
            await asyncio.sleep(5)
            sends[1].cancel()
            await asyncio.wait(sends)
            assert [send.cancelled() for send in sends] == [False, True, False]
            assert [len(server.received(who)) for who in RECIPIENTS] == [1, 0, 1]
            assert server.connections == 1
            assert await probe(smtp, server) == []
            await smtp.aclose()

    virtual.run(scenario())


def test_what_was_accepted_before_is_known() -> None:
    """Cancelled while one recipient is greylisted, a send tells which recipients were accepted, and which are pending."""

    async def scenario() -> None:
        async with ScriptedServer() as server:
            smtp = client_for(server)
            server.on("RCPT", RECIPIENTS[1], "450 4.2.0 Greylisted")
            send = asyncio.ensure_future(smtp.sendmail(SENDER, list(RECIPIENTS), faults.SMALL))
            await asyncio.sleep(30)
            send.cancel()
            with pytest.raises(asyncio.CancelledError) as caught:
                await send
            delivery = smtp.deliveries[-1]
            assert getattr(caught.value, "delivery", None) is delivery
            assert delivery.accepted == [RECIPIENTS[0], RECIPIENTS[2]]
            assert delivery.pending == [RECIPIENTS[1]]
            server.clear()
            await asyncio.sleep(delivery.next_at - virtual.clock() if delivery.next_at else 0)
            assert (await smtp.attempt(delivery)).accepted == list(RECIPIENTS)
            assert [copies(server, who) for who in RECIPIENTS] == [1, 1, 1]
            await smtp.aclose()

    virtual.run(scenario())


def test_interrupted_by_ctrl_c() -> None:
    """Ctrl-C breaks off a send and its program; what may have been taken is known, and the server sees the connection end."""
    server, seen = ScriptedServer(), list[Watched]()

    async def scenario() -> None:
        async with server, client_for(server) as smtp:
            seen.append(smtp)
            server.fail_at("END_OF_DATA", "stall", act=True)
            asyncio.get_running_loop().call_later(5, signal.raise_signal, signal.SIGINT)
            await smtp.sendmail(SENDER, list(RECIPIENTS), faults.SMALL)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # it is ignored in the background of a shell
    try:
        with pytest.raises(KeyboardInterrupt):
            virtual.run(scenario())
    finally:
        signal.signal(signal.SIGINT, before)
    assert judge(seen[0].deliveries[0], server) == []
    assert seen[0].deliveries[0].outcomes[RECIPIENTS[0]].uncertain
    assert not seen[0].is_connected
    assert server.open_connections == 0
