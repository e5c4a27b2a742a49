"""What stands in the log: a line that a person can read, fields for machines, and a warning where somebody waits long."""

from __future__ import annotations

import ast
import asyncio
import json
import logging
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mta
import pytest
import tenacity
from support import ANN, APP, BOB, BODY, GREYLISTED, letter, patient, talk, virtually

import smtpretry
from smtpretry import Failover, Reply, RetryingSMTP, Stage, log
from smtpretry.testing import ScriptedServer

if TYPE_CHECKING:
    from collections.abc import Callable

DOWN = "421 4.3.2 Service shutting down"
GREYLISTED_LONG = "450 4.2.0 Greylisted for 300 seconds"
UNKNOWN = "550 5.1.1 No such user"
QUICK = tenacity.wait_fixed(20)


@pytest.fixture(name="lines")
def _lines(caplog: pytest.LogCaptureFixture) -> Callable[[int], list[str]]:
    """Return what was logged at a level or above it."""
    caplog.set_level(logging.DEBUG, "smtpretry")

    def lines(level: int = logging.WARNING) -> list[str]:
        return [one.getMessage() for one in caplog.records if one.name == "smtpretry" and one.levelno >= level]

    return lines


def fields(record: logging.LogRecord) -> dict[str, Any]:
    """Return what a formatter for JSON adds to the line."""
    usual = {*vars(logging.makeLogRecord({})), "message"}
    return {name: value for name, value in vars(record).items() if name not in usual}


@virtually
async def test_one_message_for_each_kind_with_fields(caplog: pytest.LogCaptureFixture) -> None:
    """Two refusals have one message, so that they are grouped; who and what differ, in the line and in the fields."""
    caplog.set_level(logging.INFO, "smtpretry")
    async with talk() as (server, smtp):
        server.on("RCPT", ANN, UNKNOWN)
        server.on("RCPT", BOB, "552 5.2.2 Mailbox full")
        delivery = await smtp.deliver(letter(ANN, BOB))
    refusals = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(refusals) == 2
    assert len({record.msg for record in refusals}) == 1
    assert UNKNOWN in refusals[0].getMessage()
    assert f"delivery {delivery.id}, to {ANN}" in refusals[0].getMessage()
    assert fields(refusals[0]) == {
        "delivery_id": delivery.id,
        "recipients": [ANN],
        "server": f"{server.hostname}:{server.port}",
        "stage": "RCPT",
        "code": 550,
        "enhanced": "5.1.1",
        "action": "FAIL",
        "wait": 0.0,
        "row": delivery.attempts[0].steps[0].row,
    }
    json.dumps(fields(refusals[0]))
    for record in caplog.records:
        if record.name == "smtpretry":
            json.dumps(fields(record))


def test_one_module_logs() -> None:
    """Every call of the package's logger stands in one module, with a constant message."""
    calls = list[str]()
    for file in (Path(smtpretry.__file__).parent).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and node.attr == "getLogger":
                calls.append(file.name)
    assert calls == ["log.py"]


@pytest.mark.parametrize("trouble", ["refused", "banner", "silence"])
@virtually
async def test_the_first_connection_that_never_was(trouble: str, lines: Callable[[], list[str]]) -> None:
    """A client that has no connection yet says at once what it waits for and until when, however short the wait is."""
    async with talk(patient(wait=tenacity.wait_fixed(2), give_up_after=timedelta(seconds=9))) as (server, smtp):
        if trouble == "refused":
            await server.stop()
        elif trouble == "banner":
            server.on("CONNECT", "421 4.3.2 not now")
        else:
            server.fail_at("CONNECT", "fin")
        send = asyncio.ensure_future(smtp.deliver(letter(ANN)))
        await asyncio.sleep(1)
        [warning] = lines()
        assert f"no connection to {server.hostname}:{server.port} yet" in warning
        assert "tries again in 2 s, at 20" in warning
        assert ("not now" if trouble == "banner" else "no reply") in warning
        await send
        assert sum("no connection" in line for line in lines()) == 1
        server.clear()


@pytest.mark.parametrize("connections", [1, 5])
@virtually
async def test_a_server_that_says_nothing(connections: int, lines: Callable[[], list[str]]) -> None:
    """Where the server does not greet, that is said after five seconds, long before the client's timeout; once for all."""
    async with (
        ScriptedServer() as server,
        RetryingSMTP(lambda: server.client(timeout=60), patient(), max_connections=connections) as smtp,
    ):
        server.fail_at("CONNECT", "stall")
        sends = [asyncio.ensure_future(smtp.deliver(letter(ANN))) for _ in range(10)]
        await asyncio.sleep(4)
        assert not lines()
        await asyncio.sleep(2)
        [warning] = lines()
        assert f"connection to {server.hostname}:{server.port} is not there after 5 s" in warning
        await asyncio.sleep(56)
        assert "no connection" in lines()[-1]
        for send in sends:
            send.cancel()
        await asyncio.gather(*sends, return_exceptions=True)
        server.clear()


@virtually
async def test_a_silent_server_does_not_use_up_more_than_the_patience() -> None:
    """Where the policy gives up after half a minute, so does the wait for a connection, whatever the client's timeout."""
    loop = asyncio.get_running_loop()
    async with (
        ScriptedServer() as server,
        RetryingSMTP(server.client(timeout=60), patient(give_up_after=timedelta(seconds=30))) as smtp,
    ):
        server.fail_at("CONNECT", "stall")
        began = loop.time()
        delivery = await smtp.deliver(letter(ANN))
        assert loop.time() - began == pytest.approx(30, abs=1)
        assert "where the port begins with TLS, give use_tls=True" in str(delivery.refused[ANN])


@virtually
async def test_who_had_a_connection_is_not_told_of_a_short_wait(lines: Callable[[], list[str]]) -> None:
    """A pause of half a minute or less, after the client had a connection, is no warning."""
    async with talk(patient(wait=QUICK)) as (server, smtp):
        await smtp.deliver(letter(ANN))
        server.on("MAIL", DOWN, times=3)
        server.on("RCPT", BOB, "450 4.2.0 Later", times=2)
        await smtp.deliver(letter(BOB))
        assert not lines()


@virtually
async def test_a_thousand_sends_wait_for_one_pause(lines: Callable[[], list[str]]) -> None:
    """However many sends wait for the same pause, it is said once, with the reason and the time; each pause anew."""
    async with talk() as (server, smtp):
        await smtp.deliver(letter(ANN))
        server.on("MAIL", DOWN, times=3)
        await asyncio.gather(*(smtp.deliver(BODY, sender=APP, recipients=[ANN]) for _ in range(1000)))
        first, second = lines()
        assert f"MAIL: {DOWN}" in first
        assert "left alone for 6" in first
        assert "until 20" in first
        assert "left alone for 12" in second


@virtually
async def test_several_connections_say_it_once(lines: Callable[[], list[str]]) -> None:
    """Where ten connections are told to go away at the same time, the pause is said once."""
    async with (
        ScriptedServer() as server,
        RetryingSMTP(server.client, patient(), max_connections=10) as smtp,
    ):
        server.on("MAIL", DOWN, times=10)
        await asyncio.gather(*(smtp.deliver(letter(ANN)) for _ in range(100)))
        assert len(lines()) == 1


@virtually
async def test_greylisting_is_said_once(lines: Callable[[], list[str]]) -> None:
    """A greylisted send says why it waits, for whom, and until when; those that wait for the same do not repeat it."""
    async with talk() as (server, smtp):
        server.on("RCPT", GREYLISTED_LONG, times=200)
        await asyncio.gather(*(smtp.deliver(letter(ANN)) for _ in range(100)))
        assert [line for line in lines() if f"RCPT: {GREYLISTED_LONG}" in line and f"to {ANN})" in line] == lines()
        assert len(lines()) == 2  # once for each round
        assert "waits 300 s, until 2023-" in lines()[0]


@virtually
async def test_different_reasons_are_said_each(lines: Callable[[], list[str]]) -> None:
    """A full mailbox is not silenced by a greylisting that is waited for at the same time."""
    async with talk() as (server, smtp):
        server.on("RCPT", ANN, GREYLISTED, times=1)
        server.on("RCPT", BOB, "452 4.2.2 Mailbox full", times=1)
        await asyncio.gather(smtp.deliver(letter(ANN)), smtp.deliver(letter(BOB)))
        assert len(lines()) == 2


@virtually
async def test_failover_says_which_server(lines: Callable[[], list[str]]) -> None:
    """Where one of two servers cannot be reached, the log says which one, even though nobody waits."""
    async with ScriptedServer() as first, ScriptedServer() as second:
        await first.stop()
        async with Failover(*(RetryingSMTP(one.client(), patient()) for one in (first, second))) as smtp:
            await smtp.deliver(letter(ANN))
        [warning] = lines()
        assert f"no connection to {first.hostname}:{first.port} yet" in warning


SCRIPT = """
import asyncio, aiosmtplib, smtpretry, email.message
message = email.message.EmailMessage()
message["From"] = message["To"] = "ann@example.com"
async def main():
    smtp = smtpretry.RetryingSMTP(aiosmtplib.SMTP(hostname="127.0.0.1", port={port}))
    async with smtp, asyncio.timeout(0.5):
        await smtp.send_message(message)
asyncio.run(main())
"""


def test_it_shows_without_any_set_up_of_logging() -> None:
    """A script that sets up nothing sees on stderr, within a second, what it waits for."""
    [port] = mta.free_ports(1)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(port=port)], capture_output=True, text=True, timeout=30, check=False
    )
    assert f"smtp has no connection to 127.0.0.1:{port} yet, and tries again in" in done.stderr


@pytest.mark.parametrize("place", ["RCPT: 450", "END_OF_DATA: 250"])
@virtually
async def test_a_handler_that_raises_breaks_no_send_off(place: str, capsys: pytest.CaptureFixture[str]) -> None:
    """What a log handler raises is shown as `logging` shows it, and the send knows nothing of it."""

    class Full(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if place in record.getMessage():
                msg = "no space left"
                raise OSError(msg)

    handler, logger = Full(), logging.getLogger("smtpretry")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        async with talk() as (server, smtp):
            if place == "RCPT: 450":
                server.on("RCPT", reply=GREYLISTED, times=1)
            assert (await smtp.deliver(letter(ANN))).accepted == [ANN]
            assert len(server.messages) == 1
    finally:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)
    assert "OSError: no space left" in capsys.readouterr().err


@virtually
async def test_fields_that_the_application_has_already(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    """An application's record factory knows a `server` and a `stage`: these stand, and nothing is lost."""
    make = logging.getLogRecordFactory()

    def mine(*args: Any, **named: Any) -> logging.LogRecord:
        record = make(*args, **named)
        record.__dict__.update(server="web-1", stage="production")
        return record

    monkeypatch.setattr(logging, "_logRecordFactory", mine)
    async with talk() as (server, smtp):
        server.on("RCPT", ANN, UNKNOWN)
        delivery = await smtp.deliver(letter(ANN))
    (record,) = [one for one in caplog.records if one.name == "smtpretry"]
    assert "550 5.1.1 No such user" in record.getMessage()
    assert (record.server, record.stage, record.code, record.delivery_id) == ("web-1", "production", 550, delivery.id)


def test_besides_a_story_only_what_it_does_not_tell(capsys: pytest.CaptureFixture[str]) -> None:
    """Where somebody tells what comes of each reply, the log says what no reply does; afterwards all is as before."""
    with log.besides_the_story():
        log.still_connecting("mx.example:465", 5)
        log.gave_up("id", ANN, "why", Stage.RCPT, Reply.parse(GREYLISTED))
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("smtp connection to mx.example:465 is not there after 5 s")
    assert logging.getLogger("smtpretry").propagate
    assert not logging.getLogger("smtpretry").handlers
