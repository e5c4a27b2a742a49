"""How fast a server lets a client send, found out from its refusals: a value that decides, and does no waiting."""

from __future__ import annotations

import math
from collections import deque

_LONG = 10.0  # seconds; a wait from there on is the period of the limit ("100 a minute"), a shorter one says little
_MARGIN = 0.95  # of what was measured: messages do not arrive as evenly as they are sent
_CUT = 0.8  # of that, where a speed that was found before has turned out to be too fast
_LEAST = 0.6  # of the speed before that: a few messages tell little
_CLIMB = 8.0  # times the time that a refusal has cost: how long the speed takes to what was measured
_CALM = 25  # messages that it takes at least
_MINUTE = 60.0  # seconds: the commonest period, which growing waits would miss by half of it
_FEW = 8  # messages that were taken before the first refusal: too few to tell a speed from
_SEARCH = 1.5  # times the speed, after each message, where it was told from few
_LATE = 0.5  # of the distance between two messages: what the next one makes up for
LONGEST = 900.0  # seconds that a wait may grow to
_RECENT = 1000  # messages that are remembered until the first refusal


class Pace:
    """The speed that all connections of a client share. Nothing is paced until the server says "too fast".

    The first refusal tells the speed: what was taken in the last second, or in the last minute where the refusal is
    about minutes. From then on messages go evenly. Each later refusal lowers the speed. While messages are taken it
    rises again: fast at first, hardly at all near what was measured, faster and faster above. The longer a refusal has
    held the client up, the longer it takes until the next one is risked.

    A server that goes on refusing is asked less and less often, but also a minute after the first refusal, and when the
    patience ends.

    A limit of a minute or more counts messages, as Postfix's does. In each period it gets as many as it took, at double
    speed and then none until the period is over: an even stream would waste what such a limit allows at once.

    All times are seconds on one clock. `next_slot` asks; `let_through`, `taken` and `too_fast` tell.

    Args:
        longest: seconds that a wait may grow to.
        patience: seconds after the first refusal in which the last message is tried.

    Attributes:
        rate: messages a second; infinite while nothing is paced.
        period: seconds in which the server counts, as far as that is known.
        resumes_at: until when nothing goes, since the last refusal.
    """

    def __init__(self, longest: float = LONGEST, patience: float = math.inf) -> None:
        self.longest, self.patience = longest, patience
        self.rate, self.period = math.inf, 1.0
        self.resumes_at = -math.inf
        self._measured, self._progress, self._climb = self.rate, 1.0, _CLIMB  # the climb, in seconds
        self._searching = False
        self._measuring = False  # what was on its way at the first refusal counts as taken before it
        self._slot = -math.inf  # when the next message may go
        self._in_demand = False  # whether messages have to wait for their slot
        self._counted, self._counted_from = 0, -math.inf  # messages in this period of a limit that counts
        self._run, self._began_at = 0, -math.inf  # messages that were taken without a refusal between them
        self._refusals, self._refused_at = 0, -math.inf  # in a row, and the first of them
        self._recent = deque[float](maxlen=_RECENT)  # when messages were taken

    @property
    def is_known(self) -> bool:
        """Whether messages are paced."""
        return self.rate < math.inf

    @property
    def probing(self) -> bool:
        """Whether a single message is to find out if the server takes any again."""
        return self._refusals > 0

    @property
    def searching(self) -> bool:
        """Whether the speed rises with each message, until the next refusal."""
        return self._searching

    @property
    def _counts(self) -> bool:
        return self.period >= _LONG

    @property
    def _share(self) -> float:
        """What one message, taken within the period, adds to the speed."""
        return (1 if self._counts else _MARGIN) / self.period

    def next_slot(self, now: float) -> float:
        """When the next message may go."""
        return max(now, self._slot, self.opens_at)

    @property
    def opens_at(self) -> float:
        """Until when nothing goes: since the last refusal, or since as many have gone as the server counts to."""
        if self._counted and self._counts and self._counted >= max(1, round(self.rate * self.period)):
            return max(self.resumes_at, self._counted_from + self.period / _MARGIN)
        return self.resumes_at

    def let_through(self, now: float) -> None:
        """A message goes."""
        if not self.is_known:
            return
        if now >= self._counted_from + self.period / _MARGIN:
            self._counted, self._counted_from = 0, now
        self._counted += 1
        apart = 1 / self.rate / (2 if self._counts else 1)
        late = now - self._slot
        self._in_demand = late < apart
        self._slot = (self._slot if late < _LATE * apart else now) + apart

    def taken(self, now: float) -> None:
        """The server has taken a message."""
        if now < self.resumes_at:  # it was on its way at the refusal
            self.add(1, self._share)
            return
        if self._refusals:
            self._resume(now)
        elif not self._run:
            self._began_at = now
        self._run += 1
        if not self.is_known:
            self._recent.append(now)
        elif self._searching:
            self.rate *= _SEARCH
        elif self._in_demand:
            self._progress += 1 / self.rate / self._climb
            self.rate = self._risen()

    def too_fast(self, now: float, wait: float, since: float, *, named: bool = False) -> float:
        """The server has refused a message because they come too fast; return until when nothing goes.

        Args:
            now: the time.
            wait: seconds that the reply or its row asks for. They double with each further refusal in a row.
            since: when the message was let through. One that was on its way at the last refusal tells nothing new.
            named: whether the reply itself asks for that wait.
        """
        if since < self.resumes_at:
            return self.resumes_at
        self._refusals += 1
        if self._refusals == 1:
            self._refused_at = now
            if self.is_known:
                self._lower()
            else:
                self._measure(now, wait)
        self.resumes_at = now + min(wait * 2 ** (self._refusals - 1), max(wait, self.longest))
        minute, last = self._refused_at + _MINUTE, self._refused_at + self.patience
        if now + wait <= minute:
            self.resumes_at = min(self.resumes_at, minute)
        if now < last and not named:
            self.resumes_at = min(self.resumes_at, last)
        self._climb = max(_CLIMB * (self.resumes_at - self._refused_at), _CALM / self._measured)
        self.rate = self._risen()
        return self.resumes_at

    def add(self, run: int, measured: float) -> None:
        """Before the first refusal, the server took so many more: they were on their way, or another client's."""
        if self._measuring:
            self._searching = self._run + run < _FEW and (self._searching or not self.is_known)
            self._run += run
            self._measured = measured + (self._measured if self.is_known else 0.0)
            self.rate = self._risen()

    def _measure(self, now: float, wait: float) -> None:
        """Tell the speed from what was taken before the first refusal. Where that is nothing, it stays unknown."""
        self.period = wait if wait >= _LONG else 1.0
        self._measuring = True
        if self._run:
            lately = sum(at > now - self.period for at in self._recent)
            on_average = self._run * self.period / max(self.period, now - self._began_at)  # `_recent` may be too short
            self._measured = max(lately, on_average) * self._share
            self._searching = self._run < _FEW
        self._recent.clear()

    def _lower(self) -> None:
        """Take a good part of a speed away that was found before."""
        if self._searching:
            known = self.rate / _SEARCH
        else:
            known = max(min(self.rate, self._run / self.period), self.rate * _LEAST)
        self._measured, self._progress, self._searching = _MARGIN * known, 0.0, False

    def _risen(self) -> float:
        """The speed that the progress stands for: as much of what was measured at 0, that at 1, twice that at 2."""
        way = self._progress - 1
        return self._measured * (1 + (1 if way > 0 else 1 - _CUT) * way**3)

    def _resume(self, now: float) -> None:
        """The server takes messages again. Where it has long taken none, so long is the period in which it counts."""
        out, self._measuring = now - self._refused_at, False
        if self._refusals > 1 and out >= _LONG and self._run:
            self.period, self._progress = out, 1.0
            self.rate = self._measured = min(self._measured, self._run / out)
            self._counted, self._counted_from = 1, now
        self._run, self._began_at, self._refusals = 0, now, 0
