"""Commands go ahead of the answers where the server offers it (RFC 2920), and nothing is taken for what it is not."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

import aiosmtplib
import pytest
import uvloop
import virtual
from support import ANN, APP, BOB, BODY, CAT, DAN, GREYLISTED, PASSWORD, USER, patient, talk, virtually

from smtpretry import NO_REPLY, RetryingSMTP
from smtpretry.testing import ScriptedServer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

PEOPLE = [ANN, BOB, CAT]


class Listener:
    """A server that answers each packet as a whole, and keeps the packets; `answers` are those to envelopes."""

    def __init__(self, *answers: str, offers: str = "PIPELINING", closes: bool = False) -> None:
        self.answers, self.offers, self.closes = list(answers), offers, closes
        self.packets = list[list[str]]()  # the verbs of each, since the banner
        self.connections = 0
        self.messages = list[bytes]()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Talk to one client."""
        self.connections += 1
        writer.write(b"220 hello\r\n")
        body: bytes | None = None
        while data := await reader.read(2**16):
            if body is not None:
                body += data
                if body.endswith(b"\r\n.\r\n") or body == b".\r\n":
                    self.messages.append(body)
                    writer.write(b"250 taken\r\n")
                    body = None
                continue
            lines = data.decode().splitlines()
            self.packets.append([line.split(":")[0].split()[0] for line in lines])
            said = [self.say(line) for line in lines]
            if self.answers and lines[0].startswith("MAIL"):
                said = self.answers.pop(0).split("|")
                writer.write("".join(f"{one}\r\n" for one in said if one).encode())
                if self.closes:
                    break
            else:
                writer.write("".join(f"{one}\r\n" for one in said).encode())
            body = b"" if said[-1].startswith("354") else None
        writer.close()

    def say(self, line: str) -> str:
        """Return the answer to a command."""
        match line.split(":", maxsplit=1)[0].split(maxsplit=1)[0]:
            case "EHLO":
                return f"250-hello\r\n250 {self.offers}"
            case "DATA":
                return "354 go on"
        return "250 ok"

    @contextlib.asynccontextmanager
    async def client(self, **options: Any) -> AsyncIterator[RetryingSMTP]:
        """Listen, and yield a client."""
        server = await asyncio.start_server(self.serve, "127.0.0.1", 0)
        client = aiosmtplib.SMTP(
            hostname="127.0.0.1", port=server.sockets[0].getsockname()[1], local_hostname="c.example"
        )
        async with RetryingSMTP(client, patient(), **options) as smtp:
            yield smtp
        server.close()
        await asyncio.sleep(0.1)
        await server.wait_closed()

    @property
    def envelopes(self) -> list[list[str]]:
        """The packets of commands."""
        return [one for one in self.packets if one[0] not in {"EHLO", "QUIT"}]


@virtually
async def test_what_goes_in_one_write() -> None:
    """The first transaction waits for the first recipient's answer; later ones send MAIL, every RCPT and DATA at once."""
    server = Listener()
    async with server.client() as smtp:
        for _ in range(2):
            await smtp.sendmail(APP, PEOPLE, BODY)
    assert server.envelopes == [["MAIL", "RCPT"], ["RCPT", "RCPT", "DATA"], ["MAIL", "RCPT", "RCPT", "RCPT", "DATA"]]
    assert len(server.messages) == 2


@pytest.mark.parametrize(("offers", "options"), [("SIZE", {}), ("PIPELINING", {"pipelining": False})])
@virtually
async def test_one_by_one(offers: str, options: dict[str, Any]) -> None:
    """Where it is not offered, or is turned off, each command waits for the answer to the one before."""
    server = Listener(offers=offers)
    async with server.client(**options) as smtp:
        for _ in range(2):
            await smtp.sendmail(APP, PEOPLE, BODY)
    assert all(len(packet) == 1 for packet in server.packets)


@virtually
async def test_many_recipients_go_in_parts() -> None:
    """A write holds no more than a hundred commands, and no body goes with them."""
    server = Listener()
    people = [f"p{number}@example.com" for number in range(250)]
    async with server.client() as smtp:
        assert await smtp.sendmail(APP, people, BODY) == ({}, "taken")
    assert [len(packet) for packet in server.envelopes] == [2, 100, 100, 50]


@pytest.mark.parametrize(
    "answer",
    [
        "250 ok",
        "250 ok|250 ok",
        "250 ok|250 ok|250 ok|354 go on",
        "250 ok|250 ok|250 ok|250 ok|250 ok",
        "250 ok|250 ok|250 ok|250 ok|354 go on|250 unasked",
        "451 4.3.0 later|250 ok|503 no|503 no|503 no",
        "451 4.3.0 later|503 no|503 no|503 no|354 go on",
        "250 ok|354 go on|250 ok|250 ok|354 go on",
        "250 ok|250 ok|what is this|250 ok|354 go on",
        "250 ok|550 5.1.1 who?|250 ok",
        "250 ok|250 ok|502 5.5.2 Error: command not recognized|502 5.5.2 Error: command not recognized|354 go on",
        "250 ok|500 what?|250 ok|250 ok|354 go on",
        "250 ok|250 ok|250 ok|503 5.5.1 Bad sequence of commands|503 5.5.1 Bad sequence of commands",
        "250 ok|250 ok|250 ok|250 ok|503 5.5.1 Bad sequence of commands",
        "",
    ],
)
@pytest.mark.parametrize("closes", [True, False])
@virtually
async def test_answers_that_do_not_fit(answer: str, closes: bool) -> None:
    """Where they do not tell which command each one answers, nobody is blamed: it goes on at once, one by one."""
    server = Listener(closes=closes)
    async with server.client() as smtp:
        await smtp.sendmail(APP, PEOPLE, BODY)
        server.answers = [answer]
        began = virtual.clock()
        delivery = await smtp.deliver(BODY, sender=APP, recipients=PEOPLE)
        assert virtual.clock() - began <= 61  # a missing answer is waited for
        assert delivery.accepted == PEOPLE
        assert [outcome.alone for outcome in delivery.outcomes.values()] == [False] * 3
        assert len(delivery.attempts) == 1
    assert (len(server.messages), server.connections) == (2, 2)
    assert server.envelopes[-4:] == [["MAIL"], ["RCPT"], ["RCPT"], ["RCPT"]] or server.envelopes[-1] == ["DATA"]


@virtually
async def test_a_server_that_cannot_do_it() -> None:
    """A server that offers it and answers it wrongly three times in a row is asked one by one from then on."""
    wrong = "250 ok|250 ok|250 ok|250 ok|250 ok"
    server = Listener()
    async with server.client() as smtp:
        await smtp.sendmail(APP, PEOPLE, BODY)
        for number in range(8):
            server.answers = [wrong] if number < 6 else []
            if number % 2:
                server.answers = []
            await smtp.sendmail(APP, PEOPLE, BODY)
    assert len(server.messages) == 9


@pytest.mark.parametrize("refused", [[ANN], [BOB], [CAT], [ANN, CAT], PEOPLE])
@virtually
async def test_refusals_among_commands_sent_ahead(refused: list[str]) -> None:
    """Each recipient gets its own answer; a lone dot ends a transaction that nobody was taken for."""
    async with talk() as (server, smtp):
        await smtp.sendmail(APP, [DAN], BODY)
        for who in refused:
            server.on("RCPT", who, "550 5.1.1 No such user")
        delivery = await smtp.deliver(BODY, sender=APP, recipients=PEOPLE)
        assert list(delivery.refused) == refused
        assert delivery.accepted == [who for who in PEOPLE if who not in refused]
        assert server.connections == 1
        assert [len(server.received(who)) for who in PEOPLE] == [int(who not in refused) for who in PEOPLE]
        await smtp.sendmail(APP, [DAN], BODY)
        assert [message.content for message in server.messages if not message.content.strip()] == []


@virtually
async def test_a_log_in_that_is_asked_for_after_some_were_taken() -> None:
    """A 530 to one of the recipients, and a 354 for the others: nobody gets an empty message, and all get theirs once."""
    async with talk(
        auth=(USER, PASSWORD), auth_required=False, credentials={"username": USER, "password": PASSWORD}
    ) as (
        server,
        smtp,
    ):
        await smtp.sendmail(APP, [DAN], BODY)
        server.on("RCPT", BOB, "530 5.7.0 Authentication required", times=1)
        delivery = await smtp.deliver(BODY, sender=APP, recipients=PEOPLE)
        assert delivery.accepted == PEOPLE
        assert [len(server.received(who)) for who in PEOPLE] == [1, 1, 1]
        assert len({message.content for message in server.messages}) == 1


@virtually
async def test_a_transaction_that_is_full() -> None:
    """Who was taken before and after the first "too many" goes now, and the others at once."""
    async with talk(max_recipients=2) as (server, smtp):
        people = [f"p{number}@example.com" for number in range(30)]
        assert (await smtp.deliver(BODY, sender=APP, recipients=people)).accepted == people
        assert sorted(who for message in server.messages for who in message.recipients) == sorted(people)
        assert virtual.clock() == virtual.EPOCH


@virtually
async def test_greylisted_recipients_come_back_together() -> None:
    """All of fifty, refused ahead of one another, come back in one transaction."""
    async with talk() as (server, smtp):
        people = [f"p{number}@example.com" for number in range(50)]
        for who in people:
            server.on("RCPT", who, GREYLISTED, times=1)
        delivery = await smtp.deliver(BODY, sender=APP, recipients=people)
        assert delivery.accepted == people
        assert (len(delivery.attempts), len(server.messages)) == (2, 1)


@pytest.mark.parametrize("how", ["fin", "rst"])
@virtually
async def test_who_ends_the_connection_is_found_and_the_others_go_at_once(how: str) -> None:
    """A recipient whose RCPT ends the connection, ahead and one by one, keeps nobody else from getting the mail."""
    async with talk() as (server, smtp):
        await smtp.sendmail(APP, [DAN], BODY)
        server.fail_at("RCPT", how, BOB)
        sending = asyncio.ensure_future(smtp.deliver(BODY, sender=APP, recipients=PEOPLE))
        await asyncio.sleep(1)
        assert [len(server.received(who)) for who in PEOPLE] == [1, 0, 1]
        delivery = await sending
        assert delivery.refused[BOB].code == NO_REPLY


@pytest.mark.parametrize("said", ["421 4.7.0 Too many recipients", "421 4.5.3 Too many recipients in this session", ""])
@pytest.mark.parametrize("offers", ["PIPELINING", "SIZE"])
@virtually
async def test_where_too_many_recipients_end_the_connection_they_go_in_parts(offers: str, said: str) -> None:
    """A server that hangs up at one recipient too many, whoever it is, gets as many as it took before."""
    taken = list[list[str]]()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        recipients = list[str]()
        writer.write(b"220 hello\r\n")
        while line := (await reader.readline()).decode().strip():
            reply = "250 ok"
            match line.split(":", maxsplit=1)[0].split(maxsplit=1)[0]:
                case "EHLO":
                    reply = f"250-hello\r\n250 {offers}"
                case "MAIL":
                    recipients = []
                case "RCPT" if len(recipients) == 10:
                    writer.write(f"{said}\r\n".encode() if said else b"")
                    break
                case "RCPT":
                    recipients.append(line.partition("<")[2].partition(">")[0])
                case "DATA":
                    writer.write(b"354 go on\r\n")
                    await reader.readuntil(b"\r\n.\r\n")
                    taken.append(recipients)
            writer.write(f"{reply}\r\n".encode())
        writer.close()

    people = [f"p{number}@example.com" for number in range(100)]
    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        client = aiosmtplib.SMTP(hostname="127.0.0.1", port=port, local_hostname="c.example")
        async with RetryingSMTP(client, patient()) as smtp:
            delivery = await smtp.deliver(BODY, sender=APP, recipients=people)
    assert delivery.accepted == people
    assert sorted(who for each in taken for who in each) == sorted(people)
    assert len(taken) <= 12


@pytest.mark.parametrize("tls", [False, True, "implicit"])
def test_on_uvloop_as_on_asyncio(tls: Any) -> None:
    """The same holds on uvloop, in the clear and under TLS."""

    async def scenario() -> None:
        async with ScriptedServer(tls=tls) as server, RetryingSMTP(server.client(), patient(clock=lambda: 0.0)) as smtp:
            for _ in range(3):
                await smtp.sendmail(APP, PEOPLE, BODY + 300 * (b"x" * 998 + b"\r\n"))
            assert [len(server.received(who)) for who in PEOPLE] == [3, 3, 3]

    for factory in (asyncio.new_event_loop, uvloop.new_event_loop):
        with asyncio.Runner(loop_factory=factory) as runner:
            runner.run(scenario())
