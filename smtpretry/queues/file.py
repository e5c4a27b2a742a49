"""An SQLite file that never makes an event loop wait: one thread for it, and one commit for many writes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sqlite3
import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

from .engine import QueueError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

T = TypeVar("T")

_BUSY: Final = 30.0  # seconds that another process may hold the file
_POLL: Final = 0.25  # seconds between two looks at whether somebody has changed the file; they read no disk
_CHECKPOINT: Final = 4 * 2**20  # bytes of write-ahead log after which it is written into the file
_PASSING: Final = ("SQLITE_BUSY", "SQLITE_FULL", "SQLITE_IOERR", "SQLITE_LOCKED")  # what may be over in a while
_READ_ONLY: Final = ("SQLITE_CANTOPEN", "SQLITE_READONLY")  # passes where it could be written before
_REMOTE: Final = (  # with "fuse." before it, too
    *("afs", "beegfs", "ceph", "cifs", "davfs", "gcsfuse", "gluster", "lustre", "ncpfs", "nfs", "rclone", "s3fs"),
    *("smb", "sshfs"),
)
_left_by_fork: Final = list[object]()  # connections of a parent process: closing them here would harm it


class _Order(Generic[T]):
    """Something to do in a transaction."""

    def __init__(self, work: Callable[[sqlite3.Connection], T]) -> None:
        self.work = work
        self.cancelled = False
        self.result: T
        self.error: Exception | None = None

    def do(self, connection: sqlite3.Connection) -> None:
        """What it raises is its own, and undoes its own changes alone. Nothing is done if nobody waits for it now."""
        if self.cancelled:
            return
        connection.execute("SAVEPOINT one")
        try:
            self.result = self.work(connection)
        except Exception as error:
            if not connection.in_transaction:
                raise
            connection.execute("ROLLBACK TO one")
            self.error = error
        connection.execute("RELEASE one")


class File:
    """The file, opened when it is first used; in each process anew.

    Args:
        path: where it is.
        prepare: makes or checks what is to be in it, in a transaction.
    """

    def __init__(self, path: Path, prepare: Callable[[sqlite3.Connection], None]) -> None:
        self.path = path
        self._prepare = prepare
        self._start()

    def _start(self) -> None:
        self._process = os.getpid()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"smtpretry {self.path.name}")
        self._orders: deque[_Order[Any]] = deque()
        self._connection: sqlite3.Connection | None = None
        self._inode: tuple[int, int] | None = None

    async def transact(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Do it in a transaction, with whatever else is to be done by then; it is on the disk when this returns.

        Raises:
            QueueError: the file cannot be used.
            Whatever `work` raises; it has changed nothing then.
        """
        order = _Order(work)
        thread = self._worker()
        self._orders.append(order)
        try:
            await asyncio.get_running_loop().run_in_executor(thread, self._drain)
        except BaseException:  # cancelled, or no thread could be started: it must not be done later
            order.cancelled = True
            raise
        if order.error is not None:
            raise order.error
        return order.result

    async def look(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Do what changes nothing."""
        return await asyncio.get_running_loop().run_in_executor(self._worker(), self._told, self._look, work)

    async def empty_log(self) -> None:
        """Write the log into the file now, unless somebody reads: what was deleted is in neither then."""

        def work(own: sqlite3.Connection) -> None:
            with contextlib.suppress(OSError):
                self._checkpoint(own, 0)

        await self.look(work)

    async def close(self) -> None:
        """Close the file; what uses it next opens it again."""
        if self._process == os.getpid():
            thread = self._thread
            await asyncio.get_running_loop().run_in_executor(thread, self._close)
            self._start()
            thread.shutdown(wait=False)

    @contextlib.contextmanager
    def watched(self, changed: Callable[[], None]) -> Iterator[None]:
        """Have it called, in a thread, soon after anybody has changed the file, as long as the block lasts."""
        over = threading.Event()
        watcher = threading.Thread(target=self._watch, args=(over, changed), daemon=True)
        watcher.start()
        try:
            yield
        finally:
            over.set()
            watcher.join()

    def _watch(self, over: threading.Event, changed: Callable[[], None]) -> None:
        seen: object = None
        with contextlib.closing(sqlite3.connect(self.path, timeout=_BUSY, isolation_level=None)) as connection:
            while not over.wait(_POLL):
                version = None
                with contextlib.suppress(sqlite3.Error):  # whoever uses the file is told
                    version = connection.execute("PRAGMA data_version").fetchone()
                if (now := (version, _inode(self.path))) != seen:
                    seen = now
                    changed()

    def _worker(self) -> ThreadPoolExecutor:
        if self._process != os.getpid():
            _left_by_fork.append(self._connection)
            self._start()
        return self._thread

    # In the thread

    def _drain(self) -> None:
        """Do all that has come together since the last commit."""
        orders = list[_Order[Any]]()
        while self._orders:
            orders.append(self._orders.popleft())
        if any(not order.cancelled for order in orders):
            try:
                self._told(self._commit, orders)
            except Exception as error:  # noqa: BLE001 - all who asked are told
                if isinstance(error, QueueError):
                    error.untouched = not self._committing
                for order in orders:
                    order.error = error

    def _commit(self, orders: Iterable[_Order[Any]]) -> None:
        self._committing = False
        connection = self._opened()
        try:
            connection.execute("BEGIN IMMEDIATE")
            for order in orders:
                order.do(connection)
            self._committing = True
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise
        self._check_inode()
        self._check_log()
        self._checkpoint(connection)

    def _look(self, work: Callable[[sqlite3.Connection], T]) -> T:
        return work(self._opened())

    def _told(self, work: Callable[..., T], *args: Any) -> T:  # noqa: ANN401 - as `work` takes them
        """Call it, and say in words what SQLite says in codes."""
        try:
            return work(*args)
        except sqlite3.Error as error:
            code = getattr(error, "sqlite_errorname", "")
            told = QueueError(f"{self.path}: {self._cure(code, error)}")
            told.passing = code.startswith(_PASSING + (_READ_ONLY if self._connection is not None else ()))
            raise told from error

    def _cure(self, code: str, error: sqlite3.Error) -> str:
        folder = self.path.parent
        if code.startswith(_READ_ONLY):
            if not folder.is_dir():
                return f"the folder {folder} does not exist: make it"
            return f"cannot be written: SQLite needs to write the file, and to make files beside it in {folder}"
        if code.startswith(("SQLITE_NOTADB", "SQLITE_CORRUPT")):
            return f"is no SQLite database, or a damaged one ({error}): name another file, or restore a copy"
        if code.startswith("SQLITE_FULL"):
            return "the disk is full: nothing was stored"
        if code.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
            return f"another process has held the file for {_BUSY:.0f} s: keep write transactions short"
        return f"{error} ({code})" if code else str(error)

    def _opened(self) -> sqlite3.Connection:
        if self._connection is not None:
            self._check_inode()
            return self._connection
        if kind := network_file_system(self.path):
            where = f"{self.path}: is on a network file system ({kind})"
            msg = f"{where}, where SQLite's locks cannot be relied on: use a local disk, or PostgreSQL"
            raise QueueError(msg)
        connection = sqlite3.connect(self.path, timeout=_BUSY, isolation_level=None)
        try:
            _configure(connection)
            connection.execute("BEGIN IMMEDIATE")
            self._prepare(connection)
            connection.execute("COMMIT")
        except BaseException:
            connection.close()
            raise
        self._log = Path(f"{os.path.realpath(self.path)}-wal")  # SQLite follows links
        self._inode, self._log_inode, self._connection = _inode(self.path), _inode(self._log), connection
        return connection

    def _check_inode(self) -> None:
        """A file that was deleted can be written as if nothing had happened, and everything is lost at the end."""
        if self._inode is not None:
            _check_same(self.path, self._inode, "close the engine, and restore the file")

    def _check_log(self) -> None:
        """What is written into a deleted log is seen by nobody else, and is in the file only if this closes it."""
        cure = "it is part of the queue; end all that use the queue before anything else"
        _check_same(self._log, self._log_inode, cure)

    def _checkpoint(self, connection: sqlite3.Connection, longest: int | None = None) -> None:
        """Write the log into the file, and empty it, before it becomes long; where that fails, at another time.

        What was committed is in the log, and who reads meanwhile may take long: this waits for nobody.
        """
        if self._log.stat().st_size > (_CHECKPOINT if longest is None else longest):
            with contextlib.suppress(sqlite3.Error):
                connection.execute("PRAGMA busy_timeout = 0")
                connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            connection.execute(f"PRAGMA busy_timeout = {_BUSY * 1000:.0f}")

    def _close(self) -> None:
        if self._connection is not None:
            self._connection.close()


def _configure(connection: sqlite3.Connection) -> None:
    """A commit is on the disk when it returns; readers do not wait."""
    deadline = time.monotonic() + _BUSY
    while (mode := _mode(connection, deadline)) is None:
        time.sleep(0.01)  # another process is just making it so
    if mode != "wal":
        msg = f"SQLite cannot keep a write-ahead log there (its mode is {mode})"
        raise sqlite3.OperationalError(msg)
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA fullfsync = ON")  # macOS: to the disk, not to its cache
    connection.execute("PRAGMA wal_autocheckpoint = 0")
    connection.execute("PRAGMA secure_delete = ON")  # some builds leave what was deleted in the file


def _mode(connection: sqlite3.Connection, deadline: float) -> str | None:
    try:
        return str(connection.execute("PRAGMA journal_mode = WAL").fetchone()[0])
    except sqlite3.OperationalError as error:
        if not error.sqlite_errorname.startswith("SQLITE_BUSY") or time.monotonic() > deadline:
            raise
        return None


def _inode(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _check_same(path: Path, inode: tuple[int, int] | None, cure: str) -> None:
    if _inode(path) != inode:
        msg = f"{path}: was deleted or replaced while it was in use: {cure}"
        raise QueueError(msg)


def network_file_system(path: Path, mounts: Path = Path("/proc/self/mounts")) -> str | None:
    """The kind of the network file system that a path is on; None where it is on none, or where nobody knows."""
    try:
        lines = mounts.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    found, deepest = "", -1
    for _, place, kind, *_ in (line.split() for line in lines):
        mounted = Path(place.replace("\\040", " "))
        if path.resolve().is_relative_to(mounted) and len(mounted.parts) >= deepest:
            found, deepest = kind, len(mounted.parts)
    return found if found.removeprefix("fuse.").startswith(_REMOTE) else None
