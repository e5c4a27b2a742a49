"""PostgreSQL as the queue, one of the tests' own."""

from __future__ import annotations

import asyncio
import functools
import itertools
import json
import logging
import os
import signal
import time
import uuid
import zlib
from base64 import b64encode
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import mta
import postgres
import procrastinate
import programs
import psycopg
import psycopg_pool
import pytest
import tenacity
from postgres import Postgres, engine_in
from programs import working
from psycopg.rows import dict_row
from psycopg.types.json import Jsonb
from support import ANN, APP, BOB, EVE, PASSWORD, USER, letter

import smtpretry
from smtpretry import Delivery, Failover, RetryingSMTP, RetryPolicy, Step
from smtpretry.queues.engine import Progress, QueueError
from smtpretry.queues.postgres import TAKE, Store
from smtpretry.queues.procrastinate import ProcrastinateEngine
from smtpretry.queues.tables import opened_tables
from smtpretry.testing import ScriptedServer, check_engine

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

POLICY = RetryPolicy(wait=tenacity.wait_fixed(1))
NUMBERS = itertools.count()
VERSION = "UPDATE smtpretry_deliveries SET state = replace(state::text, %s, %s)::json"


@pytest.fixture(scope="module")
def server() -> Iterator[Postgres]:
    """Run one PostgreSQL."""
    mta.require(Postgres)
    with postgres.running() as running:
        yield running


@pytest.fixture
def database(server: Postgres) -> str:
    """Make an empty database; return how to connect to it."""
    return server.create(f"test{next(NUMBERS)}")


def at_once(test: Callable[..., Awaitable[None]]) -> Callable[[str], None]:
    """Run a test in an event loop, within a minute."""

    @functools.wraps(test)
    def run(**fixtures: Any) -> None:
        asyncio.run(asyncio.wait_for(test(**fixtures), 60))

    return run


def rows(
    database: str, what: str = "id, ended IS NOT NULL", table: str = "smtpretry_deliveries"
) -> list[tuple[Any, ...]]:
    with psycopg.connect(database) as connection:
        return connection.execute(f"SELECT {what} FROM {table} ORDER BY id").fetchall()  # type: ignore[call-overload,no-any-return,unused-ignore] # noqa: S608


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
            await programs.until(lambda: rows(database, "ended IS NOT NULL") == [(True,)])
        [(stored,)] = rows(database, "smtpretry_deliveries::text")
        await smtp.aclose()
    assert [len(server.received(who)) for who in (ANN, BOB, EVE)] == [1, 1, 0]
    assert (sorted(ended[0].accepted), list(ended[0].refused)) == ([ANN, BOB], [EVE])
    assert ["Greylisted" in str(attempt.steps) for attempt in ended[0].attempts] == [True, True, False]
    assert PASSWORD not in stored
    assert rows(database, "message IS NULL") == [(True,)]


@at_once
async def test_the_same_id_is_queued_once(database: str) -> None:
    """However often a delivery is submitted, at once or after its end, there is one row, and one mail."""
    delivery = smtpretry.prepare(letter(ANN))
    async with ScriptedServer() as server, engine_in(database) as engine, RetryingSMTP(server.client()) as smtp:
        await asyncio.gather(*[engine.submit(delivery) for _ in range(4)])
        assert len(rows(database)) == 1
        async with working(engine, smtp):
            await programs.until(lambda: rows(database, "ended IS NOT NULL") == [(True,)])
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
        assert rows(database) == [(delivery.id, False)]
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
            change(database, VERSION, '"version": 2', '"version": 99')
            async with working(engine, smtp):
                await programs.until(lambda: rows(database, "taken") == [(1,)])
                change(database, VERSION, '"version": 99', '"version": 2')
                await programs.until(lambda: server.messages)
            await smtp.aclose()
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
        change(database, VERSION, '"version": 2', '"version": 99')
        async with working(engine, smtp):
            await programs.until(lambda: rows(database, "taken") == [(2,)])
            assert not server.messages
            change(database, VERSION, '"version": 99', '"version": 2')
            await programs.until(lambda: server.messages)
    assert "version 1 and 2, not 99: run the one that wrote it; comes again in 1 s" in caplog.text


@pytest.mark.parametrize(
    "theft",
    [
        "taken = taken + 1, lease = now() + interval '1 day'",
        "holder = gen_random_uuid(), lease = now() + interval '1 day'",
        "holder = NULL, due = now() + interval '1 day'",
        "holder = NULL, due = NULL, ended = now()",
    ],
)
@at_once
async def test_a_worker_that_lost_its_delivery_changes_nothing(database: str, theft: str) -> None:
    """A worker whose delivery was given away in mid-pass sends nothing more, and leaves it as the other has it."""
    async with ScriptedServer() as server, engine_in(database, stalled_after=30.0) as engine:
        smtp = RetryingSMTP(server.client(), POLICY)
        held = server.fail_at("RCPT", "late", delay=1.2, times=1)
        await engine.submit(smtpretry.prepare(letter(ANN)))
        async with working(engine, smtp):
            await programs.until(lambda: held.used)
            change(database, f"UPDATE smtpretry_deliveries SET {theft}")  # noqa: S608
            taken = rows(database, "smtpretry_deliveries::text")
            await programs.until(lambda: not server.open_connections)
            await asyncio.sleep(0.2)
            assert rows(database, "smtpretry_deliveries::text") == taken
        assert not server.messages


@at_once
async def test_a_database_that_was_away_for_long_kills_no_worker(database: str) -> None:
    """The first worker that finds it again takes nothing from another, which could not say that it lives."""
    is_away, over = False, "UPDATE smtpretry_deliveries SET lease = now() - interval '1 hour'"
    async with engine_in(database) as engine:
        await engine.submit(smtpretry.prepare(letter(ANN)))

        @asynccontextmanager
        async def connect() -> AsyncIterator[psycopg.AsyncConnection[Any]]:
            if is_away:
                raise psycopg.OperationalError
            async with engine._connect() as own:
                yield own

        options: dict[str, Any] = {"queue": "smtpretry", "lease": 30.0, "grace": 30.0, "concurrency": 1, "poll": 5.0}
        options |= {"keep": timedelta(days=1), "clock": time.time}
        first, second = (Store(connect, lambda _: asyncio.sleep(0), **options) for _ in range(2))
        assert len((await first.take(1, {}, [])).taken) == 1
        is_away = True
        with pytest.raises(QueueError):
            await second.take(1, {}, [])
        change(database, over)
        is_away = False
        assert not (await second.take(1, {}, [])).taken
        change(database, over)
        assert len((await second.take(1, {}, [])).taken) == 1  # that one is dead


@at_once
async def test_a_worker_never_takes_its_own_again(database: str) -> None:
    """Where the lease of what it sends is over, as after a sleep, nobody gets it twice."""
    async with ScriptedServer() as server, engine_in(database, stalled_after=30.0) as engine:
        held = server.fail_at("END_OF_DATA", "late", delay=1.0, times=1)
        await engine.submit(smtpretry.prepare(letter(ANN)))
        async with RetryingSMTP(server.client, POLICY, max_connections=2) as smtp, working(engine, smtp):
            await programs.until(lambda: held.used)
            change(database, "UPDATE smtpretry_deliveries SET lease = now() - interval '1 hour'")
            await engine.submit(smtpretry.prepare(letter(BOB)))
            await programs.until(lambda: rows(database, "ended IS NOT NULL") == [(True,), (True,)])
        assert sorted(message.recipients for message in server.messages) == [[ANN], [BOB]]


@at_once
async def test_a_worker_that_stops_gives_back_what_it_has(database: str) -> None:
    """A pass that a worker's end cuts short is run again at once, by another."""
    async with ScriptedServer() as server, engine_in(database, shutdown_graceful_timeout=0.1) as engine:
        smtp = RetryingSMTP(server.client(), POLICY)
        held = server.fail_at("RCPT", "stall", times=1)
        await engine.submit(smtpretry.prepare(letter(ANN)))
        async with working(engine, smtp):
            await programs.until(lambda: held.used)
        assert rows(database, "holder, due <= now() + interval '1 second'") == [(None, True)]
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
            await programs.until(lambda: rows(database, "ended IS NOT NULL") == [(True,)])
        assert [list(delivery.refused) for delivery in told] == [[EVE], [EVE]]
        assert told[1].dsn()["To"] == APP
        assert len(server.messages) == 1


async def sent_once_in_spite_of(outage: Callable[[ScriptedServer], Awaitable[None]], database: str) -> None:
    """Let the database be away from before the server takes a message on; it is saved, and the next one is sent."""
    async with ScriptedServer() as server, engine_in(database, timeout=0.5, stalled_after=10.0) as engine:
        smtp = RetryingSMTP(server.client(), POLICY)
        held = server.fail_at("END_OF_DATA", "late", delay=1, times=1)
        await engine.submit(smtpretry.prepare(letter(ANN)))
        async with working(engine, smtp):
            await programs.until(lambda: held.used)
            await outage(server)
            await programs.until(lambda: rows(database, "ended IS NOT NULL") == [(True,)])
            await engine.submit(smtpretry.prepare(letter(BOB)))
            await programs.until(lambda: server.received(BOB))  # LISTEN, or a look, after the outage
        assert len(server.received(ANN)) == 1
        await smtp.aclose()


@at_once
async def test_a_database_that_restarts_between_acceptance_and_save(database: str, server: Postgres) -> None:
    """Where the database is away just when the server has taken the message, it is saved when it is back, and not sent again."""

    async def restart(_: ScriptedServer) -> None:
        await asyncio.to_thread(server.stop)
        await asyncio.sleep(1.2)
        await asyncio.to_thread(server.start)

    await sent_once_in_spite_of(restart, database)


@at_once
async def test_a_failover_between_acceptance_and_save(database: str, caplog: pytest.LogCaptureFixture) -> None:
    """Where the database takes no writes for a while, as a standby, what was sent is saved later, and not sent again."""
    read_only = f"ALTER DATABASE {database.rpartition('=')[2]} SET default_transaction_read_only = "
    kick = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND pid <> %s"

    def switch(to: str) -> None:
        with psycopg.connect(database, autocommit=True, options="-c default_transaction_read_only=off") as connection:
            connection.execute((read_only + to).encode())
            connection.execute(kick, [connection.info.backend_pid])

    async def fail_over(server: ScriptedServer) -> None:
        await asyncio.to_thread(switch, "on")
        await programs.until(lambda: server.messages and "ReadOnlySqlTransaction" in caplog.text)
        await asyncio.to_thread(switch, "off")

    await sent_once_in_spite_of(fail_over, database)


@at_once
async def test_a_save_that_is_refused(database: str, caplog: pytest.LogCaptureFixture) -> None:
    """Whatever the database says to it, what was sent is saved later, and not sent again."""

    async def refuse(_: ScriptedServer) -> None:
        change(
            database,
            """CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'not now'; END $$;
            CREATE TRIGGER refusing BEFORE UPDATE ON smtpretry_deliveries FOR EACH ROW
            WHEN (NEW.ended IS NOT NULL) EXECUTE FUNCTION refuse()""",
        )
        await programs.until(lambda: "the database cannot be used: RaiseException: not now" in caplog.text)
        change(database, "DROP TRIGGER refusing ON smtpretry_deliveries")

    await sent_once_in_spite_of(refuse, database)


@at_once
async def test_signals_while_the_database_is_away(database: str, server: Postgres) -> None:
    """They end a worker that cannot look into the queue, nor save what it has sent; the second one does not wait."""
    async with (
        ScriptedServer() as to,
        engine_in(database, timeout=0.5, stalled_after=60.0) as engine,
        RetryingSMTP(to.client(), POLICY) as smtp,
    ):
        held = to.fail_at("END_OF_DATA", "late", delay=0.5, times=1)
        await engine.submit(smtpretry.prepare(letter(ANN)))
        worker = asyncio.create_task(engine.work(smtp))
        await programs.until(lambda: held.used)
        await asyncio.to_thread(server.stop)
        try:
            await programs.until(lambda: to.messages)
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGTERM)
                await asyncio.sleep(0.6)
            await asyncio.wait([worker], timeout=15)
            assert worker.done()
        finally:
            worker.cancel()
            await asyncio.to_thread(server.start)


@at_once
async def test_a_role_without_rights(database: str) -> None:
    """Where it may not make the tables, or not use them, the error says what to do."""
    change(database, "CREATE ROLE poor LOGIN")
    try:
        address = database.replace("user=postgres", "user=poor")
        async with engine_in(address) as engine:
            with pytest.raises(QueueError, match="start one worker alone, with a role that may make tables here"):
                await engine.submit(smtpretry.prepare(letter(ANN)))
            async with engine_in(database) as owner:
                await owner.submit(smtpretry.prepare(letter(ANN)))
            with pytest.raises(QueueError, match="GRANT SELECT, INSERT, UPDATE, DELETE ON smtpretry_deliveries"):
                await engine.submit(smtpretry.prepare(letter(BOB)))
            tables = "smtpretry_deliveries, smtpretry_servers, smtpretry_schema"
            change(database, f"GRANT SELECT, INSERT, UPDATE, DELETE ON {tables} TO poor")
            async with (
                ScriptedServer() as server,
                RetryingSMTP(server.client(), POLICY) as smtp,
                working(engine, smtp),
            ):
                await engine.submit(smtpretry.prepare(letter(BOB)))
                await programs.until(lambda: len(server.messages) == 2)
    finally:
        change(database, "DROP OWNED BY poor; DROP ROLE poor")


@at_once
async def test_connections_that_all_died_while_idle(database: str) -> None:
    """After a restart, or by a time-out of the database or of a firewall: the next submission does not wait for each."""
    kill = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND pid <> %s"
    async with engine_in(database, timeout=5.0) as engine:
        await engine.submit(smtpretry.prepare(letter(ANN)))
        await engine.app.connector.pool.wait()  # type: ignore[attr-defined]
        with psycopg.connect(database, autocommit=True) as connection:
            connection.execute(kill, [connection.info.backend_pid])
        began = time.monotonic()
        await engine.submit(smtpretry.prepare(letter(BOB)))
        assert time.monotonic() - began < 3
        assert (await engine.progress()).due == 2


@at_once
async def test_a_database_without_an_encoding(server: Postgres) -> None:
    """In SQL_ASCII, where psycopg gives bytes for texts, a mail is sent once, too."""
    database = server.create("ascii", "ENCODING 'SQL_ASCII' LOCALE 'C' TEMPLATE template0")
    async with ScriptedServer() as to, engine_in(database) as engine, RetryingSMTP(to.client(), POLICY) as smtp:
        delivery = smtpretry.prepare(letter(ANN), id="für Ann")
        async with await psycopg.AsyncConnection.connect(database) as connection:
            for _ in range(2):
                await engine.submit(delivery, connection=connection)
        async with working(engine, smtp):
            await programs.until(lambda: rows(database, "ended IS NOT NULL") == [(True,)])
        async with opened_tables(database) as shelf:
            assert [(one.delivery.id, one.state) for one in await shelf.find(state=None, limit=9)] == [
                ("für Ann", "ended")
            ]
        assert len(to.messages) == 1


@at_once
async def test_statements_that_another_session_has_prepared(database: str) -> None:
    """Behind a PgBouncer that lends its connections for a transaction, a name of psycopg's may be another client's."""
    change(
        database,
        "CREATE SCHEMA pooled; CREATE FUNCTION pooled.pg_backend_pid() RETURNS integer LANGUAGE sql RETURN 1",
    )
    change(database, f"ALTER DATABASE {database.rpartition('=')[2]} SET search_path = pooled, pg_catalog")

    async def configure(connection: psycopg.AsyncConnection[Any]) -> None:
        for number in range(9):
            await connection.execute(f"PREPARE _pg3_{number} AS SELECT 1".encode(), prepare=False)
        await connection.commit()

    options = {"configure": configure, "kwargs": {"prepare_threshold": 0}, "check": None}
    async with (
        psycopg_pool.AsyncConnectionPool(database, **options, open=False) as pool,
        procrastinate.App(connector=procrastinate.PsycopgConnector()).open_async(pool) as app,
        ScriptedServer() as to,
        RetryingSMTP(to.client(), POLICY) as smtp,
    ):
        engine = ProcrastinateEngine(app)
        await engine.submit(smtpretry.prepare(letter(ANN)))
        async with working(engine, smtp):
            await programs.until(lambda: rows(database, "ended IS NOT NULL") == [(True,)])


@at_once
async def test_a_database_whose_clock_is_behind(database: str) -> None:
    """What waits is due after as many seconds as it would be by the clock of the application."""
    change(
        database,
        """CREATE SCHEMA behind; CREATE FUNCTION behind.now() RETURNS timestamptz LANGUAGE sql
        RETURN pg_catalog.now() - interval '1 hour'""",
    )
    change(database, f"ALTER DATABASE {database.rpartition('=')[2]} SET search_path = behind, pg_catalog")
    async with ScriptedServer() as to, engine_in(database) as engine, RetryingSMTP(to.client(), POLICY) as smtp:
        delivery = smtpretry.prepare(letter(ANN))
        delivery.outcomes[ANN].next_at = time.time() + 1
        await engine.submit(delivery)
        async with working(engine, smtp):
            await programs.until(lambda: to.messages)


@pytest.mark.parametrize("isolation", ["read committed", "repeatable read"])
@at_once
async def test_one_id_at_the_same_time(database: str, isolation: str) -> None:
    """An id that a transaction stores meanwhile is stored once, or refused, whatever the isolation of the role."""
    async with engine_in(database) as engine:
        await engine.progress()
    change(database, f"ALTER DATABASE {database.rpartition('=')[2]} SET default_transaction_isolation = '{isolation}'")
    waits = "(SELECT pid AS id FROM pg_locks WHERE NOT granted) AS waits"
    async with (
        engine_in(database) as engine,
        engine_in(database, queue="other") as other,
        await psycopg.AsyncConnection.connect(database) as connection,
    ):
        delivery = smtpretry.prepare(letter(ANN))
        await engine.submit(delivery, connection=connection)
        same, another = (asyncio.create_task(one.submit(delivery)) for one in (engine, other))
        await programs.until(lambda: len(rows(database, "id", waits)) == 2)
        await connection.commit()
        await same
        with pytest.raises(ValueError, match="is taken by the queue 'smtpretry'"):
            await another


@at_once
async def test_one_id_in_two_queues(database: str) -> None:
    """An id that another queue of the database has is refused: its workers would never know of this delivery."""
    async with (
        engine_in(database) as engine,
        engine_in(database, queue="other") as other,
        RetryingSMTP(ScriptedServer().client(), defer=other) as smtp,
    ):
        await engine.submit(smtpretry.prepare(letter(ANN), id="order-17"))
        with pytest.raises(ValueError, match="'order-17' is taken by the queue 'smtpretry' of the same database"):
            await smtp.enqueue(letter(BOB), id="order-17")
        assert (await engine.has("order-17"), await other.has("order-17")) == (True, False)


@at_once
async def test_an_id_that_another_message_has(database: str) -> None:
    """A message to others is refused: it would never be sent. The same one again is no error."""
    async with engine_in(database) as engine, RetryingSMTP(ScriptedServer().client(), defer=engine) as smtp:
        for _ in range(2):
            await smtp.enqueue(letter(ANN), id="order-17")
        with pytest.raises(ValueError, match=rf"'order-17' is taken by a message from {APP} to {ANN}: name the one"):
            await smtp.enqueue(letter(BOB), id="order-17")
        assert rows(database, "id") == [("order-17",)]


@at_once
async def test_an_application_that_likes_other_rows(database: str) -> None:
    """A row factory of the application's, on its connection or on those of the app, changes nothing."""
    connector = procrastinate.PsycopgConnector(conninfo=database, kwargs={"row_factory": dict_row})
    app = procrastinate.App(connector=connector)
    async with ScriptedServer() as server, app.open_async():
        engine = ProcrastinateEngine(app)
        async with await psycopg.AsyncConnection.connect(database, row_factory=dict_row) as connection:
            await engine.submit(smtpretry.prepare(letter(ANN)), connection=connection)
        await engine.submit(smtpretry.prepare(letter(BOB)))
        async with RetryingSMTP(server.client(), POLICY) as smtp, working(engine, smtp):
            await programs.until(lambda: len(server.messages) == 2)
        async with connector.pool.connection() as own:
            assert own.row_factory is dict_row


@at_once
async def test_an_app_that_is_not_open(database: str) -> None:
    """Where the application has not opened the app, an error says so, and a send goes on in process."""
    engine = ProcrastinateEngine(procrastinate.App(connector=procrastinate.PsycopgConnector(conninfo=database)))
    with pytest.raises(QueueError, match="AppNotOpen: App was not open"):
        await engine.submit(smtpretry.prepare(letter(ANN)))
    async with ScriptedServer() as server, RetryingSMTP(server.client(), POLICY, defer=engine, max_wait=0.1) as smtp:
        server.on("RCPT", "*", "450 4.2.0 Greylisted for 1 second", times=1)
        await smtp.send_message(letter(ANN))
        assert len(server.messages) == 1


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
async def test_a_submission_wakes_the_worker(database: str) -> None:
    """A worker begins at once, whoever has submitted: no polling is waited for."""
    async with (
        ScriptedServer() as server,
        engine_in(database, fetch_job_polling_interval=30.0, stalled_after=90.0) as engine,
        engine_in(database) as other,
        RetryingSMTP(server.client()) as smtp,
        working(engine, smtp),
    ):
        await asyncio.sleep(1)
        began = asyncio.get_running_loop().time()
        for number in range(5):
            await other.submit(smtpretry.prepare(letter(ANN)))
            await programs.until(lambda number=number: len(server.messages) > number)  # type: ignore[misc]
        assert asyncio.get_running_loop().time() - began < 5


@at_once
async def test_what_is_due_later_is_told_as_well(database: str) -> None:
    """However seldom a worker looks by itself, it knows what will be due next: each submission is told."""
    delivery = smtpretry.prepare(letter(ANN))
    delivery.outcomes[ANN].next_at = POLICY.clock() + 3600
    async with (
        engine_in(database) as engine,
        await psycopg.AsyncConnection.connect(database, autocommit=True) as other,
    ):
        await other.execute("LISTEN smtpretry")
        await engine.submit(delivery)
        assert [told.payload async for told in other.notifies(timeout=10, stop_after=1)] == ["smtpretry"]


@at_once
async def test_a_later_version(database: str) -> None:
    """Tables of a later version are left alone, and the error names the cure."""
    async with engine_in(database) as engine:
        await engine.submit(smtpretry.prepare(letter(ANN)))
    change(database, "INSERT INTO smtpretry_schema VALUES (99)")
    async with engine_in(database) as engine:
        with pytest.raises(ValueError, match="the queue is of version 99, this smtpretry knows 1: upgrade smtpretry"):
            await engine.submit(smtpretry.prepare(letter(ANN)))


# What workers tell each other of a server


@pytest.mark.parametrize(
    ("script", "most"),
    [({}, 8 + 15), ({"max_rate": (20, 1)}, 10 + 15)],  # as one, and three each before anybody knows
    ids=["pause", "pace"],
)
@at_once
async def test_five_workers_cost_a_server_what_one_does(database: str, script: dict[str, Any], most: int) -> None:
    """Where a server says 421 to everybody, or takes so many a second, what one worker learns holds for all."""
    refused = list[int]()

    def hook(_: Delivery | None, event: object) -> None:
        if isinstance(event, Step) and event.reply.code == 454:
            refused.append(event.reply.code)

    async with ScriptedServer(**script) as server, AsyncExitStack() as stack:
        storm = None if script else server.on("CONNECT", "421 4.3.2 Try again later", close=True)
        for _ in range(5):
            engine = await stack.enter_async_context(engine_in(database, fetch_job_polling_interval=0.5))
            smtp = await stack.enter_async_context(RetryingSMTP(server.client, POLICY, max_connections=2, on_step=hook))
            await stack.enter_async_context(working(engine, smtp))
        for number in range(100):
            await engine.submit(smtpretry.prepare(letter(ANN), id=str(number)))
        if storm is not None:
            await asyncio.sleep(5)
            server.scripts.remove(storm)
            assert server.connections <= most
        await programs.until(lambda: len(server.messages) == 100)
        assert len(refused) <= most


@at_once
async def test_five_workers_with_a_second_server(database: str) -> None:
    """Workers who send through a Failover share the pause of its first server, and send through the second meanwhile."""
    async with ScriptedServer() as first, ScriptedServer() as second, AsyncExitStack() as stack:
        first.on("CONNECT", "421 4.3.2 Try again later", close=True)
        for _ in range(5):
            engine = await stack.enter_async_context(engine_in(database, fetch_job_polling_interval=0.5))
            clients = [RetryingSMTP(server.client, POLICY, max_connections=2) for server in (first, second)]
            await stack.enter_async_context(working(engine, await stack.enter_async_context(Failover(*clients))))
        for number in range(100):
            await engine.submit(smtpretry.prepare(letter(ANN), id=str(number)))
        await programs.until(lambda: len(second.messages) == 100)
        assert first.connections <= 8 + 15  # as one, and three each before anybody knows


@at_once
async def test_one_that_is_tried_now_holds_up_no_look_at_two_servers(database: str) -> None:
    """`queue retry` locks the servers in the order in which a worker does, so neither is refused for a deadlock."""
    async with engine_in(database) as engine:
        await engine.submit(smtpretry.prepare(letter(ANN), id="one"))
    async with opened_tables(database) as shelf, await psycopg.AsyncConnection.connect(database) as look:
        for name in ("b", "a"):
            change(database, "INSERT INTO smtpretry_servers (name, until, failures) VALUES (%s, 9e9, 1)", name)
        await look.execute("SELECT 1 FROM smtpretry_servers WHERE name = 'a' FOR UPDATE")
        retrying = asyncio.create_task(shelf.retry("one"))
        waits = "SELECT 1 FROM pg_locks WHERE NOT granted"
        with psycopg.connect(database, autocommit=True) as other:
            await programs.until(lambda: other.execute(waits).fetchone() is not None)
        await look.execute("SELECT 1 FROM smtpretry_servers WHERE name = 'b' FOR UPDATE")
        await look.commit()
        assert await retrying
        assert rows(database, "until, name AS id", "smtpretry_servers") == [(0, "a"), (0, "b")]


# What smtpretry 0.1 has queued

BODY = b"Subject: hello\r\n\r\nHow are you?\r\n"


def of_the_first_version(name: str, status: str = "PENDING") -> dict[str, Any]:
    outcome = {"status": status, "stage": None, "reply": None, "attempts": 0, "next_at": 0.0, "uncertain": False}
    return {
        "id": name,
        "sender": APP,
        "message": b64encode(BODY).decode(),
        "mail_options": [],
        "rcpt_options": [],
        "version": 1,
        "began_at": None,
        "response": "",
        "cure": None,
        "outcomes": {ANN: outcome | {"alone": False}},
        "attempts": [],
    }


def job(database: str, args: dict[str, Any], status: str = "todo") -> None:
    change(
        database,
        "INSERT INTO procrastinate_jobs (queue_name, task_name, lock, args, status) "
        "VALUES ('smtpretry', 'smtpretry:attempt', %s, %s, %s::procrastinate_job_status)",
        f"smtpretry:{args['id']}",
        Jsonb(args),
        status,
    )


@at_once
async def test_deliveries_of_the_first_version(database: str) -> None:
    """What 0.1 has queued moves into the table, and is sent once; an id that has ended is not taken again."""
    await postgres.make_tables(database)
    job(database, of_the_first_version("waits"))
    job(database, of_the_first_version("died"), "doing")
    job(database, of_the_first_version("ended", "ACCEPTED"), "succeeded")
    job(database, of_the_first_version("unreadable") | {"version": 99})
    async with ScriptedServer() as server, engine_in(database) as engine, RetryingSMTP(server.client(), POLICY) as smtp:
        async with working(engine, smtp):
            await programs.until(lambda: len(server.messages) == 2)
            await programs.until(lambda: rows(database) == [("died", True), ("ended", True), ("waits", True)])
        for name in ("waits", "ended"):
            await engine.submit(smtpretry.prepare(letter(ANN), id=name))
        assert await engine.has("ended")
        assert not await engine.has("new")
        assert await engine.progress() == Progress(0, 0, 0, 3)
        assert [message.content for message in server.messages] == [BODY, BODY]
    assert rows(database, "args->>'id'", "procrastinate_jobs") == [("unreadable",)]


@at_once
async def test_messages_apart_from_their_jobs(database: str) -> None:
    """So does what a version between 0.1 and this one has queued."""
    await postgres.make_tables(database)
    change(database, "CREATE TABLE smtpretry_messages (job_id bigint PRIMARY KEY, message bytea NOT NULL)")
    args = of_the_first_version("apart")
    del args["message"]
    job(database, args)
    change(database, "INSERT INTO smtpretry_messages SELECT id, %s FROM procrastinate_jobs", zlib.compress(BODY))
    async with ScriptedServer() as server, engine_in(database) as engine, RetryingSMTP(server.client(), POLICY) as smtp:
        async with working(engine, smtp):
            await programs.until(lambda: server.messages)
        assert server.messages[0].content == BODY


# Many


@at_once
async def test_what_waits_does_not_slow_what_is_due(database: str) -> None:
    """The next delivery is found by an index, without a look at the 100,000 that wait; before and after ANALYZE."""
    async with engine_in(database) as engine:
        await engine.submit(smtpretry.prepare(letter(ANN)))
    change(
        database,
        "INSERT INTO smtpretry_deliveries (id, queue, envelope, due, state) SELECT 'x' || n, 'smtpretry', '{}', "
        "now() + interval '1 hour' + n * interval '1 second', '{}' FROM generate_series(1, 100000) n",
    )
    values = {"holder": uuid.uuid4(), "lease": 30.0, "queue": "smtpretry", "room": 10, "those": ["y"]}
    for analyzed in (False, True):
        if analyzed:
            change(database, "ANALYZE smtpretry_deliveries")
        with psycopg.connect(database) as connection:
            plan = connection.execute(f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {TAKE}", values).fetchone()[0][0]  # type: ignore[index]
            connection.rollback()
        text = json.dumps(plan)
        assert "smtpretry_deliveries_due" in text
        assert "Seq Scan" not in text
        assert plan["Plan"]["Shared Hit Blocks"] + plan["Plan"]["Shared Read Blocks"] < 50
