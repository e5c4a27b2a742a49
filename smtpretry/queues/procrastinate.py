"""PostgreSQL as the queue, and workers anywhere: in the database of a procrastinate app. Needs the extra of that name.

The app lends its connections. Deliveries lie in a table of their own (see `postgres`): a procrastinate job is written
anew with each change of its status, together with a log of those.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final

try:
    import procrastinate
    import psycopg
    from procrastinate.exceptions import ConnectorException, ProcrastinateException
    from psycopg.rows import tuple_row
    from psycopg_pool import PoolTimeout

    from . import legacy, postgres
except ImportError as error:
    _message = "this engine needs procrastinate and psycopg: pip install 'smtpretry[procrastinate]'"
    raise ImportError(_message, name=error.name) from error

from smtpretry import log

from .engine import QueueError, type_of
from .worker import Worker, broken_off, check_worker

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from smtpretry.delivery import Delivery

    from .engine import OnEnd, OnProgress, Progress, SupportsAttempt

_SOON: Final = 0.5  # seconds in which a pool lends a connection, unless it has none, or none that works
_TAKE_OVER: Final = 60.0  # seconds between two looks for what smtpretry 0.1 has queued


class ProcrastinateEngine:
    """An `Engine` in the database of a procrastinate app, which the application opens and closes.

    The tables are made when it is first used. What smtpretry 0.1 has queued there is taken over by the first worker.

    Args:
        app: the app; its connector is a `PsycopgConnector`.
        queue: the name of the queue.
        stalled_after: seconds without a heartbeat after which a worker is taken for dead; at least two.
        concurrency: how many deliveries a worker takes at a time. Those beyond its client's connections wait for one,
            and no other worker gets them meanwhile.
        keep: how long an ended delivery is kept, without its message. Until then its id is not taken again.
        fetch_job_polling_interval: seconds between two looks into the database where nobody says that something is due:
            where LISTEN does not work, and for what a dead worker had.
        shutdown_graceful_timeout: seconds that attempts under way get if a worker is stopped; None for `stalled_after`.
        install_signal_handlers: whether SIGINT and SIGTERM end `work`.
        others: other options of `procrastinate.App.run_worker_async`, which have no effect.

    Raises:
        TypeError: the app has another connector.
        ValueError: `stalled_after` or `concurrency` is too small.
    """

    def __init__(
        self,
        app: procrastinate.App,
        queue: str = "smtpretry",
        *,
        stalled_after: float = 30.0,
        concurrency: int = 10,
        keep: timedelta = timedelta(days=7),
        fetch_job_polling_interval: float = 5.0,
        shutdown_graceful_timeout: float | None = None,
        install_signal_handlers: bool = True,
        **others: Any,  # noqa: ANN401, ARG002 - procrastinate's
    ) -> None:
        if not isinstance(app.connector, procrastinate.PsycopgConnector):
            msg = f"the app needs a PsycopgConnector, it has {type(app.connector).__name__}"
            raise TypeError(msg)
        check_worker("stalled_after", stalled_after, concurrency)
        self.app, self._connector, self._queue, self._stalled_after = app, app.connector, queue, stalled_after
        self._concurrency, self._keep, self._poll = concurrency, keep, fetch_job_polling_interval
        self._grace = stalled_after if shutdown_graceful_timeout is None else shutdown_graceful_timeout
        self._signals = install_signal_handlers
        self._has_tables = self._is_direct = False

    async def submit(self, delivery: Delivery, /, *, connection: psycopg.AsyncConnection[Any] | None = None) -> None:
        """See `Engine`. A `connection` is a psycopg.AsyncConnection to the same database; its owner commits.

        Raises:
            QueueError: the database is away, or the app is not open; nothing was taken over.
            TypeError: `connection` is none of psycopg's.
            ValueError: another queue of this database has a delivery of that id.
        """
        if connection is None:
            while True:
                async with self._storing() as own:
                    with suppress(psycopg.errors.SerializationFailure):  # by the role's default isolation
                        await postgres.insert(own, self._queue, delivery)
                        return
        elif isinstance(connection, psycopg.AsyncConnection):
            await self._make_tables()
            await postgres.insert(connection, self._queue, delivery)
        else:
            msg = f"connection is a psycopg.AsyncConnection, not {type_of(connection)}"
            raise TypeError(msg)

    async def has(self, delivery_id: str, /) -> bool:
        """Whether it has taken the delivery over, and not forgotten it since (`keep`)."""
        await self._make_tables()
        async with self._connect() as own:
            found = await own.execute(
                "SELECT 1 FROM smtpretry_deliveries WHERE id = %s AND queue = %s", [delivery_id, self._queue]
            )
            return bool(found.rowcount)

    async def progress(self) -> Progress:
        """How many deliveries there are."""
        await self._make_tables()
        async with self._connect() as own:
            return await postgres.count(own, self._queue)

    async def work(
        self, smtp: SupportsAttempt, /, *, on_end: OnEnd | None = None, on_progress: OnProgress | None = None
    ) -> None:
        """See `Engine`. SIGINT or SIGTERM ends it, in good order. While the database is away, it waits.

        Where the database is away at the beginning, that is raised, for the address may be wrong.
        A second signal breaks off what is under way. A signal handler of the application's is called, too. In a task of
        its own, it is the worker alone that a signal ends: end what runs beside it when `work` returns.

        Args:
            smtp: the client to send with.
            on_end: see `Engine`.
            on_progress: called every minute with the number of deliveries that are waiting, due, under way and ended;
                the log says it, too.

        Raises:
            TypeError: `smtp` cannot make attempts.
            ClientClosed: `smtp` was closed; what it did not send stays due.
        """
        await self._make_tables()
        store = postgres.Store(
            self._connect,
            self._listen,
            queue=self._queue,
            lease=self._stalled_after,
            grace=self._grace,
            concurrency=self._concurrency,
            poll=min(self._poll, self._stalled_after / 3),
            keep=self._keep,
            clock=smtp.policy.clock,
        )
        taking_over = asyncio.ensure_future(self._take_over())
        try:
            await Worker(store, smtp, on_end, on_progress).run(signals=self._signals)
        finally:
            await broken_off(taking_over)

    @asynccontextmanager
    async def _connect(self) -> AsyncIterator[psycopg.AsyncConnection[Any]]:
        async with self._lent() as own:
            before = own.row_factory, own.prepare_threshold
            own.row_factory = tuple_row
            if not self._is_direct:  # behind a PgBouncer, another session has what this one has prepared
                own.prepare_threshold = None
            try:
                if own.info.encoding == "ascii":  # an SQL_ASCII database: its texts would come as bytes
                    await own.execute("SET client_encoding = 'UTF8'")
                    await own.commit()
                yield own
            except psycopg.errors.ReadOnlySqlTransaction:  # a standby, after a failover: connect anew
                await own.close()
                raise
            finally:
                own.row_factory, own.prepare_threshold = before

    @asynccontextmanager
    async def _lent(self) -> AsyncIterator[psycopg.AsyncConnection[Any]]:
        """A connection of the pool. Where it finds dead ones, it waits before the next: have all replaced at once.

        After a restart of the database, or a night of idleness behind a firewall, all of them are dead.
        """
        pool = self._connector.pool
        try:
            own = await pool.getconn(min(_SOON, pool.timeout))
        except PoolTimeout:
            await pool.check()
            own = await pool.getconn()
        try:
            async with own:
                yield own
        finally:
            await pool.putconn(own)

    @asynccontextmanager
    async def _storing(self) -> AsyncIterator[psycopg.AsyncConnection[Any]]:
        """A connection to store with. If there is none, nothing was stored."""
        async with AsyncExitStack() as stack:
            try:
                await self._make_tables()
                own = await stack.enter_async_context(postgres.statement(self._connect))
            except (psycopg.Error, ProcrastinateException) as error:
                said = "; ".join([str(error).strip(), *getattr(error, "__notes__", ())])
                told = QueueError(f"the queue cannot be used: {type(error).__name__}: {said}")
                told.untouched = True
                raise told from error
            yield own

    async def _make_tables(self) -> None:
        if not self._has_tables:
            async with self._connect() as own:
                await postgres.prepare(own)
                pid = await (await own.execute("SELECT pg_backend_pid()")).fetchone()
                self._is_direct = pid == (own.info.backend_pid,)
            self._has_tables = True

    async def _listen(self, heard: Callable[[str], None]) -> None:
        async def call(*, channel: str, payload: str) -> None:  # noqa: ARG001 - its signature
            heard(payload)

        try:
            await self._connector.listen_notify(call, [postgres.CHANNEL])
        except ConnectorException as error:
            raise QueueError(type(error).__name__) from error

    async def _take_over(self) -> None:
        """Take over what smtpretry 0.1 has queued, and goes on to queue where it is still in use."""
        while True:
            try:
                async with postgres.statement(self._connect) as own:
                    await legacy.take_over(own, self._queue, self._stalled_after)
            except psycopg.Error as error:
                log.say(logging.WARNING, "smtp queue: jobs of smtpretry 0.1 stay: %s", type(error).__name__)
            await asyncio.sleep(_TAKE_OVER)
