"""What smtpretry 0.1 has queued: a procrastinate job for each delivery. They move into the table of the queue."""

from __future__ import annotations

import logging
import zlib
from typing import TYPE_CHECKING, Any, Final

from smtpretry import log
from smtpretry.delivery import Delivery

from . import postgres

if TYPE_CHECKING:
    from collections.abc import Sequence

    import psycopg

_SOME: Final = 10  # jobs in one transaction
_JOBS: Final = """SELECT job.id, job.args, job.status::text{message} FROM procrastinate_jobs AS job{messages}
    LEFT JOIN procrastinate_workers AS worker ON worker.id = job.worker_id
    WHERE job.queue_name = %(queue)s AND job.task_name = 'smtpretry:attempt' AND job.id > %(after)s AND (
        job.status IN ('todo', 'succeeded') OR job.status = 'doing' AND coalesce(
            worker.last_heartbeat < now() - make_interval(secs => %(lease)s), true))
    ORDER BY job.id LIMIT %(some)s FOR UPDATE OF job SKIP LOCKED"""
_PLAIN: Final = {"message": ", NULL", "messages": ""}
_APART: Final = {  # as a version between them stored it
    "message": ", apart.message",
    "messages": " LEFT JOIN smtpretry_messages AS apart ON apart.job_id = job.id",
}
_ENDED: Final = """UPDATE smtpretry_deliveries SET due = NULL, message = NULL, ended = now()
    WHERE id = %s AND queue = %s AND taken = 0"""
_DIED: Final = (
    """UPDATE smtpretry_deliveries SET holder = gen_random_uuid() WHERE id = %s AND queue = %s AND taken = 0"""
)


async def take_over(connection: psycopg.AsyncConnection[Any], queue: str, lease: float) -> None:
    """Move the jobs that no worker of that version has; those that cannot be read stay."""
    found = await connection.execute("SELECT to_regclass('procrastinate_jobs'), to_regclass('smtpretry_messages')")
    jobs, messages = await found.fetchone() or (None, None)
    after = -1 if jobs else None
    while after is not None:
        async with connection.transaction():
            query = _JOBS.format(**_APART if messages else _PLAIN)
            values = {"queue": queue, "after": after, "lease": lease, "some": _SOME}
            rows = await (await connection.execute(query.encode(), values)).fetchall()
            for row in rows:
                await _move(connection, queue, row)
            after = rows[-1][0] if rows else None


async def _move(connection: psycopg.AsyncConnection[Any], queue: str, row: Sequence[Any]) -> None:
    number, args, status, message = row
    try:
        delivery = Delivery.from_dict({"message": ""} | args)
        delivery.message = zlib.decompress(message) if message else delivery.message
        await postgres.insert(connection, queue, delivery)
    except (TypeError, ValueError, zlib.error) as error:
        log.say(logging.ERROR, "smtp job %s: %s; it stays a job", number, type(error).__name__, job=number)
        return
    if status != "todo":
        await connection.execute(_ENDED if status == "succeeded" else _DIED, (delivery.id, queue))
    await connection.execute("DELETE FROM procrastinate_jobs WHERE id = %s", [number])
