"""procrastinate as the queue, in a PostgreSQL of the tests' own."""

from __future__ import annotations

import asyncio
import functools
import itertools
import logging
import socket
from base64 import b64encode
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any

import mta
import postgres
import procrastinate
import programs
import psycopg
import pytest
import tenacity
from postgres import Postgres, engine_in
from procrastinate.exceptions import ConnectorException
from psycopg.types.json import Jsonb
from support import ANN, APP, BOB, EVE, PASSWORD, USER, letter

import smtpretry
from smtpretry import Delivery, RetryingSMTP, RetryPolicy
from smtpretry.queues.procrastinate import _FETCH, ProcrastinateEngine
from smtpretry.testing import ScriptedServer, check_engine

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

POLICY = RetryPolicy(wait=tenacity.wait_fixed(1))
NUMBERS = itertools.count()


@pytest.fixture(scope="module")
def server() -> Iterator[Postgres]:
    """Run one PostgreSQL."""
    mta.require(Postgres)
    with postgres.running() as running:
        yield running


@pytest.fixture
def database(server: Postgres) -> str:
    """Make a database with procrastinate's tables in it; return how to connect to it."""
    conninfo = server.create(f"test{next(NUMBERS)}")
    asyncio.run(postgres.make_tables(conninfo))
    return conninfo


def at_once(test: Callable[..., Awaitable[None]]) -> Callable[[str], None]:
    """Run a test in an event loop, within a minute."""

    @functools.wraps(test)
    def run(**fixtures: Any) -> None:
        asyncio.run(asyncio.wait_for(test(**fixtures), 60))

    return run


@asynccontextmanager
async def working(engine: ProcrastinateEngine, smtp: RetryingSMTP, **options: Any) -> AsyncIterator[None]:
    """Have a worker, in this process; it ends where the database stays away."""
    worker = asyncio.create_task(engine.work(smtp, **options))
    try:
        yield
    finally:
        worker.cancel()
        with suppress(asyncio.CancelledError, ConnectorException):
            await worker


def rows(database: str, what: str = "status::text, attempts, args") -> list[tuple[Any, ...]]:
    with psycopg.connect(database) as connection:
        return connection.execute(f"SELECT {what} FROM procrastinate_jobs ORDER BY id").fetchall()  # noqa: S608


def change(database: str, query: str, *values: Any) -> None:
    with psycopg.connect(database) as connection:
        connection.execute(query, values)


def test_the_engine_loses_nothing(database: str) -> None:
    """Killed, stopped, torn down, submitted twice, large, raising: nothing is lost, and nobody gets it twice."""
    report = asyncio.run(check_engine(functools.partial(engine_in, database), deliveries=20, kills=1))
    assert (report.lost, report.twice, report.interrupted) == ([], [], 4)


def test_an_engine_that_loses_is_found(database: str) -> None:
    """Where nobody takes over from the dead, the check says what has not come, and does not pass."""
    never = functools.partial(engine_in, database, stalled_after=3600.0)
    with pytest.raises(TimeoutError, match="waited 5 s for killed0 to arrive after all"):
        asyncio.run(check_engine(never, deliveries=10, kills=1, patience=5))
    with pytest.raises(ValueError, match="workers is at least 2"):
        asyncio.run(check_engine(never, workers=1))


@at_once
async def test_from_the_application_to_the_worker(database: str) -> None:
    """A greylisted recipient is handed over, comes again in the worker, and nobody gets it twice; who was refused is told."""
    ended = list[Delivery]()

    async def on_end(delivery: Delivery) -> None:
        ended.append(delivery)

    async with ScriptedServer(auth=(USER, PASSWORD)) as server, engine_in(database) as engine:
        server.on("RCPT", BOB, "450 4.2.0 Greylisted for 2 seconds", times=2)
        server.on("RCPT", EVE, "550 5.1.1 User unknown", times=1)
        smtp = RetryingSMTP(server.client(), POLICY, username=USER, password=PASSWORD, defer=engine, max_wait=1)
        errors, text = await smtp.send_message(letter(ANN, BOB, EVE))
        assert list(errors) == [EVE]
        assert "1 of 3 recipients deferred until" in text
        async with working(engine, smtp, on_end=on_end):
            await programs.until(lambda: ended)
        [(status, _, stored)] = rows(database)
        await smtp.aclose()
    assert [len(server.received(who)) for who in (ANN, BOB, EVE)] == [1, 1, 0]
    assert (status, sorted(ended[0].accepted), list(ended[0].refused)) == ("succeeded", [ANN, BOB], [EVE])
    assert ["Greylisted" in str(attempt.steps) for attempt in ended[0].attempts] == [True, True, False]
    assert "message" not in stored
    assert PASSWORD not in str(stored)


@at_once
async def test_a_job_is_made_once(database: str) -> None:
    """However often a delivery is submitted, at once or after its end, there is one job, and one mail."""
    delivery = smtpretry.prepare(letter(ANN))
    async with ScriptedServer() as server, engine_in(database) as engine, RetryingSMTP(server.client()) as smtp:
        await asyncio.gather(*[engine.submit(delivery) for _ in range(4)])
        assert len(rows(database)) == 1
        async with working(engine, smtp):
            await programs.until(lambda: rows(database, "status::text") == [("succeeded",)])
            await engine.submit(delivery)
        assert len(rows(database)) == len(server.messages) == 1


@at_once
async def test_in_the_transaction_of_the_application(database: str) -> None:
    """What is enqueued in a transaction is there when it is committed, and never where it is rolled back."""
    async with (
        engine_in(database) as engine,
        RetryingSMTP(ScriptedServer().client(), defer=engine) as smtp,
        await psycopg.AsyncConnection.connect(database) as connection,
    ):
        delivery = await smtp.enqueue(letter(ANN), connection=connection)
        await connection.rollback()
        assert rows(database) == []
        assert await smtp.enqueue(delivery, connection=connection) is delivery
        assert delivery.deferred == [ANN]
        assert rows(database) == []
        await connection.commit()
        [(stored,)] = rows(database, "args")
        assert Delivery.from_dict(stored | {"message": ""}).pending == [ANN]
        with pytest.raises(TypeError, match=r"connection is a psycopg\.AsyncConnection"):
            await smtp.enqueue(letter(ANN), connection=database)


@at_once
async def test_no_message_in_any_log(database: str, caplog: pytest.LogCaptureFixture) -> None:
    """Neither the words nor the bytes of a message get into a log, procrastinate's neither, where a job fails neither."""
    body = b"Subject: private\r\n\r\nThe words are private, each of them.\r\n"
    with caplog.at_level(logging.DEBUG):
        async with ScriptedServer() as server, engine_in(database) as engine:
            smtp = RetryingSMTP(server.client(), POLICY, defer=engine)
            delivery = await smtp.enqueue(body, sender=APP, recipients=[ANN])
            change(database, "UPDATE procrastinate_jobs SET args = args || %s", Jsonb({"version": 99}))
            async with working(engine, smtp):
                await programs.until(lambda: rows(database, "attempts") == [(1,)])
                change(database, "UPDATE procrastinate_jobs SET args = args || %s", Jsonb({"version": 2}))
                await programs.until(lambda: server.messages)
            await smtp.aclose()
    assert "ended with status: Success" in caplog.text
    ours = (record for record in caplog.records if record.name != "mail.log")  # the mail server's
    logged = "\n".join(f"{record.getMessage()} {record.__dict__} {record.exc_text}" for record in ours)
    assert delivery.id in logged
    assert "private" not in logged
    assert b64encode(b"The words are private")[:16].decode() not in logged
    assert b64encode(delivery.message)[40:60].decode() not in logged


@at_once
async def test_a_job_that_fails_comes_again(database: str, caplog: pytest.LogCaptureFixture) -> None:
    """A delivery that this smtpretry cannot read is not lost: it stays in the queue, until one can."""
    async with ScriptedServer() as server, engine_in(database) as engine, RetryingSMTP(server.client(), POLICY) as smtp:
        await engine.submit(smtpretry.prepare(letter(ANN)))
        change(database, "UPDATE procrastinate_jobs SET args = args || %s", Jsonb({"version": 99}))
        async with working(engine, smtp):
            await programs.until(lambda: rows(database, "attempts") == [(2,)])
            assert not server.messages
            change(database, "UPDATE procrastinate_jobs SET args = args || %s", Jsonb({"version": 2}))
            await programs.until(lambda: server.messages)
    assert "ValueError; comes again in 1 s" in caplog.text


@pytest.mark.parametrize(
    "theft",
    [
        "status = 'todo', attempts = attempts + 1, scheduled_at = now() + interval '1 day'",
        "attempts = attempts + 1",
        "worker_id = NULL",
        "status = 'failed'",
    ],
)
@at_once
async def test_a_worker_that_lost_its_job_changes_nothing(database: str, theft: str) -> None:
    """A worker whose job was given away in mid-pass sends nothing more, and leaves the job as the other has it."""
    async with ScriptedServer() as server, engine_in(database, stalled_after=30.0) as engine:
        smtp = RetryingSMTP(server.client(), POLICY)
        held = server.fail_at("RCPT", "late", delay=1.2, times=1)
        await engine.submit(smtpretry.prepare(letter(ANN)))
        async with working(engine, smtp):
            await programs.until(lambda: held.used)
            change(database, f"UPDATE procrastinate_jobs SET {theft}")  # noqa: S608
            taken = rows(database, "status::text, attempts, worker_id, args")
            await programs.until(lambda: not server.open_connections)
            await asyncio.sleep(0.2)
            assert rows(database, "status::text, attempts, worker_id, args") == taken
        assert not server.messages


@at_once
async def test_a_worker_that_stops_gives_back_what_it_has(database: str) -> None:
    """A pass that a worker's end cuts short is run again at once, by another, and its end is no abort."""
    async with ScriptedServer() as server, engine_in(database, shutdown_graceful_timeout=0.1) as engine:
        smtp = RetryingSMTP(server.client(), POLICY)
        held = server.fail_at("RCPT", "stall", times=1)
        await engine.submit(smtpretry.prepare(letter(ANN)))
        async with working(engine, smtp):
            await programs.until(lambda: held.used)
        assert rows(database, "status::text, scheduled_at <= now() + interval '1 second'") == [("todo", True)]
        async with working(engine, smtp):
            await programs.until(lambda: server.messages)
        await smtp.aclose()


@at_once
async def test_the_application_is_told_until_it_has_heard(database: str) -> None:
    """Where on_end raises, the delivery is kept, nothing is sent again, and on_end is called again."""
    told = list[Delivery]()

    async def on_end(delivery: Delivery) -> None:
        told.append(delivery)
        if len(told) == 1:
            raise OSError

    async with ScriptedServer() as server, engine_in(database) as engine, RetryingSMTP(server.client(), POLICY) as smtp:
        server.on("RCPT", EVE, "550 5.1.1 User unknown", times=1)
        await engine.submit(smtpretry.prepare(letter(ANN, EVE)))
        async with working(engine, smtp, on_end=on_end):
            await programs.until(lambda: rows(database, "status::text") == [("succeeded",)])
        assert [list(delivery.refused) for delivery in told] == [[EVE], [EVE]]
        assert told[1].dsn()["To"] == APP
        assert len(server.messages) == 1


@at_once
async def test_an_abort_ends_a_delivery(database: str) -> None:
    """A job that somebody aborts in procrastinate is ended, and comes no more."""
    async with ScriptedServer() as server, engine_in(database, abort_job_polling_interval=0.1) as engine:
        smtp = RetryingSMTP(server.client(), POLICY)
        held = server.fail_at("RCPT", "stall", times=1)
        await engine.submit(smtpretry.prepare(letter(ANN)))
        async with working(engine, smtp):
            await programs.until(lambda: held.used)
            [(number,)] = rows(database, "id")
            await engine.app.job_manager.cancel_job_by_id_async(number, abort=True)
            await programs.until(lambda: rows(database, "status::text") == [("aborted",)])
        assert not server.messages


@at_once
async def test_a_database_that_restarts_between_acceptance_and_save(database: str, server: Postgres) -> None:
    """Where the database is away just when the server has taken the message, it is saved when it is back, and not sent again."""
    async with ScriptedServer() as smtp_server, engine_in(database, timeout=0.5, stalled_after=10.0) as engine:
        smtp = RetryingSMTP(smtp_server.client(), POLICY)
        held = smtp_server.fail_at("END_OF_DATA", "late", delay=1, times=1)
        await engine.submit(smtpretry.prepare(letter(ANN)))
        async with working(engine, smtp):
            await programs.until(lambda: held.used)
            await asyncio.to_thread(server.stop)
            await asyncio.sleep(1.2)
            await asyncio.to_thread(server.start)
            await programs.until(lambda: "ACCEPTED" in str(rows(database, "args->'outcomes'")))
        async with working(engine, smtp):
            await programs.until(lambda: rows(database, "status::text") == [("succeeded",)])
        assert len(smtp_server.messages) == 1
        await smtp.aclose()


@at_once
async def test_a_reply_that_no_database_takes(database: str) -> None:
    """A reply with NUL, with bytes that are no UTF-8 and with half a character is stored like any other."""
    async with ScriptedServer() as server, engine_in(database) as engine, RetryingSMTP(server.client(), POLICY) as smtp:
        server.on("RCPT", b"450 4.2.0 \x00 \xff \xed\xa0\x80 \\u0000 later\r\n", times=1)
        await engine.submit(smtpretry.prepare(letter(ANN)))
        async with working(engine, smtp):
            await programs.until(lambda: server.messages)


def test_another_connector_is_refused() -> None:
    """An app that cannot work with coroutines is refused at once."""
    app = procrastinate.App(connector=procrastinate.SyncPsycopgConnector())
    with pytest.raises(TypeError, match="needs a PsycopgConnector, it has SyncPsycopgConnector"):
        ProcrastinateEngine(app)


@at_once
async def test_the_example(server: Postgres) -> None:
    """The examples do what they say: from an empty database to a mail that a worker sends, which ends with SIGTERM."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    env = {"DATABASE_URL": server.create("example"), "SMTP_PORT": port, "PYTHONWARNINGS": "error"}
    async with programs.running(programs.command("queue_worker"), **env) as worker:
        await worker.says("The worker is ready")
        async with programs.running("python examples/queue_send.py", **env) as send:
            await send.says("1 of 2 recipients deferred until")
            await send.says("ann@example.com has it 1 time")
            await send.says("bob@example.com has it 1 time")
            assert await send.process.wait() == 0
        await worker.stop()
    assert worker.process.returncode == 0
    assert worker.log == "The worker is ready.\n"


@at_once
async def test_a_delivery_of_the_first_version(database: str) -> None:
    """A job that smtpretry 0.1 has made is sent, once, and its message is let go of; its id is not taken again."""
    body = b"Subject: hello\r\n\r\nHow are you?\r\n"
    outcome = {"status": "PENDING", "stage": None, "reply": None, "attempts": 0, "next_at": 0.0, "uncertain": False}
    first = {
        "id": "old",
        "sender": APP,
        "message": b64encode(body).decode(),
        "mail_options": [],
        "rcpt_options": [],
        "version": 1,
        "began_at": None,
        "response": "",
        "cure": None,
        "outcomes": {ANN: outcome | {"alone": False}},
        "attempts": [],
    }
    change(
        database,
        "INSERT INTO procrastinate_jobs (queue_name, task_name, lock, args) "
        "VALUES ('smtpretry', 'smtpretry:attempt', 'smtpretry:old', %s)",
        Jsonb(first),
    )
    async with ScriptedServer() as server, engine_in(database) as engine, RetryingSMTP(server.client(), POLICY) as smtp:
        async with working(engine, smtp):
            await programs.until(lambda: rows(database, "status::text") == [("succeeded",)])
        await engine.submit(smtpretry.prepare(letter(ANN), id="old"))
        assert await engine.has("old")
        assert not await engine.has("new")
        assert [message.content for message in server.messages] == [body]
    [(stored,)] = rows(database, "args")
    assert (stored["version"], "message" in stored) == (2, False)


@at_once
async def test_what_waits_does_not_slow_what_is_due(database: str) -> None:
    """The next delivery is found by an index, without a look at those that wait, however many they are."""
    async with engine_in(database) as engine:
        await engine.submit(smtpretry.prepare(letter(ANN)))
    change(
        database,
        "INSERT INTO procrastinate_jobs (queue_name, task_name, lock, scheduled_at) SELECT 'smtpretry', "
        "'smtpretry:attempt', 'x' || n, now() + interval '1 hour' + n * interval '1 second' FROM generate_series(1, 20000) n",
    )
    change(database, "ANALYZE procrastinate_jobs")
    with psycopg.connect(database) as connection:
        plan = connection.execute(f"EXPLAIN ANALYZE {_FETCH}", {"worker": None, "queue": "smtpretry"}).fetchall()
    text = "\n".join(line for (line,) in plan)
    assert "smtpretry_due" in text
    assert "Seq Scan on procrastinate_jobs" not in text
    assert "Rows Removed" not in text
