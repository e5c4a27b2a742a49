"""SQLite as the queue: one file, any number of processes."""

# ruff: noqa: ASYNC110, ASYNC240, SIM117 - small files, looked at from beside the engine; an engine is open in a context of its own

from __future__ import annotations

import asyncio
import functools
import json
import logging
import os
import resource
import shutil
import signal
import sqlite3
import sys
import time
from contextlib import AsyncExitStack, asynccontextmanager, closing, contextmanager, nullcontext, suppress
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import programs
import pytest
import tenacity
import virtual
from programs import in_real_time, working
from support import ANN, APP, BOB, EVE, GREYLISTED, letter, patient, virtually

import smtpretry
from smtpretry import ClientClosed, Delivery, Failover, RetryingSMTP, RetryPolicy, clock
from smtpretry.queues.engine import Progress
from smtpretry.queues.file import network_file_system
from smtpretry.queues.schema import DUE
from smtpretry.queues.sqlite import QueueError, SQLiteEngine
from smtpretry.queues.worker import Worker
from smtpretry.testing import ScriptedServer, check_engine, no_wait

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Coroutine, Iterable, Iterator

    import aiosmtplib

POLICY = RetryPolicy(wait=tenacity.wait_fixed(1))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Name a file, with all that is unusual in a name."""
    folder = tmp_path / "a folder with spaces, 50 % ü?"
    folder.mkdir()
    return folder / "mail #1.db"


@asynccontextmanager
async def all_working(engine: SQLiteEngine, clients: Iterable[RetryingSMTP | Failover]) -> AsyncIterator[None]:
    """Have a worker for each of these clients, and close them at the end."""
    async with AsyncExitStack() as stack:
        for smtp in clients:
            await stack.enter_async_context(smtp)
            await stack.enter_async_context(working(engine, smtp))
        yield


def rows(path: Path, what: str = "id, due IS NULL", table: str = "smtpretry_deliveries") -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute(f"SELECT {what} FROM {table} ORDER BY 1").fetchall()  # noqa: S608


def change(path: Path, query: str, *values: Any) -> None:
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(query, values)


def test_the_engine_loses_nothing(path: Path) -> None:
    """Killed, stopped, torn down, submitted twice, large, raising: nothing is lost, and nobody gets it twice."""
    report = asyncio.run(check_engine(functools.partial(SQLiteEngine, path, lease=5.0), deliveries=20, kills=1))
    assert (report.lost, report.twice, report.interrupted) == ([], [], 4)


@in_real_time
async def test_from_the_application_to_the_worker(path: Path) -> None:
    """A greylisted recipient is handed over and comes again in the worker; who was refused is told; the message goes."""
    ended = list[Delivery]()

    async def on_end(delivery: Delivery) -> None:
        ended.append(delivery)

    async with ScriptedServer() as server, SQLiteEngine(path) as engine:
        server.on("RCPT", BOB, "450 4.2.0 Greylisted for 2 seconds", times=2)
        server.on("RCPT", EVE, "550 5.1.1 User unknown", times=1)
        async with RetryingSMTP(server.client(), POLICY, defer=engine, max_wait=1) as smtp:
            errors, text = await smtp.send_message(letter(ANN, BOB, EVE))
            assert list(errors) == [EVE]
            assert "1 of 3 recipients deferred until" in text
            async with working(engine, smtp, on_end=on_end):
                await programs.until(lambda: rows(path, "due") == [(None,)])
    assert [len(server.received(who)) for who in (ANN, BOB, EVE)] == [1, 1, 0]
    assert (sorted(ended[0].accepted), list(ended[0].refused)) == ([ANN, BOB], [EVE])
    assert rows(path, "*", "smtpretry_messages") == []


@virtually
async def test_five_days_of_refusals(tmp_path: Path) -> None:
    """A delivery that never gets through is refused after five days, and what is stored of it stays small."""
    policy = RetryPolicy(wait=RetryPolicy.queue().wait, give_up_after=timedelta(days=5), clock=virtual.clock)
    ended = list[Delivery]()

    async def on_end(delivery: Delivery) -> None:
        ended.append(delivery)

    async with ScriptedServer() as server, SQLiteEngine(tmp_path / "mail.db") as engine:
        server.on("RCPT", "451 4.3.0 Try again")
        async with RetryingSMTP(server.client(), policy, defer=engine) as smtp, working(engine, smtp, on_end=on_end):
            await smtp.enqueue(letter(ANN))
            while not ended:
                await asyncio.sleep(600)
    assert virtual.clock() - virtual.EPOCH == pytest.approx(5 * 86400, abs=1300)
    assert ended[0].outcomes[ANN].attempts > 40
    assert len(json.dumps(ended[0].state())) < 20_000


@virtually
async def test_two_servers(tmp_path: Path) -> None:
    """What both servers refuse for now goes to the queue; its worker sends it through the one that works."""
    down = "421 4.3.2 Service shutting down"
    async with (
        SQLiteEngine(tmp_path / "mail.db") as engine,
        ScriptedServer() as first,
        ScriptedServer() as second,
        Failover(*(RetryingSMTP(each.client(), patient()) for each in (first, second)), defer=engine) as smtp,
    ):
        first.on("CONNECT", down)
        second.on("CONNECT", down, times=1)
        assert (await smtp.deliver(letter(ANN))).deferred == [ANN]
        async with working(engine, smtp):
            while not second.messages:
                await asyncio.sleep(10)
        assert (len(second.received(ANN)), first.messages) == (1, [])
        assert virtual.clock() - virtual.EPOCH < 200
        first.clear()


@in_real_time
async def test_the_same_id_is_queued_once(path: Path) -> None:
    """However often a name is submitted, at once or after its end, there is one delivery, and one mail."""
    async with ScriptedServer() as server, SQLiteEngine(path) as engine:
        async with RetryingSMTP(server.client(), defer=engine) as smtp:
            await asyncio.gather(*[smtp.enqueue(letter(ANN), id="order-17") for _ in range(4)])
            assert rows(path, "id") == [("order-17",)]
            async with working(engine, smtp):
                await programs.until(lambda: rows(path, "due") == [(None,)])
                await smtp.enqueue(letter(ANN), id="order-17")
                await asyncio.sleep(0.1)
            assert await engine.has("order-17")
            assert not await engine.has("order-18")
        assert len(server.messages) == 1


@in_real_time
async def test_an_id_that_another_message_has(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A message to others is refused, before and after the end of the one that is there; a send goes on in process."""
    caplog.set_level(logging.INFO)
    async with ScriptedServer() as server, SQLiteEngine(path) as engine:
        async with RetryingSMTP(server.client(), no_wait(), defer=engine, max_wait=0.0) as smtp:
            await smtp.enqueue(letter(ANN), id="order-17")
            taken = rf"'order-17' is taken by a message from {APP} to {ANN}: name the one from {APP} to {BOB} otherwise"
            with pytest.raises(ValueError, match=taken):
                await smtp.enqueue(letter(BOB), id="order-17")
            with closing(sqlite3.connect(path)) as own, pytest.raises(ValueError, match=taken):
                await smtp.enqueue(letter(BOB), id="order-17", connection=own)
            assert "smtp queue has the delivery already" not in caplog.text
            await smtp.enqueue(letter(ANN), id="order-17")
            assert "smtp queue has the delivery already (delivery order-17)" in caplog.text
            async with working(engine, smtp):
                await programs.until(lambda: rows(path, "due") == [(None,)])
            with pytest.raises(ValueError, match=taken):
                await smtp.enqueue(letter(BOB), id="order-17")
            server.on("RCPT", BOB, GREYLISTED, times=1)
            assert (await smtp.deliver(smtpretry.prepare(letter(BOB), id="order-17"))).accepted == [BOB]
        assert [message.recipients for message in server.messages] == [[ANN], [BOB]]


@in_real_time
async def test_a_submission_wakes_the_worker(path: Path) -> None:
    """In one process a worker begins at once, through another engine on the same file, too; no polling is waited for."""
    async with ScriptedServer() as server, SQLiteEngine(path) as engine, SQLiteEngine(path) as other:
        async with RetryingSMTP(server.client()) as smtp, working(engine, smtp):
            await asyncio.sleep(0.3)
            loop = asyncio.get_running_loop()
            for submitting in (engine, other):
                began, count = loop.time(), len(server.messages)
                await submitting.submit(smtpretry.prepare(letter(ANN)))
                await programs.until(lambda count=count: len(server.messages) > count)
                assert loop.time() - began < 0.2


@in_real_time
async def test_another_process_wakes_the_worker(path: Path) -> None:
    """What another process has submitted is sent within a second."""
    code = "import asyncio, sys, smtpretry; from smtpretry.queues.sqlite import SQLiteEngine; asyncio.run(SQLiteEngine(sys.argv[1]).submit(smtpretry.prepare(b'Subject: x\\r\\n\\r\\nx\\r\\n', sender='a@example.com', recipients='b@example.com')))"
    async with ScriptedServer() as server, SQLiteEngine(path) as engine:
        async with RetryingSMTP(server.client()) as smtp, working(engine, smtp):
            process = await asyncio.create_subprocess_exec(sys.executable, "-c", code, path)
            assert await process.wait() == 0
            async with asyncio.timeout(1):
                while not server.messages:
                    await asyncio.sleep(0.01)


@in_real_time
async def test_in_the_transaction_of_the_application(path: Path) -> None:
    """What is enqueued in a transaction is there when it is committed, and never where it is rolled back."""
    async with SQLiteEngine(path) as engine, RetryingSMTP(ScriptedServer().client(), defer=engine) as smtp:
        with closing(sqlite3.connect(path)) as connection:
            connection.row_factory = lambda cursor, row: {
                name[0]: value for name, value in zip(cursor.description, row, strict=True)
            }
            connection.execute("CREATE TABLE orders (number INTEGER)")
            connection.execute("INSERT INTO orders VALUES (17)")
            delivery = await smtp.enqueue(letter(ANN), connection=connection)
            connection.rollback()
            assert rows(path) == []
            assert await smtp.enqueue(delivery, connection=connection) is delivery
            assert delivery.deferred == [ANN]
            assert rows(path) == []
            connection.commit()
            assert rows(path) == [(delivery.id, 0)]
        with pytest.raises(TypeError, match=r"connection is an sqlite3\.Connection, not str"):
            await smtp.enqueue(letter(ANN), connection="mail.db")
        for elsewhere in (":memory:", path.with_name("other.db")):
            with (
                closing(sqlite3.connect(elsewhere)) as other,
                pytest.raises(ValueError, match="not to the file of the queue"),
            ):
                await smtp.enqueue(letter(ANN), connection=other)


@in_real_time
async def test_a_transaction_beside_a_busy_worker(path: Path) -> None:
    """However often a worker writes, a message is taken into a transaction: it is not refused as locked."""
    async with SQLiteEngine(path) as engine:
        await engine.submit(smtpretry.prepare(letter(ANN)))
        with (
            closing(sqlite3.connect(path)) as connection,
            closing(sqlite3.connect(path, isolation_level=None, timeout=0)) as worker,
        ):

            def write(_: str) -> None:
                with suppress(sqlite3.OperationalError):  # the transaction has its turn
                    worker.execute("UPDATE smtpretry_deliveries SET taken = taken + 1")

            connection.set_trace_callback(write)
            await engine.submit(smtpretry.prepare(letter(BOB)), connection=connection)
            connection.commit()
        assert len(rows(path)) == 2


@in_real_time
async def test_a_connection_that_commits_each_statement(path: Path) -> None:
    """Where no transaction is open, and none is begun, a delivery is stored whole or not at all; texts may be bytes."""
    async with SQLiteEngine(path) as engine:
        with closing(sqlite3.connect(path, isolation_level=None)) as connection:
            connection.text_factory = bytes
            await engine.submit(smtpretry.prepare(letter(ANN)), connection=connection)
            assert len(rows(path)) == 1
            connection.execute(
                "CREATE TRIGGER no BEFORE INSERT ON smtpretry_messages BEGIN SELECT raise(FAIL, 'no'); END"
            )
            for transaction in (False, True):
                if transaction:
                    connection.execute("BEGIN")
                with pytest.raises(sqlite3.IntegrityError, match="no"):
                    await engine.submit(smtpretry.prepare(letter(BOB)), connection=connection)
                assert connection.in_transaction is transaction
            connection.execute("COMMIT")
            assert len(rows(path)) == 1
            assert connection.text_factory is bytes


@in_real_time
async def test_an_application_that_counts_its_versions(path: Path) -> None:
    """The version of the application's tables is the application's, also where the queue's were there first."""
    async with SQLiteEngine(path):
        pass
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA user_version").fetchone() == (0,)


@in_real_time
async def test_in_a_file_of_the_application(path: Path) -> None:
    """The tables may be made in a file, and a transaction, of the application's, whatever version its own tables have."""
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE orders (number INTEGER)")
        connection.execute("PRAGMA user_version = 99")
        connection.execute("INSERT INTO orders VALUES (17)")
        engine = SQLiteEngine(path)
        await engine.submit(smtpretry.prepare(letter(ANN), id="order-17"), connection=connection)
        connection.commit()
        assert await engine.has("order-17")
        assert connection.execute("PRAGMA user_version").fetchone() == (99,)
        await engine.aclose()


@in_real_time
async def test_the_event_loop_never_waits_for_the_file(path: Path) -> None:
    """While another process holds the file, the loop turns, and what was submitted meanwhile is stored afterwards."""
    async with SQLiteEngine(path) as engine:
        with closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            submitting = asyncio.create_task(engine.submit(smtpretry.prepare(letter(ANN))))
            loop = asyncio.get_running_loop()
            for _ in range(20):
                began = loop.time()
                await asyncio.sleep(0.01)
                assert loop.time() - began < 0.2
            assert not submitting.done()
            other.execute("COMMIT")
        await submitting
        assert len(rows(path)) == 1


@in_real_time
async def test_a_worker_that_lost_its_delivery_changes_nothing(path: Path) -> None:
    """A worker whose delivery was taken by another in mid-pass sends nothing more, and leaves it as the other has it."""
    async with ScriptedServer() as server, SQLiteEngine(path) as engine:
        held = server.fail_at("RCPT", "late", delay=1.2, times=1)
        await engine.submit(smtpretry.prepare(letter(ANN)))
        async with RetryingSMTP(server.client(), POLICY) as smtp, working(engine, smtp):
            await programs.until(lambda: held.used)
            change(path, "UPDATE smtpretry_deliveries SET taken = taken + 1, due = due + 1000")
            taken = rows(path, "*")
            await programs.until(lambda: not server.open_connections)
            await asyncio.sleep(0.2)
            assert rows(path, "*") == taken
        assert not server.messages


@in_real_time
async def test_a_worker_never_takes_its_own_again(path: Path) -> None:
    """Where the lease of what it sends is over, as after a sleep or a jump of the clock, nobody gets it twice."""
    jump = 0.0
    policy = RetryPolicy(wait=tenacity.wait_fixed(1), clock=lambda: time.time() + jump)
    async with ScriptedServer() as server, SQLiteEngine(path) as engine:
        held = server.fail_at("END_OF_DATA", "late", delay=1.0, times=1)
        await engine.submit(smtpretry.prepare(letter(ANN)))
        async with RetryingSMTP(server.client, policy, max_connections=2) as smtp, working(engine, smtp):
            await programs.until(lambda: held.used)
            jump = 3600.0
            await engine.submit(smtpretry.prepare(letter(BOB)))
            await programs.until(lambda: rows(path, "due") == [(None,), (None,)])
        assert sorted(message.recipients for message in server.messages) == [[ANN], [BOB]]


def sleep(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Let the clock of this process stand as if the machine had slept for so long."""
    monkeypatch.setattr(clock, "_set", lambda: time.time() - time.monotonic() - seconds)


@in_real_time
async def test_a_process_that_slept_submits(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that began later takes nothing for old that a process submits which was there before a long sleep."""
    soon = datetime.now(UTC) + timedelta(minutes=15)
    async with ScriptedServer() as server, SQLiteEngine(path) as engine:
        with monkeypatch.context() as patch:
            sleep(patch, 6 * 86400)
            async with RetryingSMTP(server.client(), RetryPolicy.queue(), defer=engine) as smtp:
                await smtp.enqueue(letter(ANN), expires=timedelta(minutes=15))
                told = await smtp.enqueue(letter(BOB), expires=soon)
        assert told.expires_at == soon.timestamp()
        async with RetryingSMTP(server.client(), RetryPolicy.queue()) as smtp, working(engine, smtp):
            await programs.until(lambda: server.received(ANN) and server.received(BOB))
        written = [json.loads(state)["expires_at"] for (state,) in rows(path, "state")]
        assert written == pytest.approx([soon.timestamp()] * 2, abs=60)


@in_real_time
async def test_a_process_that_slept_waits_no_second_time(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is due by the time of day is tried, also by a worker whose clock has not come to its last attempt yet."""
    sleep(monkeypatch, 6 * 86400)
    async with ScriptedServer() as server, SQLiteEngine(path) as engine:
        server.on("RCPT", ANN, "450 4.2.0 Greylisted for 2 seconds", times=2)
        policy = RetryPolicy.queue()
        async with RetryingSMTP(server.client(), policy, defer=engine, max_wait=0) as smtp:
            await smtp.deliver(letter(ANN))
        written = [json.loads(state)["attempts"][-1]["at"] for (state,) in rows(path, "state")]
        began = time.monotonic()
        async with RetryingSMTP(server.client(), policy) as smtp, working(engine, smtp):
            await programs.until(lambda: server.received(ANN))
        assert time.monotonic() - began < 6
        written += [json.loads(state)["attempts"][-1]["at"] for (state,) in rows(path, "state")]
        assert written == pytest.approx([time.time()] * 2, abs=60)


@in_real_time
async def test_a_worker_that_slept_keeps_what_it_has(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its lease is told by the time of day, or a worker that began later would send a second copy."""
    async with ScriptedServer() as server, SQLiteEngine(path, lease=2.0) as engine:
        held = server.fail_at("RCPT", "stall")
        await engine.submit(smtpretry.prepare(letter(ANN)))
        sleep(monkeypatch, 3600)
        async with RetryingSMTP(server.client(), RetryPolicy.queue()) as smtp, working(engine, smtp):
            await programs.until(lambda: held.used)
            assert rows(path, "due > unixepoch()") == [(1,)]


@in_real_time
async def test_a_clock_that_was_set_back(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that began before that takes nothing for old, and writes nothing that another one would."""
    sleep(monkeypatch, -30 * 86400)
    async with ScriptedServer() as server, SQLiteEngine(path) as engine:
        server.on("RCPT", "450 4.2.0 Greylisted for 1 second", times=1)
        async with RetryingSMTP(server.client(), RetryPolicy.queue(), defer=engine) as smtp:
            await smtp.enqueue(letter(ANN), expires=timedelta(days=1))
            async with working(engine, smtp):
                await programs.until(lambda: rows(path) == [(rows(path)[0][0], 1)])
        assert server.received(ANN)
    ((written,),) = rows(path, "state")
    state = json.loads(written)
    times = [state["submitted_at"], state["expires_at"] - 86400, *(one["at"] for one in state["attempts"])]
    assert times == pytest.approx([time.time()] * 4, abs=60)


@in_real_time
async def test_no_lease_is_over_because_the_machine_slept(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who wakes first takes nothing from another worker at once: that one could not say that it lives."""
    async with ScriptedServer() as server, SQLiteEngine(path, lease=2.0) as engine:
        async with RetryingSMTP(server.client(), RetryPolicy.queue()) as smtp, working(engine, smtp):
            await engine.submit(smtpretry.prepare(letter(BOB)))
            await programs.until(lambda: server.received(BOB))
            sleep(monkeypatch, 3600)
            await engine.submit(smtpretry.prepare(letter(ANN)), connection=(beside := sqlite3.connect(path)))
            beside.execute("UPDATE smtpretry_deliveries SET holder = 'another', due = 1 WHERE due IS NOT NULL")
            beside.commit()
            beside.close()
            await programs.until(lambda: rows(path, "due > unixepoch(), holder")[1] == (1, "another"))
            await programs.until(lambda: server.received(ANN))


@in_real_time
@pytest.mark.parametrize("restarts", [False, True])
async def test_a_clock_that_was_years_ahead(path: Path, *, restarts: bool) -> None:
    """What it has planned comes in time when it is right again, whether a worker saw it change or begins then."""
    ahead = 10 * 365 * 86400.0
    policy = RetryPolicy.queue(clock=lambda: time.time() + ahead)

    async with ScriptedServer() as server, SQLiteEngine(path) as engine, AsyncExitStack() as workers:
        server.on("RCPT", ANN, "450 4.2.0 Greylisted for 300 seconds", times=1)
        smtp = RetryingSMTP(server.client(), policy)
        await workers.enter_async_context(working(engine, smtp))
        await engine.submit(smtpretry.prepare(letter(ANN), id="ann"))
        await programs.until(lambda: rows(path, "due > unixepoch() + 86400 AND holder IS NULL") == [(1,)])
        change(
            path,
            "INSERT INTO smtpretry_servers (name, until, failures) VALUES (?, ?, 1)",
            smtp.sites[0].server,
            policy.clock(),
        )
        if restarts:
            await workers.aclose()
        ahead = 0.0
        await engine.submit(smtpretry.prepare(letter(BOB), id="bob"))
        if restarts:
            await workers.enter_async_context(working(engine, smtp))
        await programs.until(lambda: server.received(BOB))
        await programs.until(lambda: rows(path, "id, due - unixepoch() BETWEEN 200 AND 400")[0] == ("ann", 1))
        await smtp.aclose()


@in_real_time
async def test_a_worker_that_stops_gives_back_what_it_has(path: Path) -> None:
    """A pass that a worker's end cuts short is run again at once, by another."""
    async with ScriptedServer() as server, SQLiteEngine(path, lease=2.0) as engine:
        held = server.fail_at("RCPT", "stall", times=1)
        await engine.submit(smtpretry.prepare(letter(ANN)))
        async with RetryingSMTP(server.client(), POLICY) as smtp:
            async with working(engine, smtp):
                await programs.until(lambda: held.used)
            assert rows(path, "holder, due < unixepoch() + 1") == [(None, 1)]
            async with working(engine, smtp):
                await programs.until(lambda: server.messages)


@virtually
async def test_a_worker_ends_whenever_it_is_cancelled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cancellation that comes in the moment in which something was submitted ends it, too."""
    workers, run = list[Worker](), Worker.run

    def noted(worker: Worker) -> Coroutine[Any, Any, None]:
        workers.append(worker)
        return run(worker)

    monkeypatch.setattr(Worker, "run", noted)
    async with SQLiteEngine(tmp_path / "mail.db") as engine, RetryingSMTP(ScriptedServer().client(), patient()) as smtp:
        tomorrow = smtpretry.prepare(letter(ANN))
        tomorrow.outcomes[ANN].next_at = virtual.clock() + 86400
        await engine.submit(tomorrow)
        for steps in range(6):
            working = asyncio.create_task(engine.work(smtp))
            await asyncio.sleep(10)
            workers[-1]._bell.set()
            for _ in range(steps):
                await asyncio.sleep(0)
            working.cancel()
            await asyncio.wait([working], timeout=60)
            assert working.cancelled(), steps


@pytest.mark.parametrize("steps", range(1, 6))
@virtually
async def test_a_worker_that_is_cancelled_twice_leaves_nothing_behind(tmp_path: Path, steps: int) -> None:
    """Whenever the second cancellation comes, no attempt goes on without its worker."""
    async with (
        ScriptedServer() as server,
        SQLiteEngine(tmp_path / "mail.db") as engine,
        RetryingSMTP(server.client(), patient()) as smtp,
    ):
        held = server.fail_at("END_OF_DATA", "stall", times=1)
        await engine.submit(smtpretry.prepare(letter(ANN)))
        before = asyncio.all_tasks()
        working = asyncio.create_task(engine.work(smtp))
        while not held.used:
            await asyncio.sleep(0.01)
        working.cancel()
        for _ in range(steps):
            await asyncio.sleep(0)
        working.cancel()
        await asyncio.wait([working])
        assert not [task for task in asyncio.all_tasks() - before if "Worker" in repr(task)]


@in_real_time
async def test_a_client_that_is_closed_ends_its_worker(path: Path) -> None:
    """A delivery that a closed client could not send stays due, and the worker says why it ends."""
    async with ScriptedServer() as server, SQLiteEngine(path) as engine:
        smtp = RetryingSMTP(server.client())
        await smtp.aclose()
        await engine.submit(smtpretry.prepare(letter(ANN)))
        async with asyncio.timeout(5):
            with pytest.raises(ClientClosed):
                await engine.work(smtp)
        assert rows(path, "holder, due < unixepoch() + 1") == [(None, 1)]


@in_real_time
async def test_the_signals_of_the_application_come_back(path: Path) -> None:
    """Two workers in one loop end with one SIGTERM, and then the process has its own handlers again."""
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    async with (
        SQLiteEngine(path) as engine,
        SQLiteEngine(path) as other,
        RetryingSMTP(ScriptedServer().client()) as smtp,
    ):
        workers = [asyncio.create_task(one.work(smtp)) for one in (engine, other)]
        await asyncio.sleep(0.2)
        os.kill(os.getpid(), signal.SIGTERM)
        async with asyncio.timeout(5):
            await asyncio.gather(*workers)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


@pytest.mark.parametrize("beside", [False, True])
def test_a_signal_ends_the_worker_alone(path: Path, caplog: pytest.LogCaptureFixture, *, beside: bool) -> None:
    """Where an application has a worker in a task of its own, the log says that a signal does not end the rest."""

    async def main() -> None:
        asyncio.get_running_loop().call_later(0.2, os.kill, os.getpid(), signal.SIGINT)
        async with SQLiteEngine(path) as engine, RetryingSMTP(ScriptedServer().client()) as smtp, asyncio.timeout(5):
            await (asyncio.create_task(engine.work(smtp)) if beside else engine.work(smtp))

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background of a shell it is ignored
    try:
        asyncio.run(main())
    finally:
        signal.signal(signal.SIGINT, before)
    told = "smtp worker ends at SIGINT; what runs beside it goes on: end that when work() returns"
    assert (told in caplog.messages) is beside


@in_real_time
@pytest.mark.parametrize("how", ["loop", "signal", "exit"])
async def test_a_signal_reaches_the_application_too(path: Path, how: str) -> None:
    """A worker in a web server or the like takes no signal away from it, and ends before the process exits."""
    loop, told = asyncio.get_running_loop(), asyncio.Event()

    def handler(*_: object) -> None:
        loop.call_soon_threadsafe(told.set)
        if how == "exit":
            raise SystemExit(3)

    if how == "loop":
        loop.add_signal_handler(signal.SIGTERM, told.set)
    else:
        before = signal.signal(signal.SIGTERM, handler)
    try:
        async with ScriptedServer() as server, SQLiteEngine(path) as engine, RetryingSMTP(server.client()) as smtp:
            held = server.fail_at("END_OF_DATA", "late", delay=0.5)
            await engine.submit(smtpretry.prepare(letter(ANN)))

            async def work() -> None:
                with pytest.raises(SystemExit, match="3") if how == "exit" else nullcontext():
                    await engine.work(smtp)

            worker = asyncio.create_task(work())
            await programs.until(lambda: held.used)
            os.kill(os.getpid(), signal.SIGTERM)
            async with asyncio.timeout(5):
                await told.wait()
                await worker
            assert rows(path, "due IS NULL, taken") == [(1, 1)]
            told.clear()
            with suppress(SystemExit):
                os.kill(os.getpid(), signal.SIGTERM)
            async with asyncio.timeout(5):
                await told.wait()
    finally:
        if how == "loop":
            loop.remove_signal_handler(signal.SIGTERM)
        else:
            signal.signal(signal.SIGTERM, before)


@in_real_time
async def test_a_second_signal_breaks_off(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who presses Ctrl-C again does not wait for what is under way: it is given back at once."""
    async with ScriptedServer() as server, SQLiteEngine(path) as engine, RetryingSMTP(server.client()) as smtp:
        held = server.fail_at("RCPT", "stall")
        await engine.submit(smtpretry.prepare(letter(ANN)))
        worker = asyncio.create_task(engine.work(smtp))
        await programs.until(lambda: held.used)
        for twice in (1000, 0):  # passed on twice; then pressed again
            monkeypatch.setattr("smtpretry.queues.worker._TWICE", twice)
            os.kill(os.getpid(), signal.SIGINT)
            await asyncio.sleep(0.05)
            assert not worker.done() or not twice
        await asyncio.wait_for(worker, 5)
        assert rows(path, "holder") == [(None,)]


@in_real_time
async def test_the_application_is_told_until_it_has_heard(path: Path) -> None:
    """Where on_end raises, the delivery is kept, nothing is sent again, and on_end is called again."""
    told = list[Delivery]()

    async def on_end(delivery: Delivery) -> None:
        told.append(delivery)
        if len(told) == 1:
            raise OSError

    async with ScriptedServer() as server, SQLiteEngine(path) as engine, RetryingSMTP(server.client(), POLICY) as smtp:
        server.on("RCPT", EVE, "550 5.1.1 User unknown", times=1)
        await engine.submit(smtpretry.prepare(letter(ANN, EVE)))
        async with working(engine, smtp, on_end=on_end):
            await programs.until(lambda: rows(path, "due") == [(None,)])
        assert [list(delivery.refused) for delivery in told] == [[EVE], [EVE]]
        assert told[1].dsn()["To"] == APP
        assert len(server.messages) == 1


@in_real_time
async def test_on_end_as_a_plain_function(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A plain function is called once, too; where it raises, the log shows where."""
    told = list[Delivery]()

    def tell(delivery: Delivery) -> None:
        told.append(delivery)
        if len(told) == 1:
            raise KeyError(delivery.id)

    async with ScriptedServer() as server, SQLiteEngine(path) as engine, RetryingSMTP(server.client(), POLICY) as smtp:
        server.on("RCPT", "550 5.1.1 who?")
        await engine.submit(smtpretry.prepare(letter(ANN)))
        async with working(engine, smtp, on_end=tell):
            await programs.until(lambda: rows(path, "due") == [(None,)])
    assert len(told) == 2
    assert "in tell" in caplog.text


@in_real_time
async def test_a_worker_needs_a_client_of_the_loop(path: Path) -> None:
    """What cannot make an attempt is refused at once, and not with each delivery."""
    async with SQLiteEngine(path) as engine:
        with pytest.raises(TypeError, match=r"with a RetryingSMTP or a Failover, not .*Blocking"):
            await engine.work(smtpretry.Blocking(ScriptedServer().client()))  # type: ignore[arg-type]


@in_real_time
async def test_what_cannot_be_read_stays(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A delivery of a later version, or without its message, is not lost: it comes again, and nothing spins."""
    async with ScriptedServer() as server, SQLiteEngine(path) as engine, RetryingSMTP(server.client(), POLICY) as smtp:
        await engine.submit(smtpretry.prepare(letter(ANN), id="late"))
        await engine.submit(smtpretry.prepare(letter(BOB), id="without"))
        change(path, "UPDATE smtpretry_deliveries SET state = replace(state, '\"version\": 2', '\"version\": 99')")
        change(path, "DELETE FROM smtpretry_messages WHERE number = 2")
        async with working(engine, smtp):
            await programs.until(lambda: min(rows(path, "taken")) >= (2,))
            assert max(rows(path, "taken")) <= (4,)
            change(path, "UPDATE smtpretry_deliveries SET state = replace(state, '99', '2')")
            await programs.until(lambda: server.messages)
    assert "late: ValueError: this smtpretry reads deliveries of version 1 and 2, not 99: run the one" in caplog.text
    assert "without: ValueError: the message is not in the queue any more; comes again in 1 s" in caplog.text


@in_real_time
async def test_a_client_that_cannot_be_made(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Where the application's function raises, the log names the place, but no word of the error; the mail comes again."""
    settings = dict[str, Any]()

    async with ScriptedServer() as server, SQLiteEngine(path) as engine:

        def make() -> aiosmtplib.SMTP:
            return server.client(timeout=settings["timeout"])

        async with RetryingSMTP(make, POLICY) as smtp, working(engine, smtp):
            await engine.submit(smtpretry.prepare(letter(ANN), id="mail"))
            await programs.until(lambda: rows(path, "taken") == [(2,)])
            settings["timeout"] = 5
            await programs.until(lambda: server.messages)
    line = make.__code__.co_firstlineno + 1
    assert f"mail: KeyError in make ({__file__}, line {line}); comes again in 1 s" in caplog.text
    assert "timeout" not in caplog.text


@in_real_time
async def test_power_is_lost_at_any_moment(path: Path, tmp_path: Path) -> None:
    """From a copy of the file and its log at any moment all that was submitted by then comes back; a torn log opens, too."""
    size, submitted = 3000, list[str]()
    engine = SQLiteEngine(path)
    for number in range(12):
        name = f"order-{number}"
        await engine.submit(smtpretry.prepare(b"x" * size, sender=APP, recipients=[ANN], id=name))
        submitted.append(name)
        copy = snapshot(path, tmp_path / f"copy{number}")
        assert [name for (name,) in rows(copy, "id")] == sorted(submitted)
        assert rows(copy, "length(message) > 3000", "smtpretry_messages") == [(1,)] * len(submitted)
    wal = Path(f"{snapshot(path, tmp_path / 'torn')}-wal").read_bytes()
    cuts = sorted({0, 1, 31, 32, 33, *range(0, len(wal), len(wal) // 20 + 1), len(wal) - 1})
    for cut in cuts:
        torn = snapshot(path, tmp_path / f"torn{cut}")
        Path(f"{torn}-wal").write_bytes(wal[:cut])
        async with SQLiteEngine(torn) as again:
            await again.progress()
        names = [name for (name,) in rows(torn, "id")]
        assert sorted(submitted[: len(names)]) == names  # what was first is there, whole
        assert rows(torn, "number", "smtpretry_messages") == rows(torn, "number")
        shutil.rmtree(torn.parent)
    await engine.aclose()


def snapshot(path: Path, folder: Path) -> Path:
    """Copy the file and its log, as a loss of power leaves them."""
    folder.mkdir()
    for file in (path, Path(f"{path}-wal")):
        if file.exists():
            shutil.copy(file, folder / file.name)
    return folder / path.name


@in_real_time
async def test_a_long_log_is_written_into_the_file(path: Path) -> None:
    """The write-ahead log does not grow without limit."""
    async with SQLiteEngine(path) as engine:
        for number in range(8):
            await engine.submit(smtpretry.prepare(b"x" * 1_000_000, sender=APP, recipients=[ANN], id=str(number)))
            assert Path(f"{path}-wal").stat().st_size < 6_000_000
        assert path.stat().st_size > 4_000_000


@in_real_time
@pytest.mark.parametrize("linked", [False, True])
async def test_a_long_log_waits_for_nobody_who_reads(path: Path, *, linked: bool) -> None:
    """Nobody waits for a reader that takes its time; when it has ended, the log becomes short, behind a link too."""
    file = path.with_name("elsewhere.db") if linked else path
    if linked:
        path.symlink_to(file)
    async with SQLiteEngine(path) as engine:
        with closing(sqlite3.connect(path, isolation_level=None)) as reader:
            reader.execute("BEGIN")
            reader.execute("SELECT count(*) FROM smtpretry_deliveries").fetchall()
            async with asyncio.timeout(10):
                for _ in range(6):
                    await engine.submit(smtpretry.prepare(b"x" * 1_000_000, sender=APP, recipients=[ANN]))
        assert Path(f"{file}-wal").stat().st_size > 5_000_000
        await engine.submit(smtpretry.prepare(letter(ANN)))
        assert Path(f"{file}-wal").stat().st_size < 100_000


@in_real_time
async def test_a_log_that_cannot_be_written_into_the_file_now(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is in the log is stored: where the file cannot grow, as on a full disk, nobody is told that it is not."""
    monkeypatch.setattr("smtpretry.queues.file._CHECKPOINT", 0)
    async with SQLiteEngine(path) as engine:
        await engine.submit(smtpretry.prepare(letter(ANN)))
        size = resource.getrlimit(resource.RLIMIT_FSIZE)
        ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 70_000, size[1]))
        try:
            await engine.submit(smtpretry.prepare(b"x" * 60_000, sender=APP, recipients=[ANN], id="first"))
            await engine.submit(smtpretry.prepare(b"x" * 60_000, sender=APP, recipients=[ANN], id="second"))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, size)
            signal.signal(signal.SIGXFSZ, ignored)
        assert len(rows(path)) == 3


@in_real_time
async def test_a_log_that_was_deleted(path: Path) -> None:
    """A log that was deleted while it was in use is told: what is written into it, no other process sees."""
    async with SQLiteEngine(path) as engine:
        Path(f"{path}-wal").unlink()
        with pytest.raises(QueueError, match="-wal: was deleted or replaced while it was in use"):
            await engine.submit(smtpretry.prepare(letter(ANN)))


@in_real_time
async def test_what_nobody_waits_for_is_not_stored_later(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What failed because no thread could be started, or was cancelled while another held the file, is never stored."""
    engine = SQLiteEngine(path)

    def start(_: object) -> None:
        msg = "can't start new thread"
        raise RuntimeError(msg)

    with monkeypatch.context() as full:
        full.setattr("threading.Thread.start", start)
        with pytest.raises(RuntimeError, match="can't start new thread"):
            await engine.submit(smtpretry.prepare(letter(ANN), id="no thread"))
    async with engine:
        with closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.1):
                    await engine.submit(smtpretry.prepare(letter(ANN), id="timeout"))
            other.execute("COMMIT")
        await engine.submit(smtpretry.prepare(letter(ANN), id="third"))
        assert rows(path) == [("third", 0)]


@in_real_time
async def test_a_full_disk(path: Path) -> None:
    """Where the disk is full, submit says so and stores nothing; a worker waits until it can store what it has sent."""
    async with ScriptedServer() as server, SQLiteEngine(path) as engine, RetryingSMTP(server.client(), POLICY) as smtp:
        await engine.submit(smtpretry.prepare(letter(ANN)))
        limit = await engine.file.look(lambda own: own.execute("PRAGMA page_count").fetchone()[0])
        await engine.file.look(lambda own: own.execute(f"PRAGMA max_page_count = {limit}"))
        with pytest.raises(QueueError, match="the disk is full: nothing was stored") as caught:
            await engine.submit(smtpretry.prepare(b"x" * 100_000, sender=APP, recipients=[BOB]))
        assert caught.value.passing
        assert len(rows(path)) == 1
        async with working(engine, smtp):
            await programs.until(lambda: rows(path, "due") == [(None,)])
        assert len(server.messages) == 1


@in_real_time
async def test_a_disk_that_becomes_read_only(path: Path) -> None:
    """A worker that cannot save what it has sent waits until it can, as where a disk with errors was mounted anew."""

    async def forbid(on: int) -> None:
        await engine.file.look(lambda own: own.execute(f"PRAGMA query_only = {on}"))

    async with ScriptedServer() as server, SQLiteEngine(path) as engine, RetryingSMTP(server.client(), POLICY) as smtp:
        held = server.fail_at("END_OF_DATA", "late", delay=0.5, times=1)
        await engine.submit(smtpretry.prepare(letter(ANN)))
        async with working(engine, smtp):
            await programs.until(lambda: held.used)
            await forbid(1)
            with pytest.raises(QueueError, match="cannot be written") as caught:
                await engine.submit(smtpretry.prepare(letter(BOB)))
            assert caught.value.passing
            await programs.until(lambda: server.messages)
            await asyncio.sleep(0.2)
            await forbid(0)
            await programs.until(lambda: rows(path, "due, taken") == [(None, 1)])
        assert len(server.messages) == 1


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Have another program write in the file, and take its time."""
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield


@virtually
async def test_a_file_that_is_locked_for_long_kills_no_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While nobody can write, no worker can say that it lives: the first that can again takes nothing from another."""
    monkeypatch.setattr("smtpretry.queues.file._BUSY", 0.01)
    path = tmp_path / "mail.db"
    async with ScriptedServer() as server, SQLiteEngine(path) as engine:
        server.fail_at("END_OF_DATA", "late", delay=90, times=1)
        first, second = (RetryingSMTP(server.client(), patient()) for _ in range(2))
        async with AsyncExitStack() as working:
            await working.enter_async_context(all_working(engine, [first]))
            await engine.submit(smtpretry.prepare(letter(ANN)))
            await asyncio.sleep(0.5)
            with locked(path):
                await working.enter_async_context(all_working(engine, [second]))
                await asyncio.sleep(44.7)
            await asyncio.sleep(60)
        assert len(server.received(ANN)) == 1


@virtually
async def test_a_file_that_is_locked_delays_no_try(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A try is planned when the server has answered, however long it takes until that can be stored."""
    monkeypatch.setattr("smtpretry.queues.file._BUSY", 0.01)
    path, tries = tmp_path / "mail.db", list[float]()

    def note(_: Delivery | None, event: smtpretry.Event) -> None:
        if isinstance(event, smtpretry.Step):
            tries.append(event.at - virtual.EPOCH)

    async with ScriptedServer() as server, SQLiteEngine(path) as engine:
        server.on("RCPT", "451 4.3.0 Try again", times=1).delay = 5
        policy = patient(wait=tenacity.wait_fixed(65))
        async with RetryingSMTP(server.client(), policy, on_step=note) as smtp, working(engine, smtp):
            await engine.submit(smtpretry.prepare(letter(ANN)))
            await asyncio.sleep(4)
            with locked(path):
                await asyncio.sleep(30)
            await asyncio.sleep(60)
    assert tries == pytest.approx([5, 70], abs=1)


@in_real_time
async def test_a_worker_ends_while_the_file_is_locked(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal ends a worker that has nothing under way, also where it cannot look into the queue now."""
    monkeypatch.setattr("smtpretry.queues.file._BUSY", 0.01)
    async with SQLiteEngine(path) as engine, RetryingSMTP(ScriptedServer().client()) as smtp:
        worker = asyncio.create_task(engine.work(smtp))
        await asyncio.sleep(0.2)
        with locked(path):
            engine.ring()
            await asyncio.sleep(0.2)
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.wait_for(worker, 5)


@in_real_time
async def test_a_file_that_was_deleted(path: Path) -> None:
    """A file that was deleted while it was in use is told at the next use, by submit and by a worker."""
    async with SQLiteEngine(path) as engine, RetryingSMTP(ScriptedServer().client()) as smtp:
        worker = asyncio.create_task(engine.work(smtp))
        await asyncio.sleep(0.2)
        path.unlink()
        with pytest.raises(QueueError, match="was deleted or replaced while it was in use"):
            await engine.submit(smtpretry.prepare(letter(BOB)))
        with pytest.raises(QueueError, match="was deleted or replaced"):
            await asyncio.wait_for(worker, 5)


@in_real_time
async def test_a_file_that_cannot_be_used(path: Path, tmp_path: Path) -> None:
    """A folder that is missing, a file that is no database, and a later version: each error names the cause and the cure."""
    for make, complaint in [
        (lambda: tmp_path / "missing" / "mail.db", "the folder .*missing does not exist: make it"),
        (lambda: tmp_path, "cannot be written"),
        (lambda: write(tmp_path / "text.db", b"this is no database" * 100), "is no SQLite database"),
    ]:
        engine = SQLiteEngine(make())
        with pytest.raises(QueueError, match=complaint):
            await engine.submit(smtpretry.prepare(letter(ANN)))
        await engine.aclose()
    async with SQLiteEngine(path):
        pass
    change(path, "UPDATE smtpretry_schema SET version = 99")
    engine = SQLiteEngine(path)
    with pytest.raises(ValueError, match="the queue is of version 99, this smtpretry knows 1: upgrade smtpretry"):
        await engine.submit(smtpretry.prepare(letter(ANN)))
    await engine.aclose()


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_a_network_file_system_is_told(tmp_path: Path) -> None:
    """What is mounted from elsewhere is known, by the deepest mount; what is local is none."""
    mounts = tmp_path / "mounts"
    mounts.write_text(
        "/dev/sda1 / ext4 rw 0 0\nserver:/home /home nfs4 rw 0 0\n/dev/sdb /home/my\\040disk ext4 rw 0 0\n"
        "server:/vol /vol fuse.glusterfs rw 0 0\nbucket /bucket fuse.s3fs rw 0 0\nportal /doc fuse.portal rw 0 0\n"
    )
    assert network_file_system(Path("/home/me/mail.db"), mounts) == "nfs4"
    assert network_file_system(Path("/home/my disk/mail.db"), mounts) is None
    assert network_file_system(Path("/vol/mail.db"), mounts) == "fuse.glusterfs"
    assert network_file_system(Path("/bucket/mail.db"), mounts) == "fuse.s3fs"
    for local in ("/doc/mail.db", "/var/mail.db"):
        assert network_file_system(Path(local), mounts) is None
    assert network_file_system(Path("/var/mail.db"), tmp_path / "none") is None


def test_bad_arguments() -> None:
    """No file, a lease that is too short, and no concurrency are refused at once."""
    for wrong, complaint in [
        ({"path": ":memory:"}, "a queue is a file"),
        ({"path": "sqlite:mail.db"}, "give its path, .* not a URL"),
        ({"lease": 1}, "lease is 2"),
        ({"concurrency": 0}, "concurrency"),
    ]:
        with pytest.raises(ValueError, match=complaint):
            SQLiteEngine(**{"path": "mail.db"} | wrong)


@in_real_time
async def test_a_forked_process(path: Path) -> None:
    """An engine that was used before a fork can be used in the child, and in the parent afterwards."""
    async with SQLiteEngine(path) as engine:
        await engine.submit(smtpretry.prepare(letter(ANN), id="parent"))
        code = (
            "import asyncio, os, sys, smtpretry\n"
            "from smtpretry.queues.sqlite import SQLiteEngine\n"
            "engine = SQLiteEngine(sys.argv[1])\n"
            "def submit(name): asyncio.run(engine.submit(smtpretry.prepare(b'x', sender='a@x.test', recipients='b@x.test', id=name)))\n"
            "submit('before')\n"
            "child = os.fork()\n"
            "submit('after' if child else 'child')\n"
            "child and sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
        )
        process = await asyncio.create_subprocess_exec(sys.executable, "-c", code, path)
        assert await process.wait() == 0
    assert [name for (name,) in rows(path, "id")] == ["after", "before", "child", "parent"]


@virtually
async def test_ten_workers_cost_a_struggling_server_what_one_does(tmp_path: Path) -> None:
    """Where a server says 421 to everybody, workers share the pause: it meets no more connections than from one worker."""
    tries = list[int]()
    for number in (1, 10):
        async with ScriptedServer() as server, SQLiteEngine(tmp_path / f"mail{number}.db") as engine:
            storm = server.on("CONNECT", "421 4.3.2 Try again later", close=True)
            clients = [RetryingSMTP(server.client(), patient(give_up_after=timedelta(days=1))) for _ in range(number)]
            async with all_working(engine, clients):
                for one in range(30):
                    await engine.submit(smtpretry.prepare(letter(ANN), id=str(one)))
                await asyncio.sleep(3600)
                tries.append(server.connections)
                server.scripts.remove(storm)
                await asyncio.sleep(1800)
                assert len(server.messages) == 30
    assert tries[1] <= tries[0] + 2, tries


@virtually
async def test_the_end_of_a_pause_is_not_slept_through(tmp_path: Path) -> None:
    """While nothing is due, a worker sleeps until something is, however long the trouble of the server lasts."""
    tries = list[float]()

    def note(_: Delivery | None, event: smtpretry.Event) -> None:
        if isinstance(event, smtpretry.Step):
            tries.append(event.at)

    policy = patient(give_up_after=timedelta(days=1), wait=tenacity.wait_fixed(65))
    async with ScriptedServer() as server, SQLiteEngine(tmp_path / "mail.db") as engine:
        server.on("CONNECT", "421 4.3.2 Try again later", close=True, times=3)
        async with RetryingSMTP(server.client(), policy, on_step=note) as smtp, working(engine, smtp):
            await engine.submit(smtpretry.prepare(letter(ANN)))
            await asyncio.sleep(600)
    assert [round(later - at) for at, later in pairwise(tries)] == [65, 65, 65]


@virtually
async def test_a_pause_that_is_told_is_not_forgotten(tmp_path: Path) -> None:
    """What a worker has told the others while it was looking into the queue is newer than what it then reads there."""
    async with ScriptedServer() as server, SQLiteEngine(tmp_path / "mail.db") as engine:
        server.on("CONNECT", "421 4.3.2 Try again later", close=True)
        async with RetryingSMTP(server.client(), patient()) as smtp, working(engine, smtp):
            for _ in range(20):
                await engine.submit(smtpretry.prepare(letter(ANN)))
            await asyncio.sleep(30)
            assert server.connections == 1


@pytest.mark.parametrize("told", [(60, 600), (600, 60)], ids=["the longer one last", "the shorter one last"])
@virtually
async def test_of_two_pauses_the_longer_one_holds(tmp_path: Path, told: tuple[int, int]) -> None:
    """Where the server names different times to two workers at once, neither tries before the later of them."""
    async with ScriptedServer() as server, SQLiteEngine(tmp_path / "mail.db", concurrency=1) as engine:
        for delay, seconds in enumerate(told, start=1):
            refusal = f"421 4.3.2 Try again in {seconds} seconds"
            server.on("CONNECT", refusal, close=True, times=1).delay = delay
        async with all_working(engine, [RetryingSMTP(server.client(), patient()) for _ in range(2)]):
            for _ in range(2):
                await engine.submit(smtpretry.prepare(letter(ANN)))
            await asyncio.sleep(595)
            assert (server.connections, server.messages) == (2, [])
            await asyncio.sleep(65)
            assert len(server.messages) == 2


@virtually
async def test_a_worker_that_does_not_know_its_server_yet(tmp_path: Path) -> None:
    """Where a function makes the clients, one connection finds out whose pause it is, not one for each message."""
    async with ScriptedServer() as server, SQLiteEngine(tmp_path / "mail.db") as engine:
        server.on("CONNECT", "421 4.3.2 Try again later", close=True)
        async with RetryingSMTP(server.client(), patient()) as smtp, working(engine, smtp):
            for _ in range(9):
                await engine.submit(smtpretry.prepare(letter(ANN)))
            await asyncio.sleep(10)
        async with RetryingSMTP(server.client, patient(), max_connections=8) as smtp, working(engine, smtp):
            await asyncio.sleep(30)
            assert server.connections == 2
            server.clear()
            await asyncio.sleep(60)
            assert len(server.messages) == 9


@virtually
async def test_ten_workers_with_a_second_server(tmp_path: Path) -> None:
    """Workers who send through a Failover share the pause of each of its servers, and go to the next one meanwhile."""
    tries = list[int]()
    for number in (1, 10):
        async with (
            ScriptedServer() as first,
            ScriptedServer() as second,
            SQLiteEngine(tmp_path / f"mail{number}.db") as engine,
        ):
            storm = first.on("CONNECT", "421 4.3.2 Try again later", close=True)
            policy = patient(give_up_after=timedelta(days=1))
            clients = [
                Failover(RetryingSMTP(first.client(), policy), RetryingSMTP(second.client(), policy))
                for _ in range(number)
            ]
            async with all_working(engine, clients):
                for one in range(60):
                    await engine.submit(smtpretry.prepare(letter(ANN), id=str(one)))
                    await asyncio.sleep(60)
                assert len(second.messages) == 60
                tries.append(first.connections)
                first.scripts.remove(storm)
                await asyncio.sleep(1800)
                await engine.submit(smtpretry.prepare(letter(ANN)))
                await asyncio.sleep(10)
                assert len(first.messages) == 1
    assert tries[1] <= tries[0] + 2, tries


@virtually
async def test_one_message_finds_out_whether_the_first_server_works(tmp_path: Path) -> None:
    """While a message waits for the banner of a server in trouble, all others go to the second server at once."""
    ends = dict[str, float]()

    def note(delivery: Delivery | None, event: smtpretry.Event) -> None:
        if isinstance(event, smtpretry.Ended) and delivery is not None:
            ends[delivery.id] = event.at

    async with (
        ScriptedServer() as first,
        ScriptedServer() as second,
        SQLiteEngine(tmp_path / "mail.db") as engine,
        Failover(*(RetryingSMTP(one.client(), patient(), on_step=note) for one in (first, second))) as smtp,
        working(engine, smtp),
    ):
        first.on("CONNECT", "421 4.3.2 Try again later", close=True).delay = 25
        submitted = dict[str, float]()
        for number in range(300):
            submitted[str(number)] = virtual.clock()
            await engine.submit(smtpretry.prepare(letter(ANN), id=str(number)))
            await asyncio.sleep(5)
        await asyncio.sleep(60)
        late = [name for name, at in submitted.items() if ends[name] > at + 1]
        assert len(second.messages) == 300
        assert len(late) <= first.connections + 5  # and those before the first 421
        assert first.connections > 2


@pytest.mark.parametrize(
    ("workers", "connections"),
    [(10, 3), (30, 1)],
    ids=["ten workers", "more workers than the server takes messages at once"],
)
@virtually
async def test_workers_keep_one_pace(tmp_path: Path, *, workers: int, connections: int) -> None:
    """Where a server takes so many a second, workers who share its pace are as fast as one, and refused as seldom."""
    took, late_refusals = list[float](), 0

    def count(_: Delivery | None, event: smtpretry.Event) -> None:
        nonlocal late_refusals
        late_refusals += isinstance(event, smtpretry.Step) and event.action is not None and event.at > began + 1

    for number in (1, workers):
        async with ScriptedServer(max_rate=(14, 1)) as server, SQLiteEngine(tmp_path / f"mail{number}.db") as engine:
            for one in range(300):
                await engine.submit(smtpretry.prepare(letter(ANN), id=str(one)))
            clients = [
                RetryingSMTP(server.client, patient(), max_connections=connections, on_step=count)
                for _ in range(number)
            ]
            began = virtual.clock()
            async with all_working(engine, clients):
                while len(server.messages) < 300 and virtual.clock() < began + 600:
                    await asyncio.sleep(0.1)
                took.append(virtual.clock() - began)
    assert took[1] < 1.3 * took[0], took
    assert late_refusals < 50  # 2 to 30 of 600; in the first instant they do not know of each other yet


@pytest.mark.parametrize(("workers", "connections", "limit"), [(2, 1, 1), (3, 4, 2), (4, 3, 10)])
@virtually
async def test_too_many_connections_stop_no_worker_that_has_some(
    tmp_path: Path, workers: int, connections: int, limit: int
) -> None:
    """Where workers have more connections than the server takes, those that are open go on, and few more are tried."""
    async with ScriptedServer(max_connections=limit) as server, SQLiteEngine(tmp_path / "mail.db") as engine:
        server.fail_at("END_OF_DATA", "late", delay=2, optional=True)
        for number in range(100):
            await engine.submit(smtpretry.prepare(letter(ANN), id=str(number)))
        clients = [RetryingSMTP(server.client, patient(), max_connections=connections) for _ in range(workers)]
        began = virtual.clock()
        async with all_working(engine, clients):
            while len(server.messages) < 95 and virtual.clock() < began + 3600:
                await asyncio.sleep(1)  # those of a worker that found no connection free wait for its next try
        least = 100 * 2 / min(limit, workers * connections)
        assert virtual.clock() - began < 1.7 * least
        assert server.connections <= limit + 2 * workers * connections


@virtually
async def test_what_waits_does_not_slow_what_is_due(tmp_path: Path) -> None:
    """The next delivery is found by an index, before and after ANALYZE; progress counts the 100,000 that wait."""
    async with SQLiteEngine(tmp_path / "mail.db") as engine:
        await engine.submit(smtpretry.prepare(letter(ANN)))
        change(
            tmp_path / "mail.db",
            "WITH RECURSIVE some(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM some WHERE n < 100000) INSERT INTO "
            "smtpretry_deliveries (id, envelope, state, due) SELECT 'x' || n, '{}', '{}', ? + n FROM some",
            virtual.clock() + 3600,
        )
        for analyzed in (False, True):
            if analyzed:
                change(tmp_path / "mail.db", "ANALYZE")
            plan = await engine.file.look(lambda own: own.execute(f"EXPLAIN QUERY PLAN {DUE}", (1.0, 10)).fetchall())
            assert "SEARCH smtpretry_deliveries USING INDEX smtpretry_due" in str(plan)
            assert "SCAN" not in str(plan)
            assert "TEMP B-TREE" not in str(plan)
        assert await engine.progress(virtual.clock()) == Progress(waiting=100_000, due=1, working=0, ended=0)


@virtually
async def test_the_progress_is_told_while_nothing_goes(tmp_path: Path) -> None:
    """What comes during a pause of the server is counted a minute later, and not only when something is sent again."""
    told = list[Progress]()
    async with ScriptedServer() as server, SQLiteEngine(tmp_path / "mail.db") as engine:
        server.on("CONNECT", "421 4.3.2 Try again in 7200 seconds", close=True)
        policy = patient(give_up_after=timedelta(days=1))
        async with RetryingSMTP(server.client(), policy) as smtp, working(engine, smtp, on_progress=told.append):
            for _ in range(4):
                await engine.submit(smtpretry.prepare(letter(ANN)))
                await asyncio.sleep(100)
    assert told[-1] == Progress(waiting=1, due=3, working=0, ended=0)


# What expires


@virtually
async def test_an_on_progress_that_raises_is_called_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It is logged, with where it happened; the worker goes on, and tells what comes next."""
    told = list[Progress]()

    def fail(progress: Progress) -> None:
        told.append(progress)
        msg = "no metrics today"
        raise OSError(msg)

    async with ScriptedServer() as server, SQLiteEngine(tmp_path / "mail.db") as engine:
        async with RetryingSMTP(server.client(), patient()) as smtp, working(engine, smtp, on_progress=fail):
            for _ in range(3):
                await engine.submit(smtpretry.prepare(letter(ANN)))
                await asyncio.sleep(61)
        assert len(server.messages) == 3
    assert told[-1] == Progress(waiting=0, due=0, working=0, ended=3)
    assert caplog.text.count("OSError: no metrics today") == len(told)


@virtually
async def test_what_expires_is_refused_and_told(tmp_path: Path) -> None:
    """A message whose time was over before a worker came is not sent; its reply says so, and on_end is told."""
    for expires in (timedelta(minutes=15), datetime.fromtimestamp(virtual.EPOCH, UTC) + timedelta(hours=2)):
        ended = list[Delivery]()

        async def on_end(delivery: Delivery, ended: list[Delivery] = ended) -> None:
            ended.append(delivery)

        async with ScriptedServer() as server, SQLiteEngine(tmp_path / f"mail{expires!r}.db") as engine:
            async with RetryingSMTP(server.client(), patient(), defer=engine) as smtp:
                await smtp.enqueue(letter(ANN, BOB), expires=expires)
                await asyncio.sleep(7300)
                async with working(engine, smtp, on_end=on_end):
                    while not ended:
                        await asyncio.sleep(1)
            assert server.connections == 0
        assert list(ended[0].refused) == [ANN, BOB]
        assert ended[0].refused[ANN].text.startswith("expired: it was to be sent before 2023-11-1")
        assert ended[0].refused[ANN].enhanced == "4.4.7"
        assert "Status: 4.4.7" in str(ended[0].dsn())


@virtually
async def test_the_limit_counts_from_the_hand_over(tmp_path: Path) -> None:
    """A message that was enqueued longer ago than the policy's limit is not sent, even where it was never tried."""
    policy = RetryPolicy(give_up_after=timedelta(days=5), clock=virtual.clock)
    async with ScriptedServer() as server, SQLiteEngine(tmp_path / "mail.db") as engine:
        async with RetryingSMTP(server.client(), policy, defer=engine) as smtp:
            delivery = await smtp.enqueue(letter(ANN))
            await asyncio.sleep(30 * 86400)
            async with working(engine, smtp):
                while not (await engine.progress()).ended:
                    await asyncio.sleep(1)
            assert not server.messages
        state = json.loads(rows(tmp_path / "mail.db", "state")[0][0])
    assert "the limit is 5 days" in state["outcomes"][ANN]["reply"][2]
    assert delivery.submitted_at == pytest.approx(virtual.EPOCH, abs=1)


@virtually
async def test_the_last_attempt_comes_before_the_expiry() -> None:
    """A computed wait is cut so that the last attempt falls just before the message expires; then the server's reply stands."""
    async with ScriptedServer() as server, RetryingSMTP(server.client(), patient()) as smtp:
        server.on("RCPT", "450 4.2.0 Greylisted")
        delivery = await smtp.deliver(letter(ANN), expires=timedelta(seconds=100))
        assert delivery.refused[ANN].enhanced == "4.2.0"
        assert len(delivery.attempts) >= 2
        assert virtual.clock() - virtual.EPOCH == pytest.approx(99, abs=0.5)
        assert "the message expires before the next try" in delivery.story(virtual.clock())


@pytest.mark.parametrize(
    ("wrong", "error", "complaint"),
    [
        ({"expires": timedelta(0)}, ValueError, "positive timedelta"),
        ({"expires": datetime(2030, 1, 1)}, ValueError, "no time zone"),  # noqa: DTZ001 - that is what is wrong
        ({"expires": 60}, TypeError, "a timedelta or a datetime"),
        ({"id": ""}, ValueError, "1 to 255 characters"),
        ({"id": "a\nb"}, ValueError, "control character"),
        ({"id": 17}, TypeError, "id is a str"),
    ],
)
def test_a_wrong_name_or_end(wrong: dict[str, Any], error: type[Exception], complaint: str) -> None:
    """A name or an end that cannot be one is refused before anything is stored."""
    with pytest.raises(error, match=complaint):
        smtpretry.prepare(letter(ANN), **wrong)


@virtually
async def test_many_refusals_are_stored_together(tmp_path: Path) -> None:
    """What is stored of 800 recipients who are refused one by one grows with their number, not with its square."""
    saves = list[int]()
    async with ScriptedServer() as server, SQLiteEngine(tmp_path / "mail.db") as engine:
        server.on("RCPT", "550 5.1.1 User unknown")

        class Watched(RetryingSMTP):
            async def attempt(self, delivery: Delivery, save: Any = None, **options: Any) -> Delivery:
                async def watch(delivery: Delivery) -> None:
                    saves.append(len(json.dumps(delivery.state())))
                    await save(delivery)

                return await super().attempt(delivery, watch, **options)

        async with Watched(server.client(), patient(), defer=engine) as smtp:
            await smtp.enqueue(letter(), recipients=[f"user{number}@example.com" for number in range(800)])
            async with working(engine, smtp):
                while not (await engine.progress()).ended:
                    await asyncio.sleep(1)
    assert sum(saves) < 2_000_000
