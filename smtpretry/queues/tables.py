"""A look into a queue in PostgreSQL from outside, and a hand on what waits in it: `opened_tables`."""

from __future__ import annotations

import contextlib
import time
import zlib
from typing import TYPE_CHECKING, Any, Final

import psycopg

from . import postgres
from .servers import ALL, left_alone
from .stored import Stored, delivery_of, due_now, like

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from .engine import Pause, Progress

# ruff: noqa: S608 - the statements are put together from texts of this module
_NAMED: Final = """CASE WHEN ended IS NOT NULL THEN 'ended' WHEN lease > now() THEN 'working'
    WHEN due <= now() THEN 'due' ELSE 'waiting' END"""
_QUERY: Final = f"""SELECT envelope::text, state::text, {_NAMED},
    extract(epoch FROM due)::float8 FROM smtpretry_deliveries"""
_FIND: Final = f"""{_QUERY} WHERE (%(state)s::text IS NULL OR {_NAMED} = %(state)s)
    AND (%(to)s::text IS NULL OR EXISTS (
        SELECT 1 FROM json_object_keys(state -> 'outcomes') AS who WHERE who ILIKE %(to)s ESCAPE '!'))
    ORDER BY due NULLS LAST, ended DESC, id LIMIT %(limit)s"""
_GET: Final = f"{_QUERY.replace(' FROM smtpretry', ', message FROM smtpretry')} WHERE id = %s"
_FREE: Final = f"WHERE id = %s AND ended IS NULL AND {postgres.FREE}"
_LOCK: Final = f"SELECT envelope::text, state::text FROM smtpretry_deliveries {_FREE} FOR UPDATE"
_RETRY: Final = f"""WITH one AS (UPDATE smtpretry_deliveries SET due = now(), state = %s WHERE id = %s RETURNING queue)
    SELECT pg_notify('{postgres.CHANNEL}', queue) FROM one"""
_NO_PAUSE: Final = """UPDATE smtpretry_servers SET until = 0 WHERE name = ANY(ARRAY(
    SELECT name FROM smtpretry_servers WHERE until > 0 ORDER BY name FOR UPDATE))"""  # in the order of a worker's look
_DROP: Final = f"DELETE FROM smtpretry_deliveries {_FREE}"


@contextlib.asynccontextmanager
async def opened_tables(conninfo: str) -> AsyncIterator[TableShelf]:
    """Open the queues of a database.

    Raises:
        OSError: the database is away, or refuses.
        ValueError: there is no queue in it.
    """
    try:
        async with await psycopg.AsyncConnection.connect(
            conninfo, autocommit=True, client_encoding="utf8"
        ) as connection:
            found = await (await connection.execute("SELECT to_regclass('smtpretry_deliveries')")).fetchone()
            if found == (None,):
                msg = "there is no queue in that database: a worker makes it, with what smtpretry 0.1 has queued"
                raise ValueError(msg)
            yield TableShelf(connection)
    except psycopg.Error as error:
        raise OSError(str(error).strip()) from error


class TableShelf:
    """All queues in a PostgreSQL database."""

    def __init__(self, connection: psycopg.AsyncConnection[Any]) -> None:
        self._connection = connection

    async def find(self, *, state: str | None, limit: int, to: str | None = None) -> list[Stored]:
        """See `Shelf`."""
        found = await self._connection.execute(_FIND, {"state": state, "limit": limit, "to": to and like(to)})
        return [Stored(delivery_of(*row[:2]), *row[2:]) for row in await found.fetchall()]

    async def get(self, name: str) -> Stored | None:
        """See `Shelf`."""
        row = await (await self._connection.execute(_GET, [name])).fetchone()
        if row is None:
            return None
        envelope, state, named, due, message = row
        return Stored(delivery_of(envelope, state, zlib.decompress(message) if message else b""), named, due)

    async def retry(self, name: str) -> bool:
        """See `Shelf`."""
        async with self._connection.transaction():
            row = await (await self._connection.execute(_LOCK, [name])).fetchone()
            if row is not None:
                await self._connection.execute(_NO_PAUSE)
                await self._connection.execute(_RETRY, [due_now(*row), name])
            return row is not None

    async def drop(self, name: str) -> bool:
        """See `Shelf`."""
        return bool((await self._connection.execute(_DROP, [name])).rowcount)

    async def progress(self) -> Progress:
        """See `Shelf`."""
        return await postgres.count(self._connection, None)

    async def left_alone(self) -> dict[str, Pause]:
        """See `Shelf`."""
        found = await self._connection.execute(ALL)
        return left_alone(await found.fetchall(), time.time())
