"""Several connections: opened when needed, each prepared once, and no more of them than the server wants."""

from __future__ import annotations

import asyncio
import gc
from typing import Any

import aiosmtplib
import pytest
import virtual
from support import ANN, APP, BOB, BODY, CAT, GREYLISTED, LOG_IN, PASSWORD, USER, once, patient, virtually

from smtpretry import RetryingSMTP, RetryPolicy, delivery_of, prepare
from smtpretry.session.connection import Connection
from smtpretry.testing import ScriptedServer

CLIENT = aiosmtplib.SMTP()
CROWDED = "421 4.7.0 Error: too many connections"


def several(
    server: ScriptedServer, connections: int, policy: RetryPolicy | None = None, **settings: Any
) -> RetryingSMTP:
    """Return a client with up to so many connections to the server."""
    start_tls = settings.pop("start_tls", None)
    return RetryingSMTP(
        lambda: server.client(start_tls=start_tls), policy or patient(), max_connections=connections, **settings
    )


def slow(server: ScriptedServer, seconds: float = 1) -> None:
    """Let the server take its time over each message."""
    server.fail_at("END_OF_DATA", "late", delay=seconds, optional=True)


async def burst(smtp: RetryingSMTP, number: int) -> None:
    """Send so many messages at once, each to a recipient of its own."""
    async with asyncio.TaskGroup() as group:
        for each in range(number):
            group.create_task(smtp.sendmail(APP, [f"{each}@example.com"], BODY))


@virtually
async def test_sends_at_once_use_connections_at_once() -> None:
    """Six sends of a second each over three connections take two seconds, and as many connections as allowed."""
    async with ScriptedServer() as server, several(server, 3) as smtp:
        slow(server)
        await burst(smtp, 6)
        assert virtual.clock() - virtual.EPOCH == pytest.approx(2, abs=0.1)
        assert (server.connections, len(server.messages)) == (3, 6)


@virtually
async def test_one_after_the_other_needs_one_connection() -> None:
    """Connections are opened when they are needed, and the open one is used before another is opened."""
    async with ScriptedServer() as server, several(server, 8) as smtp:
        assert not smtp.is_connected
        for _ in range(5):
            await smtp.sendmail(APP, [ANN], BODY)
        assert server.connections == server.open_connections == 1
        assert smtp.is_connected


@virtually
async def test_an_open_connection_is_used_before_a_closed_one_is_opened() -> None:
    """Where one of two connections was closed by the server, the next send goes over the other."""
    async with ScriptedServer(pipelining=False) as server, several(server, 2) as smtp:
        slow(server)
        await burst(smtp, 2)
        server.on("RCPT", BOB, "421 4.7.0 Closing this one", times=1)
        await smtp.attempt(prepare(BODY, sender=APP, recipients=BOB))
        await smtp.sendmail(APP, [ANN], BODY)
        assert server.connections == 2


@virtually
async def test_each_connection_encrypts_and_logs_in_once() -> None:
    """What the first session turned out to need, the others bring along: TLS and AUTH once for each, and one 530."""
    async with ScriptedServer(tls=True, auth=(USER, PASSWORD), auth_required=False) as server:
        server.on("MAIL", LOG_IN, times=1)
        async with several(server, 3, start_tls=False, username=USER, password=PASSWORD) as smtp:
            await smtp.sendmail(APP, [ANN], BODY)
            slow(server)
            await burst(smtp, 9)
        assert server.connections == 3
        assert server.verbs.count("AUTH") == server.verbs.count("STARTTLS") == 3
        assert server.verbs.count("MAIL") == 11
        assert {message.authenticated for message in server.messages} == {USER}


@virtually
async def test_first_come_first_served() -> None:
    """No send overtakes another that waits for a connection."""
    async with ScriptedServer() as server, several(server, 2) as smtp:
        slow(server)
        await burst(smtp, 20)
        order = [int(message.recipients[0].partition("@")[0]) for message in server.messages]
        assert all(abs(place - number) <= 1 for place, number in enumerate(order))


@virtually
async def test_nobody_waits_longer_than_the_policy_behind_a_message_without_an_answer() -> None:
    """Where the server answers nothing, those who wait for the connection give up in time, and are told the cure."""
    policy = RetryPolicy.interactive(clock=virtual.clock)
    async with ScriptedServer() as server, several(server, 1, policy) as smtp:
        server.fail_at("END_OF_DATA", "stall", times=1)
        stalled = asyncio.ensure_future(smtp.deliver(BODY, sender=APP, recipients=ANN))
        await asyncio.sleep(5)
        with pytest.raises(aiosmtplib.SMTPTimeoutError, match="no connection came free") as caught:
            await smtp.sendmail(APP, [BOB], BODY)
        assert virtual.clock() - virtual.EPOCH == pytest.approx(5 + 31, abs=1)
        assert "for more connections at a time, give RetryingSMTP a function" in caught.value.__notes__[0]
        assert (await stalled).uncertain == [ANN]
        await smtp.sendmail(APP, [CAT], BODY)


@pytest.mark.parametrize("seconds", [8, 25])
@virtually
async def test_a_line_that_moves_is_waited_in(seconds: int) -> None:
    """Nobody gives up behind a server that is slow, and answers; however long the line is."""
    async with ScriptedServer() as server, several(server, 2, RetryPolicy.interactive(clock=virtual.clock)) as smtp:
        slow(server, seconds)
        await burst(smtp, 50)
        assert virtual.clock() - virtual.EPOCH == pytest.approx(25 * seconds, abs=1)


@virtually
async def test_idle_connections_are_closed_in_good_order() -> None:
    """Every connection that nobody used for so long gets its QUIT, the one that is in use none."""
    async with ScriptedServer() as server, several(server, 4, idle_timeout=10) as smtp:
        slow(server)
        await burst(smtp, 4)
        await asyncio.sleep(9)
        await smtp.sendmail(APP, [ANN], BODY)
        await asyncio.sleep(2)
        assert (server.verbs.count("QUIT"), server.open_connections) == (3, 1)
        await asyncio.sleep(9)
        assert (server.verbs.count("QUIT"), server.open_connections) == (4, 0)


@pytest.mark.parametrize("connections", [1, 3])
@virtually
async def test_a_connection_retires_after_so_many_messages(connections: int) -> None:
    """A connection that has carried its number of messages says QUIT, and a new one carries the next."""
    async with (
        ScriptedServer() as server,
        several(server, connections, max_messages_per_connection=2) as smtp,
    ):
        for _ in range(5):
            await smtp.sendmail(APP, [ANN], BODY)
        assert [message.connection for message in server.messages] == [1, 1, 2, 2, 3]
        assert server.verbs.count("QUIT") == 2


@virtually
async def test_a_server_that_retires_a_connection_gets_another() -> None:
    """452 4.5.3 to MAIL, and a 421 that says the same, cost no wait and concern that connection alone."""
    async with ScriptedServer() as server, several(server, 2) as smtp:
        server.on("MAIL", "452 4.5.3 Too many messages sent", times=1)
        server.on("MAIL", "421 4.7.0 Too many messages in this connection", times=1)
        await burst(smtp, 4)
        assert virtual.clock() == pytest.approx(virtual.EPOCH, abs=1)
        assert len(server.messages) == 4


@virtually
async def test_a_connection_that_began_with_a_refusal_is_not_used_again() -> None:
    """Sendmail over its connection rate takes the connection, and refuses each MAIL on it, however long one waits."""
    async with ScriptedServer() as server, several(server, 1, idle_timeout=None) as smtp:
        server.on("MAIL", "452 4.3.2 Connection rate limit exceeded.", times=1)
        await smtp.sendmail(APP, [ANN], BODY)
        server.on("MAIL", "450 4.7.1 Error: too much mail from 192.0.2.1", times=1)
        await smtp.sendmail(APP, [BOB], BODY)
        assert [message.connection for message in server.messages] == [2, 2]  # one that has carried mail is kept


@virtually
async def test_too_many_connections_are_made_fewer() -> None:
    """A server that takes two connections of eight has all of the mail without a wait, and two connections."""
    async with ScriptedServer(max_connections=2) as server, several(server, 8) as smtp:
        await smtp.connect()
        slow(server)
        await burst(smtp, 10)
        assert virtual.clock() - virtual.EPOCH == pytest.approx(5, abs=0.5)
        assert len(server.messages) == 10
        assert server.connections <= 2 + 7


@virtually
async def test_the_number_grows_again_one_by_one() -> None:
    """After a while one connection more is tried, and used where the server takes it by then."""
    async with ScriptedServer(max_connections=1) as server, several(server, 3, idle_timeout=None) as smtp:
        await smtp.connect()
        slow(server)
        await burst(smtp, 3)
        refused = server.connections - 1
        await burst(smtp, 3)
        assert server.connections - 1 == refused  # nothing is tried for now
        server.max_connections = None
        await asyncio.sleep(70)
        await burst(smtp, 4)
        assert server.open_connections == 2
        await asyncio.sleep(70)
        await burst(smtp, 4)
        assert server.open_connections == 3


@virtually
async def test_the_only_connection_waits_as_ever() -> None:
    """Where no other connection is open, "too many connections" is a pause for the client."""
    async with ScriptedServer() as server, several(server, 4) as smtp:
        server.on("CONNECT", CROWDED, times=1)
        await smtp.sendmail(APP, [ANN], BODY)
        assert virtual.clock() - virtual.EPOCH > 59


@virtually
async def test_fewer_connections_where_the_server_says_so_in_the_transaction() -> None:
    """Microsoft says it at the end of the data: that connection is closed, and the other carries its message."""
    async with ScriptedServer() as server, several(server, 2) as smtp:
        server.on("END_OF_DATA", BOB, "432 4.3.2 Concurrent connections limit exceeded", times=1)
        server.fail_at("END_OF_DATA", "late", delay=1, pattern=ANN)
        async with asyncio.TaskGroup() as group:
            group.create_task(smtp.sendmail(APP, [ANN], BODY))
            group.create_task(smtp.sendmail(APP, [BOB], BODY))
        assert virtual.clock() - virtual.EPOCH < 5
        assert [message.connection for message in server.messages] == [1, 1]


@virtually
async def test_after_a_pause_one_connection_finds_out() -> None:
    """The pause covers all connections; after it a single one tries, and the rest follows when it got through."""
    async with ScriptedServer() as server, several(server, 4) as smtp:
        await burst(smtp, 1)
        script = server.on("MAIL", "421 4.3.2 Shutting down")
        sends = asyncio.ensure_future(burst(smtp, 8))
        await asyncio.sleep(1)
        assert script.used <= 4 + 1  # those that were under way, and another for the one that was open before
        before = script.used
        await asyncio.sleep(50)
        assert script.used == before
        await asyncio.sleep(20)
        assert script.used == before + 1
        server.clear()
        await sends
        assert len(server.messages) == 9


@virtually
async def test_what_fails_at_once_counts_once() -> None:
    """Four connections that a server drops together make one pause, as long as one connection would."""
    async with ScriptedServer() as server, several(server, 4) as smtp:
        server.on("MAIL", "421 4.3.2 Shutting down", times=4)
        await burst(smtp, 4)
        assert virtual.clock() - virtual.EPOCH < 70


@virtually
async def test_cancelled_in_the_queue() -> None:
    """A send that is cancelled while it waits for a connection, or as it gets one, takes none with it."""
    async with ScriptedServer() as server, several(server, 1) as smtp:
        slow(server)
        first = asyncio.ensure_future(smtp.sendmail(APP, [ANN], BODY))
        queue = [asyncio.ensure_future(smtp.sendmail(APP, [BOB], BODY)) for _ in range(3)]
        await asyncio.sleep(0.5)
        queue[0].cancel()
        await first
        queue[1].cancel()  # it has its turn, and has not begun
        await queue[2]
        assert [send.cancelled() for send in queue] == [True, True, False]
        assert [message.recipients for message in server.messages] == [[ANN], [BOB]]


@virtually
async def test_closing_closes_all() -> None:
    """aclose() lets the passes under way end and says QUIT on each connection; who was queued has his delivery back."""
    async with ScriptedServer() as server:
        smtp = several(server, 3)
        slow(server)
        sends = [asyncio.ensure_future(smtp.sendmail(APP, [ANN], BODY)) for _ in range(5)]
        await asyncio.sleep(0.5)
        await smtp.aclose()
        results = await asyncio.gather(*sends, return_exceptions=True)
        assert [type(result).__name__ for result in results] == ["tuple"] * 3 + ["ClientClosed"] * 2
        assert all(result.delivery.pending == [ANN] for result in results[3:])
        assert (server.verbs.count("QUIT"), server.open_connections) == (3, 0)


@virtually
async def test_quit_disconnects_all() -> None:
    """quit() says QUIT on every connection that is open, and the next send connects again."""
    async with ScriptedServer() as server, several(server, 3) as smtp:
        slow(server)
        await burst(smtp, 3)
        assert (await smtp.quit()).code == 221
        assert not smtp.is_connected
        assert server.verbs.count("QUIT") == 3
        await smtp.sendmail(APP, [ANN], BODY)
        assert server.connections == 4


@pytest.mark.parametrize("turns", range(12))
@pytest.mark.parametrize("end", ["quit", "aclose"])
@virtually
async def test_a_cancelled_end_leaves_no_connection_behind(end: str, turns: int) -> None:
    """quit() and aclose(), cancelled at any moment, give back what they were closing: the next sends have it."""
    async with ScriptedServer() as server, several(server, 2) as smtp:
        await burst(smtp, 2)
        ending = asyncio.ensure_future(getattr(smtp, end)())
        for _ in range(turns):
            await asyncio.sleep(0)
        ending.cancel()
        await asyncio.gather(ending, return_exceptions=True)
        async with smtp:
            await burst(smtp, 4)


@virtually
async def test_a_function_that_makes_no_client_fails_the_send_that_asked() -> None:
    """What the function raises comes out of the send that needed a client, and of no other: who has it has it."""
    async with ScriptedServer() as server:
        broken = False

        def make() -> aiosmtplib.SMTP:
            if broken:
                raise RuntimeError("no more clients")  # noqa: EM101, TRY003
            return server.client()

        async with RetryingSMTP(make, patient(), max_connections=2) as smtp:
            await smtp.deliver(BODY, sender=APP, recipients=ANN)
            broken = True
            sends = [smtp.deliver(BODY, sender=APP, recipients=who) for who in (BOB, CAT)]
            results = await asyncio.gather(*sends, return_exceptions=True)
            failed = [result for result in results if isinstance(result, RuntimeError)]
            accepted = [result for result in results if not isinstance(result, BaseException)]
            assert (len(failed), len(accepted)) == (1, 1)
            assert len(server.messages) == 2
            assert all(not delivery_of(error).accepted for error in failed)


@pytest.mark.parametrize("connections", [2, 8])
@virtually
async def test_a_wrong_password_is_sent_once(connections: int) -> None:
    """Connections that begin together do not all try a password that the server refuses: accounts are locked for less."""
    async with ScriptedServer(auth=(USER, "another")) as server:
        async with several(server, connections, policy=once(), username=USER, password=PASSWORD) as smtp:
            sends = [smtp.deliver(BODY, sender=APP, recipients=ANN) for _ in range(connections)]
            deliveries = await asyncio.gather(*sends)
        assert all(delivery.refused for delivery in deliveries)
        assert server.verbs.count("AUTH") == 1


@virtually
async def test_an_outage_is_not_taken_for_a_crowd() -> None:
    """Eight connections that are refused together are used again, all of them, as soon as the server is back."""
    async with ScriptedServer() as server, several(server, 8) as smtp:
        server.on("CONNECT", "421 4.3.2 Service not available", times=8, optional=True)
        await burst(smtp, 8)
        began = virtual.clock()
        slow(server)
        await burst(smtp, 8)
        assert virtual.clock() - began < 2


@virtually
async def test_a_closed_client_is_let_go() -> None:
    """No timer holds on to a client that was closed, its connections and its credentials."""

    def connections() -> int:
        gc.collect()
        return sum(issubclass(type(each), Connection) for each in gc.get_objects())

    before = connections()
    async with ScriptedServer(auth=(USER, PASSWORD)) as server:
        for _ in range(5):
            async with several(server, 1, username=USER, password=PASSWORD) as smtp:
                await smtp.sendmail(APP, [ANN], BODY)
        del smtp
        assert connections() == before


@virtually
async def test_cancelled_waits_are_forgotten() -> None:
    """Thousands of sends that were cancelled while they waited for hours leave little behind."""
    async with ScriptedServer() as server, several(server, 1) as smtp:
        server.on("RCPT", GREYLISTED)
        sends = [asyncio.ensure_future(smtp.sendmail(APP, [ANN], BODY)) for _ in range(100)]
        await asyncio.sleep(1)
        for send in sends:
            send.cancel()
        smtp._pool._alarms._heap *= 20
        await asyncio.sleep(1)
        again = asyncio.ensure_future(smtp.sendmail(APP, [ANN], BODY))
        await asyncio.sleep(1)
        assert len(smtp._pool._alarms._heap) == 1
        again.cancel()
        server.clear()


def test_a_client_that_waits_in_another_loop_is_refused() -> None:
    """While a send waits in one loop, another loop cannot take its client away from it."""

    async def scenario() -> None:
        async with ScriptedServer() as server, several(server, 1, policy=RetryPolicy()) as smtp:
            server.on("RCPT", "450 4.2.0 Greylisted for 1 second", times=1)
            sending = asyncio.ensure_future(smtp.sendmail(APP, [ANN], BODY))
            while not smtp._pool._alarms:  # noqa: ASYNC110 - there is no event for it
                await asyncio.sleep(0)
            await smtp.quit()
            with pytest.raises(ValueError, match="in use in another event loop"):
                await asyncio.to_thread(asyncio.run, smtp.sendmail(APP, [BOB], BODY))
            await sending
            assert [message.recipients for message in server.messages] == [[ANN]]

    asyncio.run(scenario())


def test_a_client_that_waits_for_its_pace_in_another_loop_is_refused() -> None:
    """So it is where the send waits for `pace=`: it would go on with the other loop's connections."""

    async def scenario() -> None:
        pace = asyncio.Lock()
        async with ScriptedServer() as server, several(server, 1, policy=RetryPolicy(), pace=pace) as smtp:
            async with pace:
                sending = asyncio.ensure_future(smtp.sendmail(APP, [ANN], BODY))
                await asyncio.sleep(0)
                with pytest.raises(ValueError, match="in use in another event loop"):
                    await asyncio.to_thread(asyncio.run, smtp.connect())
            await sending

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("client", "settings", "error"),
    [
        (CLIENT, {"max_connections": 2}, ValueError),
        (aiosmtplib.SMTP, {"max_connections": 2}, TypeError),
        (CLIENT, {"max_connections": 0}, ValueError),
        (CLIENT, {"max_connections": 1.5}, ValueError),
        (CLIENT, {"max_connections": None}, ValueError),
        (CLIENT, {"max_messages_per_connection": 0}, ValueError),
        (CLIENT, {"max_messages_per_connection": "many"}, ValueError),
    ],
)
def test_what_cannot_be_several_is_refused(client: Any, settings: dict[str, Any], error: type[Exception]) -> None:
    """One client for several connections, or a number that is none, is an error at once that says why."""
    with pytest.raises(error, match=r"\w+ \w+"):
        RetryingSMTP(client, **settings)


@pytest.mark.parametrize(
    ("make", "error"), [(lambda one: one, ValueError), (lambda _: "smtp.example.com", TypeError)], ids=["one", "none"]
)
@virtually
async def test_a_function_that_makes_no_new_client_fails_the_send(make: Any, error: type[Exception]) -> None:
    """A function that returns a client in use, or none at all, is told to the send that asked."""
    async with ScriptedServer() as server:
        one = server.client()
        async with RetryingSMTP(lambda: make(one), patient(), max_connections=2) as smtp:
            server.fail_at("MAIL", "late", delay=5, act=True)
            sends = [asyncio.ensure_future(smtp.deliver(BODY, sender=APP, recipients=who)) for who in (ANN, BOB)]
            results = await asyncio.gather(*sends, return_exceptions=True)
            assert any(isinstance(result, error) for result in results)
