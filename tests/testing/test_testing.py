"""The scripted server and `no_wait` do what they promise to users' tests, and the virtual loop to ours."""

from __future__ import annotations

import asyncio
import gc
import json
import re
import smtplib
import ssl
import subprocess
import sys
import textwrap
import threading
import time
from base64 import b64decode, b64encode
from contextlib import asynccontextmanager, suppress
from email.message import EmailMessage
from typing import TYPE_CHECKING, Any

import aiosmtplib
import pytest
import virtual
from support import virtually

from smtpretry import RetryingSMTP, testing
from smtpretry.policy import RetryPolicy
from smtpretry.replies.stage import Stage
from smtpretry.testing import ScriptedServer, ThreadedServer, no_wait

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine

MESSAGE = b"Subject: hello\r\n\r\n.dots\r\n..and more\r\n"
RECIPIENTS = ["ann@example.com", "bob@example.com"]
RUNNERS = pytest.mark.parametrize("run", [asyncio.run, virtual.run], ids=["asyncio", "virtual"])


async def send(client: aiosmtplib.SMTP, recipients: list[str] | None = None) -> dict[str, Any]:
    """Send the message; return the refusals."""
    errors, _ = await client.sendmail("app@example.com", recipients or RECIPIENTS, MESSAGE)
    return errors


@asynccontextmanager
async def raw(server: ScriptedServer) -> AsyncIterator[Callable[[bytes | None], Coroutine[Any, Any, list[bytes]]]]:
    """Connect without a client: send a line (None: only listen), get the lines of the reply."""
    reader, writer = await asyncio.open_connection(server.hostname, server.port)

    async def say(line: bytes | None) -> list[bytes]:
        writer.write(b"" if line is None else line + b"\r\n")
        lines = [await reader.readline()]
        while lines[-1][3:4] == b"-":
            lines.append(await reader.readline())
        return [line.rstrip(b"\r\n") for line in lines]

    try:
        yield say
    finally:
        writer.close()
        with suppress(ConnectionResetError):
            await writer.wait_closed()


# Scripts


@RUNNERS
def test_takes_everything_where_no_script_says_otherwise(run: Any) -> None:
    """A server without scripts takes the message and shows it as it came, per recipient and parsed."""

    async def scenario() -> None:
        async with ScriptedServer() as server:
            async with server.client() as client:
                assert await send(client) == {}
                assert await send(client, ["bob@example.com"]) == {}
                assert server.open_connections == 1
            first, second = server.messages
            assert (first.sender, first.recipients, first.content) == ("app@example.com", RECIPIENTS, MESSAGE)
            assert (first.authenticated, first.tls, first.connection) == (None, False, 1)
            assert first.message["subject"] == "hello"
            assert isinstance(first.message, EmailMessage)
            assert server.received("bob@example.com") == [first, second]
            assert server.received("nobody@example.com") == []
            assert server.mailboxes == {"ann@example.com": [first], "bob@example.com": [first, second]}
            assert server.verbs == ["EHLO", "MAIL", "RCPT", "RCPT", "DATA", "MAIL", "RCPT", "DATA", "QUIT"]
            assert server.commands[0] == "EHLO client.example"
            assert server.connections == 1

    run(scenario())


def test_script_holds_for_its_recipient_and_its_times() -> None:
    """A script answers in place of the server, to the addresses of its pattern, as often as it says."""

    async def scenario() -> None:
        async with ScriptedServer() as server:
            script = server.on("RCPT", "BOB@*", "450 4.2.0 greylisted, retry in 30 seconds", times=1)
            async with server.client() as client:
                assert await send(client) == {"bob@example.com": (450, "4.2.0 greylisted, retry in 30 seconds")}
                assert await send(client) == {}
            assert script.used == 1
            assert [message.recipients for message in server.messages] == [["ann@example.com"], RECIPIENTS]

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("verb", "saw"),
    [
        ("CONNECT", []),
        (Stage.EHLO, ["EHLO", "HELO"]),
        ("starttls", ["EHLO", "STARTTLS"]),
        (Stage.AUTH, ["EHLO", "STARTTLS", "EHLO", "AUTH"]),
        ("CHALLENGE", ["EHLO", "STARTTLS", "EHLO", "AUTH"]),
        (Stage.MAIL, ["EHLO", "STARTTLS", "EHLO", "AUTH", "MAIL"]),
        (Stage.RCPT, ["EHLO", "STARTTLS", "EHLO", "AUTH", "MAIL", "RCPT", "RCPT"]),
        (Stage.DATA, ["EHLO", "STARTTLS", "EHLO", "AUTH", "MAIL", "RCPT", "RCPT", "DATA"]),
        (Stage.END_OF_DATA, ["EHLO", "STARTTLS", "EHLO", "AUTH", "MAIL", "RCPT", "RCPT", "DATA"]),
    ],
)
def test_script_answers_at_each_stage(verb: str | Stage, saw: list[str]) -> None:
    """A reply can be scripted at every stage of a session, with several lines; what it refuses is not done."""

    async def scenario() -> None:
        async with ScriptedServer(tls=True, auth=("app", "secret"), mechanisms=["LOGIN"]) as server:
            server.on(verb, "450 4.3.2 not now\nnor then")
            server.on("HELO", "450 4.3.2 not now\nnor then")
            client = server.client(username="app", password="secret")
            with pytest.raises(aiosmtplib.SMTPException) as caught:  # noqa: PT012 - it is refused in one or the other
                await client.connect()
                await send(client)
            refusals = getattr(caught.value, "recipients", [caught.value])
            assert {(one.code, one.message) for one in refusals} == {(450, "4.3.2 not now\n4.3.2 nor then")}
            assert [verb for verb in server.verbs if verb != "RSET"] == saw
            assert server.messages == []
            client.close()

    asyncio.run(scenario())


def test_first_script_that_is_left_wins() -> None:
    """Scripts are tried in the order in which they were given, and one that is used up lets the next one through."""

    async def scenario() -> None:
        async with ScriptedServer() as server, server.client() as client:
            server.on("NOOP", "450 first", times=2)
            server.on("NOOP", "451 second", times=1)
            replies = []
            for _ in range(4):
                try:
                    replies.append((await client.noop()).code)
                except aiosmtplib.SMTPResponseException as error:
                    replies.append(error.code)
            assert replies == [450, 450, 451, 250]
            server.on("NOOP", "450 never mind", times=1)
            server.clear()
            assert (await client.noop()).code == 250

    asyncio.run(scenario())


@pytest.mark.parametrize("verb", ["DATA", "BODY", "END_OF_DATA"])
def test_pattern_of_a_message_is_any_of_its_recipients(verb: str) -> None:
    """After RCPT a script with a pattern holds for messages to such a recipient, and for no other."""

    async def scenario() -> None:
        async with ScriptedServer() as server:
            server.on(verb, "bob@*", "421 4.3.0 not for bob", times=1)
            async with server.client() as client:
                assert await send(client, ["ann@example.com"]) == {}
                with pytest.raises(aiosmtplib.SMTPException):
                    await send(client)

    asyncio.run(scenario())


@pytest.mark.parametrize(("close", "ends"), [(None, True), (False, False), ("rst", True)])
def test_421_closes(close: Any, ends: bool) -> None:
    """421 closes the connection after the reply, as RFC 5321 §3.8 has it, unless the script says otherwise."""

    async def scenario() -> None:
        async with ScriptedServer() as server, raw(server) as say:
            server.on("NOOP", "421 4.3.2 closing", close=close, times=1)
            await say(None)
            if close == "rst":
                with pytest.raises(ConnectionResetError):  # noqa: PT012 - the reply may come before the reset
                    await say(b"NOOP")
                    await say(b"NOOP")
            else:
                assert await say(b"NOOP") == [b"421 4.3.2 closing"]
                assert (await say(b"NOOP") == [b""]) is ends

    virtual.run(scenario())


@pytest.mark.parametrize("accepted", [True, False])
@pytest.mark.parametrize("reply", ["451 4.3.0 what now", "250 2.0.0 fine", None])
def test_accepted_says_what_the_server_did(accepted: bool, reply: str | None) -> None:
    """A message can be taken although the reply is an error or a cut, and be lost although it is a 250."""

    async def scenario() -> None:
        async with ScriptedServer() as server:
            server.on("END_OF_DATA", reply, close=reply is None, accepted=accepted, times=1)
            client = server.client()
            await client.connect()
            try:
                await send(client)
                assert reply is not None
                assert reply.startswith("250")
            except aiosmtplib.SMTPException:
                assert reply is None or reply.startswith("451")
            assert len(server.messages) == accepted
            client.close()

    asyncio.run(scenario())


def test_positive_reply_acts() -> None:
    """A scripted reply that is positive goes with what the command asks for."""

    async def scenario() -> None:
        async with ScriptedServer() as server, server.client() as client:
            server.on("RCPT", "251 2.1.5 forwarded", times=2)
            server.on("DATA", "354 go on", times=1)
            server.on("END_OF_DATA", "250 2.0.0 by me", times=1)
            assert await send(client) == {}
            assert server.messages[0].recipients == RECIPIENTS

    asyncio.run(scenario())


def test_bytes_are_sent_as_they_are() -> None:
    """A reply in bytes is sent unchanged, however wrong it is."""

    async def scenario() -> None:
        async with ScriptedServer() as server, raw(server) as say:
            server.on("NOOP", b"999 \x1b[31m?\n")
            await say(None)
            assert await say(b"NOOP") == [b"999 \x1b[31m?"]

    asyncio.run(scenario())


def test_lines_of_a_reply_are_completed() -> None:
    """Each line of a reply gets the code and the enhanced status, unless it has them."""

    async def scenario() -> None:
        async with ScriptedServer() as server, raw(server) as say:
            await say(None)
            for reply in ("450 4.2.0 one\ntwo", "450-4.2.0 one\r\n450 4.2.0 two"):
                server.on("NOOP", reply, times=1)
                assert await say(b"NOOP") == [b"450-4.2.0 one", b"450 4.2.0 two"]
            server.on("NOOP", "450", times=1)
            assert await say(b"NOOP") == [b"450 "]

    asyncio.run(scenario())


@pytest.mark.parametrize(
    "mistake",
    [
        lambda server: server.on("RECEIPT", "450 4.2.0 later"),
        lambda server: server.on(450, "451 4.3.0 later"),
        lambda server: server.on("RCPT", "bob@*", "later"),
        lambda server: server.on("RCPT", "bob@*", "99 too low"),
        lambda server: server.on("RCPT", "bob@*", "600 too high"),
        lambda server: server.on("RCPT", "bob@*", "2500 too long"),
        lambda server: server.on("RCPT"),
        lambda server: server.on("RCPT", "bob@*", None),
        lambda server: server.on("RCPT", "450 later", times=0),
        lambda server: server.on("RCPT", "450 later", close="slam"),
        lambda server: server.fail_at("RCPT", "explode"),
        lambda server: server.fail_at("NOWHERE", "fin"),
        lambda server: server.fail_at("RCPT", "half", reply="nothing"),
        lambda _: ScriptedServer(max_rate=(0, 1)),
        lambda _: ScriptedServer(max_rate=(14, 0)),
        lambda _: ScriptedServer(tls="maybe"),  # type: ignore[arg-type]
        lambda _: ScriptedServer(auth=("app", "secret"), mechanisms=["MAGIC"]),
    ],
)
def test_mistakes_are_told_at_once(mistake: Callable[[ScriptedServer], object]) -> None:
    """A verb, reply, fault or number that does not exist is a ValueError where it stands, not a hang later."""
    with pytest.raises(ValueError, match=r"\w"):
        mistake(ScriptedServer())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"auth": "app"},
            'auth is a user and a password, such as ("app", "secret"), or a mapping of them, not \'app\'',
        ),
        ({"auth": ["ab", "cd"]}, "auth is a user and a password"),
        ({"auth": ("app", "secret"), "mechanisms": "PLAIN"}, "mechanisms is a list, such as ['PLAIN'], not 'PLAIN'"),
        ({"tokens": "fresh"}, "tokens is a list, such as ['fresh'], not 'fresh'"),
        ({"extensions": "DSN"}, "extensions is a list, such as ['DSN'], not 'DSN'"),
    ],
)
def test_one_in_place_of_several_is_told(options: dict[str, Any], said: str) -> None:
    """A word is not taken for its letters."""
    with pytest.raises(TypeError, match=re.escape(said)):
        ScriptedServer(**options)


@pytest.mark.parametrize("how", ["with", "async with"])
def test_a_thread_whose_server_cannot_start_ends(how: str) -> None:
    """The port is taken: nothing is left of the second server, and the first one goes on."""

    async def start(server: ThreadedServer) -> None:
        async with server:
            pass

    with ThreadedServer() as first:
        before = threading.active_count()
        second = ThreadedServer(port=first.port)
        with pytest.raises(OSError, match="in use"):
            asyncio.run(start(second)) if how == "async with" else second.__enter__()
        assert threading.active_count() == before
        with pytest.raises(RuntimeError, match="started already"):
            first.__enter__()
        with smtplib.SMTP(first.hostname, first.port) as client:
            assert client.noop()[0] == 250


@pytest.mark.parametrize("make", [ScriptedServer, ThreadedServer])
def test_aclose_is_stop(make: type[ScriptedServer]) -> None:
    """It ends the thread, too, where there is one."""

    async def scenario() -> None:
        server = await make().start()
        await server.aclose()
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection(server.hostname, server.port)

    before = threading.active_count()
    asyncio.run(scenario())
    assert threading.active_count() == before


def test_script_that_was_not_reached_is_an_error() -> None:
    """Where a script with `times` was not reached that often, `async with` ends with an error that names it."""

    async def scenario(*, optional: bool) -> None:
        async with ScriptedServer() as server:
            server.on("RCPT", "bbo@*", "450 4.2.0 later", times=2, optional=optional)
            server.on("RCPT", "carol@*", "550 5.1.1 for ever")
            async with server.client() as client:
                await send(client)

    with pytest.raises(AssertionError, match=r"RCPT 'bbo@\*': '450 4\.2\.0 later' \(reached 0 of 2 times\).*MAIL FROM"):
        asyncio.run(scenario(optional=False))
    asyncio.run(scenario(optional=True))


def test_error_of_the_test_itself_comes_first() -> None:
    """An error of the body is not hidden by that of a script."""

    async def scenario() -> None:
        async with ScriptedServer() as server:
            server.on("QUIT", "221 bye", times=1)
            raise KeyError

    with pytest.raises(KeyError):
        asyncio.run(scenario())


def test_errors_inside_the_server_surface(monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception in the server is not swallowed: `async with` raises it."""

    async def broken(*_: object) -> None:
        raise ZeroDivisionError

    async def scenario() -> None:
        async with ScriptedServer() as server:
            client = server.client()
            await client.connect()
            with pytest.raises(aiosmtplib.SMTPServerDisconnected):
                await send(client)

    monkeypatch.setattr("smtpretry.testing.session.Session.smtp_MAIL", broken)
    with pytest.raises(ZeroDivisionError):
        asyncio.run(scenario())


def test_example_of_the_documentation_passes() -> None:
    """The module's own example is a test that passes, in fewer than 15 lines."""
    lines = textwrap.dedent((testing.__doc__ or "").split("::\n\n")[1].split("\nNeeds")[0])
    assert len(lines.strip().splitlines()) < 15
    names: dict[str, Any] = {}
    exec(lines, names)  # noqa: S102
    names["test_greylisting"]()


# Encryption, log-in, limits


@pytest.mark.parametrize("tls", [True, "required", "implicit"])
@RUNNERS
def test_encrypted_by_one_argument(run: Any, tls: Any) -> None:
    """With `tls` the server's own client encrypts and trusts the certificate, for the name and for the address."""

    async def scenario() -> None:
        async with ScriptedServer(tls=tls) as server:
            for hostname in ("127.0.0.1", "localhost"):
                async with server.client(hostname=hostname) as client:
                    assert await send(client) == {}
            assert [message.tls for message in server.messages] == [True, True]
            strict = {"tls_context": ssl.create_default_context(), "use_tls": tls == "implicit"}
            with pytest.raises((ssl.SSLError, aiosmtplib.SMTPException)):
                await server.client(**strict).connect()

    run(scenario())


def test_tls_required_refuses_what_rfc_3207_lets_it() -> None:
    """Where TLS is required, all but EHLO, NOOP, STARTTLS and QUIT gets 530 5.7.0 on a clear connection."""

    async def scenario() -> None:
        async with ScriptedServer(tls="required", auth=("app", "secret")) as server, raw(server) as say:
            await say(None)
            assert (await say(b"EHLO me"))[0].startswith(b"250-")
            assert await say(b"NOOP") == [b"250 OK"]
            for command in (b"MAIL FROM:<a@b.c>", b"AUTH PLAIN", b"RSET"):
                assert await say(command) == [b"530 5.7.0 Must issue a STARTTLS command first"]

    asyncio.run(scenario())


@pytest.mark.parametrize("mechanism", ["PLAIN", "LOGIN", "CRAM-MD5"])
def test_log_in_is_offered_and_required(mechanism: str) -> None:
    """With `auth` MAIL gets 530 until the right password was given, by any of the mechanisms."""

    async def scenario() -> None:
        async with ScriptedServer(auth=("app", "secret"), mechanisms=[mechanism]) as server:
            async with server.client() as client:
                with pytest.raises(aiosmtplib.SMTPSenderRefused, match="Authentication required"):
                    await send(client)
                with pytest.raises(aiosmtplib.SMTPAuthenticationError, match="535"):
                    await client.login("app", "wrong")
                with pytest.raises(aiosmtplib.SMTPAuthenticationError, match="535"):
                    await client.login("nobody", "secret")
                await client.login("app", "secret")
                await send(client)
            assert server.messages[0].authenticated == "app"
            assert "secret" not in str(server.commands)
            assert b64encode(b"\0app\0secret").decode() not in str(server.commands)

    asyncio.run(scenario())


def test_log_in_inside_a_transaction_is_refused() -> None:
    """AUTH between MAIL and the end of the message gets 503 (RFC 4954 §4)."""

    async def scenario() -> None:
        server = ScriptedServer(auth=("app", "secret"), auth_required=False)
        async with server, server.client() as client:
            await client.ehlo()
            await client.mail("app@example.com")
            assert (await client.execute_command(b"AUTH", b"PLAIN")).code == 503
            await client.rset()
            await client.login("app", "secret")

    asyncio.run(scenario())


def test_starttls_begins_anew() -> None:
    """After STARTTLS the server has forgotten EHLO and MAIL, and offers it no more (RFC 3207 §4.2)."""

    async def scenario() -> None:
        async with ScriptedServer(tls=True) as server, server.client(start_tls=False) as client:
            await client.ehlo()
            await client.mail("app@example.com")
            await client.starttls()
            assert await client.execute_command(b"MAIL FROM:<a@b.c>") == (503, "Error: send HELO first")
            await client.ehlo()
            assert not client.supports_extension("starttls")
            assert (await client.execute_command(b"RCPT TO:<a@b.c>")).code == 503
            assert (await client.execute_command(b"STARTTLS")).code == 503

    asyncio.run(scenario())


def test_log_in_may_be_optional_or_wait_for_tls() -> None:
    """AUTH can be offered without being required, and on encrypted connections only."""

    async def scenario() -> None:
        async with ScriptedServer(auth={"app": "secret"}, auth_required=False) as server, server.client() as client:
            assert client.supports_extension("auth")
            assert await send(client) == {}
        async with ScriptedServer(tls=True, auth=("app", "secret"), auth_requires_tls=True) as server:
            async with server.client(start_tls=False) as client:
                await client.ehlo()
                assert not client.supports_extension("auth")
            async with server.client() as client:
                assert client.supports_extension("auth") is False  # before the EHLO that follows STARTTLS
                await client.login("app", "secret")
        async with ScriptedServer() as server, server.client() as client:
            await client.ehlo()
            assert not client.supports_extension("auth")
            assert (await client.execute_command(b"AUTH", b"PLAIN")).code == 503

    asyncio.run(scenario())


def test_token_is_refused_with_the_challenge_that_oauth_servers_send() -> None:
    """A wrong token gets 334 with JSON, then 535 after the client's empty line; tokens may change during the test."""

    async def scenario() -> None:
        async with ScriptedServer(token="old") as server, raw(server) as say:
            login = {
                token: b"AUTH XOAUTH2 " + b64encode(b"user=me\1auth=Bearer %s\1\1" % token)
                for token in (b"old", b"new")
            }
            await say(None)
            assert b"250-AUTH XOAUTH2" in await say(b"EHLO me")
            for wrong in (login[b"new"], b"AUTH XOAUTH2 %%%", b"AUTH XOAUTH2 " + b64encode(b"user=me")):
                (challenge,) = await say(wrong)
                assert challenge.startswith(b"334 ")
                assert json.loads(b64decode(challenge[4:]))["status"] == "401"
                assert await say(b"") == [b"535 5.7.8 Username and Password not accepted"]
            server.tokens = {"new"}
            assert (await say(login[b"old"]))[0].startswith(b"334 ")

        async def token() -> str:
            return "x" * 3000

        async with ScriptedServer(tokens=[await token()]) as server:
            async with server.client(username="me", oauth_token_generator=token) as client:
                await send(client)
            assert server.messages[0].authenticated == "me"
            server.tokens.clear()
            with pytest.raises(aiosmtplib.SMTPAuthenticationError, match="535"):
                await server.client(username="me", oauth_token_generator=token).connect()

    asyncio.run(scenario())


def test_limits_and_extensions() -> None:
    """The number of recipients, the size, 8BITMIME, SMTPUTF8 and further extensions are switches."""

    async def scenario() -> None:
        generous = ScriptedServer(max_recipients=1, size_limit=100, extensions=["DSN"])
        async with generous as server, server.client() as client:
            assert await send(client) == {"bob@example.com": (452, "4.5.3 Error: too many recipients")}
            for extension in ("pipelining", "dsn", "8bitmime", "smtputf8", "size"):
                assert client.supports_extension(extension)
            assert client.esmtp_extensions["size"] == "100"
            with pytest.raises(aiosmtplib.SMTPSenderRefused, match="552"):
                await client.sendmail("a@b.c", "d@e.f", MESSAGE * 9)
            await client.sendmail("jörg@b.c", "d@e.f", MESSAGE, mail_options=["SMTPUTF8", "BODY=8BITMIME"])
            assert server.messages[-1].sender == "jörg@b.c"
            assert {"SMTPUTF8", "BODY=8BITMIME"} < set(server.messages[-1].options)

        async with ScriptedServer(eightbitmime=False, smtputf8=False) as server, server.client() as client:
            await client.ehlo()
            assert not client.supports_extension("8bitmime")
            assert not client.supports_extension("smtputf8")
            assert (await client.execute_command("MAIL FROM:<jörg@b.c>".encode())).code == 500
            with pytest.raises(aiosmtplib.SMTPDataError, match="500"):
                await client.sendmail("a@b.c", "d@e.f", "Subject: ö\r\n\r\n".encode())

    asyncio.run(scenario())


@pytest.mark.parametrize("seconds", [1, 60])
@virtually
async def test_messages_over_the_rate_are_throttled(seconds: float) -> None:
    """`max_rate` counts what was taken in the last seconds of the loop's time, from all connections, and refuses the rest."""
    async with ScriptedServer(max_rate=(2, seconds)) as server, server.client() as one, server.client() as other:
        server.on("END_OF_DATA", "refused@*", "550 5.7.1 no")
        with pytest.raises(aiosmtplib.SMTPDataError, match="550"):
            await one.sendmail("a@b.c", "refused@e.f", MESSAGE)  # what is not taken does not count
        await one.sendmail("a@b.c", "d@e.f", MESSAGE)
        await asyncio.sleep(seconds / 2)
        await other.sendmail("a@b.c", "d@e.f", MESSAGE)
        for client in (one, other):
            with pytest.raises(aiosmtplib.SMTPDataError, match=r"4\.7\.0 Throttling failure: Maximum sending rate"):
                await client.sendmail("a@b.c", "d@e.f", MESSAGE)
        await asyncio.sleep(seconds / 2)
        await one.sendmail("a@b.c", "d@e.f", MESSAGE)
        with pytest.raises(aiosmtplib.SMTPDataError, match="454"):
            await one.sendmail("a@b.c", "d@e.f", MESSAGE)
        server.max_rate = None
        await one.sendmail("a@b.c", "d@e.f", MESSAGE)
        assert len(server.messages) == 4


async def together(server: ScriptedServer, *lines: str) -> list[str]:
    """Say all of it in one packet, and return the lines that are answered until the server closes."""
    reader, writer = await asyncio.open_connection(server.hostname, server.port)
    writer.write("".join(f"{line}\r\n" for line in lines).encode())
    answered = (await reader.read()).decode().splitlines()
    writer.close()
    return answered


PIPELINE = ("EHLO c", "MAIL FROM:<a@b.c>", "RCPT TO:<ann@b.c>", "RCPT TO:<bob@b.c>", "DATA")


@RUNNERS
def test_commands_that_came_together_are_answered_in_order(run: Any) -> None:
    """PIPELINING is offered; each command of a packet has its reply in its place, a script's or the server's (RFC 2920)."""

    async def scenario() -> None:
        async with ScriptedServer() as server:
            server.on("RCPT", "bob@*", "450 4.2.0 later\nmuch later")
            said = await together(server, *PIPELINE, "Subject: hi", "", ".", "MAIL FROM:<a@b.c>", "RSET", "QUIT")
            assert "250-PIPELINING" in said
            assert [line[:4] for line in said[said.index(next(line for line in said if line[:4] == "250 ")) + 1 :]] == [
                *("250 ", "250 ", "450-", "450 ", "354 ", "250 "),
                *("250 ", "250 ", "221 "),
            ]
            assert [message.recipients for message in server.messages] == [["ann@b.c"]]

    run(scenario())


def codes_after_ehlo(said: list[str]) -> list[int]:
    """The codes of the replies that follow the one to EHLO, which is the first of several lines."""
    codes = [int(line[:3]) for line in said if line[3] == " "]
    return codes[2:]


@pytest.mark.parametrize("verb", ["MAIL", "RCPT", "DATA"])
@virtually
async def test_a_refusal_in_a_pipeline_has_its_consequences(verb: str) -> None:
    """What depends on a refused command is refused in turn, and what was sent ahead is answered all the same."""
    expected = {"MAIL": [451, 503, 503, 503], "RCPT": [250, 451, 451, 503], "DATA": [250, 250, 250, 451]}
    async with ScriptedServer() as server:
        server.on(verb, "451 4.3.0 later")
        assert codes_after_ehlo(await together(server, *PIPELINE, "QUIT")) == [*expected[verb], 221]


@virtually
async def test_a_script_waits_for_a_transaction() -> None:
    """Behind a refused MAIL a RCPT that was sent ahead gets 503, and its script is kept for the next transaction."""
    async with ScriptedServer(auth=("app", "secret")) as server:
        server.on("RCPT", "bob@*", "450 4.2.0 greylisted, retry in 30 seconds", times=1)
        policy = no_wait()
        async with RetryingSMTP(server.client(), policy, username="app", password="secret") as smtp:
            await smtp.sendmail("app@example.com", "bob@example.com", "Subject: hello\n\nHello.")
        assert policy.waits == [30.0]


@virtually
async def test_a_fault_in_a_pipeline_ends_it() -> None:
    """Where the connection ends at one command, those sent behind it are never answered."""
    async with ScriptedServer() as server:
        server.on("RCPT", "ann@*", "421 4.3.2 going away")
        assert codes_after_ehlo(await together(server, *PIPELINE, "QUIT")) == [250, 421]
        server.clear()
        server.fail_at("RCPT", "fin", "bob@*")
        assert codes_after_ehlo(await together(server, *PIPELINE, "QUIT")) == [250, 250]


@virtually
async def test_data_without_recipients_may_get_354() -> None:
    """By a script DATA gets 354 though no recipient was taken: the body is read, and its dot gets 554 (RFC 2920 §3.1)."""
    async with ScriptedServer() as server:
        server.on("RCPT", "550 5.1.1 who?")
        server.on("DATA", "354 go on", times=2)
        ends = ("MAIL FROM:<a@b.c>", "RCPT TO:<bob@b.c>", "DATA", ".", "QUIT")
        assert codes_after_ehlo(await together(server, *PIPELINE, ".", *ends)) == [
            *(250, 550, 550, 354, 554),
            *(250, 550, 354, 554),
            221,
        ]
        assert server.messages == []


@pytest.mark.parametrize(
    ("sent", "answered"),
    [
        (PIPELINE, [554]),
        (("EHLO c", "NOOP"), [554]),
    ],
)
@virtually
async def test_where_pipelining_is_not_offered_it_is_an_error(sent: tuple[str, ...], answered: list[int]) -> None:
    """Without `pipelining` it is not offered, and a command that came before the last one's reply ends the connection."""
    async with ScriptedServer(pipelining=False) as server:
        said = await together(server, *sent)
        assert not any("PIPELINING" in line for line in said[:-1])
        assert codes_after_ehlo(said) == answered
        async with server.client() as client:
            await send(client)
            await send(client)
        assert len(server.messages) == 2


@virtually
async def test_what_came_behind_starttls_is_forgotten() -> None:
    """A command that was sent in the clear behind STARTTLS is never carried out."""
    async with ScriptedServer(tls=True) as server:
        reader, writer = await asyncio.open_connection(server.hostname, server.port)
        writer.write(b"EHLO c\r\nSTARTTLS\r\nMAIL FROM:<eve@b.c>\r\n")
        await reader.readuntil(b"220 2.0.0 Ready to start TLS\r\n")
        await writer.start_tls(server.tls_context, server_hostname="localhost")
        writer.write(b"QUIT\r\n")
        assert await reader.readline() == b"221 2.0.0 Bye\r\n"
        writer.close()
        assert server.verbs == ["EHLO", "STARTTLS", "QUIT"]


def test_null_sender_and_strangers() -> None:
    """The null sender is an empty string; an unknown command and a line without end get 500 and hurt nobody."""

    async def scenario() -> None:
        async with ScriptedServer() as server:
            server.on("MAIL", "", "250 2.1.0 bounces welcome", times=1)
            async with server.client() as client:
                await client.ehlo()
                for command in ("MAIL FROM:<>", "RCPT TO:<a@b.c>"):
                    assert (await client.execute_command(command.encode())).code == 250
                await client.data(MESSAGE)
                for malformed in ("MAIL FROM:<", "MAIL FROM:<<>@>", "MAIL TO:<a@b.c>", "MAIL"):
                    assert (await client.execute_command(malformed.encode())).code in {501, 553}
                for _ in range(20):
                    assert (await client.execute_command(b"XYZZY")).code == 500
                assert (await client.execute_command(b"NOOP " + b"x" * 20_000)).code == 500
            assert server.messages[0].sender == ""

    asyncio.run(scenario())


# Faults

FAULTS = ["fin", "rst", "stall", "garbage", "half", "bytewise", "late", "unasked", "unasked_before"]
VERBS = ["CONNECT", "EHLO", "STARTTLS", "AUTH", "CHALLENGE", "MAIL", "RCPT", "DATA", "BODY", "END_OF_DATA", "QUIT"]
HARMLESS = {("bytewise", True), ("late", True)}  # how, act: the same as no fault, for a client that is patient


@pytest.mark.parametrize("act", [False, True])
@pytest.mark.parametrize("how", FAULTS)
@pytest.mark.parametrize("verb", VERBS)
def test_fault_is_reached_and_leaves_nothing_open(verb: str, how: str, act: bool) -> None:
    """Each fault happens where it was asked for, in no time, and what the client is told ends with the server."""
    began = time.monotonic()

    async def scenario() -> None:
        async with ScriptedServer(tls=True, auth=("app", "secret"), mechanisms=["LOGIN"]) as server:
            script = server.fail_at(verb, how, act=act, times=1)
            patient = (how, act) in HARMLESS
            client = server.client(username="app", password="secret", timeout=100.0 if patient else 60.0)
            failed: Exception | None = None
            try:
                async with client:
                    await send(client)
            except (aiosmtplib.SMTPException, ssl.SSLError) as error:
                failed = error
            client.close()
            assert script.used == 1
            if patient or verb == "QUIT":
                assert failed is None
            if how in {"fin", "rst", "stall", "half", "garbage"} and verb != "QUIT":
                assert failed is not None
                taken = (verb, act) == ("END_OF_DATA", True) or (verb, how) == ("BODY", "garbage")
                assert len(server.messages) == taken
        assert server.open_connections == 0
        await asyncio.sleep(1)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    virtual.run(scenario())
    gc.collect()
    assert time.monotonic() - began < 5


def test_fault_has_the_pattern_and_the_order_of_on() -> None:
    """A fault can be for one recipient, with the pattern after it or, as in `on`, before it."""

    async def scenario() -> None:
        async with ScriptedServer() as server:
            server.fail_at("RCPT", "fin", "bob@*", times=1)
            server.fail_at("RCPT", "carol@*", "rst", times=1)
            for recipient in ("ann@example.com", "bob@example.com", "carol@example.com"):
                client = server.client()
                await client.connect()
                try:
                    await send(client, [recipient])
                    await client.quit()
                except aiosmtplib.SMTPServerDisconnected:
                    assert recipient != "ann@example.com"
            assert list(server.mailboxes) == ["ann@example.com"]

    asyncio.run(scenario())


def test_pieces_arrive_one_by_one() -> None:
    """A bytewise reply arrives in as many pieces as it has bytes."""

    async def scenario() -> None:
        pieces = []

        class Listener(asyncio.Protocol):
            def data_received(self, data: bytes) -> None:
                pieces.append(data)

        async with ScriptedServer() as server:
            server.fail_at("NOOP", "bytewise", times=1)
            transport, _ = await asyncio.get_running_loop().create_connection(Listener, server.hostname, server.port)
            await asyncio.sleep(1)
            transport.write(b"NOOP\r\n")
            await asyncio.sleep(1)
            transport.close()
        assert pieces == [b"220 localhost ESMTP\r\n", *(bytes([byte]) for byte in b"250 OK\r\n")]

    virtual.run(scenario())


def test_late_reply_comes_after_its_delay() -> None:
    """A late reply comes after `delay` seconds of the loop's time."""

    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        async with ScriptedServer() as server, server.client() as client:
            server.fail_at("NOOP", "late", delay=50, times=1)
            began = loop.time()
            assert (await client.noop()).code == 250
            assert loop.time() - began == pytest.approx(50)

    virtual.run(scenario())


def test_word_in_the_middle_of_the_body_leaves_it_whole() -> None:
    """A line that is said while the body comes takes nothing from the body."""

    async def scenario() -> None:
        async with ScriptedServer() as server:
            server.fail_at("BODY", "unasked", act=True, times=1)
            async with server.client() as client:
                await send(client)
            assert server.messages[0].content == MESSAGE

    virtual.run(scenario())


def test_handshake_fails_after_the_server_said_220() -> None:
    """A fault at STARTTLS with `act` breaks the handshake itself, after 220."""

    async def scenario() -> None:
        async with ScriptedServer(tls=True) as server:
            server.fail_at("STARTTLS", "garbage", act=True, times=1)
            with pytest.raises(ssl.SSLError):
                await server.client().connect()

    virtual.run(scenario())


def test_reset_is_a_reset() -> None:
    """The fault "rst" reaches the client as a reset, "fin" as an end of file."""

    async def scenario() -> None:
        for how in ("rst", "fin"):
            async with ScriptedServer() as server, raw(server) as say:
                await say(None)
                server.fail_at("NOOP", how, times=1)
                if how == "fin":
                    assert await say(b"NOOP") == [b""]
                else:
                    with pytest.raises(ConnectionResetError):
                        await say(b"NOOP")

    virtual.run(scenario())


def test_refusal_in_the_middle_of_the_body() -> None:
    """A server may refuse a big body before it has read it; a client that reads finds out why."""

    async def scenario() -> None:
        async with ScriptedServer() as server:
            server.on("BODY", "552 5.3.4 too big", close=True, times=1)
            client = server.client()
            await client.connect()
            with pytest.raises(aiosmtplib.SMTPDataError, match="too big"):
                await client.sendmail("a@b.c", "d@e.f", MESSAGE * 100_000)
            client.close()

    asyncio.run(scenario())


@pytest.mark.parametrize("close", [True, "rst", False])
@pytest.mark.parametrize("reply", ["421 4.4.2 idle", b""])
@pytest.mark.parametrize("tls", [False, True])
def test_idle_connections_die(tls: bool, reply: str | bytes, close: Any) -> None:
    """`disconnect` ends the connections that are open now, and those that are made later work."""

    async def scenario() -> None:
        async with ScriptedServer(tls=tls) as server:
            client = server.client()
            await client.connect()
            await client.ehlo()
            server.disconnect(reply, close=close)
            await asyncio.sleep(1)
            assert client.is_connected is not bool(close)
            assert server.open_connections == (not close)
            client.close()
            async with server.client() as another:
                assert await send(another) == {}

    virtual.run(scenario())


# Its life


@RUNNERS
def test_stop_ends_everything_and_start_takes_the_same_port(run: Any) -> None:
    """A stopped server refuses connections and has dropped its own; started again, it is found where it was."""

    async def scenario() -> None:
        server = await ScriptedServer(tls=True).start()
        with pytest.raises(RuntimeError):
            await server.start()
        client = server.client()
        await client.connect()
        await send(client)
        await server.stop()
        await server.aclose()
        await asyncio.sleep(0.01)
        assert not client.is_connected
        with pytest.raises(aiosmtplib.SMTPConnectError):
            await server.client().connect()
        await server.start()
        async with client:
            await send(client)
        assert (len(server.messages), server.connections) == (2, 2)
        await server.stop()

    run(scenario())


def test_other_clients_work() -> None:
    """The standard library's blocking client is served from the loop while it runs in a thread."""

    async def scenario() -> None:
        def blocking() -> None:
            with smtplib.SMTP(server.hostname, server.port, local_hostname="x") as client:
                client.starttls(context=server.tls_context)
                client.login("app", "secret")
                client.sendmail("a@b.c", RECIPIENTS, MESSAGE)

        async with ScriptedServer(tls="required", auth=("app", "secret")) as server:
            await asyncio.to_thread(blocking)
            assert server.received("bob@example.com")[0].content == MESSAGE

    asyncio.run(scenario())


def test_many_clients_at_once() -> None:
    """Two hundred clients at once are served, each once."""

    async def scenario() -> None:
        async def one(number: int) -> None:
            async with server.client() as client:
                await send(client, [f"{number}@example.com"])

        async with ScriptedServer() as server:
            await asyncio.gather(*map(one, range(200)))
            assert sorted(map(len, server.mailboxes.values())) == [1] * 200
            assert server.connections == 200

    virtual.run(scenario())


def test_without_the_extra_the_error_says_what_to_install() -> None:
    """Without aiosmtpd or trustme the import of a server fails with the command that cures it."""
    for missing in ("aiosmtpd", "trustme"):
        program = f"import sys; sys.modules[{missing!r}] = None; from smtpretry.testing import ScriptedServer"
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
        assert "ImportError: smtpretry.testing needs" in done.stderr
        assert "install smtpretry with its extra 'testing'" in done.stderr


# no_wait


def test_no_wait_is_the_policy_without_its_waits() -> None:
    """All but the waiting is as in the policy given; what it would have waited is recorded, and its clock shows it."""

    async def scenario() -> None:
        given = RetryPolicy(max_attempts=3, on_uncertain="raise")
        policy = no_wait(given)
        assert isinstance(policy, RetryPolicy)
        assert (policy.max_attempts, policy.on_uncertain, policy.rules) == (3, "raise", given.rules)
        assert policy.waits == []
        assert policy.sleep is not None
        began = policy.clock()
        assert began == pytest.approx(time.time(), abs=60)
        await policy.sleep(300)
        await policy.sleep(0)
        await policy.sleep(1.5)
        assert policy.waits == [300, 0, 1.5]
        assert policy.clock() - began == pytest.approx(301.5)
        assert no_wait().waits == []

    asyncio.run(scenario())


def test_no_wait_wakes_sleepers_in_the_order_of_their_times() -> None:
    """Several tasks that wait at once go on in the order of their wake times, and the clock never goes back."""

    async def scenario() -> None:
        policy = no_wait()
        began, woken = policy.clock(), []

        async def sleeper(seconds: float) -> None:
            assert policy.sleep is not None
            await policy.sleep(seconds)
            woken.append((seconds, policy.clock() - began))

        lost = asyncio.create_task(sleeper(1))
        tasks = [asyncio.create_task(sleeper(seconds)) for seconds in (900, 5, 60, 5)]
        await asyncio.sleep(0)
        lost.cancel()
        await asyncio.gather(*tasks)
        assert [seconds for seconds, _ in woken] == [5, 5, 60, 900]
        assert [clock for _, clock in woken] == pytest.approx([5, 5, 60, 900])

    asyncio.run(scenario())


# The virtual loop


def test_virtual_time_takes_none() -> None:
    """Sleeps and time-outs pass at once, in order, and by exactly their seconds."""

    async def scenario() -> list[float]:
        loop, woken = asyncio.get_running_loop(), []

        async def sleeper(seconds: float) -> None:
            await asyncio.sleep(seconds)
            woken.append(loop.time())

        await asyncio.gather(sleeper(3600), sleeper(10), sleeper(1e7))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(60):
                await loop.create_future()
        assert virtual.clock() == pytest.approx(virtual.EPOCH + 1e7 + 60)
        return woken

    began = time.monotonic()
    assert virtual.run(scenario()) == pytest.approx([10, 3600, 1e7])
    assert time.monotonic() - began < 1


def test_virtual_time_waits_for_traffic() -> None:
    """As long as the peer answers, no time-out fires, however long the conversation."""

    async def scenario() -> None:
        async with ScriptedServer(tls=True) as server, server.client(timeout=0.001) as client:
            for _ in range(20):
                await client.sendmail("a@b.c", "d@e.f", MESSAGE * 300)
            assert asyncio.get_running_loop().time() == 0

    virtual.run(scenario())


def test_virtual_time_waits_for_threads() -> None:
    """The clock stands still while a thread works."""

    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        gate = threading.Event()
        loop.call_later(0.5, gate.set)
        async with asyncio.timeout(0.001):
            await asyncio.to_thread(time.sleep, 0.05)
        assert loop.time() == 0
        await asyncio.sleep(1)
        assert gate.is_set()

    virtual.run(scenario())


def test_deadlock_is_an_error() -> None:
    """Where nothing can come any more, the run ends with an error that names who waits."""

    async def scenario() -> None:
        async with ScriptedServer():
            await asyncio.get_running_loop().create_future()

    with pytest.raises(virtual.DeadlockError, match="scenario"):
        virtual.run(scenario())


def test_a_limit_of_connections() -> None:
    """Beyond `max_connections` a client hears 421 in place of the banner, until another has gone."""

    async def scenario() -> None:
        async with ScriptedServer(max_connections=1) as server:
            first, second = server.client(), server.client()
            await first.connect()
            with pytest.raises(aiosmtplib.SMTPConnectResponseError, match="too many connections"):
                await second.connect()
            await first.quit()
            await asyncio.sleep(0)
            await second.connect()
            await second.quit()

    asyncio.run(scenario())


def test_a_client_is_made_while_the_time_is_frozen() -> None:
    """With freezegun `datetime` is another class, with which no certificate can be made any more: there is one."""
    script = """
        import datetime
        from smtpretry.testing import ScriptedServer
        class Kind(type):
            def __instancecheck__(cls, one): return isinstance(one, real)
        real = datetime.datetime
        datetime.datetime = Kind("Frozen", (real,), {})
        ScriptedServer(port=25, tls=True).client()
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
