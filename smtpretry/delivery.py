"""One message on its way, and what happened to each recipient: `Delivery`. Plain values, no I/O."""

from __future__ import annotations

import math
import secrets
from base64 import b64decode, b64encode
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final, Self

from .clock import lag
from .outcome import Attempt, Outcome, Status
from .stored import history_of, outcome_of, plain_history, plain_outcome

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from contextlib import AbstractContextManager
    from email.message import Message

    from .replies.reply import Reply
    from .replies.stage import Stage

_VERSION: Final = 2  # of what `to_dict` and `state` write
_READABLE: Final = (1, _VERSION)
_OPTIONAL: Final = ("submitted_at", "expires_in", "expires_at", "began_at", "excused", "response")
_PUNCTUAL: Final = 60.0  # seconds: an attempt that comes later than that after its time is late
_LATE: Final = 7200.0  # seconds: so late an attempt may come, as one does that a wrong clock has planned


@dataclass(slots=True, eq=False)
class Delivery:
    """One message on its way: the envelope, the bytes that every attempt sends, and what happened to each recipient.

    Attributes:
        id: the unique name of this delivery.
        sender: the reverse-path (RFC 5321 §4.1.1.2), as given.
        outcomes: an `Outcome` for each recipient, by the address as given, in the order of the envelope.
        message: the bytes, with CRLF line ends, Message-ID and Date.
        submitted_at: when it was handed over to be sent, in seconds since the epoch: what the limits count from.
        expires_in: seconds after `submitted_at` from which on it is not sent any more.
        expires_at: the same as a time, in seconds since the epoch.
        began_at: when it was first tried, in seconds since the epoch.
        excused: seconds that do not count as its own, for it waited for a server that was taking others.
        attempts: what happened so far, an `Attempt` for each pass.
        response: the text of the server's last acceptance.
        cure: what would have helped, where that is known, such as "no credentials are configured".
    """

    sender: str
    outcomes: dict[str, Outcome]
    message: bytes = field(repr=False)
    mail_options: tuple[str, ...] = ()
    rcpt_options: tuple[str, ...] = ()
    id: str = field(default_factory=lambda: secrets.token_hex(16))
    began_at: float | None = None
    excused: float = 0.0
    attempts: list[Attempt] = field(default_factory=list)
    response: str = ""
    cure: str | None = None
    submitted_at: float | None = None
    expires_in: float | None = None
    expires_at: float | None = None
    _sender: object = field(default=None, init=False, repr=False)

    def sent_by(self, sender: object) -> AbstractContextManager[None]:
        """Keep others from sending it at the same time: that would be a second copy.

        Raises:
            ValueError: somebody else is sending it.
        """
        if self._sender is not None and self._sender is not sender:
            msg = f"delivery {self.id} is being sent already: await that send, or prepare another one for another copy"
            raise ValueError(msg)
        return _Hold(self, sender)

    def __getstate__(self) -> tuple[None, dict[str, Any]]:
        """Without who is sending it: a copy is sent by nobody."""
        return None, {name: getattr(self, name) for name in self.__slots__} | {"_sender": None}

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
        """The recipients that may have it or not: the connection broke after the final dot, before the reply."""
        return self._with(Status.UNCERTAIN)

    @property
    def deferred(self) -> list[str]:
        """The recipients that a durable queue took over."""
        return self._with(Status.DEFERRED)

    @property
    def next_at(self) -> float | None:
        """When to come again, in seconds since the epoch; None where every recipient has its end."""
        waits = [outcome.next_at for outcome in self.outcomes.values() if outcome.status is Status.PENDING]
        return min(waits, default=None)

    def due(self, now: float) -> list[str]:
        """The recipients to offer in a pass that begins now; those that must go alone come last."""
        due = [who for who, one in self.outcomes.items() if one.status is Status.PENDING and one.next_at <= now]
        return sorted(due, key=lambda who: self.outcomes[who].alone) if len(due) > 1 else due

    def hand_over(self, now: float) -> None:
        """Let the limits count from now, unless they do already."""
        if self.submitted_at is None:
            self._begin_to_expire(now)
            self.submitted_at = now

    def _begin_to_expire(self, now: float) -> None:
        if self.expires_in is not None and self.expires_at is None:
            self.expires_at = now + self.expires_in

    def excuse(self, until: float) -> None:
        """Count no time before then, if it was not tried yet: the server took others, and it waited in line."""
        if not self.attempts and self.began_at is not None and until > self.began_at:
            self.excused += until - self.began_at
            self.began_at = until

    def elapsed(self, now: float) -> float:
        """Seconds since it was handed over, without those that are excused."""
        return 0.0 if self.submitted_at is None else now - self.submitted_at - self.excused

    def left(self, now: float) -> float:
        """Seconds until it expires. A time that the application has told goes by the time of day, not by its clock."""
        if self.expires_at is None:
            return math.inf
        return self.expires_at - now - (lag() if self.expires_in is None else 0.0)

    def overdue(self, now: float, patience: float) -> str | None:
        """Why no attempt may begin now, or None: it has expired, or was handed over longer ago than `patience`.

        The last attempt, planned within that time, may be late.
        """
        if self.left(now) <= 0:
            return f"expired: it was to be sent before {_iso(self.expires_at or now)}"
        late = self.elapsed(now) > patience + 1.0
        if late and (not self.attempts or now - (self.next_at or now) > _LATE):
            limit = timedelta(seconds=patience)
            return f"expired: it was handed over at {_iso(self.submitted_at or now)}, and the limit is {limit}"
        return None

    def take_up(self, now: float, *, late: bool = False) -> None:
        """Correct times that lie in the future: the clock that wrote them was wrong.

        Args:
            now: in seconds since the epoch.
            late: it was stored meanwhile. Then an attempt that is up to two hours late counts as if it was in time, as
                where the clock was slow.
        """
        last = self.submitted_at
        if self.attempts:
            attempt = self.attempts[-1]
            last = attempt.steps[-1].at if attempt.steps else attempt.at
        if last is None:
            self._begin_to_expire(now)  # also where it waits for a connection first
            return
        if last > now:
            self.shift(min(now - last, -lag()))  # by the time of day, perhaps, which this process lags behind
        elif late and self.attempts and _PUNCTUAL < (behind := now - max(last, self.next_at or now)) <= _LATE:
            self.shift(behind, expiry=False)

    def shift(self, seconds: float, *, expiry: bool = True) -> None:
        """Move all its times by so much, without those that the application told: the clock of the others was wrong."""
        for name in ("submitted_at", "began_at", *(["expires_at"] if expiry and self.expires_in is not None else [])):
            if (at := getattr(self, name)) is not None:
                setattr(self, name, at + seconds)
        for outcome in self.outcomes.values():
            outcome.next_at = max(0.0, outcome.next_at + seconds) if outcome.next_at else 0.0
        for attempt in self.attempts:
            attempt.at += seconds
            attempt.steps = [replace(step, at=step.at + seconds) for step in attempt.steps]

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
        tries = max([len(self.attempts), *(outcome.attempts for outcome in self.outcomes.values())])
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
        """A bounce (RFC 3464) for the sender: who got the message, who did not, and why. This does not send it.

        Send it with the null sender, ``send_message(delivery.dsn(), sender="")``, as RFC 5321 §4.5.5 asks. An uncertain
        recipient is reported as failed, and the text says that the message may have arrived.

        Args:
            reporting_mta: the name of the host that reports; None for this one's.

        Raises:
            ValueError: the delivery itself has the null sender, who is never notified.
        """
        from .notification import notify  # noqa: PLC0415 - few need it

        return notify(self, reporting_mta=reporting_mta)

    def to_dict(self) -> dict[str, Any]:
        """The delivery as JSON values, for a file or a queue; `from_dict` reads it. No credential is in it.

        Attempts change only what `state` returns: store this once, and update it with ``stored | state``.
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
        """What attempts change, as JSON has it, without the message: small enough to be saved after each reply.

        However long it takes, the history in it is bounded: the first two attempts and the last thirty, of each the
        first four steps and the last four, of each step eight recipients.
        """
        given = {name: value for name in _OPTIONAL if (value := getattr(self, name)) not in (None, "", 0.0)}
        return {
            "version": _VERSION,
            **given,
            "cure": self.cure,
            "outcomes": {who: plain_outcome(outcome) for who, outcome in self.outcomes.items()},
            "attempts": plain_history(self.attempts),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The delivery that `to_dict` wrote, in this version or in the one before.

        Raises:
            ValueError: it is of another version, or no delivery at all; the message says what is wrong.
        """
        version = data.get("version")
        if version not in _READABLE:
            known = " and ".join(map(str, _READABLE))
            msg = f"this smtpretry reads deliveries of version {known}, not {version!r}: run the one that wrote it"
            raise ValueError(msg)
        if version == 1:  # its limits counted from the first attempt
            data = {**data, "submitted_at": data.get("began_at")}
        try:
            return cls(
                id=data["id"],
                sender=data["sender"],
                message=b64decode(data["message"], validate=True),
                mail_options=tuple(data["mail_options"]),
                rcpt_options=tuple(data["rcpt_options"]),
                outcomes={who: outcome_of(outcome) for who, outcome in data["outcomes"].items()},
                attempts=history_of(data["attempts"]),
                cure=data["cure"],
                **{name: data[name] for name in _OPTIONAL if data.get(name) is not None},
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            msg = f"no delivery as to_dict writes it: {type(error).__name__}: {error}"
            raise ValueError(msg) from error

    def _with(self, status: Status) -> list[str]:
        return [who for who, outcome in self.outcomes.items() if outcome.status is status]


class _Hold:
    """A delivery while somebody sends it."""

    __slots__ = ("_before", "_delivery", "_sender")

    def __init__(self, delivery: Delivery, sender: object) -> None:
        self._delivery, self._before, self._sender = delivery, delivery._sender, sender  # noqa: SLF001 - its own

    def __enter__(self) -> None:
        self._delivery._sender = self._sender  # noqa: SLF001

    def __exit__(self, *_: object) -> None:
        self._delivery._sender = self._before  # noqa: SLF001


def _iso(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).isoformat(" ", "seconds")
