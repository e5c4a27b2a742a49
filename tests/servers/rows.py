"""The rows of the tests with real servers: what is sent to whom, and what must have come of it."""

from __future__ import annotations

import asyncio
import contextlib
import re
from dataclasses import dataclass, field
from datetime import timedelta
from email.message import EmailMessage
from email.utils import make_msgid
from typing import TYPE_CHECKING, Any

import mta
import tenacity
from mta import PASSWORD, USERNAME, Service

from smtpretry import RetryPolicy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from mta import MailServer, Server

    from smtpretry import Delivery, RetryingSMTP

ANN, BEN, CAT, DAN, EVE = PEOPLE = tuple(f"{name}@{mta.HOME}" for name in ("ann", "ben", "cat", "dan", "eve"))
GHOST = f"ghost@{mta.HOME}"  # has no mailbox
AWAY = "zoe@away.test"  # of another domain: a relay

SOON = timedelta(seconds=20)  # the last attempt: no rule's longer wait fits in before it
EACH_SECOND = RetryPolicy(wait=tenacity.wait_fixed(1), give_up_after=SOON)
TWICE = RetryPolicy(wait=tenacity.wait_fixed(0.1), give_up_after=SOON, max_attempts=2)
AFTER_THE_GREYLIST = RetryPolicy(wait=tenacity.wait_fixed(3), give_up_after=SOON, max_attempts=2)


@dataclass(frozen=True, kw_only=True)
class Case(Service):
    """A row: a service of a server, what is sent to it, what it says on the way, and who gets no copy."""

    helpers: tuple[str, ...] = ()  # fixtures: the servers that this service asks
    client: Mapping[str, Any] = field(default_factory=dict)  # arguments of aiosmtplib.SMTP
    username: str | None = USERNAME
    password: str | None = PASSWORD
    policy: RetryPolicy = EACH_SECOND
    clients: int = 1  # one after the other
    messages: int = 1  # from each client
    pause: float = 0.0  # seconds between them
    outage: str = ""  # what the log has to say before the helpers, stopped for the while, are started again
    connected: bool = False  # before the outage
    text: str = "Hello."
    recipients: tuple[str, ...] = (ANN, BEN)
    says: tuple[str, ...]  # patterns, each of a reply, in this order; there may be others in between
    refused: Mapping[str, int] = field(default_factory=dict)  # who, and with which code; everybody else is accepted


@contextlib.contextmanager
def stopped(servers: list[Server]) -> Iterator[None]:
    """Stop these servers for as long as the block runs."""
    for server in servers:
        server.stop()
    try:
        yield
    finally:
        for server in servers:
            server.start()


def mail(case: Case) -> EmailMessage:
    """Make a message of the row; its sender is the row's own, so that a greylist has not seen it before."""
    message = EmailMessage()
    message["From"] = f"{case.name}@sender.test"
    message["To"] = ", ".join(case.recipients)
    message["Message-ID"] = make_msgid(domain="sender.test")
    message.set_content(case.text)
    return message


def assert_outcome(case: Case, server: MailServer, message: EmailMessage, delivery: Delivery) -> None:
    """Compare what the delivery says and what the mailboxes hold with what the row expects."""
    expected = [recipient for recipient in case.recipients if recipient not in case.refused]
    assert sorted(delivery.accepted) == sorted(expected)
    assert {recipient: reply.code for recipient, reply in delivery.refused.items()} == case.refused
    copies = {recipient: server.copies(recipient, message["Message-ID"]) for recipient in case.recipients}
    assert copies == {recipient: int(recipient in expected) for recipient in case.recipients}


def assert_said(case: Case, server: MailServer) -> None:
    """Find the row's replies in the server's own log, in their order, and no complaint that the client was out of step."""
    replies = server.replies(case.name)
    rest = iter(replies)
    for pattern in case.says:
        assert any(re.match(pattern, reply) for reply in rest), f"no {pattern!r} in its place among {replies}"
    assert not [text for text in server.out_of_step if server.has_logged(case.name, text)]


def check(
    case: Case, server: MailServer, new_client: Callable[[], RetryingSMTP], helpers: Sequence[Server] = ()
) -> None:
    """Send what the row says, and compare what became of it with the row."""

    async def deliver(smtp: RetryingSMTP, message: EmailMessage) -> Delivery:
        if not case.outage:
            return await smtp.deliver(message)
        if case.connected:
            await smtp.connect()
        with stopped(helpers):
            sending = asyncio.create_task(smtp.deliver(message))
            await asyncio.to_thread(mta.wait_until, lambda: server.has_logged(case.name, case.outage), case.outage)
        return await sending

    async def send() -> list[tuple[EmailMessage, Delivery]]:
        sent = []
        for _ in range(case.clients):
            async with new_client() as smtp:
                for number in range(case.messages):
                    await asyncio.sleep(case.pause if number else 0)
                    message = mail(case)
                    sent.append((message, await deliver(smtp, message)))
        return sent

    for message, delivery in asyncio.run(asyncio.wait_for(send(), 60)):
        assert_outcome(case, server, message, delivery)
    assert_said(case, server)
