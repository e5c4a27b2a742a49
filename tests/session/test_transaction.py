"""One transaction after another: clean sessions, the final dot, doubts, and who comes back together."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import aiosmtplib
import pytest
import virtual
from support import ANN, APP, BOB, BODY, CAT, letter, patient, talk, transactions, virtually

import smtpretry
from smtpretry import Delivery, RetryingSMTP, Status, UncertainDelivery, deliveries_of, delivery_of
from smtpretry.testing import ScriptedServer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Coroutine

STAGES = ("MAIL", "RCPT", "DATA", "END_OF_DATA")


class Strict:
    """A server that leaves the transaction open after each refusal, as Postfix 3.7 does after the final dot.

    `refusals` are said once each; what is taken stands in `taken`.
    """

    def __init__(self, refusals: dict[str, str], *, resets: bool = True) -> None:
        self.refusals, self.resets = dict(refusals), resets
        self.taken = list[list[str]]()
        self.nested = self.connections = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:  # noqa: C901 - a session
        self.connections += 1
        is_open, recipients = False, list[str]()

        def say(verb: str, reply: str) -> bool:
            refusal = self.refusals.pop(verb, None)
            writer.write(f"{refusal or reply}\r\n".encode())
            return refusal is None

        writer.write(b"220 strict\r\n")
        while line := (await reader.readline()).decode().strip():
            match line.upper().split(maxsplit=1)[0]:
                case "EHLO":
                    writer.write(b"250 strict\r\n")
                case "RSET":
                    writer.write(b"250 clean\r\n" if self.resets else b"502 RSET is not known\r\n")
                    is_open = is_open and not self.resets
                case "MAIL" if is_open:
                    self.nested += 1
                    writer.write(b"503 5.5.1 nested MAIL command\r\n")
                case "MAIL":
                    is_open, recipients = True, []
                    say("MAIL", "250 ok")
                case "RCPT":
                    if say("RCPT", "250 ok"):
                        recipients.append(line.partition("<")[2].partition(">")[0])
                case "DATA":
                    if say("DATA", "354 go"):
                        while await reader.readline() != b".\r\n":
                            pass
                        if say("END_OF_DATA", "250 taken"):
                            self.taken.append(recipients)
                            is_open = False
                case _:
                    writer.write(b"221 bye\r\n")
        writer.close()

    @contextlib.asynccontextmanager
    async def client(self) -> AsyncIterator[RetryingSMTP]:
        server = await asyncio.start_server(self.serve, "127.0.0.1", 0)
        client = aiosmtplib.SMTP(
            hostname="127.0.0.1", port=server.sockets[0].getsockname()[1], local_hostname="c.example"
        )
        async with RetryingSMTP(client, patient(), idle_timeout=None) as smtp:
            yield smtp
        server.close()
        await asyncio.sleep(0.1)
        await server.wait_closed()


# Clean sessions


@pytest.mark.parametrize("resets", [True, False])
@pytest.mark.parametrize("refusal", ["451 4.3.0 later", "554 5.0.0 no"])
@pytest.mark.parametrize("stage", STAGES)
@virtually
async def test_a_refusal_does_not_hurt_the_next_mail(stage: str, refusal: str, resets: bool) -> None:
    """After a refusal at any stage the session is reset, or closed, before the next MAIL."""
    server = Strict({stage: refusal}, resets=resets)
    async with server.client() as smtp:
        first = asyncio.ensure_future(smtp.deliver(BODY, sender=APP, recipients=[ANN]))
        await asyncio.sleep(1)
        assert (await smtp.deliver(BODY, sender=APP, recipients=[BOB])).accepted == [BOB]
        assert bool((await first).accepted) is refusal.startswith("4")
    assert (server.nested, server.connections) == (0, 1 if resets else 2)
    assert server.taken == [[BOB], *([[ANN]] if refusal.startswith("4") else [])]


# The final dot


@virtually
async def test_the_dot_may_take_its_time() -> None:
    """A server that filters for five minutes before it answers the final dot gets the message once."""
    async with talk() as (server, smtp):
        server.fail_at("END_OF_DATA", "late", delay=300)
        assert (await smtp.deliver(letter(ANN))).accepted == [ANN]
        assert len(server.received(ANN)) == 1


@virtually
async def test_nobody_waits_long_for_rset() -> None:
    """A refusal is told, and the next message goes over a new connection, where RSET gets no answer in ten seconds."""
    async with talk() as (server, smtp):
        server.on("RCPT", "550 5.1.1 No such user", times=1)
        server.fail_at("RSET", "stall", times=1)
        refused = asyncio.ensure_future(smtp.deliver(letter(ANN)))
        await asyncio.sleep(0)
        await smtp.send_message(letter(BOB))
        assert virtual.clock() - virtual.EPOCH == pytest.approx(10, abs=1)
        assert list((await refused).refused) == [ANN]


@pytest.mark.parametrize(
    ("stage", "reply"), [("EHLO", "250 hello"), ("MAIL", "250 ok"), ("RCPT", "250 ok"), ("DATA", "354")]
)
@virtually
async def test_an_answer_that_comes_while_the_loop_stands_still(stage: str, reply: str) -> None:
    """Where the application blocks the event loop for longer than a time-out, an answer that is there counts."""
    async with talk() as (server, smtp):
        loop = asyncio.get_running_loop()
        assert isinstance(loop, virtual.VirtualLoop)

        def block(_: object, __: object) -> None:
            loop.now += 70

        server.on(stage, reply, times=1)
        server.on_script = block
        delivery = await smtp.deliver(letter(ANN))
        assert (delivery.accepted, len(delivery.attempts), server.connections) == ([ANN], 1, 1)


@virtually
async def test_a_timeout_for_the_send_holds_for_the_dot() -> None:
    """A time-out that was given for the send holds for the final dot as well."""
    async with talk(patient(on_uncertain="raise")) as (server, smtp):
        server.fail_at("END_OF_DATA", "late", delay=300)
        with pytest.raises(UncertainDelivery):
            await smtp.send_message(letter(ANN), timeout=30)
        assert virtual.clock() - virtual.EPOCH == pytest.approx(30, abs=1)


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("policy", ["default", "queue"])
@virtually
async def test_few_copies_after_ends_in_doubt(policy: str, large: bool) -> None:
    """A message whose final dot is never answered is sent again twice; then nobody knows, and the caller is told so."""
    async with talk(patient(give_up_after=timedelta(days=5) if policy == "queue" else timedelta(hours=6))) as (
        server,
        smtp,
    ):
        server.fail_at("END_OF_DATA", "stall", act=True)
        delivery = await smtp.deliver(
            BODY + large * 20 * (b"x" * 998 + b"\r\n") * 10, sender=APP, recipients=[ANN, BOB]
        )
        assert delivery.uncertain == [ANN, BOB]
        assert [len(server.received(who)) for who in (ANN, BOB)] == [3, 3]


@virtually
async def test_ends_in_doubt_are_counted_across_processes() -> None:
    """What is stored and loaded between the passes is sent no more often."""
    async with talk() as (server, smtp):
        server.fail_at("END_OF_DATA", "fin", act=True)
        delivery = smtpretry.prepare(BODY, sender=APP, recipients=[ANN])
        while (when := delivery.next_at) is not None:
            await asyncio.sleep(when - virtual.clock())
            delivery = Delivery.from_dict((await smtp.attempt(delivery)).to_dict())
        assert delivery.uncertain == [ANN]
        assert len(server.received(ANN)) == 3


@virtually
async def test_an_acceptance_ends_the_doubt() -> None:
    """Where one of the copies is accepted in the end, the recipient is accepted."""
    async with talk() as (server, smtp):
        server.fail_at("END_OF_DATA", "fin", act=True, times=2)
        assert (await smtp.deliver(letter(ANN))).accepted == [ANN]


# Somebody else's code


def raising(*_: object) -> float:
    raise ZeroDivisionError


@pytest.mark.parametrize("on_uncertain", ["raise", "resend"])
@pytest.mark.parametrize("what", ["wait", "stop", "sleep", "save"])
@virtually
async def test_what_is_known_is_kept_where_the_callers_code_raises(what: str, on_uncertain: Any) -> None:
    """A loss behind the dot is in doubt whatever raises after it; an acceptance stays one, and a refusal."""
    policy = patient(on_uncertain=on_uncertain)
    if what in ("wait", "stop", "sleep"):
        calls = iter([1.0])  # RetryPolicy tries the wait once
        wrong: Any = (lambda *_: next(calls, None) or raising()) if what == "wait" else raising
        policy = patient(on_uncertain=on_uncertain, **{what: wrong})
    async with talk(policy, max_recipients=1) as (server, smtp):
        server.on("RCPT", CAT, "550 5.1.1 No such user")
        server.fail_at("END_OF_DATA", "fin", BOB, act=True, times=1)
        delivery = smtpretry.prepare(BODY, sender=APP, recipients=[ANN, BOB, CAT])

        async def save(delivery: Delivery) -> None:
            if delivery.outcomes[BOB].doubts:
                raising()

        with contextlib.suppress(ZeroDivisionError):
            await (smtp.attempt(delivery, save) if what == "save" else smtp.deliver(delivery))
        assert delivery.outcomes[ANN].status is Status.ACCEPTED
        assert delivery.outcomes[BOB].uncertain
        delivery = await RetryingSMTP(server.client(), patient(on_uncertain=on_uncertain)).deliver(delivery)
        assert len(server.received(ANN)) == 1
        assert len(server.received(BOB)) == (1 if on_uncertain == "raise" else 2)
        assert (delivery.uncertain == [BOB]) is (on_uncertain == "raise")
        assert list(delivery.refused) == [CAT]


@virtually
async def test_one_delivery_sent_twice_at_the_same_time() -> None:
    """A delivery that is being sent is not sent by another task: that one gets an error, and there is one copy."""
    async with talk(cls=ScriptedServer) as (server, smtp):
        server.on("RCPT", "450 4.2.0 Greylisted", times=1)
        delivery = smtpretry.prepare(letter(ANN))
        first = asyncio.ensure_future(smtp.deliver(delivery))
        await asyncio.sleep(1)
        for again in (smtp.deliver(delivery), smtp.attempt(delivery)):
            with pytest.raises(ValueError, match="is being sent already"):
                await again
        assert (await first).accepted == [ANN]
        assert len(server.received(ANN)) == 1
        await smtp.deliver(delivery)  # it has ended: nothing to do
        assert len(server.received(ANN)) == 1


async def in_a_group(*sends: Coroutine[Any, Any, object]) -> None:
    async with asyncio.TaskGroup() as group:
        for send in sends:
            group.create_task(send)


@virtually
async def test_a_group_of_sends_tells_its_deliveries() -> None:
    """The ExceptionGroup of a TaskGroup holds the delivery of each send that failed."""
    async with talk() as (server, smtp):
        server.on("RCPT", "550 5.1.1 No such user")
        with pytest.raises(ExceptionGroup) as caught:
            await in_a_group(smtp.send_message(letter(ANN)), smtp.send_message(letter(BOB)))
        [delivery] = deliveries_of(caught.value)  # the other was cancelled
        assert delivery_of(caught.value) is delivery
        both = ExceptionGroup(
            "two", await asyncio.gather(*map(smtp.send_message, map(letter, (ANN, BOB))), return_exceptions=True)
        )
        assert [list(delivery.refused) for delivery in deliveries_of(both)] == [[ANN], [BOB]]
        assert deliveries_of(ValueError("another")) == []


def test_sends_that_end_with_their_loop_are_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    """Where the event loop ends, the log names who was pending."""

    async def leave() -> None:
        server = await ScriptedServer().start()
        server.on("RCPT", "450 4.2.0 Greylisted")
        smtp = RetryingSMTP(server.client(), patient())
        tasks.append(asyncio.ensure_future(smtp.send_message(letter(ANN))))
        await asyncio.sleep(1)
        await server.stop()

    tasks = list[object]()
    with caplog.at_level(logging.WARNING, "smtpretry"):
        virtual.run(leave())
    assert f"broken off; pending: {ANN}" in caplog.text


# Coming back


@pytest.mark.parametrize("hint", ["", " for 300 seconds"])
@virtually
async def test_who_is_refused_alike_comes_back_together(hint: str) -> None:
    """Fifty recipients greylisted one after the other, some time between them, are offered again in one transaction."""
    people = [f"p{number}@example.com" for number in range(50)]
    async with talk(pipelining=False) as (server, smtp):
        for who in people:
            server.fail_at("RCPT", "late", who, reply=f"450 4.2.0 Greylisted{hint}", act=False, delay=0.01, times=1)
        delivery = await smtp.deliver(BODY, sender=APP, recipients=people)
        assert delivery.accepted == people
        assert transactions(server) == [people, people]


@virtually
async def test_who_waits_for_long_does_not_hold_up_who_waits_for_short() -> None:
    """Different waits stay different."""
    async with talk() as (server, smtp):
        server.on("RCPT", ANN, "450 4.2.0 Greylisted for 30 seconds", times=1)
        server.on("RCPT", BOB, "450 4.2.0 Greylisted for 300 seconds", times=1)
        delivery = await smtp.deliver(BODY, sender=APP, recipients=[ANN, BOB])
        assert delivery.accepted == [ANN, BOB]
        assert transactions(server) == [[ANN, BOB], [ANN], [BOB]]


# What this server cannot do


@virtually
async def test_one_address_that_the_server_cannot_write() -> None:
    """Where SMTPUTF8 is not offered, only the recipient who needs it is refused; nothing is said of it to the server."""
    async with talk(smtputf8=False) as (server, smtp):
        delivery = await smtp.deliver(BODY, sender=APP, recipients=[ANN, "jörg@example.com", BOB])
        assert delivery.accepted == [ANN, BOB]
        assert "SMTPUTF8" in delivery.refused["jörg@example.com"].text
        assert transactions(server) == [[ANN, BOB]]
        with pytest.raises(aiosmtplib.SMTPNotSupported, match="SMTPUTF8"):
            await smtp.sendmail(APP, ["jörg@example.com"], BODY)
        assert len(transactions(server)) == 1


@virtually
async def test_a_domain_outside_ascii_needs_no_extension() -> None:
    """A domain goes as its A-label."""
    async with talk(smtputf8=False) as (server, smtp):
        assert (await smtp.deliver(BODY, sender=APP, recipients=["ann@büro.example"])).accepted == ["ann@büro.example"]
        assert transactions(server) == [["ann@xn--bro-hoa.example"]]


@virtually
async def test_parameters_of_an_extension_that_is_not_offered(caplog: pytest.LogCaptureFixture) -> None:
    """NOTIFY and RET are left out where DSN is not offered: a step and one warning say so, and the mail arrives."""
    async with talk() as (server, smtp):
        with caplog.at_level(logging.WARNING, "smtpretry"):
            delivery = await smtp.deliver(
                BODY, sender=APP, recipients=[ANN, BOB], mail_options=["RET=HDRS"], rcpt_options=["NOTIFY=SUCCESS"]
            )
        assert delivery.accepted == [ANN, BOB]
        assert "sent without RET=HDRS NOTIFY=SUCCESS" in str(delivery.attempts[0].steps[0])
        assert caplog.text.count("sent without RET=HDRS NOTIFY=SUCCESS") == 1
        assert not any("NOTIFY" in command or "RET=" in command for command in server.commands)


@virtually
async def test_a_message_that_is_too_large_is_not_sent() -> None:
    """Where the server says what it takes, a larger message fails at once, and no byte of it goes out."""
    async with talk(size_limit=1000) as (server, smtp):
        with pytest.raises(aiosmtplib.SMTPNotSupported, match="SIZE, RFC 1870"):
            await smtp.sendmail(APP, [ANN], BODY + b"x" * 998 + b"\r\n")
        assert server.verbs == ["EHLO"]
