"""Django, set up once for the tests of its backend."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import django
import pytest
from django.conf import settings

if TYPE_CHECKING:
    from collections.abc import Callable

FOLDER = tempfile.TemporaryDirectory()
DATABASE = Path(FOLDER.name, "mail.db")
settings.configure(
    SECRET_KEY="of-tests",
    USE_TZ=True,
    EMAIL_BACKEND="smtpretry.django.EmailBackend",
    DEFAULT_FROM_EMAIL="app@example.com",
    SERVER_EMAIL="app@example.com",
    ADMINS=[("Root", "root@example.com")],
    INSTALLED_APPS=["smtpretry.django"],
    DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": DATABASE}},
)
django.setup()


@pytest.fixture
def database() -> Path:
    """Return the file of the project's database."""
    return DATABASE


@pytest.fixture
def pip() -> Callable[..., None]:
    """Run pip; skip the test, with pip's own words, where it gets nothing, and fail it where no test may be skipped."""

    def run(*arguments: object) -> None:
        command = [sys.executable, "-m", "pip", *map(str, arguments)]
        done = subprocess.run(command, check=False, capture_output=True, text=True, errors="replace", timeout=300)
        if done.returncode:
            reason = f"pip did not get what this test needs of Django: {done.stderr.strip()}"
            (pytest.fail if os.environ.get("SMTPRETRY_REQUIRE_MTA") == "1" else pytest.skip)(reason)

    return run
