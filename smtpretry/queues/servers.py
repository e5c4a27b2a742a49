"""What the workers on one queue tell each other of a server: its row, and how many of them may try it."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from smtpretry.replies.reply import Reply
from smtpretry.replies.stage import Stage
from smtpretry.session.shared import is_probing, reserve, resumes_at, with_turns

from .engine import Pause

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from .engine import Paced

COLUMNS: Final = "until, failures, stage, reply, pace, probe"
ALL: Final = f"SELECT name, {COLUMNS} FROM smtpretry_servers ORDER BY name"  # noqa: S608 - ours
"""Of the row; all times are seconds since the epoch. The pace is as `SharedPace` stores it."""

FAR: Final = 7 * 86400.0
"""Seconds; what is to happen later was planned by a clock that was wrong, most likely."""

_PROBE: Final = 60.0  # seconds that a worker has to find out whether a server works again, before another one may


class Known(NamedTuple):
    """What a look into the queue has told of a server.

    Attributes:
        pause: until when nothing is tried.
        pace: what has been found out about the speed that the server allows.
        turns: when those may go that wait for a turn, and those that were taken.
        alone: whether no other worker tries the server until this one has told what came of it.
    """

    pause: Pause
    pace: str | None = None
    turns: Sequence[float] = ()
    alone: bool = False


class Wants(NamedTuple):
    """What a worker tells of itself when it asks what it may do with a server.

    Attributes:
        waiting: how many deliveries it has that wait for a turn.
        is_exempt: whether a pause that another worker has told is none for it.
    """

    waiting: int
    is_exempt: Callable[[Pause], bool]


class Leave(NamedTuple):
    """What a worker may do with a server.

    Attributes:
        pause: what is known of the server.
        room: how many more deliveries may be tried now.
        wait: seconds until more of them may; None where nothing but the queue decides.
        probe: until when no other worker may try one; None where all may.
        pace: what has been found out about the speed that the server allows.
        turns: when they may go, where there is a pace: first those that were taken before, then `room`.
        shut: whether it is in trouble, and this worker not the one that finds out whether it still is.
    """

    pause: Pause
    room: int
    wait: float | None = None
    probe: float | None = None
    pace: str | None = None
    turns: Sequence[float] = ()
    shut: bool = False

    @property
    def in_trouble(self) -> bool:
        """Whether it gets one delivery at most, to find out whether it works."""
        return self.shut or self.probe is not None

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

    def known(self, number: int) -> Known:
        """What the worker is told then."""
        return Known(self.pause, self.pace, self.used(number), self.is_alone(number))


class Leaves(NamedTuple):
    """What a worker may do with each of its servers, the preferred one first.

    Attributes:
        each: for each of them.
        room: how many deliveries may be tried now.
        wait: seconds until more of them may; None where nothing but the queue decides.
    """

    each: Sequence[Leave]
    room: int
    wait: float | None = None

    def rows(self, number: int) -> list[tuple[str | None, float] | None]:
        """As `Leave.row`."""
        return [one.row(share) for one, share in self._shared(number)]

    def known(self, number: int) -> list[Known]:
        """As `Leave.known`."""
        return [one.known(share) for one, share in self._shared(number)]

    def _shared(self, number: int) -> Iterator[tuple[Leave, int]]:
        for one in self.each:
            share = min(number, one.room)
            number -= share
            yield one, share


def leaves(rows: Sequence[Sequence[Any] | None], now: float, room: int, wants: Iterable[Wants]) -> Leaves:
    """What may be done with servers, the preferred one first; see `leave`. A worker that names none may do all.

    The first that is not in trouble gets all that those before it do not get.
    """
    each = list[Leave]()
    for row, want in zip(rows, wants, strict=True):
        in_trouble = all(one.in_trouble for one in each)
        one = leave(row, now, room - sum(before.room for before in each) if in_trouble else 0, want)
        if one.shut and len(rows) > 1:  # another worker finds out: until then this one goes to the next server
            until = max(one.pause.until, now + (one.wait or 0.0))
            one = one._replace(pause=dataclasses.replace(one.pause, until=until))
        each.append(one)
    if not each:
        return Leaves((), room)
    working = [one for one in each if not one.in_trouble] or each
    waits = [one.wait for one in working if one.wait is not None]
    return Leaves(each, sum(one.room for one in each), min(waits) if len(waits) == len(working) else None)


def leave(row: Sequence[Any] | None, now: float, room: int, want: Wants) -> Leave:
    """Whether the server may be tried. Where it was in trouble, one worker finds out with one delivery.

    Args:
        row: the row, or None where there is none.
        now: the time.
        room: how many deliveries the worker would take.
        want: what it tells of itself.
    """
    if row is None or _was_wrong(row, now):
        return Leave(Pause(), room)
    until, failures, _, _, pace, probe = row
    pause = _pause(row)
    if want.is_exempt(pause):
        pause, failures = Pause(), 0
    waiting = 0 if pace is None else want.waiting
    most = room + waiting
    alone = most > 0 and (bool(failures) or (pace is not None and is_probing(pace)))
    if alone:
        ask_again = max(until if failures else 0.0, probe)
        if now < ask_again:
            return Leave(pause, 0, ask_again - now, pace=pace, shut=True)
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


def left_alone(rows: Iterable[Sequence[Any]], now: float) -> dict[str, Pause]:
    """The servers that want nothing now, of rows that begin with the name."""
    return {name: pause for name, *row in rows if (pause := _pause(row)).failures and now < pause.until <= now + FAR}


def _pause(row: Sequence[Any]) -> Pause:
    until, failures, stage, reply, *_ = row
    return Pause(until, failures, stage and Stage(stage), reply and Reply(*json.loads(reply)))


def _was_wrong(row: Sequence[Any], now: float) -> bool:
    """Whether a clock that was far ahead has written it: the server would be left alone until then."""
    until, _, _, _, pace, probe = row
    return bool(max(until, probe, resumes_at(pace) if pace else 0.0) > now + FAR)


def told(row: Sequence[Any], pause: Pause | None, paced: Paced | None) -> tuple[Any, ...]:
    """The row, without its probe, which is over when something is told. Of two pauses, the longer one holds."""
    *before, pace, _ = row
    until, failures, *_ = before
    if pause is not None and not (pause.failures and failures and pause.until < until <= pause.until + FAR):
        stage, reply = pause.stage, pause.reply
        said = json.dumps([reply.code, reply.enhanced, reply.text]) if reply else None
        before = [pause.until, pause.failures, stage.value if stage else None, said]
    return (*before, pace if paced is None else paced(pace))
