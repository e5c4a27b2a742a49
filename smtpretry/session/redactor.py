"""Hides what was sent to log in: what a server repeats of it reaches no log, exception, note or queue."""

from __future__ import annotations

import re
from itertools import product
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

_IN_A_ROW: Final = 8  # characters that are enough to know it by
_SHORTEST: Final = 4  # characters; a shorter secret would be found in any text
_HIDDEN: Final = "[...]"
# One character of a text; a line's end together with the status that leads the next line.
_PIECE = r"\s+(?:[245]\.\d{1,3}\.\d{1,3}(?=\s))?|."
# One that may be written as a URL, a quoted-printable body, a literal of a program or a web page has it.
_ESCAPED = r"(?:[%=]|\\x|\\u00|&#x)([0-9A-Fa-f]{2});?"
_PIECES = re.compile(rf"()(?:{_PIECE})", re.DOTALL), re.compile(rf"{_ESCAPED}|{_PIECE}", re.DOTALL)
# A server may have put anything between letters; and what it left as it was may be anything but letters.
_COUNTED: Final[tuple[Callable[[str], bool], ...]] = (str.isalnum, lambda char: not char.isspace())


class Redactor:
    """Hides each stretch of a text that repeats a secret: in any case, wrapped, spaced out or %-encoded.

    Args:
        parts: of these no eight characters in a row are shown.
        wholes: of these only the whole is hidden.
    """

    def __init__(self, parts: Iterable[str] = (), wholes: Iterable[str] = ()) -> None:
        secrets = [*((part, _IN_A_ROW) for part in parts), *((whole, len(whole)) for whole in wholes)]
        self._stretches = [_stretches(secrets, counts) for counts in _COUNTED]

    def add(self, *parts: str) -> None:
        """Hide these, too."""
        for counts, by_length in zip(_COUNTED, self._stretches, strict=True):
            for length, stretches in _stretches(((part, _IN_A_ROW) for part in parts), counts).items():
                by_length.setdefault(length, set()).update(stretches)

    def redact(self, text: str) -> str:
        """The text without what it repeats."""
        if not any(self._stretches):
            return text
        hidden = bytearray(len(text))
        for pieces, (counts, by_length) in product(
            (list(_pieces(written, text)) for written in _PIECES), zip(_COUNTED, self._stretches, strict=True)
        ):
            seen = [(char, start, end) for piece, start, end in pieces if counts(piece) for char in piece.casefold()]
            bare = "".join(char for char, _, _ in seen)
            for length, stretches in by_length.items():
                for first in range(len(bare) - length + 1):
                    if bare[first : first + length] in stretches:
                        start, end = seen[first][1], seen[first + length - 1][2]
                        hidden[start:end] = b"\1" * (end - start)
        if not any(hidden):
            return text
        return re.sub("\0+", _HIDDEN, "".join("\0" if hidden[place] else char for place, char in enumerate(text)))


def _stretches(secrets: Iterable[tuple[str, int]], counts: Callable[[str], bool]) -> dict[int, set[str]]:
    """What to look for, by its length."""
    found = dict[int, set[str]]()
    for secret, longest in secrets:
        bare = "".join(char.casefold() for char in secret if counts(char))
        length = min(longest, len(bare))
        if length >= _SHORTEST:
            found.setdefault(length, set()).update(
                bare[start : start + length] for start in range(len(bare) - length + 1)
            )
    return found


def _pieces(written: re.Pattern[str], text: str) -> Iterator[tuple[str, int, int]]:
    for piece in written.finditer(text):
        yield chr(int(piece[1], 16)) if piece[1] else piece[0][:1], piece.start(), piece.end()
