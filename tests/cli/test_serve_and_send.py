"""`python -m smtpretry serve` and `send`: a server for tests in any language, and a message sent with retries."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import smtplib
import ssl
import subprocess
import sys
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
from support import ANN, APP, BOB

from smtpretry.testing import ThreadedServer

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PATIENCE = 20  # seconds
MAIL = b"From: app@example.com\r\nTo: bob@example.com\r\nBcc: ann@example.com\r\nSubject: hello\r\n\r\n.dots\r\n"


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-W", "error", "-m", "smtpretry", *map(str, arguments)]


@contextmanager
def serving(*arguments: object) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """Run the server as JSON, and give its process and port."""
    process = subprocess.Popen(command("serve", "--json", *arguments), stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        listening = json.loads(process.stdout.readline())
        assert (listening["event"], listening["host"]) == ("listening", "127.0.0.1")
        yield process, listening["port"]
    finally:
        process.kill()
        process.communicate()


def stop(process: subprocess.Popen[str], how: signal.Signals = signal.SIGINT) -> tuple[int, list[Any]]:
    process.send_signal(how)
    said, _ = process.communicate(timeout=PATIENCE)
    return process.returncode, [json.loads(line) for line in said.splitlines()]


def send(*arguments: object, mail: bytes = MAIL, **env: str) -> tuple[int, str, str]:
    done = subprocess.run(
        command("send", *arguments),
        input=mail,
        capture_output=True,
        timeout=PATIENCE,
        check=False,
        env=os.environ | env,
        start_new_session=True,  # without a terminal
    )
    return done.returncode, done.stdout.decode(), done.stderr.decode()


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_serve_answers_as_told_and_prints_what_it_took(how: signal.Signals) -> None:
    """Scripts hold for their pattern, the first that matches wins, and each message is a line of JSON; it ends with 0."""
    scripts = (
        "--once",
        r"RCPT bob@* 450 4.2.0 later\nmuch later",
        "--on",
        "RCPT eve@* 550 5.1.1 who?",
        "--on",
        "NOOP 250 hi",
    )
    with serving(*scripts) as (process, port):
        with smtplib.SMTP("127.0.0.1", port) as client:
            assert client.sendmail(APP, [ANN, BOB, "eve@example.com"], MAIL) == {
                BOB: (450, b"4.2.0 later\n4.2.0 much later"),
                "eve@example.com": (550, b"5.1.1 who?"),
            }
            assert client.sendmail(APP, [BOB], MAIL) == {}
            assert client.noop() == (250, b"hi")
        code, messages = stop(process, how)
    assert code == 0
    assert [message["recipients"] for message in messages] == [[ANN], [BOB]]
    assert messages[0]["content"].encode() == MAIL
    assert (messages[0]["event"], messages[0]["sender"], messages[0]["authenticated"]) == ("message", APP, None)


def test_serve_prints_the_answers_that_it_was_told() -> None:
    """A person sees each answer of a script, and to whom it went, before the message that came through."""
    process = subprocess.Popen(
        command("serve", "--once", "RCPT bob@* 450 4.2.0 later"), stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    port = int(process.stdout.readline().rpartition(":")[2])
    with smtplib.SMTP("127.0.0.1", port) as client:
        client.sendmail(APP, [ANN, BOB], MAIL)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=PATIENCE)
    assert said.splitlines()[0] == f"RCPT {BOB}: 450 4.2.0 later"


def test_serve_encrypts_logs_in_and_limits(tmp_path: Path) -> None:
    """--tls, --ca, --auth and --max-rate do what their arguments of ScriptedServer do."""
    authority = tmp_path / "ca.pem"
    options = ("--tls", "--ca", authority, "--auth", "app:pass:word", "--max-rate", "1/60")
    with serving(*options) as (process, port):
        with smtplib.SMTP("localhost", port) as client:
            client.starttls(context=ssl.create_default_context(cafile=str(authority)))
            client.login("app", "pass:word")
            client.sendmail(APP, [BOB], MAIL)
            with pytest.raises(smtplib.SMTPDataError, match="Maximum sending rate exceeded"):
                client.sendmail(APP, [BOB], MAIL)
        _, [message] = stop(process)
    assert (message["tls"], message["authenticated"]) == (True, "app")


def test_serve_tells_people_too() -> None:
    """Without --json the port and the messages are for people."""
    process = subprocess.Popen(command("serve"), stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        port = int(process.stdout.readline().rpartition(":")[2])
        with smtplib.SMTP("127.0.0.1", port) as client:
            client.sendmail(APP, [BOB], MAIL)
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
    assert said.startswith("message 1: from <app@example.com> to bob@example.com (in the clear, on connection 1)\n")
    assert "    Subject: hello\n" in said


def test_serve_misses_what_never_came() -> None:
    """A --once that was not reached is an exit code of 1."""
    with serving("--once", "RCPT bob@* 450 4.2.0 later") as (process, _):
        assert stop(process) == (1, [])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--on", "RCPT later"], "no verb, pattern and reply"),
        (["--on", "RECEIPT 450 later"], "RECEIPT"),
        (["--on", "RCPT 999 what"], "999"),
        (["--auth", "app"], "app:secret"),
        (["--max-rate", "fast"], "14/1"),
        (["--max-rate", "0/1"], "max_rate"),
        (["--tls", "maybe"], "maybe"),
        (["--port", "1000000"], "port"),
    ],
)
def test_serve_says_what_is_wrong_with_its_arguments(arguments: list[str], said: str) -> None:
    """A wrong argument is an exit code of 2, and a line that names it; nothing is a traceback."""
    done = subprocess.run(command("serve", *arguments), capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_serve_names_the_extra_that_is_missing() -> None:
    """Without what `smtpretry.testing` needs it says what to install."""
    run = "import sys; sys.modules['trustme'] = None; from smtpretry.__main__ import main; sys.exit(main(['serve']))"
    done = subprocess.run([sys.executable, "-c", run], capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 2
    assert done.stderr == "smtpretry.testing needs aiosmtpd and trustme: install smtpretry with its extra 'testing'\n"


def test_send_tells_the_story_as_it_goes() -> None:
    """What the server says, the wait and the end of each recipient are lines; the message arrives as it was."""
    with ThreadedServer() as server:
        server.on("RCPT", BOB, "450 4.2.0 Greylisted for 1 second", times=1)
        code, said, complained = send("--host", "127.0.0.1", "--port", server.port)
        assert (code, complained) == (0, "")
        lines = said.splitlines()
        assert "RCPT: 450 4.2.0 Greylisted for 1 second -> RETRY in 1 s" in lines
        assert any(re.fullmatch(r"attempt 2 in [01] s: bob@example\.com", line) for line in lines)
        assert [line.split(": ")[:2] for line in lines[-2:]] == [[BOB, "accepted"], [ANN, "accepted"]]
        assert [message.recipients for message in server.messages] == [[ANN], [BOB]]
        assert server.messages[0].content.endswith(MAIL.replace(b"Bcc: ann@example.com\r\n", b""))


def test_send_exits_with_1_where_somebody_has_not_got_it() -> None:
    """A refusal is told, and is an exit code of 1; --to and --sender take the place of the headers."""
    with ThreadedServer() as server:
        server.on("RCPT", "eve@*", "550 5.1.1 who?")
        at = ("--host", "127.0.0.1", "--port", server.port, "--sender", ANN, "--to", BOB, "--to", "eve@example.com")
        code, said, _ = send(*at)
        assert (code, server.messages[0].sender, list(server.mailboxes)) == (1, ANN, [BOB])
        assert "eve@example.com: refused: 550 5.1.1 who?" in said
        server.on("MAIL", "451 4.3.0 try again in 300 seconds")
        code, said, complained = send(*at, "--give-up-after", "1")
        assert (code, complained) == (1, "")
        refusal = "451 4.3.0 try again in 300 seconds"
        assert said.splitlines() == [
            f"MAIL: {refusal} -> given up",
            f"{BOB}: given up: {refusal}",
            f"eve@example.com: given up: {refusal}",
            "gave up: give_up_after (1 s) allows no try after another 5 min",
        ]


def test_send_tells_of_a_server_that_is_down_once() -> None:
    """What the story tells does not come a second time as a log, with another wait."""
    with ThreadedServer() as server:
        port = server.port
    code, said, complained = send("--host", "127.0.0.1", "--port", port, "--give-up-after", "1")
    assert (code, complained) == (1, "")
    assert re.match(r"CONNECT: no reply \(.*nothing listens there.*\) -> given up\n", said)
    assert "RECONNECT" not in said


@pytest.mark.parametrize("stage", ["RCPT", "END_OF_DATA"])
def test_send_tells_at_ctrl_c_who_has_the_message(stage: str) -> None:
    """It ends with 130, and says who has got it, who has not, and who may have it."""
    with ThreadedServer() as server:
        server.on("RCPT", BOB, "450 4.2.0 Greylisted")
        reached = threading.Event()
        if stage == "END_OF_DATA":
            server.fail_at(stage, "stall")
            server.on_script = lambda script, _: reached.set() if script.verb == stage else None
        process = subprocess.Popen(
            command("send", "--host", "127.0.0.1", "--port", server.port),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert process.stdin is not None
        process.stdin.write(MAIL)
        process.stdin.close()
        process.stdin = None
        assert process.stdout is not None
        if stage == "RCPT":
            assert any(b"attempt 2 in" in line for line in iter(process.stdout.readline, b""))
        else:
            assert reached.wait(PATIENCE)
        process.send_signal(signal.SIGINT)
        said, complained = process.communicate(timeout=PATIENCE)
    assert (process.returncode, complained) == (130, b"")
    ends = {
        "RCPT": [f"{BOB}: not sent: 450 4.2.0 Greylisted", f"{ANN}: accepted: 250 2.0.0 Ok: queued as 1"],
        "END_OF_DATA": [f"{BOB}: not sent", f"{ANN}: uncertain: broken off before the server's answer"],
    }
    assert said.decode().splitlines() == ends[stage]


@pytest.mark.parametrize("rich", [True, False])
@pytest.mark.parametrize("out", ["| head -0", "> /dev/full"])
def test_send_sends_though_nobody_hears_of_it(out: str, rich: bool, tmp_path: Path) -> None:
    """A reader that has gone, and a full disk, end no retries; the exit code tells what became of the message."""
    if not rich:
        (tmp_path / "rich.py").write_text("raise ImportError\n", encoding="utf-8")
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    with ThreadedServer() as server:
        server.on("RCPT", BOB, "450 4.2.0 try again in 1 second", times=1)
        line = f"{shlex.join(command('send', '--host', '127.0.0.1', '--port', server.port))}; echo $? >&2"
        shell = ["/bin/sh", "-c", f"({line}) {out}"]
        done = subprocess.run(shell, input=MAIL, capture_output=True, timeout=PATIENCE, check=False, env=env)
        assert {who for message in server.messages for who in message.recipients} == {ANN, BOB}
    complaint = b"[Errno 28] No space left on device\n" if "full" in out else b""
    assert done.stderr == complaint + b"0\n"


def test_serve_serves_though_nobody_reads_what_it_prints() -> None:
    """A test that has read the port may close the pipe."""
    with serving("--once", "RCPT 450 4.2.0 later") as (process, port):
        assert process.stdout is not None
        process.stdout.close()
        process.stdout = None
        with smtplib.SMTP("127.0.0.1", port) as client:
            with pytest.raises(smtplib.SMTPRecipientsRefused):
                client.sendmail(APP, [BOB], b"Subject: hello\r\n\r\n")
            assert client.sendmail(APP, [BOB], b"Subject: hello\r\n\r\n") == {}
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE) == 0


def test_send_logs_in_with_a_password_that_nobody_sees() -> None:
    """--username logs in with SMTP_PASSWORD, which stands neither in the arguments nor in the story."""
    with ThreadedServer(auth=("app", "secret-of-app")) as server:
        at = ("--host", "127.0.0.1", "--port", server.port, "--username", "app")
        assert send(*at, SMTP_PASSWORD="secret-of-app")[0] == 0
        assert server.messages[0].authenticated == "app"
        code, said, _ = send(*at, SMTP_PASSWORD="another-secret")
        assert (code, "535" in said, "another-secret" in said) == (1, True, False)


@pytest.mark.parametrize(("mail", "said"), [(b"", "no sender"), (b"From: a@b.c\r\n\r\nhello\r\n", "no recipients")])
def test_send_says_what_is_wrong_with_the_message(mail: bytes, said: str) -> None:
    """A message without sender or recipients is an exit code of 2, with the cure."""
    code, _, complained = send(mail=mail)
    assert code == 2
    assert said in complained
    assert "Traceback" not in complained


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--give-up-after", "inf"), "'inf' is no number of seconds"),
        (("--username", "app"), "set SMTP_PASSWORD"),
        (("--port", "99999"), "port is at most 65535"),
    ],
)
def test_send_says_what_is_wrong_with_its_arguments(arguments: tuple[str, ...], said: str) -> None:
    """A time without an end, and a password that nobody can be asked for, are an exit code of 2, with the cause."""
    code, _, complained = send(*arguments)
    assert code == 2
    assert said in complained
    assert "Traceback" not in complained
