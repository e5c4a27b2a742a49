"""fastapi-mail's FastMail, sending through one client as the example shows: every message once, every refusal told."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiosmtplib
import pytest
import virtual
from fastapi_mail import ConnectionConfig, MessageSchema, MessageType, NameEmail
from fastapi_mail.errors import ConnectionErrors, EmptyMessagesList, PydanticClassRequired
from fastapi_mail_client import NotAccepted, RetryingFastMail
from pydantic import SecretStr
from support import ANN, APP, BOB, CAT, DAN, EVE, GREYLISTED, PASSWORD, USER, ca_bundle, once, patient, virtually

import smtpretry
from smtpretry import ClientClosed, Reply, RetryPolicy
from smtpretry.testing import ScriptedServer

EXAMPLES = Path(__file__).parents[2] / "examples"

if TYPE_CHECKING:
    from collections.abc import Sequence

UNKNOWN = "550 5.1.1 User unknown"


def mailer(server: ScriptedServer, policy: RetryPolicy | None = None, **settings: Any) -> RetryingFastMail:
    """Return a FastMail for this server; `settings` are those of ConnectionConfig."""
    given: dict[str, Any] = {
        "MAIL_SERVER": server.hostname,
        "MAIL_PORT": server.port,
        "MAIL_USERNAME": USER,
        "MAIL_PASSWORD": SecretStr(PASSWORD),
        "MAIL_FROM": APP,
        "MAIL_STARTTLS": False,
        "MAIL_SSL_TLS": False,
        "LOCAL_HOSTNAME": "client.example",
    }
    return RetryingFastMail(ConnectionConfig(**given | settings), policy or patient())


def letter(*recipients: str, **fields: Any) -> MessageSchema:
    """Return a message to these people."""
    people = [NameEmail(name="", email=who) for who in recipients]
    return MessageSchema(
        **{"subject": "hello", "recipients": people, "body": "How are you?", "subtype": MessageType.plain} | fields
    )


def copies(server: ScriptedServer) -> dict[str, int]:
    """Return how many messages each recipient got."""
    return {who: len(got) for who, got in server.mailboxes.items()}


@virtually
async def test_a_list_whose_second_message_is_greylisted_sends_none_twice() -> None:
    """Each message of the list goes once, in one call; the third does not wait for the second."""
    async with ScriptedServer() as server:
        server.on("RCPT", BOB, "450 4.2.0 Greylisted for 300 seconds", times=2)
        mail = mailer(server)
        async with mail.smtp:
            await mail.send_message([letter(ANN), letter(BOB), letter(CAT)])
        assert [message.recipients for message in server.messages] == [[ANN], [CAT], [BOB]]
        assert len({message.message["Message-ID"] for message in server.messages}) == 3
        assert virtual.clock() - virtual.EPOCH == pytest.approx(600, abs=1)


@virtually
async def test_some_recipients_refused_is_an_error_that_says_who_and_why() -> None:
    """Where some of a message's recipients are refused, the caller learns it, and who has it all the same."""
    async with ScriptedServer() as server:
        server.on("RCPT", EVE, UNKNOWN)
        mail = mailer(server)
        async with mail.smtp:
            with pytest.raises(NotAccepted) as caught:
                await mail.send_message(letter(ANN, EVE, BOB))
        assert str(caught.value) == f"{EVE}: {UNKNOWN}; Check the recipient's address."
        assert caught.value.delivery.refused == {EVE: Reply.parse(UNKNOWN)}
        assert caught.value.delivery.accepted == [ANN, BOB]
        assert copies(server) == {ANN: 1, BOB: 1}


@pytest.mark.parametrize("kind", [aiosmtplib.SMTPException, ConnectionErrors])
@pytest.mark.parametrize(("place", "reply"), [("RCPT", UNKNOWN), ("CONNECT", "554 5.3.2 no service")])
@virtually
async def test_the_except_clauses_of_both_libraries_catch_it(kind: type[Exception], place: str, reply: str) -> None:
    """An application's `except` clauses go on working, whichever library's error they name."""
    async with ScriptedServer() as server:
        server.on(place, reply)
        mail = mailer(server)
        async with mail.smtp:
            with pytest.raises(kind, match=reply[4:]):
                await mail.send_message(letter(ANN))


@virtually
async def test_the_messages_after_a_refused_one_are_sent() -> None:
    """A refusal in a list hinders no other message; at the end there is one error for each that was not accepted."""
    async with ScriptedServer() as server:
        server.on("RCPT", EVE, UNKNOWN)
        server.on("RCPT", DAN, GREYLISTED)
        mail = mailer(server)
        async with mail.smtp:
            with pytest.raises(ExceptionGroup, match="2 of 4 messages") as caught:
                await mail.send_message([letter(EVE), letter(ANN), letter(BOB, DAN), letter(CAT)])
        assert [error.delivery.recipients for error in caught.value.exceptions] == [[EVE], [BOB, DAN]]
        assert list(caught.value.exceptions[1].delivery.refused) == [DAN]
        assert copies(server) == {ANN: 1, BOB: 1, CAT: 1}


@virtually
async def test_retrying_around_it_sends_nothing_twice() -> None:
    """A decorator around the call does not repeat what was given up inside, for some may have it."""
    async with ScriptedServer() as server:
        server.on("RCPT", BOB, GREYLISTED)
        mail = mailer(server, once())
        async with mail.smtp:
            with pytest.raises(NotAccepted, match=GREYLISTED):
                await smtpretry.retry(policy=patient())(mail.send_message)(letter(ANN, BOB))
        assert copies(server) == {ANN: 1}


@virtually
async def test_nobody_knows_is_told_too() -> None:
    """Where the line breaks after the final dot and the policy is at most once, the call does not pass for a success."""
    async with ScriptedServer() as server:
        server.fail_at("END_OF_DATA", "fin", act=True)
        mail = mailer(server, patient(on_uncertain="raise"))
        async with mail.smtp:
            with pytest.raises(NotAccepted) as caught:
                await mail.send_message(letter(ANN))
        assert caught.value.delivery.uncertain == [ANN]
        assert copies(server) == {ANN: 1}


@virtually
async def test_logs_in_with_the_credentials_of_the_config() -> None:
    """A server that answers 530 gets the user and the password of the ConnectionConfig, once for all messages."""
    async with ScriptedServer(auth=(USER, PASSWORD)) as server:
        mail = mailer(server)
        async with mail.smtp:
            await mail.send_message([letter(ANN), letter(BOB)])
        assert [message.authenticated for message in server.messages] == [USER, USER]
        assert server.verbs.count("AUTH") == 1


@virtually
async def test_does_not_log_in_without_use_credentials() -> None:
    """With USE_CREDENTIALS=False no AUTH is sent, and the error names the cure."""
    async with ScriptedServer(auth=(USER, PASSWORD)) as server:
        mail = mailer(server, USE_CREDENTIALS=False)
        async with mail.smtp:
            with pytest.raises(NotAccepted, match="no credentials are configured"):
                await mail.send_message(letter(ANN))
        assert "AUTH" not in server.verbs


@virtually
async def test_a_refused_password_is_not_shown() -> None:
    """A wrong password is told at once, and appears nowhere."""
    async with ScriptedServer(auth=(USER, "another")) as server:
        mail = mailer(server)
        async with mail.smtp:
            with pytest.raises(NotAccepted, match="535") as caught:
                await mail.send_message(letter(ANN))
        assert PASSWORD not in f"{caught.value!r} {caught.value.delivery} {mail.smtp!r} {vars(caught.value)}"
        assert server.verbs.count("AUTH") == 1


TRUSTED = {"CERT_BUNDLE": "the server's"}


@pytest.mark.parametrize(
    ("tls", "settings", "ends"),
    [
        (True, {"MAIL_STARTTLS": True} | TRUSTED, "over TLS"),
        (True, {"MAIL_STARTTLS": True, "VALIDATE_CERTS": False}, "over TLS"),
        (True, {"MAIL_STARTTLS": True}, "certificate verify failed"),
        (True, {"MAIL_STARTTLS": False}, "in the clear"),
        (False, {"MAIL_STARTTLS": True}, "STARTTLS extension not supported"),
        ("implicit", {"MAIL_SSL_TLS": True} | TRUSTED, "over TLS"),
        ("implicit", {"MAIL_SSL_TLS": True, "VALIDATE_CERTS": False}, "over TLS"),
        ("implicit", {"MAIL_SSL_TLS": True}, "certificate verify failed"),
    ],
)
@virtually
async def test_tls_is_as_the_config_says(tls: Any, settings: dict[str, Any], ends: str, tmp_path: Path) -> None:
    """MAIL_STARTTLS, MAIL_SSL_TLS, VALIDATE_CERTS and CERT_BUNDLE mean what they mean to fastapi-mail."""
    async with ScriptedServer(tls=tls) as server:
        if "CERT_BUNDLE" in settings:
            settings = settings | {"CERT_BUNDLE": ca_bundle(server, tmp_path)}
        mail = mailer(server, **settings)
        async with mail.smtp:
            if ends in ("over TLS", "in the clear"):
                await mail.send_message(letter(ANN))
            else:
                with pytest.raises(NotAccepted, match=ends):
                    await mail.send_message(letter(ANN))
        assert [message.tls for message in server.messages] == {"over TLS": [True], "in the clear": [False]}.get(
            ends, []
        )


@virtually
async def test_waits_for_a_reply_as_long_as_the_config_says() -> None:
    """TIMEOUT is how many seconds each reply may take, and LOCAL_HOSTNAME what the client calls itself."""
    async with ScriptedServer(pipelining=False) as server:
        server.fail_at("MAIL", "stall", times=1)
        mail = mailer(server, once(), TIMEOUT=7, LOCAL_HOSTNAME="me.example")
        async with mail.smtp:
            with pytest.raises(NotAccepted):
                await mail.send_message(letter(ANN))
        assert virtual.clock() - virtual.EPOCH == pytest.approx(7, abs=0.1)
        assert server.commands[0] == "EHLO me.example"


@virtually
async def test_one_client_serves_many_calls() -> None:
    """Calls at once and one after the other share a connection; the next one after a long while makes a new one."""
    async with ScriptedServer() as server:
        mail = mailer(server)
        async with mail.smtp:
            await mail.send_message(letter(ANN))
            await asyncio.gather(mail.send_message(letter(BOB)), mail.send_message([letter(CAT), letter(DAN)]))
            assert server.connections == 1
            await asyncio.sleep(60)
            await mail.send_message(letter(EVE))
        assert server.connections == 2
        assert copies(server) == dict.fromkeys((ANN, BOB, CAT, DAN, EVE), 1)


@virtually
async def test_suppressed_sends_reach_no_server() -> None:
    """With SUPPRESS_SEND nothing is sent, and the messages are recorded as fastapi-mail does in tests."""
    async with ScriptedServer() as server:
        mail = mailer(server, SUPPRESS_SEND=1)
        async with mail.smtp:
            with mail.record_messages() as outbox:
                await mail.send_message([letter(ANN), letter(BOB)])
        assert [message["To"] for message in outbox] == [ANN, BOB]
        assert server.connections == 0


@virtually
async def test_tells_what_was_dispatched() -> None:
    """fastapi-mail's signal is sent for every message that the server took for anybody, and for no other."""
    async with ScriptedServer() as server:
        server.on("RCPT", EVE, UNKNOWN)
        mail = mailer(server)
        async with mail.smtp:
            with mail.record_messages() as outbox, pytest.raises(ExceptionGroup):
                await mail.send_message([letter(ANN), letter(EVE), letter(BOB, EVE)])
        assert [message["To"] for message in outbox] == [ANN, f"{BOB}, {EVE}"]


@virtually
async def test_templates_are_rendered(tmp_path: Path) -> None:
    """The arguments after the message are fastapi-mail's own, by position or by name."""
    (tmp_path / "hello.txt").write_text("Hello, {{ name }}!", encoding="ascii")
    async with ScriptedServer() as server:
        mail = mailer(server, TEMPLATE_FOLDER=tmp_path)
        async with mail.smtp:
            await mail.send_message(letter(ANN, template_body={"name": "Ann"}), "hello.txt")
            await mail.send_message([letter(BOB, template_body={"name": "Bob"})], template_name="hello.txt")
        for who, text in ((ANN, "Hello, Ann!"), (BOB, "Hello, Bob!")):
            [received] = server.received(who)
            [part] = received.message.iter_parts()
            assert part.get_content().strip() == text


@pytest.mark.parametrize(("wrong", "error"), [([], EmptyMessagesList), (["hello"], PydanticClassRequired)])
@virtually
async def test_bad_input_is_refused_as_before(wrong: Sequence[object], error: type[Exception]) -> None:
    """What fastapi-mail refuses is refused with its own error, before anything is sent."""
    async with ScriptedServer() as server:
        mail = mailer(server)
        async with mail.smtp:
            with pytest.raises(error):
                await mail.send_message(wrong)
        assert server.connections == 0


@virtually
async def test_closing_hands_back_every_message_that_waits() -> None:
    """Where the client is closed under a list, the error has a delivery for each message that is still pending."""
    async with ScriptedServer() as server:
        server.on("RCPT", GREYLISTED)
        server.on("RCPT", CAT, "250 2.1.5 Ok")
        server.scripts.reverse()
        mail = mailer(server)
        sending = asyncio.create_task(mail.send_message([letter(ANN), letter(BOB), letter(CAT)]))
        await asyncio.sleep(30)
        await mail.smtp.aclose()
        with pytest.raises(ExceptionGroup) as caught:
            await sending
        assert all(isinstance(error, ClientClosed) for error in caught.value.exceptions)
        assert [error.delivery.pending for error in caught.value.exceptions] == [[ANN], [BOB]]
        assert copies(server) == {CAT: 1}


def test_the_example_prints_what_happened() -> None:
    """It runs as its docstring says: Eve is told, Bob and the others have one message each."""
    command = [sys.executable, "-W", "error", EXAMPLES / "fastapi_mail_client.py"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert run.stdout.splitlines() == [
        "Not accepted:",
        "  eve@example.com: 550 5.1.1 <eve@example.com>: User unknown; Check the recipient's address.",
        "The server has 'Welcome, Ann' for ann@example.com.",
        "The server has 'Welcome, Cat and Eve' for cat@example.com.",
        "The server has 'Welcome, Bob' for bob@example.com.",
    ]
