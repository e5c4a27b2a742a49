"""The application for INSTALLED_APPS."""

from __future__ import annotations

from django.apps import AppConfig
from django.core.checks import register


class SMTPRetryConfig(AppConfig):  # type: ignore[misc] # Django has no types
    """It brings ``manage.py smtpretry_worker``, and ``manage.py check`` looks at the backend's options."""

    name = "smtpretry.django"
    label = "smtpretry"

    def ready(self) -> None:
        """Register the check."""
        from .checks import check_options  # noqa: PLC0415 - once the settings are there

        register(check_options)
