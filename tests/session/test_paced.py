"""As fast as the server lets: what is said to one message paces all of a client's, and is held against no other."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from datetime import timedelta
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Self

import aiosmtplib
import pytest
import tenacity
import virtual
from aiolimiter import AsyncLimiter
from benchmarks.relay import HOST, Limits, Relay, Session
from support import ANN, APP, BOB, BODY, GREYLISTED, patient, transactions, virtually

from smtpretry import Action, ClientClosed, Delivery, Failover, RetryingSMTP, Rule, Stage, prepare
from smtpretry.testing import ScriptedServer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

MANY = 300
IDEAL = (MANY - 1) // 14  # seconds
TOO_FAST = "454 Throttling failure: Maximum sending rate exceeded."


def now() -> float:
    return virtual.clock() - virtual.EPOCH


def client(server: ScriptedServer, connections: int = 3, **settings: Any) -> RetryingSMTP:
    """Return a client with several connections."""
    policy = settings.pop("policy", None) or patient()
    return RetryingSMTP(server.client, policy, max_connections=connections, **settings)


def letters(number: int) -> Iterator[Delivery]:
    """Return so many messages, each to somebody else."""
    return (prepare(BODY, sender=APP, recipients=f"user{each}@example.com") for each in range(number))


async def burst(smtp: RetryingSMTP | Failover, number: int) -> list[Delivery]:
    """Send so many messages at once."""
    return list(await asyncio.gather(*(smtp.deliver(letter) for letter in letters(number))))


def refusals(deliveries: list[Delivery], code: int = 454) -> int:
    """Return how often the server said that."""
    steps = [step for delivery in deliveries for attempt in delivery.attempts for step in attempt.steps]
    return sum(step.reply.code == code for step in steps)


def refuse(server: ScriptedServer, said: str, *numbers: int) -> None:
    """Let the server say that, once, to the messages of those numbers."""
    for number in numbers:
        server.on("RCPT", f"user{number}@example.com", said, times=1)


async def stream(smtp: RetryingSMTP, number: int) -> list[Delivery]:
    """Send so many messages from an iterator."""
    return [delivery async for delivery in smtp.send_many(letters(number))]


@pytest.mark.parametrize("send", [burst, stream])
@pytest.mark.parametrize("most", [None, 3], ids=["any number of connections", "three connections"])
@virtually
async def test_finds_the_speed(send: Callable[..., Any], most: int | None) -> None:
    """What a server allows in a second is found from its refusals, beside how many connections it allows."""
    async with (
        ScriptedServer(max_rate=(14, 1), max_connections=most) as server,
        client(server, 8 if most else 3) as smtp,
    ):
        deliveries = await send(smtp, MANY)
        assert all(delivery.accepted for delivery in deliveries)
        assert now() <= 1.4 * IDEAL
        assert refusals(deliveries) <= 15


@virtually
async def test_nothing_is_paced_before_a_refusal() -> None:
    """A server that says nothing gets all messages at once."""
    async with ScriptedServer() as server, client(server) as smtp:
        await burst(smtp, MANY)
        assert now() == 0


@virtually
async def test_in_the_order_of_asking() -> None:
    """Who asked first goes first: no message is overtaken by more than a refusal costs."""
    async with ScriptedServer(max_rate=(14, 1)) as server, client(server) as smtp:
        deliveries = await burst(smtp, 100)
        refused = {delivery.recipients[0] for delivery in deliveries if len(delivery.attempts) > 1}
        arrived = [message.recipients[0] for message in server.messages if message.recipients[0] not in refused]
        numbers = [int(who.partition("@")[0].removeprefix("user")) for who in arrived]
        assert all(later - earlier > -4 for earlier, later in pairwise(numbers))


@pytest.mark.parametrize(
    "rule",
    [
        Rule(text="Maximum sending rate", action=Action.RETRY, slower=True, wait=1),
        Rule(text="Maximum sending rate", action=Action.RECONNECT, slower=True, wait=1, stages=[Stage.RCPT]),
        Rule(text="Maximum sending rate", action=Action.RETRY, slower=True),
    ],
    ids=["one second", "and a new connection", "the policy's wait"],
)
@virtually
async def test_an_own_row_paces(rule: Rule) -> None:
    """A row of the user's with `slower` needs no scope: one refusal stops all, and is paced from then on."""
    policy = patient(rules=(rule,), wait=tenacity.wait_fixed(2))
    async with ScriptedServer() as server, client(server, policy=policy) as smtp:
        refuse(server, TOO_FAST, 28)
        deliveries = await burst(smtp, 100)
        assert all(delivery.accepted for delivery in deliveries)
        assert (rule.wait or 2) < now() < 20
        assert sum(len(delivery.attempts) for delivery in deliveries) == 101


@virtually
async def test_each_refusal_in_a_row_doubles_the_wait() -> None:
    """A server that goes on saying "too fast" is asked by one message at a time, less and less often."""
    async with ScriptedServer() as server, client(server) as smtp:
        server.on("MAIL", TOO_FAST, times=7)
        deliveries = await burst(smtp, 20)
        assert refusals(deliveries) == 7
        steps = [step for one in deliveries for attempt in one.attempts for step in attempt.steps]
        waits = sorted({round(step.wait, 1) for step in steps if step.reply.code == 454})
        assert waits == [1, 2, 4, 8, 16]  # three were on their way at the first
        assert sum(waits) <= now() < sum(waits) + 20


@virtually
async def test_a_short_patience_makes_no_long_wait() -> None:
    """The wait grows to no more than the policy's patience: who comes later still finds out for itself."""
    async with ScriptedServer() as server, client(server, policy=patient(give_up_after=timedelta(seconds=30))) as smtp:
        script = server.on("MAIL", TOO_FAST)
        for _ in range(40):
            await smtp.deliver(BODY, sender=APP, recipients=ANN)
        server.clear()
        before = script.used
        await asyncio.sleep(30)
        assert (await smtp.deliver(BODY, sender=APP, recipients=ANN)).accepted
        assert before < 200


# A pause is not held against those who were not refused


@virtually
async def test_only_the_refused_have_made_an_attempt() -> None:
    """With one attempt each, those who were refused are given up, and all others get through."""
    async with ScriptedServer(max_rate=(14, 1)) as server, client(server, policy=patient(max_attempts=1)) as smtp:
        deliveries = await burst(smtp, MANY)
        refused = [delivery for delivery in deliveries if delivery.refused]
        assert len(refused) == refusals(deliveries) <= 15
        assert all(len(delivery.attempts) == 1 for delivery in deliveries)


@pytest.mark.parametrize(
    "said",
    [TOO_FAST, "451 4.3.2 System not accepting network messages", "421 4.7.0 slow down"],
    ids=["pace", "", "421"],
)
@virtually
async def test_pauses_use_up_nobodys_patience(said: str) -> None:
    """A server that takes ten messages and then wants to be left alone gets all, however long that takes in all."""
    async with (
        ScriptedServer() as server,
        client(server, policy=patient(give_up_after=timedelta(minutes=10)), connections=1) as smtp,
    ):
        refuse(server, said, *range(9, MANY, 10))
        deliveries = await burst(smtp, MANY)
        assert all(delivery.accepted for delivery in deliveries)
        untouched = [delivery for delivery in deliveries if not refusals([delivery], int(said[:3]))]
        assert all(len(delivery.attempts) == 1 for delivery in untouched)


@virtually
async def test_what_was_waited_before_the_first_attempt_is_not_counted() -> None:
    """A message that waited for the server longer than its patience is, when it is refused at last, tried again."""
    policy = patient(give_up_after=timedelta(minutes=30), wait=tenacity.wait_fixed(60))
    async with ScriptedServer(max_rate=(5, 600)) as server, client(server, policy=policy) as smtp:
        server.on("RCPT", "user99@example.com", GREYLISTED, times=1)
        deliveries = await burst(smtp, 100)
        last = deliveries[-1]
        assert now() > 3600
        assert last.accepted
        assert all(delivery.accepted for delivery in deliveries if not refusals([delivery]))


@virtually
async def test_a_pause_as_long_as_the_patience_gives_nobody_up() -> None:
    """A limit of an hour that says so, again and again, and a patience of an hour: all get in."""
    said = "451 4.7.1 Hourly limit of 20 messages exceeded, try again in 3600 seconds"
    policy = patient(give_up_after=timedelta(hours=1))
    async with ScriptedServer() as server, client(server, policy=policy, connections=1) as smtp:
        refuse(server, said, 20, 41, 62)
        deliveries = await burst(smtp, 80)
        assert all(delivery.accepted for delivery in deliveries)
        assert sum(len(delivery.attempts) for delivery in deliveries) == 83
        assert now() >= 3 * 3600


@virtually
async def test_a_quota_of_an_hour_that_does_not_say_so() -> None:
    """The last try comes when the patience ends: just as the quota begins anew."""
    rule = Rule(text="Maximum sending rate", action=Action.RETRY, slower=True, wait=600)
    policy = patient(rules=(rule,), give_up_after=timedelta(hours=1))
    async with ScriptedServer(max_rate=(20, 3600)) as server, client(server, policy=policy) as smtp:
        deliveries = await burst(smtp, 60)
        assert all(delivery.accepted for delivery in deliveries)
        assert refusals(deliveries) <= 15
        assert now() <= 1.4 * 2 * 3600


@virtually
async def test_a_dead_server_is_given_up_on() -> None:
    """Where the server takes nobody's mail, the patience of all ends as it ever did."""
    policy = patient(give_up_after=timedelta(minutes=30), wait=tenacity.wait_fixed(60))
    async with ScriptedServer() as server, client(server, policy=policy) as smtp:
        await burst(smtp, 3)
        server.on("MAIL", "451 4.3.2 System not accepting network messages")
        deliveries = await burst(smtp, 50)
        assert all(delivery.refused for delivery in deliveries)
        assert 1700 < now() < 2000


@virtually
async def test_each_transaction_asks_for_a_turn() -> None:
    """A message in many transactions takes a turn of the pace for each of them, and goes on before all who came later."""
    async with ScriptedServer(max_rate=(5, 1), max_recipients=2) as server, client(server, connections=1) as smtp:
        await burst(smtp, 30)
        before, began = len(server.messages), now()
        many = [f"{each}@example.com" for each in range(20)]
        long = asyncio.ensure_future(smtp.deliver(BODY, sender=APP, recipients=many))
        await asyncio.sleep(0)
        await burst(smtp, 10)
        assert (await long).accepted == many
        took = [len(message.recipients) for message in server.messages[before:]]
        assert took == [2] * 10 + [1] * 10
        assert now() - began >= 19 / 5.5


# Whoever waits for the pace holds nothing


@pytest.mark.parametrize(("rate", "when"), [((2, 60), 20), ((4, 1), 2.1)], ids=["a pause", "in line"])
@virtually
async def test_a_wait_for_the_pace_holds_no_connection(rate: tuple[int, float], when: float) -> None:
    """While messages wait for their turn, connect() and quit() do not."""
    async with ScriptedServer(max_rate=rate) as server, client(server, connections=1) as smtp:
        sends = asyncio.ensure_future(burst(smtp, 16))
        await asyncio.sleep(when)
        began = now()
        await smtp.quit()
        await smtp.connect()
        assert now() == began
        assert server.open_connections == 1
        assert all(delivery.accepted for delivery in await sends)


@virtually
async def test_cancelled_while_it_waits_for_its_turn() -> None:
    """A send that is cancelled in the line, or as its turn comes, keeps nobody behind it waiting."""
    async with ScriptedServer(max_rate=(4, 1)) as server, client(server) as smtp:
        await burst(smtp, 12)
        sends = [asyncio.ensure_future(smtp.deliver(letter)) for letter in letters(12)]
        await asyncio.sleep(0.3)
        for send in sends[1:10]:
            send.cancel()
        began = now()
        ends = await asyncio.gather(*sends, return_exceptions=True)
        assert sum(isinstance(end, Delivery) for end in ends) >= 3
        assert now() - began < 3
        assert smtp._pool._connections.in_use == 0


@virtually
async def test_closing_wakes_who_waits_for_a_turn() -> None:
    """aclose() does not wait for the pace: each send has its delivery back."""
    async with ScriptedServer(max_rate=(2, 60)) as server:
        smtp = client(server)
        sends = asyncio.gather(*(smtp.deliver(letter) for letter in letters(10)), return_exceptions=True)
        await asyncio.sleep(100)
        began = now()
        await smtp.aclose()
        ends = await sends
        assert now() == began
        assert {type(end) for end in ends} == {Delivery, ClientClosed}
        assert server.open_connections == 0


def test_the_pace_moves_to_another_loop() -> None:
    """A client that was paced in one event loop keeps its pace in the next one, and waits the way that its policy says."""
    naps = list[float]()

    async def nap(seconds: float) -> None:
        naps.append(seconds)
        await asyncio.sleep(seconds)

    ports = list[int]()
    smtp = RetryingSMTP(
        lambda: aiosmtplib.SMTP(hostname="127.0.0.1", port=ports[-1], start_tls=False),
        patient(sleep=nap, clock=lambda: virtual.clock() + 100 * len(ports)),
        max_connections=2,
    )

    async def scenario() -> None:
        async with ScriptedServer(max_rate=(4, 1)) as server:
            ports.append(server.port)
            async with smtp:
                deliveries = await burst(smtp, 20)
            assert all(delivery.accepted for delivery in deliveries)
            assert now() > 4

    virtual.run(scenario())
    assert naps
    virtual.run(scenario())


class Turnstile:
    """What lets one in every so often, and keeps count."""

    def __init__(self, seconds: float = 0.1) -> None:
        self.seconds, self.entered, self.inside = seconds, 0, 0

    async def __aenter__(self) -> Self:
        await asyncio.sleep(self.seconds)
        self.entered += 1
        self.inside += 1
        return self

    async def __aexit__(self, *_: object) -> None:
        self.inside -= 1


@virtually
async def test_a_speed_that_is_told_is_kept() -> None:
    """With pace=, the server sees that speed from the first message on, and has nothing to refuse."""
    async with (
        ScriptedServer(max_rate=(28, 1)) as server,
        client(server, pace=AsyncLimiter(14, 1)) as smtp,
    ):
        deliveries = await burst(smtp, MANY)
        assert refusals(deliveries) == 0
        assert now() == pytest.approx((MANY - 15) / 14, abs=0.5)


@virtually
async def test_a_speed_that_is_told_too_high_is_lowered() -> None:
    """Both together work: what the server refuses in spite of pace= lowers the speed further."""
    async with ScriptedServer(max_rate=(14, 1)) as server, client(server, pace=AsyncLimiter(40, 1)) as smtp:
        deliveries = await burst(smtp, MANY)
        assert all(delivery.accepted for delivery in deliveries)
        assert refusals(deliveries) <= 15
        assert now() <= 1.4 * IDEAL


@virtually
async def test_it_is_entered_once_a_transaction() -> None:
    """pace= is entered for each MAIL, before there is a connection, and left again; connect() and quit() do not enter it."""
    turnstile = Turnstile()
    async with ScriptedServer(max_recipients=2) as server, client(server, pace=turnstile) as smtp:
        await smtp.connect()
        await smtp.quit()
        assert turnstile.entered == 0
        before = server.connections
        send = asyncio.ensure_future(smtp.deliver(BODY, sender=APP, recipients=[f"{n}@example.com" for n in range(6)]))
        await asyncio.sleep(0.05)
        assert server.connections == before
        await send
        assert turnstile.entered == len(transactions(server)) == 3
        assert turnstile.inside == 0


@virtually
async def test_a_semaphore_is_held_for_the_transaction() -> None:
    """Any asynchronous context manager will do, and holds until the connection is given back."""
    async with ScriptedServer() as server, client(server, pace=asyncio.Semaphore(2)) as smtp:
        server.fail_at("END_OF_DATA", "late", delay=1, optional=True)
        await burst(smtp, 6)
        assert now() == pytest.approx(3, abs=0.1)


@virtually
async def test_closing_does_not_wait_for_a_pace_that_is_told() -> None:
    """aclose() wakes who waits for pace=, too: each send has its delivery back at once."""
    async with ScriptedServer() as server, client(server, pace=Turnstile(3600)) as smtp:
        sends = [asyncio.ensure_future(smtp.deliver(letter)) for letter in letters(5)]
        await asyncio.sleep(1)
        assert smtp.stats().waiting == 5
        await smtp.aclose()
        ends = await asyncio.gather(*sends, return_exceptions=True)
        assert [type(end) for end in ends] == [ClientClosed] * 5
        assert now() == pytest.approx(1, abs=0.1)
        assert smtp.stats().waiting == 0


@virtually
async def test_a_server_in_trouble_lets_go_of_who_waits_for_its_pace() -> None:
    """Nobody waits for the pace of a server that wants nothing: where there is another one, all go there at once."""
    async with ScriptedServer() as first, ScriptedServer() as second:
        slow = client(first, 1, pace=AsyncLimiter(1, 60))
        async with Failover(slow, client(second)) as smtp:
            first.on("MAIL", "421 4.3.2 Service shutting down")
            assert all(delivery.accepted for delivery in await burst(smtp, 50))
            assert (len(first.messages), len(second.messages)) == (0, 50)
            assert now() < 1
        first.clear()


@virtually
async def test_after_a_pause_the_pace_that_is_told_is_kept() -> None:
    """Who was let go by a pause takes a turn of pace= when the server works again, like everybody else."""
    async with ScriptedServer() as server, client(server, pace=(turnstile := Turnstile(0))) as smtp:
        server.on("MAIL", "421 4.3.2 Try again in 60 seconds", times=1)
        deliveries = await burst(smtp, 20)
        assert all(delivery.accepted for delivery in deliveries)
        assert turnstile.entered >= len(transactions(server)) == 21


class Broken(Turnstile):
    """What breaks on exit, and wants to hide what happened inside."""

    async def __aexit__(self, *error: object) -> None:
        await super().__aexit__(*error)
        msg = "the limiter's database is away"
        raise ConnectionError(msg)


class Hiding(Turnstile):
    """What hides what happened inside."""

    async def __aexit__(self, *error: object) -> bool:  # type: ignore[override]
        await super().__aexit__(*error)
        return True


@pytest.mark.parametrize("pace", [Broken, Hiding])
@virtually
async def test_what_pace_makes_of_its_end_hides_nothing(
    pace: type[Turnstile], caplog: pytest.LogCaptureFixture
) -> None:
    """Who was accepted is told so, though pace= raises on exit; and a send that is cancelled ends, though it hides that."""
    async with ScriptedServer() as server, client(server, pace=pace()) as smtp:
        assert (await smtp.deliver(BODY, sender=APP, recipients=ANN)).accepted == [ANN]
        assert ("the limiter's database is away" in caplog.text) is (pace is Broken)
        server.fail_at("MAIL", "stall", times=1)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(5):
                await smtp.deliver(BODY, sender=APP, recipients=BOB)
        assert (await smtp.deliver(BODY, sender=APP, recipients=BOB)).accepted == [BOB]


@virtually
async def test_what_expires_in_the_line_is_not_sent() -> None:
    """The time of `expires` begins when the message is given to the client, not when a connection is free for it."""
    async with ScriptedServer() as server, client(server, 1) as smtp:
        server.fail_at("END_OF_DATA", "stall", times=1)
        first = asyncio.ensure_future(smtp.deliver(BODY, sender=APP, recipients=ANN))
        await asyncio.sleep(1)
        code = await smtp.deliver(BODY, sender=APP, recipients=BOB, expires=timedelta(minutes=5))
        assert (await first).accepted == [ANN]
        assert code.refused[BOB].enhanced == "4.4.7"
        assert not server.received(BOB)


@pytest.mark.parametrize("pace", [14, 14.0, (14, 1), "14/s", AsyncLimiter, object(), asyncio.sleep])
def test_what_is_no_pace_is_refused(pace: Any) -> None:
    """What cannot be entered with `async with` is an error at once that says what can."""
    with pytest.raises(TypeError, match=r"aiolimiter\.AsyncLimiter\(1, 1 / 14\)"):
        RetryingSMTP(ScriptedServer().client, pace=pace)


# A connection that is used up


@asynccontextmanager
async def relay(limits: Limits) -> AsyncIterator[tuple[Relay, Callable[[], aiosmtplib.SMTP]]]:
    """Start a relay, and return it and what makes clients for it."""
    one = Relay(limits)
    server = await asyncio.get_running_loop().create_server(lambda: Session(one), HOST, 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        yield one, lambda: aiosmtplib.SMTP(hostname=HOST, port=port, start_tls=False)


@pytest.mark.parametrize("connections", [1, 3])
@pytest.mark.parametrize("lingers", [0, 0.2, 1])
@pytest.mark.parametrize(
    "used_up",
    [
        "421 4.7.0 Too many messages in this session, closing connection",
        "421 4.3.0 Closing connection",
        "452 4.5.3 Too many messages sent",
    ],
)
@virtually
async def test_a_quota_of_a_connection(used_up: str, lingers: float, connections: int) -> None:
    """Each connection carries five: all of a steady stream get in, also where the server counts one after its end."""
    async with (
        relay(Limits(messages=5, used_up=used_up.encode(), connections=connections, lingers=lingers)) as (one, make),
        RetryingSMTP(make, patient(), max_connections=connections) as smtp,
    ):
        deliveries = await stream(smtp, 80)
        assert one.seen.taken == 80
        assert all(len(delivery.attempts) == 1 for delivery in deliveries)
        assert now() <= 16 / connections * (0.5 + lingers)
        assert smtp._pool.limit == connections


@virtually
async def test_only_the_first_failures_of_a_replacement_are_forgiven() -> None:
    """A server that ends a used connection, and takes no other one then, is in trouble: that is a pause as ever."""
    async with ScriptedServer() as server, client(server, connections=1) as smtp:
        await smtp.deliver(BODY, sender=APP, recipients=ANN)
        server.on("MAIL", "421 4.7.0 Too many messages in this session", times=1)
        server.on("CONNECT", "421 4.3.2 Service not available", times=3)
        delivery = await smtp.deliver(BODY, sender=APP, recipients=BOB)
        assert len(delivery.attempts) == 2
        assert now() > 60


@virtually
async def test_several_servers() -> None:
    """A server that says "too fast" is left alone for that time where there is another; then all go back to it."""
    async with ScriptedServer() as first, ScriptedServer() as second:
        refuse(first, "454 4.7.0 Daily message quota exceeded", 5)
        async with Failover(client(first), client(second)) as smtp:
            deliveries = await burst(smtp, 20)
            assert now() < 1
            assert all(delivery.accepted for delivery in deliveries)
            assert len(second.messages) > 0
            before = len(first.messages)
            await burst(smtp, 5)
            assert len(first.messages) == before
            await asyncio.sleep(700)
            await smtp.deliver(BODY, sender=APP, recipients=BOB)
            assert len(first.messages) == before + 1


@virtually
async def test_an_attempt_does_not_wait_out_a_pause() -> None:
    """attempt(), which makes one pass, comes back at once while the server wants nothing, and says when to come again."""
    async with ScriptedServer() as server, client(server) as smtp:
        server.on("MAIL", "454 4.7.0 Daily message quota exceeded", times=1)
        refused, late = prepare(BODY, sender=APP, recipients=ANN), prepare(BODY, sender=APP, recipients=BOB)
        await smtp.attempt(refused)
        began = now()
        await smtp.attempt(late)
        assert now() == began
        assert late.next_at == refused.next_at
        assert not late.attempts
        await smtp.deliver(late)
        assert len(late.attempts) == 1


@virtually
async def test_what_is_excused_is_stored() -> None:
    """Another process does not count what a message has waited for a server that was taking others."""
    async with ScriptedServer() as server, client(server, connections=1) as smtp:
        late = prepare(BODY, sender=APP, recipients=ANN)
        for _ in range(10):
            server.on("MAIL", "451 4.3.2 System not accepting network messages, try again in 300 seconds", times=1)
            early = asyncio.ensure_future(smtp.deliver(BODY, sender=APP, recipients=BOB))
            await asyncio.sleep(0.1)
            await smtp.attempt(late)
            assert (await early).accepted
        assert now() > 2700
        stored = Delivery.from_dict(late.to_dict())
        assert stored.excused == late.excused
        assert stored.elapsed(virtual.clock()) < 310


@virtually
async def test_the_pause_of_another_worker_does_not_hide_the_pace() -> None:
    """A worker that hears from another one that all is well still waits as long as it was told to slow down."""
    async with ScriptedServer() as server, client(server) as smtp:
        script = server.on("MAIL", "454 4.7.0 Daily message quota exceeded", times=1)
        await smtp.attempt(prepare(BODY, sender=APP, recipients=ANN))
        smtp.sites[0].adopt(smtp.sites[0].pause)
        await smtp.attempt(prepare(BODY, sender=APP, recipients=BOB))
        assert (script.used, len(server.messages)) == (1, 0)


@virtually
async def test_a_pause_between_two_transactions_is_no_attempt() -> None:
    """What is left of a message in many transactions, when another one is refused, has its single attempt still."""
    policy = patient(max_attempts=1)
    async with ScriptedServer(max_recipients=2) as server, client(server, pace=Turnstile(), policy=policy) as smtp:
        server.on("RCPT", BOB, "451 4.3.2 System not accepting network messages", times=1)
        many = [f"{each}@example.com" for each in range(20)]
        long = asyncio.ensure_future(smtp.deliver(BODY, sender=APP, recipients=many))
        await asyncio.sleep(0.45)
        assert (await smtp.deliver(BODY, sender=APP, recipients=BOB)).refused
        assert (await long).accepted == many
        assert now() > 60


@virtually
async def test_a_pause_does_not_end_a_patience() -> None:
    """A message that was greylisted comes back in a pause, waits for its end, and is offered once more."""
    async with ScriptedServer() as server, client(server, policy=patient(give_up_after=timedelta(seconds=330))) as smtp:
        server.on("RCPT", ANN, "450 4.2.0 Greylisted for 300 seconds", times=1)
        server.on("RCPT", BOB, "451 4.3.2 System not accepting network messages, try again in 60 seconds", times=1)
        greylisted = asyncio.ensure_future(smtp.deliver(BODY, sender=APP, recipients=ANN))
        await asyncio.sleep(290)
        await burst(smtp, 1)
        other = asyncio.ensure_future(smtp.deliver(BODY, sender=APP, recipients=BOB))
        assert (await greylisted).accepted
        assert (await other).accepted
        assert now() == pytest.approx(350, abs=2)
