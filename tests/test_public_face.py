"""The public face: what there is to import, the drop-in, the life of a wrapped client, and what is refused at once."""

from __future__ import annotations

import asyncio
import inspect
import typing
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import aiosmtplib
import pytest
import virtual
from support import ANN, APP, BOB, BODY, GREYLISTED, PASSWORD, USER, letter, once, patient, talk, virtually

import smtpretry
from smtpretry import ClientClosed, Delivery, RetryingSMTP, RetryPolicy, Status
from smtpretry.testing import ScriptedServer, no_wait

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from email.message import EmailMessage

    from smtpretry.testing import NoWait


# What there is


@pytest.mark.parametrize(
    "name",
    """DEFAULT_RULES NO_REPLY Action ClientClosed Decision Delivery Outcome Reply RetryPolicy RetryingSMTP Rule Scope Stage
    Status UncertainDelivery retry send""".split(),  # noqa: SIM905
)
def test_exports(name: str) -> None:
    """Every word of the design can be imported from the package, and is listed."""
    assert hasattr(smtpretry, name)
    assert name in smtpretry.__all__


def test_exports_what_it_lists() -> None:
    """Everything in __all__ exists, and `from smtpretry import *` works."""
    assert [name for name in smtpretry.__all__ if not hasattr(smtpretry, name)] == []
    assert len(set(smtpretry.__all__)) == len(smtpretry.__all__)


def test_send_has_the_signature_of_aiosmtplib() -> None:
    """smtpretry.send takes what aiosmtplib.send takes, with the same names, kinds and defaults, and policy= besides."""
    theirs, ours = inspect.signature(aiosmtplib.send).parameters, dict(inspect.signature(smtpretry.send).parameters)
    policy = ours.pop("policy")
    assert policy.kind is inspect.Parameter.KEYWORD_ONLY
    assert policy.default == RetryPolicy()
    assert [*ours] == [*theirs]
    assert {name: (one.kind, one.default) for name, one in ours.items()} == {
        name: (one.kind, one.default) for name, one in theirs.items()
    }


@pytest.mark.parametrize("method", ["send_message", "sendmail"])
def test_methods_take_what_aiosmtplibs_take(method: str) -> None:
    """The wrapper's send methods take the arguments of the client's own, by the same names and with the same defaults."""
    theirs = inspect.signature(getattr(aiosmtplib.SMTP, method)).parameters
    ours = inspect.signature(getattr(RetryingSMTP, method)).parameters
    assert [*ours] == [*theirs]
    assert {name: (one.kind, one.default) for name, one in ours.items()} == {
        name: (one.kind, one.default) for name, one in theirs.items()
    }


def test_what_a_client_is_made_with() -> None:
    """RetryingSMTP(client, policy=RetryPolicy(), *, username, password, oauth_token_generator, cleartext_auth)."""
    parameters = inspect.signature(RetryingSMTP).parameters
    expected = {
        "client": (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.empty),
        "policy": (inspect.Parameter.POSITIONAL_OR_KEYWORD, RetryPolicy()),
        "username": (inspect.Parameter.KEYWORD_ONLY, None),
        "password": (inspect.Parameter.KEYWORD_ONLY, None),
        "oauth_token_generator": (inspect.Parameter.KEYWORD_ONLY, None),
        "cleartext_auth": (inspect.Parameter.KEYWORD_ONLY, "loopback"),
    }
    assert {name: (parameters[name].kind, parameters[name].default) for name in expected} == expected


@virtually
async def test_send_is_a_drop_in() -> None:
    """smtpretry.send connects, gets through 450 and 530, says QUIT and returns what aiosmtplib.send returns."""
    async with ScriptedServer(auth=(USER, PASSWORD)) as server:
        server.on("RCPT", GREYLISTED, times=1)
        result = await smtpretry.send(
            letter(ANN, BOB),
            hostname=server.hostname,
            port=server.port,
            local_hostname="client.example",
            username=USER,
            password=PASSWORD,
            policy=patient(),
        )
        assert result == ({}, "2.0.0 Ok: queued as 2")
        assert server.verbs[-1] == "QUIT"
        assert sorted(server.mailboxes) == [ANN, BOB]
        assert server.open_connections == 0


@pytest.mark.parametrize("raw", [BODY, BODY.decode()], ids=["bytes", "str"])
@virtually
async def test_send_takes_raw_messages(raw: str | bytes) -> None:
    """Bytes and str are sent to the recipients that are named."""
    async with ScriptedServer() as server:
        where: dict[str, Any] = {"hostname": server.hostname, "port": server.port, "local_hostname": "client.example"}
        assert (await smtpretry.send(raw, sender=APP, recipients=[ANN, BOB], **where, policy=once()))[0] == {}
        assert server.messages[0].content == BODY
        await smtpretry.send(raw, sender=APP, recipients=ANN, **where, policy=once())
        assert server.messages[1].recipients == [ANN]


@pytest.mark.parametrize(
    "settings", [{"tls": True}, {"tls": True, "start_tls": True}, {"tls": "implicit", "use_tls": True}]
)
@virtually
async def test_send_speaks_tls(settings: dict[str, Any]) -> None:
    """STARTTLS where it is offered or asked for, and TLS from the first byte, work as in aiosmtplib."""
    tls = settings.pop("tls")
    async with ScriptedServer(tls=tls) as server:
        await smtpretry.send(
            letter(),
            hostname=server.hostname,
            port=server.port,
            local_hostname="client.example",
            tls_context=server.tls_context,
            policy=once(),
            **settings,
        )
        assert len(server.messages) == 1
        assert tls == "implicit" or server.messages[0].tls
        settings["tls"] = tls


@virtually
async def test_send_starts_no_tls_where_it_shall_not() -> None:
    """start_tls=False leaves the connection in the clear."""
    async with ScriptedServer(tls=True) as server:
        where: dict[str, Any] = {"hostname": server.hostname, "port": server.port, "local_hostname": "client.example"}
        await smtpretry.send(letter(), **where, start_tls=False, policy=once())
        assert not server.messages[0].tls


@virtually
async def test_send_with_starttls_that_is_not_offered_is_an_error() -> None:
    """start_tls=True against a server without STARTTLS sends nothing, as in aiosmtplib."""
    async with ScriptedServer() as server:
        where: dict[str, Any] = {"hostname": server.hostname, "port": server.port, "local_hostname": "client.example"}
        with pytest.raises(aiosmtplib.SMTPException, match="STARTTLS"):
            await smtpretry.send(letter(), **where, start_tls=True, policy=patient())
        assert server.messages == []
        assert server.connections == 1


@pytest.mark.parametrize("how", ["fin", "rst", "stall", "garbage"])
@virtually
async def test_a_quit_that_fails_spoils_nothing(how: str) -> None:
    """The message was accepted before: what becomes of QUIT is no error."""
    async with ScriptedServer() as server:
        server.fail_at("QUIT", how)
        where: dict[str, Any] = {"hostname": server.hostname, "port": server.port, "local_hostname": "client.example"}
        assert (await smtpretry.send(letter(), **where, policy=once()))[0] == {}
        async with RetryingSMTP(server.client(), once()) as smtp:
            await smtp.sendmail(APP, [ANN], BODY)
        assert len(server.messages) == 2


# The life of a client


@virtually
async def test_connects_when_there_is_something_to_send() -> None:
    """`async with` connects lazily; the first send connects, further ones share the connection, and the end says QUIT."""
    async with ScriptedServer() as server:
        smtp = RetryingSMTP(server.client(), patient())
        async with smtp as entered:
            assert entered is smtp
            assert not smtp.is_connected
            assert server.connections == 0
            await smtp.sendmail(APP, [ANN], BODY)
            assert smtp.is_connected
            await smtp.send_message(letter(BOB))
            assert server.connections == 1
        assert not smtp.is_connected
        assert server.verbs[-1] == "QUIT"
        async with smtp:
            await smtp.sendmail(APP, [ANN], BODY)
        assert server.connections == 2


@virtually
async def test_works_without_async_with() -> None:
    """A send needs neither `async with` nor connect(); aclose() says QUIT."""
    async with ScriptedServer() as server:
        smtp = RetryingSMTP(server.client(), patient())
        await smtp.sendmail(APP, [ANN], BODY)
        await smtp.aclose()
        assert server.verbs[-1] == "QUIT"
        assert not smtp.is_connected


@virtually
async def test_connect_returns_the_banner_and_quit_the_goodbye() -> None:
    """connect() and quit() return the server's replies, as the client's own do, and a later send connects again."""
    async with talk() as (server, smtp):
        banner = await smtp.connect()
        assert isinstance(banner, aiosmtplib.SMTPResponse)
        assert banner.code == 220
        assert smtp.is_connected
        goodbye = await smtp.quit()
        assert goodbye == (221, "2.0.0 Bye")
        assert not smtp.is_connected
        await smtp.sendmail(APP, [ANN], BODY)
        assert server.connections == 2


@virtually
async def test_quit_without_a_connection_raises_what_aiosmtplib_does() -> None:
    """Where there is nothing to quit, the error is the client's own."""
    async with talk() as (server, smtp):
        with pytest.raises(aiosmtplib.SMTPServerDisconnected) as bare:
            await server.client().quit()
        with pytest.raises(aiosmtplib.SMTPServerDisconnected) as ours:
            await smtp.quit()
        assert ours.value.args == bare.value.args


@virtually
async def test_a_second_connect_is_an_error_and_no_deadlock() -> None:
    """connect() on a connected client raises at once (aiosmtplib's would wait for the connection to be closed)."""
    async with talk() as (server, smtp):
        await smtp.connect()
        with pytest.raises(aiosmtplib.SMTPException, match="already connected"):
            await smtp.connect()
        assert virtual.clock() == virtual.EPOCH
        await smtp.sendmail(APP, [ANN], BODY)
        assert server.connections == 1


@pytest.mark.parametrize(
    ("script", "error"),
    [
        (lambda server: server.on("CONNECT", "554 no"), aiosmtplib.SMTPConnectResponseError),
        (lambda server: server.on("CONNECT", "421 busy"), aiosmtplib.SMTPConnectResponseError),
        (lambda server: server.fail_at("CONNECT", "fin"), aiosmtplib.SMTPConnectError),
        (lambda server: server.fail_at("CONNECT", "stall"), aiosmtplib.SMTPConnectTimeoutError),
    ],
)
@virtually
async def test_connect_fails_once_with_aiosmtplibs_error(script: Any, error: type[Exception]) -> None:
    """connect() tries once and raises what aiosmtplib's raises; a later send tries anew."""
    async with talk() as (server, smtp):
        script(server)
        with pytest.raises(error):
            await smtp.connect()
        assert server.connections == 1
        assert not smtp.is_connected
        server.clear()
        assert (await smtp.sendmail(APP, [ANN], BODY))[0] == {}


@virtually
async def test_an_idle_connection_is_closed_with_quit() -> None:
    """After ten idle seconds, or as many as one says, the connection is closed politely, and the next send opens another."""
    async with talk(credentials={"idle_timeout": 30}) as (server, smtp):
        await smtp.sendmail(APP, [ANN], BODY)
        await asyncio.sleep(29)
        assert smtp.is_connected
        await smtp.sendmail(APP, [ANN], BODY)
        await asyncio.sleep(29)
        assert smtp.is_connected
        await asyncio.sleep(2)
        assert not smtp.is_connected
        assert server.verbs[-1] == "QUIT"
        await smtp.sendmail(APP, [ANN], BODY)
        assert server.connections == 2


@virtually
async def test_aclose_wakes_the_sends_that_wait() -> None:
    """aclose() ends the waiting sends with ClientClosed, whose delivery holds what is pending and what was accepted."""
    async with ScriptedServer() as server:
        smtp = RetryingSMTP(server.client(), patient())
        server.on("RCPT", ANN, GREYLISTED)
        waiting = [asyncio.create_task(smtp.sendmail(APP, [ANN, BOB], BODY)) for _ in range(3)]
        await asyncio.sleep(10)
        await smtp.aclose()
        for task in waiting:
            with pytest.raises(ClientClosed) as caught:
                await task
            assert caught.value.delivery.pending == [ANN]
            assert caught.value.delivery.accepted == [BOB]
            assert isinstance(caught.value, aiosmtplib.SMTPServerDisconnected)
        assert virtual.clock() - virtual.EPOCH < 15
        with pytest.raises(ClientClosed):
            await smtp.sendmail(APP, [BOB], BODY)
        async with smtp:
            await smtp.sendmail(APP, [BOB], BODY)


@virtually
async def test_aclose_lets_a_send_finish_that_is_talking() -> None:
    """A transaction under way ends before the connection is closed."""
    async with ScriptedServer() as server:
        server.fail_at("END_OF_DATA", "late", delay=20)
        smtp = RetryingSMTP(server.client(), patient())
        sending = asyncio.create_task(smtp.sendmail(APP, [ANN], BODY))
        await asyncio.sleep(5)
        await smtp.aclose()
        assert (await sending)[0] == {}
        assert server.verbs[-1] == "QUIT"


@virtually
async def test_an_error_in_async_with_closes_the_client() -> None:
    """What the body raises comes out as it is, and the connection is closed."""
    async with ScriptedServer() as server:
        smtp = RetryingSMTP(server.client(), patient())

        async def body() -> None:
            async with smtp:
                await smtp.sendmail(APP, [ANN], BODY)
                raise KeyError

        with pytest.raises(KeyError):
            await body()
        assert not smtp.is_connected


@virtually
async def test_a_client_that_is_connected_already_is_used_as_it_is() -> None:
    """A client that was connected before it was wrapped sends over that connection, and reconnects after a break."""
    async with ScriptedServer() as server:
        client = server.client()
        await client.connect()
        async with RetryingSMTP(client, patient()) as smtp:
            assert smtp.is_connected
            await smtp.sendmail(APP, [ANN], BODY)
            assert server.connections == 1
            server.disconnect()
            await smtp.sendmail(APP, [BOB], BODY)
            assert server.connections == 2


@virtually
async def test_deliver_takes_objects_and_raw_messages() -> None:
    """deliver() takes what send_message and sendmail take, and returns a Delivery with a name of its own."""
    async with talk() as (server, smtp):
        first = await smtp.deliver(letter(ANN, BOB))
        second = await smtp.deliver(BODY, sender=APP, recipients=ANN)
        third = await smtp.deliver(BODY.decode(), sender=APP, recipients=[ANN])
        assert all(isinstance(delivery, Delivery) for delivery in (first, second, third))
        assert len({delivery.id for delivery in (first, second, third)}) == 3
        assert first.outcomes[ANN].status is Status.ACCEPTED
        assert first.message == server.messages[0].content
        assert first.sender == APP
        assert first.response == "2.0.0 Ok: queued as 1"


@virtually
async def test_attempt_makes_one_pass_without_waiting() -> None:
    """One pass at a time: afterwards `next_at` says when to come again, and nothing was waited for."""
    async with talk() as (server, smtp):
        server.on("RCPT", ANN, GREYLISTED, times=1)
        delivery = Delivery(sender=APP, outcomes={ANN: smtpretry.Outcome(), BOB: smtpretry.Outcome()}, message=BODY)
        assert await smtp.attempt(delivery) is delivery
        assert virtual.clock() == virtual.EPOCH
        assert delivery.accepted == [BOB]
        assert delivery.pending == [ANN]
        assert delivery.next_at is not None
        assert 60 <= delivery.next_at - virtual.clock() <= 66
        before = len(server.commands)
        await smtp.attempt(delivery)  # too early: nothing is due
        assert len(server.commands) == before
        await asyncio.sleep(delivery.next_at - virtual.clock())
        await smtp.attempt(delivery)
        assert delivery.next_at is None
        assert delivery.accepted == [ANN, BOB]


# Event loops


def test_a_closed_client_can_move_to_another_loop() -> None:
    """Made at import time, or used in one loop and closed, a client works in the next."""
    server = ScriptedServer()
    client = server.client(hostname="127.0.0.1", port=1)
    smtp = RetryingSMTP(client, no_wait())

    async def use() -> None:
        async with server:
            client.port = server.port
            async with smtp:
                await smtp.sendmail(APP, [ANN], BODY)

    asyncio.run(use())
    asyncio.run(use())
    assert len(server.messages) == 2


def test_a_client_that_another_loop_owns_is_refused() -> None:
    """A client that is connected in another loop is a ValueError at once, before anything is sent."""

    async def scenario(policy: NoWait) -> None:
        async with ScriptedServer() as server, RetryingSMTP(server.client(), policy) as smtp:
            await smtp.connect()
            before = list(server.commands)
            uses: list[Callable[[], Coroutine[Any, Any, Any]]] = [
                lambda: smtp.sendmail(APP, [ANN], BODY),
                lambda: smtp.send_message(letter()),
                lambda: smtp.deliver(letter()),
                smtp.quit,
            ]
            for use in uses:
                with pytest.raises(ValueError, match="loop"):
                    await asyncio.to_thread(asyncio.run, use())
            assert server.commands == before
            assert (await smtp.sendmail(APP, [ANN], BODY))[0] == {}

    asyncio.run(scenario(no_wait()))


def test_a_bare_client_that_another_loop_owns_is_refused() -> None:
    """The same holds where the client was connected in the other loop before it was wrapped."""

    async def scenario() -> None:
        async with ScriptedServer() as server, server.client() as client:

            async def elsewhere() -> None:
                await RetryingSMTP(client, no_wait()).sendmail(APP, [ANN], BODY)

            with pytest.raises(ValueError, match="loop"):
                await asyncio.to_thread(asyncio.run, elsewhere())
            assert "MAIL" not in server.verbs

    asyncio.run(scenario())


# Bad input


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"client": "smtp.example.com"}, TypeError),
        ({"client": aiosmtplib.SMTP}, TypeError),
        ({"client": None}, TypeError),
        ({"policy": 5}, TypeError),
        ({"policy": None}, TypeError),
        ({"policy": RetryPolicy}, TypeError),
        ({"username": USER, "password": PASSWORD, "oauth_token_generator": lambda: None}, ValueError),
        ({"password": PASSWORD}, ValueError),
        ({"oauth_token_generator": lambda: None}, ValueError),
        ({"username": USER}, ValueError),
        ({"username": USER, "oauth_token_generator": "token"}, TypeError),
        ({"username": USER, "password": 5}, TypeError),
        ({"username": 5, "password": PASSWORD}, TypeError),
        ({"cleartext_auth": "sometimes"}, ValueError),
        ({"cleartext_auth": True}, ValueError),
        ({"idle_timeout": -1}, ValueError),
        ({"idle_timeout": float("nan")}, ValueError),
    ],
)
def test_a_client_that_cannot_work_is_refused_at_once(arguments: dict[str, Any], error: type[Exception]) -> None:
    """Wrong arguments of RetryingSMTP are a ValueError or TypeError when it is made, with a text that says why."""
    with pytest.raises(error, match=r"\w+ \w+"):
        RetryingSMTP(**({"client": aiosmtplib.SMTP()} | arguments))


def without(message: EmailMessage, *headers: str) -> EmailMessage:
    """Return the message without these headers."""
    for header in headers:
        del message[header]
    return message


BAD: dict[str, tuple[Any, dict[str, Any], type[Exception]]] = {
    "no sender": (without(letter(), "From"), {}, ValueError),
    "no recipients": (without(letter(), "To"), {}, ValueError),
    "empty recipients": (letter(), {"recipients": []}, ValueError),
    "empty recipient": (letter(), {"recipients": [""]}, ValueError),
    "empty string of recipients": (letter(), {"recipients": ""}, ValueError),
    "raw without sender": (BODY, {"recipients": [ANN]}, ValueError),
    "raw without recipients": (BODY, {"sender": APP}, ValueError),
    "line feed in recipient": (letter(), {"recipients": ["ann@example.com\nRCPT TO:<eve@example.com>"]}, ValueError),
    "return in recipient": (letter(), {"recipients": ["ann@example.com\r\nDATA"]}, ValueError),
    "line break in one of many": (letter(), {"recipients": [ANN, "bob@example.com\n"]}, ValueError),
    "line break in sender": (letter(), {"sender": "app@example.com\r\nQUIT"}, ValueError),
    "line break in a name": (letter(), {"recipients": ["Ann\r\n <ann@example.com>"]}, ValueError),
    "NUL in recipient": (letter(), {"recipients": ["ann\0@example.com"]}, ValueError),
    "two in one string": (letter(), {"recipients": f"{ANN}, {BOB}"}, ValueError),
    "two in one recipient": (letter(), {"recipients": [f"{ANN},{BOB}"]}, ValueError),
    "lone surrogate": (letter(), {"recipients": ["\ud800@example.com"]}, ValueError),
    "space in sender": (letter(), {"sender": "app example@example.com"}, ValueError),
    "line break in mail_options": (letter(), {"mail_options": ["SIZE=1\r\nQUIT"]}, ValueError),
    "line break in rcpt_options": (letter(), {"rcpt_options": ["NOTIFY=NEVER\r\n"]}, ValueError),
    "options as a string": (letter(), {"mail_options": "SIZE=1"}, TypeError),
    "options of numbers": (letter(), {"rcpt_options": [5]}, TypeError),
    "recipients of bytes": (letter(), {"recipients": [b"ann@example.com"]}, TypeError),
    "recipients as bytes": (letter(), {"recipients": b"ann@example.com"}, TypeError),
    "recipient None": (letter(), {"recipients": [None]}, TypeError),
    "recipients a number": (letter(), {"recipients": 5}, TypeError),
    "sender of bytes": (letter(), {"sender": b"app@example.com"}, TypeError),
    "message a number": (5, {"sender": APP, "recipients": [ANN]}, TypeError),
    "message None": (None, {"sender": APP, "recipients": [ANN]}, TypeError),
    "str outside ASCII": ("Subject: Grüße\r\n\r\n", {"sender": APP, "recipients": [ANN]}, ValueError),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("how", ["deliver", "send"])
@virtually
async def test_bad_input_is_refused_before_anything_is_sent(how: str, name: str) -> None:
    """A message or an address that cannot be sent is a clear ValueError or TypeError, and no server hears of it."""
    message, arguments, error = BAD[name]
    async with talk() as (server, smtp):
        where: dict[str, Any] = {"hostname": server.hostname, "port": server.port, "local_hostname": "client.example"}
        settings = {} if how == "deliver" else {**where, "policy": patient()}
        use: Any = smtp.deliver if how == "deliver" else smtpretry.send
        with pytest.raises(error, match=r"\w+ \w+") as caught:
            await use(message, **arguments, **settings)
        assert not isinstance(caught.value, UnicodeError)
        assert server.connections == 0


@pytest.mark.parametrize("message", [letter(), 5, None, ["a line"]], ids=type)
@virtually
async def test_sendmail_refuses_what_is_no_text(message: Any) -> None:
    """sendmail() takes str and bytes only, and says where objects go."""
    async with talk() as (server, smtp):
        with pytest.raises(TypeError, match="send_message"):
            await smtp.sendmail(APP, [ANN], message)
        assert server.connections == 0


@virtually
async def test_a_null_sender_is_no_bad_input() -> None:
    """The empty reverse-path of a bounce is sent as MAIL FROM:<>."""
    async with talk() as (server, smtp):
        await smtp.sendmail("", [ANN], BODY)
        assert server.commands[1].startswith("MAIL FROM:<>")
        assert server.messages[0].sender == ""


@pytest.mark.parametrize("arguments", [{"password": PASSWORD, "oauth_token_generator": lambda: None, "username": USER}])
@virtually
async def test_send_refuses_a_password_together_with_a_token_generator(arguments: dict[str, Any]) -> None:
    """smtpretry.send with both is a ValueError, before anything is sent."""
    async with ScriptedServer() as server:
        with pytest.raises(ValueError, match="exclu"):
            await smtpretry.send(letter(), hostname=server.hostname, port=server.port, **arguments)
        assert server.connections == 0


def test_is_typed() -> None:
    """The package ships its types: every public callable is annotated in full."""
    for name in smtpretry.__all__:
        value = getattr(smtpretry, name)
        if inspect.isfunction(value):
            hints = inspect.get_annotations(value)
            assert set(inspect.signature(value).parameters) - {"function"} <= set(hints), name
    assert typing.get_type_hints(smtpretry.Reply) == {"code": int, "enhanced": str | None, "text": str}


# What came of a send that was broken off


@virtually
async def test_a_broken_off_delivery_is_found_and_goes_on() -> None:
    """A time limit around a send loses nothing: the delivery is found in the error, and goes on to who is pending."""
    async with talk() as (server, smtp):
        server.on("RCPT", BOB, GREYLISTED, times=1)
        with pytest.raises(TimeoutError) as caught:
            async with asyncio.timeout(10):
                await smtp.sendmail(APP, [ANN, BOB], b"Subject: hello\r\n\r\n")
        delivery = smtpretry.delivery_of(caught.value)
        assert delivery is not None
        assert (delivery.accepted, delivery.pending) == ([ANN], [BOB])
        assert "1 of 2 recipients accepted, 1 pending; last: RCPT: 450 4.2.0 Greylisted" in delivery.story(0)
        assert await smtp.deliver(delivery) is delivery
        assert delivery.accepted == [ANN, BOB]
        assert len({message.content for message in server.messages}) == 1
        assert [len(server.received(who)) for who in (ANN, BOB)] == [1, 1]


def test_no_delivery_in_an_error_of_another_kind() -> None:
    """An error that did not come out of a send has no delivery."""
    assert smtpretry.delivery_of(ValueError("another")) is None


@virtually
async def test_a_note_tells_that_and_why_it_was_given_up() -> None:
    """After the last attempt the note names the limit, not a wait that will not be."""
    async with talk(patient(give_up_after=timedelta(minutes=1))) as (server, smtp):
        server.on("RCPT", "450 4.2.0 Greylisted for 300 seconds", times=1)
        with pytest.raises(aiosmtplib.SMTPRecipientsRefused) as caught:
            await smtp.sendmail(APP, [ANN], BODY)
        [note] = caught.value.__notes__
        assert note.endswith(
            "last: RCPT: 450 4.2.0 Greylisted for 300 seconds; gave up: give_up_after (1 min) allows no try after another 5 min"
        )


@pytest.mark.parametrize("timeout", [0, -1, float("nan")])
@virtually
async def test_a_timeout_that_cannot_be_is_refused(timeout: float) -> None:
    """A time-out that is not positive is a ValueError at once."""
    async with talk() as (server, smtp):
        with pytest.raises(ValueError, match="timeout"):
            await smtp.sendmail(APP, [ANN], BODY, timeout=timeout)
        assert server.connections == 0


@pytest.mark.parametrize("token", [None, 5])
@virtually
async def test_a_generator_that_gives_no_token_is_a_type_error(token: object) -> None:
    """What is no token is not sent as one."""

    async def generate() -> object:
        return token

    async with talk(token="t", credentials={"username": "me", "oauth_token_generator": generate}) as (server, smtp):
        with pytest.raises(TypeError, match="returns a token"):
            await smtp.sendmail(APP, [ANN], BODY)
        assert "AUTH" not in server.verbs


def test_a_policy_is_shown_without_its_table() -> None:
    """Help, errors and debuggers show a policy in one line."""
    own = smtpretry.Rule(code=550, action=smtpretry.Action.RETRY)
    assert len(repr(smtpretry.RetryPolicy())) < 200
    assert "1 of them own" in repr(smtpretry.RetryPolicy((own, *smtpretry.DEFAULT_RULES)))
