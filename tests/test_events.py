"""What a hook is told, when, and what a hook can do to a send: nothing."""

from __future__ import annotations

import asyncio
import contextvars
import logging
from collections import Counter
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest
import virtual
from support import (
    ANN,
    APP,
    BOB,
    BODY,
    CAT,
    GREYLISTED,
    LOG_IN,
    PASSWORD,
    USER,
    letter,
    patient,
    virtually,
)

from smtpretry import (
    Action,
    BrokenOff,
    ClientClosed,
    Closed,
    Delivery,
    Ended,
    Event,
    Failover,
    Opened,
    Paused,
    Reply,
    Resumed,
    RetryingSMTP,
    Stage,
    Status,
    Step,
    prepare,
)
from smtpretry.queues.engine import Pause
from smtpretry.testing import ScriptedServer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

UNKNOWN = "550 5.1.1 No such user"
DOWN = "421 4.3.2 Service shutting down"


class Told(list[tuple[Delivery | None, Event]]):
    """A hook that remembers what it is told."""

    def __call__(self, delivery: Delivery | None, step: Event) -> None:
        self.append((delivery, step))

    def kinds(self) -> list[str]:
        return [type(step).__name__ for _, step in self]

    def of(self, kind: type) -> list[Any]:
        return [step for _, step in self if isinstance(step, kind)]

    def ends(self) -> dict[str, Status]:
        ended = self.of(Ended)
        assert len({one.recipient for one in ended}) == len(ended)  # each once
        return {one.recipient: one.status for one in ended}


@asynccontextmanager
async def telling(
    policy: Any = None, server: dict[str, Any] | None = None, **options: Any
) -> AsyncIterator[tuple[ScriptedServer, RetryingSMTP, Told]]:
    told = Told()
    async with (
        ScriptedServer(**server or {}) as running,
        RetryingSMTP(running.client(), policy or patient(), **{"on_step": told} | options) as smtp,
    ):
        yield running, smtp, told


class Shelf:
    """A queue that keeps what it is given."""

    def __init__(self) -> None:
        self.deliveries = list[Delivery]()

    async def submit(self, delivery: Delivery, /, **_: Any) -> None:
        """Take it."""
        self.deliveries.append(delivery)

    async def work(self, smtp: object, /, *, on_end: Any = None) -> None:
        """Do nothing."""


@virtually
async def test_a_send_that_goes_well() -> None:
    """A connection, an acceptance and an end are told in this order, by the time the send returns."""
    async with telling() as (server, smtp, told):
        delivery = await smtp.deliver(letter(ANN))
        assert told.kinds() == ["Opened", "Step", "Ended"]
        assert [one for one, _ in told] == [None, delivery, delivery]
        [(_, opened), (_, step), (_, ended)] = told
        assert opened == Opened(opened.at, f"{server.hostname}:{server.port}", tls=False)
        assert step is delivery.attempts[0].steps[0]
        assert (step.stage, step.action, step.reply.code) == (Stage.END_OF_DATA, None, 250)
        assert (ended.recipient, ended.status, ended.left, ended.reply.code) == (ANN, Status.ACCEPTED, 0, 250)
        assert ended.server == opened.server == delivery.attempts[0].server
    assert told.kinds()[3:] == ["Closed"]


@virtually
async def test_the_time_to_an_end_counts_from_the_first_try() -> None:
    """What a delivery has waited in a queue, before a worker came, is not in the time that its acceptance took."""
    async with telling() as (server, smtp, told):
        server.on("RCPT", ANN, "450 4.2.0 Greylisted for 300 seconds", times=1)
        delivery = prepare(letter(ANN))
        delivery.hand_over(virtual.clock())
        await asyncio.sleep(1800)
        await smtp.deliver(delivery)
        assert told.of(Ended)[0].elapsed == pytest.approx(300, abs=1)


@virtually
async def test_every_end_is_told_once() -> None:
    """Accepted, refused and given up: each recipient's end is told once, and the last one says that nobody is left."""
    async with telling(patient(give_up_after=timedelta(minutes=10))) as (server, smtp, told):
        server.on("RCPT", BOB, UNKNOWN)
        server.on("RCPT", CAT, GREYLISTED)
        await smtp.deliver(BODY, sender=APP, recipients=[ANN, BOB, CAT])
        assert told.ends() == {ANN: Status.ACCEPTED, BOB: Status.REFUSED, CAT: Status.REFUSED}
        ended = {one.recipient: one for one in told.of(Ended)}
        assert (ended[CAT].stage, ended[CAT].reply.code) == (Stage.RCPT, 450)
        assert 500 < ended[CAT].elapsed <= 600
        assert ended[ANN].elapsed < 1
        assert [one.left for one in told.of(Ended)] == [2, 1, 0]
        assert [step.action for step in told.of(Step) if step.recipients == (BOB,)] == [Action.FAIL]


@virtually
async def test_every_step_is_told_once() -> None:
    """What the delivery's attempts hold, the hook was told, in this order and live; nothing else."""
    async with telling(server={"auth": (USER, PASSWORD)}, username=USER, password=PASSWORD) as (server, smtp, told):
        server.on("RCPT", BOB, GREYLISTED, times=2)
        server.on("END_OF_DATA", "451 4.3.0 Try again", times=1)
        delivery = await smtp.deliver(letter(ANN, BOB))
        steps = [step for attempt in delivery.attempts for step in attempt.steps]
        assert told.of(Step) == steps
        assert {Action.AUTHENTICATE, Action.RETRY, None} == {step.action for step in steps}
        assert [step.at for step in steps] == sorted(step.at for step in steps)


@pytest.mark.parametrize("mode", ["resend", "raise"])
@virtually
async def test_an_end_in_doubt(mode: Any) -> None:
    """Where the answer to the message is lost, the end is what the delivery says: in doubt, or accepted after all."""
    async with telling(patient(on_uncertain=mode)) as (server, smtp, told):
        server.fail_at("END_OF_DATA", "fin", act=True, times=1)
        delivery = await smtp.deliver(letter(ANN))
        assert told.ends() == {ANN: delivery.outcomes[ANN].status}
        assert told.ends()[ANN] is (Status.ACCEPTED if mode == "resend" else Status.UNCERTAIN)
        assert told.kinds().count("Opened") == (2 if mode == "resend" else 1)
    assert told.kinds().count("Closed") == told.kinds().count("Opened")


@virtually
async def test_a_pause_begins_once_and_ends_once() -> None:
    """However many sends wait for it, a pause is told when it begins, for how long and why, and when the server works again."""
    async with telling() as (server, smtp, told):
        server.on("CONNECT", DOWN, times=1)
        await asyncio.gather(*(smtp.deliver(letter(ANN)) for _ in range(50)))
        [paused], [resumed] = told.of(Paused), told.of(Resumed)
        assert 60 <= paused.until - paused.at <= 66
        assert (paused.stage, paused.reply.code) == (Stage.CONNECT, 421)
        assert paused.until <= resumed.at < paused.until + 1
        assert paused.server == resumed.server == f"{server.hostname}:{server.port}"
        assert len(told.of(Opened)) == 1  # a banner of 421 opens nothing


@pytest.mark.parametrize("busy", ["451 4.3.2 System busy", "454 4.7.0 Daily message quota exceeded"])
@virtually
async def test_what_was_asked_before_a_pause_does_not_end_it(busy: str) -> None:
    """An acceptance that comes during a pause is no news of the server: hooks and stats go on telling of the pause."""
    told = Told()
    async with ScriptedServer() as server:
        server.fail_at("END_OF_DATA", "late", times=1, delay=5)
        async with RetryingSMTP(server.client, patient(), max_connections=2, on_step=told) as smtp:
            before = asyncio.ensure_future(smtp.send_message(letter(ANN)))
            await asyncio.sleep(1)
            server.on("MAIL", f"{busy}, try again in 60 seconds", times=1)
            waiting = asyncio.ensure_future(smtp.send_message(letter(BOB)))
            await before
            assert (len(told.of(Paused)), len(told.of(Resumed))) == (1, 0)
            assert (smtp.stats().paused_until or 0) > virtual.clock()
            await waiting
            assert (len(told.of(Paused)), len(told.of(Resumed))) == (1, 1)
            assert smtp.stats().paused_until is None


@virtually
async def test_each_connection_is_opened_and_closed() -> None:
    """By the client, by the server, after an idle time or to begin anew: who counts gets the number that are open."""
    told = Told()
    async with ScriptedServer() as server:

        def check(_: Delivery | None, step: Event) -> None:
            if isinstance(step, Closed):
                assert len(told.of(Opened)) >= len(told.of(Closed))

        smtp = RetryingSMTP(
            server.client, patient(), max_connections=3, max_messages_per_connection=3, on_step=[told, check]
        )
        async with smtp:
            await asyncio.gather(*(smtp.deliver(letter(ANN)) for _ in range(20)))
            server.disconnect()
            await smtp.deliver(letter(ANN))
            await asyncio.sleep(15)  # idle
            assert len(told.of(Opened)) == len(told.of(Closed)) == server.connections
            await smtp.connect()
            assert len(told.of(Opened)) == smtp.stats().open + len(told.of(Closed))
            await smtp.quit()
    assert len(told.of(Opened)) == len(told.of(Closed)) == server.connections


@virtually
async def test_a_connection_that_is_encrypted_says_so() -> None:
    """Whether there is TLS is told with the connection."""
    async with telling(server={"tls": "required"}) as (_, smtp, told):
        await smtp.deliver(letter(ANN))
        assert [opened.tls for opened in told.of(Opened)] == [True]


@virtually
async def test_what_a_queue_took() -> None:
    """Who is handed over to a queue has an end: deferred, with the reply that says why it was."""
    async with telling(defer=Shelf(), max_wait=10) as (server, smtp, told):
        server.on("RCPT", BOB, GREYLISTED)
        await smtp.deliver(letter(ANN, BOB))
        await smtp.enqueue(letter(CAT))
        assert told.ends() == {ANN: Status.ACCEPTED, BOB: Status.DEFERRED, CAT: Status.DEFERRED}
        ended = {one.recipient: one for one in told.of(Ended)}
        assert (ended[BOB].reply.code, ended[BOB].left, ended[CAT].reply, ended[CAT].server) == (450, 0, None, "")


@pytest.mark.parametrize("how", ["cancelled", "closed", "timed out"])
@virtually
async def test_a_send_that_is_broken_off(how: str) -> None:
    """Whoever breaks a send off, the hook is told who is pending, after all that was certain."""
    async with telling() as (server, smtp, told):
        server.on("RCPT", BOB, GREYLISTED)
        if how == "timed out":
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(10):
                    await smtp.deliver(letter(ANN, BOB))
        else:
            send = asyncio.ensure_future(smtp.deliver(letter(ANN, BOB)))
            await asyncio.sleep(10)
            if how == "closed":
                await smtp.aclose()
            else:
                send.cancel()
            with pytest.raises((ClientClosed, asyncio.CancelledError)):
                await send
        assert told.ends() == {ANN: Status.ACCEPTED}
        [broken] = told.of(BrokenOff)
        assert broken.pending == (BOB,)
        assert broken.why == ("ClientClosed" if how == "closed" else "CancelledError")


@virtually
async def test_nothing_secret_is_told() -> None:
    """No event shows the password, the message, or what a server repeats of the log-in."""
    async with telling(server={"auth": (USER, PASSWORD)}, username=USER, password=PASSWORD) as (server, smtp, told):
        server.on("RCPT", LOG_IN, times=1)
        server.on("AUTH", f"235 welcome {USER}, your password is {PASSWORD}", times=1)
        await smtp.deliver(letter(ANN))
        assert told.of(Step)
        for _, step in told:
            assert PASSWORD not in repr(step)
            assert "How are you?" not in repr(step)


@virtually
async def test_several_hooks_and_one_that_fails(caplog: pytest.LogCaptureFixture) -> None:
    """What a hook raises is logged once with its name and traceback; the send and the other hooks know nothing of it."""

    def broken(delivery: Delivery | None, step: Event) -> None:
        msg = f"no room for {type(step).__name__}"
        raise LookupError(msg)

    before, after = Told(), Told()
    async with telling(on_step=iter([before, broken, after])) as (server, smtp, _):
        server.on("RCPT", BOB, UNKNOWN)
        assert (await smtp.send_message(letter(ANN, BOB)))[0].keys() == {BOB}
        await smtp.send_message(letter(ANN))
    assert before == after
    assert before
    [record] = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert "broken raised LookupError" in record.getMessage()
    assert record.exc_info


@pytest.mark.parametrize(
    "error", [asyncio.CancelledError, StopIteration, AssertionError, ExceptionGroup("", [OSError()])]
)
@virtually
async def test_nothing_that_a_hook_raises_reaches_a_send(error: Any) -> None:
    """Not even a cancellation, which is not the task's: the send returns, and the connection is used again."""

    def hook(delivery: Delivery | None, step: Event) -> None:
        raise error

    async with telling(on_step=hook) as (server, smtp, _):
        server.on("RCPT", BOB, GREYLISTED, times=1)
        for _ in range(3):
            assert (await smtp.deliver(letter(ANN, BOB))).accepted == [ANN, BOB]
        task = asyncio.current_task()
        assert task is not None
        assert not task.cancelling()
        assert smtp.stats().accepted == 6


@virtually
async def test_a_hook_sees_what_is_certain() -> None:
    """When a hook is told of an end, the delivery and the stats know it already, also of all others of that reply."""
    seen = list[tuple[list[str], int]]()

    def hook(delivery: Delivery | None, step: Event) -> None:
        if isinstance(step, (Step, Ended)) and delivery is not None:
            seen.append((delivery.accepted, smtp.stats().accepted))

    async with telling(on_step=hook) as (_, smtp, _):
        await smtp.deliver(letter(ANN, BOB))
    assert seen == [([ANN, BOB], 2)] * 3


@virtually
async def test_a_hook_runs_in_the_context_of_its_send() -> None:
    """Of fifty sends at once, each is told with the context variables of whoever sent it."""
    request, wrong = contextvars.ContextVar("request", default=""), Counter[str]()

    def hook(delivery: Delivery | None, step: Event) -> None:
        if delivery is not None and request.get() not in delivery.recipients:
            wrong[f"{request.get()}: {delivery.recipients}"] += 1

    async with telling(on_step=hook, max_messages_per_connection=7) as (server, smtp, _):
        server.on("RCPT", GREYLISTED, times=20)

        async def send(who: str) -> None:
            request.set(who)
            await smtp.deliver(letter(who))

        await asyncio.gather(*(send(f"user{number}@example.com") for number in range(50)))
        assert len(server.messages) == 50
    assert not wrong


@virtually
async def test_failover_tells_the_hooks_of_its_clients() -> None:
    """Each server's replies come with its name; what concerns none of them is told once by a hook that both have."""
    told = Told()
    async with ScriptedServer() as first, ScriptedServer() as second:
        clients = [RetryingSMTP(server.client(), patient(), on_step=told) for server in (first, second)]
        async with Failover(*clients, defer=Shelf(), max_wait=1) as smtp:
            first.on("MAIL", DOWN, times=1)
            second.on("RCPT", BOB, GREYLISTED)
            delivery = await smtp.deliver(letter(ANN, BOB))
            assert told.ends() == {ANN: Status.ACCEPTED, BOB: Status.DEFERRED}
            names = [f"{server.hostname}:{server.port}" for server in (first, second)]
            assert [attempt.server for attempt in delivery.attempts] == names
            assert [paused.server for paused in told.of(Paused)] == names[:1]
            assert [ended.server for ended in told.of(Ended)] == [names[1]] * 2
            stats = smtp.stats()
            assert (stats.accepted, stats.deferred, stats.open, stats.paused_until) == (1, 1, 1, None)
            assert [one.server for one in stats.servers] == names
            assert stats.servers[0].paused_until == told.of(Paused)[0].until
        second.clear()


@pytest.mark.parametrize("wrong", [5, ["hook"], "hook", [None], print, None])
def test_what_is_no_hook(wrong: Any) -> None:
    """What cannot be called is refused at once, with a message that says what to give."""
    server = ScriptedServer()
    if wrong in (print, None):
        assert RetryingSMTP(server.client(), on_step=wrong)
        return
    with pytest.raises(TypeError, match="on_step is a function of a delivery and a step"):
        RetryingSMTP(server.client(), on_step=wrong)


class Coroutine:
    """A hook that would have to be awaited."""

    async def __call__(self, delivery: Delivery | None, step: Event) -> None: ...


@pytest.mark.parametrize("hook", [Coroutine(), Coroutine().__call__])
def test_a_coroutine_function_is_no_hook(hook: Any) -> None:
    """Nobody would await it: it is refused at once, not forgotten in silence."""
    with pytest.raises(TypeError, match="plain function"):
        RetryingSMTP(ScriptedServer().client(), on_step=hook)


@virtually
async def test_a_pause_that_another_worker_has_found() -> None:
    """What the workers of a queue tell each other of a server, the hooks are told: a pause, once, and its end."""
    async with telling() as (_, smtp, told):
        pause = Pause(virtual.clock() + 300, 1, Stage.CONNECT, Reply.parse(DOWN))
        smtp.sites[0].adopt(pause)
        smtp.sites[0].adopt(pause)
        [paused] = told.of(Paused)
        assert (paused.until, paused.reply.code) == (pause.until, 421)
        assert smtp.stats().paused_until == pause.until
        smtp.sites[0].adopt(Pause())
        assert told.kinds() == ["Paused", "Resumed"]
        assert smtp.stats().paused_until is None


# How a client is doing


@virtually
async def test_stats_of_a_client_that_waits() -> None:
    """The stats tell the connections, who waits, until when and why, and the ends so far."""
    async with telling() as (server, smtp, _):
        before = smtp.stats()
        assert (before.open, before.in_use, before.waiting, before.paused_until, before.reason) == (0, 0, 0, None, "")
        assert before.server == f"{server.hostname}:{server.port}"
        server.on("RCPT", BOB, UNKNOWN)
        server.on("RCPT", CAT, GREYLISTED, times=1)
        sends = [asyncio.ensure_future(smtp.deliver(letter(who))) for who in (ANN, BOB, CAT)]
        await asyncio.sleep(5)
        now = smtp.stats()
        assert (now.open, now.in_use, now.waiting, now.accepted, now.refused, now.paused_until) == (1, 0, 1, 1, 1, None)
        server.on("MAIL", DOWN, times=2)  # the first one closes a connection that was idle
        sends += [asyncio.ensure_future(smtp.deliver(letter(ANN))) for _ in range(10)]
        await asyncio.sleep(5)
        now = smtp.stats()
        assert (now.waiting, now.reason) == (11, f"MAIL: {DOWN}")
        assert now.paused_until is not None
        assert 50 < now.paused_until - virtual.clock() < 66
        await asyncio.gather(*sends)
        end = smtp.stats()
        assert (end.waiting, end.paused_until, end.reason, end.accepted) == (0, None, "", 12)


@virtually
async def test_stats_count_what_is_in_use_and_who_waits_for_it() -> None:
    """While a server is silent, its connection is in use, and the other sends wait for it."""
    async with telling() as (server, smtp, _):
        server.fail_at("END_OF_DATA", "stall", times=1)
        sends = [asyncio.ensure_future(smtp.deliver(letter(ANN))) for _ in range(5)]
        await asyncio.sleep(30)
        stats = smtp.stats()
        assert (stats.open, stats.in_use, stats.waiting) == (1, 1, 4)
        sends[3].cancel()
        await asyncio.sleep(1)
        assert smtp.stats().waiting == 3
        for send in sends:
            send.cancel()
        await asyncio.gather(*sends, return_exceptions=True)
        assert (smtp.stats().in_use, smtp.stats().waiting) == (0, 0)
