"""The embedded queue in a Django project: its engine, and its part in a transaction."""

from __future__ import annotations

import functools
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from django.core.exceptions import ImproperlyConfigured
from django.db import connections

if TYPE_CHECKING:
    from collections.abc import Iterator

    from smtpretry.queues.sqlite import SQLiteEngine


@functools.cache
def engine(path: str) -> SQLiteEngine:
    """The engine of a file, one for the process."""
    try:
        from smtpretry.queues.sqlite import SQLiteEngine  # noqa: PLC0415 - few need it
    except ImportError as error:
        msg = f"the option queue needs smtpretry.queues.sqlite: {error}"
        raise ImproperlyConfigured(msg) from error
    return SQLiteEngine(path)


@contextmanager
def outbox(path: str | None) -> Iterator[Any]:
    """The connection to submit with, where a transaction is open on the file of the queue; else None."""
    for alias in connections if path else ():
        connection = connections[alias]
        own = connection.settings_dict["NAME"]
        if (
            connection.vendor == "sqlite"
            and connection.in_atomic_block
            and os.path.realpath(own) == os.path.realpath(path or "")
        ):
            connection.ensure_connection()
            with connection.wrap_database_errors:  # as for each statement of Django's own
                yield connection.connection
            return
    yield None
