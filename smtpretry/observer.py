"""What a client tells of itself: to its hooks, in its counts, and in the log where somebody waits for long."""

from __future__ import annotations

import asyncio
import inspect
import math
from collections import deque
from collections.abc import Iterable
from contextvars import Context, copy_context
from typing import TYPE_CHECKING

from . import log
from .events import BrokenOff, Ended, Event, Hook, Paused, Resumed
from .outcome import Outcome, Status

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from .delivery import Delivery
    from .replies.reply import Said
    from .stats import Stats


class Observer:
    """Who is told, and what was counted.

    `note` keeps an event where it happens. `call_hooks` tells it, when what goes with it has been written down. A hook
    runs in the context (contextvars) of the send that it is about. What it raises is logged once, and goes no
    further; a KeyboardInterrupt and a SystemExit are not its own, and do.

    Attributes:
        counts: how many recipients came to which end.
    """

    def __init__(self, hooks: tuple[Hook, ...], clock: Callable[[], float]) -> None:
        self.hooks, self.clock = hooks, clock
        self.counts = dict.fromkeys(Status, 0)
        self._notes = deque[tuple[Context, "Delivery | None", Event]]()
        self._failed = set[int]()  # hooks whose failure was logged
        self._warned = dict[tuple[object, ...], float]()  # why somebody waits, and until when that was said

    def note(self, delivery: Delivery | None, event: Event) -> None:
        """Keep an event until it can be told."""
        if self.hooks:
            self._notes.append((copy_context(), delivery, event))

    def call_hooks(self) -> None:
        """Call the hooks."""
        while self._notes:
            context, delivery, event = self._notes.popleft()
            for hook in self.hooks:
                try:
                    context.run(hook, delivery, event)
                except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001 - whatever it is, it is the hook's
                    self._failed_once(hook, error)

    def watch(self, stats: Callable[[], Stats]) -> None:
        """Give the client's stats to the hooks that ask for them, with a method `watch`."""
        for hook in self.hooks:
            if callable(watch := getattr(hook, "watch", None)):
                watch(stats)

    def ended(self, delivery: Delivery, recipients: Sequence[str]) -> None:
        """Count recipients that have got their end, and note it."""
        for who in recipients:
            self.counts[delivery.outcomes[who].status] += 1
        if not self.hooks:
            return
        at, left = self.clock(), len(delivery.pending) + len(recipients)
        elapsed = 0.0 if delivery.began_at is None else at - delivery.began_at
        server = delivery.attempts[-1].server if delivery.attempts else ""
        for who in recipients:
            outcome, left = delivery.outcomes[who], left - 1
            ended = Ended(at, who, outcome.status, outcome.stage, outcome.reply, server, elapsed, left)
            self.note(delivery, ended)

    def broken_off(self, delivery: Delivery, error: BaseException) -> None:
        """A send ends with an exception; those who are pending have no end."""
        if not isinstance(error, Exception):
            log.broken_off(delivery.id, delivery.pending, type(error).__name__)
        self.note(delivery, BrokenOff(self.clock(), tuple(delivery.pending), type(error).__name__))
        self.call_hooks()

    def paused(self, server: str, now: float, until: float, said: Said, *, for_the_first: bool) -> None:
        """The client leaves the server alone: for the first connection that it never had, or after it had one."""
        self.note(None, Paused(now, until, said.stage, said.reply, server))
        first = for_the_first and self._is_news("the first", until=math.inf)
        if (first or until - now > log.LONG) and self._is_news(*_why(said), until=until):
            warn = log.never_connected if first else log.pauses
            warn(server, said.stage, said.reply, wait=until - now, until=until)

    def still_connecting(self, server: str, seconds: float) -> None:
        """A connection has not been opened in so many seconds."""
        if self._is_news("connecting", until=self.clock() + log.LONG):
            log.still_connecting(server, seconds)

    def resumed(self, server: str) -> None:
        """The server works again."""
        self.note(None, Resumed(self.clock(), server))

    def waits(self, delivery: Delivery, until: float) -> None:
        """A send waits. Where that takes long, the log says why: once for all that wait for the same reason."""
        if (wait := until - self.clock()) <= log.LONG:
            return
        who = min(delivery.pending, key=lambda who: delivery.outcomes[who].next_at)
        last = delivery.outcomes[who]
        if last.stage and last.reply and self._is_news(*_why(last), until=until):
            log.waits(delivery.id, who, last.stage, last.reply, wait=wait, until=until)

    def _is_news(self, *why: object, until: float) -> bool:
        """Whether that was not said yet, or is no longer true."""
        now = self.clock()
        if self._warned.get(why, now) > now:
            return False
        self._warned = {one: end for one, end in self._warned.items() if end > now} | {why: until}
        return True

    def _failed_once(self, hook: Hook, error: BaseException) -> None:
        if id(hook) not in self._failed:
            self._failed.add(id(hook))
            log.hook_failed(name_of(hook), error)


def hooks_of(on_step: Hook | Iterable[Hook] | None) -> tuple[Hook, ...]:
    """The hooks that `on_step=` gives.

    Raises:
        TypeError: it is no function, and no several of them, or one is a coroutine function.
    """
    if on_step is None:
        return ()
    hooks = tuple(on_step) if isinstance(on_step, Iterable) and not callable(on_step) else (on_step,)
    for hook in hooks:
        if not callable(hook):
            msg = f"on_step is a function of a delivery and a step, or several of them, not {hook!r}"
            raise TypeError(msg)
        if inspect.iscoroutinefunction(hook) or inspect.iscoroutinefunction(type(hook).__call__):
            msg = f"on_step is a plain function, for no send waits for it; {name_of(hook)} is a coroutine function"
            raise TypeError(msg)
        if not _takes_two(hook):
            msg = f"on_step is a function of a delivery and a step; {name_of(hook)} takes others: call it here?"
            raise TypeError(msg)
    return hooks


def _takes_two(hook: Callable[..., object]) -> bool:
    try:
        inspect.signature(hook).bind(None, None)
    except TypeError:
        return False
    except ValueError:  # a builtin that does not tell
        return True
    return True


def name_of(hook: object) -> str:
    """The name of a function, or of the class of an object: its repr could show anything."""
    return getattr(hook, "__qualname__", type(hook).__name__)


def _why(last: Said | Outcome) -> tuple[object, ...]:
    return last.stage, last.reply and last.reply.code, last.reply and last.reply.enhanced
