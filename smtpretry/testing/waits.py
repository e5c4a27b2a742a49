"""Policies whose waits take no time: `no_wait`."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, fields
from itertools import count

from smtpretry.policy import RetryPolicy


@dataclass(frozen=True, kw_only=True)
class NoWait(RetryPolicy):
    """A policy whose waits take no time; `waits` are the seconds that it would have waited, in order."""

    waits: list[float] = field(default_factory=list, repr=False, compare=False)


def no_wait(policy: RetryPolicy | None = None) -> NoWait:
    """Return a policy like the given one (default: `RetryPolicy()`) whose waits take no time, recorded in `waits`.

    Its clock stands still but for these waits. Where tasks wait at once, they go on in the order of their wake times.
    """
    policy = RetryPolicy() if policy is None else policy
    now, waits, numbers = policy.clock(), list[float](), count()
    asleep: set[tuple[float, int]] = set()

    async def sleep(seconds: float) -> None:
        nonlocal now
        waits.append(seconds)
        me = (now + max(seconds, 0.0), next(numbers))
        asleep.add(me)
        try:
            await asyncio.sleep(0)
            while min(asleep) != me:  # noqa: ASYNC110 - no event: it is to take no time, and one round of the loop each
                await asyncio.sleep(0)
            now = me[0]
        finally:
            asleep.remove(me)

    given = {one.name: getattr(policy, one.name) for one in fields(RetryPolicy)}
    return NoWait(**(given | {"sleep": sleep, "clock": lambda: now, "waits": waits}))
