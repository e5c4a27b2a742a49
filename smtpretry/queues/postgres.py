"""What is in a PostgreSQL queue: its tables, the statements on them, and the queue as one worker sees it.

A row is a delivery. Its message lies out of line, where no change of the row writes it again. Taking a delivery, saving
it and a heartbeat change no column that is in an index, so PostgreSQL changes them in place (HOT). All times that are
compared are the database's, for its workers may be on many machines.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
import uuid
import zlib
from typing import TYPE_CHECKING, Any, Final

import psycopg
from psycopg.rows import tuple_row
from psycopg_pool import PoolClosed

from .engine import Pause, Progress, QueueError, TakenIdError
from .servers import COLUMNS, Known, Wants, leaves, told
from .stored import by_the_time_of_day, check_is_same, envelope_of
from .worker import Batch, Change, Taken, broken_off

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
    from contextlib import AbstractAsyncContextManager
    from datetime import timedelta

    from smtpretry.delivery import Delivery

    from .engine import Paced

    Connect = Callable[[], AbstractAsyncContextManager[psycopg.AsyncConnection[Any]]]
    Listen = Callable[[Callable[[str], None]], Awaitable[None]]

VERSION: Final = 1
CHANNEL: Final = "smtpretry"
# ruff: noqa: S608 - the statements are put together from texts of this module
_TABLES: Final = f"""
    SET LOCAL lock_timeout = '5s';
    SELECT pg_advisory_xact_lock(hashtextextended('smtpretry', 0));
    CREATE TABLE IF NOT EXISTS smtpretry_deliveries (
        id text COLLATE "C" PRIMARY KEY,
        queue text NOT NULL,
        envelope json NOT NULL,
        message bytea,  -- by zlib; NULL: it has ended
        due timestamptz,  -- when it may be taken; NULL: it has ended
        ended timestamptz,
        taken integer NOT NULL DEFAULT 0,  -- how many times
        lease timestamptz,  -- until when it is its holder's
        holder uuid,  -- the worker that has it
        died boolean NOT NULL DEFAULT false,  -- whether the one before it did not let go of it
        state json NOT NULL
    ) WITH (fillfactor = 50, toast_tuple_target = 128);
    ALTER TABLE smtpretry_deliveries ALTER id SET STORAGE PLAIN, ALTER queue SET STORAGE PLAIN,
        ALTER envelope SET STORAGE MAIN, ALTER state SET STORAGE MAIN, ALTER message SET STORAGE EXTERNAL;
    CREATE INDEX IF NOT EXISTS smtpretry_deliveries_due ON smtpretry_deliveries (queue, due) WHERE due IS NOT NULL;
    CREATE INDEX IF NOT EXISTS smtpretry_deliveries_ended ON smtpretry_deliveries (ended) WHERE ended IS NOT NULL;
    CREATE TABLE IF NOT EXISTS smtpretry_servers (
        name text PRIMARY KEY,
        until double precision NOT NULL,
        failures integer NOT NULL,
        stage text,
        reply text,
        probe double precision NOT NULL DEFAULT 0,  -- until when one worker finds out whether it works again
        pace text
    );
    CREATE TABLE IF NOT EXISTS smtpretry_schema (version integer PRIMARY KEY);
    INSERT INTO smtpretry_schema VALUES ({VERSION}) ON CONFLICT DO NOTHING
"""
_SUBMIT: Final = f"""WITH new AS (
        INSERT INTO smtpretry_deliveries (id, queue, envelope, message, due, state)
        VALUES (%(id)s, %(queue)s, %(envelope)s, %(message)s, now() + make_interval(secs => %(wait)s), %(state)s)
        ON CONFLICT (id) DO NOTHING RETURNING queue
    ), told AS (
        SELECT pg_notify('{CHANNEL}', queue) FROM new
    ) SELECT queue = %(queue)s, queue, envelope, state, (SELECT count(*) FROM told) FROM (
        SELECT queue, NULL AS envelope, NULL AS state FROM new
        UNION ALL SELECT queue, envelope::text, state::text FROM smtpretry_deliveries WHERE id = %(id)s
    ) AS one"""
TAKE: Final = """UPDATE smtpretry_deliveries SET taken = taken + 1, holder = %(holder)s, died = holder IS NOT NULL,
        lease = clock_timestamp() + make_interval(secs => %(lease)s)
    WHERE ctid = ANY(ARRAY(
        SELECT ctid FROM smtpretry_deliveries
        WHERE queue = %(queue)s AND due <= now() AND (lease IS NULL OR lease <= now() AND id <> ALL(%(those)s::text[]))
        ORDER BY due LIMIT %(room)s FOR UPDATE SKIP LOCKED
    )) RETURNING id, envelope::text, state::text, message, taken, died"""
_SPARE: Final = """UPDATE smtpretry_deliveries SET lease = now() + make_interval(secs => %(lease)s)
    WHERE queue = %(queue)s AND due <= now() AND lease <= now()"""
_NEXT: Final = """SELECT extract(epoch FROM due - now())::float8 FROM smtpretry_deliveries
    WHERE queue = %(queue)s AND due > now() ORDER BY due LIMIT 1"""
_TROUBLE: Final = """SELECT 1 FROM smtpretry_servers
    WHERE name = ANY(%(servers)s) AND (failures > 0 OR pace IS NOT NULL)"""
_SERVERS: Final = (
    f"SELECT name, {COLUMNS} FROM smtpretry_servers WHERE name = ANY(%(servers)s) ORDER BY name FOR UPDATE"
)
_TRIED: Final = "UPDATE smtpretry_servers SET pace = %s, probe = %s WHERE name = %s"
_NEW: Final = """INSERT INTO smtpretry_servers (name, until, failures) SELECT unnest(%(servers)s::text[]), 0, 0
    ON CONFLICT (name) DO NOTHING"""
_TELL: Final = """UPDATE smtpretry_servers SET until = %s, failures = %s, stage = %s, reply = %s, pace = %s, probe = 0
    WHERE name = %s"""
_WRITE: Final = """UPDATE smtpretry_deliveries AS one SET
        state = coalesce(new.state, one.state),
        message = CASE WHEN over THEN NULL ELSE message END,
        due = CASE WHEN over THEN NULL WHEN wait IS NULL THEN due ELSE now() + make_interval(secs => wait) END,
        ended = CASE WHEN over THEN now() END,
        lease = CASE WHEN NOT over AND wait IS NULL THEN clock_timestamp() + make_interval(secs => %(lease)s) END,
        holder = CASE WHEN NOT over AND wait IS NULL THEN holder END
    FROM unnest(%(id)s::text[], %(taken)s::int[], %(state)s::json[], %(wait)s::float8[], %(over)s::bool[])
        AS new (id, taken, state, wait, over)
    WHERE one.id = new.id AND one.taken = new.taken AND one.holder = %(holder)s RETURNING one.id"""
_FORGET: Final = """DELETE FROM smtpretry_deliveries WHERE ctid = ANY(ARRAY(
    SELECT ctid FROM smtpretry_deliveries WHERE ended < now() - %(keep)s::interval ORDER BY ended LIMIT 1000))"""
FREE: Final = "(lease IS NULL OR lease <= now())"  # no worker has it, or a dead one
_COUNT: Final = f"""SELECT
    count(*) FILTER (WHERE due > now() AND {FREE}), count(*) FILTER (WHERE due <= now() AND {FREE}),
    count(*) FILTER (WHERE lease > now()), count(*) FILTER (WHERE ended IS NOT NULL),
    coalesce(extract(epoch FROM now() - min(due) FILTER (WHERE due <= now() AND {FREE})), 0)::float8
    FROM smtpretry_deliveries WHERE queue = coalesce(%(queue)s, queue)"""

_PASSING: Final = psycopg.OperationalError, psycopg.errors.ReadOnlySqlTransaction


async def prepare(connection: psycopg.AsyncConnection[Any]) -> None:
    """Make the tables where there are none; the transaction is the caller's.

    Raises:
        ValueError: they are of a later version.
        psycopg.Error: they cannot be made; a note says what to do.
    """
    found = await connection.execute("SELECT to_regclass('smtpretry_schema')")
    if None in (await found.fetchone() or (None,)):
        try:
            await connection.execute(_TABLES)
        except psycopg.Error as error:
            error.add_note("smtpretry: start one worker alone, with a role that may make tables here")
            raise
    try:
        row = await (await connection.execute("SELECT max(version) FROM smtpretry_schema")).fetchone()
    except psycopg.errors.InsufficientPrivilege as error:
        tables = "smtpretry_deliveries, smtpretry_servers, smtpretry_schema"
        error.add_note(f"smtpretry: GRANT SELECT, INSERT, UPDATE, DELETE ON {tables} to this role")
        raise
    if row is not None and row[0] > VERSION:
        msg = f"the queue is of version {row[0]}, this smtpretry knows {VERSION}: upgrade smtpretry here, too"
        raise ValueError(msg)


async def insert(connection: psycopg.AsyncConnection[Any], queue: str, delivery: Delivery) -> None:
    """Take a delivery over, unless one of its name is there. Its workers are woken at the commit.

    Raises:
        TakenIdError: another message has its name, or it is in another queue, whose workers know nothing of this one.
    """
    delivery = by_the_time_of_day(delivery)
    values = {
        "id": delivery.id,
        "queue": queue,
        "envelope": envelope_of(delivery),
        "message": zlib.compress(delivery.message, 1),
        "wait": max(0.0, (delivery.next_at or 0.0) - time.time()),  # not the time of day: the database may have another
        "state": json.dumps(delivery.state()),
    }
    cursor = connection.cursor(row_factory=tuple_row)  # the connection may be the application's, with rows as it likes
    found = None
    while found is None:  # as where another transaction has stored that id meanwhile
        found = await (await cursor.execute(_SUBMIT, values)).fetchone()
    is_here, where, *there, _ = found
    if not is_here:
        msg = f"the id {delivery.id!r} is taken by the queue {where!r} of the same database: name it otherwise"
        raise TakenIdError(msg)
    if None not in there:
        check_is_same(delivery, *there)


async def count(connection: psycopg.AsyncConnection[Any], queue: str | None) -> Progress:
    """How many deliveries there are."""
    row = await (await connection.execute(_COUNT, {"queue": queue})).fetchone()
    return Progress(*row or (0, 0, 0, 0))


@contextlib.asynccontextmanager
async def statement(connect: Connect) -> AsyncIterator[psycopg.AsyncConnection[Any]]:
    """A connection on which each statement is a transaction of its own."""
    async with connect() as connection:
        before = connection.autocommit
        await connection.set_autocommit(True)
        try:
            yield connection
        finally:
            try:
                await connection.set_autocommit(before)
            except psycopg.Error:  # it is lost, or in the midst of something
                await connection.close()


class Store:
    """The tables, as one worker sees them.

    Args:
        connect: lends a connection.
        listen: calls back with what comes on the channel, until it is cancelled, or the database is away.
        queue: the name of the queue.
        lease: seconds without a heartbeat after which a worker counts as dead.
        grace: seconds that attempts under way get to finish.
        concurrency: how many deliveries a worker sends at a time.
        poll: seconds between two looks where nobody says that there is something.
        keep: how long an ended delivery is kept.
        clock: what the pause of a server is told by.
    """

    def __init__(
        self,
        connect: Connect,
        listen: Listen,
        *,
        queue: str,
        lease: float,
        grace: float,
        concurrency: int,
        poll: float,
        keep: timedelta,
        clock: Callable[[], float],
    ) -> None:
        self._connect, self._listen, self._clock = connect, listen, clock
        self.name = self._queue = queue
        self.lease, self.grace, self.concurrency = lease, grace, concurrency
        self._poll, self._keep = poll, keep
        self._holder = uuid.uuid4()
        self._changes = _Together(self._write)
        self._calm = True
        self._in_vain = False  # whether its last look failed

    @contextlib.asynccontextmanager
    async def listening(self, wake: Callable[[], None]) -> AsyncIterator[None]:
        """See `Store`."""

        def heard(queue: str) -> None:
            if queue == self._queue:
                wake()

        async def listen() -> None:
            while True:
                with contextlib.suppress(psycopg.Error, QueueError):
                    await self._listen(heard)
                await asyncio.sleep(self._poll)

        ear = asyncio.ensure_future(listen())
        try:
            yield
        finally:
            await broken_off(ear, *self._changes.under_way)

    async def take(self, room: int, wants: Mapping[str, Wants], those: Sequence[Taken]) -> Batch:
        """See `Store`. While the database was away, no worker could say that it lives."""
        if self._in_vain:
            with _told():
                async with statement(self._connect) as own:
                    await own.execute(_SPARE, {"lease": self.lease, "queue": self._queue})
        self._in_vain = True
        batch = await self._look(room, wants, those)
        self._in_vain = False
        return batch

    async def _look(self, room: int, wants: Mapping[str, Wants], those: Sequence[Taken]) -> Batch:
        servers = list(wants)
        values = {"holder": self._holder, "lease": self.lease, "queue": self._queue, "room": room, "servers": servers}
        values["those"] = [one.name for one in those]
        with _told():
            if not servers or self._calm:
                async with statement(self._connect) as own:
                    if not servers or not (await own.execute(_TROUBLE, values)).rowcount:
                        taken, wait = await self._take(own, values)
                        return Batch(taken, wait, [Known(Pause())] * len(servers))
            async with self._connect() as own, own.transaction():
                rows = {name: row for name, *row in await (await own.execute(_SERVERS, values)).fetchall()}
                may = leaves([rows.get(name) for name in servers], self._clock(), room, wants.values())
                self._calm = not any(one.pause.failures or one.pace for one in may.each)
                taken, wait = await self._take(own, values | {"room": may.room})
                for server, row in zip(servers, may.rows(len(taken)), strict=True):
                    if row is not None:
                        await own.execute(_TRIED, (*row, server))
                if may.wait is not None and len(taken) == may.room:
                    wait = min(may.wait, self._poll)
                return Batch(taken, wait, may.known(len(taken)))

    async def _take(self, own: psycopg.AsyncConnection[Any], values: dict[str, Any]) -> tuple[list[Taken], float]:
        rows = await (await own.execute(TAKE, values)).fetchall() if values["room"] else []
        taken = [
            Taken(name, envelope, state, message and zlib.decompress(message), number, died)
            for name, envelope, state, message, number, died in rows
        ]
        if len(taken) == values["room"]:
            return taken, self._poll
        row = await (await own.execute(_NEXT, values)).fetchone()
        return taken, min(row[0], self._poll) if row else self._poll

    async def write(self, one: Taken, change: Change) -> bool:
        """See `Store`."""
        return await self._changes.add((one, change))

    async def _write(self, changes: Sequence[tuple[Taken, Change]]) -> list[bool]:
        values = {
            "id": [one.name for one, _ in changes],
            "taken": [one.taken for one, _ in changes],
            "state": [change.state for _, change in changes],
            "wait": [change.wait for _, change in changes],
            "over": [change.over for _, change in changes],
            "holder": self._holder,
            "lease": self.lease,
        }
        with _told((psycopg.Error,)):  # whatever it is: what the server has accepted must not be forgotten
            async with statement(self._connect) as own:
                written = {name for (name,) in await (await own.execute(_WRITE, values)).fetchall()}
        return [one.name in written for one, _ in changes]

    async def beat(self, those: Sequence[Taken]) -> None:
        """See `Store`."""
        await self._write([(one, Change(None)) for one in those])
        with _told():
            async with statement(self._connect) as own:
                await own.execute(_FORGET, {"keep": self._keep})

    async def tell(self, server: str, pause: Pause | None, paced: Paced | None) -> None:
        """See `Store`."""
        self._calm, values = False, {"servers": [server]}
        with _told():
            async with self._connect() as own, own.transaction():
                await own.execute(_NEW, values)
                row = await (await own.execute(_SERVERS, values)).fetchone() or ()
                await own.execute(_TELL, (*told(row[1:], pause, paced), server))

    async def progress(self) -> Progress:
        """See `Store`."""
        with _told():
            async with statement(self._connect) as own:
                return await count(own, self._queue)


class _Together:
    """Changes that come while others are being written are written together, as soon as those are."""

    def __init__(self, write: Callable[[Sequence[tuple[Taken, Change]]], Awaitable[list[bool]]]) -> None:
        self._write = write
        self._waiting = list[tuple[tuple[Taken, Change], asyncio.Future[bool]]]()
        self.under_way = list[asyncio.Future[None]]()  # one, if any

    async def add(self, change: tuple[Taken, Change]) -> bool:
        """Write it; what `write` says of it."""
        done: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._waiting.append((change, done))
        if all(one.done() for one in self.under_way):
            self.under_way = [asyncio.ensure_future(self._write_all())]
        return await done

    async def _write_all(self) -> None:
        while self._waiting:
            changes, self._waiting = [one for one in self._waiting if not one[1].done()], []
            try:
                results: Sequence[bool | BaseException] = await self._write([change for change, _ in changes])
            except BaseException as error:  # noqa: BLE001 - all who wait are told
                results = [error] * len(changes)
            for (_, done), result in zip(changes, results, strict=True):
                if not done.done():
                    done.set_exception(result) if isinstance(result, BaseException) else done.set_result(result)


@contextlib.contextmanager
def _told(kinds: tuple[type[psycopg.Error], ...] = _PASSING) -> Any:  # noqa: ANN401 - a context
    """Say where the database cannot be used, which may be over in a while."""
    try:
        yield
    except PoolClosed:
        raise
    except kinds as error:
        said = str(error).partition("\n")[0]  # what follows may quote what was to be stored
        told = QueueError(f"the database cannot be used: {type(error).__name__}: {said}")
        told.passing = True
        raise told from error
