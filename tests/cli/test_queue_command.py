"""``python -m smtpretry queue``: what is in a queue, as a table and for machines."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import mta
import postgres
import programs
import psycopg
import pytest
from postgres import Postgres
from support import ANN, BOB, letter

import smtpretry
from smtpretry import RetryingSMTP
from smtpretry.__main__ import main
from smtpretry.queues.sqlite import SQLiteEngine
from smtpretry.testing import ScriptedServer

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractAsyncContextManager
    from pathlib import Path

NUMBERS = itertools.count()


@pytest.fixture(scope="module")
def server() -> Iterator[Postgres]:
    """Run one PostgreSQL."""
    mta.require(Postgres)
    with postgres.running() as running:
        yield running


@pytest.fixture(params=["sqlite", "postgresql"])
def queue(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Make a queue in which one delivery has ended, one waits, and one is due; return its address."""
    if request.param == "sqlite":
        path = tmp_path / "mail.db"
        asyncio.run(fill(SQLiteEngine(path)))
        return f"sqlite:{path}"
    conninfo = request.getfixturevalue("server").create(f"queue{next(NUMBERS)}")
    asyncio.run(fill(postgres.engine_in(conninfo)))
    known = psycopg.conninfo.conninfo_to_dict(conninfo)
    return f"postgresql://{known['user']}@/{known['dbname']}?host={quote(str(known['host']), safe='')}"


async def fill(engine_in: AbstractAsyncContextManager[Any]) -> None:
    async with ScriptedServer() as server, engine_in as engine:
        server.on("RCPT", BOB, "450 4.2.0 Greylisted for 300 seconds")
        async with RetryingSMTP(server.client(), defer=engine) as smtp:
            await smtp.enqueue(letter(ANN), id="ended")
            await smtp.enqueue(letter(BOB), id="waits")
            worker = asyncio.create_task(engine.work(smtp))
            async with asyncio.timeout(10):
                while (await engine.progress()).ended + (await engine.progress()).waiting < 2:  # noqa: ASYNC110 - in a file
                    await asyncio.sleep(0.05)
            worker.cancel()
            await asyncio.gather(worker, return_exceptions=True)
        await engine.submit(smtpretry.prepare(letter(ANN), id="due"))


def test_the_list(queue: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A line for each, what is due first; as JSON, too; and only those of one state."""
    assert main(["queue", queue, "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [["due", "due"], ["waits", "waiting"], ["ended", "ended"]]
    assert "450 4.2.0 Greylisted for 300 seconds" in lines[1]
    assert main(["queue", queue, "list", "--json", "--state", "ended"]) == 0
    [facts] = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert (facts["id"], facts["accepted"], facts["pending"], facts["attempts"]) == ("ended", 1, 0, 1)


@pytest.mark.parametrize("limit", ["0", "-1", "99999999999999999999", "many"])
def test_a_limit_that_is_none(limit: str, capsys: pytest.CaptureFixture[str]) -> None:
    """It is told, and not taken for all of them."""
    with pytest.raises(SystemExit, match="2"):
        main(["queue", "sqlite:mail.db", "list", f"--limit={limit}"])
    assert f"argument --limit: '{limit}' is no number from 1 to" in capsys.readouterr().err


def test_the_story_of_one(queue: str, capsys: pytest.CaptureFixture[str]) -> None:
    """What was said, and what was done about it; the message only where it is asked for."""
    assert main(["queue", queue, "show", "waits"]) == 0
    shown = capsys.readouterr().out
    assert "RCPT: 450 4.2.0 Greylisted for 300 seconds -> RETRY in 300 s (bob@example.com)" in shown
    assert "How are you?" not in shown
    assert main(["queue", queue, "show", "waits", "--json"]) == 0
    assert "message" not in json.loads(capsys.readouterr().out)["delivery"]
    assert main(["queue", queue, "show", "waits", "--message"]) == 0
    assert "How are you?" in capsys.readouterr().out


def test_retry_and_drop(queue: str, capsys: pytest.CaptureFixture[str]) -> None:
    """What waits can be made due, and taken out; what has ended cannot."""
    assert main(["queue", queue, "retry", "waits"]) == 0
    assert main(["queue", queue, "stats", "--json"]) == 0
    stats = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert 0 <= stats.pop("late") < 60
    assert stats == {"waiting": 0, "due": 2, "working": 0, "ended": 1, "left_alone": {}}
    assert main(["queue", queue, "drop", "waits"]) == 0
    for action in ("retry", "drop"):
        assert main(["queue", queue, action, "ended"]) == 1
        assert "no delivery of that name waits" in capsys.readouterr().err
    assert main(["queue", queue, "show", "waits"]) == 1
    assert main(["queue", queue, "stats"]) == 0
    assert "0 waiting, 1 due, 0 under way, 1 ended" in capsys.readouterr().out


def change(queue: str, sqlite: str, postgresql: str) -> None:
    """Write into a queue, by a statement of its own."""
    if queue.startswith("sqlite:"):
        with closing(sqlite3.connect(queue.partition(":")[2])) as file, file:
            file.execute(sqlite)
    else:
        with psycopg.connect(queue) as database:
            database.execute(postgresql)  # type: ignore[call-overload,unused-ignore]


@pytest.mark.parametrize("action", ["retry", "drop"])
def test_what_a_dead_worker_had(queue: str, action: str, capsys: pytest.CaptureFixture[str]) -> None:
    """It is due, and can be acted on before another worker takes it, as where it is what kills them."""
    change(
        queue,
        "UPDATE smtpretry_deliveries SET holder = 'dead', due = unixepoch() - 1 WHERE id = 'due'",
        "UPDATE smtpretry_deliveries SET holder = gen_random_uuid(), lease = now() - interval '1 s' WHERE id = 'due'",
    )
    assert main(["queue", queue, "stats"]) == 0
    assert "1 waiting, 1 due, 0 under way" in capsys.readouterr().out
    for state, names in (("due", ["due"]), ("working", [])):
        assert main(["queue", queue, "list", "--state", state, "--json"]) == 0
        assert [json.loads(line)["id"] for line in capsys.readouterr().out.splitlines()] == names
    assert main(["queue", queue, action, "due"]) == 0


def test_what_a_living_worker_has(queue: str, capsys: pytest.CaptureFixture[str]) -> None:
    """It is that worker's."""
    change(
        queue,
        "UPDATE smtpretry_deliveries SET holder = 'alive', due = unixepoch() + 60 WHERE id = 'due'",
        "UPDATE smtpretry_deliveries SET holder = gen_random_uuid(), lease = now() + interval '1 min' WHERE id = 'due'",
    )
    for action in ("retry", "drop"):
        assert main(["queue", queue, action, "due"]) == 1
    assert main(["queue", queue, "stats"]) == 0
    assert "1 waiting, 0 due, 1 under way" in capsys.readouterr().out


def test_why_nothing_goes(queue: str, capsys: pytest.CaptureFixture[str]) -> None:
    """For how long the oldest has been due, and which server wants nothing, why, and until when."""
    change(
        queue,
        "UPDATE smtpretry_deliveries SET due = unixepoch() - 7200 WHERE id = 'due'",
        "UPDATE smtpretry_deliveries SET due = now() - interval '2 h' WHERE id = 'due'",
    )
    for ends_in, name in ((600, "smtp.example.com:587"), (-5, "works.example.com:587")):
        row = f"""INSERT INTO smtpretry_servers (name, until, failures, stage, reply)
            VALUES ('{name}', {{}} + {ends_in}, 1, 'AUTH', '[535, "5.7.8", "Wrong password"]')"""  # noqa: S608 - ours
        change(queue, row.format("unixepoch()"), row.format("extract(epoch FROM now())"))
    assert main(["queue", queue, "stats"]) == 0
    first, *others = capsys.readouterr().out.splitlines()
    assert "1 due (for up to 2 h" in first
    assert len(others) == 1
    assert others[0].startswith("smtp.example.com:587 is left alone until 20")
    assert others[0].endswith(": AUTH: 535 5.7.8 Wrong password")
    assert main(["queue", queue, "stats", "--json"]) == 0
    stats = json.loads(capsys.readouterr().out)
    assert stats["late"] == pytest.approx(7200, abs=60)
    assert stats["left_alone"] == {"smtp.example.com:587": "AUTH: 535 5.7.8 Wrong password"}


def test_all_to_one_domain(queue: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Whom it is to picks them out, and they are dropped together; one that is not there is told, and stops nothing."""
    for pattern, names in (("BOB@*", {"waits"}), ("*@example.com", {"due", "waits", "ended"}), ("b_b@*", set())):
        assert main(["queue", queue, "list", "--to", pattern, "--json"]) == 0
        found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert {one["id"] for one in found} == names
        assert all(one["to"] in ([ANN], [BOB]) for one in found)
    assert main(["queue", queue, "drop", "due", "ended", "waits"]) == 1
    said = capsys.readouterr()
    assert said.out.splitlines() == ["due: dropped", "waits: dropped"]
    assert said.err.splitlines() == ["ended: no delivery of that name waits"]


def test_retry_does_not_wait_for_the_server(queue: str) -> None:
    """What is to be tried now is tried now, also where the server has asked for a pause meanwhile."""
    kind, _, path = queue.partition(":")

    async def run() -> None:
        async with (
            ScriptedServer() as server,
            SQLiteEngine(path) if kind == "sqlite" else postgres.engine_in(queue) as engine,
            RetryingSMTP(server.client()) as smtp,
            asyncio.timeout(20),
        ):
            server.on("CONNECT", "421 4.3.2 Try again in 600 seconds", close=True, times=1)
            worker = asyncio.create_task(engine.work(smtp))
            while (await engine.progress()).waiting < 2:  # noqa: ASYNC110 - in a file
                await asyncio.sleep(0.05)
            assert await asyncio.to_thread(main, ["queue", queue, "retry", "due"]) == 0
            await programs.until(lambda: server.messages)
            worker.cancel()
            await asyncio.gather(worker, return_exceptions=True)

    asyncio.run(run())


@pytest.mark.parametrize(
    ("where", "complaint"),
    [
        ("sqlite:missing.db", "there is no such file"),
        ("redis://x", "is no address of a queue"),
        ("postgres+x://app:secret@host/mail", "'postgres+x:...' is no address of a queue"),
        ("postgresql:///mail?host=/nowhere", "No such file or directory"),
    ],
)
def test_no_queue(where: str, complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A queue that is not there is an error, and is not made."""
    assert main(["queue", where, "list"]) == 2
    assert complaint in capsys.readouterr().err


def test_a_database_without_a_queue(server: Postgres, capsys: pytest.CaptureFixture[str]) -> None:
    """A look makes no tables; the error says who does."""
    conninfo = server.create("empty")
    where = f"postgresql:///empty?user=postgres&host={psycopg.conninfo.conninfo_to_dict(conninfo)['host']}"
    assert main(["queue", where, "stats"]) == 2
    assert "there is no queue in that database: a worker makes it" in capsys.readouterr().err


def test_a_file_without_a_queue(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A look makes no queue of an application's file, nor of an empty one, and changes nothing in it."""
    path = tmp_path / "app #1.db"
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("CREATE TABLE orders (number INTEGER)")
    (tmp_path / "empty.db").touch()
    before = path.read_bytes()
    for one in (path, tmp_path / "empty.db"):
        assert main(["queue", f"sqlite:{one}", "stats"]) == 2
        assert "there is no queue in that file" in capsys.readouterr().err
    assert (path.read_bytes(), (tmp_path / "empty.db").read_bytes()) == (before, b"")


@pytest.mark.parametrize("expires", [timedelta.max, datetime.max.replace(tzinfo=UTC)])
def test_what_never_expires(expires: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A delivery that expires after all years can be shown."""

    async def enqueue() -> None:
        engine, client = SQLiteEngine(tmp_path / "mail.db"), ScriptedServer().client()
        async with engine, RetryingSMTP(client, defer=engine) as smtp:
            await smtp.enqueue(letter(ANN), id="never", expires=expires)

    asyncio.run(enqueue())
    assert main(["queue", f"sqlite:{tmp_path / 'mail.db'}", "show", "never"]) == 0
    assert "expires 9999-12-31" in capsys.readouterr().out


def test_a_reader_that_has_seen_enough_is_no_error(queue: str) -> None:
    """`queue ... show | head -1` ends without a word."""
    with subprocess.Popen(
        [sys.executable, "-u", "-m", "smtpretry", "queue", queue, "list"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={"PYTHONPATH": os.pathsep.join(sys.path)},
    ) as process:
        process.stdout.close()  # type: ignore[union-attr] # it is a pipe
        process.stdout = None
        assert process.communicate()[1] == b""
