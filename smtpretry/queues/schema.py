"""What is in an SQLite queue: its tables, and the statements on them. Each function here is one transaction's work."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final

from .engine import Progress
from .servers import COLUMNS, FAR, told
from .stored import by_the_time_of_day, envelope_of
from .worker import Taken

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Callable, Iterable

    from smtpretry.delivery import Delivery

    from .engine import Paced, Pause

VERSION: Final = 1

# A file may be the application's own: these tables stand beside its own ones, and say their version themselves.
_SCHEMA: Final = (
    """CREATE TABLE smtpretry_deliveries (
        number INTEGER PRIMARY KEY,
        id TEXT NOT NULL UNIQUE,
        envelope TEXT NOT NULL,
        state TEXT NOT NULL,
        due REAL,  -- when it may be taken, in seconds since the epoch; NULL: it has ended
        taken INTEGER NOT NULL DEFAULT 0,  -- how many times
        holder TEXT,  -- whose it is, unless its time has come again
        ended REAL
    )""",
    "CREATE INDEX smtpretry_due ON smtpretry_deliveries (due, holder) WHERE due IS NOT NULL",
    "CREATE INDEX smtpretry_ended ON smtpretry_deliveries (ended) WHERE ended IS NOT NULL",
    "CREATE TABLE smtpretry_messages (number INTEGER PRIMARY KEY, message BLOB NOT NULL)",
    """CREATE TABLE smtpretry_servers (
        name TEXT PRIMARY KEY,
        until REAL NOT NULL,
        failures INTEGER NOT NULL,
        stage TEXT,
        reply TEXT,
        probe REAL NOT NULL DEFAULT 0,  -- until when one worker finds out whether it works again
        pace TEXT
    )""",
    "CREATE TABLE smtpretry_schema (version INTEGER NOT NULL)",
)


def check(connection: sqlite3.Connection | sqlite3.Cursor) -> None:
    """Make the tables where there are none.

    Raises:
        ValueError: they are of a later version.
    """
    tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    if "smtpretry_schema" not in tables:
        for statement in _SCHEMA:
            connection.execute(statement)
        connection.execute("INSERT INTO smtpretry_schema VALUES (?)", (VERSION,))
    if not connection.execute("SELECT 1 FROM pragma_table_info('smtpretry_servers') WHERE name = 'pace'").fetchone():
        connection.execute("ALTER TABLE smtpretry_servers ADD COLUMN pace TEXT")
    (version,) = connection.execute("SELECT max(version) FROM smtpretry_schema").fetchone()
    if version > VERSION:
        msg = f"the queue is of version {version}, this smtpretry knows {VERSION}: upgrade smtpretry here, too"
        raise ValueError(msg)


def insert(delivery: Delivery) -> Callable[[sqlite3.Connection | sqlite3.Cursor], tuple[str, str] | None]:
    """Take a delivery over, unless one of its name is there: then give the envelope and the state of that one."""
    told = by_the_time_of_day(delivery)
    row = (told.id, envelope_of(told), json.dumps(told.state()), told.next_at, told.message)

    def work(connection: sqlite3.Connection | sqlite3.Cursor) -> tuple[str, str] | None:
        inserted = connection.execute(
            "INSERT INTO smtpretry_deliveries (id, envelope, state, due) VALUES (?, ?, ?, ?) ON CONFLICT DO NOTHING",
            row[:-1],
        )
        if inserted.rowcount:
            connection.execute("INSERT INTO smtpretry_messages VALUES (?, ?)", (inserted.lastrowid, row[-1]))
            return None
        query = "SELECT envelope, state FROM smtpretry_deliveries WHERE id = ?"
        there: tuple[str, str] = connection.execute(query, [told.id]).fetchone()
        return there

    return work


DUE: Final = (
    "SELECT id, envelope, state, message, taken + 1, holder IS NOT NULL, number FROM smtpretry_deliveries "
    "LEFT JOIN smtpretry_messages USING (number) WHERE due <= ? ORDER BY due LIMIT ?"
)


def take(connection: sqlite3.Connection, now: float, until: float, holder: str, limit: int) -> list[Taken]:
    """Take what is due, first what has been due for longest."""
    rows = connection.execute(DUE, (now, limit)).fetchall()
    connection.executemany(
        "UPDATE smtpretry_deliveries SET due = ?, taken = taken + 1, holder = ? WHERE number = ?",
        [(until, holder, row[-1]) for row in rows],
    )
    return [Taken(*row) for row in rows]


def next_due(connection: sqlite3.Connection) -> float | None:
    """When the next delivery is due."""
    due: float | None = connection.execute("SELECT min(due) FROM smtpretry_deliveries").fetchone()[0]
    return due


def store(connection: sqlite3.Connection, one: Taken, due: float, state: str | None, *, free: bool = False) -> bool:
    """Store its state where there is one, and when its time comes; False where another worker has taken it."""
    return bool(
        connection.execute(
            "UPDATE smtpretry_deliveries SET due = ?, state = coalesce(?, state), "
            "holder = CASE WHEN ? THEN NULL ELSE holder END WHERE number = ? AND taken = ? AND holder IS NOT NULL",
            (due, state, free, one.number, one.taken),
        ).rowcount
    )


def end(connection: sqlite3.Connection, one: Taken, now: float, state: str) -> bool:
    """Store that it has ended, and let go of its message."""
    ended = connection.execute(
        "UPDATE smtpretry_deliveries SET due = NULL, holder = NULL, ended = ?, state = ? "
        "WHERE number = ? AND taken = ? AND holder IS NOT NULL",
        (now, state, one.number, one.taken),
    ).rowcount
    if ended:
        connection.execute("DELETE FROM smtpretry_messages WHERE number = ?", (one.number,))
    return bool(ended)


def renew(connection: sqlite3.Connection, those: Iterable[Taken], until: float) -> None:
    """Say that their worker lives."""
    for one in those:
        store(connection, one, until, None)


def keep(connection: sqlite3.Connection, those: Iterable[Taken], now: float, until: float) -> None:
    """Renew the leases of those for whom they are over, and whom no other worker has taken."""
    connection.executemany(
        "UPDATE smtpretry_deliveries SET due = ? WHERE number = ? AND taken = ? AND due <= ? AND holder IS NOT NULL",
        [(until, one.number, one.taken, now) for one in those],
    )


def bring_back(connection: sqlite3.Connection, now: float, until: float) -> None:
    """Let come soon what is far off, as a wrong clock has planned it; where it was right, the attempt says so again."""
    connection.execute(
        "UPDATE smtpretry_deliveries SET due = CASE WHEN holder IS NULL THEN ? ELSE ? END WHERE due > ?",
        (now, until, now + FAR),
    )


def spare(connection: sqlite3.Connection, now: float, until: float) -> None:
    """Renew the leases of all: while the machine slept, no worker could say that it lives."""
    connection.execute("UPDATE smtpretry_deliveries SET due = ? WHERE due <= ? AND holder IS NOT NULL", (until, now))


def forget(connection: sqlite3.Connection, ended_before: float) -> None:
    """Forget deliveries that ended long ago, some at a time."""
    connection.execute(
        "DELETE FROM smtpretry_deliveries WHERE number IN "
        "(SELECT number FROM smtpretry_deliveries WHERE ended < ? LIMIT 1000)",
        (ended_before,),
    )


def count(connection: sqlite3.Connection, now: float) -> Progress:
    """How many deliveries there are."""
    waiting = connection.execute(
        "SELECT count(CASE WHEN due > :now AND holder IS NULL THEN 1 END), count(CASE WHEN due <= :now THEN 1 END), "
        "count(CASE WHEN due > :now THEN holder END) FROM smtpretry_deliveries WHERE due IS NOT NULL",
        {"now": now},
    ).fetchone()
    ended = connection.execute("SELECT count(*) FROM smtpretry_deliveries WHERE ended IS NOT NULL").fetchone()
    query = "SELECT min(due) FROM smtpretry_deliveries WHERE due > 0"  # what is to be tried now is due at 0
    (due,) = connection.execute(query).fetchone()
    return Progress(*(*waiting, *ended, 0.0 if due is None else max(0.0, now - due)))


# What a server has asked for


def tried(connection: sqlite3.Connection, server: str, pace: str | None, probe: float) -> None:
    """Let the other workers know what is tried."""
    connection.execute("UPDATE smtpretry_servers SET pace = ?, probe = ? WHERE name = ?", (pace, probe, server))


def tell(connection: sqlite3.Connection, server: str, pause: Pause | None, paced: Paced | None) -> None:
    """Tell the other workers."""
    connection.execute(
        "INSERT INTO smtpretry_servers (name, until, failures) VALUES (?, 0, 0) ON CONFLICT DO NOTHING", (server,)
    )
    connection.execute(
        "UPDATE smtpretry_servers SET until = ?, failures = ?, stage = ?, reply = ?, pace = ?, probe = 0 "
        "WHERE name = ?",
        (*told(server_row(connection, server), pause, paced), server),
    )


def server_row(connection: sqlite3.Connection, server: str) -> Any:  # noqa: ANN401 - a row
    """What is known of a server; None where that is nothing."""
    return connection.execute(f"SELECT {COLUMNS} FROM smtpretry_servers WHERE name = ?", (server,)).fetchone()  # noqa: S608 - ours
