"""`retry`: the policy around any send call that raises the errors of aiosmtplib, smtplib or what wraps them."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, overload

from . import log
from .errors import NOT_CONNECTED, read
from .observer import name_of
from .policy import RetryPolicy
from .replies.reply import NO_REPLY, Reply
from .replies.rule import WAITING, Action
from .replies.stage import Stage

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Iterator

P = ParamSpec("P")
T = TypeVar("T")

_CONNECT = "nobody has connected again: connect within the function, or use RetryingSMTP"
_ABLE = frozenset({*WAITING, Action.FAIL})


@overload
def retry(function: Callable[P, T], /) -> Callable[P, T]: ...
@overload
def retry(*, policy: RetryPolicy = ...) -> Callable[[Callable[P, T]], Callable[P, T]]: ...
def retry(function: Callable[P, T] | None = None, /, *, policy: RetryPolicy = RetryPolicy()) -> Any:  # noqa: B008
    """Call a function again if it raises an SMTP error that may pass.

    ``@smtpretry.retry`` or ``@smtpretry.retry(policy=...)``, around a coroutine function or a plain one; a plain one
    waits with `time.sleep`. The function has to connect by itself: a connection that was made outside, and lost, stays
    lost. The error is looked at, and the errors that it was raised from (`__cause__`, `__context__`). `retry` can call
    again and give up. It cannot log in, and it does not know which of several recipients were accepted; `RetryingSMTP`
    does both. If a connection was lost and the error does not tell when, the server may have the message: the policy's
    `on_uncertain` decides. An OSError counts if smtplib raised it while connecting.

    Args:
        function: the function to wrap.
        policy: the rules, the backoff and the limits.

    Raises:
        TypeError: `function` is no function, a generator or a class; or a plain one that returns a coroutine or a task.
        Whatever the function raises, after the last call; if there were several, a note tells how many.
    """
    if not isinstance(policy, RetryPolicy):
        msg = f"policy is a RetryPolicy, such as RetryPolicy() or RetryPolicy.interactive(), not {policy!r}"
        raise TypeError(msg)
    if function is None:
        return functools.partial(retry, policy=policy)
    if isinstance(function, RetryPolicy):
        msg = "name the policy: @smtpretry.retry(policy=...)"
        raise TypeError(msg)
    if isinstance(function, (staticmethod, classmethod)):
        return type(function)(retry(policy=policy)(function.__func__))
    if not callable(function) or isinstance(function, type) or _generates(function):
        msg = f"retry wraps a function, def or async def, not {function!r}"
        raise TypeError(msg)
    return _asynchronous(function, policy) if _is_asynchronous(function) else _plain(function, policy)


def _asynchronous(function: Callable[P, Any], policy: RetryPolicy) -> Callable[P, Any]:
    @functools.wraps(function)
    async def call(*args: P.args, **kwargs: P.kwargs) -> Any:  # noqa: ANN401 - the function's
        calls = _Calls(policy, name_of(function))
        while True:
            try:
                return await function(*args, **kwargs)
            except Exception as error:
                wait = calls.wait_after(error)
                if wait is None:
                    raise
            with calls.waiting(wait):
                await (policy.sleep or asyncio.sleep)(wait)

    return call


def _plain(function: Callable[P, T], policy: RetryPolicy) -> Callable[P, T]:
    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        calls = _Calls(policy, name_of(function))
        while True:
            try:
                result = function(*args, **kwargs)
            except Exception as error:
                wait = calls.wait_after(error)
                if wait is None:
                    raise
            else:
                return _no_awaitable(result)
            with calls.waiting(wait):
                if policy.sleep is None:
                    time.sleep(wait)
                else:
                    _run(policy.sleep, wait)

    return call


def _run(sleep: Callable[[float], Awaitable[None]], seconds: float) -> None:
    """Wait, in a loop of its own: where this thread runs one, in another thread."""

    async def wait() -> None:
        await sleep(seconds)

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        asyncio.run(wait())
    else:
        with ThreadPoolExecutor(1) as thread:
            thread.submit(asyncio.run, wait()).result()


def _is_asynchronous(function: object) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(getattr(function, "__call__", None))  # noqa: B004


def _generates(function: object) -> bool:
    return inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function)


def _no_awaitable(result: T) -> T:
    """What a plain function returned, which is done then."""
    if inspect.iscoroutine(result):
        result.close()
    elif isinstance(result, asyncio.Future):
        result.cancel()
    else:
        return result
    kind = "coroutine" if inspect.iscoroutine(result) else "task"
    msg = f"the function returned a {kind}, which nobody has awaited yet: make it an async def, and await there"
    raise TypeError(msg)


class _Calls:
    """The calls that were made so far of one function."""

    def __init__(self, policy: RetryPolicy, function: str) -> None:
        self._policy, self._function = policy, function
        self._began, self._made = policy.clock(), 0
        self._last = ""  # what was said at the last one

    def wait_after(self, error: Exception) -> float | None:
        """Seconds until the next call; None where there is none, and then the error is told how many there were."""
        self._made += 1
        elapsed = self._policy.clock() - self._began
        said = read(error)
        wait = _wait(self._policy, error, said, self._made, elapsed)
        self._last = "; ".join(f"{stage.value}: {reply}" for stage, reply in said)
        if wait is None and self._made > 1:
            cure = f"; {_CONNECT}" if str(error) == NOT_CONNECTED else ""
            error.add_note(f"smtpretry: {self._made} attempts in {elapsed:.0f} s{cure}")
        return wait

    @contextlib.contextmanager
    def waiting(self, seconds: float) -> Iterator[None]:
        """Tell that it waits, and tell what interrupts the wait why it did."""
        log.calls_again(self._function, self._last, wait=seconds, until=self._policy.clock() + seconds)
        try:
            yield
        except BaseException as error:
            calls = f"{self._made} attempt{'s' if self._made > 1 else ''}"
            error.add_note(f"smtpretry: {calls}, and another one would have come; last: {self._last}")
            raise


def _wait(
    policy: RetryPolicy, error: Exception, said: Iterable[tuple[Stage, Reply]], attempt: int, elapsed: float
) -> float | None:
    """Seconds until the next call; None where there is none. One transient refusal among several is worth another."""
    waits = list[float]()
    for stage, reply in said:
        if stage is Stage.END_OF_DATA and reply.code == NO_REPLY and policy.on_uncertain == "raise":
            return None
        decision = policy.decide(reply, stage, able=_ABLE, attempt=attempt, elapsed=elapsed, error=error)
        if decision.action is not Action.FAIL:
            waits.append(decision.wait or policy.backoff(attempt=attempt, elapsed=elapsed, error=error))
    if not waits or policy.gives_up(attempt=attempt, elapsed=elapsed, wait=max(waits)):
        return None
    return max(waits)
