"""Bytes in, replies out (RFC 5321 §4.2). No I/O."""

from __future__ import annotations

import re
from collections import deque
from typing import Final, NamedTuple

from aiosmtplib import SMTPResponse, SMTPResponseException

from smtpretry.replies.reply import CODES, NO_REPLY

from .codes import GOODBYES

LONGEST_LINE: Final = 8192  # bytes
LONGEST_REPLY: Final = 4 * LONGEST_LINE  # bytes; generous over any reply to EHLO

SPEAKS_TLS: Final = "the server speaks TLS where SMTP in the clear was expected"

_BEGIN = re.compile(rb"(\d{3})(?!\d)(-?)")
_WHOLE = re.compile(rb"([2-5]\d\d) ([ -~]{,998})\r\n")  # a reply of one line, as nearly all are
_REFUSAL = re.compile(rb"[45]\d\d(?!\d)")
_MARK = b"\xef\xbb\xbf"  # a byte order mark
_PADDING = b"\r\0"
_TLS_RECORDS = (b"\x15\x03", b"\x16\x03")  # an alert, a handshake (RFC 8446 §5.1)


class Beyond(NamedTuple):
    """What came beyond the replies that were due: the next one could be taken for the answer to something else.

    Attributes:
        goodbye: the server's word that it closes.
        further: the codes of the other replies.
    """

    goodbye: SMTPResponse | None = None
    further: frozenset[int] = frozenset()


NOTHING: Final = Beyond()


class Replies:
    """Replies out of bytes, however they are cut. No I/O.

    Blank lines between replies are skipped. Within a multi-line reply a line without a code is text of it. A line that
    is no reply is a fault where a reply is due, and skipped after the last reply that was.

    Attributes:
        due: how many replies are waited for.
        ready: those that came, in order.
        beyond: what came beyond them.
        fault: what cannot be read on from.
    """

    def __init__(self, due: int) -> None:
        self.due = due
        self.ready = deque[SMTPResponse]()
        self.beyond = NOTHING
        self.fault: SMTPResponseException | None = None
        self._buffer = bytearray()
        self._lines = list[bytes]()  # of the reply that has begun
        self._code = b""  # of the last of them that has one
        self._size = 0  # of these lines
        self._stray = False  # what has begun came before anything was asked

    def expect(self, replies: int) -> None:
        """So many more are due."""
        if not self.due:
            self._stray = bool(self._buffer or self._lines)
        self.due += replies
        self.beyond = NOTHING

    def forget(self, due: int) -> None:
        """Let go of what came and was not taken; so many are due now."""
        self.ready.clear()
        self._buffer.clear()
        self._lines.clear()
        self.due, self.beyond, self._stray = due, NOTHING, False

    def feed(self, data: bytes) -> None:
        """Take in what came."""
        place = 0
        if not (self._buffer or self._lines or self._stray):
            while self.due and (whole := _WHOLE.match(data, place)):
                self.due -= 1
                self.ready.append(SMTPResponse(int(whole[1]), whole[2].strip(b" ").decode("ascii")))
                place = whole.end()
        if place == len(data):
            return
        self._buffer += data[place:]
        while self.fault is None and (end := self._buffer.find(b"\n") + 1):
            line = bytes(self._buffer[:end])
            del self._buffer[:end]
            self._read(line)
        if not self._buffer.strip(_PADDING):
            self._buffer.clear()  # the end of what was read, or it would seem to be the beginning of a reply
        if self._is_due and not self._lines and self._buffer.startswith(_TLS_RECORDS):
            self._fail(SPEAKS_TLS)
        elif len(self._buffer) > LONGEST_LINE:
            self._too_long(bytes(self._buffer))

    def end(self) -> None:
        """Nothing more comes. A refusal counts although its end is missing; a success has to be whole."""
        begun = _REFUSAL.match(self._buffer)
        code = begun[0] if begun else self._code if self._lines else b""
        if self.fault is None and _REFUSAL.match(code):
            rest = self._buffer[4:] if begun else self._buffer
            self._buffer = bytearray()
            self._read(code + b" " + bytes(rest))

    @property
    def _is_due(self) -> bool:
        return self.due > 0 and not self._stray

    def _read(self, line: bytes) -> None:
        line = line.removeprefix(_MARK).lstrip(_PADDING)
        begin = _BEGIN.match(line)
        self._size = self._size + len(line) if self._lines else 0
        if len(line) > LONGEST_LINE or self._size > LONGEST_REPLY:
            self._too_long(line)
        elif begin is not None and (not self._lines or int(begin[1]) in CODES):
            self._lines.append(line[4:].strip(b" \t\r\n"))
            self._code = begin[1]
            if not begin[2]:
                text = b"\n".join(self._lines).decode(errors="surrogateescape")
                self._lines.clear()
                self._complete(SMTPResponse(int(begin[1]), text))
        elif self._lines:
            self._lines.append(line.strip(b" \t\r\n"))
        elif line.strip() or self._stray:
            self._no_reply(line)

    def _complete(self, reply: SMTPResponse) -> None:
        if self._is_due:
            self.due -= 1
            self.ready.append(reply)
            return
        self._stray = False
        if reply.code in GOODBYES:
            self.beyond = self.beyond._replace(goodbye=self.beyond.goodbye or reply)
        elif reply.code in CODES:
            self.beyond = self.beyond._replace(further=self.beyond.further | {reply.code})

    def _no_reply(self, line: bytes) -> None:
        if not self._is_due:
            self._stray = False
        elif line.startswith(_TLS_RECORDS):
            self._fail(SPEAKS_TLS)
        else:
            self._fail(f"Malformed SMTP response line: {line.decode(errors='ignore')}")

    def _too_long(self, line: bytes) -> None:
        """Read no further. What the line says counts where it began the reply, and was to end it."""
        begin = _BEGIN.match(line)
        self._buffer.clear()
        if self._is_due:
            if begin is not None and not (begin[2] or self._lines):
                self._complete(SMTPResponse(int(begin[1]), line[4:LONGEST_LINE].decode(errors="surrogateescape")))
            self._fail("Response too long")
        self._lines.clear()

    def _fail(self, why: str) -> None:
        self._buffer.clear()
        self.fault = SMTPResponseException(NO_REPLY, why)
