"""Through real servers that offer PIPELINING (RFC 2920): commands do go out ahead of the answers, and arrive in order."""

from __future__ import annotations

import asyncio
import contextlib
import re
from typing import TYPE_CHECKING, Any

import aiosmtplib
import mta
import pytest
from mta import Exim, Postfix, Service, require
from rows import ANN, PEOPLE, Case, mail

from smtpretry import RetryingSMTP

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from mta import MailServer

    Serve = Callable[..., contextlib.AbstractContextManager[MailServer]]

CASE = Case(name="commands-ahead", recipients=PEOPLE, messages=3, says=())
WITHOUT = {Postfix: {"smtpd_discard_ehlo_keywords": "pipelining"}, Exim: {"pipelining_advertise_hosts": ""}}
COMMAND = re.compile(rb"^(?:EHLO|MAIL FROM|RCPT TO|DATA|QUIT)\b", re.MULTILINE)


@pytest.fixture
def serve(certificate: bytes) -> Serve:
    """Give what runs a server of a kind, with settings."""

    @contextlib.contextmanager
    def run(kind: type[MailServer], **settings: str) -> Iterator[MailServer]:
        require(kind)
        service = Service(name=CASE.name, settings=settings)
        offer: Any = service if kind is Exim else [service]
        with mta.workplace() as directory, kind(directory / "server", offer, PEOPLE, certificate) as server:
            yield server

    return run


@contextlib.asynccontextmanager
async def relay(port: int) -> AsyncIterator[tuple[int, list[bytes]]]:
    """Stand between clients and a port: give a port of its own, and each piece of what the clients send, as it comes."""
    pieces, connections = list[bytes](), list[asyncio.Task[None] | None]()

    async def pass_on(source: asyncio.StreamReader, target: asyncio.StreamWriter, seen: list[bytes]) -> None:
        while piece := await source.read(65536):
            seen.append(piece)
            target.write(piece)
            await target.drain()
        target.close()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(asyncio.current_task())
        answers, server = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.gather(pass_on(reader, server, pieces), pass_on(answers, writer, []))

    async with await asyncio.start_server(connected, "127.0.0.1", 0) as listening:
        yield listening.sockets[0].getsockname()[1], pieces
    await asyncio.gather(*filter(None, connections))


async def send_through_a_relay(server: MailServer) -> list[bytes]:
    """Send the messages over one connection, and return each piece that came from the client."""
    async with relay(server.port(CASE.name)) as (port, pieces):
        client = aiosmtplib.SMTP(hostname="127.0.0.1", port=port, start_tls=False)
        async with RetryingSMTP(client) as smtp:
            for _ in range(CASE.messages):
                message = mail(CASE)
                assert sorted((await smtp.deliver(message)).accepted) == sorted(PEOPLE)
                copies = [await asyncio.to_thread(server.copies, who, message["Message-ID"]) for who in PEOPLE]
                assert copies == [1] * len(PEOPLE)
        return pieces


def assert_in_step(server: MailServer) -> None:
    assert not [text for text in server.out_of_step if server.has_logged(CASE.name, text)]


@pytest.mark.parametrize("kind", [Postfix, Exim])
def test_commands_go_out_ahead_of_the_answers(kind: type[MailServer], serve: Serve) -> None:
    """A message costs two round trips, the first of a connection three, however many recipients it has."""
    with serve(kind) as server:
        pieces = asyncio.run(send_through_a_relay(server))
        assert max(len(COMMAND.findall(piece)) for piece in pieces) > len(PEOPLE)
        assert len(pieces) <= len(["EHLO", "QUIT"]) + 3 + 2 * (CASE.messages - 1)
        assert_in_step(server)


@pytest.mark.parametrize("kind", [Postfix, Exim])
def test_nothing_goes_out_ahead_where_it_is_not_offered(kind: type[MailServer], serve: Serve) -> None:
    """To a server that does not offer PIPELINING, each command waits for the answer to the one before."""
    with serve(kind, **WITHOUT[kind]) as server:
        pieces = asyncio.run(send_through_a_relay(server))
        assert {len(COMMAND.findall(piece)) for piece in pieces} == {0, 1}  # of a body, none
        assert sum(len(COMMAND.findall(piece)) for piece in pieces) == 2 + CASE.messages * (len(PEOPLE) + 2)
        assert_in_step(server)


@pytest.mark.parametrize(("settings", "ahead"), [({}, True), (WITHOUT[Exim], False)])
def test_exim_itself_says_who_sends_ahead(settings: dict[str, str], ahead: bool, serve: Serve) -> None:
    """Exim's own log says that the commands came ahead of the answers, where it offers that, under TLS too."""
    with serve(Exim, **settings) as server:

        async def send() -> None:
            client = aiosmtplib.SMTP(
                hostname="localhost", port=server.port(CASE.name), start_tls=True, validate_certs=False
            )
            async with RetryingSMTP(client) as smtp:
                for recipients in (PEOPLE, (ANN,)):
                    await smtp.sendmail("app@sender.test", recipients, mail(CASE).as_bytes())

        asyncio.run(send())
        assert server.pipelined() == [ahead, ahead]
        assert_in_step(server)
