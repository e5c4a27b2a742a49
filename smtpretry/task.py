"""Which task sends: `current`."""

from __future__ import annotations

import asyncio
from typing import Any


def current() -> asyncio.Task[Any] | None:
    """The task that asks.

    Raises:
        RuntimeError: it runs in no event loop of asyncio.
    """
    try:
        return asyncio.current_task()
    except RuntimeError:
        msg = (
            "smtpretry sends in an event loop of asyncio, and none runs here: begin with asyncio.run(...), or use "
            "smtpretry.Blocking; under trio, call that in a thread (trio.to_thread.run_sync)"
        )
        raise RuntimeError(msg) from None
