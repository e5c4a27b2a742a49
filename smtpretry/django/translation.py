"""aiosmtplib's exceptions as those of smtplib, which applications of Django catch: `translated`."""

from __future__ import annotations

import smtplib

import aiosmtplib


def translated(error: Exception) -> Exception:
    """What smtplib would have raised; the error itself, where it is none of SMTP's.

    It carries the same `delivery` and notes, and `__cause__` is the original.
    """
    if not isinstance(error, aiosmtplib.SMTPException):
        return error
    ours = _translated(error)
    ours.__cause__ = error
    if hasattr(error, "delivery"):
        ours.delivery = error.delivery  # type: ignore[attr-defined] # as on each exception of a send
    for note in getattr(error, "__notes__", ()):
        ours.add_note(note)
    return ours


def _translated(error: aiosmtplib.SMTPException) -> Exception:  # noqa: PLR0911 - one for each kind
    match error:
        case aiosmtplib.SMTPRecipientsRefused():
            refused = {one.recipient: (one.code, one.message.encode()) for one in error.recipients}
            return smtplib.SMTPRecipientsRefused(refused)
        case aiosmtplib.SMTPSenderRefused():
            return smtplib.SMTPSenderRefused(error.code, error.message.encode(), error.sender)
        case aiosmtplib.SMTPResponseException():
            kind = next((theirs for its, theirs in _BY_KIND.items() if isinstance(error, its)), None)
            return (kind or smtplib.SMTPResponseException)(error.code, error.message)
        case aiosmtplib.SMTPNotSupported():
            return smtplib.SMTPNotSupportedError(str(error))
        case aiosmtplib.SMTPConnectError():
            return _of_the_socket(error)
        case aiosmtplib.SMTPServerDisconnected() | aiosmtplib.SMTPTimeoutError():
            return smtplib.SMTPServerDisconnected(str(error))
        case _:
            return smtplib.SMTPException(str(error))


def _of_the_socket(error: aiosmtplib.SMTPException) -> Exception:
    """The failure to connect as the socket told it."""
    if isinstance(error, aiosmtplib.SMTPTimeoutError):
        return TimeoutError(str(error))
    cause: BaseException | None = error
    while cause is not None and (isinstance(cause, aiosmtplib.SMTPException) or not isinstance(cause, OSError)):
        cause = cause.__cause__ or cause.__context__
    return ConnectionError(str(error)) if cause is None else type(cause)(*cause.args)


_BY_KIND: dict[type[aiosmtplib.SMTPResponseException], type[smtplib.SMTPResponseException]] = {
    aiosmtplib.SMTPConnectResponseError: smtplib.SMTPConnectError,
    aiosmtplib.SMTPHeloError: smtplib.SMTPHeloError,
    aiosmtplib.SMTPAuthenticationError: smtplib.SMTPAuthenticationError,
    aiosmtplib.SMTPDataError: smtplib.SMTPDataError,
}
