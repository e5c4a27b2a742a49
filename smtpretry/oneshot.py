"""`send`: one message over a connection of its own, in place of `aiosmtplib.send`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import aiosmtplib
from aiosmtplib.smtp import DEFAULT_TIMEOUT
from aiosmtplib.typing import Default, SMTPTokenGenerator, SocketPathType

from .client import RetryingSMTP
from .envelope import Message, prepare
from .errors import conclude, tell
from .policy import RetryPolicy

if TYPE_CHECKING:
    import socket
    import ssl
    from collections.abc import Sequence

    from aiosmtplib import SMTPResponse


async def send(
    message: Message | str | bytes,
    /,
    *,
    sender: str | None = None,
    recipients: str | Sequence[str] | None = None,
    mail_options: Sequence[str] | None = None,
    rcpt_options: Sequence[str] | None = None,
    hostname: str | None = "localhost",
    port: int | None = None,
    username: str | bytes | None = None,
    password: str | bytes | None = None,
    oauth_token_generator: SMTPTokenGenerator | None = None,
    local_hostname: str | None = None,
    source_address: tuple[str, int] | None = None,
    timeout: float | None = DEFAULT_TIMEOUT,
    use_tls: bool = False,
    start_tls: bool | None = None,
    validate_certs: bool = True,
    client_cert: str | None = None,
    client_key: str | None = None,
    tls_context: ssl.SSLContext | None = None,
    cert_bundle: str | None = None,
    socket_path: SocketPathType | None = None,
    sock: socket.socket | None = None,
    policy: RetryPolicy = RetryPolicy(),  # noqa: B008 - a frozen value
) -> tuple[dict[str, SMTPResponse], str]:
    """Connect, send one message with retries, disconnect: `aiosmtplib.send` with a policy.

    Arguments, return value and exceptions are aiosmtplib's; see `RetryingSMTP.send_message` for what retries add. If
    you give a username, each connection starts with AUTH, over TLS or loopback only. The reply to the final dot may
    take 600 seconds (RFC 5321 §4.5.3.2.6), unless you give a `timeout` of your own.

    Raises:
        aiosmtplib.SMTPException: nobody was accepted.
        ValueError, TypeError: an argument is wrong; nothing was sent.
    """
    client = aiosmtplib.SMTP(
        hostname=hostname,
        port=port,
        username=username,
        password=password,
        oauth_token_generator=oauth_token_generator,
        local_hostname=local_hostname,
        source_address=source_address,
        timeout=timeout,
        use_tls=use_tls,
        start_tls=start_tls,
        validate_certs=validate_certs,
        client_cert=client_cert,
        client_key=client_key,
        tls_context=tls_context,
        cert_bundle=cert_bundle,
        socket_path=socket_path,
        sock=sock,
    )
    delivery = prepare(
        message, sender=sender, recipients=recipients, mail_options=mail_options, rcpt_options=rcpt_options
    )
    smtp = RetryingSMTP(client, policy)
    try:
        async with smtp:
            await smtp._deliver(delivery, Default.token if timeout == DEFAULT_TIMEOUT else timeout)  # noqa: SLF001 - next door
    except BaseException as error:
        if not hasattr(error, "delivery"):  # it came in closing
            tell(error, delivery, policy.clock())
        raise
    return conclude(delivery, policy.clock())
