"""procrastinate as the queue: jobs in PostgreSQL, and workers anywhere. Needs the extra ``procrastinate``.

One job is one delivery for its whole life: the job's arguments are `Delivery.to_dict`, and each save updates them in
place. What a worker writes about a job holds only as long as the job is its own (`_OURS`): one that was taken for dead,
and was not, changes nothing any more.
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
    from psycopg_pool import PoolClosed
except ImportError as error:
    _message = "this engine needs procrastinate and psycopg: pip install 'smtpretry[procrastinate]'"
    raise ImportError(_message, name=error.name) from error

from smtpretry import log
from smtpretry.delivery import Delivery
from smtpretry.errors import NotOurs
from smtpretry.policy import RetryPolicy

if TYPE_CHECKING:
    from collections.abc import Iterable

    from .engine import OnEnd, SupportsAttempt

_TASK = "smtpretry:attempt"
_OURS = """ WHERE id = %(id)s AND status = 'doing' AND attempts = %(attempts)s
    AND worker_id IS NOT DISTINCT FROM %(worker)s RETURNING id"""
_TO_DO = """status = (CASE WHEN abort_requested THEN 'aborted' ELSE 'todo' END)::procrastinate_job_status,
    abort_requested = false, attempts = attempts + 1, scheduled_at = %(retry_at)s"""
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
        self._manager = app.job_manager = _Manager(app.connector)
        self._come_again = _ComeAgain()
        self._work: tuple[SupportsAttempt, OnEnd | None] | None = None
        app.task(name=_TASK, queue=queue, pass_context=True, retry=self._come_again)(self._attempt)

    async def submit(self, delivery: Delivery, /, *, connection: psycopg.AsyncConnection[Any] | None = None) -> None:
        """See `Engine`. A `connection` is a psycopg.AsyncConnection to the same database; its owner commits."""
        if connection is None:
            async with self._connector.pool.connection() as own, own.transaction():
                return await self.submit(delivery, connection=own)
        if not isinstance(connection, psycopg.AsyncConnection):
            msg = f"connection is a psycopg.AsyncConnection, not {type(connection).__name__}"
            raise TypeError(msg)
        lock = f"smtpretry:{delivery.id}"
        await connection.execute("SELECT pg_advisory_xact_lock(hashtextextended(%s, 0))", [lock])
        known = await connection.execute("SELECT FROM procrastinate_jobs WHERE lock = %s", [lock])
        if not known.rowcount:
            when = datetime.fromtimestamp(delivery.next_at, UTC) if delivery.next_at else None
            job = Job(task_name=_TASK, queue=self._queue, lock=lock, queueing_lock=None, scheduled_at=when)
            await self._manager.defer_job_async(job.evolve(task_kwargs=delivery.to_dict()), connection=connection)
        return None

    async def work(self, smtp: SupportsAttempt, /, *, on_end: OnEnd | None = None) -> None:
        """See `Engine`. Ends with SIGINT or SIGTERM, or where the database stays away: then start it again."""
        self._work, self._come_again.policy = (smtp, on_end), smtp.policy
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
        delivery = Delivery.from_dict(stored.args)

        async def save(delivery: Delivery) -> None:
            if not await self._manager.update(context.job, "args = args || %(state)s", state=delivery.state()):
                raise NotOurs

        try:
            await smtp.attempt(delivery, save)
        finally:
            await save(delivery)
        if delivery.next_at is not None:
            raise _Again(delivery.next_at - smtp.policy.clock())
        if on_end is not None and (delivery.refused or delivery.uncertain):
            await on_end(delivery)


class _Again(Exception):  # noqa: N818 - not an error: procrastinate's way to come again
    def __init__(self, wait: float) -> None:
        super().__init__(f"in {wait:.0f} s")
        self.wait = wait


class _ComeAgain(procrastinate.BaseRetryStrategy):
    """When a job comes again that ended by raising. It always does: a job ends by returning."""

    policy = RetryPolicy.queue()

    def get_retry_decision(self, *, exception: BaseException, job: Job) -> procrastinate.RetryDecision:
        match exception:
            case _Again():
                wait = exception.wait
            case asyncio.CancelledError() | NotOurs():  # the worker stops, or it is not its own to decide
                wait = 0.0
            case _:
                wait = self.policy.backoff(attempt=job.attempts + 1, elapsed=0.0)
                why = type(exception).__name__
                log.say(
                    logging.ERROR, "smtp job %s: %s; comes again in %.0f s", job.id, why, wait, job=job.id, wait=wait
                )
        return procrastinate.RetryDecision(retry_at=datetime.now(UTC) + timedelta(seconds=max(wait, _PAUSE)))


class _Stored:
    """A job's arguments, which procrastinate would write into its logs."""

    def __init__(self, args: dict[str, Any]) -> None:
        self.args = args

    def __repr__(self) -> str:
        return "<not shown>"


class _Manager(JobManager):
    """procrastinate's own writes to a job by its number alone, whoever has it."""

    async def fetch_job(self, queues: Iterable[str] | None, worker_id: int) -> Job | None:
        job = await super().fetch_job(queues, worker_id)
        if job is not None and job.task_name == _TASK:
            return job.evolve(task_kwargs={"stored": _Stored(job.task_kwargs)})
        return job

    async def retry_job(self, job: Job, retry_at: datetime | None = None, **others: Any) -> None:  # type: ignore[override]
        if job.task_name == _TASK:
            await self.update(job, _TO_DO, retry_at=retry_at)
        else:
            await super().retry_job(job, retry_at, **others)

    async def finish_job(self, job: Job, status: Status, delete_job: bool) -> None:  # noqa: FBT001 - procrastinate's
        if job.task_name == _TASK and not delete_job:
            await self.update(job, "status = %(status)s, args = args - 'message'", status=status.value)
        else:
            await super().finish_job(job, status, delete_job)

    async def update(self, job: Job, change: LiteralString, **values: Any) -> bool:
        """Change a job as long as it is this worker's: False where it is not. Waits for a database that is away."""
        ours = {"id": job.id, "worker": job.worker_id, "attempts": job.attempts}
        while True:
            try:
                query = f"UPDATE procrastinate_jobs SET {change}{_OURS}"  # noqa: S608 - texts of this module
                return bool(await self.connector.execute_query_all_async(query, **ours, **values))
            except ConnectorException as error:
                away = error.__cause__
                if not isinstance(away, psycopg.OperationalError) or isinstance(away, PoolClosed):
                    raise
                why = type(away).__name__
                log.say(logging.WARNING, "smtp job %s: the database is away: %s", job.id, why, job=job.id)
            await asyncio.sleep(_PAUSE)
