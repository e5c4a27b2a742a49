"""The embedded queue: one SQLite file, no server, any number of processes of one machine. Needs no extra.

A delivery is a row. Its message is a row of another table, so no save writes it again. A worker that takes a delivery
moves its due time on by the lease, and a heartbeat moves it on further; if the worker dies, the delivery becomes due
again. `taken` counts how often it was taken: a worker's writes count only if nobody has taken it since.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import sqlite3
import time
import uuid
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self

from smtpretry.clock import of_day

from . import schema
from .engine import Pause, QueueError, type_of
from .file import File
from .servers import Wants, leaves
from .stored import check_is_same
from .worker import Batch, Worker, check_worker

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
    from types import TracebackType

    from smtpretry.delivery import Delivery

    from .engine import OnEnd, OnProgress, Paced, Progress, SupportsAttempt
    from .worker import Change, Taken

__all__ = ["QueueError", "SQLiteEngine"]

_SET_BACK: Final = 60.0  # seconds by which a clock was set back, and not only slowed down
_HELD: Final = 0.5  # seconds that somebody held the file, and nobody else could write
_SLEPT: Final = 5.0  # seconds that the machine slept, or by which a clock was set forward

_bells: dict[tuple[int, str], set[Callable[[], None]]] = {}  # the workers of this process, by file


class SQLiteEngine:
    """An `Engine` in a file. The file is made when it is first used; `aclose`, or `async with`, closes it.

    It never blocks the event loop: a thread writes, and commits together what arrives in the meantime. What was
    submitted survives a power loss (WAL, synchronous=FULL).

    Args:
        path: the file. Its folder has to be on a local disk, and writable: SQLite makes two files beside it.
        lease: seconds without a heartbeat after which a worker counts as dead; at least two.
        concurrency: how many deliveries a worker takes at a time. Those beyond its client's connections wait for one,
            and no other worker gets them meanwhile.
        keep: how long an ended delivery is kept, without its message. Until then its id is not taken again.

    Raises:
        ValueError: a database in memory, a URL, a lease or a concurrency that is too small.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        lease: float = 30.0,
        concurrency: int = 10,
        keep: timedelta = timedelta(days=7),
    ) -> None:
        if os.fspath(path) in ("", ":memory:"):
            msg = "a queue is a file: name one, such as SQLiteEngine('mail.db')"
            raise ValueError(msg)
        if str(path).startswith(("sqlite:", "file:")):
            msg = f"a queue is a file: give its path, such as SQLiteEngine('mail.db'), not a URL, {path!r}"
            raise ValueError(msg)
        check_worker("lease", lease, concurrency)
        self.path = Path(path).absolute()
        self.lease, self.concurrency, self.keep = lease, concurrency, keep
        self.file = File(self.path, schema.check)

    def __repr__(self) -> str:
        """With its file."""
        return f"{type(self).__name__}({str(self.path)!r})"

    async def __aenter__(self) -> Self:
        """Open the file, and make it where there is none."""
        await self.file.look(lambda _: None)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close the file."""
        await self.aclose()

    async def aclose(self) -> None:
        """Close the file. What uses the engine next opens it again."""
        await self.file.close()

    async def submit(self, delivery: Delivery, /, *, connection: sqlite3.Connection | None = None) -> None:
        """See `Engine`. A `connection` is an sqlite3.Connection to the same file; its owner commits.

        It works in the thread that calls, as whatever its owner does with it.

        Raises:
            QueueError: the file cannot be written; nothing was taken over. With a `connection`, it is an sqlite3.Error.
            TypeError: `connection` is none of sqlite3's.
            ValueError: `connection` is to another file, or another message has that id.
        """
        if connection is None:
            there = await self.file.transact(schema.insert(delivery))
        else:
            insert = schema.insert(delivery)
            with _whole(connection) as cursor:
                try:
                    there = insert(cursor)  # before anything is read: who has read cannot wait for a writer
                except sqlite3.OperationalError as error:
                    if not str(error).startswith("no such table"):
                        raise
                    self._check(cursor)
                    there = insert(cursor)
                else:
                    self._check(cursor)
        if there is not None:
            check_is_same(delivery, *there)
        self.ring()

    async def has(self, delivery_id: str, /) -> bool:
        """Whether it has taken the delivery over, and not forgotten it since (`keep`)."""
        query = "SELECT 1 FROM smtpretry_deliveries WHERE id = ?"
        return bool(await self.file.look(lambda own: own.execute(query, [delivery_id]).fetchone()))

    async def work(
        self, smtp: SupportsAttempt, /, *, on_end: OnEnd | None = None, on_progress: OnProgress | None = None
    ) -> None:
        """See `Engine`. SIGINT or SIGTERM ends it: attempts that are under way get the seconds of the lease to finish.

        A second signal breaks these off. A signal handler of the application's is called, too. In a task of its own,
        it is the worker alone that a signal ends: end what runs beside it when `work` returns.

        Args:
            smtp: the client to send with.
            on_end: see `Engine`.
            on_progress: called every minute with the number of deliveries that are waiting, due, under way and ended;
                the log says it, too.

        Raises:
            QueueError: the file cannot be used, and that will not pass by itself.
            ClientClosed: `smtp` was closed; what it did not send stays due.
            TypeError: `smtp` cannot make attempts.
        """
        await Worker(_Store(self, smtp.policy.clock), smtp, on_end, on_progress).run()

    async def progress(self, now: float | None = None) -> Progress:
        """How many deliveries there are, by now (seconds since the epoch)."""
        at = time.time() if now is None else now
        return await self.file.look(lambda own: schema.count(own, at))

    def ring(self) -> None:
        """Wake the workers of this process."""
        for wake in list(_bells.get(self._bell, ())):
            wake()

    @contextlib.contextmanager
    def heard(self, wake: Callable[[], None]) -> Iterator[Callable[[], None]]:
        """Have `wake` called, in the loop that is running now, whenever something was submitted in this process.

        Gives a function that does so from any thread.
        """
        loop = asyncio.get_running_loop()

        def bell() -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(wake)

        bells = _bells.setdefault(self._bell, set())
        bells.add(bell)
        try:
            yield bell
        finally:
            bells.discard(bell)

    @property
    def _bell(self) -> tuple[int, str]:
        return os.getpid(), os.path.realpath(self.path)

    def _check(self, cursor: sqlite3.Cursor) -> None:
        """Look whether it is to this file, and make the tables in it where they are not."""
        own = cursor.execute("SELECT file FROM pragma_database_list WHERE name = 'main'").fetchone()[0]
        if not own or not self.path.samefile(own):
            msg = f"connection is to {own or 'a database in memory'}, not to the file of the queue, {self.path}"
            raise ValueError(msg)
        schema.check(cursor)


@contextlib.contextmanager
def _whole(connection: sqlite3.Connection) -> Iterator[sqlite3.Cursor]:
    """In the owner's transaction, do all or nothing; where the owner has none, begin one as the next INSERT would.

    Whatever rows and texts the owner likes, the cursor gives plain ones.
    """
    if not isinstance(connection, sqlite3.Connection):
        msg = f"connection is an sqlite3.Connection, not {type_of(connection)}"
        raise TypeError(msg)
    cursor = connection.cursor()
    cursor.row_factory, texts = None, connection.text_factory
    legacy = connection.isolation_level is not None and getattr(connection, "autocommit", -1) == -1
    if begins := legacy and not connection.in_transaction:
        cursor.execute(f"BEGIN {connection.isolation_level}")
    connection.text_factory = str
    cursor.execute("SAVEPOINT smtpretry")
    try:
        yield cursor
    except BaseException:
        if begins:
            connection.rollback()
        elif connection.in_transaction:
            cursor.execute("ROLLBACK TO smtpretry")
        raise
    finally:
        connection.text_factory = texts
        if connection.in_transaction:
            cursor.execute("RELEASE smtpretry")


class _Store:
    """The file, as one worker sees it."""

    def __init__(self, engine: SQLiteEngine, clock: Callable[[], float]) -> None:
        self._engine, self._file, self._clock = engine, engine.file, clock
        self._now = of_day(clock)  # for leases, which workers of other processes look at
        self._holder = uuid.uuid4().hex
        self._latest = self._lag = math.inf  # when it last looked, and how far its own clock lagged behind then
        self._in_vain, self._spared = False, -math.inf  # whether its last look failed; when it last spared the others
        self.name, self.lease, self.concurrency = engine.path.name, engine.lease, engine.concurrency
        self.grace = engine.lease

    @contextlib.asynccontextmanager
    async def listening(self, wake: Callable[[], None]) -> AsyncIterator[None]:
        """See `Store`."""
        await self._file.look(lambda _: None)  # it is there now, for those who watch it
        with self._engine.heard(wake) as bell, self._file.watched(bell):
            yield

    async def take(self, room: int, wants: Mapping[str, Wants], those: Sequence[Taken]) -> Batch:
        """See `Store`."""
        asked, clock, in_vain = self._now(), self._clock(), self._in_vain
        late, lag, self._in_vain = _late(asked), asked - clock, True

        def work(own: sqlite3.Connection) -> Batch:
            now = late()
            tell, is_held = clock + (now - asked), in_vain or now > asked
            if now < self._latest - _SET_BACK:
                schema.bring_back(own, now, now + self.lease)
            if lag > self._lag + _SLEPT or (is_held and now > self._spared + 2 * self.lease):
                schema.spare(own, now, now + self.lease)
                self._spared = now
            self._latest, self._lag = now, lag
            schema.keep(own, those, now, now + self.lease)
            due = schema.next_due(own)
            wanted = room if due is not None and due <= now else 0
            may = leaves([schema.server_row(own, name) for name in wants], tell, wanted, wants.values())
            taken = schema.take(own, now, now + self.lease, self._holder, may.room) if may.room else []
            for server, row in zip(wants, may.rows(len(taken)), strict=True):
                if row is not None:
                    schema.tried(own, server, *row)
            due = schema.next_due(own)
            wait = None if due is None else max(0.0, due - now)
            if may.wait is not None and len(taken) == may.room:
                wait = may.wait
            return Batch(taken, wait, may.known(len(taken)))

        batch = await self._file.transact(work)
        self._in_vain = False
        return batch

    async def write(self, one: Taken, change: Change) -> bool:
        """See `Store`."""
        now, wait = self._now(), change.wait
        late = _late(now)
        if change.over:
            return await self._file.transact(lambda own: schema.end(own, one, now, change.state or ""))
        if wait is not None:
            return await self._file.transact(lambda own: schema.store(own, one, now + wait, change.state, free=True))
        return await self._file.transact(lambda own: schema.store(own, one, late() + self.lease, change.state))

    async def beat(self, those: Sequence[Taken]) -> None:
        """See `Store`."""
        late = _late(self._now())

        def work(own: sqlite3.Connection) -> None:
            now = late()
            schema.renew(own, those, now + self.lease)
            schema.forget(own, now - self._engine.keep.total_seconds())

        await self._file.transact(work)

    async def tell(self, server: str, pause: Pause | None, paced: Paced | None) -> None:
        """See `Store`."""
        await self._file.transact(lambda own: schema.tell(own, server, pause, paced))

    async def progress(self) -> Progress:
        """See `Store`. It is asked for after a minute in which something has moved: no message is in the log then."""
        await self._file.empty_log()
        return await self._engine.progress(self._now())


def _late(now: float) -> Callable[[], float]:
    """What tells the time in the thread of the file: where somebody held that, a lease begins when it is free."""
    called = time.monotonic()

    def late() -> float:
        waited = time.monotonic() - called
        return now + waited if waited > _HELD else now

    return late
