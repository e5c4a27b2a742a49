"""A look into a queue from outside, and a hand on what waits in it: `opened`."""

from __future__ import annotations

import contextlib
import sqlite3
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from .servers import ALL, left_alone
from .stored import Stored, delivery_of, due_now, like

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from .engine import Pause, Progress
    from .sqlite import SQLiteEngine

_QUERY = "SELECT envelope, state, due, holder FROM smtpretry_deliveries"
_WHERE = {
    None: "TRUE",
    "waiting": "due > :now AND holder IS NULL",
    "due": "due <= :now",  # a holder whose lease is over is dead
    "working": "due > :now AND holder IS NOT NULL",
    "ended": "due IS NULL",
}
_TO = """(:to IS NULL OR EXISTS (
    SELECT 1 FROM json_each(state, '$.outcomes') AS one WHERE one.key LIKE :to ESCAPE '!'))"""
_FREE = "id = :name AND due IS NOT NULL AND (holder IS NULL OR due <= :now)"


class Shelf(Protocol):
    """What can be done with a queue from outside."""

    async def find(self, *, state: str | None, limit: int, to: str | None = None) -> list[Stored]:
        """The deliveries, without their messages: those that are due first; `to` is a pattern with `*`."""

    async def get(self, name: str) -> Stored | None:
        """One, with its message where it has one still."""

    async def retry(self, name: str) -> bool:
        """Have one that waits tried now, also where its server is left alone; False where none of that name waits."""

    async def drop(self, name: str) -> bool:
        """Take one that waits out of the queue; False where none of that name does."""

    async def progress(self) -> Progress:
        """How many there are."""

    async def left_alone(self) -> dict[str, Pause]:
        """The servers that want nothing now, by their names."""


@contextlib.asynccontextmanager
async def opened(where: str) -> AsyncIterator[Shelf]:
    """Open a queue by its address.

    Raises:
        ValueError: it is no address of a queue, or there is no file of that name.
        OSError: it cannot be read.
    """
    kind, _, rest = where.partition(":")
    if kind == "sqlite" and rest:
        path = Path(rest.removeprefix("//"))
        _check(path)
        from .sqlite import SQLiteEngine  # noqa: PLC0415 - only where it is asked for

        async with SQLiteEngine(path) as engine:
            yield FileShelf(engine)
        return
    if kind in ("postgresql", "postgres"):
        try:
            from .tables import opened_tables  # noqa: PLC0415 - only where it is asked for
        except ImportError as error:
            msg = "a queue in PostgreSQL needs psycopg: pip install 'smtpretry[procrastinate]'"
            raise ImportError(msg, name=error.name) from error
        async with opened_tables(where) as shelf:
            yield shelf
        return
    shown = where if "@" not in where else f"{kind}:..."  # the rest may hold a password
    msg = f"{shown!r} is no address of a queue: sqlite:mail.db is one, and postgresql://host/database"
    raise ValueError(msg)


def _check(path: Path) -> None:
    """Make no queue of a file that is none, such as an application's own; whoever looks names the wrong one."""
    if not path.exists():
        msg = f"{path}: there is no such file"
        raise ValueError(msg)
    query = "SELECT 1 FROM sqlite_master WHERE name = 'smtpretry_schema'"
    with contextlib.suppress(sqlite3.Error):  # the engine says what it is
        with contextlib.closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as connection:
            found = connection.execute(query).fetchone()
        if found is None:
            msg = f"{path}: there is no queue in that file: an engine makes it"
            raise ValueError(msg)


class FileShelf:
    """An SQLite queue."""

    def __init__(self, engine: SQLiteEngine) -> None:
        self._engine = engine

    async def find(self, *, state: str | None, limit: int, to: str | None = None) -> list[Stored]:
        """See `Shelf`."""
        query = f"{_QUERY} WHERE {_WHERE[state]} AND {_TO} ORDER BY due IS NULL, due, number DESC LIMIT :limit"
        values = {"now": time.time(), "limit": limit, "to": to and like(to)}
        rows = await self._engine.file.look(lambda own: own.execute(query, values).fetchall())
        return [_stored(row) for row in rows]

    async def get(self, name: str) -> Stored | None:
        """See `Shelf`."""

        def work(own: sqlite3.Connection) -> Any:  # noqa: ANN401 - a row
            return own.execute(
                "SELECT envelope, state, due, holder, message FROM smtpretry_deliveries "
                "LEFT JOIN smtpretry_messages USING (number) WHERE id = ?",
                (name,),
            ).fetchone()

        row = await self._engine.file.look(work)
        return None if row is None else _stored(row[:4], row[4] or b"")

    async def retry(self, name: str) -> bool:
        """See `Shelf`."""

        def work(own: sqlite3.Connection) -> bool:
            row = own.execute(f"{_QUERY} WHERE {_FREE}", {"name": name, "now": time.time()}).fetchone()
            if row is None:
                return False
            own.execute(
                "UPDATE smtpretry_deliveries SET due = 0, state = ? WHERE id = ?", (due_now(row[0], row[1]), name)
            )
            own.execute("UPDATE smtpretry_servers SET until = 0")
            return True

        return await self._engine.file.transact(work)

    async def drop(self, name: str) -> bool:
        """See `Shelf`."""

        def work(own: sqlite3.Connection) -> bool:
            free, values = f"FROM smtpretry_deliveries WHERE {_FREE}", {"name": name, "now": time.time()}
            own.execute(f"DELETE FROM smtpretry_messages WHERE number IN (SELECT number {free})", values)  # noqa: S608 - ours
            return bool(own.execute(f"DELETE {free}", values).rowcount)

        return await self._engine.file.transact(work)

    async def progress(self) -> Progress:
        """See `Shelf`."""
        return await self._engine.progress()

    async def left_alone(self) -> dict[str, Pause]:
        """See `Shelf`."""
        rows = await self._engine.file.look(lambda own: own.execute(ALL).fetchall())
        return left_alone(rows, time.time())


def _stored(row: tuple[Any, ...], message: bytes = b"") -> Stored:
    envelope, state, due, holder = row
    named = "ended" if due is None else "due" if due <= time.time() else "working" if holder else "waiting"
    return Stored(delivery_of(envelope, state, message), named, due)
