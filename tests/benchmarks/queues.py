"""What a queue costs: messages a second and bytes of log for each, beside the task that people write themselves."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import sqlite3
import statistics
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, LiteralString

import aiosmtplib
import postgres
import procrastinate
import psycopg

import smtpretry
from smtpretry import RetryingSMTP, RetryPolicy
from smtpretry.queues.procrastinate import ProcrastinateEngine
from smtpretry.queues.sqlite import SQLiteEngine

from .harness import SENDER, Table, letter
from .sink import HOST, sink

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

SIZES = {"2 KB": 2_000, "200 KB": 200_000}
WORKERS, CONCURRENCY = 2, 10
PLAIN, OURS, FILE = "a plain task", "ProcrastinateEngine", "SQLiteEngine"
FASTER, LOG = 1.0, 1.2


def plain_app(conninfo: str, port: int) -> tuple[procrastinate.App, Any]:
    """What people write: the message in the job's arguments, and `aiosmtplib.send`."""
    app = procrastinate.App(connector=procrastinate.PsycopgConnector(conninfo=conninfo))

    @app.task(queue="plain", name="plain")
    async def send(message: str, recipient: str) -> None:
        await aiosmtplib.send(message, sender=SENDER, recipients=[recipient], hostname=HOST, port=port, start_tls=False)

    return app, send


async def wait_for(done: Callable[[], int], number: int) -> None:
    while done() < number:  # noqa: ASYNC110 - another process does it
        await asyncio.sleep(0.2)


async def drain(work: Callable[[], Any], done: Callable[[], int], number: int) -> None:
    worker = asyncio.ensure_future(work())
    await wait_for(done, number)
    worker.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await worker


def client(port: int) -> aiosmtplib.SMTP:
    return aiosmtplib.SMTP(hostname=HOST, port=port, local_hostname="client.example", start_tls=False)


def smtp_for(port: int) -> RetryingSMTP:
    return RetryingSMTP(lambda: client(port), RetryPolicy.queue(), max_connections=CONCURRENCY)


async def worker_of(kind: str, where: str, port: int, number: int) -> None:
    """Be one of the workers, until all has been sent."""
    if kind == FILE:
        async with SQLiteEngine(where, concurrency=CONCURRENCY) as engine, smtp_for(port) as smtp:
            await drain(lambda: engine.work(smtp), lambda: ended_in_file(where), number)
        return
    if kind == PLAIN:
        app, _ = plain_app(where, port)
        async with app.open_async():
            options: dict[str, Any] = {
                "queues": ["plain"],
                "concurrency": CONCURRENCY,
                "install_signal_handlers": False,
            }
            await drain(lambda: app.run_worker_async(**options), lambda: ended_jobs(where), number)
        return
    app = procrastinate.App(connector=procrastinate.PsycopgConnector(conninfo=where))
    async with app.open_async(), smtp_for(port) as smtp:
        engine = ProcrastinateEngine(app, concurrency=CONCURRENCY, install_signal_handlers=False)
        await drain(lambda: engine.work(smtp), lambda: ended_in_postgres(where), number)


def run_worker(*args: Any) -> None:
    asyncio.run(worker_of(*args))


def ended_jobs(conninfo: str) -> int:
    return number_in(conninfo, "SELECT count(*) FROM procrastinate_jobs WHERE status = 'succeeded'")


def ended_in_postgres(conninfo: str) -> int:
    return number_in(conninfo, "SELECT count(*) FROM smtpretry_deliveries WHERE ended IS NOT NULL")


def ended_in_file(path: str) -> int:
    with contextlib.closing(sqlite3.connect(path)) as connection:
        return int(
            connection.execute("SELECT count(*) FROM smtpretry_deliveries WHERE ended IS NOT NULL").fetchone()[0]
        )


def log_position(conninfo: str) -> int:
    return number_in(conninfo, "SELECT pg_current_wal_insert_lsn() - '0/0'")


def number_in(conninfo: str, query: LiteralString) -> int:
    with psycopg.connect(conninfo) as connection:
        return int(connection.execute(query).fetchone()[0])  # type: ignore[index] # a number


async def submit(kind: str, where: str, port: int, messages: Sequence[Any]) -> None:
    if kind == PLAIN:
        app, send = plain_app(where, port)
        async with app.open_async():
            for message in messages:
                await send.defer_async(message=message.as_string(), recipient="ann@example.com")
    elif kind == OURS:
        app = procrastinate.App(connector=procrastinate.PsycopgConnector(conninfo=where))
        async with app.open_async():
            engine = ProcrastinateEngine(app)
            for message in messages:
                await engine.submit(smtpretry.prepare(message))
    else:
        async with SQLiteEngine(where) as engine:
            for message in messages:
                await engine.submit(smtpretry.prepare(message))


def one_run(kind: str, where: str, port: int, size: int, number: int) -> tuple[float, float]:
    """Seconds for the sending of all, and bytes of log for each message from its submission to its end."""
    messages = [letter("ann@example.com", size=size) for _ in range(number)]
    began_at = log_position(where) if kind != FILE else 0
    asyncio.run(submit(kind, where, port, messages))
    context = multiprocessing.get_context("spawn")
    workers = [
        context.Process(target=run_worker, args=(kind, where, port, number), daemon=True) for _ in range(WORKERS)
    ]
    began = time.monotonic()
    for worker in workers:
        worker.start()
    done = {FILE: ended_in_file, OURS: ended_in_postgres, PLAIN: ended_jobs}[kind]
    first = number // 10
    while done(where) < first:
        time.sleep(0.05)
    count, began = done(where), time.monotonic()
    while done(where) < number:
        time.sleep(0.05)
    seconds = (time.monotonic() - began) / (number - count)
    for worker in workers:
        worker.join()
    return seconds, (log_position(where) - began_at) / number if kind != FILE else 0.0


def compare(server: postgres.Postgres, *, number: int, rounds: int) -> Table:
    table = Table(
        "Sending from a queue",
        f"{WORKERS} worker processes, {CONCURRENCY} messages at a time in each; from when a tenth has been sent until all "
        "have. The plain task has the message in the job's arguments, and calls `aiosmtplib.send`. The log is PostgreSQL's "
        "write-ahead log for one message, from its submission to its end. Medians of rounds that take turns.",
        ("message", "queue", "messages/s", "x plain task", "log, bytes", "x plain task"),
    )
    for name, size in SIZES.items():
        figures: dict[str, list[tuple[float, float]]] = {PLAIN: [], OURS: [], FILE: []}
        count = max(20, number if size < 10_000 else number // 4)
        with sink() as port, tempfile.TemporaryDirectory() as folder:
            for one in range(rounds):
                for kind, runs in figures.items():
                    where = (
                        str(Path(folder) / f"{size}-{one}.db")
                        if kind == FILE
                        else server.create(f"q{size}-{one}-{kind[:1].strip()}")
                    )
                    if kind != FILE:
                        asyncio.run(postgres.make_tables(where))
                    runs.append(one_run(kind, where, port, size, count))
        seconds = {kind: statistics.median(each for each, _ in runs) for kind, runs in figures.items()}
        log = {kind: statistics.median(each for _, each in runs) for kind, runs in figures.items()}
        for kind, each in seconds.items():
            written = (log[kind], log[kind] / log[PLAIN]) if kind != FILE else (None, None)
            table.rows.append((name, kind, 1 / each, seconds[PLAIN] / each, *written))
        speed, written_times = seconds[PLAIN] / seconds[OURS], log[OURS] / log[PLAIN]
        table.targets[f"{name}: {OURS} at least {FASTER:g} times as fast as {PLAIN} ({speed:.2f})"] = speed >= FASTER
        table.targets[f"{name}: at most {LOG:g} times its log ({written_times:.2f})"] = written_times <= LOG
    return table


def run(*, quick: bool) -> list[Table]:
    if why := postgres.Postgres.unavailable():
        return [Table("Sending from a queue", why, ())]
    with postgres.running(fsync=True) as server:
        return [compare(server, number=40 if quick else 600, rounds=1 if quick else 3)]
