"""Entries for structlog, as its real renderer writes them."""

from __future__ import annotations

import asyncio
import io
import json
from typing import Any

import structlog
from support import ANN, BOB, letter, patient, virtually

from smtpretry import RetryingSMTP, instrumentation
from smtpretry.testing import ScriptedServer

UNKNOWN = "550 5.1.1 No such user"
DOWN = "421 4.3.2 Service shutting down"


def logger(into: io.StringIO, level: int = 0) -> Any:
    return structlog.wrap_logger(
        structlog.PrintLogger(into),
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
    )


@virtually
async def test_every_event_is_an_entry() -> None:
    """Each event is one line of JSON with its level and fields, a constant message for each kind, and no body."""
    out = io.StringIO()
    hook = instrumentation.structlog(logger(out))
    async with ScriptedServer() as server, RetryingSMTP(server.client(), patient(), on_step=hook) as smtp:
        server.on("CONNECT", DOWN, times=1)
        server.on("RCPT", BOB, UNKNOWN)
        delivery = await smtp.deliver(letter(ANN, BOB))
    entries = [json.loads(line) for line in out.getvalue().splitlines()]
    assert [entry["event"] for entry in entries] == [
        "smtp reply decided",
        "smtp server left alone",
        "smtp connection opened",
        "smtp reply decided",
        "smtp server works again",
        "smtp reply decided",
        "smtp recipient ended",
        "smtp recipient ended",
        "smtp connection closed",
    ]
    refused = next(entry for entry in entries if entry.get("code") == 550)
    assert refused == {
        "event": "smtp reply decided",
        "level": "warning",
        "delivery_id": delivery.id,
        "stage": "RCPT",
        "reply": UNKNOWN,
        "code": 550,
        "enhanced": "5.1.1",
        "action": "FAIL",
        "wait": 0.0,
        "recipients": [BOB],
        "row": delivery.attempts[-1].steps[0].row,
    }
    assert [entry["status"] for entry in entries if "status" in entry] == ["ACCEPTED", "REFUSED"]
    assert "How are you" not in out.getvalue()


@virtually
async def test_what_the_request_has_bound_is_there() -> None:
    """What the application binds to its context stands in the entries of its own sends, at the same time as others."""
    out = io.StringIO()
    hook = instrumentation.structlog(logger(out))
    async with ScriptedServer() as server, RetryingSMTP(server.client(), patient(), on_step=hook) as smtp:
        server.on("RCPT", "450 4.2.0 Greylisted", times=5)

        async def request(number: int) -> None:
            structlog.contextvars.bind_contextvars(request=f"user{number}@example.com")
            await smtp.deliver(letter(f"user{number}@example.com"))

        await asyncio.gather(*(request(number) for number in range(10)))
    ends = [json.loads(line) for line in out.getvalue().splitlines() if "recipient ended" in line]
    assert len(ends) == 10
    assert all(one["request"] == one["recipient"] for one in ends)


@virtually
async def test_levels() -> None:
    """At the level of warnings, a send that goes well writes nothing."""
    out = io.StringIO()
    hook = instrumentation.structlog(logger(out, 30))
    async with ScriptedServer() as server, RetryingSMTP(server.client(), patient(), on_step=hook) as smtp:
        await smtp.deliver(letter(ANN))
        assert not out.getvalue()
        server.on("RCPT", BOB, UNKNOWN)
        await smtp.deliver(letter(BOB))
        assert len(out.getvalue().splitlines()) == 2  # the reply, and the end
