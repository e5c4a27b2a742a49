"""Through two Postfix, of which one is killed in mid-stream and started again: nobody is lost, nobody gets it twice."""

from __future__ import annotations

import asyncio
from email.message import EmailMessage
from typing import TYPE_CHECKING

import aiosmtplib
import faults
import mta
import pytest
import tenacity
from mta import Postfix, Service, require
from rows import ANN, BEN, PEOPLE

from smtpretry import Delivery, Failover, Outcome, RetryingSMTP, RetryPolicy, Status, prepare

if TYPE_CHECKING:
    from collections.abc import Iterator

MANY, AT_A_TIME = 240, 40  # messages
KILLED_AFTER, BACK_AFTER = 60, 150
SERVICE = Service(name="relay")


@pytest.fixture
def servers(certificate: bytes) -> Iterator[tuple[Postfix, Postfix]]:
    """Run two of them."""
    require(Postfix)
    with (
        mta.workplace() as directory,
        Postfix(directory / "first", [SERVICE], PEOPLE, certificate) as first,
        Postfix(directory / "second", [SERVICE], PEOPLE, certificate) as second,
    ):
        yield first, second


def letter(number: int) -> Delivery:
    """A message to two people, with its number as the delivery's name."""
    message = EmailMessage()
    message["From"], message["To"] = "app@sender.test", f"{ANN}, {BEN}"
    message["Message-ID"] = f"<{number}@sender.test>"
    message.set_content("Hello.\n" * 200)
    return prepare(message, id=str(number))


def client(server: Postfix, policy: RetryPolicy) -> RetryingSMTP:
    """Four connections to one of them, in the clear."""

    def make() -> aiosmtplib.SMTP:
        port = server.port(SERVICE.name)
        return aiosmtplib.SMTP(
            hostname="localhost", port=port, local_hostname="client.test", start_tls=False, timeout=10
        )

    return RetryingSMTP(make, policy, max_connections=4)


@pytest.mark.parametrize("mode", faults.MODES)
def test_one_of_two_is_killed_in_mid_stream(servers: tuple[Postfix, Postfix], mode: faults.Mode) -> None:
    """Both mailboxes hold what is reported: one copy each, and none or two only of what was in doubt."""
    first, second = servers
    policy = RetryPolicy(wait=tenacity.wait_fixed(0.5), on_uncertain=mode)

    async def stream(smtp: Failover) -> list[Delivery]:
        deliveries = list[Delivery]()
        async for delivery in smtp.send_many(map(letter, range(MANY)), concurrency=AT_A_TIME):
            deliveries.append(delivery)
            if len(deliveries) == KILLED_AFTER:
                first.kill()
            elif len(deliveries) == BACK_AFTER:
                await asyncio.to_thread(first.start)
        return deliveries

    async def send() -> tuple[list[Delivery], Delivery]:
        async with Failover(client(first, policy), client(second, policy)) as smtp:
            deliveries = await stream(smtp)
            await asyncio.sleep(max(0.0, (smtp.servers[0].stats().paused_until or 0.0) - policy.clock()))
            return deliveries, await smtp.deliver(letter(MANY))

    deliveries, last = asyncio.run(asyncio.wait_for(send(), 60))
    copies = {who: [server.acceptances(who) for server in servers] for who in (ANN, BEN)}
    wrong = {
        (delivery.id, who): (outcome, [each[message_id(delivery)] for each in copies[who]])
        for delivery in deliveries
        for who, outcome in delivery.outcomes.items()
        if not as_reported(outcome, sum(each[message_id(delivery)] for each in copies[who]))
    }
    assert not wrong
    assert len(deliveries) == MANY
    assert [sum(each.values()) > KILLED_AFTER for each in copies[ANN]] == [True, True]
    assert last.attempts[-1].server == deliveries[0].attempts[-1].server  # the first one, which works again


def message_id(delivery: Delivery) -> str:
    """The header of one of the letters."""
    return f"<{delivery.id}@sender.test>"


def as_reported(outcome: Outcome, copies: int) -> bool:
    """Whether so many copies are what it says: one, and for each doubt one more or not."""
    if outcome.status is Status.ACCEPTED:
        return 1 <= copies <= 1 + outcome.doubts
    return outcome.status is Status.UNCERTAIN and copies <= 1
