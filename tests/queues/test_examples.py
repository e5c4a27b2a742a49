"""The examples of queues do what they say, on SQLite and on PostgreSQL."""

from __future__ import annotations

from typing import TYPE_CHECKING

import mta
import postgres
import programs
import pytest
from programs import in_real_time

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(params=["SQLite", "PostgreSQL"])
def env(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[dict[str, object]]:
    """Say by environment variables where the queue is: nowhere yet."""
    common = {"SMTP_PORT": mta.free_ports(1)[0], "PYTHONWARNINGS": "error"}
    if request.param == "SQLite":
        yield common | {"QUEUE": tmp_path / "mail.db"}
        return
    mta.require(postgres.Postgres)
    with postgres.running() as server:
        yield common | {"DATABASE_URL": server.create("example")}


@in_real_time
async def test_the_examples(env: dict[str, object]) -> None:
    """From nothing to a mail that a worker sends, which ends with SIGTERM."""
    async with programs.running(programs.command("queue_worker"), **env) as worker:
        await worker.says("The worker is ready")
        async with programs.running("python examples/queue_send.py", **env) as send:
            await send.says("1 of 2 recipients deferred until")
            await send.says("ann@example.com has it 1 time")
            await send.says("bob@example.com has it 1 time")
            assert await send.process.wait() == 0
        await worker.stop()
    assert worker.process.returncode == 0
    assert worker.log == "The worker is ready.\n"
