"""The whole conformance run of both engines: ``python -m tests.conformance`` prints its figures, in some two minutes.

First `check_engine` with 200 deliveries, two workers and five kills. Then the window in which a kill makes a mail come
twice: from the server's 250 until the state is stored, in an SQLite file, and in a PostgreSQL
that waits for its disk.
"""

# ruff: noqa: T201 - it prints

from __future__ import annotations

import asyncio
import contextlib
import functools
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).parent))

import postgres

import smtpretry
from smtpretry.queues.sqlite import SQLiteEngine
from smtpretry.testing import ScriptedServer, check_engine

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractAsyncContextManager

    from smtpretry import Delivery

SIZES = {"2 kB": (2_000, 200), "100 kB": (100_000, 50), "10 MB": (10_000_000, 5)}


class Watched(smtpretry.RetryingSMTP):
    """A client that notes when an acceptance has been stored."""

    saved_at: dict[str, float]

    async def attempt(self, delivery: Delivery, save: Any = None, **options: Any) -> Delivery:
        """Make a pass."""

        async def watch(delivery: Delivery) -> None:
            await save(delivery)
            if delivery.accepted:
                self.saved_at.setdefault(delivery.recipients[0], time.monotonic())

        return await super().attempt(delivery, watch, **options)


class Watch(list[Any]):
    """The messages of a server, which notes when each came."""

    def __init__(self) -> None:
        """Begin without any."""
        super().__init__()
        self.taken_at: dict[str, float] = {}

    def append(self, message: Any) -> None:
        """Take one."""
        self.taken_at[message.recipients[0]] = time.monotonic()
        super().append(message)


async def windows(make_engine: Callable[[], AbstractAsyncContextManager[Any]], size: int, number: int) -> list[float]:
    """Return the seconds from each 250 until it was stored."""
    async with ScriptedServer() as server, make_engine() as engine:
        server.messages = watch = Watch()
        async with Watched(server.client()) as smtp:
            smtp.saved_at = {}
            body = (
                b"Subject: window\r\n\r\n"
                + b"a line of seventy characters, more or less, as they are in mail\r\n" * (size // 66)
            )
            for who in (f"user{one}@example.com" for one in range(number)):
                await engine.submit(smtpretry.prepare(body, sender="app@example.com", recipients=[who]))
            worker = asyncio.create_task(engine.work(smtp))
            while len(smtp.saved_at) < number:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
            worker.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await worker
            return [smtp.saved_at[who] - at for who, at in watch.taken_at.items()]


async def check(name: str, make_engine: Callable[[str, float], AbstractAsyncContextManager[Any]]) -> None:
    """Print the figures of one engine, made by a name and the seconds until a worker is taken for dead."""
    began = time.monotonic()
    report = await check_engine(functools.partial(make_engine, "conformance", 5.0), deliveries=200, kills=5)
    print(f"{name}, 2 workers, 200 deliveries, 5 kills, in {time.monotonic() - began:.0f} s: {report}")
    for title, (size, number) in SIZES.items():
        seconds = await windows(functools.partial(make_engine, f"window{size}", 30.0), size, number)
        print(
            f"{name}, from the 250 to the save, {number} messages of {title}: "
            f"{1000 * statistics.median(seconds):.1f} ms in the median, {1000 * max(seconds):.1f} ms at most"
        )


def in_a_file(folder: str, name: str, dead_after: float) -> SQLiteEngine:
    """Make an engine in a file of that name."""
    return SQLiteEngine(Path(folder) / f"{name}.db", lease=dead_after)


def in_postgres(conninfos: dict[str, str], name: str, dead_after: float) -> AbstractAsyncContextManager[Any]:
    """Make an engine in the database of that name."""
    return postgres.engine_in(conninfos[name], stalled_after=dead_after)


async def main(server: postgres.Postgres, folder: str) -> None:
    """Print the figures; raise AssertionError where a promise was broken."""
    await check("SQLite", functools.partial(in_a_file, folder))
    conninfos = {
        name: server.create(name) for name in ("conformance", *(f"window{size}" for size, _ in SIZES.values()))
    }
    await check("PostgreSQL", functools.partial(in_postgres, conninfos))


if __name__ == "__main__":
    if why := postgres.Postgres.unavailable():
        sys.exit(why)
    with postgres.running(fsync=True) as running, tempfile.TemporaryDirectory() as place:
        asyncio.run(main(running, place))
