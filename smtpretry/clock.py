"""What time it is: by a clock that nobody sets while a send waits, and by the one that other processes go by."""

from __future__ import annotations

import sys
import time
from functools import cache, partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


if sys.platform == "win32":
    _time_of_day, _monotonic = time.time, time.monotonic
else:  # those two stand still in a test with freezegun, where the event loop goes on: a wait would never end
    _time_of_day = partial(time.clock_gettime, time.CLOCK_REALTIME)
    _monotonic = partial(time.clock_gettime, time.CLOCK_MONOTONIC)


@cache
def _set() -> float:
    """What sets the clock, when it is first asked: a process may be frozen after its imports, and thawed days later."""
    return _time_of_day() - _monotonic()


def now() -> float:
    """Seconds since the epoch, by a clock that nobody sets anew."""
    return _set() + _monotonic()


def lag() -> float:
    """Seconds that the time of day is ahead of that clock, as where the machine slept; less than one is none."""
    seconds = time.time() - now()
    return seconds if abs(seconds) >= 1 else 0.0


def of_day(clock: Callable[[], float]) -> Callable[[], float]:
    """The time of day in place of `now`; any other clock, as tests have, as it is."""
    return time.time if clock is now else clock
