"""What a newcomer gets wrong: the message names the cause, and what to write instead."""

from __future__ import annotations

import asyncio
import re
from datetime import timedelta
from email.message import EmailMessage
from typing import TYPE_CHECKING, Any

import aiosmtplib
import pytest
from support import ANN, APP, letter

import smtpretry.instrumentation
from smtpretry import Action, Blocking, RetryingSMTP, RetryPolicy, Rule
from smtpretry.testing import ScriptedServer

if TYPE_CHECKING:
    from collections.abc import Callable

CLIENT = aiosmtplib.SMTP(hostname="smtp.example.com")
MISTAKES: dict[str, tuple[Callable[[], Any], str]] = {
    "a host name in place of a client": (
        lambda: RetryingSMTP("smtp.example.com"),
        "aiosmtplib.SMTP(hostname='smtp.example.com', port=587)",
    ),
    "a class of policies": (lambda: RetryingSMTP(CLIENT, RetryPolicy), "such as RetryPolicy()"),
    "a policy that was not called": (lambda: RetryingSMTP(CLIENT, RetryPolicy.queue), "RetryPolicy.interactive()"),
    "a file in place of an engine": (lambda: RetryingSMTP(CLIENT, defer="mail.db"), "SQLiteEngine('mail.db')"),
    "seconds in place of a timedelta": (lambda: RetryPolicy(give_up_after=60), "timedelta(minutes=10)"),
    "a text for the longest wait": (
        lambda: RetryingSMTP(CLIENT, max_wait="60"),
        "max_wait is a number of seconds, not '60'",
    ),
    "a timedelta for the longest wait": (
        lambda: RetryingSMTP(CLIENT, max_wait=timedelta(minutes=1)),
        "max_wait is a number of seconds, not datetime.timedelta",
    ),
    "a text for the idle time": (
        lambda: RetryingSMTP(CLIENT, idle_timeout="x"),
        "idle_timeout is a number of seconds, or None for never, not 'x'",
    ),
    "a text for the time of a blocking call": (
        lambda: Blocking(CLIENT).sendmail("app@example.com", "ann@example.com", b"", timeout="5"),
        "timeout is a positive number of seconds, or None for no limit, not '5'",
    ),
    "an action's name": (lambda: Rule(action="RETRY"), "action is an Action, such as Action.RETRY, not 'RETRY'"),
    "a scope's name": (
        lambda: Rule(action=Action.RETRY, scope="SERVER"),
        "scope is a Scope or None, such as Scope.RECIPIENT, not 'SERVER'",
    ),
    "a stage's name": (
        lambda: Rule(action=Action.RETRY, stages="RCPT"),
        "stages is a collection of Stage, such as {Stage.MAIL, Stage.RCPT}, not 'RCPT'",
    ),
    "a code in place of a scripted reply": (
        lambda: ScriptedServer().on("RCPT", 450),
        'a reply is a str such as "450 4.2.0 Greylisted", or bytes, not 450',
    ),
    "a policy without its name": (lambda: smtpretry.retry(RetryPolicy()), "@smtpretry.retry(policy=...)"),
    "a maker of hooks that was not called": (
        lambda: RetryingSMTP(CLIENT, on_step=smtpretry.instrumentation.prometheus),
        "on_step is a function of a delivery and a step; prometheus takes others: call it here?",
    ),
    "a hook of one argument among several": (
        lambda: RetryingSMTP(CLIENT, on_step=[print, lambda step: step]),
        "on_step is a function of a delivery and a step; ",
    ),
    "a single message for many": (
        lambda: RetryingSMTP(CLIENT).send_many(EmailMessage()),
        "for a single one call send_message or deliver",
    ),
}


@pytest.mark.parametrize(("mistake", "cure"), MISTAKES.values(), ids=MISTAKES)
def test_a_wrong_argument_says_what_to_write(mistake: Callable[[], Any], cure: str) -> None:
    """It is a TypeError at once, before anything is sent."""
    with pytest.raises(TypeError, match=re.escape(cure)):
        mistake()


@pytest.mark.parametrize("port", [-1, 65536, 99999])
def test_a_port_that_is_none_is_told(port: int) -> None:
    """The resolver would take 99999 for 34463, and the client would send the password to whoever listens there."""
    client = aiosmtplib.SMTP(hostname="127.0.0.1", port=port)
    with pytest.raises(ValueError, match=f"port is at most 65535, such as 587, not {port}"):
        RetryingSMTP(client)
    with pytest.raises(ValueError, match="port is at most 65535"):
        asyncio.run(RetryingSMTP(lambda: client).sendmail(APP, [ANN], b""))


async def _send(mistake: str) -> None:
    smtp: Any = RetryingSMTP(CLIENT)
    if mistake == "dict":
        await smtp.send_message({"From": "app@example.com"})
    elif mistake == "delivery":
        await smtp.deliver(smtpretry.prepare(letter()), expires=timedelta(minutes=5))
    else:
        await smtp.sendmail("app@example.com", "ann@example.com", EmailMessage())


@pytest.mark.parametrize(
    ("mistake", "cure"),
    [
        ("dict", "an email.message.EmailMessage, not dict: for str or bytes call sendmail("),
        ("object", "str or bytes, not EmailMessage: for an EmailMessage call send_message("),
        ("delivery", "expires= is for a new message: a Delivery keeps what it was prepared with"),
    ],
)
def test_what_a_way_to_send_does_not_take(mistake: str, cure: str) -> None:
    """The error names the argument, and the way to send that takes it."""
    with pytest.raises(TypeError, match=re.escape(cure)):
        _send(mistake).send(None)


TIMED: dict[str, tuple[Any, ...]] = {
    "send_message": (letter(),),
    "sendmail": (APP, ANN, b""),
    "deliver": (letter(),),
    "attempt": (smtpretry.prepare(letter()),),
    "connect": (),
    "quit": (),
}


@pytest.mark.parametrize("method", TIMED)
def test_a_time_out_is_a_number(method: str) -> None:
    """Each method names the argument and what it takes, before there is a connection."""
    with pytest.raises(TypeError, match="timeout is a positive number of seconds, or None for no limit, not '5'"):
        asyncio.run(getattr(RetryingSMTP(CLIENT), method)(*TIMED[method], timeout="5"))


WITHOUT_ASYNCIO: dict[str, Callable[[], Any]] = {
    "a client": lambda: RetryingSMTP(CLIENT).sendmail(APP, [ANN], b""),
    "async with": lambda: RetryingSMTP(CLIENT).__aenter__(),
    "send": lambda: smtpretry.send(b"", sender=APP, recipients=[ANN]),
    "two servers": lambda: smtpretry.Failover(RetryingSMTP(CLIENT), RetryingSMTP(CLIENT)).sendmail(APP, [ANN], b""),
}


@pytest.mark.parametrize("way", WITHOUT_ASYNCIO)
def test_without_asyncio_it_says_so(way: str) -> None:
    """As under trio, which has an event loop of its own."""
    with pytest.raises(RuntimeError, match="an event loop of asyncio, and none runs here"):
        WITHOUT_ASYNCIO[way]().send(None)


def test_with_names_async_with() -> None:
    """`with` in place of `async with` says so."""
    with pytest.raises(TypeError, match="write `async with`, not `with`"), RetryingSMTP(aiosmtplib.SMTP()):
        pass
