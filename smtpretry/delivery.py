"""One message on its way and what became of each recipient: `Delivery`. Plain values, no I/O."""

from __future__ import annotations

import uuid
from base64 import b64decode, b64encode
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from enum import Enum
from typing import TYPE_CHECKING, Any, Final, Self

from .outcome import Attempt, Outcome, Status, Step
from .replies.reply import Reply
from .replies.rule import Action
from .replies.stage import Stage

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from email.message import Message

_VERSION: Final = 1  # of what `to_dict` and `state` write


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
    _sender: object = field(default=None, init=False, repr=False)

    @contextmanager
    def sent_by(self, sender: object) -> Iterator[None]:
        """Keep others from sending it at the same time: that would be a second copy.

        Raises:
            ValueError: somebody else is sending it.
        """
        before = self._sender
        if before is not None and before is not sender:
            msg = f"delivery {self.id} is being sent already: await that send, or prepare another one for another copy"
            raise ValueError(msg)
        self._sender = sender
        try:
            yield
        finally:
            self._sender = before

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

    def dsn(self, *, reporting_mta: str | None = None) -> Message:
        """A delivery status notification (RFC 3464) for the sender: who got it, who did not, and why. It is not sent.

        Send it with the null sender, ``send_message(delivery.dsn(), sender="")``, as RFC 5321 §4.5.5 asks. A recipient
        for whom nobody knows is reported as failed, and the words say that it may have arrived.

        Args:
            reporting_mta: the name of the host that reports; None for this one's.

        Raises:
            ValueError: the delivery itself has the null sender, who is never notified.
        """
        from .notification import notify  # noqa: PLC0415 - few need it

        return notify(self, reporting_mta=reporting_mta)

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON has it, for a file or a queue; `from_dict` reads it. No credential is in it.

        The mutable part is `state`: what is stored once may be kept, and updated with it (``stored | state``).
        """
        return {
            "id": self.id,
            "sender": self.sender,
            "message": b64encode(self.message).decode(),
            "mail_options": list(self.mail_options),
            "rcpt_options": list(self.rcpt_options),
            **self.state(),
        }

    def state(self) -> dict[str, Any]:
        """What attempts change, as JSON has it, without the message: small enough to be saved after each reply."""
        return {
            "version": _VERSION,
            "began_at": self.began_at,
            "response": self.response,
            "cure": self.cure,
            "outcomes": {who: _plain(outcome) for who, outcome in self.outcomes.items()},
            "attempts": [
                {"at": one.at, "server": one.server, "steps": [_plain(step) for step in one.steps]}
                for one in self.attempts
            ],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The delivery that `to_dict` wrote.

        Raises:
            ValueError: it is of another version, or no delivery at all; the message says what is wrong.
        """
        version = data.get("version")
        if version != _VERSION:
            msg = f"this smtpretry reads deliveries of version {_VERSION}, not {version!r}: run the one that wrote it"
            raise ValueError(msg)
        try:
            return cls(
                id=data["id"],
                sender=data["sender"],
                message=b64decode(data["message"], validate=True),
                mail_options=tuple(data["mail_options"]),
                rcpt_options=tuple(data["rcpt_options"]),
                began_at=data["began_at"],
                response=data["response"],
                cure=data["cure"],
                outcomes={who: _outcome(outcome) for who, outcome in data["outcomes"].items()},
                attempts=[
                    Attempt(one["at"], [_step(step) for step in one["steps"]], one.get("server", ""))
                    for one in data["attempts"]
                ],
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            msg = f"no delivery as to_dict writes it: {type(error).__name__}: {error}"
            raise ValueError(msg) from error

    def _with(self, status: Status) -> list[str]:
        return [who for who, outcome in self.outcomes.items() if outcome.status is status]


def _plain(record: Outcome | Step) -> dict[str, Any]:
    """An outcome or a step as JSON has it. What stands behind a silence is left to the words of the reply."""
    return {field.name: _value(getattr(record, field.name)) for field in fields(record) if field.name != "error"}


def _value(value: object) -> object:
    match value:
        case Enum():
            return value.value
        case Reply():
            return [value.code, value.enhanced, value.text]
        case tuple():
            return list(value)
    return value


def _outcome(plain: dict[str, Any]) -> Outcome:
    stage, reply = plain["stage"], plain["reply"]
    known = {"stage": stage and Stage(stage), "reply": reply and Reply(*reply)}
    return Outcome(**plain | known | {"status": Status(plain["status"])})


def _step(plain: dict[str, Any]) -> Step:
    known = {"stage": Stage(plain["stage"]), "reply": Reply(*plain["reply"]), "recipients": tuple(plain["recipients"])}
    return Step(**plain | known | {"action": plain["action"] and Action(plain["action"])})
