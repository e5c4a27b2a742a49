"""AUTH over a conversation, one mechanism after the other."""

from __future__ import annotations

import asyncio
import base64
import errno
import socket
from typing import TYPE_CHECKING

import aiosmtplib
from aiosmtplib import SMTPResponse

from smtpretry.errors import chain
from smtpretry.replies.patterns import caseless
from smtpretry.replies.reply import Reply, Said
from smtpretry.replies.stage import Stage
from smtpretry.replies.words import LOGGED_IN

from .codes import CHALLENGE, MECHANISM_FAILS, WRONG_PASSWORD
from .credentials import challenge_of
from .failed import Failed

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from .conversation import Conversation, Timeout
    from .credentials import Credentials, Dialogue
    from .needs import Needs

_CANCEL = b"*"
_NO_NETWORK = (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN, errno.EHOSTDOWN, errno.EADDRNOTAVAIL)


async def ask_for(credentials: Credentials, seconds: float | None) -> str | bytes:
    """The secret to log in with. A generator of tokens without a network is like a busy server: raises `Failed`.

    Raises:
        Whatever else the generator raises.
    """
    try:
        async with asyncio.timeout(seconds) as limit:
            return await credentials.secret()
    except Exception as error:
        cause = _no_network(error)
        if cause is None:
            raise
        why = f"oauth_token_generator raised {type(error).__name__}: {cause}".rstrip(": ")
        if limit.expired():
            why = "no token came from oauth_token_generator in time"
        kind = aiosmtplib.SMTPTimeoutError if isinstance(cause, TimeoutError) else aiosmtplib.SMTPServerDisconnected
        raise Failed.without_reply(Stage.AUTH, kind(why)) from error


def _no_network(error: Exception) -> OSError | None:
    """Why there was no network: the error itself, or what an HTTP client made it of; None where it is another one."""
    for link in chain(error):
        if isinstance(link, (ConnectionError, TimeoutError, socket.gaierror)):
            return link
        if isinstance(link, OSError) and link.errno in _NO_NETWORK:
            return link
    return None


async def log_in(
    conversation: Conversation,
    dialogue: Callable[[str], Dialogue],
    mechanisms: Sequence[str],
    needs: Needs,
    timeout: Timeout,
) -> SMTPResponse:
    """AUTH by the first mechanism that works here. Raises `Failed`, with the last refusal.

    Raises it at once where the session is logged in already. A password is judged by one 535 to PLAIN or LOGIN. To
    CRAM-MD5 it may mean that the server keeps no password in the clear, which that mechanism needs.
    """
    useless = set[str]()
    for mechanism in mechanisms:
        try:
            accepted = await _say(conversation, mechanism, dialogue(mechanism), timeout)
        except Failed as failed:
            code = failed.said.reply.code
            works = code not in MECHANISM_FAILS and (mechanism, code) != ("cram-md5", WRONG_PASSWORD)
            if works or is_logged_in(failed.said.reply) or mechanism == mechanisms[-1] or not conversation.is_open:
                raise
            useless.add(mechanism)
        else:
            needs.useless |= useless
            return accepted
    raise AssertionError  # there is no log-in without a mechanism


def is_logged_in(refusal: Reply) -> bool:
    """Whether AUTH is refused for the session needs none: a proxy, an address or a certificate has logged it in."""
    return caseless(LOGGED_IN).search(refusal.text) is not None


async def _say(conversation: Conversation, mechanism: str, dialogue: Dialogue, timeout: Timeout) -> SMTPResponse:
    """One AUTH command, and what it takes to its end (RFC 4954 §4)."""
    initial = next(dialogue)
    command = b"AUTH " + mechanism.upper().encode()
    code, text = await _exchange(conversation, command if initial is None else command + b" " + _wire(initial), timeout)
    while code == CHALLENGE:
        conversation.check(Stage.AUTH, code, text, expect=3)
        try:
            answer = dialogue.send(challenge_of(text)) or b""
        except StopIteration:
            return await _cancel(conversation, text, timeout)
        conversation.hide(_wire(answer), answer.rpartition(b" ")[2] if mechanism == "cram-md5" else b"")
        code, text = await _exchange(conversation, _wire(answer), timeout)
    conversation.check(Stage.AUTH, code, text)
    return SMTPResponse(code, text)


async def _cancel(conversation: Conversation, challenge: str, timeout: Timeout) -> SMTPResponse:
    """Give up on a challenge that cannot be answered, which the server answers with 501."""
    code, text = await _exchange(conversation, _CANCEL, timeout)
    reply = conversation.reply(code, text)
    if reply.is_transient or reply.is_permanent:
        conversation.check(Stage.AUTH, code, text)
    conversation.abort()
    asked = challenge_of(challenge).decode(errors="replace")
    why = f"the server asks for what the credentials do not hold: {conversation.reply(CHALLENGE, asked).text!r}"
    raise Failed(Said(Stage.AUTH, reply, aiosmtplib.SMTPAuthenticationError(code, reply.message)), why)


async def _exchange(conversation: Conversation, line: bytes, timeout: Timeout) -> SMTPResponse:
    conversation.send(line + b"\r\n")
    return await conversation.receive(Stage.AUTH, timeout)


def _wire(response: bytes) -> bytes:
    return base64.b64encode(response)
