"""A server that says "not now" to one send says it to all of them; a refusal of one recipient or message stops no other."""

from __future__ import annotations

import asyncio
from typing import Any

import faults
import pytest
import tenacity
import virtual
from faults import SENDER, client_for

from smtpretry import Delivery, RetryingSMTP, Status
from smtpretry.testing import ScriptedServer

MANY = 200
MINUTE = 60.0
WAIT = tenacity.wait_exponential(multiplier=1, max=8)  # 1, 2, 4, 8, 8, 8 seconds


async def struggle(number: int, verb: str, reply: str) -> tuple[int, int, float]:
    """Let many sends meet a server that is not well for a minute. Return connections before and after, and the time."""
    loop = asyncio.get_running_loop()
    async with ScriptedServer() as server, RetryingSMTP(server.client(), faults.policy(wait=WAIT)) as smtp:
        server.on(verb, reply)
        sends = [
            asyncio.ensure_future(smtp.sendmail(SENDER, [f"user{n}@example.com"], b"Message-ID: <%d@x>\r\n\r\n" % n))
            for n in range(number)
        ]
        await asyncio.sleep(MINUTE)
        before = server.connections
        server.clear()
        await asyncio.gather(*sends)
        assert [len(server.received(f"user{n}@example.com")) for n in range(number)] == [1] * number
        return before, server.connections - before, loop.time()


@pytest.mark.parametrize(
    ("verb", "reply"),
    [
        ("CONNECT", "421 4.3.2 Too many connections"),
        ("CONNECT", "421 4.3.0 Closing"),
        ("CONNECT", "554 5.3.2 Service temporarily unavailable, try again later"),
        ("EHLO", "421 4.3.2 System not accepting network messages"),
        ("MAIL", "421 4.7.0 Too many connections from your host"),
        ("MAIL", "451 4.3.2 System not accepting network messages"),
        ("RCPT", "452 4.3.1 Insufficient system storage"),
        ("DATA", "421 4.3.2 Server shutting down"),
    ],
)
def test_a_minute_of_not_now(verb: str, reply: str) -> None:
    """With 200 sends waiting, a server that is not well sees the connections of one patient client; then all arrive."""
    alone, _, _ = virtual.run(struggle(1, verb, reply))
    before, after, end = virtual.run(struggle(MANY, verb, reply))
    assert 1 <= alone <= 12
    assert before <= alone + 1
    assert after <= 1
    assert end <= MINUTE + 301  # the longest pause that the table has for a struggling server


def test_connection_refused() -> None:
    """Where nobody listens, 200 sends knock as often as one; when the server is back, all of them arrive."""

    async def scenario(number: int) -> int:
        knocks = 0
        loop = asyncio.get_running_loop()
        async with ScriptedServer() as server:
            await server.stop()
            connect = loop.create_connection

            async def knock(*args: Any, **options: Any) -> Any:
                nonlocal knocks
                knocks += 1
                return await connect(*args, **options)

            loop.create_connection = knock  # type: ignore[method-assign]
            async with RetryingSMTP(server.client(), faults.policy(wait=WAIT)) as smtp:
                sends = [
                    asyncio.ensure_future(smtp.deliver(b"\r\n", sender=SENDER, recipients=[f"user{n}@example.com"]))
                    for n in range(number)
                ]
                await asyncio.sleep(MINUTE)
                before = knocks
                await server.start()
                deliveries = await asyncio.gather(*sends)
            assert all(delivery.accepted for delivery in deliveries)
            assert len(server.messages) == number
            assert server.connections == 1
            return before

    alone, together = virtual.run(scenario(1)), virtual.run(scenario(MANY))
    assert 5 <= alone <= 12
    assert together <= alone + 1


def test_one_goes_first() -> None:
    """After a pause one send goes ahead; the others follow when it succeeded, and wait on when it did not."""

    async def scenario() -> None:
        async with ScriptedServer() as server, RetryingSMTP(server.client(), faults.policy(wait=WAIT)) as smtp:
            server.on("CONNECT", "421 4.3.2 Too many connections", times=3)
            sends = [
                asyncio.ensure_future(smtp.deliver(b"\r\n", sender=SENDER, recipients=[f"user{n}@example.com"]))
                for n in range(MANY)
            ]
            seen = list[tuple[int, int]]()
            for _ in range(9):
                await asyncio.sleep(1)
                seen.append((server.connections, len(server.messages)))
            await asyncio.gather(*sends)
            assert server.connections == 4
            assert {sent for connections, sent in seen if connections < 4} == {0}
            assert seen[-1] == (4, MANY)

    virtual.run(scenario())


def test_nobody_pays_for_a_pause_with_attempts() -> None:
    """A send that only waited for the server has made no attempt: with two attempts each, all get through a long pause."""

    async def scenario() -> None:
        policy = faults.policy(wait=WAIT, max_attempts=2)
        async with ScriptedServer() as server, RetryingSMTP(server.client(), policy) as smtp:
            server.on("CONNECT", "421 4.3.2 Too many connections", times=5)
            deliveries = await asyncio.gather(
                *[smtp.deliver(b"\r\n", sender=SENDER, recipients=[f"user{n}@example.com"]) for n in range(50)]
            )
            ends = [delivery.outcomes[delivery.recipients[0]].status for delivery in deliveries]
            assert ends.count(Status.ACCEPTED) >= 47  # five refusals are two attempts of two sends, and one of a third
            assert ends.count(Status.ACCEPTED) == len(server.messages)

    virtual.run(scenario())


@pytest.mark.parametrize(
    ("verb", "pattern", "reply"),
    [
        ("RCPT", "poor@*", "450 4.2.0 Greylisted for 300 seconds"),
        ("RCPT", "poor@*", "451 4.3.0 Try again"),
        ("RCPT", "poor@*", "452 4.2.2 Mailbox full"),
        ("RCPT", "poor@*", "421 4.3.0 Closing"),
        ("RCPT", "poor@*", "550 5.1.1 No such user"),
        ("MAIL", "poor@*", "451 4.7.1 Try again"),
        ("MAIL", "poor@*", "450 4.1.8 Domain not found"),
        ("DATA", "poor@*", "451 4.3.0 Try again"),
        ("END_OF_DATA", "poor@*", "451 4.3.0 Try again"),
        ("END_OF_DATA", "poor@*", "554 5.7.1 Spam"),
    ],
)
def test_others_do_not_wait(verb: str, pattern: str, reply: str) -> None:
    """A refusal of one recipient or one message delays no other send of the same client, not by a second."""

    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        async with ScriptedServer() as server:
            smtp = client_for(server)
            server.on(verb, pattern, reply)
            sender = "poor@example.com" if verb == "MAIL" else SENDER
            poor = asyncio.ensure_future(smtp.deliver(b"\r\n", sender=sender, recipients=["poor@example.com"]))
            deliveries = list[Delivery]()
            for batch in range(2):  # those that were there before it waits, and those that come while it waits
                others = [f"user{batch}-{n}@example.com" for n in range(10)]
                began = loop.time()
                deliveries += await asyncio.gather(
                    *[smtp.deliver(b"\r\n", sender=SENDER, recipients=[who]) for who in others]
                )
                assert loop.time() - began < 0.1
                await asyncio.sleep(1)
            assert all(delivery.accepted for delivery in deliveries)
            assert all(len(delivery.attempts) == 1 for delivery in deliveries)
            assert not (await poor).accepted
            await smtp.aclose()

    virtual.run(scenario())
