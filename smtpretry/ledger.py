"""What a pass writes into its delivery: who has an end, who waits until when, who may have it already. No I/O."""

from __future__ import annotations

from operator import attrgetter
from typing import TYPE_CHECKING, NamedTuple

from . import log
from .outcome import Attempt, Outcome, Status, Step
from .policy import EXPIRED
from .replies.reply import NO_REPLY, Reply, Said
from .replies.stage import Stage

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable

    from .delivery import Delivery
    from .observer import Observer
    from .policy import Decision, RetryPolicy
    from .replies.rule import Rule

_EXPIRED = "4.4.7"  # RFC 3463 §3.5: delivery time expired
_LAST_CALL = 1.0  # seconds before a message expires: when the last attempt begins
_ENDED_IN_DOUBT = Said(
    Stage.END_OF_DATA, Reply(NO_REPLY, text="the attempt ended before the server's answer was stored")
)
_RESENDS = 2  # times that a message is sent again after an end in doubt, in the life of its delivery
_AT_ONCE, _ALIKE = 1.0, 0.05  # seconds, and share of the wait: those whose waits end within it go on together


class Position(NamedTuple):
    """Where a server stands among several, for one pass.

    Attributes:
        number: which of them; None where there is one.
        is_followed: whether another one comes after it. That one gets whom this one's policy gives up.
        others_are_ready: whether another one can take over at once.
        only_its_own: whether it gets only recipients that wait for this very server.
        patience: seconds for which a delivery is tried in all; None where the server's own policy says that.
        refused: whom it can do nothing for, and leaves to the others; the pass adds to them.
        others_may: whether another one may take the message for that recipient later.
    """

    number: int | None = None
    is_followed: bool = False
    others_are_ready: bool = False
    only_its_own: bool = False
    patience: float | None = None
    refused: set[str] = set()  # noqa: RUF012 - where there is one server, nobody reads it
    others_may: Callable[[str], bool] = lambda _: False

    def takes(self, who: str, outcome: Outcome) -> bool:
        """Whether a recipient is its own to offer."""
        if outcome.server == self.number:
            return True
        return outcome.server is None and not self.only_its_own and who not in self.refused


class Ledger:
    """The accounts of one pass.

    Attributes:
        todo: the recipients that the pass still has to offer the message to, in order.
        changed: whether something has become known that is to be stored.
    """

    def __init__(self, delivery: Delivery, policy: RetryPolicy, position: Position, observer: Observer) -> None:
        self.delivery, self.policy, self.position, self.observer = delivery, policy, position, observer
        self.todo: dict[str, None] = {}
        self.changed = False
        self._counted = False
        self._deferred: list[Outcome] = []
        self._ended: list[str] = []  # of whom the observer does not know yet

    def has_work(self, now: float) -> bool:
        """Whether anybody is due, or too late."""
        if self._due(now):
            return True
        return bool(self.delivery.pending) and self._overdue(now) is not None

    def _overdue(self, now: float) -> str | None:
        patience = self.policy.patience if self.position.patience is None else self.position.patience
        return self.delivery.overdue(now, patience)

    def _due(self, now: float) -> list[str]:
        """Who is due, and may be offered to this server."""
        due = self.delivery.due(now)
        if self.position.number is None:
            return due
        return [who for who in due if self.position.takes(who, self.delivery.outcomes[who])]

    def open(self, now: float, refused_at: float | None) -> None:
        """Begin with everybody who is due; refuse them where no attempt may begin any more.

        Args:
            now: the time.
            refused_at: since when the server takes nothing; None where it does.
        """
        self.delivery.hand_over(now)
        self.delivery.excuse(now if refused_at is None else refused_at)
        why = self._overdue(now)
        if why is not None and self.delivery.pending:
            expired = Said(Stage.CONNECT, Reply(NO_REPLY, _EXPIRED, why))
            self.delivery.attempts.append(Attempt(now))
            self.note(expired, EXPIRED, self.delivery.pending)
            self.settle(self.delivery.pending, Status.REFUSED, expired)
        elif self.delivery.began_at is None:
            self.delivery.began_at = now
        due = self._due(now)
        self.todo = dict.fromkeys(due)
        if self.policy.on_uncertain == "raise":
            self.settle(
                [who for who in due if self.delivery.outcomes[who].uncertain], Status.UNCERTAIN, _ENDED_IN_DOUBT
            )

    def count(self, now: float) -> None:
        """Count the attempt, for those who are left to be offered."""
        if not self.delivery.attempts:
            self.delivery.began_at = now
        self._counted = True
        self.delivery.attempts.append(Attempt(now))
        for who in self.todo:
            self.delivery.outcomes[who].attempts += 1

    def attempts(self, recipients: Iterable[str]) -> int:
        """How many attempts the most tried of them has had."""
        return max((self.delivery.outcomes[who].attempts for who in recipients), default=1)

    def elapsed(self) -> float:
        """Seconds since the message was handed over."""
        return self.delivery.elapsed(self.policy.clock())

    def left(self) -> float:
        """Seconds in which a last attempt can begin before the message expires."""
        return self.delivery.left(self.policy.clock()) - _LAST_CALL

    def note(self, said: Said, decision: Decision | None, recipients: Iterable[str]) -> None:
        """Write down a reply that decided something."""
        step = Step(
            at=self.policy.clock(),
            stage=said.stage,
            reply=said.reply,
            action=decision.action if decision else None,
            wait=decision.wait if decision else 0.0,
            recipients=tuple(recipients),
            row=decision.rule.name if decision else "",
        )
        attempt = self.delivery.attempts[-1]
        attempt.steps.append(step)
        log.decided(self.delivery.id, step, attempt.server)
        self.observer.note(self.delivery, step)

    def report(self) -> None:
        """Let the observer know what has been written down."""
        if self._ended:
            ended, self._ended = self._ended, []
            self.observer.ended(self.delivery, ended)
        self.observer.call_hooks()

    def remark(self, said: Said) -> None:
        """Write down what the caller should know of, and warn."""
        self.note(said, None, self.todo)
        log.remarked(self.delivery.id, said.stage, said.reply)

    def settle(self, recipients: Collection[str], status: Status, last: Said) -> None:
        """Give them their end."""
        self.delivery.settle(recipients, status, last.stage, last.reply, last.error)
        self.changed |= bool(recipients)
        self._ended += recipients
        for who in recipients:
            self.todo.pop(who, None)

    def doubt(self, recipients: Collection[str], said: Said) -> None:
        """They may have it: only an acceptance makes that certain. It is sent again at most `_RESENDS` times."""
        outcomes = self.delivery.outcomes
        self.mark(recipients, uncertain=True)
        for who in recipients:
            outcomes[who].doubts += 1
            outcomes[who].server = None  # the one that it waited for has taken its RCPT
        self.changed |= bool(recipients)
        resends = 0 if self.policy.on_uncertain == "raise" else _RESENDS
        self.settle([who for who in recipients if outcomes[who].doubts > resends], Status.UNCERTAIN, said)

    def mark(self, recipients: Iterable[str], *, uncertain: bool) -> None:
        """Say whether they may have it."""
        for who in recipients:
            self.delivery.outcomes[who].uncertain = uncertain

    def leave(self, recipients: Iterable[str], *, for_good: bool = False) -> list[str]:
        """Leave them to another server, now; return those who stay, for they wait for this one.

        With `for_good` these do not stay either: this server can do nothing for them, and they are the next one's.
        """
        its_own = [who for who in recipients if self.delivery.outcomes[who].server is not None]
        if for_good and self.position.is_followed:
            for who in its_own:
                self.delivery.outcomes[who].server = (self.position.number or 0) + 1
            its_own = []
        for who in set(recipients).difference(its_own):
            self.todo.pop(who, None)
        return its_own

    def wait(
        self,
        recipients: Iterable[str],
        said: Said,
        seconds: float,
        *,
        said_to: str | None = None,
        rule: Rule | None = None,
        tied: bool = False,
        elapsed: float | None = None,
    ) -> None:
        """Take them out of this pass for so long, or for good where the policy gives up.

        Args:
            recipients: who waits.
            said: why.
            seconds: how long.
            said_to: the recipient whose RCPT it answered.
            rule: the row that says so.
            tied: whether it is this server that they have to come back to.
            elapsed: seconds of their patience that are used up; None for the time since the delivery was first tried.
        """
        now, left = self.policy.clock(), self.left()
        elapsed = self.elapsed() if elapsed is None else elapsed
        for who in [who for who in recipients if who in self.todo]:
            outcome, last = self.delivery.outcomes[who], said
            if said.stage is Stage.RCPT and who != said_to and outcome.stage and outcome.reply:
                last = Said(outcome.stage, outcome.reply, outcome.error)  # the other's reply is not its own
            why = self.policy._limit(  # noqa: SLF001 - `gives_up`, in words
                attempt=outcome.attempts, elapsed=elapsed, wait=seconds, left=left, rule=rule
            )
            if why is not None and self.position.is_followed:
                outcome.server = (self.position.number or 0) + 1
                del self.todo[who]
            elif why is not None:
                self.delivery.cure = self.delivery.cure or (rule and rule.cure) or f"gave up: {why}"
                log.gave_up(self.delivery.id, who, why, last.stage, last.reply)
                self.settle([who], Status.REFUSED, last)
            else:
                outcome.stage, outcome.reply, outcome.error = last.stage, last.reply, last.error
                outcome.next_at = now + seconds
                outcome.server = self.position.number if tied else outcome.server
                del self.todo[who]
                self._deferred.append(outcome)

    def pause(self, said: Said, until: float, paused_until: float, refused_at: float | None) -> None:
        """Let all wait for the server, which has refused others, or leave them to another one. That is no attempt.

        What can be too long is the time in which the server takes nothing: from `refused_at`, when it refused a
        message, to `paused_until`. The rest, until a limit begins anew, does not count.
        """
        now = self.policy.clock()
        refused_for = 0.0 if refused_at is None else min(self.elapsed(), now - refused_at)
        self.stand_back(said, until - now, refused_for - max(0.0, until - max(now, paused_until)))

    def stand_back(self, said: Said, seconds: float, elapsed: float) -> None:
        """Let all wait for so long, or leave them to another server. That is no attempt. See `wait`."""
        whom = list(self.todo)
        for who in whom:
            self.delivery.outcomes[who].attempts -= self._counted
        whom = self.leave(whom) if self.position.others_are_ready else whom
        self.wait(whom, said, seconds, elapsed=elapsed)

    def close(self, now: float) -> None:
        """Let those who wait for about as long come back together, when the last of them may."""
        latest: float | None = None
        for outcome in sorted(self._deferred, key=attrgetter("next_at"), reverse=True):
            if latest is None or latest - outcome.next_at > max(_AT_ONCE, _ALIKE * (latest - now)):
                latest = outcome.next_at
            outcome.next_at = latest
