"""The FastAPI example on real ports: it answers at once, tells how it is, and loses nothing when it stops."""

from __future__ import annotations

import asyncio
import os
import re
import shlex
import signal
import socket
import sys
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fastapi_app
import httpx
import mta
import pytest
import uvicorn
from programs import until
from support import ANN, BOB, CAT, EVE, PASSWORD, USER, ca_bundle

from smtpretry import RetryPolicy
from smtpretry.testing import ScriptedServer, no_wait

ROOT = Path(__file__).parents[2]

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

GREYLISTED = "450 4.2.0 Greylisted for 300 seconds"
UNKNOWN = "550 5.1.1 User unknown"


@pytest.fixture(autouse=True)
def unsent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An environment with nothing of the machine's own in it; return where mail is kept."""
    for name in ("SMTP_HOST", "SMTP_PORT", "SMTP_USERNAME", "SMTP_PASSWORD", "MAIL_FROM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MAIL_UNSENT", str(tmp_path / "unsent"))
    return tmp_path / "unsent"


@asynccontextmanager
async def serving(policy: RetryPolicy | None = None, **env: object) -> AsyncIterator[httpx.AsyncClient]:
    """Serve the application with uvicorn on a free port, in this event loop; return a client for it."""
    config = uvicorn.Config(fastapi_app.app, port=0, lifespan="on", log_config=None, access_log=False)
    server = uvicorn.Server(config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fastapi_app, "POLICY", policy or RetryPolicy())
        for name, value in env.items():
            patch.setenv(name, str(value))
        running = asyncio.create_task(server.serve())
        await until(lambda: server.started)
        port = server.servers[0].sockets[0].getsockname()[1]
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as http:
            yield http
        server.should_exit = True
        async with asyncio.timeout(20):
            await running


@asynccontextmanager
async def app_and_mail_server(
    policy: RetryPolicy | None = None, *, env: dict[str, str] | None = None, **settings: Any
) -> AsyncIterator[tuple[ScriptedServer, httpx.AsyncClient]]:
    """Start a mail server, and the application for it; it stops first."""
    async with (
        ScriptedServer(**settings) as mail,
        serving(policy, SMTP_HOST="localhost", SMTP_PORT=mail.port, **env or {}) as http,
    ):
        yield mail, http


async def sign_up(http: httpx.AsyncClient, *emails: str) -> None:
    for email in emails:
        answer = await http.post("/sign-up", json={"email": email})
        assert answer.status_code == 202


async def settled(http: httpx.AsyncClient, count: int) -> dict[str, Any]:
    """Ask for the state until so many recipients have their end, and return it."""
    async with asyncio.timeout(20):
        while True:
            state = (await http.get("/health")).json()
            if state["accepted"] + state["refused"] >= count:
                return state


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_it_does_what_its_docstring_says(how: signal.Signals, unsent: Path) -> None:
    """Started as its docstring says, it sends, tells its state, and keeps what waits when a signal stops it."""
    command = re.search(r"Start it with `(.+?)`", fastapi_app.__doc__ or "")
    assert command

    async def scenario() -> None:
        [port] = mta.free_ports(1)
        async with ScriptedServer() as mail:
            mail.on("RCPT", BOB, GREYLISTED, times=1)
            mail.on("RCPT", EVE, UNKNOWN)
            env = os.environ | {
                "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
                "PYTHONWARNINGS": "error",
                "UVICORN_PORT": str(port),
                "SMTP_HOST": mail.hostname,
                "SMTP_PORT": str(mail.port),
            }
            process = await asyncio.create_subprocess_exec(
                *shlex.split(command[1]), cwd=ROOT, env=env, stderr=asyncio.subprocess.PIPE
            )
            assert process.stderr
            try:
                async with asyncio.timeout(30), httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as http:
                    await process.stderr.readuntil(b"Uvicorn running on")
                    await sign_up(http, ANN, BOB, EVE)
                    state = await settled(http, 2)
                    assert (state["waiting"], state["accepted"], state["refused"]) == (1, 1, 1)
                    assert state["server"] == f"{mail.hostname}:{mail.port}"
                    seen = (await http.get("/metrics")).text
                    process.send_signal(how)
                    said = (await process.stderr.read()).decode()
            finally:
                if process.returncode is None:
                    process.kill()
                await process.wait()
            assert re.search(r'smtpretry_replies_total{action="FAIL",code="550",.*stage="RCPT"} 1.0', seen)
            assert re.search(r'smtpretry_recipients_total{.*status="ACCEPTED"} 1.0', seen)
            assert [message.recipients for message in mail.messages] == [[ANN]]
            assert re.search(rf"mail \w+ failed for {EVE}: {UNKNOWN}", said)
            assert re.search(rf"mail \w+ from app@localhost is not sent to {BOB}", said)
            assert "Application shutdown complete" in said

    asyncio.run(scenario())
    [kept] = unsent.iterdir()
    assert f"To: {BOB}\r\n".encode() in kept.read_bytes()


def test_answers_before_the_mail_server_does() -> None:
    """A sign-up is answered while the mail server says nothing at all; the mail goes when it does."""

    async def scenario() -> None:
        async with app_and_mail_server(no_wait()) as (mail, http):
            mail.fail_at("CONNECT", "stall", times=1)
            await sign_up(http, ANN)
            state = (await http.get("/health")).json()
            assert (state["open"], state["in_use"], state["accepted"]) == (0, 1, 0)
            await until(lambda: mail.open_connections == 1)
            mail.disconnect()
            await settled(http, 1)
            assert len(mail.received(ANN)) == 1

    asyncio.run(scenario())


def test_greylisting_is_waited_for_in_the_background() -> None:
    """A greylisted mail is offered again after the time that the server names, and the others go meanwhile."""

    async def scenario() -> None:
        policy = no_wait()
        async with app_and_mail_server(policy) as (mail, http):
            mail.on("RCPT", BOB, GREYLISTED, times=2)
            await sign_up(http, ANN, BOB, CAT)
            state = await settled(http, 3)
            assert (state["waiting"], state["accepted"], state["refused"]) == (0, 3, 0)
            assert sorted(mail.mailboxes) == [ANN, BOB, CAT]
            assert policy.waits == [300, 300]

    asyncio.run(scenario())


def test_one_client_serves_all_requests() -> None:
    """Twenty sign-ups at once, and one later, use one connection, and each gets one mail."""
    people = [f"p{number}@example.com" for number in range(20)]

    async def scenario() -> None:
        async with app_and_mail_server() as (mail, http):
            await asyncio.gather(*[sign_up(http, who) for who in people])
            await settled(http, 20)
            await sign_up(http, ANN)
            await settled(http, 21)
            assert mail.connections == 1
            assert {who: len(got) for who, got in mail.mailboxes.items()} == dict.fromkeys([*people, ANN], 1)

    asyncio.run(scenario())


def test_a_refusal_is_told(caplog: pytest.LogCaptureFixture) -> None:
    """Who did not get a mail, and why, stands in the log, and /health counts it."""

    async def scenario() -> None:
        async with app_and_mail_server() as (mail, http):
            mail.on("RCPT", EVE, UNKNOWN)
            await sign_up(http, EVE)
            assert (await settled(http, 1))["refused"] == 1

    asyncio.run(scenario())
    [told] = [record for record in caplog.records if record.name == "fastapi_app"]
    assert told.levelname == "ERROR"
    assert f"failed for {EVE}: {UNKNOWN}" in told.message


def test_a_fault_is_told_and_hurts_no_other_mail(caplog: pytest.LogCaptureFixture) -> None:
    """What goes wrong within a send is logged with its traceback; the application goes on."""

    async def broken(_seconds: float) -> None:
        msg = "no clock"
        raise RuntimeError(msg)

    async def scenario() -> None:
        async with app_and_mail_server(RetryPolicy(sleep=broken)) as (mail, http):
            mail.on("RCPT", BOB, GREYLISTED, times=1)
            await sign_up(http, BOB)
            await until(lambda: any(record.name == "fastapi_app" for record in caplog.records))
            await sign_up(http, ANN)
            assert (await settled(http, 1))["accepted"] == 1
            assert len(mail.received(ANN)) == 1

    asyncio.run(scenario())
    [told] = [record for record in caplog.records if record.name == "fastapi_app"]
    assert told.exc_info
    assert isinstance(told.exc_info[1], RuntimeError)


def test_stops_at_once_with_what_waits_kept(unsent: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Where mails wait for greylisting, the application stops without waiting; each is logged, and kept in full."""

    async def scenario() -> None:
        async with app_and_mail_server() as (mail, http):
            mail.on("RCPT", GREYLISTED)
            await sign_up(http, ANN, BOB)
            await until(lambda: mail.verbs.count("RSET") == 2)

    asyncio.run(scenario())
    told = [record.message for record in caplog.records if record.name == "fastapi_app"]
    assert len(told) == 2
    assert {who for who in (ANN, BOB) if any(f"not sent to {who}" in line for line in told)} == {ANN, BOB}
    kept = [path.read_bytes() for path in unsent.iterdir()]
    assert len(kept) == 2
    assert all(b"Message-ID: " in one and b"Good to have you here." in one for one in kept)


def test_what_is_under_way_is_finished(unsent: Path) -> None:
    """A mail whose last reply is still to come when the application stops is sent, not broken off."""

    async def scenario() -> None:
        async with app_and_mail_server() as (mail, http):
            mail.fail_at("END_OF_DATA", "late", delay=0.3)
            await sign_up(http, ANN)
            await until(lambda: "DATA" in mail.verbs)
        assert len(mail.received(ANN)) == 1
        assert mail.verbs[-1] == "QUIT"

    asyncio.run(scenario())
    assert not unsent.exists()


def test_nothing_is_left_behind(unsent: Path) -> None:
    """When the application has stopped, no send goes on, not even one whose mail server is not there."""

    async def scenario() -> None:
        with socket.socket() as deaf, pytest.MonkeyPatch.context() as patch:
            deaf.bind(("127.0.0.1", 0))  # and does not listen
            patch.setenv("SMTP_PORT", str(deaf.getsockname()[1]))
            async with fastapi_app.lifespan(fastapi_app.app):
                smtp = fastapi_app.app.state.smtp
                await fastapi_app.sign_up(ANN)
                await until(lambda: smtp._pool.failures == 1)
            assert smtp.stats().waiting == 0
            assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(scenario())
    assert len(list(unsent.iterdir())) == 1


def test_logs_in_as_the_environment_says() -> None:
    """SMTP_USERNAME and SMTP_PASSWORD log in where the server asks for it; MAIL_FROM is the sender."""

    async def scenario() -> None:
        env = {"SMTP_USERNAME": USER, "SMTP_PASSWORD": PASSWORD, "MAIL_FROM": CAT}
        async with app_and_mail_server(env=env, auth=(USER, PASSWORD)) as (mail, http):
            await sign_up(http, ANN)
            await settled(http, 1)
            [message] = mail.messages
            assert (message.authenticated, message.sender) == (USER, CAT)

    asyncio.run(scenario())


def test_speaks_tls_from_the_start_on_its_port(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On the port for it TLS comes first, and the certificate is verified."""

    async def scenario() -> None:
        async with ScriptedServer(tls="implicit") as mail:
            monkeypatch.setattr(fastapi_app, "TLS_PORT", mail.port)
            where = {"SMTP_HOST": "localhost", "SMTP_PORT": mail.port}
            async with serving(**where) as http:
                await sign_up(http, BOB)
                assert (await settled(http, 1))["refused"] == 1
            async with serving(**where, SSL_CERT_FILE=ca_bundle(mail, tmp_path)) as http:
                await sign_up(http, ANN)
                await settled(http, 1)
            assert [(message.recipients, message.tls) for message in mail.messages] == [([ANN], True)]

    asyncio.run(scenario())


def test_does_not_start_with_half_a_log_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """A username without a password is an error at the start, not at the first mail."""
    monkeypatch.setenv("SMTP_USERNAME", USER)

    async def scenario() -> None:
        async with fastapi_app.lifespan(fastapi_app.app):
            pass

    with pytest.raises(ValueError, match="a username needs a password"):
        asyncio.run(scenario())


@pytest.mark.parametrize("email", ["bob", "", "bob@example.com\r\nRCPT TO:<eve@example.com>", 5])
def test_refuses_what_is_no_address(email: object) -> None:
    """What is no address is refused in the answer, and nothing is sent."""

    async def scenario() -> None:
        async with app_and_mail_server() as (mail, http):
            assert (await http.post("/sign-up", json={"email": email})).status_code == 422
            assert (await http.get("/health")).json()["waiting"] == 0
        assert not mail.connections

    asyncio.run(scenario())
