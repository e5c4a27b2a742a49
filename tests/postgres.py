"""A private PostgreSQL for the tests, in a temporary directory, on a Unix socket; and a queue in it."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import procrastinate
import psycopg
from mta import PATIENCE, Server, workplace

from smtpretry.queues.procrastinate import ProcrastinateEngine

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

_BIN = max(Path("/usr/lib/postgresql").glob("*/bin"), default=Path("/nowhere"), key=lambda path: int(path.parent.name))


class Postgres(Server):
    """A cluster of its own; its files belong to the user postgres where root runs the tests, as PostgreSQL wants it."""

    program = "postgres"

    @classmethod
    def unavailable(cls) -> str | None:
        """Say why it cannot be run here, or None where it can."""
        return None if (_BIN / "initdb").exists() else "PostgreSQL not installed: on Debian, apt-get install postgresql"

    def __init__(self, directory: Path, *, fsync: bool = False) -> None:
        """Make the cluster; with fsync it waits for the disk, as one in earnest does."""
        super().__init__(directory)
        self._fsync = "on" if fsync else "off"
        self._user = "postgres" if os.geteuid() == 0 else None
        if self._user:
            shutil.chown(directory, self._user)
        self._data = directory / "data"
        self._run("initdb", "--auth=trust", "--username=postgres", "--encoding=UTF8", "--no-sync", f"-D{self._data}")

    def start(self) -> None:
        """Start it; it answers when this returns."""
        options = f"-c listen_addresses= -c unix_socket_directories={self.directory} -c fsync={self._fsync}"
        self._run("pg_ctl", "start", "--wait", f"--options={options}", f"-D{self._data}", f"--log={self.log}")

    def stop(self) -> None:
        """Stop it at once, as a crash does."""
        self._run("pg_ctl", "stop", "--wait", "--mode=immediate", f"-D{self._data}")

    def create(self, database: str, options: str = "") -> str:
        """Make an empty database, and return how to connect to it."""
        with psycopg.connect(self._conninfo("postgres"), autocommit=True) as connection:
            connection.execute(f'CREATE DATABASE "{database}" {options}')
        return self._conninfo(database)

    def _conninfo(self, database: str) -> str:
        return f"host={self.directory} user=postgres dbname={database}"

    def _run(self, program: str, *options: str) -> None:
        done = subprocess.run(
            [_BIN / program, *options],
            user=self._user,
            group=self._user,
            extra_groups=[] if self._user else None,
            cwd=self.directory,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,  # not a pipe: what it starts would hold it
            stderr=subprocess.DEVNULL,
            timeout=3 * PATIENCE,
            check=False,
        )
        if done.returncode:
            log = self.log.read_text() if self.log.exists() else ""
            message = f"{program} ended with {done.returncode}: {log}"
            raise RuntimeError(message)


@contextlib.contextmanager
def running(*, fsync: bool = False) -> Iterator[Postgres]:
    """Run a PostgreSQL for as long as the block."""
    with workplace() as place, Postgres(place / "postgres", fsync=fsync) as server:
        yield server


@contextlib.asynccontextmanager
async def engine_in(conninfo: str, *, timeout: float = 30.0, **options: Any) -> AsyncIterator[ProcrastinateEngine]:
    """Open an engine in a database; its workers are taken for dead after two seconds.

    A connection is waited for as long as `timeout`, in seconds.
    """
    app = procrastinate.App(connector=procrastinate.PsycopgConnector(conninfo=conninfo, timeout=timeout))
    options = {"stalled_after": 2.0, "fetch_job_polling_interval": 0.5} | options
    async with app.open_async():
        yield ProcrastinateEngine(app, **options)


async def make_tables(conninfo: str) -> None:
    """Make procrastinate's tables in an empty database."""
    app = procrastinate.App(connector=procrastinate.PsycopgConnector(conninfo=conninfo))
    async with app.open_async():
        await app.schema_manager.apply_schema_async()
