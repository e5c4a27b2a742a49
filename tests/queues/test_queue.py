"""What is far off goes to a durable queue: what the client asks of its engine, and what an engine gets from `attempt`."""

from __future__ import annotations

import asyncio
import json
import logging
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest
import virtual
from support import ANN, APP, BOB, BODY, CAT, DAN, EVE, letter, patient, talk, transactions, virtually

import smtpretry
from smtpretry import Delivery, Engine, NotOurs, QueueSilent, RetryingSMTP, RetryPolicy, Status
from smtpretry.queues.sqlite import QueueError, SQLiteEngine
from smtpretry.testing import ScriptedServer

if TYPE_CHECKING:
    from pathlib import Path

TWO_MINUTES = "450 4.2.0 Greylisted for 120 seconds"


class Shelf:
    """An engine that keeps what it gets as JSON, and has one worker."""

    def __init__(self) -> None:
        self.stored: dict[str, str] = {}
        self.connections: list[Any] = []
        self.broken = self.silent = self.forgetful = False

    async def submit(self, delivery: Delivery, /, *, connection: Any = None) -> None:
        if self.forgetful:
            self.stored.setdefault(delivery.id, json.dumps(delivery.to_dict()))
        if self.broken or self.forgetful:
            msg = "the shelf is broken\nDETAIL: it held How are you?"
            raise OSError(msg)
        self.connections.append(connection)
        self.stored.setdefault(delivery.id, json.dumps(delivery.to_dict()))

    async def has(self, name: str, /) -> bool:
        if self.silent:
            msg = "the shelf does not answer"
            raise OSError(msg)
        return name in self.stored

    async def work(self, smtp: RetryingSMTP, /, *, on_end: Any = None) -> None:
        for name, stored in list(self.stored.items()):
            delivery = Delivery.from_dict(json.loads(stored))

            async def save(delivery: Delivery) -> None:
                self.stored[delivery.id] = json.dumps(delivery.to_dict())

            while delivery.next_at is not None:
                await asyncio.sleep(delivery.next_at - virtual.clock())
                await smtp.attempt(delivery, save)
            del self.stored[name]
            if on_end is not None:
                await on_end(delivery)


def with_shelf(server: ScriptedServer, shelf: Engine, **options: Any) -> RetryingSMTP:
    return RetryingSMTP(server.client(), patient(), defer=shelf, **options)


# The client


@virtually
async def test_a_long_wait_is_handed_over() -> None:
    """A send returns at once where the next try is far off; the text says until when, and the queue does the rest, once."""
    shelf = Shelf()
    async with ScriptedServer() as server, with_shelf(server, shelf) as smtp:
        server.on("RCPT", BOB, TWO_MINUTES, times=1)
        server.on("RCPT", EVE, "550 5.1.1 User unknown", times=1)
        errors, text = await smtp.sendmail(APP, [ANN, BOB, EVE], BODY)
        assert virtual.clock() == pytest.approx(virtual.EPOCH, abs=1)
        assert list(errors) == [EVE]
        assert text == "2.0.0 Ok: queued as 1; 1 of 3 recipients deferred until 2023-11-14 22:15:20+00:00"
        await shelf.work(smtp)
        assert virtual.clock() == pytest.approx(virtual.EPOCH + 120, abs=1)
        assert transactions(server) == [[ANN, BOB, EVE], [BOB]]
        assert [len(server.received(who)) for who in (ANN, BOB, EVE)] == [1, 1, 0]


@virtually
async def test_everybody_deferred_is_no_error() -> None:
    """Where all are greylisted, the send returns without errors, and the delivery lists them as deferred."""
    shelf = Shelf()
    async with ScriptedServer() as server, with_shelf(server, shelf) as smtp:
        server.on("RCPT", TWO_MINUTES)
        delivery = await smtp.deliver(letter(ANN, BOB))
        assert (delivery.deferred, delivery.pending, delivery.next_at) == ([ANN, BOB], [], None)
        assert delivery.outcomes[ANN].reply.enhanced == "4.2.0"
        [stored] = [Delivery.from_dict(json.loads(one)) for one in shelf.stored.values()]
        assert (stored.id, stored.pending, stored.message) == (delivery.id, [ANN, BOB], delivery.message)
        await smtp.deliver(delivery)  # it is the queue's now
        assert len(transactions(server)) == 1


@pytest.mark.parametrize(("max_wait", "seconds"), [(60, 0), (120.5, 120), (0, 0)])
@virtually
async def test_a_short_wait_stays_in_process(max_wait: float, seconds: int) -> None:
    """A wait of max_wait or less is waited for; a longer one is not."""
    shelf = Shelf()
    async with ScriptedServer() as server, with_shelf(server, shelf, max_wait=max_wait) as smtp:
        server.on("RCPT", TWO_MINUTES, times=1)
        delivery = await smtp.deliver(letter(ANN))
        assert virtual.clock() - virtual.EPOCH == pytest.approx(seconds, abs=1)
        assert bool(delivery.deferred) is bool(shelf.stored) is (seconds == 0)


@virtually
async def test_a_queue_that_says_it_has_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """Where the engine says that it did not take it, the send goes on in process, and the log has no word of the message."""
    shelf = Shelf()
    shelf.broken = True
    async with ScriptedServer() as server, with_shelf(server, shelf) as smtp:
        server.on("RCPT", TWO_MINUTES, times=1)
        with caplog.at_level(logging.WARNING, "smtpretry"):
            errors, _ = await smtp.send_message(letter(ANN))
        assert not errors
        assert len(server.received(ANN)) == 1
        assert virtual.clock() - virtual.EPOCH == pytest.approx(120, abs=1)
    assert "not handed over to the queue, goes on in process: OSError: the shelf is broken" in caplog.text
    assert "How are you?" not in caplog.text


@virtually
async def test_a_queue_that_certainly_has_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Where the queue cannot be used at all, nothing can be in it: the send goes on in process, and the log says why."""
    async with ScriptedServer() as server:
        async with with_shelf(server, SQLiteEngine(tmp_path / "missing" / "mail.db")) as smtp:
            server.on("RCPT", TWO_MINUTES, times=1)
            errors, _ = await smtp.send_message(letter(ANN))
        assert not errors
        assert len(server.received(ANN)) == 1
        assert virtual.clock() - virtual.EPOCH == pytest.approx(120, abs=1)
    assert "goes on in process: QueueError" in caplog.text
    assert "missing does not exist: make it" in caplog.text


@virtually
async def test_a_queue_that_may_have_it_from_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an earlier try may have stored stays in doubt, though a later one has certainly stored nothing."""
    shelf = Shelf()
    shelf.forgetful = shelf.silent = True
    async with ScriptedServer() as server, with_shelf(server, shelf) as smtp:
        server.on("RCPT", TWO_MINUTES, times=1)
        sending = asyncio.ensure_future(smtp.deliver(letter(ANN)))
        await asyncio.sleep(0.5)

        async def away(_: Delivery) -> None:
            error = QueueError("away")
            error.untouched = True
            raise error

        monkeypatch.setattr(shelf, "submit", away)
        with pytest.raises(QueueSilent):
            await sending
        assert not server.messages


@virtually
async def test_a_queue_that_took_it_and_did_not_say_so() -> None:
    """Where the engine's answer was lost, it is asked; it has the delivery, and there is one copy."""
    shelf = Shelf()
    shelf.forgetful = True
    async with ScriptedServer() as server, with_shelf(server, shelf) as smtp:
        server.on("RCPT", TWO_MINUTES, times=1)
        assert (await smtp.deliver(letter(ANN))).deferred == [ANN]
        await shelf.work(smtp)
        assert len(server.received(ANN)) == 1


@pytest.mark.parametrize("can_say", [True, False])
@virtually
async def test_a_queue_that_stays_silent(monkeypatch: pytest.MonkeyPatch, can_say: bool) -> None:
    """Where the engine may have it and does not say so, nothing is tried in process: the send ends, and says what is known."""
    shelf = Shelf()
    shelf.forgetful = shelf.silent = True
    if not can_say:
        monkeypatch.delattr(Shelf, "has")
    async with ScriptedServer() as server, with_shelf(server, shelf) as smtp:
        server.on("RCPT", TWO_MINUTES, times=1)
        with pytest.raises(QueueSilent, match="the queue may have it, and does not answer: OSError") as caught:
            await smtp.send_message(letter(ANN))
        assert caught.value.delivery.pending == [ANN]
        assert len(transactions(server)) == 1
        assert virtual.clock() - virtual.EPOCH == pytest.approx(120, abs=1)
        await shelf.work(smtp)
        assert len(server.received(ANN)) == 1


@virtually
async def test_a_queue_that_says_nothing_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call of the engine's that does not end is like one that fails: the send ends when the next try is due."""
    for name in ("submit", "has"):
        monkeypatch.setattr(Shelf, name, lambda *_, **__: asyncio.sleep(10_000))
    async with ScriptedServer() as server, with_shelf(server, Shelf()) as smtp:
        server.on("RCPT", TWO_MINUTES, times=1)
        with pytest.raises(QueueSilent, match="the queue may have it, and does not answer: no answer in 60 s"):
            await smtp.send_message(letter(ANN))
        assert virtual.clock() - virtual.EPOCH == pytest.approx(120, abs=1)


@virtually
async def test_a_queue_that_is_back_gets_it_before_the_next_try() -> None:
    """A queue that was silent is asked again, and takes it before the next try is due."""
    shelf = Shelf()
    shelf.broken = shelf.silent = True
    async with ScriptedServer() as server, with_shelf(server, shelf) as smtp:
        server.on("RCPT", TWO_MINUTES, times=1)
        sending = asyncio.ensure_future(smtp.deliver(letter(ANN)))
        await asyncio.sleep(60)
        shelf.broken = False
        delivery = await sending
        assert (delivery.deferred, delivery.cure) == ([ANN], None)
        assert not server.messages


@virtually
async def test_enqueue_sends_nothing_now() -> None:
    """A message that is enqueued is durable, and not tried; the engine gets the application's connection."""
    shelf = Shelf()
    async with ScriptedServer() as server, with_shelf(server, shelf) as smtp:
        transaction = object()
        delivery = await smtp.enqueue(letter(ANN), recipients=[ANN, BOB], connection=transaction)
        assert server.connections == 0
        assert delivery.deferred == [ANN, BOB]
        assert shelf.connections == [transaction]
        await shelf.work(smtp)
        assert [message.recipients for message in server.messages] == [[ANN, BOB]]
        assert server.messages[0].content == delivery.message


@virtually
async def test_what_was_broken_off_can_be_enqueued() -> None:
    """A send that a time limit ended goes to the queue with what is pending, and who has it gets it no more."""
    shelf = Shelf()
    async with ScriptedServer() as server, with_shelf(server, shelf) as smtp:
        server.on("RCPT", BOB, "450 4.2.0 Greylisted for 50 seconds", times=1)
        with pytest.raises(TimeoutError) as caught:
            async with asyncio.timeout(10):
                await smtp.send_message(letter(ANN, BOB))
        delivery = smtpretry.delivery_of(caught.value)
        assert delivery is not None
        assert (await smtp.enqueue(delivery)).deferred == [BOB]
        await shelf.work(smtp)
        assert transactions(server) == [[ANN, BOB], [BOB]]


@virtually
async def test_enqueue_that_fails_raises_with_the_delivery() -> None:
    """Where the engine cannot take it, the engine's own error comes out, and carries the delivery, which is pending."""
    shelf = Shelf()
    shelf.broken = True
    async with ScriptedServer() as server, with_shelf(server, shelf) as smtp:
        with pytest.raises(OSError, match="broken") as caught:
            await smtp.enqueue(letter(ANN))
        delivery = smtpretry.delivery_of(caught.value)
        assert delivery is not None
        assert delivery.pending == [ANN]


@virtually
async def test_enqueue_without_a_queue() -> None:
    """Without an engine there is a clear error that names the cure."""
    async with talk() as (_, smtp):
        with pytest.raises(ValueError, match="give RetryingSMTP an engine, defer="):
            await smtp.enqueue(letter(ANN))


def test_bad_arguments() -> None:
    """A queue that is none, and a negative wait, are refused at once."""
    client = ScriptedServer().client()
    with pytest.raises(TypeError, match=r"defer is a smtpretry\.Engine"):
        RetryingSMTP(client, defer="redis://")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="max_wait"):
        RetryingSMTP(client, defer=Shelf(), max_wait=-1)


# The policy


def test_the_policy_for_a_queue_is_that_of_rfc_5321() -> None:
    """Two more tries in about the first hour, then one every two or three hours, for five days."""
    policy, hour = RetryPolicy.queue(), 3600
    waits = [policy.backoff(attempt=attempt, elapsed=0) for attempt in range(1, 9)]
    assert waits[0] + waits[1] <= hour
    assert all(wait >= 15 * 60 for wait in waits)
    assert all(2 * hour <= wait <= 3 * hour for wait in waits[2:])
    assert policy.give_up_after == timedelta(days=5)


@virtually
async def test_the_end_after_five_days() -> None:
    """A recipient who never gets through is refused after five days of some fifty tries, with the last reply."""
    shelf, ended = Shelf(), list[Delivery]()

    async def on_end(delivery: Delivery) -> None:
        ended.append(delivery)

    policy = RetryPolicy(wait=RetryPolicy.queue().wait, give_up_after=timedelta(days=5), clock=virtual.clock)
    async with ScriptedServer() as server, RetryingSMTP(server.client(), policy, defer=shelf) as smtp:
        server.on("RCPT", "451 4.3.0 Try again")
        assert (await smtp.deliver(letter(ANN))).deferred == [ANN]
        await shelf.work(smtp, on_end=on_end)
        [delivery] = ended
        assert 120 * 3600 - 1 <= virtual.clock() - virtual.EPOCH <= 120 * 3600 + 1
        assert 40 <= len(delivery.attempts) <= 62
        assert delivery.refused[ANN].enhanced == "4.3.0"
        assert "gave up" in delivery.story(virtual.clock())


# What an engine gets from `attempt`


class Journal:
    """A `save` that writes down what has been settled, and what the server has seen by then."""

    def __init__(self, server: ScriptedServer) -> None:
        self.server = server
        self.entries: list[tuple[str, list[str]]] = []
        self.fail_at: int | None = None
        self.error: Exception = NotOurs()

    async def __call__(self, delivery: Delivery) -> None:
        settled = [who for who, outcome in delivery.outcomes.items() if outcome.status is not Status.PENDING]
        self.entries.append((self.server.verbs[-1], settled))
        if len(self.entries) == self.fail_at:
            raise self.error


@virtually
async def test_save_before_a_transaction_and_after_it() -> None:
    """It is saved before MAIL, and once after a transaction, with all that came of it."""
    async with talk() as (server, smtp):
        server.on("RCPT", BOB, TWO_MINUTES, times=1)
        server.on("RCPT", EVE, "550 5.1.1 User unknown", times=1)
        journal = Journal(server)
        delivery = smtpretry.prepare(BODY, sender=APP, recipients=[ANN, BOB, EVE, CAT])
        assert await smtp.attempt(delivery, journal) is delivery
        assert journal.entries == [("EHLO", []), ("DATA", [ANN, EVE, CAT])]
        assert delivery.next_at == pytest.approx(virtual.EPOCH + 120, abs=1)
        await asyncio.sleep(121)
        await smtp.attempt(delivery, journal)
        assert journal.entries[2:] == [("EHLO", [ANN, EVE, CAT]), ("DATA", [ANN, BOB, EVE, CAT])]
        assert delivery.next_at is None


@virtually
async def test_save_before_each_part_of_a_split() -> None:
    """Where a server takes two at a time, each transaction is followed by a save, and that is enough for the next."""
    async with talk(max_recipients=2) as (server, smtp):
        journal = Journal(server)
        await smtp.attempt(smtpretry.prepare(BODY, sender=APP, recipients=[ANN, BOB, CAT, DAN]), journal)
        assert len(transactions(server)) == 2
        assert [settled for _, settled in journal.entries] == [[], [ANN, BOB], [ANN, BOB, CAT, DAN]]


@virtually
async def test_not_ours_sends_nothing() -> None:
    """Where the fence says that it is another worker's, nothing of it is sent, and the client goes on working."""
    async with talk() as (server, smtp):
        journal = Journal(server)
        journal.fail_at = 1
        delivery = smtpretry.prepare(BODY, sender=APP, recipients=[ANN])
        with pytest.raises(NotOurs):
            await smtp.attempt(delivery, journal)
        assert "MAIL" not in server.verbs
        assert delivery.pending == [ANN]
        await smtp.send_message(letter(BOB))
        assert [message.recipients for message in server.messages] == [[BOB]]


@virtually
async def test_a_fence_that_has_become_old_is_asked_again() -> None:
    """Where the server took its time over RCPT, the fence is asked again before the message: a worker that slept sends nothing."""
    async with talk() as (server, smtp):
        server.fail_at("RCPT", "late", BOB, delay=30, times=1)
        journal = Journal(server)
        journal.fail_at = 2
        delivery = smtpretry.prepare(BODY, sender=APP, recipients=[ANN, BOB])
        with pytest.raises(NotOurs):
            await smtp.attempt(delivery, journal)
        assert [verb for verb, _ in journal.entries] == ["EHLO", "DATA"]
        assert not server.messages


@pytest.mark.parametrize("crash_at", [2, 3])
@virtually
async def test_at_most_once_holds_where_a_worker_dies(crash_at: int) -> None:
    """With on_uncertain="raise", who may have got it when the worker died is uncertain, and is not offered it again."""
    async with talk(patient(on_uncertain="raise")) as (server, smtp):
        server.on("RCPT", BOB, TWO_MINUTES, times=1)
        stored = list[str]()

        async def save(delivery: Delivery) -> None:
            if len(stored) == crash_at - 1:
                raise SystemExit
            stored.append(json.dumps(delivery.to_dict()))

        with pytest.raises(SystemExit):
            await smtp.attempt(smtpretry.prepare(BODY, sender=APP, recipients=[ANN, BOB]), save)
        delivery = Delivery.from_dict(json.loads(stored[-1]))
        await asyncio.sleep(121)
        await smtp.attempt(delivery)
        assert (delivery.uncertain, delivery.accepted) == (([ANN], [BOB]) if crash_at == 3 else ([], [ANN, BOB]))
        assert [len(server.received(who)) for who in (ANN, BOB)] == [1, 1]


@virtually
async def test_a_save_that_fails_before_the_message_leaves_no_doubt() -> None:
    """With on_uncertain="raise", nobody is in doubt where nothing was sent."""
    async with talk(patient(on_uncertain="raise")) as (server, smtp):
        journal = Journal(server)
        journal.fail_at, journal.error = 2, OSError("disk full")
        delivery = smtpretry.prepare(BODY, sender=APP, recipients=[ANN])
        with pytest.raises(OSError, match="disk full"):
            await smtp.attempt(delivery, journal)
        await smtp.attempt(delivery)
        assert delivery.accepted == [ANN]


@pytest.mark.parametrize(("stage", "reply"), [("DATA", "451 4.3.0 Later"), ("END_OF_DATA", "451 4.3.0 Later")])
@virtually
async def test_a_refusal_leaves_no_doubt(stage: str, reply: str) -> None:
    """With on_uncertain="raise", who was in doubt while the message went out is pending again after a refusal for now."""
    async with talk(patient(on_uncertain="raise")) as (server, smtp):
        server.on(stage, reply, times=1)
        journal = Journal(server)
        delivery = smtpretry.prepare(BODY, sender=APP, recipients=[ANN])
        await smtp.attempt(delivery, journal)
        assert (delivery.pending, delivery.outcomes[ANN].uncertain) == ([ANN], False)
        await asyncio.sleep(70)
        await smtp.attempt(delivery, journal)
        assert delivery.accepted == [ANN]


@virtually
async def test_a_save_that_fails_after_the_acceptance_makes_nothing_uncertain() -> None:
    """What the engine raises comes out as it is; in memory the recipient stays accepted."""
    async with talk(patient(on_uncertain="raise")) as (server, smtp):
        journal = Journal(server)
        journal.fail_at, journal.error = 3, OSError("disk full")
        delivery = smtpretry.prepare(BODY, sender=APP, recipients=[ANN])
        with pytest.raises(OSError, match="disk full"):
            await smtp.attempt(delivery, journal)
        assert (delivery.accepted, delivery.uncertain) == ([ANN], [])
        assert not delivery.outcomes[ANN].uncertain
        assert len(server.received(ANN)) == 1
