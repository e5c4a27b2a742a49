"""`retry`: the policy around any send call that raises the errors of aiosmtplib, smtplib or what wraps them."""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import Callable, Coroutine
from typing import Any, ParamSpec, TypeVar, overload

from .errors import read
from .policy import RetryPolicy
from .replies.reply import NO_REPLY
from .replies.rule import Action
from .replies.stage import Stage

P = ParamSpec("P")
T = TypeVar("T")
Function = Callable[P, Coroutine[Any, Any, T]]

_ABLE = frozenset({Action.RETRY, Action.RECONNECT, Action.FAIL})


@overload
def retry(function: Function[P, T], /) -> Function[P, T]: ...
@overload
def retry(*, policy: RetryPolicy = ...) -> Callable[[Function[P, T]], Function[P, T]]: ...
def retry(function: Function[P, T] | None = None, /, *, policy: RetryPolicy = RetryPolicy()) -> Any:  # noqa: B008
    """Call a coroutine function again where the SMTP error that it raises says "not now".

    ``@smtpretry.retry`` or ``@smtpretry.retry(policy=...)``. The error itself is looked at, then what it was raised
    from (`__cause__`, `__context__`). It can call again and it can give up: it cannot log in, and it cannot know which
    of several recipients were accepted, as `RetryingSMTP` does. A connection that was lost at a moment that the error
    does not tell may have been lost after the message was taken: `on_uncertain` of the policy decides.

    Args:
        function: the coroutine function to wrap.
        policy: the rules, the backoff and the limits.

    Raises:
        TypeError: `function` is no coroutine function.
        Whatever the function raises, after the last call, with a note that tells how many calls were made.
    """
    if not isinstance(policy, RetryPolicy):
        msg = f"policy is a smtpretry.RetryPolicy, not {type(policy).__name__}"
        raise TypeError(msg)
    if function is None:
        return functools.partial(retry, policy=policy)
    if not inspect.iscoroutinefunction(function):
        msg = f"retry wraps a coroutine function (async def), not {function!r}"
        raise TypeError(msg)

    @functools.wraps(function)
    async def call(*args: P.args, **kwargs: P.kwargs) -> T:
        began, attempt = policy.clock(), 1
        while True:
            try:
                return await function(*args, **kwargs)
            except Exception as error:
                elapsed = policy.clock() - began
                wait = _wait(policy, error, attempt, elapsed)
                if wait is None:
                    if attempt > 1:
                        error.add_note(f"smtpretry: {attempt} attempts in {elapsed:.0f} s")
                    raise
            await (policy.sleep or asyncio.sleep)(wait)
            attempt += 1

    return call


def _wait(policy: RetryPolicy, error: Exception, attempt: int, elapsed: float) -> float | None:
    """Seconds until the next call; None where there is none. One transient refusal among several is worth another."""
    waits = list[float]()
    for stage, reply in read(error):
        if stage is Stage.END_OF_DATA and reply.code == NO_REPLY and policy.on_uncertain == "raise":
            return None
        decision = policy.decide(reply, stage, able=_ABLE, attempt=attempt, elapsed=elapsed, error=error)
        if decision.action is not Action.FAIL:
            waits.append(decision.wait or policy.backoff(attempt=attempt, elapsed=elapsed, error=error))
    if not waits or policy.gives_up(attempt=attempt, elapsed=elapsed, wait=max(waits)):
        return None
    return max(waits)
