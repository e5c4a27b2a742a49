"""What the sending side and the worker share: the database, the queue in it, the mail server, and the policy.

DATABASE_URL says where the database is, such as postgresql:///mail; without it libpq's own variables do (PGHOST ...).
"""

import os

import aiosmtplib
import procrastinate

from smtpretry import RetryPolicy
from smtpretry.queues.procrastinate import ProcrastinateEngine

PORT = int(os.environ.get("SMTP_PORT", "2525"))

app = procrastinate.App(connector=procrastinate.PsycopgConnector(conninfo=os.environ.get("DATABASE_URL", "")))
engine = ProcrastinateEngine(app)
policy = RetryPolicy.queue()


def client() -> aiosmtplib.SMTP:
    """Return a client for the mail server."""
    return aiosmtplib.SMTP(hostname="127.0.0.1", port=PORT)
