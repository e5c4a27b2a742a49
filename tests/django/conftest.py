"""Django, set up once for the tests of its backend."""

from __future__ import annotations

import tempfile
from pathlib import Path

import django
import pytest
from django.conf import settings

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
