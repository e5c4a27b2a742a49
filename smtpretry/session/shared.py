"""A pace that the clients of several workers keep together: what one finds out is stored, and holds for all. No I/O."""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from smtpretry.replies.reply import Reply, Said
from smtpretry.replies.stage import Stage

from .pace import LONGEST, Pace

if TYPE_CHECKING:
    from collections.abc import Iterable

_AHEAD: Final = 0.4  # seconds before its turn that a message may be taken from the queue
_LATE: Final = 1.0  # seconds after which a turn that nobody has used is over
_PATIENT: Final = 2.0  # seconds that a message waits for its turn to be given
_MOST: Final = 1000  # events that are kept where nobody tells them
_KEPT: Final = (
    *("rate", "period", "resumes_at", "_measured", "_progress", "_climb", "_searching", "_measuring", "_slot"),
    *("_in_demand", "_counted", "_counted_from", "_run", "_began_at", "_refusals", "_refused_at"),
)


class SharedPace(Pace):
    """One client's copy of the pace that is stored for all: it follows that, has turns in it, and notes its own news.

    Args:
        pace: what this client has found out so far.
    """

    def __init__(self, pace: Pace) -> None:
        super().__init__(longest=pace.longest, patience=pace.patience)
        self.__dict__.update(vars(pace))
        self._asked_at = -math.inf  # when turns were asked for
        self._turns = deque[float]()  # when its next messages may go, by the pace of all
        self._news = deque[Callable[[Pace], object]](maxlen=_MOST)

    @property
    def has_news(self) -> bool:
        """Whether something has happened that the others do not know."""
        return bool(self._news)

    def next_slot(self, now: float) -> float:
        """When the next message may go: in its turn; where turns are being given, there is none before."""
        if self._turns:
            return max(now, self._turns[0], self.resumes_at)
        return max(super().next_slot(now), self._asked_at + _PATIENT if self.is_known else now)

    @property
    def opens_at(self) -> float:
        """Until when nothing goes."""
        return self.resumes_at if self._turns else super().opens_at

    def let_through(self, now: float) -> None:
        """A message goes: as its turn was told to the others, or beside them."""
        if self._turns:
            self._turns.popleft()
            return
        super().let_through(now)
        self._note(lambda pace: pace.let_through(now))

    def taken(self, now: float) -> None:
        """The server has taken a message."""
        self._note(lambda pace: pace.taken(now))  # before it ends a pause, and nothing is left to be told
        super().taken(now)

    def too_fast(self, now: float, wait: float, since: float, *, named: bool = False) -> float:
        """The server has refused a message because they come too fast."""
        run, is_first = self._run, not self.is_known
        until = super().too_fast(now, wait, since, named=named)
        self._drop_turns(now)
        if is_first and self.is_known:
            measured = self._measured
            self._note(lambda pace: pace.add(run, measured))
        self._note(lambda pace: pace.too_fast(now, wait, since, named=named))
        return until

    def take_news(self, said: Said | None) -> Callable[[str | None], str | None]:
        """Hand over the news: as a function that takes the stored pace, and returns it with the news in it.

        Both are None where there is no pace.

        Args:
            said: what the server said when it last refused a message.
        """
        news, own, longest, patience = list(self._news), _plain(self, said), self.longest, self.patience
        self._news.clear()

        def merged(stored: str | None) -> str | None:
            if stored is None:
                return own
            pace, before = _of(stored, longest, patience)
            for one in news:
                one(pace)
            return _plain(pace, said or before)

        return merged

    def without_turn(self, waiting: int) -> int:
        """Of so many who wait, how many have no turn."""
        return max(0, waiting - len(self._turns))

    def follow(self, stored: str | None, turns: Iterable[float], now: float) -> Said | None:
        """Take over the pace of all, with turns of its own; return what the server said when it last refused."""
        self._asked_at = now
        self._turns.extend(turns)
        said = None
        if stored is not None:
            pace, said = _of(stored, self.longest, self.patience)
            if not self._news:
                self.__dict__.update((name, getattr(pace, name)) for name in _KEPT)
        self._drop_turns(now)
        return said

    def _drop_turns(self, now: float) -> None:
        """Forget turns that are over, or fall into a pause: together, when it ends, they would be too fast."""
        self._turns = deque(at for at in self._turns if at > now - _LATE and at >= self.resumes_at)

    def _note(self, event: Callable[[Pace], object]) -> None:
        if self.is_known or self.probing:
            self._news.append(event)


def reserve(stored: str, now: float, room: int) -> tuple[list[float], float]:
    """The next turns, so many at most; and seconds until there are more of them."""
    pace, _ = _of(stored)
    turns = list[float]()
    most, ahead = (min(room, 1), 0.0) if pace.probing or pace.searching else (room, _AHEAD)
    while len(turns) < most and (at := pace.next_slot(now)) <= now + ahead:
        pace.let_through(at)
        turns.append(at)
    return turns, max(0.0, pace.next_slot(now) - ahead - now)


def with_turns(stored: str, turns: Iterable[float]) -> str | None:
    """The pace when those turns have been given away."""
    pace, said = _of(stored)
    for at in turns:
        pace.let_through(at)
    return _plain(pace, said)


def is_probing(stored: str) -> bool:
    """Whether a single message is to find out if the server takes any again."""
    return _of(stored)[0].probing


def resumes_at(stored: str) -> float:
    """Until when nothing goes."""
    return _of(stored)[0].resumes_at


def _plain(pace: Pace, said: Said | None) -> str | None:
    if not (pace.is_known or pace.probing):
        return None
    plain: dict[str, Any] = {name: getattr(pace, name) for name in _KEPT}
    if said is not None:
        plain["said"] = [said.stage.value, said.reply.code, said.reply.enhanced, said.reply.text[:500]]
    return json.dumps(plain)


def _of(stored: str, longest: float = LONGEST, patience: float = math.inf) -> tuple[Pace, Said | None]:
    plain = json.loads(stored)
    pace, said = Pace(longest=longest, patience=patience), plain.get("said")
    pace.__dict__.update((name, plain[name]) for name in _KEPT)
    return pace, said and Said(Stage(said[0]), Reply(*said[1:]))
