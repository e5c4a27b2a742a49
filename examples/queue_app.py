"""What the sending side and the worker share: the queue, the mail server, and the policy.

The queue is a file, mail.db in the temporary folder (QUEUE names another one). With DATABASE_URL, such as
postgresql:///mail, it is in that PostgreSQL, where processes of many machines reach it; it needs the extra
`procrastinate` then.
"""

import contextlib
import os
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import aiosmtplib

from smtpretry import Engine, RetryPolicy

PORT = int(os.environ.get("SMTP_PORT", "2525"))
DATABASE = os.environ.get("DATABASE_URL")

policy = RetryPolicy.queue()


@contextlib.asynccontextmanager
async def open_queue() -> AsyncIterator[Engine]:
    """Open the queue."""
    if DATABASE is None:
        from smtpretry.queues.sqlite import SQLiteEngine  # noqa: PLC0415 - the one that is used

        async with SQLiteEngine(os.environ.get("QUEUE", Path(tempfile.gettempdir()) / "mail.db")) as engine:
            yield engine
        return
    import procrastinate  # noqa: PLC0415

    from smtpretry.queues.procrastinate import ProcrastinateEngine  # noqa: PLC0415

    app = procrastinate.App(connector=procrastinate.PsycopgConnector(conninfo=DATABASE))
    async with app.open_async():
        yield ProcrastinateEngine(app)


def client() -> aiosmtplib.SMTP:
    """Return a client for the mail server."""
    return aiosmtplib.SMTP(hostname="127.0.0.1", port=PORT)
