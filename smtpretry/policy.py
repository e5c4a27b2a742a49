"""What to do about a reply, how long to wait, and when to give up: `RetryPolicy`, a value that does no I/O."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable
from dataclasses import KW_ONLY, dataclass, field
from datetime import timedelta
from itertools import chain
from typing import TYPE_CHECKING, Final, Literal, Self, TypedDict, Unpack

from .clock import now
from .replies.delays import duration
from .replies.reply import NO_REPLY, Reply
from .replies.rule import WAITING, Action, Rule
from .replies.rules import DEFAULT_RULES
from .replies.stage import Scope, Stage

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection

    import tenacity
    from tenacity.stop import StopBaseT
    from tenacity.wait import WaitBaseT

_EVERYTHING = frozenset(Action)
_SHORTEST = 1.0  # seconds that a named delay is taken for at least
_TRUSTED = 3  # attempts; a server that names delays and goes on refusing is believed no more than the backoff
_GRACE = 0.1  # seconds that may pass between a decision and its wait
_SLOWEST = 900.0  # seconds that a row's own wait grows to; further only where the policy's wait does
_DOUBLINGS = 20  # more of them make no difference

# What holds where no row matches, whatever rules a policy has (RFC 5321 §4.2.1: the first digit tells).
_UNMATCHED = (
    Rule(
        name="silence", code=NO_REPLY, action=Action.RECONNECT, why="No valid reply came.", source="RFC 5321 §4.5.4.1"
    ),
    Rule(
        name="transient",
        code=range(400, 500),
        action=Action.RETRY,
        why="A transient refusal.",
        source="RFC 5321 §4.2.1",
    ),
    Rule(name="permanent", action=Action.FAIL, why="A permanent refusal.", source="RFC 5321 §4.2.1"),
)


def _whom(rule: Rule, stage: Stage) -> Scope:
    """Whom it concerns: before MAIL, no reply is about a message, and before RCPT none about a recipient."""
    if rule.scope is None:
        return Scope.SERVER if rule.slower else stage.scope
    if stage.before_mail or (rule.scope is Scope.RECIPIENT and stage.before_recipients):
        return stage.scope
    return rule.scope


def _grown(wait: float, attempt: int, backoff: float) -> float:
    """A row's wait: doubled with each attempt, up to 15 minutes or the backoff, and never below itself."""
    return min(wait * 2.0 ** min(attempt - 1, _DOUBLINGS), max(wait, backoff, _SLOWEST))


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do about one reply: the action, whom it concerns, the wait in seconds, and the row that says so."""

    action: Action
    scope: Scope
    wait: float
    rule: Rule


class Overrides(TypedDict, total=False):
    """The fields of a `RetryPolicy` that its ready-made ones take."""

    rules: tuple[Rule, ...]
    wait: WaitBaseT
    stop: StopBaseT | None
    give_up_after: timedelta | None
    max_attempts: int | None
    on_uncertain: Literal["resend", "raise"]
    sleep: Callable[[float], Awaitable[None]] | None
    clock: Callable[[], float]


class _Patient:
    """The default backoff: 60 s, doubling to 15 min, up to 6 s of jitter; what tenacity calls a wait."""

    def __call__(self, state: tenacity.RetryCallState) -> float:
        """The seconds to wait after that attempt."""
        return min(60.0 * 2.0 ** min(state.attempt_number - 1, _DOUBLINGS), 900.0) + random.uniform(0, 6)  # noqa: S311 - jitter

    def __repr__(self) -> str:
        """As a tenacity wait is written."""
        return "wait_exponential(multiplier=60, max=900) + wait_random(0, 6)"

    def __reduce__(self) -> str:
        """There is one: a policy that was copied, or that went to another process, is equal to the first."""
        return "_PATIENT"


_PATIENT: Final = _Patient()


def _own(name: str, action: Action, why: str, source: str = "") -> Decision:
    return Decision(action, Scope.MESSAGE, 0.0, Rule(name=name, action=action, wait=0, why=why, source=source))


# What this side decides by itself, whatever rules a policy has.
OWN_REFUSAL = _own("own-refusal", Action.FAIL, "This server cannot take the message, or not from this client.")
EXPIRED = _own("expired", Action.FAIL, "The message was not to be sent any more.")
OUT_OF_STEP = _own(
    "out-of-step",
    Action.RECONNECT,
    "The answers do not fit the commands that were sent ahead: again, one command at a time.",
    "RFC 2920 §3.1",
)


@dataclass(frozen=True)
class RetryPolicy:
    """The rules, the backoff and the limits. A frozen value: share it between clients, tasks and threads.

    Args:
        rules: the table, first match wins. Put your own rows in front: ``(Rule(...), *DEFAULT_RULES)``.
        wait: the backoff, any tenacity wait. It is used if neither the server nor the row names a delay. A row's own
            `wait` wins, also if it is shorter, and grows towards this one. The default (60 s, doubling to 15 min, up to
            6 s of jitter) is made for greylisting (RFC 6647 §5: a retry after a minute to an hour passes; RFC 5321
            §4.5.4.1 asks for patience).
        stop: any tenacity stop, in addition to the two limits below; None for these alone.
        give_up_after: the last attempt starts at most so long after the message was handed over to the client or the
            queue; None for no limit. The last wait is shortened to end at that time. A pause of the whole server is
            not, for it holds for all. Where such a pause, or a delay that the server names, ends later than that, the
            policy gives up at once. Only a first attempt may start later, in a line for a connection that moves.
        max_attempts: how many attempts each recipient gets; None for no limit.
        on_uncertain: what to do if the connection breaks after the final dot and before the reply. "resend" sends the
            message again (at least once), as RFC 5321 §4.5.3.2.6 and RFC 1047 ask. "raise" does not (at most once).
        sleep: how to wait, a coroutine function of seconds; None for the event loop's own. For tests.
        clock: what time it is, in seconds since the epoch. For tests.

    Raises:
        ValueError: a wait below zero, a limit that is not positive, an unknown `on_uncertain`.
        TypeError: rules that are no `Rule`, a wait or stop that cannot be called, a limit of another type.
    """

    rules: tuple[Rule, ...] = DEFAULT_RULES
    _: KW_ONLY
    wait: WaitBaseT = _PATIENT
    stop: StopBaseT | None = None
    give_up_after: timedelta | None = timedelta(hours=1)
    max_attempts: int | None = None
    on_uncertain: Literal["resend", "raise"] = "resend"
    sleep: Callable[[float], Awaitable[None]] | None = field(default=None, repr=False, compare=False)
    clock: Callable[[], float] = field(default=now, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Refuse at once what would fail in the middle of a delivery."""
        if not isinstance(self.rules, Iterable) or not all(isinstance(rule, Rule) for rule in self.rules):
            msg = f"rules is a tuple of Rule, not {type(self.rules).__name__} (or something in it is no Rule)"
            raise TypeError(msg)
        object.__setattr__(self, "rules", tuple(self.rules))
        if not callable(self.wait) or (self.stop is not None and not callable(self.stop)):
            msg = "wait and stop are tenacity's, such as tenacity.wait_fixed(60) and tenacity.stop_after_attempt(5)"
            raise (ValueError if isinstance(self.wait, (int, float)) and self.wait < 0 else TypeError)(msg)
        if self.wait is not _PATIENT and not float(self.wait(self._state(attempt=1, elapsed=0.0))) >= 0:  # nor NaN
            msg = f"wait gives a negative number of seconds: {self.wait!r}"
            raise ValueError(msg)
        if self.give_up_after is not None and not isinstance(self.give_up_after, timedelta):
            msg = f"give_up_after is a timedelta, such as timedelta(minutes=10), or None, not {self.give_up_after!r}"
            raise TypeError(msg)
        if self.give_up_after is not None and self.give_up_after <= timedelta(0):
            msg = f"give_up_after is a positive timedelta, not {self.give_up_after!r}"
            raise ValueError(msg)
        if self.max_attempts is not None and not isinstance(self.max_attempts, int):
            msg = f"max_attempts is a number of attempts or None, not {self.max_attempts!r}"
            raise TypeError(msg)
        if self.max_attempts is not None and self.max_attempts < 1:
            msg = f"max_attempts is at least 1, not {self.max_attempts}"
            raise ValueError(msg)
        if self.on_uncertain not in ("resend", "raise"):
            msg = f'on_uncertain is "resend" or "raise", not {self.on_uncertain!r}'
            raise ValueError(msg)

    def __repr__(self) -> str:
        """Without the rows of the table, which are many."""
        own = sum(rule not in DEFAULT_RULES for rule in self.rules)
        rules = "DEFAULT_RULES" if self.rules == DEFAULT_RULES else f"({len(self.rules)} rules, {own} of them own)"
        limits = f"give_up_after={self.give_up_after!r}, max_attempts={self.max_attempts!r}"
        return f"{type(self).__name__}(rules={rules}, {limits}, on_uncertain={self.on_uncertain!r})"

    @classmethod
    def interactive(cls, **overrides: Unpack[Overrides]) -> Self:
        """For a request handler: waits of seconds (1, 2, 4, 8 and so on with jitter), half a minute in all.

        Args:
            overrides: fields of the policy to change, such as ``give_up_after=timedelta(seconds=10)``.
        """
        from tenacity import wait_exponential, wait_random  # noqa: PLC0415 - a tenth of the time of our import

        wait = wait_exponential(multiplier=1, max=8) + wait_random(0, 0.5)
        fields: Overrides = {"wait": wait, "give_up_after": timedelta(seconds=30)}
        fields.update(overrides)
        return cls(**fields)

    @classmethod
    def queue(cls, **overrides: Unpack[Overrides]) -> Self:
        """For a durable queue (RFC 5321 §4.5.4.1): two more tries in an hour, then every 2 to 3 h, for five days.

        Args:
            overrides: fields of the policy to change, such as ``give_up_after=timedelta(days=2)``.
        """
        from tenacity import wait_chain, wait_random  # noqa: PLC0415 - a tenth of the time of our import

        minute, hour = 60, 3600
        wait = wait_chain(
            wait_random(15 * minute, 20 * minute),
            wait_random(30 * minute, 40 * minute),
            wait_random(2 * hour, 3 * hour),
        )
        fields: Overrides = {"wait": wait, "give_up_after": timedelta(days=5)}
        fields.update(overrides)
        return cls(**fields)

    def decide(
        self,
        reply: Reply,
        stage: Stage,
        *,
        able: Collection[Action] = _EVERYTHING,
        token: bool = False,
        login: bool = False,
        attempt: int = 1,
        elapsed: float = 0.0,
        left: float = math.inf,
        error: BaseException | None = None,
    ) -> Decision:
        """Decide what a reply means. No I/O.

        Args:
            reply: what the server said.
            stage: when it said it.
            able: the actions that the session can take now; a row that asks for another falls to its `otherwise`.
            token: whether the session logs in with an OAuth token.
            login: whether it is known that the session could log in, and has not done so.
            attempt: the number of the attempt that met the reply, from 1: what the backoff goes by.
            elapsed: seconds since the message was handed over.
            left: seconds until it expires.
            error: the exception that stands for the reply, for tenacity waits that look at it.

        The wait is the delay that the server names (after the third attempt the backoff, where that is longer); else
        the row's own, doubled with each attempt, where it ends before the deadline; else the backoff.
        """
        rows = chain(self.rules, _UNMATCHED)
        rule = next(rule for rule in rows if rule.matches(reply, stage, token=token, login=login))
        action, scope = rule.action, _whom(rule, stage)
        if action not in able:
            action = rule.otherwise or (Action.FAIL if reply.is_permanent else Action.RETRY)
        if action not in WAITING:
            return Decision(action, scope, 0.0, rule)
        named = reply.retry_after
        if named is not None and attempt <= _TRUSTED:
            return Decision(action, scope, max(named, _SHORTEST), rule)
        if rule.wait == 0 and action is rule.action:
            return Decision(action, scope, 0.0, rule)
        backoff = self.backoff(attempt=attempt, elapsed=elapsed, error=error)
        left = min(self._patience(rule) - elapsed, left)
        if named is not None:
            return Decision(action, scope, max(named, backoff), rule)
        wait = _grown(rule.wait, attempt, backoff) if rule.wait else backoff
        if wait >= left:
            wait = backoff
        if scope is not Scope.SERVER and 0 < left < wait:  # a server's pause is not one delivery's to shorten
            wait = left
        return Decision(action, scope, wait, rule)

    def backoff(self, *, attempt: int, elapsed: float, error: BaseException | None = None) -> float:
        """The seconds that `wait` computes after so many attempts in so many seconds; never below zero."""
        return max(0.0, float(self.wait(self._state(attempt=attempt, elapsed=elapsed, error=error))))

    def gives_up(
        self, *, attempt: int, elapsed: float, wait: float, left: float = math.inf, rule: Rule | None = None
    ) -> bool:
        """Whether one more attempt after `wait` seconds is too many, after `attempt` of them in `elapsed` seconds.

        Args:
            attempt: how many attempts there were.
            elapsed: seconds since the message was handed over.
            wait: seconds until the next one.
            left: seconds until the message expires.
            rule: the row that asks for it; its `patience` counts where it is shorter than the policy's.
        """
        return self._limit(attempt=attempt, elapsed=elapsed, wait=wait, left=left, rule=rule) is not None

    def _limit(self, *, attempt: int, elapsed: float, wait: float, left: float, rule: Rule | None) -> str | None:
        """What allows no further attempt, in words; None where there may be one. See `gives_up`."""
        if self.max_attempts is not None and attempt >= self.max_attempts:
            return f"max_attempts ({self.max_attempts}) allows no further try"
        if wait > left + _GRACE:
            return f"the message expires before the next try, in {duration(wait)}"
        if wait > self._patience(rule) - elapsed + _GRACE:
            whose = "give_up_after" if rule is None or self._patience(rule) == self.patience else f"the row {rule.name}"
            return f"{whose} ({duration(self._patience(rule))}) allows no try after another {duration(wait)}"
        if self.stop is not None and self.stop(self._state(attempt=attempt, elapsed=elapsed, wait=wait)):
            return "stop= allows no further try"
        return None

    @property
    def patience(self) -> float:
        """How long a delivery may take, in seconds."""
        return math.inf if self.give_up_after is None else self.give_up_after.total_seconds()

    def _patience(self, rule: Rule | None) -> float:
        return self.patience if rule is None or rule.patience is None else min(self.patience, rule.patience)

    def _state(
        self, *, attempt: int, elapsed: float, wait: float = 0.0, error: BaseException | None = None
    ) -> tenacity.RetryCallState:
        """What tenacity's waits and stops look at, made anew each time: a shared one would mix up the counts."""
        import tenacity  # noqa: PLC0415 - a tenth of the time of our import

        state = tenacity.RetryCallState(tenacity.AsyncRetrying(), fn=None, args=(), kwargs={})
        state.attempt_number = attempt
        state.outcome = tenacity.Future.construct(attempt, error or Exception(), has_exception=True)
        state.outcome_timestamp = state.start_time + elapsed
        state.upcoming_sleep = wait
        return state
