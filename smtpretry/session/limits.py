"""What a server has let us know: until when it wants nothing, how fast it takes mail, how many connections it bears."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from .pace import LONGEST, Pace

if TYPE_CHECKING:
    from smtpretry.replies.reply import Said


_SHORT = 5.0  # seconds that the pace may take, and who waits for a turn stays in line


class Limits(ABC):
    """What holds for all connections of a client. All times are seconds on the policy's clock.

    Args:
        size: how many connections there may be.
        patience: seconds that no pause lasts longer than.

    Attributes:
        limit: how many may be in use now; fewer than `size` for a while where the server said that there are too many.
        resumes_at: until when nothing is tried, because the server said so.
        reason: what the server said then, or when it said that messages come too fast.
        failures: how many times in a row it said so. While there is one, a single connection finds out if it is over.
        pace: the speed that the server allows.
        refused_at: since when it takes nothing: when it first refused a message after the last that it took, or None.
        is_hopeless: whether what it said last of itself was final, and nothing better came since.
    """

    def __init__(self, size: int, patience: float) -> None:
        self.size = self.limit = size
        self.resumes_at = 0.0
        self.reason: Said | None = None
        self.failures = 0
        self.is_hopeless = False
        self.pace = Pace(longest=min(LONGEST, patience), patience=patience)
        self.refused_at: float | None = None
        self._failed: str | None = None
        self._widener: asyncio.TimerHandle | None = None

    @property
    @abstractmethod
    def others(self) -> int:
        """How many connections are open or in use beside the one in use here."""

    @abstractmethod
    def _serve(self) -> None:
        """Use what is allowed again."""

    @abstractmethod
    def _note_pause(self, now: float, until: float, reason: Said) -> None:
        """Let the hooks know."""

    @abstractmethod
    def _note_end_of_pause(self) -> None:
        """Let the hooks know."""

    @property
    def paused_until(self) -> float:
        """Until when nothing is tried, because the server said so."""
        return max(self.resumes_at, self.pace.resumes_at)

    @property
    def opens_at(self) -> float:
        """Until when nothing is tried, because the server said so, or its limit for this period is used up."""
        return max(self.resumes_at, self.pace.opens_at)

    def is_closed(self, now: float) -> bool:
        """Whether the server wants nothing for longer than one waits in line."""
        return now < self.resumes_at or now + _SHORT < self.pace.opens_at

    def failure_number(self, now: float) -> int:
        """Which failure of the server in a row this is. What comes during a pause belongs to the one that began it."""
        return max(1, self.failures + (now >= self.resumes_at))

    def pause(self, now: float, until: float, reason: Said, *, is_final: bool = False) -> None:
        """Let nothing be tried until then."""
        self.is_hopeless = is_final
        if until > max(now, self.resumes_at):
            self._note_pause(now, until, reason)
        self.failures = self.failure_number(now)
        self.refused_at = now if self.refused_at is None else self.refused_at
        self.resumes_at, self.reason = max(self.resumes_at, until), reason

    def is_second_in_a_row(self, delivery: str) -> bool:
        """It failed; return whether another delivery did so before, with no message taken in between."""
        before, self._failed = self._failed, delivery
        return before not in (None, delivery)

    def resume(self, now: float) -> None:
        """The server works: the next pause begins from a short one again. An answer during a pause ends none."""
        if self.failures and now >= self.resumes_at:
            self._note_end_of_pause()
            self.is_hopeless = False
            self.failures, self.limit = 0, self.size  # what was taken for too many connections was an outage
            self._serve()

    def slow_down(self, now: float, wait: float, reason: Said, since: float) -> float:
        """The server says that messages come too fast; return until when nothing goes. See `Pace.too_fast`."""
        self.reason, before = reason, self.paused_until
        self.refused_at = now if self.refused_at is None else self.refused_at
        named = reason.reply.retry_after is not None
        until = self.pace.too_fast(now, min(wait, self.pace.patience), since, named=named)
        if until > max(now, before):
            self._note_pause(now, until, reason)
        return until

    def took(self, now: float) -> None:
        """The server has taken a message."""
        self._failed = self.refused_at = None
        alone = self.pace.probing and not self.failures
        self.pace.taken(now)
        self.resume(now)
        if alone and not self.pace.probing:
            self._note_end_of_pause()
            self._serve()

    @property
    def _allowed(self) -> int:
        """How many connections may be in use now."""
        return 1 if self.failures or self.pace.probing else self.limit

    def too_many_connections(self, seconds: float) -> None:
        """This connection is one too many: use no more than the others for so long."""
        self.limit = self.others
        self._widen_in(seconds)

    def _widen_in(self, seconds: float) -> None:
        if self._widener is not None:
            self._widener.cancel()
        self._widener = asyncio.get_running_loop().call_later(seconds, self._widen, seconds)

    def _widen(self, seconds: float) -> None:
        """Try with one connection more."""
        self.limit = min(self.limit + 1, self.size)
        if self.limit < self.size:
            self._widen_in(seconds)
        self._serve()

    def _reset_limit(self) -> None:
        """Forget that there were too many connections."""
        if self._widener is not None:
            self._widener.cancel()  # or the loop would keep all of this until it is due
            self._widener = None
        self.limit = self.size
