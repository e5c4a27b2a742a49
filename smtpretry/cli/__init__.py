"""The commands of ``python -m smtpretry``, a module each; and how they print."""

from __future__ import annotations

import textwrap
from typing import Final

UNREADABLE: Final = 2
"""The exit code where a line held no reply, or the arguments were wrong."""

_WIDTH = 100


def wrapped(name: str, text: str, indent: int = 4) -> list[str]:
    """The lines of a named text, folded."""
    first = f"{' ' * indent}{name:<8}" if name else " " * indent
    return textwrap.wrap(text, _WIDTH, initial_indent=first, subsequent_indent=" " * len(first), break_on_hyphens=False)
