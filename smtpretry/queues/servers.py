"""What the workers on one queue tell each other of a server: its row, and how many of them may try it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from smtpretry.replies.reply import Reply
from smtpretry.replies.stage import Stage

from .engine import Pause

if TYPE_CHECKING:
    from collections.abc import Sequence

COLUMNS: Final = "until, failures, stage, reply, probe"
"""Of the row; all times are seconds since the epoch."""

_PROBE: Final = 60.0  # seconds that a worker has to find out whether a server works again, before another one may


class Leave(NamedTuple):
    """What a worker may do.

    Attributes:
        pause: what is known of the server.
        room: how many deliveries may be tried now.
        wait: seconds until it may ask again; None where it has to wait for nothing.
        probe: until when no other worker may try one; None where all may.
    """

    pause: Pause
    room: int
    wait: float | None = None
    probe: float | None = None


def leave(row: Sequence[Any] | None, now: float, room: int) -> Leave:
    """Whether the server may be tried. Where it was in trouble, one worker finds out with one delivery."""
    if row is None:
        return Leave(Pause(), room)
    until, failures, stage, reply, probe = row
    pause = Pause(until, failures, stage and Stage(stage), reply and Reply(*json.loads(reply)))
    if not failures or not room:
        return Leave(pause, room)
    if now < (ask_again := max(until, probe)):
        return Leave(pause, 0, ask_again - now)
    return Leave(pause, 1, _PROBE, now + _PROBE)


def row_of(pause: Pause) -> tuple[float, int, str | None, str | None]:
    """The row, without its probe, which is over when something is told."""
    stage, reply = pause.stage, pause.reply
    said = json.dumps([reply.code, reply.enhanced, reply.text]) if reply else None
    return pause.until, pause.failures, stage.value if stage else None, said
