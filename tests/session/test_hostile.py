"""A server cannot hurt the application: a bounded number of commands, a clear end, and one clean line of it."""

from __future__ import annotations

import asyncio
import itertools
import logging
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import aiosmtplib
import faults
import pytest
import virtual
from faults import FRIEND, RECIPIENTS, SENDER, SMALL, client_for, disagreements, probe

from smtpretry import NO_REPLY, Delivery, RetryingSMTP, Status
from smtpretry.testing import ScriptedServer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from faults import Watched

PASSES = 10  # attempts that half an hour of patience allows, and some more
VERBS = ("CONNECT", "EHLO", "MAIL", "RCPT", "DATA", "END_OF_DATA")


async def deliver(smtp: Watched, recipients: tuple[str, ...] = RECIPIENTS) -> tuple[Delivery, Exception | None]:
    """Send as an application does; return the delivery and what came out, after checking that the two agree."""
    result, error = None, None
    try:
        async with asyncio.timeout(faults.PATIENCE):
            result = await smtp.sendmail(SENDER, list(recipients), SMALL)
    except aiosmtplib.SMTPException as caught:
        error = caught
    delivery = smtp.deliveries[-1]
    assert list(disagreements(delivery, result, error)) == []
    return delivery, error


def told(error: BaseException | None, delivery: Delivery, caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return every line that an application would write down, after checking that each is clean, and of bearable length."""
    lines = [record.getMessage() for record in caplog.records if record.name == "smtpretry"]
    lines += [delivery.story(virtual.EPOCH), *[str(step) for one in delivery.attempts for step in one.steps]]
    lines += getattr(error, "__notes__", [])
    assert lines
    for line in lines:
        assert len(line) < 1000
    lines += [repr(delivery), str(error), repr(error)]
    for line in lines:
        assert faults.clean(line), repr(line)
        line.encode()
    return lines


# Servers that do not speak SMTP


class Liar:
    """A server that is no server: one coroutine for each connection. Counts what came and what it said."""

    def __init__(self, talk: Callable[[Liar, asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]) -> None:
        self.talk = talk
        self.connections = 0
        self.commands: list[bytes] = []
        self.taken: list[list[str]] = []  # the recipients of each message that it took
        self.said = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Talk to one client."""
        self.connections += 1
        try:
            await self.talk(self, reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass
        finally:
            writer.close()

    async def say(self, writer: asyncio.StreamWriter, data: bytes) -> None:
        """Say something."""
        self.said += len(data)
        writer.write(data)
        await writer.drain()

    async def hear(self, reader: asyncio.StreamReader) -> bytes:
        """Return the next command."""
        line = await reader.readuntil(b"\r\n")
        self.commands.append(line)
        return line

    @asynccontextmanager
    async def client(self, **options: object) -> AsyncIterator[Watched]:
        """Listen, and yield a client."""
        server = await asyncio.start_server(self.serve, "127.0.0.1", 0)
        client = aiosmtplib.SMTP(
            hostname="127.0.0.1", port=server.sockets[0].getsockname()[1], local_hostname="client.example"
        )
        smtp = faults.Watched(client, faults.policy(), **options)
        try:
            yield smtp
        finally:
            await smtp.aclose()
            server.close()
            await asyncio.sleep(0.1)
            await server.wait_closed()


async def endless_lines(liar: Liar, _reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """A reply that goes on and on."""
    while True:
        await liar.say(writer, b"220-and then\r\n" * 100)


async def endless_line(liar: Liar, _reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """A line that goes on and on."""
    while True:
        await liar.say(writer, b"220 " + b"x" * 1000)


async def drip(liar: Liar, _reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """A reply that comes so slowly that it never ends, and never is late by itself."""
    while True:
        await liar.say(writer, b"2")
        await asyncio.sleep(50)


async def endless_ehlo(liar: Liar, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Extensions without end."""
    await liar.say(writer, b"220 hello\r\n")
    await liar.hear(reader)
    for number in itertools.count():
        await liar.say(writer, b"250-X%d\r\n" % number)


async def chatter(liar: Liar, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """A thousand answers to each command."""
    await liar.say(writer, b"220 hello\r\n")
    while True:
        await liar.hear(reader)
        await liar.say(writer, b"250 ok\r\n" * 1000)


async def prophet(liar: Liar, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """All answers at once, before anything was asked."""
    await liar.say(writer, b"220 hello\r\n" + b"250 ok\r\n" * 5 + b"354 go on\r\n" + b"250 taken\r\n" * 3)
    while True:
        await liar.hear(reader)


async def prophet_after_ehlo(liar: Liar, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """The same behind EHLO, and every command gets some more."""
    await liar.say(writer, b"220 hello\r\n")
    while True:
        await liar.hear(reader)
        await liar.say(writer, b"250 ok\r\n" * 5 + b"354 go on\r\n" + b"250 taken\r\n" * 3)


async def http(liar: Liar, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Another protocol."""
    await liar.hear(reader)
    await liar.say(writer, b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n")


async def flood_in_the_body(liar: Liar, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Where the body is due, it does not read, and talks without end."""
    await liar.say(writer, b"220 hello\r\n")
    while True:
        line = await liar.hear(reader)
        if line.startswith(b"DATA"):
            await liar.say(writer, b"354 go on\r\n")
            await asyncio.sleep(0.01)
            while True:
                await liar.say(writer, b"x" * 1000)
        await liar.say(writer, b"250 ok\r\n")


async def always_334(liar: Liar, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """A log-in that asks on and on."""
    await liar.say(writer, b"220 hello\r\n")
    while True:
        line = await liar.hear(reader)
        if line.startswith(b"EHLO"):
            await liar.say(writer, b"250-hello\r\n250 AUTH LOGIN PLAIN CRAM-MD5\r\n")
        elif line.startswith(b"MAIL"):
            await liar.say(writer, b"530 5.7.0 Authentication required\r\n")
        else:
            await liar.say(writer, b"334 bW9yZQ==\r\n")


@pytest.mark.parametrize(
    "talk",
    [
        *(endless_lines, endless_line, drip, endless_ehlo, chatter, prophet, prophet_after_ehlo, http),
        *(flood_in_the_body, always_334),
    ],
    ids=lambda talk: talk.__name__,
)
def test_no_smtp(talk: Callable[..., Awaitable[None]], caplog: pytest.LogCaptureFixture) -> None:
    """What is no conversation ends with a refusal or an honest doubt, after few commands and little that was read."""
    caplog.set_level(logging.DEBUG, "smtpretry")

    async def scenario() -> None:
        liar = Liar(talk)
        async with liar.client(username="app", password="secret") as smtp:
            delivery, error = await deliver(smtp)
            assert error is not None
            assert not delivery.accepted
            assert set(delivery.uncertain) <= (set(RECIPIENTS) if talk is flood_in_the_body else set())
            assert len(liar.commands) <= 12 * PASSES
            assert liar.connections <= 2 * PASSES
            assert liar.said < 4_000_000 * PASSES
            assert told(error, delivery, caplog)

    virtual.run(scenario())


# Servers that are out of step


@pytest.mark.parametrize("refused", [(), ("bob",), ("ann", "carol")], ids=lambda names: "+".join(names) or "nobody")
@pytest.mark.parametrize("at", ["EHLO", "MAIL", "RCPT 1", "RCPT 2", "RCPT 3", "DATA", "RSET"])
@pytest.mark.parametrize("said", [b"250 2.0.0 Ok\r\n", b"250 2.0.0 Ok\r\n" * 2, b"550 5.1.1 No\r\n", b"354 go on\r\n"])
def test_an_answer_too_many(at: str, refused: tuple[str, ...], said: bytes) -> None:  # noqa: C901 - a server
    """One reply too many, in a packet of its own: nobody who did not get it is told accepted, and nobody gets it twice.

    The client takes each reply for the answer to the command before it. The verdicts on the recipients of that one
    transaction may change places so, which nobody can tell; that it has lost its step shows at DATA.
    """

    async def talk(liar: Liar, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await liar.say(writer, b"220 hello\r\n")
        recipients, offered = list[str](), 0
        while True:
            line = await liar.hear(reader)
            verb = line[:4].decode()
            answer = b"250 2.0.0 Ok\r\n"
            if verb == "RCPT":
                offered += 1
                who = line.partition(b"<")[2].partition(b">")[0].decode()
                if who.partition("@")[0] in refused:
                    answer = b"550 5.1.1 No such user\r\n"
                else:
                    recipients.append(who)
            elif verb in ("RSET", "MAIL"):
                recipients, offered = [], 0
            elif verb == "DATA":
                answer = b"354 go on\r\n" if recipients else b"503 5.5.1 no recipients\r\n"
            if at in {verb, f"RCPT {offered}"} and liar.connections == 1:
                await liar.say(writer, said)
                await asyncio.sleep(0.01)  # the client has taken it, and sent its next command
            await liar.say(writer, answer)
            if answer.startswith(b"354"):
                await reader.readuntil(b"\r\n.\r\n")
                liar.taken.append(recipients)
                await liar.say(writer, b"250 2.0.0 Taken\r\n")

    async def scenario() -> None:
        liar = Liar(talk)
        async with liar.client() as smtp:
            delivery, _ = await deliver(smtp)
            for who, outcome in delivery.outcomes.items():
                copies = sum(who in taken for taken in liar.taken)
                assert copies <= 1 or outcome.uncertain, (who, outcome)
                if outcome.status is Status.ACCEPTED:
                    assert copies >= 1, (who, outcome)
                elif not outcome.uncertain:
                    assert copies == 0, (who, outcome)
            assert len(liar.commands) < 60
            second = await smtp.deliver(b"\r\n", sender=SENDER, recipients=[FRIEND])
            assert second.accepted == [FRIEND]

    virtual.run(scenario())


# Servers that never relent


@pytest.mark.parametrize("verb", [*VERBS, "RSET", "AUTH"])
@pytest.mark.parametrize("reply", ["530 5.7.0 Authentication required", "421 4.7.0 Go away", "451 4.7.0 Log in first"])
@pytest.mark.parametrize("credentials", [True, False])
def test_for_ever(verb: str, reply: str, *, credentials: bool) -> None:
    """530, 421 and their like for ever end in a bounded number of commands and connections."""

    async def scenario() -> None:
        auth = ("app", "secret") if credentials else None
        async with ScriptedServer(auth=auth, auth_required=False) as server:
            smtp = client_for(server)
            server.on(verb, reply)
            if verb == "AUTH":
                server.on("MAIL", "530 5.7.0 Authentication required")
            if verb == "RSET":
                server.on("DATA", "554 5.6.0 No")
            delivery, _ = await deliver(smtp)
            assert not delivery.accepted
            assert server.messages == []
            assert len(server.commands) <= 12 * PASSES
            assert server.connections <= 2 * PASSES
            assert server.verbs.count("AUTH") <= PASSES
            if reply.startswith("530") and verb in ("MAIL", "RCPT", "DATA"):
                assert len(delivery.attempts) == 1
                assert server.verbs.count("AUTH") == int(credentials)
                assert server.verbs.count("MAIL") == 1 + credentials
            server.clear()
            assert await probe(smtp, server) == []
            await smtp.aclose()

    virtual.run(scenario())


@pytest.mark.parametrize(
    "hint",
    [
        "Greylisted for 315360000 seconds",
        "Greylisted for -300 seconds",
        "Greylisted for 0 seconds",
        "Greylisted for nan seconds",
        "Greylisted for inf seconds",
        "Greylisted for 1e30 seconds",
        f"Greylisted for {10**30} seconds",
        f"try again in {'9' * 400} hours",
        "try again in 99999999:59:59",
        "try again in 10 years",
        "retry-after: -1",
        "retry-after: 18446744073709551616",
        "try again in 0.0000001 seconds",
        "try again in 1 ms",
        "try again in 1 second",
    ],
)
def test_insane_hints(hint: str) -> None:
    """A delay that makes no sense is as good as none: the policy's own waits, within the policy's own limits."""

    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        async with ScriptedServer() as server:
            smtp = client_for(server)
            server.on("RCPT", f"450 4.2.0 {hint}")
            delivery, error = await deliver(smtp, RECIPIENTS[:1])
            assert isinstance(error, aiosmtplib.SMTPRecipientsRefused)
            assert error.recipients[0].code == 450
            assert 1 <= len(delivery.attempts) <= PASSES
            assert loop.time() <= faults.GIVE_UP_AFTER.total_seconds() + 1
            server.clear()
            server.on("RCPT", f"450 4.2.0 {hint}", times=1)
            before = loop.time()
            assert (await smtp.deliver(SMALL, sender=SENDER, recipients=[FRIEND])).accepted == [FRIEND]
            assert loop.time() - before >= 1
            await smtp.aclose()

    virtual.run(scenario())


def test_a_hint_beyond_the_deadline() -> None:
    """A sane delay that lies beyond the deadline ends the wait at once, with the refusal."""

    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        async with ScriptedServer() as server:
            smtp = client_for(server)
            server.on("RCPT", "450 4.2.0 Greylisted for 2 days")
            delivery, error = await deliver(smtp)
            assert isinstance(error, aiosmtplib.SMTPRecipientsRefused)
            assert loop.time() < 1
            assert len(delivery.attempts) == 1
            await smtp.aclose()

    virtual.run(scenario())


# What reaches a log

UNCLEAN = (
    b"5.1.1 \x1b[31mred\x1b[0m \x1b]0;title\x07 \x00 \x08\x08\x08 \x7f",
    b"5.1.1 first\rsecond\x0bthird\x0cfourth",
    b"5.1.1 \xe2\x80\xa8line\xe2\x80\xa9separators \xc2\x85 next line",
    b"5.1.1 \xe2\x80\xaeright to left\xe2\x80\xac \xef\xbb\xbf",
    b"5.1.1 \xff\xfe\xc3\x28 \xed\xa0\x80 no UTF-8",
    b"5.1.1 \x9b31m C1 \x90 controls",
    b"5.1.1 " + b"long " * 1500,
    b"5.1.1 %s %(levelname)s {0} ${jndi:ldap://x}",
)


@pytest.mark.parametrize("text", UNCLEAN, ids=lambda text: repr(text[:16]))
@pytest.mark.parametrize("verb", ["CONNECT", "MAIL", "RCPT", "DATA", "END_OF_DATA"])
@pytest.mark.parametrize("lines", [1, 3])
def test_one_clean_line(verb: str, text: bytes, lines: int, caplog: pytest.LogCaptureFixture) -> None:
    """Whatever bytes a reply has, what reaches a log, an exception or a note is one line that no terminal minds."""
    caplog.set_level(logging.DEBUG, "smtpretry")

    async def scenario() -> None:
        async with ScriptedServer() as server:
            smtp = client_for(server)
            server.on(verb, (b"550-" + text + b"\r\n") * (lines - 1) + b"550 " + text + b"\r\n")
            delivery, error = await deliver(smtp)
            assert error is not None
            assert not delivery.accepted
            assert told(error, delivery, caplog)
            server.clear()
            assert await probe(smtp, server) == []
            await smtp.aclose()

    virtual.run(scenario())


# What is no reply

NO_REPLIES = (
    *(b"150 wait\r\n", b"099 low\r\n", b"000 zero\r\n", b"600 high\r\n", b"999 end\r\n", b"700-a\r\n700 b\r\n"),
    *(b"2_5 underscore\r\n", b"+25 sign\r\n", b"-25 sign\r\n", b"  5 spaces\r\n", b"25 short\r\n", b"2\r\n", b"\r\n"),
    *(b"ok\r\n", b"\xb2\xb5\xb0 not ASCII\r\n", b"25\x00 nul\r\n", b"\x00\r\n"),
)


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("said", NO_REPLIES, ids=repr)
def test_no_reply_at_all(verb: str, said: bytes) -> None:
    """A line that is no reply, or has a code that no reply can have, counts as no reply: closed, and tried again."""

    async def scenario() -> None:
        async with ScriptedServer() as server:
            smtp = client_for(server)
            script = server.on(verb, said, accepted=False)
            delivery, error = await deliver(smtp)
            assert error is not None
            assert script.used > 1
            assert server.messages == []
            end = Status.UNCERTAIN if verb == "END_OF_DATA" else Status.REFUSED
            for outcome in delivery.outcomes.values():
                assert (outcome.status, outcome.reply and outcome.reply.code) == (end, NO_REPLY)
            server.clear()
            assert await probe(smtp, server) == []
            await smtp.aclose()

    virtual.run(scenario())


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("code", [250, 211, 235, 251, 299, 334, 354, 399])
def test_the_wrong_success(verb: str, code: int) -> None:
    """A success of another kind counts by its first digit (RFC 5321 §4.2.1); at the dot 250 alone takes the message."""

    async def scenario() -> None:
        async with ScriptedServer() as server:
            smtp = client_for(server)
            server.on(verb, f"{code} strange")
            delivery, _ = await deliver(smtp)
            for who, outcome in delivery.outcomes.items():
                copies = faults.copies(server, who)
                if outcome.status is Status.ACCEPTED:
                    assert copies == 1, (who, outcome)
                elif not outcome.uncertain:
                    assert copies == 0, (who, outcome)
                    assert outcome.reply is not None
                if verb in ("MAIL", "RCPT") and code < 300:
                    assert outcome.status is Status.ACCEPTED, (who, outcome)
                if verb == "END_OF_DATA":
                    assert outcome.status is (Status.ACCEPTED if code == 250 else Status.UNCERTAIN), (who, outcome)
            server.clear()
            assert await probe(smtp, server) == []
            await smtp.aclose()

    virtual.run(scenario())


@pytest.mark.parametrize(
    "reply", [b"garbage\r\n", b"354 what\r\n", b"999 x\r\n", b"421 4.3.2 Bye\r\n", b"530 5.7.0 No\r\n", b""]
)
@pytest.mark.parametrize("close", [True, False])
def test_rset_never_replaces_the_refusal(reply: bytes, *, close: bool) -> None:
    """Whatever comes of the RSET that follows a refusal, the refusal is what the caller gets."""

    async def scenario() -> None:
        for verb, refusal in (("RCPT", "550 5.1.1 No such user"), ("DATA", "554 5.6.0 No such content")):
            async with ScriptedServer() as server:
                smtp = client_for(server)
                server.on(verb, refusal)
                if reply:
                    server.on("RSET", reply, close=close)
                else:
                    server.fail_at("RSET", "rst" if close else "stall")
                delivery, error = await deliver(smtp)
                assert {str(outcome.reply) for outcome in delivery.outcomes.values()} == {refusal}
                assert isinstance(error, (aiosmtplib.SMTPRecipientsRefused, aiosmtplib.SMTPDataError))
                assert "RSET" in server.verbs
                server.clear()
                assert await probe(smtp, server) == []
                await smtp.aclose()

    virtual.run(scenario())


def test_a_server_that_echoes_shows_no_password(caplog: pytest.LogCaptureFixture) -> None:
    """Not even a server that says the password shows it to a log."""
    caplog.set_level(logging.DEBUG)

    async def scenario() -> None:
        async with ScriptedServer(auth=("app", "other")) as server:
            smtp = RetryingSMTP(server.client(), faults.policy(), username="app", password="secret-7")
            server.on("AUTH", "535 5.7.8 Wrong: AGFwcABzZWNyZXQtNw==")
            delivery = await smtp.deliver(SMALL, sender=SENDER, recipients=[FRIEND])
            assert delivery.refused
            lines = told(None, delivery, caplog)
            assert not any("secret-7" in line or "AGFwcABzZWNyZXQtNw==" in line for line in lines)
            await smtp.aclose()

    virtual.run(scenario())
