"""A delivery as it is in a queue: `Stored`."""

from __future__ import annotations

import copy
import json
import logging
import re
from dataclasses import dataclass
from typing import Final

from smtpretry import clock, log
from smtpretry.delivery import Delivery

from .engine import TakenIdError


@dataclass(frozen=True)
class Stored:
    """A delivery as it is in a queue: "waiting", "due", "working" or "ended"; and when it is due."""

    delivery: Delivery
    state: str
    due: float | None


def by_the_time_of_day(delivery: Delivery) -> Delivery:
    """The delivery as it is handed over: where this process's clock lags behind, a copy whose times do not."""
    if lag := clock.lag():
        delivery = copy.deepcopy(delivery)
        delivery.shift(lag)
    return delivery


_ENVELOPE: Final = ("id", "sender", "mail_options", "rcpt_options")


def envelope_of(delivery: Delivery) -> str:
    """What no attempt changes, without the message."""
    return json.dumps({name: getattr(delivery, name) for name in _ENVELOPE})


def delivery_of(envelope: str, state: str, message: bytes = b"") -> Delivery:
    """The delivery, as it is stored."""
    delivery = Delivery.from_dict(json.loads(envelope) | {"message": ""} | json.loads(state))
    delivery.message = message
    return delivery


def check_is_same(delivery: Delivery, envelope: str, state: str) -> None:
    """Refuse an id that another message has, for whoever sends it again under its id has the same recipients.

    Raises:
        TakenIdError: this message would never be sent.
    """
    there = delivery_of(envelope, state)
    if (there.sender, there.outcomes.keys()) == (delivery.sender, delivery.outcomes.keys()):
        log.say(logging.INFO, "smtp queue has the delivery already (delivery %s)", delivery.id, delivery_id=delivery.id)
        return
    has, new = (f"from {one.sender} to {', '.join(one.outcomes)}" for one in (there, delivery))
    msg = f"the id {delivery.id!r} is taken by a message {has}: name the one {new} otherwise"
    raise TakenIdError(msg)


def like(pattern: str) -> str:
    """A pattern with `*`, as SQL's LIKE with "!" as its escape takes it."""
    return re.sub("[!%_]", r"!\g<0>", pattern).replace("*", "%")


def due_now(envelope: str, state: str) -> str:
    """The state of a delivery of which everybody pending may be tried now."""
    delivery = delivery_of(envelope, state)
    for who in delivery.pending:
        delivery.outcomes[who].next_at = 0.0
    return json.dumps(delivery.state())
