"""This side of TLS: one context for all connections that are set alike, built off the event loop, and its troubles."""

from __future__ import annotations

import asyncio
import os
import ssl
import threading
from typing import TYPE_CHECKING, Final

import aiosmtplib

from smtpretry.replies.patterns import compiled

from .reader import SPEAKS_TLS

if TYPE_CHECKING:
    from aiosmtplib import SMTP

SETTINGS: Final = (
    "this side's TLS settings do not work: look at tls_context=, cert_bundle=, client_cert= and client_key="
)
NOT_OFFERED: Final = (
    "use a port or a server that offers STARTTLS, often port 587; or leave start_tls=True (Django: EMAIL_USE_TLS) out, "
    "and send in the clear"
)
SPEAKS_CLEAR: Final = "the server speaks SMTP in the clear where TLS was expected"

_SMTPS = 465  # the port where TLS begins with the first byte (RFC 8314 §3.3)
_NO_TLS = frozenset({"WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "UNKNOWN_PROTOCOL", "PACKET_LENGTH_TOO_LONG"})
_USE_NO_TLS = (
    "the port does not begin with TLS: use_tls=True is for port 465 (Django: EMAIL_USE_SSL); for ports 587 and 25 "
    "leave it out, and STARTTLS is done where the server offers it"
)
# Alerts of the server's, and what OpenSSL says of the server on this side.
_NO_COMMON = (
    "ALERT_(?:HANDSHAKE_FAILURE|PROTOCOL_VERSION|INSUFFICIENT_SECURITY)|UNSUPPORTED_PROTOCOL|NO_PROTOCOLS|NO_CIPHERS"
    "|KEY_TOO_SMALL|UNSAFE_LEGACY_RENEGOTIATION"
)
_NOT_TRUSTED = "ALERT_(?:UNKNOWN_CA|BAD_CERTIFICATE|(?:NO_|UNSUPPORTED_)?CERTIFICATE|ACCESS_DENIED)"
_OTHER_TLS = (
    "this side and the server agree on no version or cipher of TLS, or the server wants a certificate of this side: "
    "look at tls_context= and client_cert="
)
_OTHER_CERTIFICATE = (
    "the server wants a certificate of this side, or does not trust it: look at client_cert= and client_key="
)
_USE_TLS = (
    "the port begins with TLS: give use_tls=True (Django: EMAIL_USE_SSL), which is for port 465; "
    "port 587 is for STARTTLS"
)


class Contexts:
    """The TLS contexts of a client's connections. A file of them that has changed is read again."""

    def __init__(self) -> None:
        self._built = dict[tuple[object, ...], ssl.SSLContext]()
        self._lock = threading.Lock()

    async def of(self, client: SMTP) -> ssl.SSLContext:
        """The client's own context, or the one for its settings.

        Raises:
            OSError, ssl.SSLError, ValueError: the settings do not work.
        """
        context = (
            client.tls_context
            if client.tls_context is not None
            else await asyncio.to_thread(self._for_settings, client)
        )
        # What would fail on this side alone fails here, and not in the handshake, where it looks like the server's.
        context.wrap_bio(ssl.MemoryBIO(), ssl.MemoryBIO(), server_hostname=client.hostname)
        return context

    def _for_settings(self, client: SMTP) -> ssl.SSLContext:
        files = client.cert_bundle, client.client_cert, client.client_key
        stamps = (os.stat(file).st_mtime_ns if file is not None else None for file in files)  # noqa: PTH116 - no pathlib for one call
        settings = client.validate_certs, *files, *stamps
        with self._lock:
            if settings not in self._built:
                self._built[settings] = _build(client)
            return self._built[settings]


def _build(client: SMTP) -> ssl.SSLContext:
    """As aiosmtplib builds it."""
    context = ssl.create_default_context(ssl.Purpose.SERVER_AUTH)
    context.check_hostname = client.validate_certs
    context.verify_mode = ssl.CERT_REQUIRED if client.validate_certs else ssl.CERT_NONE
    if client.cert_bundle is not None:
        context.load_verify_locations(cafile=client.cert_bundle)
    if client.client_cert is not None:
        context.load_cert_chain(client.client_cert, keyfile=client.client_key)
    return context


def mistaken(client: SMTP, error: BaseException) -> str | None:
    """The cure, where a connection failed as it does if the two sides differ about TLS."""
    cause = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    reason = str(getattr(cause, "reason", ""))
    if compiled(_NO_COMMON).search(reason):
        return _OTHER_TLS
    if compiled(_NOT_TRUSTED).search(reason):
        return _OTHER_CERTIFICATE
    if client.use_tls:
        return _USE_NO_TLS if SPEAKS_CLEAR in str(cause) or reason in _NO_TLS else None
    silent = isinstance(error, aiosmtplib.SMTPTimeoutError) and client.port == _SMTPS
    return _USE_TLS if silent or SPEAKS_TLS in str(error) else None
