"""One message on its way and what became of each recipient: `Delivery`. Plain values, no I/O."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from .reply import Reply, Stage
    from .rules import Action


class Status(Enum):
    """What became of a recipient. All but PENDING are ends, and there is no other."""

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
    alone: bool = False  # its RCPT ended a connection: the others go without it
    error: Exception | None = field(default=None, repr=False, compare=False)  # what stands for a reply that never came


@dataclass(frozen=True, slots=True)
class Step:
    """One reply that decided something: when, at which stage, for whom, and what was done about it."""

    at: float
    stage: Stage
    reply: Reply
    action: Action | None
    wait: float
    recipients: tuple[str, ...]

    def __str__(self) -> str:
        """One clean line: "RCPT: 450 4.2.0 Greylisted -> RETRY in 300 s"."""
        line = f"{self.stage.value}: {self.reply}"
        if self.action is not None:
            line += f" -> {self.action.value}"
        return f"{line} in {self.wait:g} s" if self.wait else line


@dataclass(slots=True)
class Attempt:
    """One pass over the recipients that were due, with all of its repairs: when it began, and its steps."""

    at: float
    steps: list[Step] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class Delivery:
    """One message on its way: the envelope, the bytes that every attempt sends, and what became of each recipient.

    Attributes:
        id: a name for this delivery, unique, made once.
        sender: the reverse-path (RFC 5321 §4.1.1.2), as given.
        outcomes: an `Outcome` for each recipient, by the address as given, in the order of the envelope.
        message: the bytes, with CRLF line ends, Message-ID and Date.
        began_at: when it was first tried, in seconds since the epoch.
        attempts: what happened so far, an `Attempt` for each pass.
        response: the text of the server's last acceptance.
        cure: what would have helped, where that is known, such as "no credentials are configured".
    """

    sender: str
    outcomes: dict[str, Outcome]
    message: bytes = field(repr=False)
    mail_options: tuple[str, ...] = ()
    rcpt_options: tuple[str, ...] = ()
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    began_at: float | None = None
    attempts: list[Attempt] = field(default_factory=list)
    response: str = ""
    cure: str | None = None

    @property
    def recipients(self) -> list[str]:
        """Everybody in the envelope."""
        return list(self.outcomes)

    @property
    def pending(self) -> list[str]:
        """The recipients that have no end yet."""
        return self._with(Status.PENDING)

    @property
    def accepted(self) -> list[str]:
        """The recipients for whom the server took the message."""
        return self._with(Status.ACCEPTED)

    @property
    def refused(self) -> dict[str, Reply]:
        """The recipients for whom it was not taken, each with the reply that says why."""
        return {who: self.outcomes[who].reply for who in self._with(Status.REFUSED)}  # type: ignore[misc] # a refusal has one

    @property
    def uncertain(self) -> list[str]:
        """The recipients for whom nobody knows: the line broke after the final dot, before the reply."""
        return self._with(Status.UNCERTAIN)

    @property
    def deferred(self) -> list[str]:
        """The recipients that a durable queue took over."""
        return self._with(Status.DEFERRED)

    @property
    def next_at(self) -> float | None:
        """When to come again, in seconds since the epoch; None where every recipient has its end."""
        return min(
            (outcome.next_at for outcome in self.outcomes.values() if outcome.status is Status.PENDING), default=None
        )

    def due(self, now: float) -> list[str]:
        """The recipients to offer in a pass that begins now; those that must go alone come last."""
        due = [who for who in self.pending if self.outcomes[who].next_at <= now]
        return sorted(due, key=lambda who: self.outcomes[who].alone)

    def elapsed(self, now: float) -> float:
        """Seconds since it was first tried."""
        return 0.0 if self.began_at is None else now - self.began_at

    def settle(
        self, recipients: Iterable[str], status: Status, stage: Stage, reply: Reply, error: Exception | None = None
    ) -> None:
        """Give recipients their end. A refusal of what may have been taken before is no refusal: it stays uncertain."""
        for who in recipients:
            outcome = self.outcomes[who]
            if status is Status.REFUSED and outcome.uncertain:
                outcome.status = Status.UNCERTAIN
            else:
                outcome.status = status
            outcome.stage, outcome.reply, outcome.error = stage, reply, error

    def story(self, now: float) -> str:
        """What was tried, in one clean line: attempts, time, the last refusal, and the cure where there is one."""
        tries = len(self.attempts)
        parts = [f"smtpretry: {tries} attempt{'s' if tries != 1 else ''} in {self.elapsed(now):.0f} s"]
        if self.accepted or self.pending:
            parts.append(
                f"{len(self.accepted)} of {len(self.outcomes)} recipients accepted, {len(self.pending)} pending"
            )
        if any(outcome.uncertain for outcome in self.outcomes.values()):
            parts.append("the line broke after the final dot: the server may have taken it")
        refusals = [step for attempt in self.attempts for step in attempt.steps if step.action is not None]
        if refusals:
            parts.append(f"last: {refusals[-1].stage.value}: {refusals[-1].reply}")
        if self.cure:
            parts.append(self.cure)
        return "; ".join(parts)

    def _with(self, status: Status) -> list[str]:
        return [who for who, outcome in self.outcomes.items() if outcome.status is status]
