"""One pass over the recipients that are due: each reply decided by the policy, repairs at once, no waiting.

What follows from a failure, by the action that the policy decides:

    FAIL           RECIPIENT: that one is refused, the rest goes on; MESSAGE, SERVER: all that are pending are
    RETRY          RECIPIENT: that one waits, the rest goes on; MESSAGE: all wait; SERVER: the whole client does
    RECONNECT      close; at once over a new connection where nothing is to be waited for, where a reused connection had
                   died, or where a recipient was refused just before (550 and close); else as RETRY. A recipient whose
                   RCPT ended a connection is offered alone from then on, after the others
    SPLIT          who was taken goes now; the rest in transactions of that size
    STARTTLS, AUTHENTICATE, REFRESH_TOKEN
                   RSET where a transaction is open, the repair, and the same recipients again: each once a pass
"""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from .delivery import Delivery
from .outcome import Attempt, Status, Step
from .policy import Decision, RetryPolicy
from .replies.reply import NO_REPLY, Reply, Said
from .replies.rule import Action, Rule
from .replies.stage import Scope, Stage
from .session.connection import Connection, Failed, Timeout
from .session.transaction import Transaction

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .session.pool import Pool

Save = Callable[[Delivery], Awaitable[None]]

_log = logging.getLogger("smtpretry")

_OUR_OWN_REFUSAL = Decision(
    Action.FAIL, Scope.MESSAGE, 0.0, Rule(action=Action.FAIL, why="Not the server's reply, but our own.")
)
_EXPIRED = "4.4.7"  # RFC 3463 §3.5: delivery time expired
_LAST_CALL = 1.0  # seconds before a message expires: when the last attempt begins
_ENDED_IN_DOUBT = Said(
    Stage.END_OF_DATA, Reply(NO_REPLY, text="the attempt ended before the server's answer was stored")
)
_FIRST_COMMANDS = (Stage.STARTTLS, Stage.AUTH, Stage.MAIL)  # one of them is the first on a connection that was idle
_FENCE = 1.0  # seconds that a `save` before a transaction is good for: no engine gives a delivery away sooner
_UNRULY = 2  # connections that end in a row, at different recipients, before it is taken for the server's trouble


class Pass:
    """One attempt at a delivery over one connection.

    `todo` holds the recipients that this pass still has to offer. Every turn of the loop in `run` either settles or
    defers some of them, or makes a repair that no later turn of the same pass makes again: so it ends.
    """

    def __init__(
        self, delivery: Delivery, policy: RetryPolicy, pool: Pool, timeout: Timeout, save: Save | None = None
    ) -> None:
        self.delivery, self.policy, self.pool, self.timeout, self.save = delivery, policy, pool, timeout, save
        self.saved_at = -math.inf
        self.settled = False  # somebody has got an end since it was saved
        self.unfinished = True  # another connection has to go on with it
        self.crowded = False
        self.todo: list[str] = []
        self.batch: int | None = None  # how many recipients the server takes in one transaction
        self.repaired: set[Action | Rule] = set()  # what was mended; the same is not mended again
        self.waits: dict[tuple[Scope, int, float | None], float] = {}  # so that those who wait alike go on together
        self.offered: str | None = None  # the recipient of the last RCPT
        self.suspect: str | None = None  # the same, where it was refused: if the line breaks next, that may be why
        self.unruly = 0

    async def run(self, connection: Connection) -> None:
        """Offer the message to everybody who is due, or leave it `unfinished` where this connection is one too many."""
        now, first = self.policy.clock(), not self.todo
        self.delivery.hand_over(now)
        if first:
            self._expire(now)
            self.todo = self.delivery.due(now)
            self._doubt([who for who in self.todo if self.delivery.outcomes[who].uncertain], _ENDED_IN_DOUBT)
        if now < self.pool.resumes_at and self.pool.reason is not None:
            self._wait(self.todo, self.pool.reason, self.pool.resumes_at - now)
        if self.delivery.began_at is None:
            self.delivery.began_at = now
        if first and self.todo:
            self.delivery.attempts.append(Attempt(now))
            for who in self.todo:
                self.delivery.outcomes[who].attempts += 1
        self.crowded = False
        while self.todo and not self.crowded:
            await self._transact(connection)
        self.unfinished = bool(self.todo)

    def _expire(self, now: float) -> None:
        """Refuse what may not be sent any more."""
        why = self.delivery.overdue(now, self.policy.patience)
        if why is not None and self.delivery.pending:
            expired = Said(Stage.CONNECT, Reply(NO_REPLY, _EXPIRED, why))
            self.delivery.attempts.append(Attempt(now))
            self._note(expired, _OUR_OWN_REFUSAL, self.delivery.pending)
            self._settle(self.delivery.pending, Status.REFUSED, expired)

    async def _transact(self, connection: Connection) -> None:
        """One transaction with as many recipients as may go together, and what follows from its failure."""
        transaction = Transaction(connection, self.delivery, self.timeout)
        group, taken = self._group(), list[str]()
        self.suspect = None
        try:
            await self._prepare(connection)
            await self._save()
            await transaction.mail()
            await self._offer(connection, transaction, group, taken)
            if taken:
                sending = transaction.data() if self.save is None else self._data(transaction, taken)
                self._accept(taken, await sending)
            else:
                await connection.reset(self.timeout)
                if not connection.is_open:
                    self._set_apart(self.suspect)
            connection.reused = True
            connection.carried += 1
        except Failed as failed:
            await self._act(connection, failed, taken or group)
        except BaseException as error:
            if transaction.dot_sent:
                broken_off = Reply(NO_REPLY, text=f"broken off: {type(error).__name__}")
                self._doubt(taken, Said(Stage.END_OF_DATA, broken_off))
            raise
        await self._save_settled()

    async def _data(self, transaction: Transaction, taken: Sequence[str]) -> Reply:
        """Send the message, unless it is another worker's by now. Who may get it at most once is in doubt meanwhile."""
        in_doubt = taken if self.policy.on_uncertain == "raise" else ()
        try:
            self._mark(in_doubt, uncertain=True)
            if in_doubt or self.policy.clock() - self.saved_at > _FENCE:
                await self._save()
            return await transaction.data()
        finally:
            self._mark(in_doubt, uncertain=False)  # what came of it is known, or doubted on its own account

    def _mark(self, recipients: Sequence[str], *, uncertain: bool) -> None:
        for who in recipients:
            self.delivery.outcomes[who].uncertain = uncertain

    async def _save(self) -> None:
        """Have it stored, where it is a queue's; what that raises ends the pass."""
        if self.save is not None:
            await self.save(self.delivery)
            self.saved_at = self.policy.clock()
        self.settled = False

    async def _save_settled(self) -> None:
        if self.settled:
            await self._save()

    async def _prepare(self, connection: Connection) -> None:
        before = connection.authenticated
        await connection.prepare(self.timeout)
        if connection.authenticated is not None and connection.authenticated is not before:
            self._note(Said(Stage.AUTH, connection.authenticated), None, self.todo)

    def _group(self) -> list[str]:
        if self.delivery.outcomes[self.todo[0]].alone:
            return self.todo[:1]
        return [who for who in self.todo if not self.delivery.outcomes[who].alone][: self.batch]

    async def _offer(
        self, connection: Connection, transaction: Transaction, group: Sequence[str], taken: list[str]
    ) -> None:
        """RCPT for each of the group. A refusal concerns that recipient; the rest goes on, or goes without it."""
        refusals = 0
        for self.offered in group:
            try:
                await transaction.rcpt(self.offered)
            except Failed as failed:
                decision = self._decide(connection, failed, [self.offered], splittable=bool(taken))
                if decision.action is Action.SPLIT:
                    self._note(failed.said, decision, [self.offered])
                    self.batch = len(taken)
                    return
                if decision.action is Action.RETRY and decision.scope is Scope.SERVER:
                    go = set(taken)
                    self._put_aside([who for who in self.todo if who not in go], failed.said, decision)
                    return
                if decision.action is Action.AUTHENTICATE and decision.scope is Scope.RECIPIENT and taken:
                    return  # who needs no log-in shall not depend on it
                if decision.action not in (Action.FAIL, Action.RETRY):
                    raise
                self._put_aside([self.offered], failed.said, decision)
                refusals += 1
                if refusals & (refusals - 1) == 0:  # the 1st, 2nd, 4th, 8th: each save writes the whole state
                    await self._save_settled()
                self.suspect = self.offered
            else:
                taken.append(self.offered)
                self.suspect = None

    async def _act(self, connection: Connection, failed: Failed, concerned: list[str]) -> None:
        """Do what the policy says about a failure that ended the transaction."""
        said = failed.said
        splittable = len(concerned) > 1 and not said.stage.before_mail
        concerned = self._whom(said.stage, concerned)
        decision = self._decide(connection, failed, concerned, splittable=splittable)
        if self._is_one_too_many(said, decision):
            self._note(said, replace(decision, wait=0.0), concerned)
            connection.abort()
            self.crowded = True
            return
        if Action.RECONNECT in (decision.action, decision.rule.otherwise):
            connection.abort()
        elif said.stage.in_transaction:
            await connection.reset(self.timeout)
        at_once = decision.action is Action.RECONNECT and self._may_go_on(connection, said, decision)
        self._note(said, replace(decision, wait=0.0) if at_once else decision, concerned)
        self._learn(connection, said, decision, concerned)
        match decision.action:
            case Action.FAIL:
                whom = concerned if decision.scope is Scope.RECIPIENT else self.delivery.pending
                self._settle(whom, Status.REFUSED, said)
            case Action.RETRY:
                self._defer(concerned if decision.scope is Scope.RECIPIENT else self.todo, said, decision)
            case Action.RECONNECT if at_once:
                self.repaired.add(decision.rule)
            case Action.RECONNECT:
                self._defer(concerned if self._is_to_blame(concerned, said, decision) else self.todo, said, decision)
            case Action.SPLIT:
                self.batch = len(concerned) // 2
            case repair:
                self._repair(connection, repair)

    def _may_go_on(self, connection: Connection, said: Said, decision: Decision) -> bool:
        """Whether a new connection promises something now: there is nothing to wait for, or nobody left to blame."""
        if decision.wait == 0 == decision.rule.wait and decision.rule not in self.repaired:
            return True
        if connection.reused and said.stage in _FIRST_COMMANDS:
            return True  # it had died since it was last used
        if self.suspect is None or not said.stage.in_transaction or decision.scope is Scope.SERVER:
            return False
        self._set_apart(self.suspect)  # refused, and hung up on: the others go without it
        return True

    def _whom(self, stage: Stage, group: list[str]) -> list[str]:
        """Whom a failure at that stage concerns."""
        if stage.before_mail:
            return list(self.todo)
        return [self.offered] if stage is Stage.RCPT and self.offered is not None else group

    def _is_one_too_many(self, said: Said, decision: Decision) -> bool:
        """Whether it is this connection that the server does not want, while others work."""
        about_connections = decision.rule.fewer or said.stage is Stage.CONNECT
        return about_connections and decision.wait > 0 and self.pool.crowd(decision.wait)

    def _is_to_blame(self, concerned: Sequence[str], said: Said, decision: Decision) -> bool:
        """Whether it was one recipient, not the server: who ends a connection is offered alone from now on."""
        if said.stage is not Stage.RCPT:
            return False
        known = self.delivery.outcomes[concerned[0]].alone
        self._set_apart(concerned[0])
        self.unruly += not known
        return self.unruly < _UNRULY and decision.scope is not Scope.SERVER

    def _set_apart(self, recipient: str | None) -> None:
        if recipient is not None:
            self.delivery.outcomes[recipient].alone = True

    def _learn(self, connection: Connection, said: Said, decision: Decision, concerned: Sequence[str]) -> None:
        """Take in what is true whatever is done about it."""
        if said.stage is Stage.END_OF_DATA and said.reply.code == NO_REPLY:
            self._doubt(concerned, said)
        about_log_ins = decision.rule.stages is not None and decision.rule.action in (Action.FAIL, Action.REFRESH_TOKEN)
        if said.stage is Stage.AUTH and about_log_ins:
            connection.remember(said.reply, final=decision.action is Action.FAIL)

    def _repair(self, connection: Connection, repair: Action) -> None:
        """Tell the connection what the session needs; it is brought about before the next transaction."""
        self.repaired.add(repair)
        connection.needs.tls |= repair is Action.STARTTLS
        connection.needs.auth |= repair is Action.AUTHENTICATE
        if repair is Action.REFRESH_TOKEN:
            connection.refresh()

    def _decide(
        self, connection: Connection, failed: Failed, concerned: Sequence[str], *, splittable: bool
    ) -> Decision:
        """Ask the policy, given what the session can still do."""
        if failed.final is not None:
            if failed.final != failed.said.reply.text:
                self.delivery.cure = failed.final
            return _OUR_OWN_REFUSAL
        obstacles = {
            Action.AUTHENTICATE: connection.obstacle_to_auth(),
            Action.STARTTLS: connection.obstacle_to_tls(),
            Action.REFRESH_TOKEN: connection.obstacle_to_refresh(),
            Action.SPLIT: None if splittable else "a single recipient is one too many",
        }
        able = {action for action in Action if obstacles.get(action) is None and action not in self.repaired}
        decide = partial(
            self.policy.decide,
            failed.said.reply,
            failed.said.stage,
            able=able,
            token=connection.credentials.token,
            login=Action.AUTHENTICATE in able,
            elapsed=self.delivery.elapsed(self.policy.clock()),
            left=self.delivery.left(self.policy.clock()) - _LAST_CALL,
            error=failed.said.error,
        )
        attempt = max(self.delivery.outcomes[who].attempts for who in concerned)
        decision = decide(attempt=attempt)
        if decision.scope is Scope.SERVER:
            strike = self.pool.strike(self.policy.clock())  # the backoff is the client's, not this delivery's
            decision = decide(attempt=strike)
        elif failed.said.reply.code != NO_REPLY:
            self.pool.resume()
        if decision.action is not decision.rule.action:
            self.delivery.cure = obstacles.get(decision.rule.action)
        if decision.action not in (Action.RETRY, Action.RECONNECT) or failed.said.reply.retry_after is not None:
            return decision
        wait = self.waits.setdefault((decision.scope, attempt, decision.rule.wait), decision.wait)
        return replace(decision, wait=wait)  # one jitter for all

    def _put_aside(self, recipients: Sequence[str], said: Said, decision: Decision) -> None:
        """A refusal in the course of a transaction."""
        self._note(said, decision, recipients)
        if decision.action is Action.FAIL:
            self._settle(recipients, Status.REFUSED, said)
        else:
            self._defer(recipients, said, decision)

    def _defer(self, recipients: Sequence[str], said: Said, decision: Decision) -> None:
        """Let them wait; let the whole client wait where the reply concerns the server."""
        now = self.policy.clock()
        attempt = max((self.delivery.outcomes[who].attempts for who in recipients), default=1)
        wait = decision.wait or self.policy.backoff(attempt=attempt, elapsed=self.delivery.elapsed(now))
        if decision.scope is Scope.SERVER:
            self.pool.pause(now, now + min(wait, self.policy.patience), said)
        self._wait(recipients, said, wait)

    def _wait(self, recipients: Sequence[str], said: Said, wait: float) -> None:
        """Take them out of this pass until then, or for good where the policy gives up."""
        now = self.policy.clock()
        here = set(self.todo)
        for who in [who for who in recipients if who in here]:
            outcome, last = self.delivery.outcomes[who], said
            if said.stage is Stage.RCPT and who != self.offered and outcome.stage and outcome.reply:
                last = Said(outcome.stage, outcome.reply, outcome.error)  # the other's reply is not its own
            elapsed, left = self.delivery.elapsed(now), self.delivery.left(now) - _LAST_CALL
            if self.policy.gives_up(attempt=outcome.attempts, elapsed=elapsed, wait=wait, left=left):
                limit = "the message expires before" if left < wait else "the policy allows no attempt after"
                why = f"gave up: {limit} another {wait:g} s"
                self.delivery.cure = self.delivery.cure or why
                _log.warning("%s %s: %s", self.delivery.id, who, why)
                self._settle([who], Status.REFUSED, last)
            else:
                outcome.stage, outcome.reply, outcome.error = last.stage, last.reply, last.error
                outcome.next_at = now + wait
                self.todo.remove(who)

    def _doubt(self, recipients: Sequence[str], said: Said) -> None:
        """They may have it: only an acceptance makes that certain again."""
        self._mark(recipients, uncertain=True)
        if self.policy.on_uncertain == "raise":
            self._settle(recipients, Status.UNCERTAIN, said)

    def _accept(self, recipients: Sequence[str], reply: Reply) -> None:
        self.unruly = 0
        self.delivery.response = reply.message
        accepted = Said(Stage.END_OF_DATA, reply)
        self._note(accepted, None, recipients)
        self._settle(recipients, Status.ACCEPTED, accepted)
        self.pool.resume()

    def _settle(self, recipients: Sequence[str], status: Status, last: Said) -> None:
        self.delivery.settle(recipients, status, last.stage, last.reply, last.error)
        self.settled |= bool(recipients)
        self.todo = [who for who in self.todo if self.delivery.outcomes[who].status is Status.PENDING]

    def _note(self, last: Said, decision: Decision | None, recipients: Sequence[str]) -> None:
        step = Step(
            at=self.policy.clock(),
            stage=last.stage,
            reply=last.reply,
            action=decision.action if decision else None,
            wait=decision.wait if decision else 0.0,
            recipients=tuple(recipients),
        )
        self.delivery.attempts[-1].steps.append(step)
        level = logging.WARNING if step.action is Action.FAIL else logging.INFO
        if _log.isEnabledFor(level):
            _log.log(level, "%s %s (%s)", self.delivery.id, step, ", ".join(step.recipients))
