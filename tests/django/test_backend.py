"""`smtpretry.django.EmailBackend` in a project: Django's functions, settings, return values and exceptions."""

from __future__ import annotations

import asyncio
import logging
import smtplib
import ssl
import sys
from contextlib import contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from django.core import mail
from django.core.exceptions import ImproperlyConfigured
from django.core.mail import EmailMessage, EmailMultiAlternatives
from django.core.management import CommandError, call_command
from django.test.utils import override_settings
from django.utils.log import AdminEmailHandler
from support import ANN, APP, BOB, CAT, PASSWORD, USER, ca_bundle

from smtpretry import Delivery, RetryPolicy
from smtpretry.django import EmailBackend, backend
from smtpretry.queues.engine import QueueError
from smtpretry.testing import ThreadedServer, no_wait

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from smtpretry.testing import NoWait


@contextmanager
def project(options: dict[str, Any] | None = None, **settings: Any) -> Iterator[tuple[ThreadedServer, NoWait]]:
    """Start a server, and let the settings lead there; the policy takes no time."""
    server = {name.removeprefix("server_"): settings.pop(name) for name in list(settings) if name.startswith("server_")}
    policy = no_wait()
    with (
        ThreadedServer(**server) as running,
        override_settings(
            EMAIL_HOST="localhost",
            EMAIL_PORT=running.port,
            SMTPRETRY={"policy": policy} | (options or {}),
            **settings,
        ),
    ):
        yield running, policy


def letters(*recipients: str) -> list[EmailMessage]:
    return [EmailMessage("hello", "How are you?", APP, [who]) for who in recipients]


def test_send_mail_waits_for_a_greylisting_server() -> None:
    """With nothing but EMAIL_BACKEND changed, send_mail returns 1 when the server has taken the mail at last."""
    with project() as (server, policy):
        server.on("RCPT", BOB, "450 4.2.0 Greylisted for 20 seconds", times=1)
        assert mail.send_mail("Grüße", "Schöne Grüße\n.\n", None, [BOB]) == 1
        assert policy.waits == [20.0]
        [message] = server.received(BOB)
        assert (message.sender, message.message["Subject"]) == (APP, "Grüße")
        assert message.message.get_content().splitlines() == ["Schöne Grüße", "."]


def test_the_default_policy_is_that_of_a_request() -> None:
    """Without a policy of its own it has half a minute; with a queue five days."""
    with override_settings(SMTPRETRY={}):
        assert EmailBackend().options["policy"] == EmailBackend().client.policy
        assert EmailBackend().client.policy.give_up_after == RetryPolicy.interactive().give_up_after
        assert EmailBackend(queue="/mail.db").options["policy"].give_up_after == RetryPolicy.queue().give_up_after


def test_all_that_django_sends() -> None:
    """Alternatives, attachments, Bcc, mail_admins and send_mass_mail arrive, and count as Django counts."""
    with project() as (server, _):
        both = EmailMultiAlternatives("hello", "text", APP, [ANN], bcc=[BOB])
        both.attach_alternative("<p>html</p>", "text/html")
        both.attach("drawing.bin", bytes(range(256)), "application/octet-stream")
        assert both.send() == 1
        assert mail.send_mass_mail([("s", "b", APP, [ANN]), ("s", "b", APP, []), ("s", "b", APP, [BOB, CAT])]) == 2
        mail.mail_admins("alarm", "fire")
        assert mail.get_connection().send_messages([]) == 0
        first = server.messages[0]
        assert first.recipients == [ANN, BOB]
        assert b"bob@" not in first.content
        [attachment] = first.message.iter_attachments()
        assert attachment.get_content() == bytes(range(256))
        assert sorted(server.mailboxes) == sorted([ANN, BOB, CAT, "root@example.com"])


def test_what_is_refused_for_some_does_not_vanish(caplog: pytest.LogCaptureFixture) -> None:
    """A message that one of two takes counts as sent; the other refusal is logged, and stands in message.delivery."""
    with project() as (server, _), caplog.at_level(logging.WARNING, "smtpretry"):
        server.on("RCPT", BOB, "550 5.1.1 User unknown")
        message = EmailMessage("hello", "text", APP, [ANN, BOB])
        assert message.send() == 1
        assert isinstance(message.delivery, Delivery)
        assert list(message.delivery.refused) == [BOB]
        assert "refused for bob@example.com: 550 5.1.1 User unknown" in caplog.text


def test_what_is_raised_is_not_logged_as_lost(caplog: pytest.LogCaptureFixture) -> None:
    """One of two failures is raised; the log has what the server said to both, and that the other one is lost."""
    with project() as (server, _), caplog.at_level(logging.WARNING, "smtpretry"):
        server.on("RCPT", "550 5.1.1 User unknown")
        with pytest.raises(smtplib.SMTPRecipientsRefused):
            mail.get_connection().send_messages(letters(ANN, BOB))
    lines = [record.getMessage() for record in caplog.records]
    assert sum("550 5.1.1 User unknown -> FAIL" in line for line in lines) == 2
    assert [line for line in lines if "refused for" in line] == [line for line in lines if f"refused for {BOB}" in line]
    assert len(lines) == 3


REFUSALS: list[tuple[str, str, type[Exception], Any]] = [
    ("RCPT", "550 5.1.1 User unknown", smtplib.SMTPRecipientsRefused, {BOB: (550, b"5.1.1 User unknown")}),
    ("MAIL", "550 5.7.1 not you", smtplib.SMTPSenderRefused, 550),
    ("DATA", "554 5.7.1 no", smtplib.SMTPDataError, 554),
    ("END_OF_DATA", "554 5.7.1 spam", smtplib.SMTPDataError, 554),
    ("CONNECT", "554 5.7.1 go away", smtplib.SMTPConnectError, 554),
    ("EHLO", "550 5.7.1 no", smtplib.SMTPHeloError, 550),
    ("AUTH", "535 5.7.8 wrong", smtplib.SMTPAuthenticationError, 535),
]


@pytest.mark.parametrize(("verb", "reply", "kind", "said"), REFUSALS, ids=[one[0] for one in REFUSALS])
def test_exceptions_are_those_of_smtplib(
    verb: str, reply: str, kind: type[Exception], said: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """What the application catches is what Django's own backend raises; fail_silently returns 0 and logs it."""
    auth = {"server_auth": (USER, PASSWORD), "EMAIL_HOST_USER": USER, "EMAIL_HOST_PASSWORD": PASSWORD}
    with project(**auth) as (server, _):
        server.on(verb, reply)
        with pytest.raises(kind) as caught:
            mail.send_mail("hello", "text", None, [BOB])
        assert isinstance(caught.value, smtplib.SMTPException)
        assert getattr(caught.value, "recipients", None) == said or getattr(caught.value, "smtp_code", None) == said
        assert caught.value.delivery.recipients == [BOB]  # type: ignore[attr-defined]
        assert PASSWORD not in str(caught.value.__notes__)
        caplog.clear()
        assert mail.send_mail("hello", "text", None, [BOB], fail_silently=True) == 0
        assert BOB in caplog.text


def test_a_server_that_is_down_raises_what_the_socket_says() -> None:
    """Connection refused and an unresolved name are OSErrors, after the policy's patience; fail_silently returns 0."""
    with project() as (server, policy):
        port = server.port
    at = {"EMAIL_HOST": "127.0.0.1", "EMAIL_PORT": port, "SMTPRETRY": {"policy": policy}}
    with override_settings(**at):
        with pytest.raises(ConnectionRefusedError):
            mail.send_mail("hello", "text", None, [BOB])
        assert policy.waits
        with pytest.raises(ConnectionRefusedError):
            mail.get_connection().open()
        assert mail.send_mail("hello", "text", None, [BOB], fail_silently=True) == 0
        assert mail.get_connection(fail_silently=True).open() is None


def test_one_failure_among_many_messages() -> None:
    """The others are sent all the same; the exception is the failing message's, and tells how many went out."""
    with project() as (server, _):
        server.on("RCPT", BOB, "550 5.1.1 User unknown")
        messages = letters(ANN, BOB, CAT)
        with pytest.raises(smtplib.SMTPRecipientsRefused) as caught:
            mail.get_connection().send_messages(messages)
        assert caught.value.delivery is messages[1].delivery  # type: ignore[attr-defined]
        assert "2 of 3 messages were sent" in str(caught.value.__notes__)
        assert mail.get_connection(fail_silently=True).send_messages(letters(ANN, BOB, CAT)) == 2


def test_backends_share_their_connection() -> None:
    """Ten calls of send_mail go over one connection, and so do open, close and a with block."""
    with project() as (server, _):
        for _ in range(10):
            mail.send_mail("hello", "text", None, [BOB])
        backend = mail.get_connection()
        assert backend.open() is True
        assert backend.open() is False
        assert backend.send_messages(letters(ANN)) == 1
        backend.close()
        backend.close()
        with mail.get_connection() as connection:
            connection.send_messages(letters(ANN, BOB))
        assert server.connections == 1
        assert len(server.messages) == 13


def test_other_settings_are_another_client() -> None:
    """Credentials of a call, such as auth_user, never mix with those of another."""
    with project(server_auth={USER: PASSWORD, "other": "pass-of-other"}, EMAIL_HOST_USER=USER) as (server, _):
        with override_settings(EMAIL_HOST_PASSWORD=PASSWORD):
            mail.send_mail("hello", "text", None, [ANN])
            mail.send_mail("hello", "text", None, [BOB], auth_user="other", auth_password="pass-of-other")
            mail.send_mail("hello", "text", None, [CAT])
        assert [message.authenticated for message in server.messages] == [USER, "other", USER]


@pytest.mark.parametrize(("tls", "setting"), [(True, "EMAIL_USE_TLS"), ("implicit", "EMAIL_USE_SSL")])
def test_encrypts_as_the_settings_say(tls: Any, setting: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """EMAIL_USE_TLS and EMAIL_USE_SSL encrypt, and trust what the system trusts: nothing else is sent."""
    with project(server_tls=tls, **{setting: True}) as (server, _):
        with pytest.raises(ssl.SSLCertVerificationError):
            mail.get_connection().open()
        assert not server.messages
        monkeypatch.setenv("SSL_CERT_FILE", ca_bundle(server, tmp_path))
        assert mail.send_mail("hello", "text", None, [BOB], connection=mail.get_connection(timeout=10)) == 1
        assert server.messages[0].tls


def test_a_clear_setting_stays_in_the_clear() -> None:
    """Without EMAIL_USE_TLS no certificate is looked at, as with Django's own backend: many a relay has a homemade one."""
    with project(server_tls=True) as (server, _):
        assert mail.send_mail("hello", "text", None, [BOB]) == 1
        assert not server.messages[0].tls


def test_the_files_of_a_certificate_and_the_timeout_are_used(tmp_path: Path) -> None:
    """EMAIL_SSL_CERTFILE that is missing is an error; EMAIL_TIMEOUT is the client's, for each command."""
    with override_settings(EMAIL_SSL_CERTFILE=str(tmp_path / "none.pem")), pytest.raises(FileNotFoundError):
        mail.get_connection().open()
    with override_settings(EMAIL_TIMEOUT=7):
        make, _ = EmailBackend().arguments()
        assert make().timeout == 7
    assert EmailBackend().arguments()[0]().timeout == 60


def test_a_wrong_address_is_a_value_error() -> None:
    """An address that could add a command to the session is refused, with fail_silently too."""
    with project() as (server, _):
        for wrong in ("bob@example.com\r\nRCPT TO:<eve@example.com>", "@", "to@other.com@example.com"):
            with pytest.raises(ValueError, match="Invalid address"):
                mail.get_connection(fail_silently=True).send_messages([EmailMessage(bcc=[wrong])])
        assert not server.messages


def test_inside_an_event_loop_it_works_as_djangos_own() -> None:
    """A send_mail in an async view, where it should not be, sends the mail."""

    async def view() -> int:
        with mail.get_connection() as connection:
            return connection.send_messages(letters(BOB))

    with project() as (server, _):
        assert asyncio.run(view()) == 1
        assert list(server.mailboxes) == [BOB]


def test_a_log_that_is_mailed_stops_no_mail(capsys: pytest.CaptureFixture[str]) -> None:
    """A log handler that mails what is logged of a mail would never end; it is told, and the mails go out."""
    handler = AdminEmailHandler()
    handler.setLevel(logging.WARNING)
    logging.getLogger("smtpretry").addHandler(handler)
    try:
        with project() as (server, _):
            server.on("RCPT", BOB, "550 5.1.1 who?")
            with pytest.raises(smtplib.SMTPRecipientsRefused):
                mail.send_mail("hello", "text", None, [BOB])
            assert mail.send_mail("hello", "text", None, [ANN]) == 1
            assert server.received(ANN)
    finally:
        logging.getLogger("smtpretry").removeHandler(handler)
    assert "what smtpretry logs of a mail cannot be mailed" in capsys.readouterr().err


@pytest.mark.parametrize("what", ["queue", "certificate", "recipient"])
def test_an_error_that_cannot_be_mailed_comes_to_an_end(
    what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Django's handler mails silently, and what is logged of that is not mailed again."""
    handled = list[str]()

    class Counts(AdminEmailHandler):
        def emit(self, record: logging.LogRecord) -> None:
            handled.append(record.getMessage())
            if len(handled) < 20:
                super().emit(record)

    options = {"queue": tmp_path / "missing" / "mail.db"} if what == "queue" else {}
    settings = {"EMAIL_SSL_CERTFILE": str(tmp_path / "no.pem"), "EMAIL_USE_TLS": True} if what == "certificate" else {}
    handler = Counts(logging.WARNING)
    logging.getLogger().addHandler(handler)
    try:
        with project(options, ADMINS=[("Bob", BOB)], **settings) as (server, _):
            server.on("RCPT", BOB, "550 5.1.1 who?")
            logging.getLogger("app").error("hello")
    finally:
        logging.getLogger().removeHandler(handler)
    assert handled[0] == "hello"
    assert len(handled) < 4
    assert ("smtp messages cannot be sent" in capsys.readouterr().err) == (what == "certificate")


@pytest.mark.parametrize(
    ("module", "name"), [("gevent.monkey", "is_module_patched"), ("eventlet.patcher", "is_monkey_patched")]
)
def test_greenlets_are_refused(module: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the first mail, Django would refuse its database to all greenlets; the first mail says so."""
    monkeypatch.setitem(sys.modules, module, SimpleNamespace(**{name: {"threading": True, "thread": True}.get}))
    with project() as (server, _):
        with pytest.raises(
            ImproperlyConfigured, match=f"does not work under {module.partition('.')[0]}: run Django in"
        ):
            mail.send_mail("hello", "text", None, [ANN])
        assert not server.commands


def test_unknown_options_are_told() -> None:
    """A misspelt name in SMTPRETRY is an error that names it, and what to write instead."""
    for name, instead in (("polcy", "did you mean policy"), ("frobnicate", "it takes cleartext_auth, .*queue")):
        with override_settings(SMTPRETRY={name: 1}), pytest.raises(TypeError, match=f"{name}, which .*: {instead}"):
            EmailBackend()
    with override_settings(SMTPRETRY="mail.db"), pytest.raises(TypeError, match="SMTPRETRY is a dictionary"):
        EmailBackend()
    with pytest.raises(TypeError, match="queue is the name of a file"):
        EmailBackend(queue=5)


def test_a_relative_queue_is_in_the_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker finds the same file, in whatever folder it runs; without a BASE_DIR it is the current folder's."""
    monkeypatch.chdir(tmp_path)
    assert EmailBackend(queue="mail.db").queue == str(tmp_path / "mail.db")
    with override_settings(BASE_DIR=tmp_path / "project"):
        assert EmailBackend(queue="mail.db").queue == str(tmp_path / "project" / "mail.db")
        assert EmailBackend(queue=tmp_path / "other.db").queue == str(tmp_path / "other.db")


def test_a_mail_can_do_without_the_queue_of_the_project(tmp_path: Path) -> None:
    """What is given for one connection wins, None too: it retries for half a minute, and raises."""
    with project({"queue": tmp_path / "mail.db"}) as (server, policy):
        server.on("RCPT", BOB, "450 4.2.0 try again in 10 seconds")
        assert mail.send_mail("hello", "text", None, [BOB]) == 1
        with pytest.raises(smtplib.SMTPRecipientsRefused):
            mail.send_mail("hello", "text", None, [BOB], connection=mail.get_connection(queue=None))
        assert policy.waits
    with override_settings(SMTPRETRY={"queue": tmp_path / "mail.db"}):
        assert EmailBackend(queue=None).options == EmailBackend(queue="").options == {"policy": backend._POLICY}


def test_a_queue_that_cannot_be_used_is_told_with_the_first_mail(tmp_path: Path) -> None:
    """Not only the first mail that has to wait says so, after days, and with a process that waits for it."""
    with project({"queue": tmp_path / "missing" / "mail.db"}) as (server, _):
        for _ in range(2):
            with pytest.raises(QueueError, match="missing does not exist: make it"):
                mail.send_mail("hello", "text", None, [ANN])
        with pytest.raises(CommandError, match="missing does not exist: make it"):
            call_command("smtpretry_worker")
        (tmp_path / "missing").mkdir()
        assert mail.send_mail("hello", "text", None, [ANN]) == 1
        assert len(server.messages) == 1


def test_what_is_unusable_is_silent_where_that_is_asked_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A queue in a folder that is missing, and a certificate: fail_silently returns 0 and logs it, as for a server."""
    queue, certificate = {"queue": tmp_path / "missing" / "mail.db"}, {"EMAIL_SSL_CERTFILE": str(tmp_path / "no.pem")}
    for options, settings in ((queue, {}), ({}, {"EMAIL_USE_TLS": True} | certificate)):
        with project(options, **settings):
            caplog.clear()
            assert mail.send_mail("hello", "text", None, [ANN], fail_silently=True) == 0
            assert "smtp messages cannot be sent" in caplog.text


def test_a_worker_without_a_queue_says_what_is_missing() -> None:
    """`manage.py smtpretry_worker` names the option where there is none."""
    with override_settings(SMTPRETRY={}), pytest.raises(CommandError, match="option queue"):
        call_command("smtpretry_worker")


@pytest.mark.parametrize(
    ("option", "said"), [("policy", "policy is a RetryPolicy"), ("max_wait", "max_wait is a number")]
)
def test_a_worker_with_a_wrong_option_says_which(option: str, said: str, tmp_path: Path) -> None:
    """It is a CommandError, as what is missing is, and no traceback."""
    options = {"queue": tmp_path / "mail.db", option: "queue"}
    with override_settings(SMTPRETRY=options), pytest.raises(CommandError, match=said):
        call_command("smtpretry_worker")
