"""aiosmtpd: one service, in the process of the tests."""

from __future__ import annotations

import logging
import mailbox
import re
import ssl
from email.utils import getaddresses
from typing import TYPE_CHECKING

from aiosmtpd.controller import Controller
from aiosmtpd.handlers import Mailbox
from aiosmtpd.smtp import AuthResult, LoginPassword

from .server import PASSWORD, USERNAME, MailServer, free_ports

if TYPE_CHECKING:
    from pathlib import Path

    from .server import Service


class Aiosmtpd(MailServer):
    """aiosmtpd with one service, in a thread of its own, and one maildir for everybody."""

    program = "aiosmtpd"

    def __init__(self, directory: Path, service: Service, certificate: bytes) -> None:
        """Take the service that it offers, its settings arguments of SMTP, and the certificate with its key."""
        super().__init__(directory)
        (directory / "certificate.pem").write_bytes(certificate)
        tls_context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        tls_context.load_cert_chain(directory / "certificate.pem")
        [self._port] = free_ports(1)
        self._controller = Controller(
            Mailbox(directory / "mail"),
            "127.0.0.1",
            self._port,
            tls_context=tls_context,
            authenticator=self._authenticate,
            **service.settings,
        )
        self._logger, self._handler = logging.getLogger("mail.log"), logging.FileHandler(self.log)

    def start(self) -> None:
        """Start its thread, and write down every session whole."""
        self._logger.setLevel(logging.DEBUG)
        self._logger.addHandler(self._handler)
        self._controller.start()

    def stop(self) -> None:
        """End its thread."""
        self._controller.stop()
        self._logger.removeHandler(self._handler)
        self._logger.setLevel(logging.NOTSET)
        self._handler.close()

    def port(self, _service: str) -> int:
        """Return the port of its service."""
        return self._port

    def replies(self, _service: str) -> list[str]:
        """Return every reply that it has sent, as its own log has it."""
        return re.findall(r" << b'(\d{3}[ -].*)'$", self.log.read_text(), re.MULTILINE)

    def copies(self, recipient: str, message_id: str) -> int:
        """Count the copies of a message that came for a recipient."""
        mails = mailbox.Maildir(self.directory / "mail", create=False)
        came_for = [getaddresses([mail["X-RcptTo"]]) for mail in mails if mail["Message-ID"] == message_id]
        return sum(("", recipient) in recipients for recipients in came_for)

    @staticmethod
    def _authenticate(
        _server: object, _session: object, _envelope: object, _mechanism: str, data: object
    ) -> AuthResult:
        known = LoginPassword(USERNAME.encode(), PASSWORD.encode())
        return AuthResult(success=data == known, handled=False)
