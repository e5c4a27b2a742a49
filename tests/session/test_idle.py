"""An idle connection: it may die unnoticed, it is closed in good order, and closing the client forgets nobody."""

from __future__ import annotations

import asyncio
from typing import Any, Literal

import aiosmtplib
import faults
import pytest
import virtual
from faults import SENDER, client_for, probe

from smtpretry import ClientClosed, Delivery, RetryingSMTP
from smtpretry.testing import ScriptedServer

SESSIONS = pytest.mark.parametrize("session", ["clear", "tls"])
DEATHS = pytest.mark.parametrize(
    ("said", "close"),
    [("", "fin"), ("", "rst"), ("421 4.4.2 Idle for too long", "fin"), ("421 4.3.2 Shutting down", "rst")],
    ids=["FIN", "RST", "421-FIN", "421-RST"],
)


def server_for(session: Any) -> ScriptedServer:
    """Return a server with or without TLS and AUTH."""
    return faults.server_for(faults.Place("MAIL", session=session))


async def send(smtp: RetryingSMTP, who: str = "ann@example.com") -> Delivery:
    """Send a message to one recipient."""
    return await smtp.deliver(b"Subject: hello\r\n\r\n", sender=SENDER, recipients=[who])


@SESSIONS
@DEATHS
@pytest.mark.parametrize("mode", faults.MODES)
@pytest.mark.parametrize("noticed", [True, False], ids=["noticed", "unnoticed"])
def test_died_while_idle(
    session: str, said: str, close: Literal["fin", "rst"], mode: faults.Mode, *, noticed: bool
) -> None:
    """A connection that died while idle costs the next send no wait and no attempt, whether its end was seen or not."""

    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        async with server_for(session) as server:
            smtp = client_for(server, mode)
            await send(smtp)
            server.disconnect(said, close=close)
            if noticed:
                await asyncio.sleep(1)
            before = loop.time()
            delivery = await send(smtp)
            assert delivery.accepted == ["ann@example.com"]
            assert loop.time() == pytest.approx(before, abs=0.01)
            assert len(delivery.attempts) == delivery.outcomes["ann@example.com"].attempts == 1
            assert (server.connections, len(server.messages)) == (2, 2)
            await smtp.aclose()

    virtual.run(scenario())


@SESSIONS
@pytest.mark.parametrize("how", ["fin", "rst", "421", "421 and open"])
def test_first_command_fails_so(session: str, how: str) -> None:
    """Where the first command on a used connection meets its end, there is one silent reconnect; the second time, a wait."""

    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        async with server_for(session) as server:
            smtp = client_for(server)
            await send(smtp)
            reply = "421 4.4.2 Idle for too long, timeout"
            if how.startswith("421"):
                server.on("MAIL", reply, times=1, close=how == "421")
            else:
                server.fail_at("MAIL", how, times=1)
            before = loop.time()
            delivery = await send(smtp)
            assert delivery.accepted
            assert loop.time() == pytest.approx(before, abs=0.01)
            assert len(delivery.attempts) == 1
            assert (server.connections, len(server.messages)) == (2, 2)
            if not how.startswith("421"):
                server.fail_at("MAIL", how, times=2)
            else:
                server.on("MAIL", reply, times=2, close=how == "421")
            delivery = await send(smtp)
            assert delivery.accepted
            assert loop.time() - before == pytest.approx(60, abs=1)
            assert len(delivery.attempts) == 2
            assert len(server.messages) == 3
            await smtp.aclose()

    virtual.run(scenario())


def test_a_word_that_nobody_asked_for() -> None:
    """What a server says while nothing is asked is the answer to nothing: the connection is closed, nobody is blamed."""

    async def scenario() -> None:
        async with ScriptedServer() as server:
            smtp = client_for(server)
            await send(smtp)
            words = ("421 4.3.2 Shutting down", "221 Bye", "220 hello", "250 2.0.0 Ok", "550 5.1.1 No such user")
            for number, said in enumerate(words, 1):
                server.disconnect(said, close=False)
                await asyncio.sleep(1)
                assert server.open_connections == 0
                assert len((await send(smtp)).attempts) == 1
                assert await probe(smtp, server) == []
                assert server.connections == 1 + number
            server.disconnect(b"\r\nno reply at all\r\n", close=False)
            await asyncio.sleep(1)
            assert (await send(smtp)).accepted
            assert server.connections == 1 + len(words)
            await smtp.aclose()

    virtual.run(scenario())


@SESSIONS
def test_closed_after_ten_idle_seconds(session: str) -> None:
    """An idle connection is closed with QUIT after ten seconds, counted anew after each send."""

    async def scenario() -> None:
        async with server_for(session) as server:
            smtp = client_for(server)
            for _ in range(3):
                await send(smtp)
                await asyncio.sleep(9.5)
                assert (server.open_connections, server.verbs.count("QUIT")) == (1, 0)
            await asyncio.sleep(1)
            assert (server.open_connections, server.verbs.count("QUIT")) == (0, 1)
            assert not smtp.is_connected
            assert (await send(smtp)).accepted
            assert server.connections == 2
            await smtp.aclose()

    virtual.run(scenario())


@SESSIONS
def test_a_connection_from_before_a_standstill_is_not_used(session: str) -> None:
    """Where the process stood still for longer than the idle time-out, the flow may be forgotten, and nobody says so."""

    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, virtual.VirtualLoop)
        async with server_for(session) as server:
            smtp = client_for(server)
            await send(smtp)
            loop.now += 12  # no timer has had its turn since
            await send(smtp)
            assert [message.connection for message in server.messages] == [1, 2]
            await smtp.aclose()

    virtual.run(scenario())


@pytest.mark.parametrize(("idle_timeout", "seconds", "open_then"), [(3, 3.5, 0), (0, 0.5, 0), (None, 100_000, 1)])
def test_another_idle_timeout(idle_timeout: float | None, seconds: float, open_then: int) -> None:
    """The time can be chosen; with None the connection stays."""

    async def scenario() -> None:
        async with ScriptedServer() as server:
            smtp = client_for(server, idle_timeout=idle_timeout)
            await send(smtp)
            await asyncio.sleep(seconds)
            assert server.open_connections == open_then
            assert (await send(smtp)).accepted
            await smtp.aclose()
            assert server.open_connections == 0

    virtual.run(scenario())


def test_not_idle_while_a_send_waits_elsewhere() -> None:
    """A send that waits for greylisting holds no connection: it is closed meanwhile, and a new one is made after."""

    async def scenario() -> None:
        async with ScriptedServer() as server:
            smtp = client_for(server)
            server.on("RCPT", "450 4.2.0 Greylisted for 300 seconds", times=1)
            waiting = asyncio.ensure_future(send(smtp))
            await asyncio.sleep(20)
            assert (server.open_connections, server.verbs.count("QUIT")) == (0, 1)
            assert (await waiting).accepted
            assert server.connections == 2
            await smtp.aclose()

    virtual.run(scenario())


@SESSIONS
@pytest.mark.parametrize(
    "fault", [fault for fault in faults.FAULTS if not fault.acts or fault.kind == "none"], ids=lambda f: f.name
)
def test_nothing_depends_on_quit(session: str, fault: faults.Fault) -> None:
    """Whatever comes of the QUIT of an idle connection, a send that comes then or later works, within seconds."""

    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        async with server_for(session) as server:
            for pause in (10.5, 30):  # in the middle of the QUIT, and after it
                smtp = client_for(server)
                await send(smtp)
                script = fault.install(server, faults.Place("QUIT"), 1)
                await asyncio.sleep(pause)
                assert script.used == 1
                before = loop.time()
                delivery = await send(smtp)
                assert delivery.accepted
                assert len(delivery.attempts) == 1
                assert loop.time() - before <= 5.1
                assert await probe(smtp, server) == []
                await smtp.aclose()
                await asyncio.sleep(0.1)
                assert server.open_connections == 0
                server.clear()

    virtual.run(scenario())


async def connect_and_quit(client: aiosmtplib.SMTP | RetryingSMTP) -> None:
    """Connect where that is to be done, and quit."""
    if not client.is_connected:
        await client.connect()
    await client.quit()


def test_quit_and_connect_fail_as_aiosmtplib_does() -> None:
    """`quit()` and `connect()` raise what aiosmtplib raises; the next send works after either."""

    async def scenario() -> None:
        async with ScriptedServer() as server:
            smtp = client_for(server)
            reference = server.client()
            for verb, reply in (
                ("QUIT", "451 4.3.0 not now"),
                ("CONNECT", "554 5.3.2 never"),
                ("CONNECT", "421 4.3.2 no"),
            ):
                said = list[tuple[type[BaseException], tuple[object, ...]]]()
                for client in (reference, smtp):
                    script = server.on(verb, reply, times=1)
                    with pytest.raises(aiosmtplib.SMTPException) as caught:
                        await connect_and_quit(client)
                    said.append((type(caught.value), caught.value.args))
                    server.scripts.remove(script)
                    if isinstance(client, type(reference)):
                        client.close()
                assert said[0] == said[1]
                assert await probe(smtp, server) == []
                await smtp.quit()
            await smtp.aclose()

    virtual.run(scenario())


# Closing


async def waiting(smtp: RetryingSMTP, server: ScriptedServer, number: int = 20) -> list[asyncio.Task[Delivery]]:
    """Start sends and let them wait: some for greylisting, some for the connection, one for a reply."""
    server.on("RCPT", "grey*", "450 4.2.0 Greylisted for 300 seconds")
    server.fail_at("MAIL", "late", "slow@example.com", delay=20, optional=True)
    sends = [asyncio.ensure_future(send(smtp, f"grey{n}@example.com")) for n in range(number)]
    await asyncio.sleep(1)
    slow = smtp.deliver(b"\r\n", sender="slow@example.com", recipients=["talking@example.com"])
    sends.append(asyncio.ensure_future(slow))
    await asyncio.sleep(1)
    sends += [asyncio.ensure_future(send(smtp, f"queued{n}@example.com")) for n in range(number)]
    await asyncio.sleep(1)
    return sends


@pytest.mark.parametrize("how", ["aclose", "async with", "async with error"])
def test_closing_wakes_those_who_wait(how: str) -> None:
    """Closing the client, by itself or by `async with`, ends each send that waits, and each tells who is pending."""

    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        async with ScriptedServer() as server:
            smtp = client_for(server)
            if how == "aclose":
                sends = await waiting(smtp, server)
                await smtp.aclose()
            elif how == "async with":
                async with smtp:
                    sends = await waiting(smtp, server)
            else:
                with pytest.raises(RuntimeError):  # noqa: PT012 - the error is in the block
                    async with smtp:
                        sends = await waiting(smtp, server)
                        raise RuntimeError
            assert loop.time() < 25  # the one that talked to the server has finished
            results = await asyncio.gather(*sends, return_exceptions=True)
            talking = results.pop(20)
            assert isinstance(talking, Delivery)
            assert talking.accepted == ["talking@example.com"]
            for result, watched in zip(results, [d for d in smtp.deliveries if d is not talking], strict=True):
                assert isinstance(result, ClientClosed)
                delivery = result.delivery
                assert delivery is watched
                assert delivery.pending == delivery.recipients
                (note,) = result.__notes__
                assert faults.clean(note)
            assert loop.time() < 25
            assert [message.recipients for message in server.messages] == [["talking@example.com"]]
            assert (server.open_connections, server.verbs.count("QUIT")) == (0, 1)
            assert not smtp.is_connected

            # What is pending can be stored, and sent by another client.
            server.clear()
            async with client_for(server) as other:
                await asyncio.sleep(300)
                for result in results:
                    assert isinstance(result, ClientClosed)
                    assert (await other.attempt(result.delivery)).accepted == result.delivery.recipients
            assert len(server.messages) == 41

    virtual.run(scenario())


def test_closed_is_closed_until_it_is_opened() -> None:
    """A closed client sends nothing, and says so with the delivery; `async with` opens it again, at once if need be."""

    async def scenario() -> None:
        async with ScriptedServer() as server:
            smtp = client_for(server)
            await send(smtp)
            await smtp.aclose()
            await smtp.aclose()
            with pytest.raises(ClientClosed) as caught:
                await send(smtp)
            assert caught.value.delivery.pending == ["ann@example.com"]
            assert server.connections == 1
            async with smtp:
                assert (await send(smtp)).accepted
                sends = await waiting(smtp, server, 3)
                await smtp.aclose()
                async with smtp:  # before those who wait have noticed that it was closed
                    results = await asyncio.gather(*sends, return_exceptions=True)
                    assert [type(result) for result in results] == [ClientClosed] * 3 + [Delivery] + [ClientClosed] * 3
                    assert await probe(smtp, server) == []

    virtual.run(scenario())


def test_opened_again_before_those_who_wait_wake() -> None:
    """Closed and opened in one breath, the client still wakes those who wait: they raise, and are not cancelled."""

    async def scenario() -> None:
        async with ScriptedServer() as server:
            smtp = client_for(server)
            server.on("RCPT", "450 4.2.0 Greylisted for 300 seconds")
            sends = [asyncio.ensure_future(send(smtp, f"user{n}@example.com")) for n in range(3)]
            await asyncio.sleep(30)  # the connection is closed meanwhile
            await smtp.aclose()
            await smtp.__aenter__()
            results = await asyncio.gather(*sends, return_exceptions=True)
            assert [type(result) for result in results] == [ClientClosed] * 3
            server.clear()
            assert await probe(smtp, server) == []
            await smtp.aclose()

    virtual.run(scenario())


def test_closing_while_quit_is_under_way() -> None:
    """Closing while an idle connection says QUIT to a server that does not answer takes seconds, and works."""

    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        async with ScriptedServer() as server:
            smtp = client_for(server)
            await send(smtp)
            server.fail_at("QUIT", "stall")
            await asyncio.sleep(10.5)
            await asyncio.gather(smtp.aclose(), smtp.aclose())
            assert loop.time() < 16
            await asyncio.sleep(0.1)
            assert server.open_connections == 0

    virtual.run(scenario())
