"""`MAILERS` of Django 6.1, with OPTIONS for the retries, in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

PROJECT = """
import inspect, logging, sys
sys.path.insert(0, sys.argv[1])
if sys.version_info < (3, 12):  # for which Django 6 is not made: it asks for this one function
    inspect.markcoroutinefunction = lambda function: function
from django.conf import settings
from smtpretry.testing import ThreadedServer, no_wait

policy = no_wait()
with ThreadedServer(auth=("app", "secret")) as server:
    at = {"host": server.hostname, "port": server.port, "username": "app", "password": "secret"}
    ours = {"BACKEND": "smtpretry.django.EmailBackend"}
    settings.configure(SECRET_KEY="x", DATABASES={}, ADMINS=["root@example.com"], SERVER_EMAIL="app@example.com", INSTALLED_APPS=["smtpretry.django"], MAILERS={
        "default": ours | {"OPTIONS": at | {"policy": policy, "max_connections": 2}},
        "misspelt": ours | {"OPTIONS": at | {"polcy": policy, "max_wait": "60"}},
        "nowhere": ours,
    })
    import django; django.setup()
    from django.core import mail
    server.on("RCPT", "bob@*", "450 4.2.0 Greylisted for 20 seconds", times=1)
    assert django.VERSION[:2] == (6, 1)
    from django.core.checks import run_checks
    told = [(one.msg, one.hint) for one in run_checks() if one.id.startswith("smtpretry")]
    assert told == [
        ("OPTIONS of MAILERS['misspelt'] has polcy, which EmailBackend does not take.", "Did you mean policy?"),
        ("OPTIONS of MAILERS['misspelt'] has a wrong max_wait.", "max_wait is a number of seconds, not '60'"),
    ], told
    assert mail.send_mail("Grüße", "Schöne Grüße", "app@example.com", ["bob@example.com"], using="default") == 1
    assert mail.mailers.default.send_messages([mail.EmailMessage(to=["ann@example.com"], from_email="app@example.com")]) == 1
    mail.mail_admins("alarm", "fire")
    assert policy.waits == [20.0]
    assert sorted(server.mailboxes) == ["ann@example.com", "bob@example.com", "root@example.com"]
    assert {message.authenticated for message in server.messages} == {"app"}
    assert server.received("bob@example.com")[0].message["Subject"] == "Grüße"
    for wrong, why in (("misspelt", "polcy"), ("nowhere", "host")):
        try:
            mail.mailers[wrong]
        except mail.InvalidMailer as error:
            assert why in str(error), error
        else:
            raise AssertionError(wrong)
"""


def test_mailers_with_options(tmp_path: Path, pip: Callable[..., None]) -> None:
    """OPTIONS take Django's names and ours; a misspelt one and a missing host are told as Django tells it, and by its check."""
    pip("install", "-q", "--no-deps", "--ignore-requires-python", "--target", tmp_path, "django>=6.1,<6.2")
    ran = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROJECT, tmp_path],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (ran.returncode, ran.stderr) == (0, "")
