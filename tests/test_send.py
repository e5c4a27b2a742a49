"""A send gets through: who is offered the message when, over which connection, and what the caller gets in the end."""

from __future__ import annotations

import asyncio
import email.policy
import gc
import itertools
import socket
from datetime import timedelta
from email import message_from_bytes
from email.charset import Charset
from email.message import Message
from email.mime.text import MIMEText
from typing import TYPE_CHECKING, Any

import aiosmtplib
import pytest
import tenacity
import virtual
from support import (
    ANN,
    APP,
    BOB,
    BODY,
    CAT,
    DAN,
    EVE,
    GREYLISTED,
    PASSWORD,
    USER,
    letter,
    once,
    patient,
    talk,
    transactions,
    virtually,
)

import smtpretry
from smtpretry import NO_REPLY, Action, Delivery, RetryingSMTP, Stage, UncertainDelivery
from smtpretry.testing import ScriptedServer, no_wait

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from smtpretry.testing import Script

STAGES = ["CONNECT", "EHLO", "STARTTLS", "AUTH", "MAIL", "RCPT", "DATA", "BODY", "END_OF_DATA"]
SETTINGS: dict[str, dict[str, Any]] = {  # of the server and the client, so that a session passes through every stage
    "server": {"tls": True, "auth": (USER, PASSWORD)},
    "credentials": {"username": USER, "password": PASSWORD},
}


def seconds(delivery: Delivery) -> list[float]:
    """When each attempt began, counted from the first."""
    return [attempt.at - delivery.attempts[0].at for attempt in delivery.attempts]


def everybody_once(server: ScriptedServer, *recipients: str) -> bool:
    """Whether each of these, and nobody else, got exactly one message, all of them the same bytes."""
    return {who: len(mails) for who, mails in server.mailboxes.items()} == dict.fromkeys(recipients, 1) and (
        len({mail.content for mail in server.messages}) == 1
    )


# 450 and its kin


@pytest.mark.parametrize("code", [450, 451, 452, 454, 455, 432, 400, 499])
@virtually
async def test_waits_and_offers_again_what_was_refused_for_now(code: int) -> None:
    """A 4xx to a recipient is followed by a wait and a second offer, to that recipient only."""
    async with talk() as (server, smtp):
        server.on("RCPT", BOB, f"{code} not now", times=1)
        delivery = await smtp.deliver(BODY, sender=APP, recipients=[ANN, BOB, CAT])
        assert transactions(server) == [[ANN, BOB, CAT], [BOB]]
        assert [mail.recipients for mail in server.messages] == [[ANN, CAT], [BOB]]
        assert everybody_once(server, ANN, BOB, CAT)
        assert delivery.accepted == [ANN, BOB, CAT]
        assert len(delivery.attempts) == 2
        assert seconds(delivery)[1] >= 60


@pytest.mark.parametrize("code", [450, 451, 452])
@pytest.mark.parametrize("stage", ["CONNECT", "EHLO", "MAIL", "DATA", "END_OF_DATA"])
@virtually
async def test_a_4xx_to_the_whole_message_is_offered_again_to_all(stage: str, code: int) -> None:
    """A 4xx that concerns everybody is followed by a wait and the same message to everybody, once each."""
    async with talk() as (server, smtp):
        server.on(stage, f"{code} not now", times=1)
        delivery = await smtp.deliver(BODY, sender=APP, recipients=[ANN, BOB])
        assert everybody_once(server, ANN, BOB)
        assert len(server.messages) == 1
        assert seconds(delivery) == [0, pytest.approx(60, abs=300)]
        assert seconds(delivery)[1] >= 60
        assert "HELO" not in server.verbs


@virtually
async def test_several_refused_recipients_come_back_together() -> None:
    """Recipients that were refused alike are offered in one transaction, not each in its own."""
    async with talk() as (server, smtp):
        for who in (ANN, CAT, DAN):
            server.on("RCPT", who, GREYLISTED, times=1)
        delivery = await smtp.deliver(BODY, sender=APP, recipients=[ANN, BOB, CAT, DAN])
        assert transactions(server) == [[ANN, BOB, CAT, DAN], [ANN, CAT, DAN]]
        assert everybody_once(server, ANN, BOB, CAT, DAN)
        assert len(delivery.attempts) == 2


@virtually
async def test_nobody_is_taken_and_all_come_back() -> None:
    """Where every recipient was refused for now, no DATA is sent, the transaction ends with RSET, and all come back."""
    async with talk(pipelining=False) as (server, smtp):
        server.on("RCPT", ANN, GREYLISTED, times=1)
        server.on("RCPT", BOB, GREYLISTED, times=1)
        await smtp.deliver(BODY, sender=APP, recipients=[ANN, BOB])
        assert server.verbs.count("DATA") == 1
        assert transactions(server) == [[ANN, BOB], [ANN, BOB]]
        first = server.verbs.index("RCPT")
        assert server.verbs[first + 2] == "RSET"


@virtually
async def test_who_was_accepted_is_never_offered_again() -> None:
    """Through many refusals of others, an accepted recipient sees one RCPT and gets one message."""
    async with talk(patient(give_up_after=timedelta(days=1))) as (server, smtp):
        server.on("RCPT", BOB, GREYLISTED, times=5)
        server.on("RCPT", CAT, GREYLISTED, times=3)
        server.on("END_OF_DATA", CAT, "451 4.3.0 out of disk", times=1)
        delivery = await smtp.deliver(BODY, sender=APP, recipients=[ANN, BOB, CAT])
        assert [offer.count(ANN) for offer in transactions(server)].count(1) == 1
        assert everybody_once(server, ANN, BOB, CAT)
        assert delivery.accepted == [ANN, BOB, CAT]


@virtually
async def test_default_waits_fit_greylisting() -> None:
    """By default the waits are 60 s, doubling to 15 minutes, with a little jitter, and the last offer is after an hour."""
    async with talk() as (server, smtp):
        server.on("RCPT", GREYLISTED)
        delivery = await smtp.deliver(BODY, sender=APP, recipients=[ANN])
        at = seconds(delivery)
        waits = [later - earlier for earlier, later in itertools.pairwise(at)]
        assert len(waits) == 7
        for wait, least in zip(waits[:6], [60, 120, 240, 480, 900, 900], strict=True):
            assert least <= wait <= least + 6.1
        assert len({wait % 60 for wait in waits[:6]}) > 1  # jitter
        assert at[-1] == pytest.approx(3600, abs=0.2)
        assert str(delivery.refused[ANN]) == GREYLISTED


@virtually
async def test_a_delay_that_the_server_names_replaces_the_computed_one() -> None:
    """A "Greylisted for 300 seconds" is waited for, no longer and no shorter."""
    async with talk() as (server, smtp):
        server.on("RCPT", "450 4.2.0 Greylisted for 300 seconds", times=1)
        delivery = await smtp.deliver(BODY, sender=APP, recipients=[ANN])
        assert seconds(delivery) == [0, pytest.approx(300, abs=0.1)]


@virtually
async def test_the_connection_is_free_while_a_send_waits() -> None:
    """While one send waits, another on the same client goes through at once."""
    async with talk() as (server, smtp):
        server.on("RCPT", BOB, GREYLISTED, times=1)
        waiting = asyncio.create_task(smtp.deliver(BODY, sender=APP, recipients=[BOB]))
        await asyncio.sleep(1)
        began = virtual.clock()
        await smtp.sendmail(APP, [ANN], BODY)
        assert virtual.clock() - began < 1
        assert [mail.recipients for mail in server.messages] == [[ANN]]
        await waiting
        assert everybody_once(server, ANN, BOB)


@virtually
async def test_many_sends_at_once_all_arrive_once() -> None:
    """Fifty sends at once through one client are each delivered once, greylisted or not."""
    async with talk() as (server, smtp):
        people = [f"p{number}@example.com" for number in range(50)]
        for who in people[::2]:
            server.on("RCPT", who, GREYLISTED, times=1)
        results = await asyncio.gather(*[smtp.sendmail(APP, [who], BODY) for who in people])
        assert all(errors == {} for errors, _ in results)
        assert everybody_once(server, *people)


# Broken connections


FAULTS: dict[str, Callable[[ScriptedServer, str], Script]] = {
    "421": lambda server, stage: server.on(stage, "421 4.3.0 Service closing", times=1),
    "421 left open": lambda server, stage: server.on(stage, "421 4.3.0 Bye", times=1, close=False),
    "fin": lambda server, stage: server.fail_at(stage, "fin", times=1),
    "rst": lambda server, stage: server.fail_at(stage, "rst", times=1),
    "stall": lambda server, stage: server.fail_at(stage, "stall", times=1),
    "garbage": lambda server, stage: server.fail_at(stage, "garbage", times=1),
    "half": lambda server, stage: server.fail_at(stage, "half", times=1),
    "half, then fin": lambda server, stage: server.fail_at(stage, "half", times=1, close=True),
    "late": lambda server, stage: server.fail_at(stage, "late", times=1, act=False, reply="451 4.3.0 at last"),
    "two replies": lambda server, stage: server.fail_at(stage, "unasked", times=1, act=False),
    "unknown code": lambda server, stage: server.on(stage, b"999 what?\r\n", times=1, accepted=False),
    "informal": lambda server, stage: server.on(stage, b"123 what?\r\n", times=1, accepted=False),
}


@pytest.mark.parametrize(
    ("stage", "fault"),
    [
        (stage, fault)
        for stage in STAGES
        for fault in FAULTS
        # a server that speaks in the body and reads on would take the message all the same
        if stage != "BODY" or fault in ("421", "fin", "rst", "stall", "half", "half, then fin")
    ],
)
@virtually
async def test_survives_a_broken_connection(stage: str, fault: str) -> None:
    """Whatever breaks, wherever: the client closes, connects anew, and everybody gets the message once."""
    async with talk(**SETTINGS["server"], credentials=SETTINGS["credentials"]) as (server, smtp):
        FAULTS[fault](server, stage)
        delivery = await smtp.deliver(BODY, sender=APP, recipients=[ANN, BOB])
        assert delivery.accepted == [ANN, BOB]
        assert everybody_once(server, ANN, BOB)
        assert server.connections >= 2
        assert server.open_connections <= 1
        assert all(mail.connection != 1 for mail in server.messages)
        await smtp.sendmail(APP, [CAT], BODY)
        assert everybody_once(server, ANN, BOB, CAT)


@pytest.mark.parametrize(
    ("stage", "reply"),
    [
        ("CONNECT", "250 hello"),
        ("CONNECT", "354 hello"),
        ("EHLO", "220 hello"),
        ("EHLO", "354 hello"),
        ("STARTTLS", "250 go on"),
        ("AUTH", "250 welcome"),
        ("MAIL", "354 go on"),
        ("RCPT", "354 go on"),
        ("DATA", "250 ok"),
        ("END_OF_DATA", "354 go on"),
    ],
)
@virtually
async def test_survives_a_reply_that_makes_no_sense(stage: str, reply: str) -> None:
    """A reply of the wrong kind is like none: the client is out of step with the server, and starts over."""
    async with talk(**SETTINGS["server"], credentials=SETTINGS["credentials"]) as (server, smtp):
        server.on(stage, reply, times=1, accepted=False)
        delivery = await smtp.deliver(BODY, sender=APP, recipients=[ANN, BOB])
        assert delivery.accepted == [ANN, BOB]
        assert everybody_once(server, ANN, BOB)
        assert server.connections >= 2
        assert all(mail.connection != 1 for mail in server.messages)


@pytest.mark.parametrize("fault", ["421", "421 left open", "fin", "rst", "stall", "garbage", "half, then fin"])
@virtually
async def test_a_break_after_some_were_accepted_concerns_the_others_only(fault: str) -> None:
    """What breaks in a later transaction makes nobody of an earlier one get it twice."""
    async with talk(max_recipients=2) as (server, smtp):
        FAULTS[fault](server, "END_OF_DATA").pattern = CAT
        delivery = await smtp.deliver(BODY, sender=APP, recipients=[ANN, BOB, CAT, DAN])
        assert delivery.accepted == [ANN, BOB, CAT, DAN]
        assert everybody_once(server, ANN, BOB, CAT, DAN)


@pytest.mark.parametrize("pipelining", [True, False])
@pytest.mark.parametrize("fault", ["421", "fin", "stall", "garbage"])
@virtually
async def test_a_server_that_always_breaks_is_given_up(fault: str, pipelining: bool) -> None:
    """A connection that breaks each time ends in an exception after the policy's patience, not in a loop."""
    async with talk(patient(max_attempts=3), pipelining=pipelining) as (server, smtp):
        for _ in range(50):
            FAULTS[fault](server, "MAIL").optional = True
        with pytest.raises(aiosmtplib.SMTPException) as caught:
            await smtp.sendmail(APP, [ANN], BODY)
        assert server.connections == 3 + (pipelining and fault != "421")  # one more, to go on without
        assert len(caught.value.delivery.attempts) == 3
        assert server.messages == []


@pytest.mark.parametrize("how", ["fin", "rst", "421"])
@virtually
async def test_a_connection_that_died_while_idle_is_replaced_at_once(how: str) -> None:
    """A connection that the server closed since the last message costs no wait and no attempt."""
    async with talk(credentials={"idle_timeout": None}) as (server, smtp):
        await smtp.sendmail(APP, [ANN], BODY)
        server.disconnect("421 4.4.2 idle for too long" if how == "421" else b"", close="rst" if how == "rst" else True)
        delivery = await smtp.deliver(BODY, sender=APP, recipients=[BOB])
        assert len(delivery.attempts) == 1
        assert virtual.clock() - virtual.EPOCH < 1
        assert everybody_once(server, ANN, BOB)


@virtually
async def test_an_idle_421_is_not_the_answer_to_mail() -> None:
    """A 421 that came while the connection was idle is no refusal of the next message, even where it is left open."""
    async with talk(credentials={"idle_timeout": None}) as (server, smtp):
        await smtp.sendmail(APP, [ANN], BODY)
        server.disconnect("421 4.4.2 idle for too long", close=False)
        delivery = await smtp.deliver(BODY, sender=APP, recipients=[BOB])
        assert everybody_once(server, ANN, BOB)
        assert len(delivery.attempts) == 1


@pytest.mark.parametrize("reply", ["450 4.2.0 later", "550 5.1.1 who?"])
@pytest.mark.parametrize("position", [0, 1, 2])
@virtually
async def test_a_recipient_that_is_refused_and_hung_up_on_does_not_stop_the_others(position: int, reply: str) -> None:
    """Haraka says 450 and Exim 550 and then hang up: the others get the message at once, over another connection."""
    others = [ANN, CAT]
    async with talk() as (server, smtp):
        server.on("RCPT", BOB, reply, close=True)
        delivery = await smtp.deliver(BODY, sender=APP, recipients=[*others[:position], BOB, *others[position:]])
        assert delivery.accepted == others
        assert {who: str(said) for who, said in delivery.refused.items()} == {BOB: reply}
        assert everybody_once(server, *others)
        assert all(delivery.outcomes[who].attempts == 1 for who in others)


@virtually
async def test_a_server_that_restarts_is_waited_for() -> None:
    """While nobody listens the message waits, and it goes through when the server is back."""
    async with ScriptedServer() as server, RetryingSMTP(server.client(), patient()) as smtp:
        await server.stop()
        sending = asyncio.create_task(smtp.deliver(BODY, sender=APP, recipients=[ANN]))
        await asyncio.sleep(30)
        await server.start()
        delivery = await sending
        assert [step.stage for attempt in delivery.attempts for step in attempt.steps] == [
            Stage.CONNECT,
            Stage.END_OF_DATA,
        ]
        assert everybody_once(server, ANN)


@pytest.mark.parametrize("fault", ["fin", "rst", "stall", "garbage", "half"])
@pytest.mark.parametrize("taken", [True, False], ids=["taken", "not taken"])
@virtually
async def test_after_the_final_dot_the_message_is_sent_again_by_default(fault: str, taken: bool) -> None:
    """A break between the final dot and the reply is followed by the same bytes under the same Message-ID."""
    async with talk() as (server, smtp):
        server.fail_at("END_OF_DATA", fault, act=taken, times=1)
        message = letter(ANN)
        errors, _ = await smtp.send_message(message)
        assert errors == {}
        assert len(server.messages) == 1 + taken
        assert len({mail.content for mail in server.messages}) == 1


@pytest.mark.parametrize("fault", ["fin", "rst", "stall", "garbage", "half"])
@virtually
async def test_at_most_once_where_the_policy_says_so(fault: str) -> None:
    """With on_uncertain="raise" a break after the final dot is not followed by a second copy: the caller is told."""
    async with talk(patient(on_uncertain="raise")) as (server, smtp):
        server.fail_at("END_OF_DATA", fault, act=True, times=1)
        with pytest.raises(UncertainDelivery) as caught:
            await smtp.sendmail(APP, [ANN], BODY)
        assert caught.value.delivery.uncertain == [ANN]
        assert caught.value.delivery.refused == {}
        assert len(server.messages) == 1
        assert server.verbs.count("MAIL") == 1


@pytest.mark.parametrize("stage", ["MAIL", "RCPT", "DATA"])
@virtually
async def test_a_break_before_the_final_dot_is_not_uncertain(stage: str) -> None:
    """With on_uncertain="raise" a break where the message cannot have been taken is simply sent again."""
    async with talk(patient(on_uncertain="raise")) as (server, smtp):
        server.fail_at(stage, "fin", times=1)
        assert (await smtp.sendmail(APP, [ANN], BODY))[0] == {}
        assert everybody_once(server, ANN)


@virtually
async def test_a_break_in_the_body_is_not_uncertain() -> None:
    """A large body that breaks off half-way was not taken, and goes again even with on_uncertain="raise"."""
    async with talk(patient(on_uncertain="raise"), size_limit=None) as (server, smtp):
        server.fail_at("BODY", "rst", times=1)
        big = BODY + b"x" * 70 + b"\r\n" * 1 + (b"y" * 70 + b"\r\n") * 300_000
        assert (await smtp.sendmail(APP, [ANN], big))[0] == {}
        assert everybody_once(server, ANN)
        assert server.messages[0].content == big


@virtually
async def test_a_large_body_leaves_the_connection_open() -> None:
    """A body of some megabytes arrives byte for byte, and the next message goes over the same connection."""
    big = BODY + b"".join(b".%d\r\n" % number for number in range(400_000))
    async with talk(size_limit=None) as (server, smtp):
        await smtp.sendmail(APP, [ANN], big)
        gc.collect()
        await smtp.sendmail(APP, [BOB], BODY)
        assert [mail.content for mail in server.messages] == [big, BODY]
        assert server.connections == 1


@virtually
async def test_an_uncertain_recipient_that_is_refused_later_stays_uncertain() -> None:
    """A refusal after a break behind the final dot is not reported as a refusal: the first copy may have been taken."""
    async with talk() as (server, smtp):
        server.fail_at("END_OF_DATA", "fin", act=True, times=1)
        server.on("RCPT", "550 5.1.1 gone", times=1).used = 1  # switched on after the first attempt
        rcpt = server.scripts[-1]
        asyncio.get_running_loop().call_later(1, setattr, rcpt, "used", 0)
        delivery = await smtp.deliver(BODY, sender=APP, recipients=[ANN])
        assert delivery.uncertain == [ANN]
        assert delivery.refused == {}


@virtually
async def test_a_refusal_within_the_body_is_heard() -> None:
    """A server that refuses while the body is being written, and hangs up, is believed: 552 is final."""
    async with talk(size_limit=None) as (server, smtp):
        server.on("BODY", "552 5.3.4 too big", close=True, times=1)
        big = BODY + (b"y" * 70 + b"\r\n") * 300_000
        with pytest.raises(aiosmtplib.SMTPDataError) as caught:
            await smtp.sendmail(APP, [ANN], big)
        assert caught.value.code == 552
        assert server.messages == []
        assert server.connections == 1


# Too many recipients


FULL = [
    "452 4.5.3 Error: too many recipients",
    "452 Too many recipients",
    "452",
    "451 4.5.3 Too many recipients",
    "450 Too many recipients",
    "552 too many recipients",
    "552 5.5.3 Too many recipients",
]


@pytest.mark.parametrize("reply", FULL)
@virtually
async def test_splits_where_the_server_takes_no_more_recipients(reply: str) -> None:
    """Those taken go now, the rest at once in the next transaction of the same connection and attempt."""
    async with talk(pipelining=False) as (server, smtp):
        server.on("RCPT", CAT, reply, times=1)
        delivery = await smtp.deliver(BODY, sender=APP, recipients=[ANN, BOB, CAT, DAN])
        assert [mail.recipients for mail in server.messages] == [[ANN, BOB], [CAT, DAN]]
        assert everybody_once(server, ANN, BOB, CAT, DAN)
        assert virtual.clock() == virtual.EPOCH
        assert len(delivery.attempts) == server.connections == 1


@pytest.mark.parametrize("limit", [1, 2, 3, 7])
@virtually
async def test_splits_as_often_as_needed(limit: int) -> None:
    """A hundred recipients reach a server that takes a few at a time, with one RCPT too many and no wait."""
    people = [f"p{number}@example.com" for number in range(100)]
    async with talk(max_recipients=limit, pipelining=False) as (server, smtp):
        errors, _ = await smtp.sendmail(APP, people, BODY)
        assert errors == {}
        assert everybody_once(server, *people)
        assert len(server.messages) == -(-100 // limit)
        assert server.verbs.count("RCPT") == 101
        assert virtual.clock() == virtual.EPOCH


@virtually
async def test_splits_where_the_server_then_refuses_the_data_too() -> None:
    """Exim says 552 to one recipient too many and then 554 to DATA: nobody has it yet, and all get it in the end, once."""
    async with talk() as (server, smtp):
        server.on("RCPT", DAN, "552 too many recipients", times=1)
        server.on("DATA", CAT, "554 Too many recipients", times=1)
        delivery = await smtp.deliver(BODY, sender=APP, recipients=[ANN, BOB, CAT, DAN])
        assert delivery.accepted == [ANN, BOB, CAT, DAN]
        assert everybody_once(server, ANN, BOB, CAT, DAN)
        assert virtual.clock() == virtual.EPOCH


@virtually
async def test_a_split_and_a_refusal_do_not_mix() -> None:
    """Where one recipient is greylisted, one unknown, and the rest too many, each gets what it is due."""
    async with talk(pipelining=False) as (server, smtp):
        server.on("RCPT", ANN, GREYLISTED, times=1)
        server.on("RCPT", BOB, "550 5.1.1 unknown", times=1)
        server.on("RCPT", DAN, "452 4.5.3 Too many recipients", times=1)
        errors, _ = await smtp.sendmail(APP, [ANN, BOB, CAT, DAN, EVE], BODY)
        assert errors == {BOB: (550, "5.1.1 unknown")}
        assert [mail.recipients for mail in server.messages] in (
            [[CAT], [DAN], [EVE], [ANN]],
            [[CAT], [DAN, EVE], [ANN]],
        )
        assert everybody_once(server, ANN, CAT, DAN, EVE)


@virtually
async def test_a_single_recipient_that_is_too_many_is_tried_later() -> None:
    """452 to the first recipient of a transaction cannot be split: it is tried again after a wait."""
    async with talk() as (server, smtp):
        server.on("RCPT", ANN, "452 4.5.3 Too many recipients", times=1)
        delivery = await smtp.deliver(BODY, sender=APP, recipients=[ANN])
        assert delivery.accepted == [ANN]
        assert seconds(delivery)[1] >= 60


@virtually
async def test_a_452_that_is_no_count_of_recipients_is_waited_for() -> None:
    """A "452 4.3.1 Insufficient system storage" to a recipient is no reason to go on at once."""
    async with talk() as (server, smtp):
        server.on("RCPT", BOB, "452 4.3.1 Insufficient system storage", times=1)
        delivery = await smtp.deliver(BODY, sender=APP, recipients=[ANN, BOB])
        assert seconds(delivery)[1] >= 60
        assert everybody_once(server, ANN, BOB)


# 5xx


@pytest.mark.parametrize("code", [550, 551, 553, 554, 556])
@virtually
async def test_a_5xx_to_a_recipient_is_final_for_that_recipient(code: int) -> None:
    """The refused recipient is offered once, the others get the message, and the caller gets the refusal returned."""
    async with talk() as (server, smtp):
        server.on("RCPT", BOB, f"{code} 5.1.1 no", times=1)
        errors, response = await smtp.sendmail(APP, [ANN, BOB, CAT], BODY)
        assert errors == {BOB: (code, "5.1.1 no")}
        assert response == "2.0.0 Ok: queued as 1"
        assert everybody_once(server, ANN, CAT)
        assert transactions(server) == [[ANN, BOB, CAT]]


@pytest.mark.parametrize("stage", ["MAIL", "DATA", "END_OF_DATA"])
@virtually
async def test_a_5xx_to_the_message_is_final_for_everybody(stage: str) -> None:
    """A refused message is not offered again, to those either that a 450 had put off."""
    async with talk() as (server, smtp):
        server.on("RCPT", ANN, GREYLISTED, optional=True)
        server.on(stage, "554 5.6.0 no", times=1)
        delivery = await smtp.deliver(BODY, sender=APP, recipients=[ANN, BOB])
        assert {who: reply.code for who, reply in delivery.refused.items()} == {ANN: 554, BOB: 554}
        assert server.verbs.count("MAIL") == 1
        assert len(delivery.attempts) == 1
        assert server.messages == []


@virtually
async def test_a_5xx_after_some_were_accepted_leaves_them_accepted() -> None:
    """A message that is refused in the second transaction stays accepted for those of the first."""
    async with talk(max_recipients=1) as (server, smtp):
        server.on("END_OF_DATA", BOB, "554 5.6.0 no", times=1)
        errors, _ = await smtp.sendmail(APP, [ANN, BOB], BODY)
        assert errors == {BOB: (554, "5.6.0 no")}
        assert everybody_once(server, ANN)


@pytest.mark.parametrize("reply", ["554 5.7.1 go away", "550 no", "521 5.3.2 no mail here", "556 never"])
@virtually
async def test_a_5xx_banner_is_final_for_everybody(reply: str) -> None:
    """A server that refuses the connection for good is not asked twice."""
    async with talk() as (server, smtp):
        server.on("CONNECT", reply)
        with pytest.raises(aiosmtplib.SMTPConnectResponseError) as caught:
            await smtp.sendmail(APP, [ANN, BOB], BODY)
        assert server.connections == 1
        assert [*caught.value.delivery.refused] == [ANN, BOB]
        assert "MAIL" not in server.verbs


# The bytes


@virtually
async def test_every_attempt_sends_the_same_bytes() -> None:
    """The copies of one message are identical, with one Message-ID and one Date, though hours lie between them."""
    async with talk(patient(give_up_after=timedelta(days=2))) as (server, smtp):
        server.on("RCPT", BOB, "450 try again in 3 hours", times=2)
        server.on("RCPT", CAT, GREYLISTED, times=1)
        await smtp.send_message(letter(ANN, BOB, CAT))
        assert len(server.messages) == 3
        assert len({mail.content for mail in server.messages}) == 1
        message = server.messages[0].message
        assert len(message.get_all("Message-ID")) == len(message.get_all("Date")) == 1
        assert message["Message-ID"].endswith("@example.com>")


@virtually
async def test_two_messages_have_two_message_ids() -> None:
    """Each send of the same object is a message of its own."""
    async with talk() as (server, smtp):
        message = letter()
        before = message.as_bytes()
        await smtp.send_message(message)
        await smtp.send_message(message)
        assert len({mail.message["Message-ID"] for mail in server.messages}) == 2
        assert message.as_bytes() == before


@pytest.mark.parametrize("raw", [True, False], ids=["bytes", "object"])
@virtually
async def test_keeps_the_message_id_and_date_that_are_there(raw: bool) -> None:
    """A Message-ID and a Date of the application's are neither replaced nor doubled."""
    async with talk() as (server, smtp):
        message = letter(message_id="<mine@example.com>", date="Mon, 01 Jan 2024 00:00:00 +0000")
        await smtp.deliver(message.as_bytes() if raw else message, sender=APP, recipients=[ANN])
        received = server.messages[0].message
        assert received.get_all("Message-ID") == ["<mine@example.com>"]
        assert received.get_all("Date") == ["Mon, 01 Jan 2024 00:00:00 +0000"]


@pytest.mark.parametrize(
    ("given", "body"),
    [
        (b"Subject: x\n\nbody\n", b"body\r\n"),
        (b"Subject: x\r\n\r\n.\r\n", b".\r\n"),
        (b"Subject: x\r\n\r\n..\r\n.a\r\nb.\r\n", b"..\r\n.a\r\nb.\r\n"),
        (b"Subject: x\r\n\r\nno line end", b"no line end\r\n"),
        (b"Subject: x\r\n\r\nlone\rreturn\r\n", b"lone\r\nreturn\r\n"),
        (b"Subject: x\r\n\r\nlone\nfeed\r\n", b"lone\r\nfeed\r\n"),
        (b"\r\nonly a body\r\n", b"only a body\r\n"),
        (b"only a body", b"only a body\r\n"),
        (b"", b""),
    ],
)
@virtually
async def test_the_body_arrives_as_it_is(given: bytes, body: bytes) -> None:
    """Dots, missing line ends and missing headers change nothing in what the recipient reads."""
    async with talk() as (server, smtp):
        await smtp.sendmail(APP, [ANN], given)
        header, _, arrived = server.messages[0].content.partition(b"\r\n\r\n")
        assert arrived == body
        assert b"Message-ID: <" in header
        assert b"Date: " in header
        assert (b"Subject: x" in header) == given.startswith(b"Subject")


@virtually
async def test_a_dot_in_front_of_everything_arrives() -> None:
    """A message whose very first byte is a dot keeps it."""
    given = b".dotted: yes\r\nMessage-ID: <1@example.com>\r\nDate: Mon, 01 Jan 2024 00:00:00 +0000\r\n\r\nbody\r\n"
    async with talk() as (server, smtp):
        await smtp.sendmail(APP, [ANN], given)
        assert server.messages[0].content == given


@virtually
async def test_bcc_is_delivered_and_not_shown() -> None:
    """Who stands in Bcc gets the message, and the header does not go out."""
    async with talk() as (server, smtp):
        await smtp.send_message(letter(ANN, cc=BOB, bcc=CAT))
        assert everybody_once(server, ANN, BOB, CAT)
        assert b"bcc" not in server.messages[0].content.lower()


@virtually
async def test_the_same_recipient_given_twice_gets_it_once() -> None:
    """A mailbox that is named twice, the domain in other letters or with a display name, gets one copy."""
    async with talk() as (server, smtp):
        await smtp.sendmail(APP, [ANN, "ann@EXAMPLE.com", f"Ann <{ANN}>", BOB], BODY)
        assert transactions(server) == [[ANN, BOB]]
        assert everybody_once(server, ANN, BOB)


# What the server lacks


@pytest.mark.parametrize("offered", [True, False])
@pytest.mark.parametrize("old", [True, False], ids=["Message", "EmailMessage"])
@virtually
async def test_a_message_object_suits_any_server(offered: bool, old: bool) -> None:
    """A message object with umlauts reaches a server without 8BITMIME, and is read the same there."""
    async with talk(eightbitmime=offered, smtputf8=offered) as (server, smtp):
        message = letter()
        message.replace_header("Subject", "Grüße")
        message.set_content("Schöne Grüße\n", cte="8bit")
        sent = message_from_bytes(message.as_bytes(policy=email.policy.SMTP)) if old else message
        assert isinstance(sent, Message)
        await smtp.send_message(sent)
        received = server.messages[0].message
        assert received.get_content().strip() == "Schöne Grüße"
        assert received["Subject"] == "Grüße"
        assert offered or server.messages[0].content.isascii()


@pytest.mark.parametrize("old", [True, False], ids=["Message", "EmailMessage"])
@virtually
async def test_a_line_may_begin_with_from(old: bool) -> None:
    """A line "From here on" gets no ">" before it: that is for mailbox files."""
    async with talk() as (server, smtp):
        message = letter()
        message.set_content("All is well\nFrom here on\n")
        await smtp.send_message(message_from_bytes(message.as_bytes()) if old else message)
        assert server.messages[0].message.get_content().splitlines() == ["All is well", "From here on"]


class EightBits(MIMEText):
    """A text that stays as it is when it is to be written as 7-bit MIME, as Django's do."""

    def set_payload(self, payload: Any, charset: Any = None) -> None:
        if charset is not None:
            charset = Charset("utf-8")
            charset.body_encoding = None
        super().set_payload(payload, charset)


@pytest.mark.parametrize("offered", [True, False])
@virtually
async def test_a_message_object_that_insists_on_8_bits_suits_any_server(offered: bool) -> None:
    """Also where a class of its own, such as Django's, does not let the generator rewrite its text."""
    async with talk(eightbitmime=offered) as (server, smtp):
        message = EightBits("Schöne Grüße\nFrom here\n", "plain", "utf-8")
        message["From"], message["To"], message["Bcc"] = APP, ANN, BOB
        await smtp.send_message(message)
        [received] = server.messages
        assert received.recipients == [ANN, BOB]
        assert received.message.get_content().splitlines() == ["Schöne Grüße", "From here"]
        assert received.message["Bcc"] is None


@virtually
async def test_bytes_of_eight_bits_go_as_they_are_where_the_server_takes_them() -> None:
    """Bytes outside ASCII are declared with BODY=8BITMIME and arrive unchanged."""
    raw = BODY + "Grüße\r\n".encode()
    async with talk() as (server, smtp):
        await smtp.sendmail(APP, [ANN], raw)
        assert server.messages[0].content == raw
        assert "BODY=8BITMIME" in server.messages[0].options


@virtually
async def test_bytes_of_eight_bits_are_a_clear_error_elsewhere() -> None:
    """A server without 8BITMIME is sent nothing of an 8-bit message: the error names the extension and the cure."""
    async with talk(eightbitmime=False) as (server, smtp):
        with pytest.raises(aiosmtplib.SMTPNotSupported, match="8BITMIME") as caught:
            await smtp.sendmail(APP, [ANN], BODY + "Grüße\r\n".encode())
        assert "MAIL" not in server.verbs
        assert "EmailMessage" in str(caught.value)
        assert len(caught.value.delivery.attempts) == 1


@pytest.mark.parametrize("who", ["recipient", "sender"])
@virtually
async def test_an_address_outside_ascii_needs_smtputf8(who: str) -> None:
    """An internationalised address is sent with SMTPUTF8 where it is offered, and is a clear error where it is not."""
    sender, recipient = (APP, "jürgen@example.com") if who == "recipient" else ("jürgen@example.com", ANN)
    async with talk() as (server, smtp):
        await smtp.sendmail(sender, [recipient], BODY)
        assert "SMTPUTF8" in server.messages[0].options
        assert server.messages[0].recipients == [recipient]
        assert server.messages[0].sender == sender
    async with talk(smtputf8=False) as (server, smtp):
        with pytest.raises(aiosmtplib.SMTPNotSupported, match="SMTPUTF8"):
            await smtp.sendmail(sender, [recipient], BODY)
        assert "MAIL" not in server.verbs


@virtually
async def test_what_a_server_offers_is_asked_anew_on_each_connection() -> None:
    """SIZE and 8BITMIME of the first connection are not taken for those of the second."""
    async with talk() as (server, smtp):
        server.on("RCPT", GREYLISTED, times=1, close=True)
        sending = asyncio.create_task(smtp.send_message(letter()))
        await asyncio.sleep(10)
        server.size_limit, server.eightbitmime = None, False
        await sending
        first, second = [command for command in server.commands if command.startswith("MAIL")]
        assert "SIZE=" in first
        assert "BODY=" not in second


@virtually
async def test_mail_and_rcpt_options_are_passed_on() -> None:
    """ESMTP parameters of the caller reach MAIL and each RCPT, on every attempt."""
    async with talk(extensions=["DSN"]) as (server, smtp):
        server.on("MAIL", "250 2.1.0 Ok")
        server.on("RCPT", GREYLISTED, times=1)
        server.on("RCPT", "250 2.1.5 Ok", times=1)
        server.on("DATA", "554 5.6.0 enough", times=1)
        await smtp.deliver(BODY, sender=APP, recipients=[ANN], mail_options=["RET=HDRS"], rcpt_options=["NOTIFY=NEVER"])
        mails = [command for command in server.commands if command.startswith("MAIL")]
        rcpts = [command for command in server.commands if command.startswith("RCPT")]
        assert [command.partition("> ")[2] for command in mails] == [f"RET=HDRS SIZE={len(BODY)}"] * 2
        assert [command.partition("> ")[2] for command in rcpts] == ["NOTIFY=NEVER"] * 2


# Cancelling


async def until(condition: Callable[[], bool]) -> None:
    """Wait, in no time, until something has happened at the server."""
    for _ in range(10_000):
        if condition():
            return
        await asyncio.sleep(0)
    pytest.fail("it never happened")


@pytest.mark.parametrize("stage", STAGES)
@virtually
async def test_cancelled_at_any_stage_the_next_send_works(stage: str) -> None:
    """A send that is cancelled while the server is silent closes the connection, and the next send goes through."""
    async with talk(**SETTINGS["server"], credentials=SETTINGS["credentials"]) as (server, smtp):
        script = server.fail_at(stage, "stall", times=1)
        sending = asyncio.create_task(smtp.sendmail(APP, [ANN], BODY))
        await until(lambda: script.used == 1)
        sending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sending
        assert not smtp.is_connected
        await until(lambda: server.open_connections == 0)
        assert (await smtp.sendmail(APP, [BOB], BODY)) == ({}, "2.0.0 Ok: queued as 1")
        assert everybody_once(server, BOB)
        assert virtual.clock() - virtual.EPOCH < 1


@virtually
async def test_cancelled_between_any_two_steps_the_next_send_works() -> None:
    """However many rounds of the loop a send has had when it is cancelled, the next one pairs replies with its own commands."""
    reached = set[int]()
    for rounds in range(0, 120, 3):
        async with talk(tls=True, auth=(USER, PASSWORD), credentials=SETTINGS["credentials"]) as (server, smtp):
            sending = asyncio.create_task(smtp.sendmail(APP, [ANN], BODY))
            for _ in range(rounds):
                await asyncio.sleep(0)
            done = not sending.cancel()
            (result,) = await asyncio.gather(sending, return_exceptions=True)
            assert done or isinstance(result, asyncio.CancelledError)
            reached.add(len(server.commands))
            before = len(server.messages)
            assert (await smtp.sendmail(APP, [BOB], BODY))[0] == {}
            assert len(server.received(BOB)) == 1
            assert len(server.messages) == before + 1
    assert len(reached) > 5  # it was indeed cancelled in different places


@virtually
async def test_cancelled_in_its_wait_the_next_send_works() -> None:
    """A send that is cancelled while it waits leaves no timer, and the others unharmed."""
    async with talk() as (server, smtp):
        server.on("RCPT", ANN, GREYLISTED)
        sending = asyncio.create_task(smtp.sendmail(APP, [ANN, CAT], BODY))
        await asyncio.sleep(5)
        sending.cancel()
        with pytest.raises(asyncio.CancelledError) as caught:
            await sending
        assert caught.value.delivery.pending == [ANN]
        assert caught.value.delivery.accepted == [CAT]
        await smtp.sendmail(APP, [BOB], BODY)
        assert everybody_once(server, BOB, CAT)


@virtually
async def test_cancelled_in_the_queue_the_others_go_on() -> None:
    """A send that is cancelled before its turn disturbs neither the one under way nor the one behind it."""
    async with talk() as (server, smtp):
        server.fail_at("MAIL", "late", delay=10, times=1)
        first, second, third = [asyncio.create_task(smtp.sendmail(APP, [who], BODY)) for who in (ANN, BOB, CAT)]
        await asyncio.sleep(1)
        second.cancel()
        await first
        await third
        assert second.cancelled()
        assert everybody_once(server, ANN, CAT)
        assert server.connections == 1


@virtually
async def test_the_callers_own_deadline_cancels() -> None:
    """asyncio.timeout around a send ends it as a TimeoutError of the caller's, in time, and the next send works."""
    async with talk() as (server, smtp):
        server.on("RCPT", ANN, GREYLISTED)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(5):
                await smtp.sendmail(APP, [ANN], BODY)
        assert virtual.clock() - virtual.EPOCH == pytest.approx(5, abs=0.1)
        await smtp.sendmail(APP, [BOB], BODY)
        assert everybody_once(server, BOB)


@virtually
async def test_cancelled_after_the_final_dot_is_uncertain() -> None:
    """Cancelled while the server thinks about the message, the delivery says that it may have been taken."""
    async with talk(patient(on_uncertain="raise")) as (server, smtp):
        script = server.fail_at("END_OF_DATA", "stall", act=True, times=1)
        sending = asyncio.create_task(smtp.sendmail(APP, [ANN], BODY))
        await until(lambda: script.used == 1)
        sending.cancel()
        with pytest.raises(asyncio.CancelledError) as caught:
            await sending
        assert caught.value.delivery.uncertain == [ANN]
        assert caught.value.delivery.pending == []


# What the caller gets


SAME: dict[str, Any] = {
    "all accepted": lambda server: None,
    "one 550": lambda server: server.on("RCPT", BOB, "550 5.1.1 who?"),
    "one 450": lambda server: server.on("RCPT", BOB, "450 4.2.0 later"),
    "one 550 in lines": lambda server: server.on("RCPT", BOB, "550 5.1.1 who?\nSee https://example.com"),
    "all 550": lambda server: server.on("RCPT", "550 5.1.1 who?"),
    "all 450": lambda server: server.on("RCPT", "450 4.2.0 later"),
    "mixed": lambda server: [server.on("RCPT", ANN, "450 4.2.0 later"), server.on("RCPT", BOB, "550 who?")],
    "251": lambda server: server.on("RCPT", ANN, "251 will forward", accepted=True),
    "MAIL 550": lambda server: server.on("MAIL", "550 5.7.1 not you"),
    "MAIL 451": lambda server: server.on("MAIL", "451 4.3.0 later"),
    "DATA 554": lambda server: server.on("DATA", "554 5.5.1 no"),
    "DATA 451": lambda server: server.on("DATA", "451 4.3.0 later"),
    "end 554": lambda server: server.on("END_OF_DATA", "554 5.6.0 no"),
    "end 451": lambda server: server.on("END_OF_DATA", "451 4.3.0 later"),
    "end 250 in lines": lambda server: server.on("END_OF_DATA", "250 2.0.0 Ok\nqueued as 1"),
    "end 250 without text": lambda server: server.on("END_OF_DATA", b"250\r\n", accepted=True),
    "banner 554": lambda server: server.on("CONNECT", "554 5.7.1 go away"),
    "banner 421": lambda server: server.on("CONNECT", "421 4.3.2 busy"),
    "banner drop": lambda server: server.fail_at("CONNECT", "fin"),
    "banner stall": lambda server: server.fail_at("CONNECT", "stall"),
    "EHLO 550": lambda server: [server.on("EHLO", "550 no"), server.on("HELO", "550 no")],
    "EHLO drop": lambda server: server.fail_at("EHLO", "fin"),
    "MAIL drop": lambda server: server.fail_at("MAIL", "fin"),
    "MAIL stall": lambda server: server.fail_at("MAIL", "stall"),
    "MAIL 421": lambda server: server.on("MAIL", "421 4.3.2 bye"),
    "RCPT drop": lambda server: server.fail_at("RCPT", "fin"),
    "RCPT stall": lambda server: server.fail_at("RCPT", "stall"),
    "DATA drop": lambda server: server.fail_at("DATA", "fin"),
    "DATA stall": lambda server: server.fail_at("DATA", "stall"),
    "DATA 421": lambda server: server.on("DATA", "421 4.3.2 bye"),
    "end drop": lambda server: server.fail_at("END_OF_DATA", "fin"),
    "end reset": lambda server: server.fail_at("END_OF_DATA", "rst"),
    "end stall": lambda server: server.fail_at("END_OF_DATA", "stall"),
    "end 421": lambda server: server.on("END_OF_DATA", "421 4.3.2 bye"),
}


async def outcome(sending: Awaitable[Any]) -> Any:
    """Return what a send returns, or what it raises, as plain values."""
    try:
        return await sending
    except Exception as error:  # noqa: BLE001 - it is what is compared
        if isinstance(error, aiosmtplib.SMTPRecipientsRefused):
            return type(error), [(type(one), *one.args) for one in error.recipients]
        return type(error), error.args


@pytest.mark.parametrize("name", SAME)
@pytest.mark.parametrize("kind", ["sendmail", "send_message", "send"])
@virtually
async def test_returns_and_raises_what_aiosmtplib_does(kind: str, name: str) -> None:
    """With a single attempt the same server gives the same value or exception as bare aiosmtplib gives."""

    async def with_client(client: Any) -> Any:
        async with client:
            if kind == "sendmail":
                return await client.sendmail(APP, [ANN, BOB], BODY)
            return await client.send_message(letter(ANN, BOB))

    async with ScriptedServer() as server:
        SAME[name](server)
        where: dict[str, Any] = {"hostname": server.hostname, "port": server.port, "local_hostname": "client.example"}
        if kind == "send":
            bare, *of_bare = await outcome(aiosmtplib.send(letter(ANN, BOB), **where))
        else:
            bare, *of_bare = await outcome(with_client(server.client()))
    async with ScriptedServer(port=server.port) as server:
        SAME[name](server)
        if kind == "send":
            ours, *of_ours = await outcome(smtpretry.send(letter(ANN, BOB), **where, policy=once()))
        else:
            ours, *of_ours = await outcome(with_client(RetryingSMTP(server.client(), once())))
    assert of_ours == of_bare
    if name in ("end drop", "end reset", "end stall"):  # the same error, of a kind that says more
        assert issubclass(ours, UncertainDelivery)
        assert issubclass(ours, bare)
    else:
        assert ours == bare


@pytest.mark.parametrize("settings", [{"tls": True}, {}], ids=["tls", "clear"])
@pytest.mark.parametrize("reply", ["535 5.7.8 wrong", "454 4.7.0 not now", "534 5.7.9 another mechanism"])
@virtually
async def test_a_failed_log_in_raises_what_aiosmtplib_does(reply: str, settings: dict[str, Any]) -> None:
    """A client with credentials of its own raises the same SMTPAuthenticationError wrapped and bare."""

    async def attempt(*, wrapped: bool) -> Any:
        async with ScriptedServer(auth=(USER, PASSWORD), **settings) as server:
            server.on("AUTH", reply)
            client: Any = server.client(username=USER, password=PASSWORD)
            client = RetryingSMTP(client, once()) if wrapped else client

            async def session() -> Any:
                async with client:
                    return await client.sendmail(APP, [ANN], BODY)

            return await outcome(session())

    assert await attempt(wrapped=True) == await attempt(wrapped=False)


@virtually
async def test_nobody_listening_raises_what_aiosmtplib_does() -> None:
    """A refused connection is the same SMTPConnectError."""
    server = ScriptedServer()
    await server.start()
    await server.stop()
    bare = await outcome(server.client().connect())
    ours = await outcome(RetryingSMTP(server.client(), once()).sendmail(APP, [ANN], BODY))
    assert ours == bare
    assert bare[0] is aiosmtplib.SMTPConnectError


@pytest.mark.parametrize(
    "name", ["MAIL 451", "all 450", "DATA 451", "end 451", "banner 421", "MAIL drop", "MAIL stall"]
)
@virtually
async def test_raises_the_same_after_many_attempts(name: str) -> None:
    """After the last try the caller gets the exception of a single one, not a new kind."""

    async def attempt(policy: Any) -> Any:
        async with ScriptedServer() as server, RetryingSMTP(server.client(), policy) as smtp:
            SAME[name](server)
            return await outcome(smtp.sendmail(APP, [ANN, BOB], BODY))

    assert await attempt(patient(max_attempts=4)) == await attempt(once())


@virtually
async def test_what_failed_carries_its_delivery_and_its_story() -> None:
    """The exception has `delivery`, and one note of one line: the attempts, the time, the last reply."""
    async with talk(patient(max_attempts=3, wait=tenacity.wait_fixed(60))) as (server, smtp):
        server.on("RCPT", "450 4.2.0 Greylisted\nsee https://example.com")
        with pytest.raises(aiosmtplib.SMTPRecipientsRefused) as caught:
            await smtp.sendmail(APP, [ANN, BOB], BODY)
        (note,) = caught.value.__notes__
        assert "\n" not in note
        assert "3 attempts in 120 s" in note
        assert "450 4.2.0 Greylisted" in note
        delivery = caught.value.delivery
        assert isinstance(delivery, Delivery)
        assert [*delivery.refused] == [ANN, BOB]
        assert [len(attempt.steps) > 0 for attempt in delivery.attempts] == [True] * 3


@virtually
async def test_one_attempt_is_told_in_the_singular() -> None:
    """The note of a final refusal says that there was one attempt, and which reply ended it."""
    async with talk() as (server, smtp):
        server.on("MAIL", "550 5.7.1 not you")
        with pytest.raises(aiosmtplib.SMTPSenderRefused) as caught:
            await smtp.sendmail(APP, [ANN], BODY)
        (note,) = caught.value.__notes__
        assert "1 attempt in 0 s" in note
        assert "MAIL: 550 5.7.1 not you" in note


@pytest.mark.parametrize(
    ("script", "status"),
    [
        (lambda server: None, "accepted"),
        (lambda server: server.on("RCPT", "550 5.1.1 who?"), "refused"),
        (lambda server: server.on("RCPT", GREYLISTED), "refused"),
        (lambda server: server.on("MAIL", "550 5.1.1 not you"), "refused"),
        (lambda server: server.on("CONNECT", "554 no"), "refused"),
        (lambda server: server.fail_at("CONNECT", "fin"), "refused"),
        (lambda server: server.fail_at("END_OF_DATA", "fin"), "uncertain"),
        (lambda server: server.on("AUTH", "535 no"), "refused"),
    ],
)
@virtually
async def test_deliver_raises_for_no_refusal(script: Any, status: str) -> None:
    """deliver() returns the whole story, and every recipient has exactly one end in it, whatever the server does."""
    async with talk(auth=(USER, PASSWORD), auth_required=False, client={"username": USER, "password": PASSWORD}) as (
        server,
        smtp,
    ):
        script(server)
        delivery = await smtp.deliver(BODY, sender=APP, recipients=[ANN, BOB])
        ends = {
            name: list(getattr(delivery, name)) for name in ("accepted", "refused", "uncertain", "deferred", "pending")
        }
        assert ends.pop(status) == [ANN, BOB]
        assert not any(ends.values())
        assert delivery.next_at is None
        assert delivery.recipients == [ANN, BOB]


@virtually
async def test_the_delivery_tells_what_happened() -> None:
    """A delivery holds each attempt with its replies, stages, actions, waits and recipients, in order."""
    async with talk(auth=(USER, PASSWORD), auth_required=True, credentials=SETTINGS["credentials"]) as (server, smtp):
        server.on("RCPT", BOB, "450 4.2.0 Greylisted for 2 seconds", times=1)
        delivery = await smtp.deliver(BODY, sender=APP, recipients=[ANN, BOB])
        told = [
            [(step.stage, step.reply.code, step.action, step.recipients) for step in one.steps]
            for one in delivery.attempts
        ]
        assert told == [
            [
                (Stage.MAIL, 530, Action.AUTHENTICATE, (ANN, BOB)),
                (Stage.AUTH, 235, None, (ANN, BOB)),
                (Stage.RCPT, 450, Action.RETRY, (BOB,)),
                (Stage.END_OF_DATA, 250, None, (ANN,)),
            ],
            [(Stage.END_OF_DATA, 250, None, (BOB,))],
        ]
        assert delivery.attempts[0].steps[2].wait == 2
        assert str(delivery.attempts[0].steps[2]) == "RCPT: 450 4.2.0 Greylisted for 2 seconds -> RETRY in 2 s"


@virtually
async def test_a_reply_that_never_came_has_the_code_of_silence() -> None:
    """A recipient that was given up after silence is refused with NO_REPLY, and returned as (-1, why)."""
    async with talk(once(), pipelining=False) as (server, smtp):
        server.fail_at("RCPT", "fin", BOB, times=1)
        errors, response = await smtp.sendmail(APP, [ANN, BOB], BODY)
        assert response == "2.0.0 Ok: queued as 1"
        assert errors == {BOB: (NO_REPLY, "Unexpected EOF received")}
        assert everybody_once(server, ANN)


@virtually
async def test_timeout_holds_for_each_command() -> None:
    """`timeout=` replaces the client's own for this send."""
    async with talk(once(), pipelining=False) as (server, smtp):
        server.fail_at("MAIL", "stall", times=1)
        with pytest.raises(aiosmtplib.SMTPReadTimeoutError):
            await smtp.sendmail(APP, [ANN], BODY, timeout=7)
        assert virtual.clock() - virtual.EPOCH == pytest.approx(7, abs=0.5)


def test_no_wait_records_the_waits() -> None:
    """An application's own test sees in no_wait().waits how long a real send would have waited."""

    async def scenario() -> None:
        policy = no_wait()
        async with ScriptedServer() as server, RetryingSMTP(server.client(), policy) as smtp:
            server.on("RCPT", "450 4.2.0 Greylisted for 300 seconds", times=2)
            await smtp.sendmail(APP, [ANN], BODY)
            assert policy.waits == [300, 300]

    asyncio.run(scenario())


@virtually
async def test_who_was_refused_and_hung_up_on_goes_alone() -> None:
    """A recipient whose refusal ended the connection is offered in a transaction of its own from then on."""
    async with talk(patient(max_attempts=2, wait=tenacity.wait_fixed(60)), pipelining=False) as (server, smtp):
        server.on("RCPT", ANN, GREYLISTED, times=1)
        server.on("RCPT", BOB, GREYLISTED, close=True, times=2)
        delivery = await smtp.deliver(BODY, sender=APP, recipients=[ANN, BOB])
        assert delivery.accepted == [ANN]
        assert list(delivery.refused) == [BOB]
        assert transactions(server) == [[ANN, BOB], [ANN], [BOB]]


@virtually
async def test_the_cure_is_that_of_the_last_refusal() -> None:
    """What would have helped somebody else before is not what the others need."""
    for last, cure in (
        ("552 5.2.2 Mailbox full", "clear the mailbox"),
        (GREYLISTED, "gave up: max_attempts (2) allows no further try"),
    ):
        async with talk(patient(max_attempts=2)) as (server, smtp):
            server.on("RCPT", BOB, "550 5.1.1 User unknown", times=1)
            server.on("RCPT", ANN, GREYLISTED, times=1)
            server.on("RCPT", ANN, last)
            with pytest.raises(aiosmtplib.SMTPRecipientsRefused) as caught:
                await smtp.sendmail(APP, [ANN, BOB], BODY)
            assert cure in caught.value.__notes__[0]
            assert "Check the recipient" not in caught.value.__notes__[0]


@virtually
async def test_sends_that_fail_alike_have_a_story_each() -> None:
    """Sends that wait for the same unreachable server raise an error each, with the delivery and the note of its own."""
    async with ScriptedServer() as server:
        client = server.client()
    async with RetryingSMTP(client, patient(give_up_after=timedelta(minutes=5))) as smtp:
        sends = [smtp.sendmail(APP, [who], BODY) for who in (ANN, BOB, CAT)]
        errors = await asyncio.gather(*sends, return_exceptions=True)
    assert [error.delivery.recipients for error in errors] == [[ANN], [BOB], [CAT]]
    assert [len(error.__notes__) for error in errors] == [1, 1, 1]
    assert {type(error) for error in errors} == {aiosmtplib.SMTPConnectError}


@virtually
async def test_a_goodbye_behind_the_acceptance_is_no_second_answer() -> None:
    """A 421 that comes in the packet of the 250 does not make the acceptance uncertain: nothing is sent twice."""
    async with talk() as (server, smtp):
        server.on("END_OF_DATA", b"250 2.0.0 Ok\r\n421 4.3.0 bye\r\n", times=1, accepted=True, close=True)
        assert (await smtp.deliver(BODY, sender=APP, recipients=[ANN])).accepted == [ANN]
        assert everybody_once(server, ANN)


@pytest.mark.parametrize("before", [None, "550 5.1.1 who?"], ids=["first", "after a refusal"])
@virtually
async def test_a_421_about_the_server_at_a_recipient_stops_the_pass(before: str | None) -> None:
    """A server that says at RCPT that it is busy gets no other connection before the time that it names."""
    async with talk() as (server, smtp):
        if before:
            server.on("RCPT", ANN, before)
        server.on("RCPT", "*", "421 4.3.2 Server busy, try again in 300 seconds", times=1)
        began = virtual.clock()
        await smtp.deliver(BODY, sender=APP, recipients=[ANN, BOB, CAT])
        assert virtual.clock() - began == pytest.approx(300, abs=1)
        assert server.connections == 2


@virtually
async def test_a_named_delay_counts_where_a_new_connection_would_do() -> None:
    """A server that names a delay is waited for, also where a new connection would otherwise be tried at once."""
    async with talk() as (server, smtp):
        server.on("MAIL", "421 4.7.0 Too many messages in this session, try again in 300 seconds", times=1)
        delivery = await smtp.deliver(BODY, sender=APP, recipients=[ANN])
        assert delivery.attempts[1].at - delivery.attempts[0].at == pytest.approx(300, abs=1)


@pytest.mark.parametrize("how", ["a refusal", "connect"])
@virtually
async def test_a_connection_that_died_in_between_costs_nothing(how: str) -> None:
    """A connection that was left open by a refused send, or by connect(), and died since costs no wait and no attempt."""
    async with talk() as (server, smtp):
        if how == "connect":
            await smtp.connect()
        else:
            server.on("MAIL", "550 5.1.8 no", times=1)
            await smtp.deliver(BODY, sender=APP, recipients=[ANN])
        server.disconnect(close="rst")
        began = virtual.clock()
        delivery = await smtp.deliver(BODY, sender=APP, recipients=[ANN])
        assert (delivery.accepted, len(delivery.attempts)) == ([ANN], 1)
        assert virtual.clock() - began < 1
        assert [step.wait for step in delivery.attempts[0].steps] == [0.0, 0.0]


@virtually
async def test_a_socket_that_was_given_is_used_once() -> None:
    """A client with a socket of its own says so when its one connection is over, instead of trying for an hour."""
    async with ScriptedServer() as server:
        server.on("RCPT", "421 4.3.0 later", times=1)
        sock = socket.create_connection((server.hostname, server.port))
        client = aiosmtplib.SMTP(sock=sock, local_hostname="client.example")
        async with RetryingSMTP(client, patient()) as smtp:
            delivery = await smtp.deliver(BODY, sender=APP, recipients=[ANN])
        assert "carries one connection" in str(delivery.refused[ANN])
        assert len(delivery.attempts) == 2


@virtually
async def test_a_file_that_is_not_there_is_no_reason_to_wait() -> None:
    """Trouble of this side, such as a missing certificate bundle, is raised at once."""
    async with talk(client={"use_tls": True, "tls_context": None, "cert_bundle": "/nowhere.pem"}) as (server, smtp):
        with pytest.raises(FileNotFoundError) as caught:
            await smtp.sendmail(APP, [ANN], BODY)
        assert len(caught.value.delivery.attempts) == 1
        assert server.connections == 0


@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")  # what the first loop left open
def test_one_client_outlives_its_event_loop() -> None:
    """A script that calls asyncio.run twice with one client, and leaves it open in between, sends both times."""
    server = ScriptedServer()
    smtp: list[RetryingSMTP] = []

    async def send(*, last: bool) -> None:
        await server.start()
        smtp[:] = smtp or [RetryingSMTP(server.client(), patient(), idle_timeout=None)]
        await smtp[0].sendmail(APP, [ANN], BODY)
        assert smtp[0].is_connected
        if last:
            await smtp[0].aclose()
            await server.stop()

    virtual.run(send(last=False))
    server._server, server.sessions = None, set()
    virtual.run(send(last=True))
    smtp.clear()
    gc.collect()
    assert len(server.received(ANN)) == 2
