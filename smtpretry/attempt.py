"""One pass over the recipients that are due: the session says what is due, and what follows is carried out."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import aiosmtplib
from aiosmtplib.typing import Default

from .delivery import Delivery
from .ledger import Ledger, Position
from .outcome import Status
from .policy import OWN_REFUSAL, Decision, RetryPolicy
from .replies.reply import NO_REPLY, Reply, Said
from .replies.rule import WAITING, Action, Rule
from .replies.stage import Scope, Stage
from .session.connection import Connection, Failed, Timeout
from .session.transaction import Transaction
from .verdict import After, Answer, Case, Judge, Ruling, Verdict

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from .session.pool import Pool

Save = Callable[[Delivery], Awaitable[None]]

_LINGERS = 1.0  # seconds for which a server may go on counting a connection that has ended
_A_CHANCE = 10.0  # seconds that a server gets to answer, also in the last attempt
_STALLED = "no connection came free: the server does not answer the messages before this one"
_MORE = "for more connections at a time, give RetryingSMTP a function that makes clients, and max_connections="
_HELD = 900.0  # seconds between two tries, at most, where a queue waits until somebody has mended this client
_FENCE = 1.0  # seconds that a `save` before a transaction is good for: no engine gives a delivery away sooner


class Pass:
    """One attempt at a delivery.

    Each transaction in it settles or defers somebody, or makes a repair that the same pass does not make again. So it
    ends.

    Attributes:
        unfinished: whether it needs a connection: its first, or one more.
        begun: whether it has had one.
    """

    def __init__(
        self,
        delivery: Delivery,
        policy: RetryPolicy,
        pool: Pool,
        timeout: Timeout,
        *,
        save: Save | None,
        position: Position,
    ) -> None:
        self.delivery, self.policy, self.pool, self.timeout, self.save = delivery, policy, pool, timeout, save
        self.position, self.ledger = position, Ledger(delivery, policy, position, pool.observer)
        self.unfinished = self.ledger.has_work(policy.clock())
        self.begun = False
        self._batch: int | None = None  # how many recipients the server takes in one transaction
        self._repaired: set[Action] = set()  # what was mended; the same is not mended again
        self._reconnected: set[Rule] = set()  # why it went on at once over a new connection; not twice in a row
        self._waits: dict[tuple[Scope, int, float | None], float] = {}  # so that those who wait alike go on together
        self._unruly = 0  # recipients in a row whose RCPT ended a connection
        self._ahead = True  # commands may be sent ahead of the answers
        self._saved_at = -math.inf
        self._warned = False

    async def run(self, connection: Connection) -> None:
        """Offer the message to everybody who is due, or leave it `unfinished`, to go on over another connection."""
        try:
            await self._run(connection)
        finally:
            self.ledger.report()

    def pool_timeout(self) -> float:
        """Seconds that it waits for a connection while nobody gets one: as long as another may take to fail."""
        if self.position.others_are_ready:
            return 0.0
        limit = max(self.policy.patience - self.ledger.elapsed(), _A_CHANCE) + _LINGERS
        return min(limit, self.delivery.left(self.policy.clock()))

    def stand_back(self) -> None:
        """Leave it to another server, or give up: there was no connection in that time."""
        now, ledger = self.policy.clock(), self.ledger
        if not ledger.todo:
            ledger.open(now, self.pool.refused_at)
        said = Failed.without_reply(Stage.CONNECT, aiosmtplib.SMTPTimeoutError(_STALLED)).said
        if ledger.todo and not self.position.others_are_ready:
            self.delivery.cure = _MORE
        wait = self.policy.backoff(attempt=1, elapsed=ledger.elapsed())
        ledger.stand_back(said, wait, ledger.elapsed() if self.position.others_are_ready else math.inf)
        ledger.close(now)
        ledger.report()
        self.unfinished = False

    async def _run(self, connection: Connection) -> None:
        now, ledger, pool = self.policy.clock(), self.ledger, self.pool
        self.begun = True
        is_held, is_closed = connection.let_through_at is None or now < pool.paused_until, pool.is_closed(now)
        if is_held and not is_closed:
            return
        if first := not ledger.todo:
            ledger.open(now, pool.refused_at)
        if is_held and pool.reason is not None:
            ledger.pause(pool.reason, pool.opens_at, pool.paused_until, pool.refused_at)
        if first and ledger.todo:
            ledger.count(now)
        goes_on = True
        while ledger.todo and goes_on:
            goes_on = await self._transact(connection)
            ledger.report()
        self.unfinished = bool(ledger.todo)
        ledger.close(now)

    async def _transact(self, connection: Connection) -> bool:
        """One transaction with as many recipients as may go together, and what follows from it.

        Returns whether the connection may go on with the pass: with a repair of this transaction, or with the next one
        where nothing paces them.
        """
        judge = Judge(self._case(connection))
        transaction = Transaction(connection, self.delivery, self.timeout)
        try:
            await self._prepare(connection)
            if self._is_stale:
                await self._save()
            await transaction.envelope(judge, ahead=self._ahead)
            self._warn_of_left_out(transaction.left_out)
            if judge.body_is_due:
                judge.hear(await self._body(transaction, judge.verdict.taken))
        except Failed as failed:
            judge.hear(Answer(failed.said.stage, failed.said, final=failed.final))
        except BaseException as error:
            if transaction.in_doubt and judge.verdict.in_doubt is None:
                broken_off = Reply(NO_REPLY, text=f"broken off: {type(error).__name__}")
                judge.verdict.in_doubt = Said(Stage.END_OF_DATA, broken_off)
            raise
        finally:
            self._record(judge.verdict)  # before anybody else's code runs
        verdict = judge.conclude()
        self._carry_out(connection, verdict)
        await self._clean_up(connection, verdict)
        if verdict.one_too_many is not None or verdict.too_soon:
            return False
        return verdict.repair is not None or not self.pool.is_paced

    async def _body(self, transaction: Transaction, taken: Sequence[str]) -> Answer:
        """Send the message, unless it is another worker's by now. Who may get it at most once is in doubt meanwhile."""
        in_doubt = taken if self.save is not None and self.policy.on_uncertain == "raise" else ()
        try:
            self.ledger.mark(in_doubt, uncertain=True)
            if in_doubt or self._is_stale:
                await self._save()
            return await transaction.body()
        finally:
            self.ledger.mark(in_doubt, uncertain=False)  # what came of it is known, or doubted on its own account

    async def _prepare(self, connection: Connection) -> None:
        attempt, before = self.delivery.attempts[-1], connection.authenticated
        if connection.is_ready:
            attempt.server = self.pool.server_of(connection)
            return
        slow = None if connection.is_open else self.pool.warn_if_slow()
        try:
            await connection.prepare(self._time_to_connect(connection))
        finally:
            if slow is not None:
                slow.cancel()
            attempt.server = self.pool.look_at(connection)
        if connection.authenticated is not None and connection.authenticated is not before:
            self.ledger.note(Said(Stage.AUTH, connection.authenticated), None, self.ledger.todo)

    def _time_to_connect(self, connection: Connection) -> Timeout:
        """The time-out of each step before MAIL: no longer than the policy's patience, where none was given."""
        limit = max(self.policy.patience - self.ledger.elapsed(), _A_CHANCE)
        own = connection.seconds(self.timeout)
        return limit if self.timeout is Default.token and own is not None and limit < own else self.timeout

    @property
    def _is_stale(self) -> bool:
        """Whether another worker could have it by now."""
        return self.save is not None and self.policy.clock() - self._saved_at > _FENCE

    def _warn_of_left_out(self, options: Sequence[str]) -> None:
        """Say once which ESMTP parameters the server does not know, and the message went without."""
        if options and not self._warned:
            self._warned = True
            why = f"sent without {' '.join(options)}: the server does not offer the extension"
            self.ledger.remark(Said(Stage.MAIL, Reply(NO_REPLY, text=why)))

    async def _save(self) -> None:
        """Have it stored, where it is a queue's; what that raises ends the pass."""
        if self.save is not None:
            await self.save(self.delivery)
            self._saved_at = self.policy.clock()
        self.ledger.changed = False

    # What the judge is told

    def _case(self, connection: Connection) -> Case:
        outcomes = self.delivery.outcomes
        return Case(
            group=self._group(),
            todo=self.ledger.todo,
            pending=lambda: self.delivery.pending,
            decide=partial(self._decide, connection),
            reused=lambda: connection.reused,
            others=lambda: self.pool.others > 0,
            on_credit=connection.credit > 0,
            reconnected=self._reconnected,
            alone=lambda who: outcomes[who].alone,
            unruly=self._unruly,
        )

    def _group(self) -> list[str]:
        """Whom the next transaction offers it to: those who must go alone come last."""
        outcomes, todo = self.delivery.outcomes, self.ledger.todo
        first = next(iter(todo))
        if outcomes[first].alone:
            return [first]
        return [who for who in todo if not outcomes[who].alone][: self._batch]

    def _decide(
        self, connection: Connection, said: Said, concerned: Collection[str], *, final: str | None, splittable: bool
    ) -> Decision:
        """Ask the policy, given what the session can still do."""
        if final is not None:
            if final != said.reply.text:
                self.delivery.cure = final
            return self._held(said, OWN_REFUSAL, concerned)
        obstacles = {
            Action.AUTHENTICATE: connection.obstacle_to_auth(),
            Action.STARTTLS: connection.obstacle_to_tls(),
            Action.REFRESH_TOKEN: connection.obstacle_to_refresh(),
            Action.SPLIT: None if splittable else "a single recipient is one too many",
        }
        able = {action for action in Action if obstacles.get(action) is None and action not in self._repaired}
        decide = partial(
            self.policy.decide,
            said.reply,
            said.stage,
            able=able,
            token=connection.credentials.token,
            login=Action.AUTHENTICATE in able,
            elapsed=self.ledger.elapsed(),
            left=self.ledger.left(),
            error=said.error,
        )
        attempt = self.ledger.attempts(concerned)
        decision = decide(attempt=attempt)
        if decision.rule.slower and not said.stage.before_mail:
            decision = decide(attempt=1)  # the pace knows how often that was said
        elif decision.scope is Scope.SERVER:
            decision = decide(attempt=self.pool.failure_number(self.policy.clock()))  # the backoff is the client's
        if decision.action is not decision.rule.action:
            self.delivery.cure = obstacles.get(decision.rule.action)
        decision = self._held(said, decision, concerned)
        if decision.action not in WAITING or said.reply.retry_after is not None:
            return decision
        wait = self._waits.setdefault((decision.scope, attempt, decision.rule.wait), decision.wait)
        return replace(decision, wait=wait)  # one jitter for all

    def _held(self, said: Said, decision: Decision, concerned: Collection[str]) -> Decision:
        """What a queue makes of a final refusal of this client: it waits until that is mended, as Postfix does.

        Else a wrong password, a certificate or a suspended account would end all that is in the queue within minutes.
        What is said to a recipient ends that one alone.
        """
        rule, scope = decision.rule, decision.scope
        of_the_client = said.stage.before_mail or (scope is Scope.SERVER and said.stage is not Stage.RCPT)
        of_the_client |= rule.action in (Action.AUTHENTICATE, Action.STARTTLS) and scope is Scope.MESSAGE
        is_the_last = not (self.position.others_are_ready or any(map(self.position.others_may, concerned)))
        if self.save is None or decision.action is not Action.FAIL or not (of_the_client and is_the_last):
            return decision
        number = self.pool.failure_number(self.policy.clock())
        wait = min(self.policy.backoff(attempt=number, elapsed=self.ledger.elapsed()), _HELD)
        return Decision(Action.RETRY, Scope.SERVER, wait, replace(rule, patience=None))

    # What follows

    def _record(self, verdict: Verdict) -> None:
        """Take in what is certain, and what is in doubt."""
        if verdict.accepted is not None:
            self.delivery.response = verdict.accepted.reply.message
            self.ledger.settle(verdict.taken, Status.ACCEPTED, verdict.accepted)
        if verdict.in_doubt is not None:
            self.ledger.doubt(verdict.taken, verdict.in_doubt)
        for ruling in verdict.refused:
            moving, rule = self._moving(ruling), ruling.decision.rule
            self.ledger.settle([who for who in ruling.recipients if who not in moving], Status.REFUSED, ruling.said)
            if rule.cure and ruling.decision.action is rule.action and not self.delivery.pending:
                self.delivery.cure = rule.cure

    def _moving(self, ruling: Ruling) -> Sequence[str]:
        """Whom another server is to be tried for: the trouble is this one's, not the message's."""
        if not (ruling.is_its_own_trouble or ruling.decision is OWN_REFUSAL):
            return []
        if self.position.others_are_ready:
            return ruling.recipients
        is_final = ruling.decision.action is Action.FAIL  # or they may as well wait here
        return [who for who in ruling.recipients if is_final and self.position.others_may(who)]

    def _carry_out(self, connection: Connection, verdict: Verdict) -> None:
        """Do what follows, for the recipients and for the whole client."""
        for ruling in map(partial(self._paced, connection), verdict.rulings):
            self.ledger.note(ruling.said, ruling.decision, ruling.recipients)
            self._learn(connection, ruling)
        if verdict.accepted is not None:
            self.ledger.note(verdict.accepted, None, verdict.taken)
            self.pool.took(self.policy.clock())
            self._reconnected.clear()
        for who in verdict.alone:
            self.delivery.outcomes[who].alone = True
        self._unruly = 0 if verdict.accepted else self._unruly + verdict.unruly
        self._ahead = self._ahead and not verdict.out_of_step
        if verdict.batch is not None:
            self._batch = verdict.batch
        if verdict.one_too_many is not None:
            self.pool.too_many_connections(verdict.one_too_many)
        if verdict.too_soon:
            connection.credit -= 1
            self.pool.rest(connection, _LINGERS / 2**connection.credit)
            self._reconnected.clear()  # the next one to be lent may be used up, too
        moving = [ruling._replace(recipients=whom) for ruling in verdict.refused if (whom := self._moving(ruling))]
        for ruling in map(partial(self._paced, connection), (*verdict.waiting, *moving)):
            self._defer(ruling)

    def _paced(self, connection: Connection, ruling: Ruling) -> Ruling:
        """Lower the pace where that is what was said, once for each message; the wait is then what that says."""
        if not ruling.is_about_the_pace:
            return ruling
        now, decision = self.policy.clock(), ruling.decision
        since = now if connection.let_through_at is None else connection.let_through_at
        until = self.pool.slow_down(now, decision.wait, ruling.said, since)
        return ruling._replace(decision=replace(decision, wait=max(0.0, until - now)))

    def _learn(self, connection: Connection, ruling: Ruling) -> None:
        """Take in what is true whatever is done about it."""
        said, rule = ruling.said, ruling.decision.rule
        if ruling.decision.scope is not Scope.SERVER and said.reply.code != NO_REPLY:
            self.pool.resume(self.policy.clock())
        about_log_ins = rule.stages is not None and rule.action in (Action.FAIL, Action.REFRESH_TOKEN)
        if said.stage is Stage.AUTH and about_log_ins:
            is_final = said.reply.is_permanent and ruling.decision.action is not Action.REFRESH_TOKEN
            connection.remember(said.reply, final=is_final)

    def _defer(self, ruling: Ruling) -> None:
        """Let them wait; let the whole client wait where the reply concerns the server.

        Where another server is ready they go there at once, if it is this one's trouble. A lost connection is, too.

        For a lost connection, and for a refusal of the client in the midst of a message, it takes two messages in a row
        to tell the server's trouble from a message that it trips over.
        """
        now, decision = self.policy.clock(), ruling.decision
        is_final = decision.action is Action.FAIL
        paced, lost = ruling.is_about_the_pace, ruling.said.reply.code == NO_REPLY and not is_final
        wait = decision.wait
        if not wait and not paced:
            attempt = self.ledger.attempts(ruling.recipients)
            wait = self.policy.backoff(attempt=attempt, elapsed=self.ledger.elapsed())
        moves_on = bool(self._moving(ruling))
        failover = moves_on or (lost and self.position.others_are_ready)
        is_held = decision.action is Action.RETRY and decision.rule.action not in WAITING
        is_held = is_held and not ruling.said.stage.before_mail
        in_trouble = (moves_on and ruling.is_its_own_trouble) or (decision.scope is Scope.SERVER and not is_held)
        if not in_trouble and (is_held or (lost and failover)):
            in_trouble = self.pool.is_second_in_a_row(self.delivery.id)
        if in_trouble and not paced:
            self.pool.pause(now, now + min(wait, self.policy.patience), ruling.said, is_final=is_final)
        if is_final:
            self.position.refused.update(ruling.recipients)
        whom = self.ledger.leave(ruling.recipients, for_good=is_final) if failover else ruling.recipients
        tied = decision.scope is not Scope.SERVER and not lost
        self.ledger.wait(whom, ruling.said, wait, said_to=ruling.said_to, rule=decision.rule, tied=tied)

    async def _clean_up(self, connection: Connection, verdict: Verdict) -> None:
        """Leave a session that is known to be clean, or none; tell it what the next transaction needs."""
        if verdict.after is After.CLOSE:
            connection.abort()
        elif verdict.repair is None:
            connection.reused = True
            connection.carried += 1
        if verdict.after is After.RESET:
            await connection.reset(self.timeout)
            if not connection.is_open and verdict.suspect is not None:
                self.delivery.outcomes[verdict.suspect].alone = True  # refused, and hung up on
        if isinstance(verdict.repair, Rule):
            self._reconnected.add(verdict.repair)
            if connection.carried and verdict.rulings[-1].said.reply.code != NO_REPLY:
                connection.give_credit()
        elif verdict.repair is not None:
            self._repair(connection, verdict.repair)
        if self.ledger.changed:
            await self._save()

    def _repair(self, connection: Connection, repair: Action) -> None:
        """Tell the connection what the session needs; it is brought about before the next transaction."""
        self._repaired.add(repair)
        connection.needs.tls |= repair is Action.STARTTLS
        connection.needs.auth |= repair is Action.AUTHENTICATE
        if repair is Action.REFRESH_TOKEN:
            connection.refresh()
