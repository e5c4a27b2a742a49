"""Replies are read in order, whatever comes between them, and what comes beyond them misleads nobody."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import aiosmtplib
import pytest
from aiosmtplib import SMTPResponse
from support import ANN, APP, BOB, BODY, once, patient, talk, virtually

from smtpretry import Status
from smtpretry.session.line import Line
from smtpretry.session.reader import LONGEST_REPLY, NOTHING, Beyond, Replies
from smtpretry.testing import ScriptedServer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


def read(data: bytes, due: int = 1, size: int | None = None) -> Replies:
    """Feed a reader, in pieces of that size."""
    replies = Replies(due)
    for start in range(0, len(data), size or len(data)):
        replies.feed(data[start : start + (size or len(data))])
    return replies


EHLO = b"250-hello\r\n250-SIZE 1000\r\nmore of it\r\n250 HELP\r\n"
IN_ORDER = [
    (b"250 ok\r\n", [(250, "ok")]),
    (b"250\r\n", [(250, "")]),
    (b"250 ok\n", [(250, "ok")]),
    (b"\r\n\r\n250 ok\r\n\r\n354 go on\r\n", [(250, "ok"), (354, "go on")]),
    (b" \t\r\n250 ok\r\n", [(250, "ok")]),
    (EHLO, [(250, "hello\nSIZE 1000\nmore of it\nHELP")]),
    (b"550-see\r\n\r\n100 Main Street\r\n550 bye\r\n", [(550, "see\n\n100 Main Street\nbye")]),
    (b"\xef\xbb\xbf220 a mark\r\n250 ok\r\n", [(220, "a mark"), (250, "ok")]),
    (b"220 the other way round\n\r250 ok\n\r", [(220, "the other way round"), (250, "ok")]),
    (b"220 padded\r\n\x00\x00250 ok\r\n\x00", [(220, "padded"), (250, "ok")]),
    (b"250-one more\r\r\n250 ok\r\r\n", [(250, "one more\nok")]),
    (b"550-\xff\r\n550 x\r\n", [(550, "\udcff\nx")]),
]


@pytest.mark.parametrize(("data", "expected"), IN_ORDER)
@pytest.mark.parametrize("size", [1, 2, 3, 7, None])
def test_replies_are_what_they_are_however_they_are_cut(
    data: bytes, expected: list[tuple[int, str]], size: int | None
) -> None:
    """A reply in any packets is one reply; blank lines between replies, and lines without a code within one, are no end."""
    replies = read(data, len(expected), size)
    assert list(replies.ready) == [SMTPResponse(*each) for each in expected]
    assert (replies.due, replies.fault) == (0, None)


@pytest.mark.parametrize("size", [1, 4, None])
@pytest.mark.parametrize(
    ("more", "beyond"),
    [
        (b"", NOTHING),
        (b"\r\n\r\n", NOTHING),
        (b"what is this?\r\n", NOTHING),
        (b"150 wait\r\n", NOTHING),
        (b"421 4.3.2 Bye\r\n", Beyond(SMTPResponse(421, "4.3.2 Bye"))),
        (b"\r\n221 Bye\r\n250 ok\r\n", Beyond(SMTPResponse(221, "Bye"), frozenset({250}))),
        (b"250-ok\r\n250 id\r\n451 no\r\n", Beyond(further=frozenset({250, 451}))),
    ],
)
def test_what_comes_beyond(more: bytes, beyond: Beyond, size: int | None) -> None:
    """What comes beyond the replies that are due is told apart: nothing that matters, a goodbye, a further reply."""
    replies = read(b"250 first\r\n" + more, 1, size)
    assert (list(replies.ready), replies.beyond) == ([SMTPResponse(250, "first")], beyond)


def test_what_began_before_the_question_is_no_answer() -> None:
    """A reply that had begun to come before the command went out is not taken for the answer to it."""
    replies = read(b"250 first\r\n25")
    replies.expect(1)
    replies.feed(b"0 late\r\n550 the answer\r\n")
    assert list(replies.ready) == [(250, "first"), (550, "the answer")]
    assert replies.beyond.further == {250}


@pytest.mark.parametrize("padding", [b"\r", b"\0", b"\r\n", b"\n\r", b"\0\0"])
def test_what_pads_a_reply_is_not_the_beginning_of_the_next(padding: bytes) -> None:
    """What comes behind a reply, and says nothing, puts nobody out of step."""
    replies = read(b"250 first\r\n" + padding)
    replies.expect(1)
    replies.feed(b"550 the answer\r\n")
    assert list(replies.ready) == [(250, "first"), (550, "the answer")]
    assert replies.beyond is NOTHING


@pytest.mark.parametrize("size", [1, None])
@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"454 4.3.0 Try again later", [(454, "4.3.0 Try again later")]),
        (b"550", [(550, "")]),
        (b"550-no\r\n550 such us", [(550, "no\nsuch us")]),
        (b"550-no\r\n", [(550, "no\n")]),
        (b"450-not\r\n now", [(450, "not\nnow")]),
        (b"250 2.0.0 Ok: que", []),
        (b"250-ok\r\n", []),
        (b"354 go", []),
        (b"45", []),
        (b"4500", []),
        (b"error", []),
    ],
)
def test_a_refusal_needs_no_end(data: bytes, expected: list[tuple[int, str]], size: int | None) -> None:
    """Where the line ends in the midst of a reply, a refusal is told. A success is none yet: the server was not done."""
    replies = read(data, 1, size)
    assert not replies.ready
    replies.end()
    assert list(replies.ready) == expected


def test_a_goodbye_needs_no_end() -> None:
    """Nor does what a server says of its own accord."""
    replies = read(b"250 first\r\n421 4.4.2 Idle")
    replies.end()
    assert replies.beyond.goodbye == (421, "4.4.2 Idle")


@pytest.mark.parametrize(
    "data",
    [
        b"ok\r\n",
        b"25 short\r\n",
        b"2500 long\r\n",
        b"-25 sign\r\n",
        b"\x00x\r\n",
        b"\x16\x03\x01",
        b"\x15\x03\x03\x00\x02\x02\x46",
    ],
)
def test_what_is_no_reply(data: bytes) -> None:
    """Where a reply is due, what is none is a fault, and what was read before it counts."""
    replies = read(b"250 first\r\n" + data, 2)
    assert list(replies.ready) == [(250, "first")]
    assert replies.fault is not None
    assert replies.fault.code == -1


@pytest.mark.parametrize("due", [0, 1])
@pytest.mark.parametrize(
    "line", [b"x" * 1000, b"250-" + b"x" * 996 + b"\r\n", b"250-\r\n" * 200, b"noise\r\n", b"\r\n"]
)
def test_a_flood_takes_little_memory(line: bytes, due: int) -> None:
    """Whatever a server goes on saying, little of it is kept."""
    replies = read(line * 1000, due, 4096)
    assert len(replies._buffer) + sum(len(each) + 1 for each in replies._lines) <= LONGEST_REPLY + 4096
    assert len(replies.ready) <= due


def test_a_line_that_is_too_long_still_says_its_code() -> None:
    """What ends a reply counts, however long it goes on; nothing is read behind it."""
    for data in (b"250 " + b"x" * 70_000 + b"\r\n", b"250 " + b"x" * 70_000):
        replies = read(data, 2, 4096)
        assert [(reply.code, reply.message[:3]) for reply in replies.ready] == [(250, "xxx")]
        assert replies.fault is not None


async def pair(*said: bytes, due: int = 1) -> AsyncIterator[tuple[Line, asyncio.StreamWriter]]:
    """Yield a line, and the server's end of it."""
    accepted: asyncio.Future[asyncio.StreamWriter] = asyncio.get_running_loop().create_future()
    async with await asyncio.start_server(lambda _, writer: accepted.set_result(writer), "127.0.0.1", 0) as server:
        line = Line(lambda _: None, due)
        await asyncio.get_running_loop().create_connection(lambda: line, *server.sockets[0].getsockname())
        writer = await accepted
        for each in said:
            writer.write(each)
        yield line, writer
        line.abort()
        writer.transport.abort()


@virtually
async def test_one_write_many_replies() -> None:
    """Several commands in one write get their replies in order, and after these the error that came behind them."""
    async for line, writer in pair(due=0):
        line.send(b"MAIL\r\nRCPT\r\nDATA\r\n", 3)
        writer.write(b"250 sender\r\n550 recipient\r\n")
        writer.write_eof()
        assert [await line.receive(5), await line.receive(5)] == [(250, "sender"), (550, "recipient")]
        for _ in range(2):
            with pytest.raises(aiosmtplib.SMTPServerDisconnected, match="Unexpected EOF"):
                await line.receive(5)
        assert not line.send(b"RSET\r\n")


@virtually
async def test_each_reply_has_its_own_time() -> None:
    """The time-out is one reply's: what came in time is delivered, what does not come closes the line."""
    async for line, writer in pair(due=3):
        for word in (b"220 first\r\n", b"250 second\r\n"):
            asyncio.get_running_loop().call_later(
                4 * (1 + (word[2:3] == b"0" and word[1:2] == b"5")), writer.write, word
            )
        assert (await line.receive(5)).code == 220
        assert (await line.receive(5)).code == 250
        with pytest.raises(aiosmtplib.SMTPReadTimeoutError):
            await line.receive(5)
        assert not line.is_connected


@virtually
async def test_a_goodbye_between_commands_is_the_answer_to_the_next() -> None:
    """A 421 that came before a command could be said is what the server says to it."""
    async for line, writer in pair(b"220 hello\r\n"):
        assert (await line.receive(5)).code == 220
        writer.write(b"421 4.3.2 Shutting down\r\n")
        await asyncio.sleep(1)
        assert not line.is_connected
        line.send(b"EHLO x\r\n")
        assert await line.receive(5) == (421, "4.3.2 Shutting down")
        with pytest.raises(aiosmtplib.SMTPServerDisconnected):
            await line.receive(5)


@virtually
async def test_the_clients_own_methods_work_over_it() -> None:
    """What aiosmtplib's client does by itself, it does over this line too, STARTTLS included."""
    async with ScriptedServer(tls=True) as server:
        client = server.client(start_tls=False)
        await client.connect()
        transport = client.transport
        assert transport is not None
        line = Line(lambda _: client.close(), due=0)
        transport.set_protocol(line)  # type: ignore[attr-defined]
        line.connection_made(transport)
        client.protocol = line
        await client.ehlo()
        await client.starttls()
        await client.sendmail(APP, [ANN], BODY)
        assert (await client.noop()).code == 250
        with pytest.raises(ValueError, match="control character"):
            await client.execute_command(b"NOOP\r\nRSET")
        await client.quit()
        assert [mail.tls for mail in server.messages] == [True]


# In a session

AGREE = [
    (b"250 Ok\r\n250 Ok id\r\n", Status.ACCEPTED, 250),
    (b"250 Ok\r\n\r\n", Status.ACCEPTED, 250),
    (b"\r\n250 Ok\r\n", Status.ACCEPTED, 250),
    (b"250 Ok\r\nqueued as 17\r\n", Status.ACCEPTED, 250),
    (b"250 Ok\r\n221 Bye\r\n", Status.ACCEPTED, 250),
    (b"250 Ok\r\n421 4.3.2 Bye\r\n", Status.ACCEPTED, 250),
    (b"250-Ok\r\nqueued\r\n250 17\r\n", Status.ACCEPTED, 250),
    (b"259 Ok\r\n", Status.ACCEPTED, 259),
    (b"554 5.6.0 No\r\n554 5.6.0 Never\r\n", Status.REFUSED, 554),
    (b"554 5.6.0 No\r\n451 4.6.0 later\r\n", Status.REFUSED, 554),
    (b"554 5.6.0 No\r\n221 Bye\r\n", Status.REFUSED, 554),
    (b"250 Ok\r\n451 no\r\n", Status.UNCERTAIN, -1),
    (b"554 5.6.0 No\r\n250 Ok\r\n", Status.UNCERTAIN, -1),
    (b"221 Idle timeout\r\n", Status.UNCERTAIN, -1),
    (b"220 hello\r\n", Status.UNCERTAIN, -1),
    (b"251 will forward\r\n", Status.UNCERTAIN, -1),
    (b"200 fine\r\n", Status.UNCERTAIN, -1),
]


STAYS_OPEN = {said for said, *_ in AGREE[1:4]} | {b"250-Ok\r\nqueued\r\n250 17\r\n", b"259 Ok\r\n"}


@pytest.mark.parametrize(("said", "status", "code"), AGREE)
@pytest.mark.parametrize("tls", [False, True])
@virtually
async def test_what_is_said_to_the_dot(said: bytes, status: Status, code: int, *, tls: bool) -> None:
    """The first reply to the dot counts where what comes with it agrees; 250 and unknown 25x alone accept; once."""
    async with talk(once(on_uncertain="raise"), tls=tls) as (server, smtp):
        server.on("END_OF_DATA", said, times=1, accepted=status is Status.ACCEPTED)
        delivery = await smtp.deliver(BODY, sender=APP, recipients=[ANN])
        outcome = delivery.outcomes[ANN]
        assert (outcome.status, outcome.reply and outcome.reply.code) == (status, code)
        assert (await smtp.deliver(BODY, sender=APP, recipients=[BOB])).accepted == [BOB]
        assert server.connections == (1 if said in STAYS_OPEN else 2)


@pytest.mark.parametrize("verb", ["EHLO", "MAIL", "RCPT", "DATA", "RSET"])
@pytest.mark.parametrize("word", [b"221 Idle timeout\r\n", b"220 hello\r\n", b"421 4.4.2 Idle timeout\r\n"])
@virtually
async def test_a_goodbye_in_place_of_a_reply(verb: str, word: bytes) -> None:
    """221 and 220 where a reply is due mean that the session is over: the message goes over another one, once."""
    async with talk(patient()) as (server, smtp):
        server.on("RCPT", BOB, "550 5.1.1 who?")
        server.on(verb, word, times=1, accepted=False, optional=True)
        delivery = await smtp.deliver(BODY, sender=APP, recipients=[BOB, ANN])
        assert (delivery.accepted, list(delivery.refused)) == ([ANN], [BOB])
        assert len(server.messages) == 1


@pytest.mark.parametrize("session", [{}, {"tls": True}])
@virtually
async def test_noise_behind_every_reply(session: Any) -> None:
    """A server that sends a blank line and a word of its own behind each reply is understood, over one connection."""
    async with talk(once(), **session, client={"start_tls": False}, pipelining=False) as (server, smtp):
        for verb, reply in (("MAIL", b"250 ok"), ("RCPT", b"250 ok")):
            server.on(verb, reply + b"\r\n\r\nDEBUG: done\r\n", accepted=True)
        for _ in range(3):
            assert (await smtp.deliver(BODY, sender=APP, recipients=[ANN])).accepted == [ANN]
        assert server.connections == 1


@virtually
async def test_noise_among_answers_to_commands_sent_ahead() -> None:
    """Where the words come between the answers, nothing is sent ahead any more after some tries, and all is understood."""
    async with talk(once()) as (server, smtp):
        server.on("RCPT", b"250 ok\r\n\r\nDEBUG: done\r\n", accepted=True)
        for _ in range(10):
            assert (await smtp.deliver(BODY, sender=APP, recipients=[ANN])).accepted == [ANN]
        assert server.connections == 4
