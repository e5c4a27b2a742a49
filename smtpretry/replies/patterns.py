"""Regular expressions that are compiled when they are first needed: all of the table's take a tenth of a second."""

from __future__ import annotations

import re
from functools import cache


@cache
def compiled(pattern: str) -> re.Pattern[str]:
    """The expression, compiled once."""
    return re.compile(pattern)


@cache
def caseless(pattern: str) -> re.Pattern[str]:
    """The same, whatever the case of the letters."""
    return re.compile(pattern, re.IGNORECASE)
