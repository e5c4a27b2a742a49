"""Django's own tests of its SMTP backend, from its sdist, with ours in its place."""

from __future__ import annotations

import subprocess
import sys
import tarfile
from typing import TYPE_CHECKING

import django

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

NOT_OURS = {  # what does not apply, and why
    "test_auth_attempted": "it asks for smtplib's own words where the server offers no AUTH; ours say the same in others",
    "test_connection_timeout_custom": "it looks at the smtplib.SMTP object inside, and there is none",
    "test_email_msg_uses_crlf": "it listens to smtplib.SMTP.send; all that we send has CRLF (tests/test_send.py)",
    "test_reopen_replaces_partial_connection": "it looks at the smtplib.SMTP object inside, and there is none",
    "test_send_messages_after_open_failed": "a send connects by itself, and needs no open",
    # of Django 6.1
    "test_serialized_message_uses_crlf_line_ending": "it listens to smtplib.SMTP.sendmail",
    "test_smtp_connection_uses_host_and_port": "it listens to smtplib.SMTP, for a host that is not there",
    "test_smtp_connection_uses_timeout": "it looks at the smtplib.SMTP object inside, and there is none",
    "test_ssl_context_uses_ssl_certfile_and_keyfile": "it asks how the context is made; ours is always the default one",
}
RUN = """
import importlib, sys, unittest
sys.path.insert(0, sys.argv[1])
from django.conf import settings
from smtpretry.testing import no_wait
settings.configure(SECRET_KEY="x", DATABASES={}, SMTPRETRY={"policy": no_wait()})
import django; django.setup()
import smtpretry.django
from django.core.mail.backends import smtp
smtp.EmailBackend = smtpretry.django.EmailBackend
tests = importlib.import_module("mail.tests" if django.VERSION < (6, 1) else "mail.test_backends")
cases = [tests.SMTPBackendTests, tests.SMTPBackendStoppedServerTests]
suite = unittest.TestSuite(map(unittest.defaultTestLoader.loadTestsFromTestCase, cases))
result = unittest.TextTestRunner(verbosity=2).run(suite)
failed = {test.id().rpartition(".")[2] for test, _ in result.failures + result.errors}
print(result.testsRun, len(result.skipped), *sorted(failed))
"""


def test_djangos_own_tests_pass(tmp_path: Path, pip: Callable[..., None]) -> None:
    """All tests of Django's SMTP backend pass with ours, but for the named ones that look into smtplib."""
    pip("download", "-q", "--no-deps", "--no-binary", ":all:", "-d", tmp_path, f"django=={django.__version__}")
    [sdist] = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    [tests] = tmp_path.glob("*/tests")
    ran = subprocess.run(
        [sys.executable, "-c", RUN, tests], check=False, capture_output=True, text=True, errors="replace", timeout=120
    )
    assert ran.stdout, ran.stderr
    number, skipped, *failed = ran.stdout.split()
    there = {name for name in NOT_OURS if f"{name} (" in ran.stderr}  # Django 5.2.0 has one of them less
    assert set(failed) == there, ran.stderr
    assert (int(number) >= 50, skipped, len(there) >= 4) == (True, "0", True)
