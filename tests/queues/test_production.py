"""A queue as it lives in production: what operators meet at night."""

from __future__ import annotations

import asyncio
import ssl
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any

import pytest
import virtual
from support import ANN, BOB, letter, virtually

from smtpretry import Failover, RetryingSMTP, RetryPolicy
from smtpretry.queues.sqlite import SQLiteEngine
from smtpretry.testing import ScriptedServer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from smtpretry import Delivery

RIGHT: dict[str, Any] = {"username": "app", "password": "secret"}


@asynccontextmanager
async def working(engine: SQLiteEngine, smtp: RetryingSMTP | Failover, **options: Any) -> AsyncIterator[None]:
    worker = asyncio.create_task(engine.work(smtp, **options))
    try:
        yield
    finally:
        worker.cancel()
        with suppress(asyncio.CancelledError):
            await worker


def for_a_queue() -> RetryPolicy:
    return RetryPolicy(
        wait=RetryPolicy.queue().wait, give_up_after=RetryPolicy.queue().give_up_after, clock=virtual.clock
    )


async def never(delivery: Delivery) -> None:
    pytest.fail(f"{delivery.id} has ended: {delivery.refused}")


@pytest.mark.parametrize("credentials", [{"username": "app", "password": "of last year"}, {}])
@virtually
async def test_a_wrong_password_ends_nothing(tmp_path: Path, credentials: dict[str, Any]) -> None:
    """A night with it costs a log-in every quarter of an hour, and the mail goes when a worker has the right one."""
    async with ScriptedServer(auth=("app", "secret")) as server, SQLiteEngine(tmp_path / "mail.db") as engine:
        async with RetryingSMTP(server.client(), for_a_queue(), **credentials, defer=engine) as smtp:
            for who in (ANN, BOB) * 3:
                await smtp.enqueue(letter(who))
            async with working(engine, smtp, on_end=never):
                await asyncio.sleep(8 * 3600)
                assert (await engine.progress()).ended == 0
            tries = server.verbs.count("AUTH") if credentials else server.connections
            assert 8 <= tries <= 33
        async with RetryingSMTP(server.client(), for_a_queue(), **RIGHT) as smtp, working(engine, smtp, on_end=never):
            await asyncio.sleep(1800)
        assert len(server.messages) == 6


@pytest.mark.parametrize(
    ("stage", "reply"),
    [
        ("CONNECT", "554 5.7.1 Service unavailable; Client host blocked using zen.spamhaus.org"),
        ("MAIL", "554 5.7.1 Sending suspended for this account"),
    ],
)
@virtually
async def test_what_a_server_has_against_the_client_ends_nothing(tmp_path: Path, stage: str, reply: str) -> None:
    """The queue waits until it is mended, and what is over by then is told, as ever."""
    async with ScriptedServer() as server, SQLiteEngine(tmp_path / "mail.db") as engine:
        server.on(stage, reply)
        async with RetryingSMTP(server.client(), for_a_queue(), defer=engine) as smtp:
            await smtp.enqueue(letter(ANN))
            ended = list["Delivery"]()

            async def on_end(delivery: Delivery) -> None:
                ended.append(delivery)

            async with working(engine, smtp, on_end=on_end):
                await asyncio.sleep(4 * 86400)
                assert not ended
                server.clear()
                await asyncio.sleep(1800)
                assert len(server.messages) == 1
                server.on(stage, reply)
                await smtp.enqueue(letter(BOB))
                await asyncio.sleep(6 * 86400)
            server.clear()
    assert [list(delivery.refused) for delivery in ended] == [[BOB]]


@virtually
async def test_a_certificate_that_does_not_verify_ends_nothing(tmp_path: Path) -> None:
    """It is renewed, and the mail goes."""
    async with ScriptedServer(tls=True) as server, SQLiteEngine(tmp_path / "mail.db") as engine:
        wrong = server.client(tls_context=ssl.create_default_context())
        async with RetryingSMTP(wrong, for_a_queue(), defer=engine) as smtp:
            await smtp.enqueue(letter(ANN))
            async with working(engine, smtp, on_end=never):
                await asyncio.sleep(86400)
        async with RetryingSMTP(server.client(), for_a_queue()) as smtp, working(engine, smtp, on_end=never):
            await asyncio.sleep(1800)
        assert len(server.messages) == 1


@virtually
async def test_with_two_servers_a_wrong_password_for_both_ends_nothing(tmp_path: Path) -> None:
    """The mail goes by the first that takes it."""
    async with (
        ScriptedServer(auth=("app", "secret")) as first,
        ScriptedServer(auth=("app", "secret")) as second,
        SQLiteEngine(tmp_path / "mail.db") as engine,
    ):
        wrong = {"username": "app", "password": "of last year"}
        clients = [RetryingSMTP(one.client(), for_a_queue(), **wrong) for one in (first, second)]
        async with Failover(*clients, defer=engine) as smtp:
            await smtp.enqueue(letter(ANN))
            async with working(engine, smtp, on_end=never):
                await asyncio.sleep(8 * 3600)
        clients = [
            RetryingSMTP(first.client(), for_a_queue(), **RIGHT),
            RetryingSMTP(second.client(), for_a_queue(), **wrong),
        ]
        async with Failover(*clients) as smtp, working(engine, smtp, on_end=never):
            await asyncio.sleep(3.5 * 3600)
        assert len(first.messages) == 1
