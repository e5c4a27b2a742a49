"""The application for INSTALLED_APPS."""

from __future__ import annotations

from django.apps import AppConfig


class SMTPRetryConfig(AppConfig):  # type: ignore[misc] # Django has no types
    """It brings ``manage.py smtpretry_worker``."""

    name = "smtpretry.django"
    label = "smtpretry"
