"""Many messages: drawn as they are sent, told as they end, and none of them lost."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
from typing import TYPE_CHECKING, Any

import pytest
from support import ANN, APP, BODY, GREYLISTED, letter, patient, talk, virtually

import smtpretry
from smtpretry import ClientClosed, Delivery, RetryingSMTP, prepare
from smtpretry.testing import ScriptedServer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator


def to(number: int) -> str:
    return f"{number}@example.com"


async def told_by(sending: AsyncIterator[Delivery], told: list[Delivery]) -> None:
    """Note each delivery, for whatever comes after them."""
    async for delivery in sending:
        told.append(delivery)  # noqa: PERF401 - it may raise in the end


class Source:
    """An iterable of messages that counts how many were drawn."""

    def __init__(self, length: int) -> None:
        self.length, self.drawn = length, 0

    def __iter__(self) -> Iterator[Any]:
        for number in range(self.length):
            self.drawn += 1
            yield letter(to(number))


class AsyncSource(Source):
    """The same, asynchronous and slow."""

    __iter__ = None  # type: ignore[assignment]

    async def __aiter__(self) -> AsyncIterator[Any]:
        for number in range(self.length):
            await asyncio.sleep(1)
            self.drawn += 1
            yield letter(to(number))


@pytest.mark.parametrize("kind", [Source, AsyncSource, lambda length: list(Source(length))])
@virtually
async def test_every_message_is_sent_and_told(kind: Any) -> None:
    """Each message of a list, a generator or an asynchronous generator is sent once, and its delivery yielded."""
    async with talk() as (server, smtp):
        deliveries = [delivery async for delivery in smtp.send_many(kind(20))]
        assert [delivery.accepted for delivery in deliveries] == [[to(number)] for number in range(20)]
        assert len(server.messages) == 20


@virtually
async def test_no_messages() -> None:
    """Of no messages nothing comes, not even a connection."""
    async with talk() as (server, smtp):
        assert [delivery async for delivery in smtp.send_many([])] == []
        assert server.connections == 0


@virtually
async def test_prepared_messages() -> None:
    """What `prepare` makes is taken as well: bytes with an envelope of their own."""
    async with talk() as (server, smtp):
        mine = [smtpretry.prepare(BODY, sender=APP, recipients=to(number)) for number in range(3)]
        assert [delivery async for delivery in smtp.send_many(mine)] == mine
        assert len(server.messages) == 3


@virtually
async def test_who_waits_holds_up_nobody() -> None:
    """A greylisted message ends last, and its wait is in nobody's way."""
    async with talk() as (server, smtp):
        server.on("RCPT", to(0), "450 4.2.0 Greylisted for 300 seconds", times=1)
        ends = [delivery.accepted[0] async for delivery in smtp.send_many(Source(10))]
        assert ends == [*map(to, range(1, 10)), to(0)]


@pytest.mark.parametrize("connections", [1, 4])
@virtually
async def test_drawn_only_as_fast_as_they_are_sent(connections: int) -> None:
    """While a slow server has one message on each connection, no more than one for each waits behind it."""
    async with ScriptedServer() as server:
        server.fail_at("END_OF_DATA", "late", delay=10)
        async with RetryingSMTP(server.client, patient(), max_connections=connections) as smtp:
            source, ahead = Source(1000), []
            async with contextlib.aclosing(smtp.send_many(source)) as deliveries:
                async for _ in deliveries:
                    ahead.append(source.drawn - len(server.messages))
                    if len(ahead) == 20:
                        break
            assert max(ahead) <= 2 * connections + 1


@virtually
async def test_others_do_not_starve_it() -> None:
    """Among other sends of the same client that never pause, it gets its turns."""
    async with ScriptedServer() as server, RetryingSMTP(server.client(), patient()) as smtp:
        server.fail_at("END_OF_DATA", "late", delay=1)

        async def incessantly() -> None:
            while True:
                await smtp.sendmail(APP, [ANN], BODY)

        others = [asyncio.ensure_future(incessantly()) for _ in range(2)]
        async with asyncio.timeout(100):
            assert len([delivery async for delivery in smtp.send_many(Source(10))]) == 10
        for other in others:
            other.cancel()
        await asyncio.gather(*others, return_exceptions=True)


@virtually
async def test_a_closed_client_ends_it_though_the_source_stalls() -> None:
    """Closing the client ends it at once, also while the source has nothing to give."""

    async def source() -> AsyncIterator[Any]:
        yield letter(to(0))
        await asyncio.sleep(100_000)
        yield letter(to(1))

    async with talk() as (server, smtp):
        server.on("RCPT", GREYLISTED)
        loop = asyncio.get_running_loop()
        loop.call_later(1, lambda: asyncio.ensure_future(smtp.aclose()))
        told: list[Delivery] = []
        with pytest.raises(ClientClosed):
            await told_by(smtp.send_many(source()), told)
        assert [delivery.pending for delivery in told] == [[to(0)]]
        assert loop.time() < 100


@virtually
async def test_no_more_under_way_than_said() -> None:
    """Where all wait for greylisting, no more are drawn than `concurrency`."""
    async with talk() as (server, smtp):
        server.on("RCPT", GREYLISTED, times=100)
        source, done = Source(100), 0
        async for _ in smtp.send_many(source, concurrency=7):
            done += 1
            assert source.drawn - done <= 7
        assert done == 100


@virtually
async def test_a_slow_reader_holds_up_the_drawing() -> None:
    """What the caller has not taken yet counts as under way: nothing piles up before a slow loop."""
    async with talk() as (_, smtp):
        source, done = Source(50), 0
        async for _ in smtp.send_many(source, concurrency=5):
            await asyncio.sleep(60)
            done += 1
            assert source.drawn - done <= 5


@virtually
async def test_refusals_are_told_not_raised() -> None:
    """A refused message is a delivery like any other."""
    async with talk() as (server, smtp):
        server.on("RCPT", to(1), "550 5.1.1 User unknown")
        refused = [list(delivery.refused) async for delivery in smtp.send_many(Source(3))]
        assert refused == [[], [to(1)], []]


@virtually
async def test_what_cannot_be_sent_holds_up_nobody() -> None:
    """What is no message, and what has no recipient, is told at the end, each with its number; all others go."""
    async with talk() as (server, smtp):
        server.on("RCPT", to(1), GREYLISTED, times=1)
        told: list[Delivery] = []
        nobody = letter(to(2))
        del nobody["To"]
        messages: list[Any] = [letter(to(0)), letter(to(1)), None, letter(to(3)), nobody, letter(to(5))]
        with pytest.raises(
            ExceptionGroup, match="2 messages could not be sent at all; the others were yielded"
        ) as caught:
            await told_by(smtp.send_many(messages), told)
        assert sorted(delivery.accepted[0] for delivery in told) == [to(0), to(1), to(3), to(5)]
        assert [type(one) for one in caught.value.exceptions] == [TypeError, ValueError]
        notes = [one.__notes__ for one in caught.value.exceptions]
        assert notes == [[f"smtpretry: it was message {number} of send_many"] for number in (3, 5)]


@virtually
async def test_the_same_delivery_twice_at_once() -> None:
    """A delivery that is under way is not sent a second time: an error for that one, and one copy."""
    async with talk() as (server, smtp):
        server.on("RCPT", to(0), GREYLISTED, times=1)
        delivery, told = prepare(letter(to(0))), list[Delivery]()
        with pytest.raises(ExceptionGroup) as caught:
            await told_by(smtp.send_many([delivery, delivery, letter(to(1))]), told)
        assert "is being sent already" in str(caught.value.exceptions[0])
        assert len(told) == 2
        assert len(server.received(to(0))) == 1


@virtually
async def test_a_source_that_fails() -> None:
    """What the iterable raises comes out after the deliveries of what it gave before."""

    def source() -> Iterator[Any]:
        yield letter(to(0))
        message = "the database is gone"
        raise RuntimeError(message)

    async with talk() as (server, smtp):
        told: list[Delivery] = []
        with pytest.raises(RuntimeError, match="the database is gone"):
            await told_by(smtp.send_many(source()), told)
        assert [delivery.accepted for delivery in told] == [[to(0)]]
        assert len(server.messages) == 1


@virtually
async def test_a_source_that_fails_after_a_message_did() -> None:
    """Where single messages failed and the iterable did, the group holds all of it."""

    def source() -> Iterator[Any]:
        yield None
        message = "the database is gone"
        raise RuntimeError(message)

    async with talk() as (_, smtp):
        with pytest.raises(ExceptionGroup) as caught:
            await told_by(smtp.send_many(source()), [])
        assert [type(one) for one in caught.value.exceptions] == [TypeError, RuntimeError]


@virtually
async def test_a_closed_client_gives_the_deliveries_back() -> None:
    """Closing the client ends it: every delivery that was under way is yielded, with those who are pending."""
    async with talk() as (server, smtp):
        server.on("RCPT", GREYLISTED)
        asyncio.get_running_loop().call_later(1, lambda: asyncio.ensure_future(smtp.aclose()))
        told: list[Delivery] = []
        with pytest.raises(ClientClosed):
            await told_by(smtp.send_many(Source(5)), told)
        assert sorted(delivery.pending[0] for delivery in told) == [to(number) for number in range(5)]
        server.clear()


@pytest.mark.parametrize("connections", [1, 2, 4])
@pytest.mark.parametrize("taken", [1, 2, 5])
@virtually
async def test_a_loop_that_is_left_tells_of_each_message(
    connections: int, taken: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Each message that was drawn is yielded, on the server, or named in the log."""
    async with ScriptedServer() as server:
        source = Source(100)
        async with RetryingSMTP(server.client, patient(), max_connections=connections) as smtp:
            with caplog.at_level(logging.WARNING, "smtpretry"):
                async with contextlib.aclosing(smtp.send_many(source)) as deliveries:
                    left = taken
                    async for _ in deliveries:
                        left -= 1
                        if not left:
                            break
        there = {message.recipients[0] for message in server.messages}
        assert all(to(number) in there or to(number) in caplog.text for number in range(source.drawn))


@virtually
async def test_a_loop_that_is_left_leaves_nothing_behind(caplog: pytest.LogCaptureFixture) -> None:
    """Leaving the loop breaks off what is under way, tells who was pending, and the client goes on working."""
    async with talk() as (server, smtp):
        server.on("RCPT", to(1), GREYLISTED)
        with caplog.at_level(logging.WARNING, "smtpretry"):
            async with contextlib.aclosing(smtp.send_many(Source(100))) as deliveries:
                async for delivery in deliveries:
                    if delivery.accepted == [to(2)]:
                        break
        assert len(asyncio.all_tasks()) == 1 + server.open_connections
        assert f"broken off; pending: {to(1)}" in caplog.text
        assert "How are you?" not in caplog.text
        await smtp.sendmail(APP, [ANN], BODY)


@virtually
async def test_a_generator_ends_when_its_loop_is_left() -> None:
    """Who leaves the loop early closes what the generator reads from, such as a cursor, without the garbage collector."""
    closed = list[str]()

    async def source() -> AsyncIterator[Any]:
        try:
            for number in range(100):
                yield letter(to(number))
        finally:
            closed.append("cursor")

    gc.disable()
    try:
        async with talk() as (_, smtp):
            async with contextlib.aclosing(smtp.send_many(source())) as deliveries:
                await anext(deliveries)
            await asyncio.sleep(0.1)
            assert closed == ["cursor"]
    finally:
        gc.enable()


@virtually
async def test_a_cancellation_from_within_hides_no_message() -> None:
    """Where something of the caller's was cancelled that a send awaits, its message is told like one that failed."""

    class Cancelled(contextlib.AbstractAsyncContextManager[None]):
        async def __aenter__(self) -> None:
            task = asyncio.ensure_future(asyncio.sleep(60))
            task.cancel()
            await task

        async def __aexit__(self, *_: object) -> None:
            """Never called."""

    async with talk(credentials={"pace": Cancelled()}) as (_, smtp):
        told: list[Delivery] = []
        with pytest.raises(ExceptionGroup, match="3 messages could not be sent") as caught:
            await told_by(smtp.send_many(Source(3)), told)
        assert sorted(delivery.pending[0] for delivery in told) == [to(number) for number in range(3)]
        assert len(smtpretry.deliveries_of(caught.value)) == 3


@pytest.mark.parametrize("concurrency", [0, -1, 1.5, "many"])
def test_a_concurrency_that_cannot_be(concurrency: Any) -> None:
    """A concurrency below one is an error at once, before the loop begins."""
    smtp = RetryingSMTP(ScriptedServer().client())
    with pytest.raises(ValueError, match="concurrency is a whole number from 1 on"):
        smtp.send_many([], concurrency=concurrency)
