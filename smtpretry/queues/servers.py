"""What the workers on one queue tell each other of a server: its row, and how many of them may try it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from smtpretry.replies.reply import Reply
from smtpretry.replies.stage import Stage
from smtpretry.session.shared import is_probing, reserve, resumes_at, with_turns

from .engine import Pause

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .engine import Paced

COLUMNS: Final = "until, failures, stage, reply, pace, probe"
"""Of the row; all times are seconds since the epoch. The pace is as `SharedPace` stores it."""

FAR: Final = 7 * 86400.0
"""Seconds; what is to happen later was planned by a clock that was wrong, most likely."""

_PROBE: Final = 60.0  # seconds that a worker has to find out whether a server works again, before another one may


class Leave(NamedTuple):
    """What a worker may do.

    Attributes:
        pause: what is known of the server.
        room: how many more deliveries may be tried now.
        wait: seconds until more of them may; None where nothing but the queue decides.
        probe: until when no other worker may try one; None where all may.
        pace: what has been found out about the speed that the server allows.
        turns: when they may go, where there is a pace: first those that were taken before, then `room`.
    """

    pause: Pause
    room: int
    wait: float | None = None
    probe: float | None = None
    pace: str | None = None
    turns: Sequence[float] = ()

    def used(self, number: int) -> Sequence[float]:
        """The turns, where so many deliveries have been taken."""
        return self.turns[: len(self.turns) - self.room + number]

    def is_alone(self, number: int) -> bool:
        """Whether no other worker may try, where so many deliveries have been taken."""
        return self.probe is not None and (number > 0 or bool(self.used(number)))

    def row(self, number: int) -> tuple[str | None, float] | None:
        """The pace and the probe of the row then; None where it stays as it is."""
        turns = self.used(number)
        if not (turns or self.is_alone(number)):
            return None
        return self.pace and with_turns(self.pace, turns), self.probe or 0.0


def leave(row: Sequence[Any] | None, now: float, room: int, waiting: int) -> Leave:
    """Whether the server may be tried. Where it was in trouble, one worker finds out with one delivery.

    Args:
        row: the row, or None where there is none.
        now: the time.
        room: how many deliveries the worker would take.
        waiting: how many it has that wait for a turn.
    """
    if row is None or _was_wrong(row, now):
        return Leave(Pause(), room)
    until, failures, stage, reply, pace, probe = row
    pause = Pause(until, failures, stage and Stage(stage), reply and Reply(*json.loads(reply)))
    waiting = 0 if pace is None else waiting
    most = room + waiting
    alone = bool(failures) or (pace is not None and is_probing(pace))
    if alone and most:
        ask_again = max(until if failures else 0.0, probe)
        if now < ask_again:
            return Leave(pause, 0, ask_again - now, pace=pace)
        most = 1
    if pace is None:
        return Leave(pause, most, _PROBE if alone else None, now + _PROBE if alone else None)
    turns, wait = reserve(pace, now, most)
    is_all = len(turns) == room + waiting
    return Leave(
        pause,
        max(0, len(turns) - waiting),
        None if is_all else _PROBE if alone and turns else wait,
        now + _PROBE if alone else None,
        pace,
        turns,
    )


def _was_wrong(row: Sequence[Any], now: float) -> bool:
    """Whether a clock that was far ahead has written it: the server would be left alone until then."""
    until, _, _, _, pace, probe = row
    return bool(max(until, probe, resumes_at(pace) if pace else 0.0) > now + FAR)


def told(row: Sequence[Any], pause: Pause | None, paced: Paced | None) -> tuple[Any, ...]:
    """The row, without its probe, which is over when something is told."""
    *before, pace, _ = row
    if pause is not None:
        stage, reply = pause.stage, pause.reply
        said = json.dumps([reply.code, reply.enhanced, reply.text]) if reply else None
        before = [pause.until, pause.failures, stage.value if stage else None, said]
    return (*before, pace if paced is None else paced(pace))
