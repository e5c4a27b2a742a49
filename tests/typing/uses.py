"""Typed uses of the public face, as an application writes them: mypy --strict and pyright read this, nobody runs it.

Each `type: ignore` is a mistake that has to be found: where it is not, mypy and pyright complain of the comment.
"""

from __future__ import annotations

import email.message
from datetime import timedelta
from email.message import EmailMessage
from typing import assert_type

import aiosmtplib
import procrastinate
import psycopg
import tenacity

import smtpretry
from smtpretry import (
    DEFAULT_RULES,
    Action,
    Attempt,
    Decision,
    Delivery,
    Ended,
    Engine,
    Event,
    Failover,
    Hook,
    NotOurs,
    Outcome,
    Reply,
    RetryingSMTP,
    RetryPolicy,
    Rule,
    Scope,
    Stage,
    Stats,
    Status,
    Step,
    SupportsSend,
    UncertainDelivery,
    instrumentation,
)
from smtpretry.queues.procrastinate import ProcrastinateEngine
from smtpretry.testing import NoWait, ReceivedMessage, ScriptedServer, ThreadedServer, no_wait

Sent = tuple[dict[str, aiosmtplib.SMTPResponse], str]


async def notify(smtp: SupportsSend, message: EmailMessage) -> Sent:
    """An application's function: it does not know which client it gets."""
    return await smtp.send_message(message, recipients=["bob@example.com"], timeout=5)


async def either_client(message: EmailMessage) -> None:
    """Both clients are what `notify` takes; what cannot send is not."""
    client = aiosmtplib.SMTP(hostname="smtp.example.com", port=587)
    assert_type(await notify(client, message), Sent)
    assert_type(await notify(RetryingSMTP(client), message), Sent)
    await notify("smtp.example.com", message)  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]


async def get_token() -> str:
    """An OAuth token generator."""
    return "token"


async def wrapped(message: EmailMessage, legacy: email.message.Message) -> None:
    """The client: its arguments, its methods, what they return."""
    policy = RetryPolicy.interactive()
    assert_type(policy, RetryPolicy)
    RetryingSMTP(aiosmtplib.SMTP(), policy, username="me@example.com", oauth_token_generator=get_token)
    RetryingSMTP(lambda: aiosmtplib.SMTP(), max_connections=8, max_messages_per_connection=100, idle_timeout=None)
    RetryingSMTP(aiosmtplib.SMTP(), username=b"app", password=b"secret", cleartext_auth="always")
    RetryingSMTP(aiosmtplib.SMTP(), cleartext_auth="perhaps")  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
    RetryingSMTP("smtp.example.com")  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
    async with RetryingSMTP(aiosmtplib.SMTP()) as smtp:
        assert_type(smtp, RetryingSMTP)
        errors, response = await smtp.send_message(message, sender="app@example.com", timeout=None)
        assert_type(errors, dict[str, aiosmtplib.SMTPResponse])
        assert_type(response, str)
        assert_type(
            await smtp.sendmail("app@example.com", "bob@example.com", b"\r\n", mail_options=("BODY=7BIT",)), Sent
        )
        assert_type(await smtp.deliver(legacy), Delivery)
        assert_type(await smtp.attempt(smtpretry.prepare(message)), Delivery)
        assert_type(smtp.is_connected, bool)
        assert_type(await smtp.connect(), aiosmtplib.SMTPResponse)
        assert_type(await smtp.quit(), aiosmtplib.SMTPResponse)
        await smtp.send_message(b"\r\n")  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
        await smtp.aclose()


def blocking(message: EmailMessage) -> None:
    """The client for code without an event loop: what it takes and returns is what the other one does."""
    with smtpretry.Blocking(lambda: aiosmtplib.SMTP(), RetryPolicy(), username="app", password="secret") as smtp:
        assert_type(smtp, smtpretry.Blocking)
        assert_type(smtp.send_message(message, sender="app@example.com", timeout=5), Sent)
        assert_type(smtp.sendmail("app@example.com", "bob@example.com", b"\r\n"), Sent)
        assert_type(smtp.deliver(message), Delivery)
        assert_type(smtp.enqueue(message, connection=None), Delivery)
        assert_type(smtp.connect(), aiosmtplib.SMTPResponse)
        assert_type(smtp.is_connected, bool)
        for delivery in smtp.send_many([message], concurrency=5):
            assert_type(delivery, Delivery)
        smtp.send_message(b"\r\n")  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
    smtpretry.Blocking("smtp.example.com")  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
    smtpretry.Blocking(aiosmtplib.SMTP(), cleartext_auth="perhaps")  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]


async def one_shot(message: EmailMessage) -> None:
    """`send`, as `aiosmtplib.send`."""
    assert_type(await smtpretry.send(message, hostname="smtp.example.com", port=587, policy=RetryPolicy()), Sent)


async def queued(app: procrastinate.App, message: EmailMessage, connection: psycopg.AsyncConnection) -> None:
    """A queue: what goes to it, what its worker does, and what an engine is."""
    engine: Engine = ProcrastinateEngine(app, stalled_after=60, concurrency=20)

    async def save(delivery: Delivery) -> None:
        if not delivery.pending:
            raise NotOurs

    async with RetryingSMTP(aiosmtplib.SMTP(), RetryPolicy.queue(), defer=engine, max_wait=5) as smtp:
        delivery = await smtp.enqueue(message, sender="app@example.com", connection=connection)
        assert_type(delivery, Delivery)
        assert_type(await smtp.attempt(delivery, save), Delivery)
        assert_type(delivery.dsn(reporting_mta="mx.example.com"), email.message.Message)
        await engine.work(smtp, on_end=save)
        await smtp.attempt(delivery, "save")  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
    RetryingSMTP(aiosmtplib.SMTP(), defer=app)  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]


@smtpretry.retry
async def send_welcome(user: str, *, again: bool = False) -> int:
    """A decorated function keeps its signature."""
    return len(user) + again


@smtpretry.retry(policy=RetryPolicy(max_attempts=3))
async def send_farewell(user: str) -> str:
    """So it does where the decorator has arguments."""
    return user


@smtpretry.retry
def send_plainly(user: str, *, again: bool = False) -> int:
    """A plain function keeps its signature, too."""
    return len(user) + again


async def decorated() -> None:
    """What the decorator leaves as it was."""
    assert_type(await send_welcome("bob", again=True), int)
    assert_type(await send_farewell("bob"), str)
    assert_type(send_plainly("bob", again=True), int)
    send_plainly(5)  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
    await send_welcome(5)  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]


def decided() -> None:
    """A policy, its rules and what it decides."""
    policy = RetryPolicy(
        rules=(Rule(code=550, text=r"too many emails per second", action=Action.RETRY), *DEFAULT_RULES),
        wait=tenacity.wait_exponential(multiplier=60, max=900) + tenacity.wait_random(0, 6),
        stop=tenacity.stop_after_attempt(5),
        give_up_after=timedelta(hours=1),
        max_attempts=None,
        on_uncertain="raise",
    )
    decision = policy.decide(Reply.parse("450 4.2.0 Greylisted for 300 seconds"), Stage.RCPT)
    assert_type(decision, Decision)
    assert_type(decision.action, Action)
    assert_type(decision.scope, Scope)
    assert_type(decision.wait, float)
    assert_type(decision.rule.why, str)
    assert_type(RetryPolicy.queue(give_up_after=timedelta(days=2), rules=DEFAULT_RULES), RetryPolicy)
    assert_type(RetryPolicy.interactive(max_attempts=3), RetryPolicy)
    RetryPolicy.queue(give_up_after=3)  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
    RetryPolicy(on_uncertain="hope")  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
    policy.max_attempts = 5  # type: ignore[misc] # pyright: ignore[reportAttributeAccessIssue]


def told(delivery: Delivery, error: BaseException) -> None:
    """What a delivery tells, and what an exception carries."""
    assert_type(delivery.accepted, list[str])
    assert_type(delivery.refused, dict[str, Reply])
    assert_type(delivery.uncertain, list[str])
    assert_type(delivery.deferred, list[str])
    assert_type(delivery.next_at, float | None)
    assert_type(delivery.outcomes["bob@example.com"], Outcome)
    assert_type(delivery.outcomes["bob@example.com"].status, Status)
    assert_type(delivery.attempts, list[Attempt])
    assert_type(delivery.attempts[0].steps, list[Step])
    assert_type(Delivery.from_dict(delivery.to_dict()), Delivery)
    assert_type(smtpretry.delivery_of(error), Delivery | None)
    if isinstance(error, UncertainDelivery):
        assert_type(error.delivery, Delivery)


def on_step(delivery: Delivery | None, step: Event) -> None:
    """A hook: what it is told has a type of its own."""
    if isinstance(step, Ended):
        assert_type(step.status, Status)
        assert_type(step.reply, Reply | None)
    if isinstance(step, Step):
        assert_type(step.row, str)


async def awaited(delivery: Delivery | None, step: Event) -> None:
    """A coroutine function is no hook."""


def seen(client: aiosmtplib.SMTP) -> None:
    """Hooks, one or several, and how a client is doing."""
    smtp = RetryingSMTP(client, on_step=on_step)
    hooks: list[Hook] = [on_step, lambda _, __: None, instrumentation.prometheus()]
    assert_type(RetryingSMTP(client, on_step=hooks).stats(), Stats)
    assert_type(Failover(smtp, smtp).stats().servers, tuple[Stats, ...])
    assert_type(smtp.stats().paused_until, float | None)
    assert_type(instrumentation.opentelemetry(), Hook)
    RetryingSMTP(client, on_step=5)  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
    RetryingSMTP(client, on_step=awaited)  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]


async def tested() -> None:
    """What a test of the application uses."""
    policy = no_wait()
    assert_type(policy, NoWait)
    async with ScriptedServer(tls=True, auth=("app", "secret")) as server:
        server.on(Stage.RCPT, "bob@*", "450 4.2.0 greylisted, retry in 30 seconds", times=1)
        server.fail_at("END_OF_DATA", "rst", act=True)
        async with RetryingSMTP(server.client(timeout=5), policy, username="app", password="secret") as smtp:
            await smtp.sendmail("app@example.com", ["bob@example.com"], b"\r\n")
        assert_type(server.received("bob@example.com"), list[ReceivedMessage])
        assert_type(policy.waits, list[float])
    ThreadedServer(tls=5)  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
