"""Regular expressions that are compiled when they are first needed: all of the table's take a tenth of a second."""

from __future__ import annotations

import re
from functools import cache


@cache
def compiled(pattern: str, flags: re.RegexFlag = re.NOFLAG) -> re.Pattern[str]:
    """The expression, compiled once."""
    return re.compile(pattern, flags)
