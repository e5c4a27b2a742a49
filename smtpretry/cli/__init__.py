"""The commands of ``python -m smtpretry``, a module each; and how they print."""

from __future__ import annotations

import os
import sys
import textwrap
from typing import Final

UNREADABLE: Final = 2
"""The exit code where a line held no reply, or the arguments were wrong."""

_WIDTH = 100


def unheard(error: BaseException) -> None:
    """Have standard output go nowhere from now on, where it cannot be written; nobody misses a reader that has gone."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if not isinstance(error, (BrokenPipeError, SystemExit)):
        print(error, file=sys.stderr)


def wrapped(name: str, text: str, indent: int = 4) -> list[str]:
    """The lines of a named text, folded."""
    first = f"{' ' * indent}{name:<8}" if name else " " * indent
    return textwrap.wrap(text, _WIDTH, initial_indent=first, subsequent_indent=" " * len(first), break_on_hyphens=False)
