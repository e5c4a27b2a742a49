"""Django, set up once for the tests of its backend."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import django
import pytest
from django.conf import settings
from django.utils import deprecation

if TYPE_CHECKING:
    from collections.abc import Callable

FOLDER = tempfile.TemporaryDirectory()
DATABASE = Path(FOLDER.name, "mail.db")
OF_THE_OLD_SETTINGS = "RemovedInDjango2028Warning"  # Django 6.1 has MAILERS, which has tests of its own
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    settings.configure(
        SECRET_KEY="of-tests",
        USE_TZ=True,
        EMAIL_BACKEND="smtpretry.django.EmailBackend",
        DEFAULT_FROM_EMAIL="app@example.com",
        SERVER_EMAIL="app@example.com",
        ADMINS=[("Root", "root@example.com")] if django.VERSION < (6,) else ["root@example.com"],
        INSTALLED_APPS=["smtpretry.django"],
        DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": DATABASE}},
    )
    django.setup()


def pytest_itemcollected(item: pytest.Item) -> None:
    """Let the settings that begin with EMAIL_ be used where they are deprecated."""
    if hasattr(deprecation, OF_THE_OLD_SETTINGS):
        item.add_marker(pytest.mark.filterwarnings(f"ignore::django.utils.deprecation.{OF_THE_OLD_SETTINGS}"))


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
