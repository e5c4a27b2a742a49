r"""A scripted SMTP server, policies that do not wait, and a check of queues: for tests of what sends mail.

The server is a real one, on a real socket of 127.0.0.1, in the event loop of the test: no thread, no sleeping. It takes
every message, except where a script says otherwise::

    import asyncio, smtpretry
    from smtpretry.testing import ScriptedServer, no_wait

    def test_greylisting():
        async def scenario():
            policy = no_wait()
            async with ScriptedServer() as server, smtpretry.RetryingSMTP(server.client(), policy) as smtp:
                server.on("RCPT", "bob@*", "450 4.2.0 greylisted, retry in 30 seconds", times=1)
                await smtp.sendmail("app@example.com", ["bob@example.com"], "Subject: hello\r\n\r\n")
                assert len(server.received("bob@example.com")) == 1
                assert policy.waits == [30.0]

        asyncio.run(scenario())

Needs the extra ``testing``. Blocking tests have `ThreadedServer`, the same in a thread. pytest finds the fixtures
``smtp_server`` and ``no_wait`` by itself.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .engines import EngineReport, check_engine
    from .scripts import ReceivedMessage, Script
    from .server import ScriptedServer
    from .threaded import ThreadedServer
    from .waits import NoWait, no_wait

__all__ = [
    "EngineReport",
    "NoWait",
    "ReceivedMessage",
    "Script",
    "ScriptedServer",
    "ThreadedServer",
    "check_engine",
    "no_wait",
]

_MODULES = {
    "EngineReport": "engines",
    "NoWait": "waits",
    "ReceivedMessage": "scripts",
    "Script": "scripts",
    "ScriptedServer": "server",
    "ThreadedServer": "threaded",
    "check_engine": "engines",
    "no_wait": "waits",
}


def __getattr__(name: str) -> Any:  # noqa: ANN401 - whatever it is
    """Import it when it is first used: pytest loads this package in each run, for its plugin."""
    if name not in _MODULES:
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
