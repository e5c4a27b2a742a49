"""A delivery as data: it goes through JSON, and is taken up again where it was."""

from __future__ import annotations

import asyncio
import copy
import functools
import json
import pickle
import sys
import time
from datetime import UTC, datetime
from typing import Any

import pytest
import virtual
from support import ANN, APP, BOB, BODY, CAT, EVE, PASSWORD, USER, letter, patient, talk, virtually

import smtpretry
from smtpretry import Action, Attempt, Delivery, Reply, Stage, Status, Step, clock

RECIPIENTS = [ANN, BOB, EVE]
CREDENTIALS = {"username": USER, "password": PASSWORD}


async def after_one_pass() -> Delivery:
    """Return a delivery with one recipient accepted, one waiting, one refused, after a log-in."""
    async with talk(credentials=CREDENTIALS, auth=(USER, PASSWORD)) as (server, smtp):
        server.on("RCPT", BOB, "450 4.2.0 Greylisted for 300 seconds", times=1)
        server.on("RCPT", EVE, "550 5.1.1 User unknown", times=1)
        delivery = smtpretry.prepare(BODY, sender=APP, recipients=RECIPIENTS, mail_options=["BODY=8BITMIME"])
        return await smtp.attempt(delivery)


def through_json(data: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(data))


@virtually
async def test_nothing_is_lost_through_json() -> None:
    """A delivery read back equals the one written, in every field, step by step."""
    delivery = await after_one_pass()
    again = Delivery.from_dict(through_json(delivery.to_dict()))
    for name in Delivery.__slots__:
        assert getattr(again, name) == getattr(delivery, name), name
    assert (again.accepted, again.pending, list(again.refused)) == ([ANN], [BOB], [EVE])
    assert again.outcomes[EVE].stage is Stage.RCPT
    assert again.next_at == delivery.next_at
    assert through_json(again.to_dict()) == again.to_dict() == delivery.to_dict()


@virtually
async def test_another_process_goes_on_with_those_who_are_pending() -> None:
    """A delivery read back is sent to the pending recipients alone, the same bytes, not before their time."""
    delivery = Delivery.from_dict(through_json((await after_one_pass()).to_dict()))
    async with talk() as (server, smtp):
        await smtp.attempt(delivery)
        assert not server.commands  # it is not due yet
        await smtp.deliver(delivery)
    assert [(message.recipients, message.content) for message in server.messages] == [([BOB], BODY)]
    assert delivery.accepted == [ANN, BOB]
    assert len(delivery.attempts) == 2


@virtually
async def test_who_waits_before_anything_is_sent_is_not_forgotten() -> None:
    """A delivery whose time has not come is the first thing that a new client gets: it is sent when it is due."""
    delivery = Delivery.from_dict(through_json((await after_one_pass()).to_dict()))
    async with talk() as (server, smtp):
        waiting = asyncio.ensure_future(smtp.deliver(delivery))
        await asyncio.sleep(1)
        await smtp.send_message(letter(CAT))
        await waiting
        assert [message.recipients for message in server.messages] == [[CAT], [BOB]]


@virtually
async def test_closing_a_client_wakes_who_waited_before_anything_was_sent() -> None:
    """A new client that is closed while all that it has is a delivery to come tells its sender so."""
    delivery = Delivery.from_dict(through_json((await after_one_pass()).to_dict()))
    async with talk() as (_, smtp):
        waiting = asyncio.ensure_future(smtp.deliver(delivery))
        await asyncio.sleep(1)
    with pytest.raises(smtpretry.ClientClosed):
        await waiting


@virtually
async def test_a_doubt_survives() -> None:
    """Who may have the message already stays uncertain in the next process, where it refuses him."""
    async with talk(patient(max_attempts=2)) as (server, smtp):
        server.fail_at("END_OF_DATA", "fin", times=1)
        delivery = await smtp.attempt(smtpretry.prepare(BODY, sender=APP, recipients=ANN))
        delivery = Delivery.from_dict(through_json(delivery.to_dict()))
        server.on("RCPT", ANN, "550 5.1.1 User unknown", times=1)
        await smtp.deliver(delivery)
    assert delivery.outcomes[ANN].status is Status.UNCERTAIN


@virtually
async def test_the_state_is_what_changes() -> None:
    """The state, saved after each pass, over the delivery as it was stored once gives the delivery of now."""
    first = smtpretry.prepare(b"\r\n" + b"x" * 100_000, sender=APP, recipients=RECIPIENTS)
    stored = first.to_dict()
    async with talk() as (server, smtp):
        server.on("RCPT", BOB, "450 4.2.0 Greylisted", times=1)
        await smtp.attempt(first)
    state = through_json(first.state())
    assert Delivery.from_dict(stored | state).to_dict() == first.to_dict()
    assert len(json.dumps(state)) < 2000


@virtually
async def test_no_credential_is_written() -> None:
    """Neither the user's name nor the password is in what is stored, in whatever form it went over the line."""
    delivery = await after_one_pass()
    written = json.dumps(delivery.to_dict())
    assert USER not in written
    assert PASSWORD not in written


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"version": 3}, "reads deliveries of version 1 and 2, not 3"),
        ({"version": None}, "reads deliveries of version 1 and 2, not None"),
        ({"sender": ...}, "KeyError: 'sender'"),
        ({"message": "no base64!"}, "Error: "),
        ({"outcomes": {CAT: {}}}, "KeyError: 'status'"),
        ({"outcomes": []}, "AttributeError"),
        ({"attempts": [{"at": 1, "steps": [{"stage": "LUNCH"}]}]}, "'LUNCH' is not a valid Stage"),
        ({"attempts": 7}, "TypeError"),
    ],
)
def test_what_is_no_delivery_is_refused(change: dict[str, Any], complaint: str) -> None:
    """Data of another version, or with something missing or wrong, is an error that says what."""
    data = smtpretry.prepare(BODY, sender=APP, recipients=ANN).to_dict() | change
    data = {name: value for name, value in data.items() if value is not ...}
    with pytest.raises(ValueError, match=complaint):
        Delivery.from_dict(data)


@pytest.mark.parametrize("wrong_by", [-3600, 86_400])
@virtually
async def test_a_wrong_clock_does_not_travel(wrong_by: int) -> None:
    """What a clock stored that was an hour slow, or a day fast, is taken up as if it had been right."""
    async with talk(patient(clock=lambda: virtual.clock() + wrong_by)) as (server, smtp):
        server.on("RCPT", "450 4.2.0 Greylisted")
        delivery = await smtp.attempt(smtpretry.prepare(BODY, sender=APP, recipients=ANN))
    delivery = Delivery.from_dict(through_json(delivery.to_dict()))
    async with talk() as (server, smtp):
        server.on("RCPT", "450 4.2.0 Greylisted", times=2)
        await smtp.deliver(delivery)
        assert len(server.messages) == 1
    assert virtual.clock() - virtual.EPOCH < 600


@virtually
async def test_what_is_stored_is_bounded() -> None:
    """However many attempts and recipients there are, the history that is stored stays small."""
    many = smtpretry.prepare(BODY, sender=APP, recipients=[f"user{number}@example.com" for number in range(500)])
    step = Step(1.0, Stage.MAIL, Reply(451, "4.3.0", "x" * 5000), Action.RETRY, 60.0, tuple(many.recipients))
    many.attempts = [Attempt(float(number), [step] * 100) for number in range(500)]
    stored = through_json(many.state())
    assert len(json.dumps(stored["attempts"])) < 250_000
    assert [one["at"] for one in stored["attempts"]] == [0.0, 1.0, *map(float, range(470, 500))]


@virtually
async def test_a_copy_is_sent_by_nobody() -> None:
    """A delivery can be copied in the midst of a send, by a hook that hands it to another process, say."""
    delivery = smtpretry.prepare(BODY, sender=APP, recipients=[ANN])
    with delivery.sent_by(object()):
        copies = [pickle.loads(pickle.dumps(delivery)), copy.copy(delivery), copy.deepcopy(delivery)]  # noqa: S301 - ours
    for one in copies:
        assert one.to_dict() == delivery.to_dict()
        with one.sent_by(object()):
            pass


@pytest.mark.parametrize(
    ("wait", "shown"),
    [
        (0.0, ""),
        (0.0000001, " in 0.1 s"),
        (0.998692, " in 1 s"),
        (2.46, " in 2.5 s"),
        (9.97, " in 10 s"),
        (61.7, " in 62 s"),
        (961.898, " in 962 s"),
        (2e6, " in 2000000 s"),
    ],
)
def test_a_wait_is_shown_as_people_say_it(wait: float, shown: str) -> None:
    """Whole seconds from ten on, and one digit below; the step itself has all of them."""
    step = Step(0.0, Stage.RCPT, Reply.parse("450 4.2.0 Later"), Action.RETRY, wait, (ANN,))
    assert str(step) == f"RCPT: 450 4.2.0 Later -> RETRY{shown}"
    assert step.wait == wait


def by_the_time_of_day(seconds: float) -> datetime:
    """Return a time as an application tells it: so long after a test has begun."""
    return datetime.fromtimestamp(virtual.EPOCH + seconds, UTC)


@pytest.mark.parametrize("lag", [-86400, 86400])
@virtually
async def test_a_time_to_expire_goes_by_the_time_of_day(lag: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that slept, or began before its clock was set, sends nothing after that time, and all before it."""
    monkeypatch.setattr(clock, "_set", lambda: time.time() - time.monotonic() - lag)
    async with talk() as (server, smtp):
        server.on("RCPT", BOB, "450 4.2.0 Greylisted")
        assert (await smtp.deliver(letter(ANN), expires=by_the_time_of_day(lag + 100))).accepted == [ANN]
        late = await smtp.deliver(letter(BOB), expires=by_the_time_of_day(lag + 100))
        assert list(late.refused) == [BOB]
        assert 90 < virtual.clock() - virtual.EPOCH < 100
        never = await smtp.deliver(letter(ANN), expires=by_the_time_of_day(lag - 1))
        assert "expired" in never.refused[ANN].text
        assert len(server.received(ANN)) == 1


@pytest.mark.skipif(sys.platform == "win32", reason="there is no other clock than those that are frozen")
def test_the_clock_goes_on_where_a_test_has_frozen_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """What freezegun does to `time` holds up no wait, and leaves the tests after it the right time."""
    real = time.time()
    monkeypatch.setattr(clock, "_set", functools.cache(clock._set.__wrapped__))
    with monkeypatch.context() as frozen:
        frozen.setattr("time.time", lambda: 978307200.0)
        frozen.setattr("time.monotonic", lambda: 978307200.0)
        before = clock.now()
        assert any(clock.now() > before for _ in range(1_000_000))
        assert clock.lag() < -1e8
    assert 0 <= clock.now() - real < 60
    assert clock.lag() == 0.0


@virtually
async def test_a_time_to_expire_is_moved_by_no_clock() -> None:
    """A clock that was years ahead has stored a delivery, and not the time at which it expires."""
    delivery = smtpretry.prepare(BODY, sender=APP, recipients=ANN, expires=by_the_time_of_day(900))
    delivery.hand_over(virtual.clock() + 1e8)
    async with talk() as (_, smtp):
        assert (await smtp.deliver(Delivery.from_dict(through_json(delivery.to_dict())))).accepted == [ANN]
