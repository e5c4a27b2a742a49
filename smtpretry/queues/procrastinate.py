"""procrastinate as the queue: jobs in PostgreSQL, and workers anywhere. Needs the extra ``procrastinate``.

One job is one delivery for its whole life: the job's arguments are its envelope and its state, which each save updates
in place; its message is a row of a table of ours, written once. What a worker writes about a job holds only as long as
the job is its own (`_OURS`): one that was taken for dead, and was not, changes nothing any more.
"""

# ruff: noqa: ANN401 - arguments that are procrastinate's

from __future__ import annotations

import asyncio
import contextlib
import logging
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, LiteralString

try:
    import procrastinate
    import psycopg
    from procrastinate.exceptions import ConnectorException
    from procrastinate.jobs import Job, Status
    from procrastinate.manager import JobManager
    from psycopg.types.json import Jsonb
    from psycopg_pool import PoolClosed
except ImportError as error:
    _message = "this engine needs procrastinate and psycopg: pip install 'smtpretry[procrastinate]'"
    raise ImportError(_message, name=error.name) from error

from smtpretry import log
from smtpretry.delivery import Delivery
from smtpretry.policy import RetryPolicy

from .turn import Turn

if TYPE_CHECKING:
    from collections.abc import Iterable

    from .engine import OnEnd, SupportsAttempt

_TASK = "smtpretry:attempt"
_OURS = """ WHERE id = %(id)s AND status = 'doing' AND attempts = %(attempts)s
    AND worker_id IS NOT DISTINCT FROM %(worker)s RETURNING id"""
_TO_DO = """status = (CASE WHEN abort_requested THEN 'aborted' ELSE 'todo' END)::procrastinate_job_status,
    abort_requested = false, attempts = attempts + 1, scheduled_at = %(retry_at)s"""
_DUE = "coalesce(scheduled_at, '-infinity'::timestamptz)"
_TABLES = f"""
    SET LOCAL lock_timeout = '5s';
    SELECT pg_advisory_xact_lock(hashtextextended('smtpretry', 0));
    CREATE TABLE IF NOT EXISTS smtpretry_messages (job_id bigint PRIMARY KEY, message bytea NOT NULL);
    CREATE UNIQUE INDEX IF NOT EXISTS smtpretry_lock ON procrastinate_jobs (lock) WHERE task_name = '{_TASK}';
    CREATE INDEX IF NOT EXISTS smtpretry_due ON procrastinate_jobs (queue_name, ({_DUE}))
        WHERE status = 'todo' AND task_name = '{_TASK}';
"""
_SUBMIT = f"""WITH job AS (
        INSERT INTO procrastinate_jobs (queue_name, task_name, lock, args, scheduled_at)
        VALUES (%(queue)s, '{_TASK}', %(lock)s, %(args)s, %(at)s)
        ON CONFLICT (lock) WHERE task_name = '{_TASK}' DO NOTHING RETURNING id
    ) INSERT INTO smtpretry_messages SELECT id, %(message)s FROM job"""  # noqa: S608 - texts of this module
_FETCH = f"""UPDATE procrastinate_jobs AS job SET status = 'doing', worker_id = %(worker)s WHERE id = (
        SELECT id FROM procrastinate_jobs
        WHERE status = 'todo' AND task_name = '{_TASK}' AND queue_name = %(queue)s AND {_DUE} <= now()
        ORDER BY {_DUE} LIMIT 1 FOR UPDATE SKIP LOCKED
    ) RETURNING job.*, (SELECT message FROM smtpretry_messages WHERE job_id = job.id)"""  # noqa: S608 - the same
_END = f"""WITH ended AS (
        UPDATE procrastinate_jobs SET status = 'succeeded', abort_requested = false,
            args = (args || %(state)s) - 'message'{_OURS}
    ), gone AS (DELETE FROM smtpretry_messages USING ended WHERE job_id = ended.id) SELECT id FROM ended"""  # noqa: S608
_SAVE = f"UPDATE procrastinate_jobs SET args = args || %(state)s{_OURS}"  # noqa: S608
_AGAIN = f"UPDATE procrastinate_jobs SET {_TO_DO}, args = args || %(state)s{_OURS}"  # noqa: S608
_DELETE = "DELETE FROM procrastinate_jobs WHERE id = %(id)s AND status = 'succeeded'"
_PAUSE = 1.0  # seconds: the shortest wait of a job, and the time between two tries to reach the database


class ProcrastinateEngine:
    """An `Engine` in the database of a procrastinate app, which the application opens and closes.

    Args:
        app: the app; its connector is a `PsycopgConnector`. Its job manager is replaced by one that keeps deliveries
            out of procrastinate's logs, and lets a worker finish or retry a delivery only while it is its own.
        queue: the name of the queue. Workers that are started otherwise than by `work` must leave it alone.
        stalled_after: seconds without a heartbeat after which a worker is taken for dead; the app's other workers
            have one every ten seconds.
        options: those of `procrastinate.App.run_worker_async` for `work`, such as ``concurrency`` (here 10).

    Raises:
        TypeError: the app has another connector.
    """

    def __init__(
        self,
        app: procrastinate.App,
        queue: str = "smtpretry",
        *,
        stalled_after: float = 30.0,
        **options: Any,
    ) -> None:
        if not isinstance(app.connector, procrastinate.PsycopgConnector):
            msg = f"the app needs a PsycopgConnector, it has {type(app.connector).__name__}"
            raise TypeError(msg)
        self.app, self._connector, self._queue, self._stalled_after = app, app.connector, queue, stalled_after
        self._options: dict[str, Any] = {
            "queues": [queue],
            "concurrency": 10,
            "fetch_job_polling_interval": 1.0,
            "shutdown_graceful_timeout": stalled_after,
            "update_heartbeat_interval": min(stalled_after / 3, 10.0),
            "stalled_worker_timeout": stalled_after,
            **options,
        }
        self._manager = app.job_manager = _Manager(app.connector, queue)
        self._has_tables = False
        self._come_again = _ComeAgain()
        self._work: tuple[SupportsAttempt, OnEnd | None] | None = None
        app.task(name=_TASK, queue=queue, pass_context=True, retry=self._come_again)(self._attempt)

    async def submit(self, delivery: Delivery, /, *, connection: psycopg.AsyncConnection[Any] | None = None) -> None:
        """See `Engine`. A `connection` is a psycopg.AsyncConnection to the same database; its owner commits."""
        await self._make_tables()
        if connection is None:
            async with self._connector.pool.connection() as own, own.transaction():
                return await self.submit(delivery, connection=own)
        if not isinstance(connection, psycopg.AsyncConnection):
            msg = f"connection is a psycopg.AsyncConnection, not {type(connection).__name__}"
            raise TypeError(msg)
        args = {name: value for name, value in delivery.to_dict().items() if name != "message"}
        at = datetime.fromtimestamp(delivery.next_at, UTC) if delivery.next_at else None
        values = {"queue": self._queue, "lock": _lock(delivery.id), "args": Jsonb(args), "at": at}
        await connection.execute(_SUBMIT, values | {"message": delivery.message})
        return None

    async def has(self, delivery_id: str, /) -> bool:
        """Whether it has taken the delivery over; it has forgotten what was deleted from procrastinate's tables."""
        query = "SELECT 1 FROM procrastinate_jobs WHERE lock = %s AND task_name = %s"
        async with self._connector.pool.connection() as own:
            found = await own.execute(query, [_lock(delivery_id), _TASK])
            return bool(found.rowcount)

    async def _make_tables(self) -> None:
        """Make what stands beside procrastinate's tables, where it does not, as in a database of smtpretry 0.1."""
        if self._has_tables:
            return
        async with self._connector.pool.connection() as own:
            found = await own.execute("SELECT to_regclass('smtpretry_due'), to_regclass('smtpretry_lock')")
            if None in (await found.fetchone() or (None,)):
                try:
                    await own.execute(_TABLES)
                except psycopg.Error as error:
                    error.add_note("smtpretry: start one worker alone, with a role that may make tables here")
                    raise
        self._has_tables = True

    async def work(self, smtp: SupportsAttempt, /, *, on_end: OnEnd | None = None) -> None:
        """See `Engine`. Ends with SIGINT or SIGTERM, or where the database stays away: then start it again."""
        self._work, self._come_again.policy = (smtp, on_end), smtp.policy
        await self._make_tables()
        rescue = asyncio.create_task(self._rescue())
        try:
            await self.app.run_worker_async(**self._options)
        finally:
            rescue.cancel()

    async def _rescue(self) -> None:
        """Let the jobs of dead workers run again, now."""
        while True:
            with contextlib.suppress(ConnectorException):
                for job in await self._manager.get_stalled_jobs(
                    task_name=_TASK, seconds_since_heartbeat=self._stalled_after
                ):
                    log.say(logging.WARNING, "smtp job %s: its worker is gone; to be run again", job.id, job=job.id)
                    await self._manager.retry_job(job, retry_at=datetime.now(UTC))
            await asyncio.sleep(self._stalled_after / 3)

    async def _attempt(self, context: procrastinate.JobContext, stored: _Stored) -> None:
        if self._work is None:
            msg = "a worker for this queue is started with ProcrastinateEngine.work"
            raise RuntimeError(msg)
        smtp, on_end = self._work
        self._manager.settled.add(context.job.id or 0)
        await Turn(_Hold(self._manager, context.job, stored), smtp, on_end).take()


class _Hold:
    """A worker's hold on one job."""

    def __init__(self, manager: _Manager, job: Job, stored: _Stored) -> None:
        self._manager, self._job, self._stored = manager, job, stored
        self.name, self.number = f"job {job.id}", job.attempts + 1

    def load(self) -> Delivery:
        args, message = self._stored.args, self._stored.message
        if "message" in args:  # as smtpretry 0.1 stored it
            return Delivery.from_dict(args)
        delivery = Delivery.from_dict(args | {"message": ""})
        if message is None:
            msg = "the message is not in the queue any more"
            raise ValueError(msg)
        delivery.message = message
        return delivery

    async def save(self, delivery: Delivery, *, over: bool) -> bool:
        query = _END if over else _SAVE
        return await self._manager.change(self._job, query, state=delivery.state())

    async def again(self, delivery: Delivery | None, wait: float) -> None:
        at = datetime.now(UTC) + timedelta(seconds=max(wait, _PAUSE))
        state = {} if delivery is None else delivery.state()
        await self._manager.change(self._job, _AGAIN, retry_at=at, state=state)


class _ComeAgain(procrastinate.BaseRetryStrategy):
    """When a job comes again that ended by raising. It always does: a job ends by returning."""

    policy = RetryPolicy.queue()

    def get_retry_decision(self, *, exception: BaseException, job: Job) -> procrastinate.RetryDecision:  # noqa: ARG002 - its signature
        wait = self.policy.backoff(attempt=job.attempts + 1, elapsed=0.0)
        return procrastinate.RetryDecision(retry_at=datetime.now(UTC) + timedelta(seconds=max(wait, _PAUSE)))


class _Stored:
    """A job's arguments, which procrastinate would write into its logs."""

    def __init__(self, args: dict[str, Any], message: bytes | None) -> None:
        self.args, self.message = args, message

    def __repr__(self) -> str:
        return "<not shown>"


class _Manager(JobManager):
    """procrastinate's own writes to a job by its number alone, whoever has it."""

    def __init__(self, connector: procrastinate.PsycopgConnector, queue: str) -> None:
        super().__init__(connector)
        self._queue = queue
        self.settled = set[int]()  # jobs whose turn writes what is to be written

    async def fetch_job(self, queues: Iterable[str] | None, worker_id: int) -> Job | None:
        if queues is None or list(queues) != [self._queue]:
            return await super().fetch_job(queues, worker_id)
        rows = await self.connector.execute_query_all_async(_FETCH, worker=worker_id, queue=self._queue)
        if not rows:
            return None
        job = Job.from_row(rows[0])
        return job.evolve(task_kwargs={"stored": _Stored(job.task_kwargs, rows[0]["message"])})

    async def retry_job(self, job: Job, retry_at: datetime | None = None, **others: Any) -> None:  # type: ignore[override]
        if job.id in self.settled:
            self.settled.discard(job.id)
        elif job.task_name == _TASK:
            await self.change(job, _AGAIN, retry_at=retry_at, state={})
        else:
            await super().retry_job(job, retry_at, **others)

    async def finish_job(self, job: Job, status: Status, delete_job: bool) -> None:  # noqa: FBT001 - procrastinate's
        if job.task_name == _TASK:
            self.settled.discard(job.id or 0)
            if delete_job:
                await self.connector.execute_query_async(_DELETE, id=job.id)
        else:
            await super().finish_job(job, status, delete_job)

    async def change(self, job: Job, query: LiteralString, **values: Any) -> bool:
        """Change a job as long as it is this worker's: False where it is not. Waits for a database that is away."""
        ours = {"id": job.id, "worker": job.worker_id, "attempts": job.attempts}
        while True:
            try:
                return bool(await self.connector.execute_query_all_async(query, **ours, **values))
            except ConnectorException as error:
                away = error.__cause__
                if not isinstance(away, psycopg.OperationalError) or isinstance(away, PoolClosed):
                    raise
                why = type(away).__name__
                log.say(logging.WARNING, "smtp job %s: the database is away: %s", job.id, why, job=job.id)
            await asyncio.sleep(_PAUSE)


def _lock(delivery_id: str) -> str:
    return f"smtpretry:{delivery_id}"
