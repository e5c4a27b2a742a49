"""The examples for blocking code, started as their docstrings say: an smtplib script, Flask, Django under gunicorn."""

from __future__ import annotations

import asyncio
import smtplib
from typing import TYPE_CHECKING

import flask
import flask_mailman
import httpx
import pytest
from programs import EXAMPLES, PATIENCE, command, in_real_time, running, until
from support import ANN, APP, BOB
from test_celery_app import SETTINGS

import smtpretry
from smtpretry.testing import ScriptedServer, ThreadedServer, no_wait

if TYPE_CHECKING:
    from pathlib import Path

CELERY = """
import os, aiosmtplib, smtpretry
from celery import Celery
from celery.signals import worker_ready

app = Celery("mails")
make = lambda: aiosmtplib.SMTP(hostname="127.0.0.1", port=int(os.environ["SMTP_PORT"]), local_hostname="client.example")
smtp = smtpretry.Blocking(make)

@app.task
def send(who):
    smtp.sendmail("app@example.com", [who], b"Subject: hello\\r\\n\\r\\n")

@worker_ready.connect
def begin(**_):
    for number in range(8):
        send.delay(f"{number}@example.com")

smtp.sendmail("app@example.com", ["parent@example.com"], b"Subject: hello\\r\\n\\r\\n")  # before the fork
"""
NOT_YET = "450 4.2.0 Greylisted, try again in 1 second"


@pytest.mark.parametrize("example", ["smtplib_script", "flask_app", "django_project"])
def test_at_most_three_lines_differ(example: str) -> None:
    """Each example marks the lines that smtpretry takes, and there are three at most."""
    source = (EXAMPLES / f"{example}.py").read_text()
    ours = [line for line in source.partition('"""\n\n')[2].splitlines() if "smtpretry" in line]
    assert 1 <= len(ours) <= 3
    assert all("# <--" in line for line in ours)


@in_real_time
async def test_a_script_is_patient() -> None:
    """The smtplib script waits for a server that greylists and one that is not there yet, and sends each mail once."""
    async with ScriptedServer() as server:
        server.on("RCPT", BOB, NOT_YET, times=1)
        server.on("CONNECT", "421 4.3.2 try again in 1 second", times=1)
        env = {"SMTP_HOST": server.hostname, "SMTP_PORT": server.port}
        async with running(command("smtplib_script"), **env) as program:
            await program.says(f"sent to {BOB}")
            await program.says(f"sent to {ANN}")
            assert await program.process.wait() == 0
        assert {who: len(messages) for who, messages in server.mailboxes.items()} == {BOB: 1, ANN: 1}


@in_real_time
async def test_flask_is_patient() -> None:
    """The request waits for the greylisting server; what is refused for good is a 502."""
    async with ScriptedServer() as server:
        server.on("RCPT", BOB, NOT_YET, times=1)
        server.on("RCPT", "eve@*", "550 5.1.1 who?")
        env = {"FLASK_RUN_PORT": 0, "SMTP_HOST": server.hostname, "SMTP_PORT": server.port}
        async with running(command("flask_app"), **env) as program:
            url = (await program.says(r"Running on (http://127\S+)"))[1]
            async with httpx.AsyncClient(base_url=url, timeout=PATIENCE) as client:
                assert (await client.post("/orders", data={"email": BOB})).status_code == 200
                assert (await client.post("/orders", data={"email": "eve@example.com"})).status_code == 502
        assert {who: len(messages) for who, messages in server.mailboxes.items()} == {BOB: 1}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # it leaves its socket open on a refusal
def test_flask_mailman_is_patient() -> None:
    """The same decorator around Flask-Mailman's send waits, and lets a refusal through."""
    with ThreadedServer() as server:
        app = flask.Flask(__name__)
        app.config |= {"MAIL_SERVER": server.hostname, "MAIL_PORT": server.port}
        flask_mailman.Mail(app)
        policy = no_wait()
        send = smtpretry.retry(policy=policy)(lambda who: flask_mailman.EmailMessage("s", "b", APP, [who]).send())
        server.on("RCPT", BOB, "450 4.2.0 Greylisted for 300 seconds", times=1)
        server.on("MAIL", "250 2.1.0 Ok", times=1)
        server.on("MAIL", "421 4.3.2 busy, try again in 20 seconds", times=1)
        server.on("RCPT", "eve@*", "550 5.1.1 who?")
        with app.app_context():
            assert send(BOB) == 1
            with pytest.raises(smtplib.SMTPRecipientsRefused):
                send("eve@example.com")
        assert policy.waits == [300.0, 20.0]
        assert list(server.mailboxes) == [BOB]


@pytest.mark.parametrize("preload", [False, True], ids=["each worker loads it", "loaded before the fork"])
@in_real_time
async def test_django_under_gunicorn_is_patient(preload: bool) -> None:
    """Forked workers send from all of their threads, each over one connection, and end in good order."""
    customers = [f"{number}@example.com" for number in range(20)]
    async with ScriptedServer() as server:
        server.on("RCPT", "7@example.com", NOT_YET, times=1)
        server.on("RCPT", "eve@*", "550 5.1.1 who?")
        env = {"SMTP_HOST": server.hostname, "SMTP_PORT": server.port, "PYTHONUNBUFFERED": 1}
        start = command("django_project") + " --bind 127.0.0.1:0" + (" --preload" if preload else "")
        async with running(start, **env) as program:
            url = (await program.says(r"Listening at: (http://\S+)"))[1]
            async with httpx.AsyncClient(base_url=url, timeout=PATIENCE) as client:
                orders = [client.post("/orders", data={"email": who}) for who in customers]
                assert {response.status_code for response in await asyncio.gather(*orders)} == {200}
                assert (await client.post("/orders", data={"email": "eve@example.com"})).status_code == 502
            await program.stop()
        assert "Traceback" not in program.log
        assert server.connections <= 2
        assert {who: len(messages) for who, messages in server.mailboxes.items()} == dict.fromkeys(customers, 1)


@in_real_time
async def test_celery_prefork_sends(tmp_path: Path) -> None:
    """Children of a Celery worker that has sent before it forked send each task's mail once, over their own connections."""
    for name in ("queue", "control", "results"):
        (tmp_path / name).mkdir()
    (tmp_path / "celery_settings.py").write_text(SETTINGS)
    (tmp_path / "mails.py").write_text(CELERY)
    async with ScriptedServer() as server:
        server.on("RCPT", "3@example.com", NOT_YET, times=1)
        start = f"celery --workdir {tmp_path} -A mails worker --pool prefork --concurrency 2 --without-mingle"
        env = {"CELERY_CONFIG_MODULE": "celery_settings", "PYTHONPATH": tmp_path, "SMTP_PORT": server.port}
        async with running(start, **env) as program:
            await until(lambda: len(server.messages) >= 9)
            await program.stop()
        assert "Traceback" not in program.log
        assert {who: len(messages) for who, messages in server.mailboxes.items()} == dict.fromkeys(
            ["parent@example.com", *(f"{number}@example.com" for number in range(8))], 1
        )
        [parent] = server.received("parent@example.com")
        assert parent.connection not in {message.connection for message in server.messages if message is not parent}
