"""A queue as it lives in production: what operators meet at night."""

# ruff: noqa: SIM117 - an engine is open in a context of its own

from __future__ import annotations

import asyncio
import ssl
from typing import TYPE_CHECKING, Any

import pytest
import virtual
from programs import working
from support import ANN, BOB, EVE, letter, virtually

from smtpretry import Failover, RetryingSMTP, RetryPolicy
from smtpretry.queues.sqlite import SQLiteEngine
from smtpretry.testing import ScriptedServer

if TYPE_CHECKING:
    from pathlib import Path

    from smtpretry import Delivery

RIGHT: dict[str, Any] = {"username": "app", "password": "secret"}


def for_a_queue() -> RetryPolicy:
    return RetryPolicy(
        wait=RetryPolicy.queue().wait, give_up_after=RetryPolicy.queue().give_up_after, clock=virtual.clock
    )


def with_the_secret(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if b"secret of the house" in path.read_bytes()]


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
async def test_a_message_that_is_refused_as_if_it_were_the_client_stops_no_other(tmp_path: Path) -> None:
    """One after whose body the server speaks of the client waits alone; what is said to a recipient ends that one."""
    async with ScriptedServer() as server, SQLiteEngine(tmp_path / "mail.db") as engine:
        server.on("END_OF_DATA", ANN, "554 5.7.1 Sending suspended for this account")
        server.on("RCPT", EVE, "554 5.7.1 Service unavailable; Client host [192.0.2.1] blocked")
        async with RetryingSMTP(server.client(), for_a_queue(), defer=engine) as smtp:
            ended = list["Delivery"]()

            async def on_end(delivery: Delivery) -> None:
                ended.append(delivery)

            async with working(engine, smtp, on_end=on_end):
                await smtp.enqueue(letter(ANN))
                await asyncio.sleep(1)
                for hour in range(1, 25):
                    await smtp.enqueue(letter(EVE, BOB))
                    await asyncio.sleep(3600)
                    assert len(server.received(BOB)) == hour
                assert len(ended) == 24
                server.clear()
                await asyncio.sleep(2 * 3600)
                assert server.received(ANN)


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


@virtually
async def test_a_message_that_kills_its_worker(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """After the third worker it waits, longer and longer; the log names it. An attempt that is survived clears it."""
    tries, deadly = list[float](), True

    class Mortal(RetryingSMTP):
        async def attempt(self, delivery: Delivery, *args: Any, **options: Any) -> Delivery:
            if deadly:
                tries.append(virtual.clock())
                killed = "UPDATE smtpretry_deliveries SET taken = taken + 1, due = ?"  # as another worker sees it
                over = virtual.clock() + 30
                await engine.file.transact(lambda own: own.execute(killed, [over]))
                await asyncio.Event().wait()
            return await super().attempt(delivery, *args, **options)

    async with ScriptedServer() as server, SQLiteEngine(tmp_path / "mail.db", concurrency=100, lease=60) as engine:
        async with Mortal(server.client(), for_a_queue(), defer=engine) as smtp, working(engine, smtp):
            await smtp.enqueue(letter(ANN), id="deadly")
            await asyncio.sleep(86400)
            assert 8 < len(tries) < 20
            assert tries[2] - tries[0] < 200
            assert tries[3] - tries[2] > 900
            assert "smtp job deadly: 3 workers in a row died that had it; comes again in" in caplog.text
            deadly = False
            await asyncio.sleep(4 * 3600)
        assert len(server.messages) == 1
        [(state,)] = await engine.file.look(
            lambda own: own.execute("SELECT state FROM smtpretry_deliveries").fetchall()
        )
        assert "deaths" not in state


@virtually
async def test_no_body_is_left_in_the_files(tmp_path: Path) -> None:
    """A minute after a message has ended, neither the file nor its log has it."""
    async with ScriptedServer() as server, SQLiteEngine(tmp_path / "mail.db") as engine:
        async with RetryingSMTP(server.client(), for_a_queue(), defer=engine) as smtp, working(engine, smtp):
            for number in (1, 1000):
                message = letter(ANN)
                message.set_content("the secret of the house\n" * number)
                await smtp.enqueue(message)
            assert with_the_secret(tmp_path)
            await asyncio.sleep(130)
            assert (await engine.progress()).ended == 2
            assert with_the_secret(tmp_path) == []


@virtually
async def test_an_idle_worker_forgets_what_ended_long_ago(tmp_path: Path) -> None:
    """Whom a mail went to is kept for a week, also where no other mail comes."""
    async with ScriptedServer() as server, SQLiteEngine(tmp_path / "mail.db", lease=600) as engine:
        async with RetryingSMTP(server.client(), for_a_queue(), defer=engine) as smtp, working(engine, smtp):
            await smtp.enqueue(letter(ANN))
            await asyncio.sleep(6.9 * 86400)
            assert (await engine.progress()).ended == 1
            await asyncio.sleep(0.2 * 86400)
            assert (await engine.progress()).ended == 0
