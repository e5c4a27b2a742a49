"""What follows from the answers to one transaction, for each recipient and for the session. No I/O, no clock.

By the action that the policy decides:

    FAIL           RECIPIENT: that one is refused, the rest goes on; MESSAGE, SERVER: all that are pending are
    RETRY          RECIPIENT: that one waits, the rest goes on; MESSAGE: all wait; SERVER: the whole client does
    RECONNECT      close; at once over a new connection where there is nothing to wait for, where a reused connection
                   had died, or where a recipient was refused just before (550 and close); else as RETRY. A recipient
                   whose RCPT ended a connection is offered alone from then on, after the others. Where another one's
                   does so next, it may be their number: as many as were taken go at once
    SPLIT          who was taken goes now; the rest in transactions of that size
    STARTTLS, AUTHENTICATE, REFRESH_TOKEN
                   the repair, and the same recipients again: each once a pass

After a refusal the session is reset before the next MAIL, or closed.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import Enum
from typing import TYPE_CHECKING, NamedTuple, Protocol

from .policy import OUT_OF_STEP, Decision
from .replies.reply import NO_REPLY, Reply, Said
from .replies.rule import Action, Rule
from .replies.stage import Scope, Stage

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

_ON_ARRIVAL = (Stage.CONNECT, Stage.EHLO)
_FIRST_COMMANDS = (Stage.STARTTLS, Stage.AUTH, Stage.MAIL)  # one of them is the first on a connection that was idle
_UNRULY = 2  # connections that end in a row, at different recipients, before it is taken for the server's trouble


class Answer(NamedTuple):
    """What came to one command.

    Attributes:
        stage: which command it was.
        failure: what was said instead of the success that was asked for; None for that success.
        success: what was said to the message that was taken.
        recipient: of RCPT.
        final: why nothing that the server may say later changes it, where that is known on this side.
    """

    stage: Stage
    failure: Said | None = None
    success: Said | None = None
    recipient: str | None = None
    final: str | None = None


class Ruling(NamedTuple):
    """One reply that decided something, and for whom."""

    said: Said
    decision: Decision
    recipients: Sequence[str]
    said_to: str | None = None  # the recipient of the RCPT that it answered

    @property
    def is_its_own_trouble(self) -> bool:
        """Whether a server says it of itself or of the whole client."""
        return self.decision.scope is Scope.SERVER or self.said.stage.before_mail

    @property
    def is_about_the_pace(self) -> bool:
        """Whether the server says that messages come too fast; before MAIL it speaks of connections."""
        return self.decision.rule.slower and not self.said.stage.before_mail


class After(Enum):
    """What the session needs after the transaction."""

    NOTHING = "NOTHING"
    RESET = "RESET"
    CLOSE = "CLOSE"


class Decide(Protocol):
    """The policy's decision about a failure, given whom it concerns and whether the group can be split."""

    def __call__(self, said: Said, concerned: Collection[str], *, final: str | None, splittable: bool) -> Decision:
        """See `RetryPolicy.decide`."""


class Case(NamedTuple):
    """What is known before the first answer.

    Attributes:
        group: whom this transaction offers the message to.
        todo: everybody whom this pass still has to offer it to.
        pending: everybody who has no end yet.
        decide: asks the policy.
        reused: whether the connection had been used before: it may have died since.
        others: whether other connections can go on with the work: some may have failed meanwhile.
        on_credit: whether it is no failure of the server's that it does not take this connection yet.
        reconnected: the rules for which this pass has reconnected at once.
        alone: the recipients whose RCPT ended a connection before.
        unruly: how many of them there were in a row.
    """

    group: Sequence[str]
    todo: Collection[str]
    pending: Callable[[], Sequence[str]]
    decide: Decide
    reused: Callable[[], bool] = lambda: False
    others: Callable[[], bool] = lambda: False
    on_credit: bool = False
    reconnected: Collection[object] = ()
    alone: Callable[[str], bool] = lambda _: False
    unruly: int = 0


@dataclass(slots=True)
class Verdict:
    """What follows.

    Attributes:
        rulings: the replies that decided something, in order.
        taken: the recipients who were taken.
        accepted: what the server said when it took the message for them.
        in_doubt: what came to the final dot in place of an answer: they may have got it.
        refused: who gets it no more, and why.
        waiting: who waits, and why.
        alone: who is offered alone from now on.
        unruly: whether one of them was not known to end connections.
        suspect: who was refused last, and may be why the line breaks next.
        after: what the session needs.
        repair: STARTTLS, AUTHENTICATE, REFRESH_TOKEN, or the rule for which it goes on over a new connection at once.
        batch: how many recipients the server takes in one transaction.
        one_too_many: seconds for which this connection is one too many.
        too_soon: whether it is one too many for a moment only: the server still counts the one before it.
        out_of_step: whether commands sent ahead were answered so that the answers do not fit.
    """

    rulings: list[Ruling] = field(default_factory=list)
    taken: list[str] = field(default_factory=list)
    accepted: Said | None = None
    in_doubt: Said | None = None
    refused: list[Ruling] = field(default_factory=list)
    waiting: list[Ruling] = field(default_factory=list)
    alone: list[str] = field(default_factory=list)
    unruly: bool = False
    suspect: str | None = None
    after: After = After.NOTHING
    repair: Action | Rule | None = None
    batch: int | None = None
    one_too_many: float | None = None
    too_soon: bool = False
    out_of_step: bool = False


def judge(answers: Sequence[Answer], case: Case) -> Verdict:
    """What follows from all answers to a transaction, in the order of the commands."""
    one = Judge(case)
    for answer in answers:
        one.hear(answer)
    return one.conclude()


def fits(commands: Sequence[Stage], answers: Sequence[Answer]) -> bool:
    """Whether these can be the answers to commands that were sent ahead: one for each, and no success after no MAIL.

    A server that has taken MAIL knows and expects RCPT, and one that has taken a RCPT, DATA. What answers otherwise is
    something in between that cannot follow several commands at once.
    """
    if len(answers) != len(commands):
        return False
    failures = [answer.failure for answer in answers if answer.failure is not None]
    if not failures:
        return True
    if any(said.reply.code == NO_REPLY for said in failures):
        return False
    if commands[0] is Stage.MAIL and answers[0].failure is not None:
        return all(answer.failure for answer in answers)
    taken = any(answer.recipient is not None and answer.failure is None for answer in answers)
    due = [answer for answer in answers if answer.recipient is not None or (answer.stage is Stage.DATA and taken)]
    return not any(answer.failure and answer.failure.reply.is_unexpected for answer in due)


class Judge:
    """Takes the answers to a transaction one by one, and tells after each what may be said next."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.verdict = Verdict()
        self._ended_at: Stage | None = None  # where it failed as a whole
        self._full = False  # nobody else is to be offered
        self._split = False
        self._postponed: Ruling | None = None  # why everybody who is not taken has to wait
        self._begun = False  # the server was asked anything
        self._took = False  # it has a recipient in this transaction
        self._go_ahead: bool | None = None  # whether the answer to DATA was 354

    @property
    def goes_on(self) -> bool:
        """Whether the next recipient may be offered."""
        return self._ended_at is None and not self._full

    @property
    def data_is_due(self) -> bool:
        """Whether DATA comes next."""
        return self._go_ahead is None and self._ended_at is None and bool(self.verdict.taken)

    @property
    def body_is_due(self) -> bool:
        """Whether the server waits for the message, and is to get it."""
        return bool(self._go_ahead and self.verdict.taken) and self._ended_at is None

    @property
    def dot_is_due(self) -> bool:
        """Whether the server waits for a message although it took nobody: a lone dot ends that."""
        return bool(self._go_ahead) and not self._took

    def hear(self, answer: Answer) -> None:
        """Take in the answer to the next command."""
        self._begun = self._begun or answer.final is None
        self._took = self._took or (answer.recipient is not None and answer.failure is None)
        if answer.stage is Stage.DATA and answer.failure is None:
            self._go_ahead = True
        elif self._ended_at is not None:
            pass  # the answer to a command that was sent ahead of the failure
        elif answer.recipient is not None:
            self._hear_of(answer.recipient, answer)
        elif answer.stage is Stage.DATA and not self.verdict.taken:
            self._go_ahead = False  # 554 no valid recipients
        elif answer.failure is not None:
            self._end(answer, answer.failure)
        elif answer.stage is Stage.END_OF_DATA:
            self.verdict.accepted = answer.success

    def lose_step(self, answers: Sequence[Answer]) -> None:
        """Give up a transaction whose answers do not fit. No body was sent: nobody has the message.

        The last reply still counts in two cases: it concerns the server, whichever command it answers; or it is the
        first one, too, and a goodbye.
        """
        self._begun = True
        for answer in answers[-2:]:  # the last reply, and the silence after it
            said = answer.failure
            if said is not None and said.reply.code != NO_REPLY:
                decision = self.case.decide(said, list(self.case.todo), final=None, splittable=False)
                goodbye = answer is answers[0] and decision.action is Action.RECONNECT
                if decision.scope is Scope.SERVER or goodbye:
                    self._end(answer, said, decision)
                    self.verdict.after = After.CLOSE
                    return
        why = answers[-1].failure.reply.text if answers[-1].failure else ""
        text = f"{len(answers)} answers that do not fit the commands sent ahead: {why}"
        said = Said(Stage.MAIL, Reply(NO_REPLY, text=text))
        self._ended_at, self.verdict.out_of_step = Stage.MAIL, True
        self.verdict.rulings.append(Ruling(said, OUT_OF_STEP, self.case.group))
        self.verdict.after = After.CLOSE

    def conclude(self) -> Verdict:
        """What follows from all of it."""
        verdict = self.verdict
        if self._split:
            verdict.batch = len(verdict.taken)
        if self._postponed is not None:
            taken = set(verdict.taken)
            self._put_aside(self._postponed._replace(recipients=[who for who in self.case.todo if who not in taken]))
        if not self._begun:
            verdict.after = After.NOTHING
        elif self._ended_at is None:
            verdict.after = After.NOTHING if verdict.accepted else After.RESET
        elif self._go_ahead and self._took and self._ended_at is not Stage.END_OF_DATA:
            verdict.after = After.CLOSE  # the server waits for a message that those who were taken must not get yet
        return verdict

    def _hear_of(self, who: str, answer: Answer) -> None:
        """The answer to a RCPT: a refusal concerns that recipient, and the rest goes on; or goes without it."""
        taken = self.verdict.taken
        if answer.failure is None:
            taken.append(who)
            self.verdict.suspect = None
            return
        if self._full:
            return  # offered ahead of time: it is offered again in the next transaction
        decision = self.case.decide(answer.failure, [who], final=answer.final, splittable=bool(taken))
        ruling = Ruling(answer.failure, decision, [who], who)
        match decision.action:
            case Action.SPLIT:
                self.verdict.rulings.append(ruling)
                self._split = self._full = True
            case Action.RETRY if decision.scope is Scope.SERVER:
                self._postponed, self._full = ruling, True
            case Action.AUTHENTICATE if decision.scope is Scope.RECIPIENT and taken:
                self._full = True  # who needs no log-in shall not depend on it
            case Action.FAIL | Action.RETRY:
                self._put_aside(ruling)
                self.verdict.suspect = who if answer.final is None else self.verdict.suspect
            case _:
                self._end(answer, answer.failure, decision)

    def _put_aside(self, ruling: Ruling) -> None:
        self.verdict.rulings.append(ruling)
        (self.verdict.refused if ruling.decision.action is Action.FAIL else self.verdict.waiting).append(ruling)

    def _end(self, answer: Answer, said: Said, decision: Decision | None = None) -> None:
        """The transaction failed as a whole, or the session did before it."""
        case, verdict, stage = self.case, self.verdict, said.stage
        self._ended_at = stage
        group = verdict.taken or case.group
        if stage is Stage.END_OF_DATA and said.reply.code == NO_REPLY:
            verdict.in_doubt = said
        concerned = list(case.todo) if stage.before_mail else [answer.recipient] if answer.recipient else list(group)
        if decision is None:
            splittable = len(group) > 1 and not stage.before_mail
            decision = case.decide(said, concerned, final=answer.final, splittable=splittable)
        ruling = Ruling(said, decision, concerned, answer.recipient)
        verdict.after = _after(stage, decision, fresh=not case.reused())
        if decision.wait > 0 and case.on_credit and stage in _ON_ARRIVAL:
            verdict.too_soon, verdict.after = True, After.CLOSE
        elif decision.wait > 0 and case.others() and (decision.rule.fewer or stage is Stage.CONNECT):
            verdict.one_too_many, verdict.after = decision.wait, After.CLOSE
        elif decision.action is Action.RECONNECT and self._goes_on_at_once(said, decision, answer.recipient):
            verdict.repair = decision.rule
        else:
            verdict.rulings.append(ruling)
            self._carry_on(ruling)
            return
        verdict.rulings.append(ruling._replace(decision=replace(decision, wait=0.0)))  # nobody waits for it

    def _carry_on(self, ruling: Ruling) -> None:
        case, verdict, decision = self.case, self.verdict, ruling.decision
        one_alone = decision.scope is Scope.RECIPIENT
        match decision.action:
            case Action.FAIL:
                verdict.refused.append(ruling if one_alone else ruling._replace(recipients=case.pending()))
            case Action.RETRY:
                verdict.waiting.append(ruling if one_alone else ruling._replace(recipients=list(case.todo)))
            case Action.RECONNECT:
                to_blame = ruling.said_to is not None and self._blame(ruling.said_to, decision)
                verdict.waiting.append(ruling if to_blame else ruling._replace(recipients=list(case.todo)))
            case Action.SPLIT:
                verdict.batch = len(ruling.recipients) // 2
            case repair:
                verdict.repair = repair

    def _goes_on_at_once(self, said: Said, decision: Decision, who: str | None) -> bool:
        """Whether a new connection promises something now. It notes who goes alone over it, or how many together."""
        case, verdict, stage = self.case, self.verdict, said.stage
        of_the_server = decision.scope is Scope.SERVER
        at_once, new = decision.wait == 0 == decision.rule.wait, decision.rule not in case.reconnected
        at_anybody = who is not None and not of_the_server and case.unruly + (not case.alone(who)) >= _UNRULY
        if not (at_once and new):
            if case.reused() and stage in _FIRST_COMMANDS and not decision.rule.slower:
                return True  # it had died since it was last used
            if verdict.suspect is not None and stage.in_transaction and not of_the_server:
                verdict.alone.append(verdict.suspect)  # refused, and hung up on: the others go without it
                return True
            if not (at_anybody and new and verdict.taken) or said.reply.retry_after is not None:
                return False
        if who is not None and verdict.taken:
            verdict.batch = len(verdict.taken)  # whoever comes next ends it: it may be their number
        return True

    def _blame(self, who: str, decision: Decision) -> bool:
        """Offer who ended a connection alone from now on. Return whether that one is to blame, and not the server."""
        if decision.scope is Scope.SERVER:
            return False
        known = self.case.alone(who)
        self.verdict.alone.append(who)
        self.verdict.unruly = not known
        return self.case.unruly + (not known) < _UNRULY


def _after(stage: Stage, decision: Decision, *, fresh: bool) -> After:
    """What a session needs that refused something: it is known to be clean before the next MAIL (RFC 5321 §4.1.1.5)."""
    if fresh and stage is Stage.MAIL and decision.action is Action.RETRY and decision.scope is Scope.SERVER:
        return After.CLOSE  # it may be the connection that the server took so: Sendmail then refuses each MAIL on it
    if Action.RECONNECT in (decision.action, decision.rule.otherwise):
        return After.CLOSE
    if stage.before_mail or (stage is Stage.MAIL and decision.action is Action.STARTTLS):
        return After.NOTHING  # nothing is open, or STARTTLS ends it (RFC 3207 §4.2)
    return After.RESET
