"""A veil over what was sent to log in: what a server repeats of it reaches no log, exception, note or queue."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_IN_A_ROW = 8  # characters that are enough to know it by
_SHORTEST = 4  # characters; a shorter secret would be found in any text
_HIDDEN = "[...]"
# One character of a text, however it is written; a line's end together with the status that leads the next line.
_PIECE = re.compile(r"%([0-9A-Fa-f]{2})|\s+(?:[245]\.\d{1,3}\.\d{1,3}(?=\s))?|.", re.DOTALL)


class Veil:
    """Hides each stretch of a text that repeats a secret: in any case, wrapped, spaced out or %-encoded.

    Args:
        parts: of these no eight characters in a row are shown.
        wholes: of these only the whole is hidden.
    """

    def __init__(self, parts: Iterable[str] = (), wholes: Iterable[str] = ()) -> None:
        self._stretches: dict[int, set[str]] = {}  # by their length
        self._exact = list[str]()
        for secret, longest in (*((part, _IN_A_ROW) for part in parts), *((whole, len(whole)) for whole in wholes)):
            bare = "".join(_bare(secret))
            length = min(longest, len(bare))
            if length >= _SHORTEST:
                found = self._stretches.setdefault(length, set())
                found.update(bare[start : start + length] for start in range(len(bare) - length + 1))
            elif len(secret) >= _SHORTEST:  # nothing but punctuation
                self._exact.append(secret)

    def over(self, text: str) -> str:
        """The text without what it repeats."""
        for secret in self._exact:
            text = text.replace(secret, _HIDDEN)
        if not self._stretches:
            return text
        seen = [(char, start, end) for piece, start, end in _pieces(text) for char in _bare(piece)]
        bare = "".join(char for char, _, _ in seen)
        hidden = bytearray(len(text))
        for length, stretches in self._stretches.items():
            for first in range(len(bare) - length + 1):
                if bare[first : first + length] in stretches:
                    start, end = seen[first][1], seen[first + length - 1][2]
                    hidden[start:end] = b"\1" * (end - start)
        if not any(hidden):
            return text
        shown = "".join("\0" if hidden[place] else char for place, char in enumerate(text))
        return re.sub("\0+", _HIDDEN, shown)


def _pieces(text: str) -> Iterator[tuple[str, int, int]]:
    for piece in _PIECE.finditer(text):
        char = chr(int(piece[1], 16)) if piece[1] else piece[0][:1]
        yield char, piece.start(), piece.end()


def _bare(text: str) -> Iterator[str]:
    """Letters and digits alone, in one case: the rest may be anything after a wrap."""
    for char in text:
        if char.isalnum():
            yield from char.casefold()
