"""What became of a recipient, and what led there: `Outcome`, `Attempt`, `Step`. Plain values."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .replies.reply import Reply
    from .replies.rule import Action
    from .replies.stage import Stage

_WHOLE = 9.95  # seconds, from which on they are shown without a fraction


class Status(Enum):
    """Where a recipient stands. All but PENDING are ends, and there is no other end."""

    PENDING = "PENDING"  # not settled yet
    ACCEPTED = "ACCEPTED"  # the server took the message for it
    REFUSED = "REFUSED"  # the server did not, and the outcome's reply says why
    UNCERTAIN = "UNCERTAIN"  # the line broke after the final dot, before the reply
    DEFERRED = "DEFERRED"  # a durable queue took it


@dataclass(slots=True)
class Outcome:
    """Where one recipient stands: its status, and the last reply that concerned it, with the stage it came at."""

    status: Status = Status.PENDING
    stage: Stage | None = None
    reply: Reply | None = None
    attempts: int = 0
    next_at: float = 0.0
    uncertain: bool = False  # once broken off after the final dot: only an acceptance makes it certain again
    doubts: int = 0  # how many attempts ended in doubt: after the final dot, before the reply
    alone: bool = False  # its RCPT ended a connection: the others go without it
    server: int | None = None  # of several: the one that it waits for
    error: Exception | None = field(default=None, repr=False, compare=False)  # what stands for a reply that never came


@dataclass(frozen=True, slots=True)
class Step:
    """One reply that decided something.

    Attributes:
        at: when it came, in seconds since the epoch.
        stage: what it answered.
        reply: what the server said.
        action: what was done about it; None for a success.
        wait: seconds until the next try.
        recipients: whom it concerned.
        row: the name of the row of the table that decided; "" where it has none.
    """

    at: float
    stage: Stage
    reply: Reply
    action: Action | None
    wait: float
    recipients: tuple[str, ...]
    row: str = ""

    def __str__(self) -> str:
        """One clean line: "RCPT: 450 4.2.0 Greylisted -> RETRY in 300 s"."""
        line = f"{self.stage.value}: {self.reply}"
        if self.action is not None:
            line += f" -> {self.action.value}"
        return f"{line} in {rounded(self.wait)} s" if self.wait else line


def rounded(seconds: float) -> str:
    """Seconds for people: whole from ten on, else with one digit, and never "0" for a wait."""
    return f"{seconds:.0f}" if seconds >= _WHOLE else f"{max(round(seconds, 1), 0.1):g}"


@dataclass(slots=True)
class Attempt:
    """One pass over the recipients that were due, with all of its repairs: when it began, its steps, and the server."""

    at: float
    steps: list[Step] = field(default_factory=list)
    server: str = ""
