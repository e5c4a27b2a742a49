"""The option `queue`: what has to wait goes to the embedded queue, a transaction is an outbox, a worker sends it."""

from __future__ import annotations

import os
import signal
import sqlite3
import threading
import time
from typing import TYPE_CHECKING

import pytest
from django.core import mail
from django.core.management import call_command
from django.db import OperationalError, connection, transaction
from django.test.utils import override_settings
from support import ANN, APP, BOB

from smtpretry import RetryPolicy
from smtpretry.testing import ThreadedServer

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PATIENCE = 20  # seconds


@pytest.fixture
def server(database: Path) -> Iterator[ThreadedServer]:
    """Start a server, and let the settings lead there and to a queue in the project's database."""
    with (
        ThreadedServer() as running,
        override_settings(EMAIL_HOST=running.hostname, EMAIL_PORT=running.port, SMTPRETRY={"queue": database}),
    ):
        yield running
    connection.close()
    with sqlite3.connect(database) as own:
        own.executescript("DELETE FROM smtpretry_messages; DELETE FROM smtpretry_deliveries;")
    own.close()


def queued(database: Path) -> int:
    own = sqlite3.connect(database)
    try:
        return int(own.execute("SELECT count(*) FROM smtpretry_deliveries").fetchone()[0])
    finally:
        own.close()


def test_what_has_to_wait_goes_to_the_queue(server: ThreadedServer, database: Path) -> None:
    """A mail that the server wants in five minutes counts as sent at once, and the queue has it; others are sent."""
    server.on("RCPT", BOB, "450 4.2.0 Greylisted for 300 seconds")
    message = mail.EmailMessage("hello", "text", APP, [ANN, BOB])
    began = time.monotonic()
    assert message.send() == 1
    assert time.monotonic() - began < 4
    assert (message.delivery.accepted, message.delivery.deferred) == ([ANN], [BOB])
    assert (list(server.mailboxes), queued(database)) == ([ANN], 1)


def test_within_a_transaction_it_is_an_outbox(server: ThreadedServer, database: Path) -> None:
    """Within transaction.atomic a mail is queued with the transaction, and is gone with it; the server sees nothing."""
    with transaction.atomic():
        assert mail.send_mail("hello", "text", None, [ANN]) == 1
    assert queued(database) == 1

    def fails() -> None:
        with transaction.atomic():
            mail.send_mass_mail([("s", "b", APP, [ANN]), ("s", "b", APP, [BOB])])
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert queued(database) == 1
    assert server.commands == []


@pytest.mark.usefixtures("server")
def test_a_database_that_is_locked_raises_what_django_raises(database: Path) -> None:
    """Where the transaction cannot write any more, the exception is Django's, as for each statement of its own."""
    own = sqlite3.connect(database, isolation_level=None)
    own.execute("CREATE TABLE IF NOT EXISTS orders (number INTEGER)")

    def fails() -> None:
        with transaction.atomic():
            connection.cursor().execute("SELECT * FROM orders").fetchall()
            own.execute("INSERT INTO orders VALUES (17)")
            mail.send_mail("hello", "text", None, [ANN])

    with pytest.raises(OperationalError, match="locked"):
        fails()
    own.close()
    assert queued(database) == 0


def test_the_worker_sends_what_the_queue_holds(
    server: ThreadedServer, database: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`manage.py smtpretry_worker` says what it works on, sends what was queued, once, and ends with SIGTERM."""
    with transaction.atomic():
        mail.send_mail("hello", "text", None, [ANN])
        mail.send_mail("hello", "text", None, [BOB])

    def stop() -> None:
        deadline = time.monotonic() + PATIENCE
        while len(server.messages) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGTERM)

    stopping = threading.Thread(target=stop)
    stopping.start()
    call_command("smtpretry_worker")
    stopping.join()
    assert f"Sending what {database} holds." in capsys.readouterr().out
    assert {who: len(messages) for who, messages in server.mailboxes.items()} == {ANN: 1, BOB: 1}


def test_a_policy_of_its_own_holds_with_a_queue(server: ThreadedServer, database: Path) -> None:
    """A policy that is given takes the place of the queue's five days, and `max_wait` that of the five seconds."""
    server.on("RCPT", BOB, "450 4.2.0 Greylisted for 1 second", times=1)
    server.on("RCPT", BOB, "450 4.2.0 Greylisted for 2 seconds")
    options = {"queue": str(database), "policy": RetryPolicy(), "max_wait": 1.5}
    with override_settings(SMTPRETRY=options):
        message = mail.EmailMessage("hello", "text", APP, [BOB])
        assert message.send() == 1
        assert len(message.delivery.attempts) == 2
        assert message.delivery.deferred == [BOB]
