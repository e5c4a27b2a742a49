"""examples/django_app.py, started as its docstring says, and asked over HTTP."""

from __future__ import annotations

import ast
import asyncio
import os
import re
import shlex
import signal
import sys
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from smtpretry.testing import ScriptedServer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine

ROOT = Path(__file__).parents[1]
DOCSTRING = ast.get_docstring(ast.parse((ROOT / "examples/django_app.py").read_text())) or ""
COMMAND = re.search(r"`(uvicorn .*?)`", DOCSTRING)[1]  # type: ignore[index]
ORDER = {"email": "bob@example.com", "text": "Two, please."}
BOB, ORDERS = "bob@example.com", "orders@example.com"
PATIENCE = 20  # seconds for what takes one or two


class Site:
    """The application in a process of its own: a client for it, and what it wrote."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.log = ""

    async def read(self, until: str | None = None) -> str:
        """Read what it writes, as far as the line with this, or to its end."""
        while line := (await self.process.stderr.readline()).decode():  # type: ignore[union-attr]
            self.log += line
            if until is not None and until in line:
                return line
        return ""

    async def order(self, **fields: Any) -> httpx.Response:
        async with httpx.AsyncClient(base_url=self.url, timeout=PATIENCE) as client:
            return await client.post("/orders", data=ORDER | fields.pop("data", {}), **fields)

    async def stop(self) -> None:
        """Ask it to end, and read all that it has to say."""
        self.process.send_signal(signal.SIGTERM)
        await self.read()
        await self.process.wait()

    @property
    def url(self) -> str:
        return re.search(r"http://\S+", self.log)[0]  # type: ignore[index]


@asynccontextmanager
async def site(server: ScriptedServer) -> AsyncIterator[Site]:
    """Start the application as the docstring says, on a free port, with this mail server. It ends in good order."""
    program, *arguments = shlex.split(COMMAND)
    env = os.environ | {"UVICORN_PORT": "0", "SMTP_HOST": server.hostname, "SMTP_PORT": str(server.port)}
    process = await asyncio.create_subprocess_exec(
        Path(sys.executable).with_name(program), *arguments, cwd=ROOT, env=env, stderr=asyncio.subprocess.PIPE
    )
    running = Site(process)
    try:
        async with asyncio.timeout(PATIENCE):
            assert await running.read(until="running on"), running.log
            yield running
            if process.returncode is None:
                await running.stop()
        assert "Traceback" not in running.log
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()


def in_a_loop(test: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    """Run a test on an event loop, in real time."""

    def run() -> None:
        asyncio.run(test())

    run.__doc__ = test.__doc__
    return run


async def until(condition: Callable[[], object]) -> None:
    """Wait for something that another process brings about."""
    while not condition():  # noqa: ASYNC110 - it is a list in the server that grows
        await asyncio.sleep(0.01)


@in_a_loop
async def test_a_greylisted_mail_arrives_once() -> None:
    """The request waits for the greylisting server, and each recipient has the mail once."""
    async with ScriptedServer() as server, site(server) as shop:
        server.on("RCPT", BOB, "450 4.2.0 Greylisted, try again in 1 second", times=1)
        response = await shop.order()
        assert (response.status_code, response.json()["status"]) == (200, "ACCEPTED")
        assert {who: len(messages) for who, messages in server.mailboxes.items()} == {BOB: 1, ORDERS: 1}
        assert len({message.content for message in server.messages}) == 1


@in_a_loop
async def test_a_refusal_reaches_the_answer() -> None:
    """What the server says about the customer's address is in the answer; the shop has its copy."""
    async with ScriptedServer() as server, site(server) as shop:
        server.on("RCPT", BOB, "550 5.1.1 User unknown", times=1)
        response = await shop.order()
        assert response.status_code == 502
        assert response.json() == {"status": "REFUSED", "reply": "550 5.1.1 User unknown"}
        assert list(server.mailboxes) == [ORDERS]


@in_a_loop
async def test_a_wait_that_is_too_long_for_a_request_is_passed_on() -> None:
    """A server that wants the mail in five minutes is a 503 that says so, at once, and nobody has the mail."""
    async with ScriptedServer() as server, site(server) as shop:
        server.on("MAIL", "451 4.7.1 Greylisted, try again in 300 seconds", times=1)
        response = await shop.order()
        assert (response.status_code, response.headers["Retry-After"]) == (503, "300")
        assert response.json() == {"status": "REFUSED", "reply": "451 4.7.1 Greylisted, try again in 300 seconds"}
        assert not server.messages


@in_a_loop
async def test_nobody_is_asked_to_repeat_what_others_have() -> None:
    """Where one recipient has the mail, and the other would have to wait too long, the answer is no 503."""
    async with ScriptedServer() as server, site(server) as shop:
        server.on("RCPT", BOB, "450 4.2.0 Greylisted, try again in 300 seconds", times=1)
        response = await shop.order()
        assert (response.status_code, "Retry-After" in response.headers) == (502, False)
        assert list(server.mailboxes) == [ORDERS]


@in_a_loop
async def test_the_mail_arrives_intact() -> None:
    """Umlauts, a line "From", dots and any bytes reach a server that takes seven bits, and no header tells of the Bcc."""
    text, drawing = "Schöne Grüße\n.\nFrom Jörg\n…", bytes(range(256)) * 300
    async with ScriptedServer(eightbitmime=False) as server, site(server) as shop:
        response = await shop.order(data={"text": text}, files={"drawing": ("Übersicht.bin", drawing)})
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


@in_a_loop
async def test_all_requests_share_one_client() -> None:
    """Twenty orders at once go over one connection, and all arrive; the application ends with QUIT."""
    async with ScriptedServer() as server, site(server) as shop:
        customers = [f"{number}@example.com" for number in range(20)]
        responses = await asyncio.gather(*(shop.order(data={"email": who}) for who in customers))
        assert {response.status_code for response in responses} == {200}
        assert sorted(who for who in server.mailboxes if who != ORDERS) == sorted(customers)
        assert server.connections == 1
        await shop.stop()
        assert server.verbs[-1] == "QUIT"


@in_a_loop
async def test_a_customer_who_goes_away_leaves_the_mail_behind() -> None:
    """Whoever hangs up before the answer does not take the mail along, and the application does not end without it."""
    async with ScriptedServer() as server, site(server) as shop:
        script = server.on("MAIL", "451 4.7.1 Greylisted, try again in 1 second", times=1)
        url = httpx.URL(shop.url)
        _, writer = await asyncio.open_connection(url.host, url.port)
        form = str(httpx.QueryParams(ORDER)).encode()
        writer.write(b"POST /orders HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/x-www-form-urlencoded\r\n")
        writer.write(b"Content-Length: %d\r\n\r\n%s" % (len(form), form))
        await until(lambda: script.used)
        writer.close()
        await writer.wait_closed()
        await shop.stop()
        assert [message.recipients for message in server.messages] == [[BOB, ORDERS]]


@pytest.mark.parametrize("email", ["", "bob", "bob@example.com\r\nBcc: eve@example.com"])
def test_a_wrong_order_is_not_sent(email: str) -> None:
    """What is no address is a 400 that names the field."""

    async def scenario() -> None:
        async with ScriptedServer() as server, site(server) as shop:
            response = await shop.order(data={"email": email})
            assert (response.status_code, list(response.json())) == (400, ["email"])
            assert not server.connections

    asyncio.run(scenario())
