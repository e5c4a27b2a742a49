"""Retries for aiosmtplib: it reads each SMTP reply, and does what the reply asks for.

Wrap your client in `RetryingSMTP`, or call `send` in place of `aiosmtplib.send`, or put `retry` around any other
function that sends. A `RetryPolicy` decides what each `Reply` means. A `Delivery` tells what happened to each
recipient.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from .client import RetryingSMTP
from .delivery import Delivery
from .envelope import prepare
from .errors import ClientClosed, NotOurs, QueueSilent, UncertainDelivery, deliveries_of, delivery_of
from .events import BrokenOff, Closed, Ended, Event, Hook, Opened, Paused, Resumed
from .oneshot import send
from .outcome import Attempt, Outcome, Status, Step
from .policy import Decision, RetryPolicy
from .queues.engine import Engine
from .replies.reply import NO_REPLY, Reply
from .replies.rule import Action, Rule
from .replies.rules import DEFAULT_RULES
from .replies.stage import Scope, Stage
from .stats import Stats
from .typing import SupportsSend

if TYPE_CHECKING:
    from .blocking import Blocking
    from .decorator import retry
    from .failover import Failover
else:

    def __getattr__(name: str) -> object:
        """Import what not every program uses when it is first asked for (PEP 562)."""
        if name not in _WHEN_USED:
            msg = f"module {__name__!r} has no attribute {name!r}"
            raise AttributeError(msg)
        globals()[name] = found = getattr(import_module(_WHEN_USED[name], __name__), name)
        return found

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})


_WHEN_USED = {"Blocking": ".blocking", "Failover": ".failover", "retry": ".decorator"}

__version__ = "0.2.0"

__all__ = [
    "DEFAULT_RULES",
    "NO_REPLY",
    "Action",
    "Attempt",
    "Blocking",
    "BrokenOff",
    "ClientClosed",
    "Closed",
    "Decision",
    "Delivery",
    "Ended",
    "Engine",
    "Event",
    "Failover",
    "Hook",
    "NotOurs",
    "Opened",
    "Outcome",
    "Paused",
    "QueueSilent",
    "Reply",
    "Resumed",
    "RetryPolicy",
    "RetryingSMTP",
    "Rule",
    "Scope",
    "Stage",
    "Stats",
    "Status",
    "Step",
    "SupportsSend",
    "UncertainDelivery",
    "deliveries_of",
    "delivery_of",
    "prepare",
    "retry",
    "send",
]
