"""`SupportsSend`: what an aiosmtplib client and a `RetryingSMTP` have in common, for annotations."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from aiosmtplib.typing import Default

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from aiosmtplib import SMTPResponse

    from .envelope import Message
    from .session.connection import Timeout


class SupportsSend(Protocol):
    """An object with aiosmtplib's send methods: annotate with it what takes either client.

    The methods are those of `aiosmtplib.SMTP` and of `RetryingSMTP`, which says what they do.
    """

    async def send_message(  # noqa: D102 - said by the class
        self,
        message: Message,
        /,
        *,
        sender: str | None = None,
        recipients: str | Sequence[str] | None = None,
        mail_options: Iterable[str] | None = None,
        rcpt_options: Iterable[str] | None = None,
        timeout: Timeout = Default.token,
    ) -> tuple[dict[str, SMTPResponse], str]: ...

    async def sendmail(  # noqa: D102 - said by the class
        self,
        sender: str,
        recipients: str | Sequence[str],
        message: str | bytes,
        /,
        *,
        mail_options: Iterable[str] | None = None,
        rcpt_options: Iterable[str] | None = None,
        timeout: Timeout = Default.token,
    ) -> tuple[dict[str, SMTPResponse], str]: ...
