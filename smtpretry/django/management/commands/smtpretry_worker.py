"""``manage.py smtpretry_worker``: send what the queue of a project's mails holds."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

from django.core import mail
from django.core.management.base import BaseCommand, CommandError

from smtpretry import log
from smtpretry.client import RetryingSMTP
from smtpretry.django.backend import EmailBackend, log_losses
from smtpretry.django.outbox import engine
from smtpretry.queues.engine import QueueError

if TYPE_CHECKING:
    import argparse


class Command(BaseCommand):  # type: ignore[misc] # Django has no types
    """Work the queue off until SIGINT or SIGTERM."""

    help = "Sends the mails that wait in the queue (the option queue of smtpretry.django.EmailBackend), until stopped."

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add the command's own."""
        parser.add_argument("--mailer", default="default", help="which of MAILERS (Django 6.1); default: default")

    def handle(self, *_: Any, mailer: str, **__: Any) -> None:  # noqa: ANN401 - Django's
        """Work."""
        try:
            backend = mail.mailers[mailer] if hasattr(mail, "mailers") else mail.get_connection()
        except Exception as error:
            raise CommandError(str(error)) from error
        if not isinstance(backend, EmailBackend) or not backend.queue:
            msg = 'there is no queue: set the option queue of smtpretry.django.EmailBackend, as BASE_DIR / "mail.db"'
            raise CommandError(msg)
        try:
            make, options = backend.arguments()
            smtp = RetryingSMTP(make, **options)
        except Exception as error:
            raise CommandError(str(error)) from error
        log.say(logging.INFO, "smtp worker sends what %s holds", backend.queue)
        self.stdout.write(f"Sending what {backend.queue} holds. Ctrl-C stops.")
        try:
            asyncio.run(self._work(smtp, backend.queue))
        except QueueError as error:
            raise CommandError(str(error)) from error

    async def _work(self, smtp: RetryingSMTP, queue: str) -> None:
        async with smtp:
            await engine(queue).work(smtp, on_end=log_losses)
