"""The whole conformance run of procrastinate: ``python -m tests.conformance`` prints its figures, in some forty seconds.

First `check_engine` with 200 deliveries, two workers and five kills. Then the window in which a kill makes a mail come
twice: from the server's 250 until the state is stored, in a PostgreSQL that waits for its disk.
"""

# ruff: noqa: T201 - it prints

from __future__ import annotations

import asyncio
import contextlib
import functools
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).parent))

import postgres

import smtpretry
from smtpretry.testing import ScriptedServer, check_engine

if TYPE_CHECKING:
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


async def windows(conninfo: str, size: int, number: int) -> list[float]:
    """Return the seconds from each 250 until it was stored."""
    async with ScriptedServer() as server, postgres.engine_in(conninfo, stalled_after=30.0) as engine:
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


async def main(server: postgres.Postgres) -> None:
    """Print the figures; raise AssertionError where a promise was broken."""
    conninfo = server.create("conformance")
    await postgres.make_tables(conninfo)
    began = time.monotonic()
    report = await check_engine(functools.partial(postgres.engine_in, conninfo), deliveries=200, kills=5)
    print(f"procrastinate, 2 workers, 200 deliveries, 5 kills, in {time.monotonic() - began:.0f} s: {report}")
    for name, (size, number) in SIZES.items():
        conninfo = server.create(f"window{size}")
        await postgres.make_tables(conninfo)
        seconds = await windows(conninfo, size, number)
        print(
            f"from the 250 to the save, {number} messages of {name}: "
            f"{1000 * statistics.median(seconds):.1f} ms in the median, {1000 * max(seconds):.1f} ms at most"
        )


if __name__ == "__main__":
    if why := postgres.Postgres.unavailable():
        sys.exit(why)
    with postgres.running(fsync=True) as running:
        asyncio.run(main(running))
