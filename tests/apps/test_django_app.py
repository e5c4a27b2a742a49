"""examples/django_app.py, started as its docstring says, and asked over HTTP."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from programs import PATIENCE, Program, command, in_real_time, running, until
from support import BOB

from smtpretry.testing import ScriptedServer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

ORDERS = "orders@example.com"
ORDER = {"email": BOB, "text": "Two, please."}


class Shop:
    """The application, and how a customer orders there."""

    def __init__(self, program: Program, url: str) -> None:
        self.program = program
        self.url = httpx.URL(url)

    async def order(self, files: Any = None, **fields: str) -> httpx.Response:
        async with httpx.AsyncClient(base_url=self.url, timeout=PATIENCE) as client:
            return await client.post("/orders", data=ORDER | fields, files=files)


@asynccontextmanager
async def shop_and_mail_server(**settings: Any) -> AsyncIterator[tuple[Shop, ScriptedServer]]:
    """Start a mail server, and the application for it as the docstring says, on a free port. It ends in good order."""
    async with ScriptedServer(**settings) as server:
        env = {"UVICORN_PORT": 0, "SMTP_HOST": server.hostname, "SMTP_PORT": server.port}
        async with running(command("django_app"), **env) as program:
            yield Shop(program, (await program.says(r"running on (http://\S+)"))[1]), server
            await program.stop()
    assert "Finished server process" in program.log
    assert "Traceback" not in program.log


@in_real_time
async def test_a_greylisted_mail_arrives_once() -> None:
    """The request waits for the greylisting server, and each recipient has the mail once."""
    async with shop_and_mail_server() as (shop, server):
        server.on("RCPT", BOB, "450 4.2.0 Greylisted, try again in 1 second", times=1)
        response = await shop.order()
        assert (response.status_code, response.json()["status"]) == (200, "ACCEPTED")
        assert {who: len(messages) for who, messages in server.mailboxes.items()} == {BOB: 1, ORDERS: 1}
        assert len({message.content for message in server.messages}) == 1


@in_real_time
async def test_bounces_go_to_djangos_from_email() -> None:
    """The envelope's sender is from_email; the customer sees the From of the headers."""
    async with shop_and_mail_server() as (shop, server):
        assert (await shop.order()).status_code == 200
        [received] = server.messages
        assert received.sender == "bounces@example.com"
        assert received.message["From"] == "The shop <shop@example.com>"


@in_real_time
async def test_a_refusal_reaches_the_answer() -> None:
    """What the server says about the customer's address is in the answer; the shop has its copy."""
    async with shop_and_mail_server() as (shop, server):
        server.on("RCPT", BOB, "550 5.1.1 User unknown", times=1)
        response = await shop.order()
        assert response.status_code == 502
        assert response.json() == {"status": "REFUSED", "reply": "550 5.1.1 User unknown"}
        assert list(server.mailboxes) == [ORDERS]


@in_real_time
async def test_a_wait_that_is_too_long_for_a_request_is_passed_on() -> None:
    """A server that wants the mail in five minutes is a 503 that says so, at once, and nobody has the mail."""
    async with shop_and_mail_server() as (shop, server):
        server.on("MAIL", "451 4.7.1 Greylisted, try again in 300 seconds", times=1)
        response = await shop.order()
        assert (response.status_code, response.headers["Retry-After"]) == (503, "300")
        assert response.json() == {"status": "REFUSED", "reply": "451 4.7.1 Greylisted, try again in 300 seconds"}
        assert not server.messages


@in_real_time
async def test_nobody_is_asked_to_repeat_what_others_have() -> None:
    """Where one recipient has the mail, and the other would have to wait too long, the answer is no 503."""
    async with shop_and_mail_server() as (shop, server):
        server.on("RCPT", BOB, "450 4.2.0 Greylisted, try again in 300 seconds", times=1)
        response = await shop.order()
        assert (response.status_code, "Retry-After" in response.headers) == (502, False)
        assert list(server.mailboxes) == [ORDERS]


@in_real_time
async def test_the_mail_arrives_intact() -> None:
    """Umlauts, a line "From", dots and any bytes reach a server that takes seven bits, and no header tells of the Bcc."""
    text, drawing = "Schöne Grüße\n.\nFrom Jörg\n…", bytes(range(256)) * 300
    async with shop_and_mail_server(eightbitmime=False) as (shop, server):
        response = await shop.order(text=text, files={"drawing": ("Übersicht.bin", drawing)})
        assert response.status_code == 200
        assert ORDERS not in response.text
        [received] = server.messages
        assert received.recipients == [BOB, ORDERS]
        assert ORDERS.encode() not in received.content
        assert received.content.isascii()
        body = received.message.get_body()
        [attachment] = received.message.iter_attachments()
        assert body is not None
        assert body.get_content().splitlines() == text.splitlines()
        assert (attachment.get_filename(), attachment.get_content()) == ("Übersicht.bin", drawing)


@in_real_time
async def test_all_requests_share_one_client() -> None:
    """Twenty orders at once go over one connection, and all arrive; the application ends with QUIT."""
    customers = [f"{number}@example.com" for number in range(20)]
    async with shop_and_mail_server() as (shop, server):
        responses = await asyncio.gather(*(shop.order(email=who) for who in customers))
        assert {response.status_code for response in responses} == {200}
        assert "QUIT" not in server.verbs
    assert sorted(who for who in server.mailboxes if who != ORDERS) == sorted(customers)
    assert (server.connections, server.verbs[-1]) == (1, "QUIT")


@in_real_time
async def test_a_customer_who_goes_away_leaves_the_mail_behind() -> None:
    """Whoever hangs up before the answer does not take the mail along, and the application does not end without it."""
    async with shop_and_mail_server() as (shop, server):
        greylisting = server.on("MAIL", "451 4.7.1 Greylisted, try again in 1 second", times=1)
        form = str(httpx.QueryParams(ORDER)).encode()
        _, writer = await asyncio.open_connection(shop.url.host, shop.url.port)
        writer.write(b"POST /orders HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/x-www-form-urlencoded\r\n")
        writer.write(b"Content-Length: %d\r\n\r\n%s" % (len(form), form))
        await until(lambda: greylisting.used)
        writer.close()
        await writer.wait_closed()
    assert [message.recipients for message in server.messages] == [[BOB, ORDERS]]


@pytest.mark.parametrize("email", ["", "bob", "bob@example.com\r\nBcc: eve@example.com"])
@in_real_time
async def test_a_wrong_order_is_not_sent(email: str) -> None:
    """What is no address is a 400 that names the field."""
    async with shop_and_mail_server() as (shop, server):
        response = await shop.order(email=email)
        assert (response.status_code, list(response.json())) == (400, ["email"])
        assert not server.connections
