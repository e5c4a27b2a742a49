"""One pass over the recipients that are due: each reply decided by the policy, repairs at once, no waiting."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from .connection import Connection, Failed, Timeout
from .delivery import Attempt, Delivery, Status, Step
from .policy import Decision, RetryPolicy
from .reply import NO_REPLY, Reply, Stage
from .rules import Action, Rule, Scope
from .transaction import Transaction

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .pool import Pool

_log = logging.getLogger("smtpretry")

_BEFORE_MAIL = (Stage.CONNECT, Stage.EHLO, Stage.STARTTLS, Stage.AUTH)
_IN_TRANSACTION = (Stage.RCPT, Stage.DATA)  # where a refusal leaves one open
_OURS = Decision(Action.FAIL, Scope.MESSAGE, 0.0, Rule(action=Action.FAIL, why="Not the server's reply, but our own."))
_FIRST_COMMANDS = (Stage.STARTTLS, Stage.AUTH, Stage.MAIL)  # one of them is the first on a connection that was idle
_UNRULY = 2  # connections that end in a row, at different recipients, before it is taken for the server's trouble


class Pass:
    """One attempt at a delivery over one connection.

    `todo` holds the recipients that this pass still has to offer. Every turn of the loop in `run` either settles or
    defers some of them, or makes a repair that no later turn of the same pass makes again: so it ends.
    """

    def __init__(self, delivery: Delivery, policy: RetryPolicy, pool: Pool, timeout: Timeout) -> None:
        self.delivery, self.policy, self.pool, self.timeout = delivery, policy, pool, timeout
        self.todo: list[str] = []
        self.batch: int | None = None  # how many recipients the server takes in one transaction
        self.repaired: set[Action | Rule] = set()  # what was mended; the same is not mended again
        self.waits: dict[tuple[Scope, int, float | None], float] = {}  # so that those who wait alike go on together
        self.offered: str | None = None  # the recipient of the last RCPT
        self.suspect: str | None = None  # the same, where it was refused: if the line breaks next, that may be why
        self.unruly = 0

    async def run(self, connection: Connection) -> None:
        """Offer the message to everybody who is due."""
        now = self.policy.clock()
        if self.delivery.began_at is None:
            self.delivery.began_at = now
        self.todo = self.delivery.due(now)
        if now < self.pool.resumes_at and self.pool.reason is not None:
            self._wait(self.todo, self.pool.reason, self.pool.resumes_at - now)
        if self.todo:
            self.delivery.attempts.append(Attempt(now))
        for who in self.todo:
            self.delivery.outcomes[who].attempts += 1
        while self.todo:
            await self._transact(connection)

    async def _transact(self, connection: Connection) -> None:
        """One transaction with as many recipients as may go together, and what follows from its failure."""
        transaction = Transaction(connection, self.delivery, self.timeout)
        group, taken = self._group(), list[str]()
        self.suspect = None
        try:
            await self._prepare(connection)
            await transaction.mail()
            await self._offer(connection, transaction, group, taken)
            if taken:
                self._accept(taken, await transaction.data())
            else:
                await connection.reset(self.timeout)
                if self.suspect is not None and not connection.is_open:
                    self.delivery.outcomes[self.suspect].alone = True
            connection.used = True
        except Failed as failed:
            await self._act(connection, failed, taken or group)
        except BaseException as error:
            if transaction.dot_sent:
                self._doubt(
                    taken, Failed(Stage.END_OF_DATA, Reply(NO_REPLY, text=f"broken off: {type(error).__name__}"))
                )
            raise

    async def _prepare(self, connection: Connection) -> None:
        before = connection.authenticated
        await connection.prepare(self.timeout)
        if connection.authenticated is not None and connection.authenticated is not before:
            self._note(Failed(Stage.AUTH, connection.authenticated), None, self.todo)

    def _group(self) -> list[str]:
        alone = self.delivery.outcomes[self.todo[0]].alone
        if alone:
            return self.todo[:1]
        return [who for who in self.todo if not self.delivery.outcomes[who].alone][: self.batch]

    async def _offer(
        self, connection: Connection, transaction: Transaction, group: Sequence[str], taken: list[str]
    ) -> None:
        """RCPT for each of the group. A refusal concerns that recipient; the rest goes on."""
        for self.offered in group:
            try:
                await transaction.rcpt(self.offered)
            except Failed as failed:
                decision = self._decide(connection, failed, [self.offered], splittable=bool(taken))
                left = [who for who in self.todo if who not in taken]
                if decision.action is Action.SPLIT:
                    self._note(failed, decision, left)
                    self.batch = len(taken)
                    return
                if decision.action is Action.RETRY and decision.scope is Scope.SERVER:
                    self._put_aside(left, failed, decision)
                    return
                if decision.action not in (Action.FAIL, Action.RETRY):
                    raise
                self._put_aside([self.offered], failed, decision)
                self.suspect = self.offered
            else:
                taken.append(self.offered)
                self.suspect = None

    async def _act(self, connection: Connection, failed: Failed, concerned: list[str]) -> None:
        """Do what the policy says about a failure that ended the transaction."""
        if failed.stage in _BEFORE_MAIL:
            concerned = list(self.todo)
        elif failed.stage is Stage.RCPT and self.offered is not None:
            concerned = [self.offered]
        splittable = len(concerned) > 1 and failed.stage not in _BEFORE_MAIL
        decision = self._decide(connection, failed, concerned, splittable=splittable)
        if Action.RECONNECT in (decision.action, decision.rule.otherwise):
            connection.abort()
        elif failed.stage in _IN_TRANSACTION:
            await connection.reset(self.timeout)
        self._note(failed, decision, concerned)
        self._learn(connection, failed, decision, concerned)
        match decision.action:
            case Action.FAIL:
                whom = concerned if decision.scope is Scope.RECIPIENT else self.delivery.pending
                self._settle(whom, Status.REFUSED, failed)
            case Action.RETRY:
                self._defer(concerned if decision.scope is Scope.RECIPIENT else self.todo, failed, decision)
            case Action.RECONNECT:
                self._reconnect(connection, failed, decision, concerned)
            case Action.SPLIT:
                self.batch = self.batch if self.batch and self.batch < len(concerned) else len(concerned) // 2
            case repair:
                self._repair(connection, repair)

    def _learn(self, connection: Connection, failed: Failed, decision: Decision, concerned: Sequence[str]) -> None:
        """Take in what is true whatever is done about it."""
        if failed.stage is Stage.END_OF_DATA and failed.reply.code == NO_REPLY:
            self._doubt(concerned, failed)
        about_log_ins = decision.rule.stages is not None and decision.rule.action in (Action.FAIL, Action.REFRESH_TOKEN)
        if failed.stage is Stage.AUTH and about_log_ins:
            connection.remember(failed.reply)

    def _repair(self, connection: Connection, repair: Action) -> None:
        """Tell the connection what the session needs; it is brought about before the next transaction."""
        self.repaired.add(repair)
        connection.needs_tls |= repair is Action.STARTTLS
        connection.needs_auth |= repair is Action.AUTHENTICATE
        if repair is Action.REFRESH_TOKEN:
            connection.refresh()

    def _reconnect(self, connection: Connection, failed: Failed, decision: Decision, concerned: list[str]) -> None:
        """The connection is gone: go on at once over a new one where that promises something, else later."""
        if decision.rule.wait == 0 and decision.rule not in self.repaired:
            self.repaired.add(decision.rule)
            return
        if self.suspect is not None and failed.stage in _IN_TRANSACTION:
            self.delivery.outcomes[self.suspect].alone = True  # refused, and hung up on: the others go without it
            return
        if failed.stage is Stage.RCPT:
            outcome = self.delivery.outcomes[concerned[0]]
            self.unruly += not outcome.alone  # one that is known for it says nothing about the server
            outcome.alone = True
            self._defer(concerned, failed, decision)
            if self.unruly < _UNRULY:
                return
        elif connection.used and failed.stage in _FIRST_COMMANDS:
            return  # it had died since its last transaction
        self._defer(self.todo, failed, decision)

    def _decide(
        self, connection: Connection, failed: Failed, concerned: Sequence[str], *, splittable: bool
    ) -> Decision:
        """Ask the policy, given what the session can still do."""
        if failed.final is not None:
            self.delivery.cure = failed.final
            return _OURS
        obstacles = {
            Action.AUTHENTICATE: connection.obstacle_to_auth(),
            Action.STARTTLS: connection.obstacle_to_tls(),
            Action.REFRESH_TOKEN: connection.obstacle_to_refresh(),
            Action.SPLIT: None if splittable else "a single recipient is one too many",
        }
        able = {action for action in Action if obstacles.get(action) is None and action not in self.repaired}
        decide = partial(
            self.policy.decide,
            failed.reply,
            failed.stage,
            able=able,
            token=connection.credentials.token,
            login=Action.AUTHENTICATE in able,
            elapsed=self.delivery.elapsed(self.policy.clock()),
            error=failed.error,
        )
        attempt = max(self.delivery.outcomes[who].attempts for who in concerned)
        decision = decide(attempt=attempt)
        if decision.scope is Scope.SERVER:
            decision = decide(attempt=self.pool.failures + 1)  # its backoff is the client's, not this delivery's
        elif failed.reply.code != NO_REPLY:
            self.pool.resume()
        if decision.action is not decision.rule.action:
            self.delivery.cure = obstacles.get(decision.rule.action)
        if (
            decision.action in (Action.RETRY, Action.RECONNECT) and failed.reply.retry_after is None
        ):  # one jitter for all
            wait = self.waits.setdefault((decision.scope, attempt, decision.rule.wait), decision.wait)
            decision = replace(decision, wait=wait)
        return decision

    def _put_aside(self, recipients: Sequence[str], failed: Failed, decision: Decision) -> None:
        """A refusal in the course of a transaction."""
        self._note(failed, decision, recipients)
        if decision.action is Action.FAIL:
            self._settle(recipients, Status.REFUSED, failed)
        else:
            self._defer(recipients, failed, decision)

    def _defer(self, recipients: Sequence[str], failed: Failed, decision: Decision) -> None:
        """Let them wait; let the whole client wait where the reply concerns the server."""
        now = self.policy.clock()
        attempt = max((self.delivery.outcomes[who].attempts for who in recipients), default=1)
        wait = decision.wait or self.policy.backoff(attempt=attempt, elapsed=self.delivery.elapsed(now))
        if decision.scope is Scope.SERVER:
            self.pool.pause(now + min(wait, self.policy.patience), failed)
        self._wait(recipients, failed, wait)

    def _wait(self, recipients: Sequence[str], failed: Failed, wait: float) -> None:
        """Take them out of this pass until then, or for good where the policy gives up."""
        now = self.policy.clock()
        for who in [who for who in recipients if who in self.todo]:
            outcome, last = self.delivery.outcomes[who], failed
            if failed.stage is Stage.RCPT and who != self.offered and outcome.stage and outcome.reply:
                last = Failed(outcome.stage, outcome.reply, outcome.error)  # the other's reply is not its own
            if self.policy.gives_up(attempt=outcome.attempts, elapsed=self.delivery.elapsed(now), wait=wait):
                self._settle([who], Status.REFUSED, last)
            else:
                outcome.stage, outcome.reply, outcome.error = last.stage, last.reply, last.error
                outcome.next_at = now + wait
                self.todo.remove(who)

    def _doubt(self, recipients: Sequence[str], failed: Failed) -> None:
        """They may have it: only an acceptance makes that certain again."""
        for who in recipients:
            self.delivery.outcomes[who].uncertain = True
        if self.policy.on_uncertain == "raise":
            self._settle(recipients, Status.UNCERTAIN, failed)

    def _accept(self, recipients: Sequence[str], reply: Reply) -> None:
        self.pool.resume()
        self.unruly = 0
        self.delivery.response = reply.message
        accepted = Failed(Stage.END_OF_DATA, reply)
        self._note(accepted, None, recipients)
        self._settle(recipients, Status.ACCEPTED, accepted)

    def _settle(self, recipients: Sequence[str], status: Status, last: Failed) -> None:
        self.delivery.settle(recipients, status, last.stage, last.reply, last.error)
        self.todo = [who for who in self.todo if self.delivery.outcomes[who].status is Status.PENDING]

    def _note(self, last: Failed, decision: Decision | None, recipients: Sequence[str]) -> None:
        step = Step(
            at=self.policy.clock(),
            stage=last.stage,
            reply=last.reply,
            action=decision.action if decision else None,
            wait=decision.wait if decision else 0.0,
            recipients=tuple(recipients),
        )
        self.delivery.attempts[-1].steps.append(step)
        _log.info("%s %s", self.delivery.id, step)
