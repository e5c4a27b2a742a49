"""Django, set up once for the tests of its backend."""

from __future__ import annotations

import django
from django.conf import settings

settings.configure(
    SECRET_KEY="of-tests",
    USE_TZ=True,
    EMAIL_BACKEND="smtpretry.django.EmailBackend",
    DEFAULT_FROM_EMAIL="app@example.com",
    SERVER_EMAIL="app@example.com",
    ADMINS=[("Root", "root@example.com")],
    INSTALLED_APPS=["smtpretry.django"],
    DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": "unused.db"}},
)
django.setup()
