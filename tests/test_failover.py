"""Several servers: what is in trouble is left alone, nobody waits for it, and nobody gets a second copy."""

from __future__ import annotations

import asyncio
import contextlib
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import aiosmtplib
import faults
import pytest
import virtual
from support import ANN, APP, BOB, BODY, CAT, EVE, GREYLISTED, letter, patient, transactions, virtually

from smtpretry import Delivery, Failover, RetryingSMTP, prepare
from smtpretry.queues.engine import Pause
from smtpretry.testing import ScriptedServer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

DOWN = "421 4.3.2 Service shutting down"
UTF8 = "änn@example.com"


@contextlib.asynccontextmanager
async def two(policy: Any = None, **options: Any) -> AsyncIterator[tuple[ScriptedServer, ScriptedServer, Failover]]:
    async with ScriptedServer() as first, ScriptedServer() as second:
        clients = [RetryingSMTP(server.client(), policy or patient(), **options) for server in (first, second)]
        async with Failover(*clients) as smtp:
            yield first, second, smtp


@contextlib.asynccontextmanager
async def silent_after_a_message() -> AsyncIterator[tuple[ScriptedServer, Failover]]:
    """Two servers, the first of which leaves a message without an answer for a while; with the second one."""
    async with two() as (first, second, smtp):
        first.fail_at("END_OF_DATA", "stall", times=1)
        stalled = asyncio.ensure_future(smtp.deliver(letter(ANN)))
        await asyncio.sleep(1)
        yield second, smtp
        assert (await stalled).accepted == [ANN]


def now() -> float:
    return virtual.clock() - virtual.EPOCH


@virtually
async def test_the_first_server_gets_all_while_it_works() -> None:
    """Where nothing is wrong, the second server sees nobody."""
    async with two() as (first, second, smtp):
        for _ in range(3):
            await smtp.send_message(letter(ANN))
        assert (len(first.messages), second.connections) == (3, 0)


@pytest.mark.parametrize("trouble", ["refused connection", "421 banner", "421 at MAIL", "quota", "silence"])
@virtually
async def test_the_next_one_takes_over_at_once(trouble: str) -> None:
    """A server in trouble costs no wait: what is pending goes through the next one, in the same attempt."""
    async with two() as (first, second, smtp):
        match trouble:
            case "refused connection":
                await first.stop()
            case "421 banner":
                first.on("CONNECT", DOWN)
            case "421 at MAIL":
                first.on("MAIL", DOWN)
            case "quota":
                first.on("MAIL", "454 4.7.0 Daily message quota exceeded")
            case "silence":
                first.fail_at("CONNECT", "stall")
        delivery = await smtp.deliver(letter(ANN, BOB))
        assert delivery.accepted == [ANN, BOB]
        assert now() <= 61  # the silence of a connection is waited for
        assert [second.received(who) != [] for who in (ANN, BOB)] == [True, True]
        if first.listening:
            before = first.connections
            await smtp.send_message(letter(CAT))
            assert first.connections == before  # it is left alone
        first.clear()


@virtually
async def test_all_go_back_when_the_first_works_again() -> None:
    """After its pause, one message finds out whether the first server works; then it gets all of them again."""
    async with two() as (first, second, smtp):
        first.on("CONNECT", DOWN, times=1)
        await smtp.send_message(letter(ANN))
        assert (len(first.messages), len(second.messages)) == (0, 1)
        await asyncio.sleep(120)
        await asyncio.gather(*(smtp.send_message(letter(BOB)) for _ in range(20)))
        await smtp.send_message(letter(CAT))
        assert first.connections == 2
        assert len(first.messages) + len(second.messages) == 22
        assert len(first.received(CAT)) == 1


@virtually
async def test_a_probe_that_fails_is_no_storm() -> None:
    """While the first server stays down, each pause ends with one connection, however many messages are sent."""
    async with two() as (first, second, smtp):
        first.on("CONNECT", DOWN)
        for _ in range(30):
            await asyncio.gather(*(smtp.send_message(letter(ANN)) for _ in range(10)))
            await asyncio.sleep(10)
        assert len(second.messages) == 300
        assert first.connections <= 4  # at 0, 60, 180 seconds and so on
        first.clear()


@pytest.mark.parametrize("stage", ["MAIL", "RCPT", "DATA", "END_OF_DATA"])
@virtually
async def test_a_lost_connection_costs_no_wait(stage: str) -> None:
    """Where the first server hangs up within a transaction, the next one gets the message in the same attempt."""
    async with two() as (first, second, smtp):
        first.fail_at(stage, "fin")
        for who in (ANN, BOB):
            assert (await smtp.deliver(letter(who))).accepted == [who]
        before = first.connections
        assert (await smtp.deliver(letter(CAT))).accepted == [CAT]
        assert first.connections == before  # after two messages in a row it is left alone
        assert len(second.messages) == 3
        assert now() < 1
        first.clear()


@virtually
async def test_nobody_waits_behind_a_message_without_an_answer() -> None:
    """While the first server is silent after a final dot, the others go to the next one: after ten seconds, then at once."""
    async with silent_after_a_message() as (second, smtp):
        for who, took in ((BOB, 10), (CAT, 1)):
            before = now()
            assert (await smtp.deliver(letter(who))).accepted == [who]
            assert now() - before == pytest.approx(took, abs=1)
        assert [message.recipients for message in second.messages] == [[BOB], [CAT]]


@virtually
async def test_a_newsletter_does_not_wait_behind_a_message_without_an_answer() -> None:
    """While the first server is silent after a final dot, `send_many` goes on with the next one, after ten seconds."""
    async with two() as (first, second, smtp):
        first.fail_at("END_OF_DATA", "stall", times=1)
        took = [now() async for _ in smtp.send_many(letter(f"{number}@example.com") for number in range(50))]
        assert took[-2] == pytest.approx(10, abs=1)
        assert len(second.messages) == 50
        await smtp.send_message(letter(ANN))
        assert [message.recipients for message in first.messages] == [[ANN]]  # which works again


@virtually
async def test_a_message_that_every_server_trips_over_stops_no_other() -> None:
    """Two servers hang up on one recipient: that one waits between its tries, and neither server is left alone."""
    async with two(patient(give_up_after=timedelta(minutes=10))) as (first, second, smtp):
        for server in (first, second):
            server.fail_at("RCPT", "fin", BOB)
        lost = asyncio.ensure_future(smtp.deliver(letter(BOB)))
        for _ in range(20):
            await asyncio.sleep(30)
            await smtp.send_message(letter(ANN))
        assert (await lost).pending == (await lost).accepted == []
        assert (len(first.received(ANN)), second.received(ANN)) == (20, [])
        assert len((await lost).attempts) <= 10
        for server in (first, second):
            server.clear()


@virtually
async def test_two_servers_that_lose_connections_are_not_hammered() -> None:
    """Where both hang up on everything, the waits are those of a single server."""
    async with two() as (first, second, smtp):
        for server in (first, second):
            server.fail_at("MAIL", "fin")
        delivery = await smtp.deliver(letter(ANN))
        assert delivery.refused
        assert first.connections + second.connections <= 40
        for server in (first, second):
            server.clear()


@virtually
async def test_who_was_accepted_or_refused_is_not_offered_again() -> None:
    """Where the first server breaks between two transactions, the second one is offered only those who are left."""
    async with two() as (first, second, smtp):
        first.on("RCPT", BOB, "550 5.1.1 No such user")
        first.on("RCPT", CAT, "452 4.5.3 Too many recipients", times=1)
        first.on("RCPT", CAT, DOWN)
        delivery = await smtp.deliver(BODY, sender=APP, recipients=[ANN, BOB, CAT])
        assert delivery.accepted == [ANN, CAT]
        assert list(delivery.refused) == [BOB]
        assert transactions(second) == [[CAT]]
        first.clear()


@virtually
async def test_a_greylisted_recipient_waits_for_the_server_that_said_so() -> None:
    """A 450 of one recipient's does not move it: the second try goes to the same server."""
    async with two() as (first, second, smtp):
        first.on("RCPT", ANN, GREYLISTED, times=1)
        delivery = await smtp.deliver(letter(ANN))
        assert delivery.accepted == [ANN]
        assert (len(first.received(ANN)), second.connections) == (1, 0)


@pytest.mark.parametrize("trouble", ["554 5.7.1 Your address is blocked", "421 4.3.2 Service shutting down"])
@virtually
async def test_it_moves_when_that_server_can_do_nothing_for_it_any_more(trouble: str) -> None:
    """Whom the first server has greylisted does not wait for it where it blocks the client then; a pause is waited for."""
    async with two() as (first, second, smtp):
        first.on("RCPT", GREYLISTED, times=1)
        first.on("CONNECT", "220 hello", times=1)
        first.on("CONNECT", trouble, times=1)
        assert (await smtp.deliver(letter(ANN))).accepted == [ANN]
        assert (len(first.messages), len(second.messages)) == ((0, 1) if trouble.startswith("554") else (1, 0))
        assert now() < 300


@virtually
async def test_it_moves_when_its_patience_there_is_over() -> None:
    """A recipient that the first server refuses for now until the end is offered to the second one."""
    async with two(patient(give_up_after=timedelta(minutes=10))) as (first, second, smtp):
        first.on("RCPT", ANN, GREYLISTED)
        delivery = await smtp.deliver(letter(ANN, BOB))
        assert delivery.accepted == [ANN, BOB]
        assert (len(first.received(BOB)), len(second.received(ANN))) == (1, 1)


@virtually
async def test_who_waits_for_a_server_in_trouble_waits_on() -> None:
    """A greylisted recipient does not move because its server has an outage meanwhile; the others do."""
    async with two() as (first, second, smtp):
        first.on("RCPT", ANN, GREYLISTED, times=1)
        sending = asyncio.ensure_future(smtp.deliver(letter(ANN)))
        await asyncio.sleep(30)
        first.on("MAIL", DOWN, times=1)
        await smtp.send_message(letter(BOB))
        assert (await sending).accepted == [ANN]
        assert (len(first.received(ANN)), len(second.received(BOB))) == (1, 1)


@virtually
async def test_both_in_trouble() -> None:
    """Where no server works, the send waits for the one that may work first, and gives up as one server's would."""
    async with two() as (first, second, smtp):
        first.on("CONNECT", DOWN, times=1)
        second.on("CONNECT", "421 4.3.2 down, try again in 3000 seconds", times=1)
        delivery = await smtp.deliver(letter(ANN))
        assert delivery.accepted == [ANN]
        assert len(first.received(ANN)) == 1
        assert now() < 100
    async with two() as (first, second, smtp):
        first.on("CONNECT", DOWN)
        second.on("CONNECT", DOWN)
        delivery = await smtp.deliver(letter(ANN))
        assert delivery.refused[ANN].code == 421
        first.clear()
        second.clear()


@virtually
async def test_a_log_in_that_is_refused_moves_all() -> None:
    """A server that refuses the password is in trouble: the next one, with its own credentials, takes over."""
    async with ScriptedServer(auth=("app", "right")) as first, ScriptedServer(auth=("app", "right")) as second:
        wrong = RetryingSMTP(first.client(), patient(), username="app", password="wrong")
        right = RetryingSMTP(second.client(), patient(), username="app", password="right")
        async with Failover(wrong, right) as smtp:
            assert (await smtp.deliver(letter(ANN))).accepted == [ANN]
            assert (await smtp.deliver(letter(BOB))).accepted == [BOB]
            assert first.verbs.count("AUTH") == 1
        async with Failover(wrong, RetryingSMTP(second.client(), patient(), username="app", password="bad")) as smtp:
            assert (await smtp.deliver(letter(EVE))).refused[EVE].code == 535


@pytest.mark.parametrize("mode", faults.MODES)
@virtually
async def test_an_uncertain_recipient_moves_only_where_it_may(mode: Any) -> None:
    """After a loss behind the final dot, the second server gets it at once where the policy says "resend", or never."""
    async with two(patient(on_uncertain=mode)) as (first, second, smtp):
        first.on("RCPT", ANN, GREYLISTED, times=1)  # which no longer ties it to the server that said so
        first.fail_at("END_OF_DATA", "fin", act=True, times=1)
        delivery = await smtp.deliver(letter(ANN))
        copies = [len(server.received(ANN)) for server in (first, second)]
        assert copies == ([1, 1] if mode == "resend" else [1, 0])
        assert (delivery.uncertain == [ANN]) is (mode == "raise")
        assert now() < 100


@virtually
async def test_it_goes_on_in_the_next_process() -> None:
    """Which server a recipient waits for is stored with the delivery."""
    async with two() as (first, second, smtp):
        first.on("RCPT", ANN, GREYLISTED, times=1)
        delivery = await smtp.attempt(prepare(letter(ANN, BOB)))
        delivery = Delivery.from_dict(delivery.to_dict())
        assert delivery.outcomes[ANN].server == 0
        await first.stop()
        await asyncio.sleep((delivery.next_at or 0) - virtual.clock())
        await smtp.attempt(delivery)
        assert delivery.pending == [ANN]
        assert second.connections == 0


@virtually
async def test_it_is_taken_up_whatever_clock_stored_it() -> None:
    """Where a queue's worker has a clock that is a day behind, nobody waits for that day."""
    async with two() as (first, _, smtp):
        first.on("RCPT", ANN, GREYLISTED, times=1)
        delivery = await smtp.attempt(prepare(letter(ANN)))
        delivery.shift(86400)
        assert (await smtp.deliver(delivery)).accepted == [ANN]
        assert now() < 100


@virtually
async def test_the_first_policy_says_how_long_a_delivery_is_tried() -> None:
    """What a queue has held for longer than the second server's policy waits is still offered to that server."""
    async with ScriptedServer() as first, ScriptedServer() as second:
        hasty = RetryingSMTP(second.client(), patient(give_up_after=timedelta(seconds=30)))
        async with Failover(RetryingSMTP(first.client(), patient()), hasty) as smtp:
            first.on("CONNECT", DOWN, times=1)
            await smtp.deliver(letter(BOB))
            delivery = prepare(letter(ANN))
            delivery.hand_over(virtual.clock() - 300)
            assert (await smtp.deliver(delivery)).accepted == [ANN]
            assert len(second.received(ANN)) == 1


@virtually
async def test_a_server_that_is_no_longer_there() -> None:
    """Who waits for a third server, and finds only two after a restart, is offered to those."""
    async with two() as (first, _, smtp):
        delivery = prepare(letter(ANN))
        delivery.outcomes[ANN].server = 2
        assert (await smtp.deliver(Delivery.from_dict(delivery.to_dict()))).accepted == [ANN]
        assert len(first.received(ANN)) == 1


@virtually
async def test_a_stream_over_several_connections_waits_for_nothing() -> None:
    """Where the first server refuses all of its connections at once, what is under way moves, too."""
    async with ScriptedServer() as first, ScriptedServer() as second:
        clients = [RetryingSMTP(server.client, patient(), max_connections=3) for server in (first, second)]
        async with Failover(*clients) as smtp:
            number = 0
            async for delivery in smtp.send_many([letter(ANN, BOB) for _ in range(60)], concurrency=10):
                number += 1
                if number == 20:
                    first.on("MAIL", DOWN)
                    first.on("CONNECT", DOWN)
                assert delivery.accepted == [ANN, BOB]
            assert number == len(first.messages) + len(second.messages) == 60
            assert now() < 5
        first.clear()


@pytest.mark.parametrize(
    ("clients", "error"),
    [
        (lambda one, _: [one], ValueError),
        (lambda one, _: [one, one], ValueError),
        (lambda one, _: [one, object()], TypeError),
        (lambda one, queued: [one, queued], ValueError),
    ],
)
def test_clients_that_cannot_be(clients: Any, error: type[Exception]) -> None:
    """One client, the same client twice, or one with a queue of its own: an error at once."""

    class Queue:
        async def submit(self, delivery: Delivery, /, *, connection: Any = None) -> None:
            """Take it."""

        async def work(self, smtp: object, /, *, on_end: Any = None) -> None:
            """Send it."""

    server = ScriptedServer()
    queued = RetryingSMTP(server.client(), defer=Queue())
    with pytest.raises(error):
        Failover(*clients(RetryingSMTP(server.client()), queued))


def _cannot(trouble: str, server: ScriptedServer) -> RetryingSMTP:
    """Return a client of a server that can do nothing for the message, and say so to the server where it has to."""
    if trouble == "blocks the client":
        server.on("CONNECT", "554 5.7.1 Your address is blocked")
    if trouble == "its certificate is another's":
        return RetryingSMTP(aiosmtplib.SMTP(hostname="localhost", port=server.port, start_tls=True), patient())
    credentials: Any = {"username": "app", "password": "wrong"} if server.credentials else {}
    return RetryingSMTP(server.client(), patient(), **credentials)


CANNOT: dict[str, dict[str, Any]] = {
    "refuses the password": {"auth": ("app", "right")},
    "blocks the client": {},
    "its certificate is another's": {"tls": True},
    "knows no SMTPUTF8": {"smtputf8": False},
    "takes short messages only": {"size_limit": 10},
}


@pytest.mark.parametrize("trouble", CANNOT)
@virtually
async def test_what_the_next_one_cannot_do_waits_for_the_first(trouble: str) -> None:
    """A message is not lost because the second server can do nothing for it while the first has a short outage."""
    async with ScriptedServer(smtputf8=True) as first, ScriptedServer(**CANNOT[trouble]) as second:
        async with Failover(RetryingSMTP(first.client(), patient()), _cannot(trouble, second)) as smtp:
            first.on("CONNECT", DOWN, times=1)
            delivery = await smtp.deliver(letter(UTF8))
        assert delivery.accepted == [UTF8]
        assert (len(first.messages), len(second.messages)) == (1, 0)
        assert now() < 70
        second.clear()


@pytest.mark.parametrize("trouble", CANNOT)
@virtually
async def test_what_the_first_one_cannot_do_goes_to_the_next(trouble: str) -> None:
    """What a server cannot do for a message is its own trouble: the next one gets the message at once."""
    async with ScriptedServer(**CANNOT[trouble]) as first, ScriptedServer(smtputf8=True) as second:
        async with Failover(_cannot(trouble, first), RetryingSMTP(second.client(), patient())) as smtp:
            for _ in range(3):
                assert (await smtp.deliver(letter(UTF8))).accepted == [UTF8]
            assert (await smtp.deliver(BODY[:30], sender=APP, recipients=[ANN])).accepted == [ANN]
        assert len(second.messages) == (3 if trouble == "knows no SMTPUTF8" else 4)
        assert now() < 1
        first.clear()


@pytest.mark.parametrize("trouble", CANNOT)
@virtually
async def test_what_none_of_them_can_do_is_told_at_once(trouble: str) -> None:
    """Where all servers can do nothing for a message, nobody waits for any of them."""
    async with ScriptedServer(**CANNOT[trouble]) as first, ScriptedServer(**CANNOT[trouble]) as second:
        async with Failover(_cannot(trouble, first), _cannot(trouble, second)) as smtp:
            for number in range(1, 4):
                assert list((await smtp.deliver(letter(UTF8))).refused) == [UTF8]
                assert first.connections == 1
                assert second.connections <= number
                assert now() < 1
        for server in (first, second):
            server.clear()


@virtually
async def test_another_worker_has_found_that_the_first_one_works_again() -> None:
    """What it could do nothing for then, it may take now: nobody is refused because the second can do nothing for it."""
    async with ScriptedServer(smtputf8=True) as first, ScriptedServer(smtputf8=False) as second:
        async with Failover(*(RetryingSMTP(server.client(), patient()) for server in (first, second))) as smtp:
            first.on("CONNECT", "554 5.7.1 Your address is blocked", times=1)
            assert (await smtp.deliver(letter(ANN))).accepted == [ANN]
            smtp.sites[0].adopt(Pause())
            first.fail_at("MAIL", "fin", times=2)
            assert (await smtp.deliver(letter(UTF8))).accepted == [UTF8]
        assert (len(first.messages), len(second.messages)) == (1, 1)


@virtually
async def test_who_no_server_can_do_anything_for_waits_for_none_with_the_others() -> None:
    """One recipient waits for the first server, which can do nothing for the other: nor can the second, and it ends."""
    async with (
        ScriptedServer(smtputf8=False) as first,
        ScriptedServer(size_limit=10) as second,
        Failover(RetryingSMTP(first.client(), patient()), RetryingSMTP(second.client(), patient())) as smtp,
    ):
        first.on("RCPT", ANN, GREYLISTED, times=1)
        delivery = await smtp.attempt(prepare(letter(ANN, UTF8)))
        assert (delivery.pending, list(delivery.refused)) == ([ANN], [UTF8])
        assert (await smtp.deliver(delivery)).accepted == [ANN]
        assert len(first.messages) == 1


@pytest.mark.parametrize("trouble", CANNOT)
@virtually
async def test_the_wait_for_the_first_has_an_end(trouble: str) -> None:
    """Where the first server stays down, and the second can do nothing, it ends when the first one's patience does."""
    async with ScriptedServer() as first, ScriptedServer(**CANNOT[trouble]) as second:
        async with Failover(RetryingSMTP(first.client(), patient()), _cannot(trouble, second)) as smtp:
            first.on("CONNECT", DOWN)
            delivery = await smtp.deliver(letter(UTF8))
        assert list(delivery.refused) == [UTF8]
        assert 2700 < now() <= 3600
        assert first.connections <= 10
        assert second.connections <= 20
        assert second.verbs.count("AUTH") <= first.connections
        for server in (first, second):
            server.clear()


@virtually
async def test_many_messages_do_not_wait_behind_one_without_an_answer() -> None:
    """`send_many` draws the next message as soon as the one before it goes to the next server."""
    async with silent_after_a_message() as (second, smtp):
        before = now()
        assert [one.accepted async for one in smtp.send_many([letter(BOB), letter(CAT)])] == [[BOB], [CAT]]
        assert now() - before == pytest.approx(11, abs=1)
        assert len(second.messages) == 2
