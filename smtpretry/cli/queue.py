"""``queue``: what is in a durable queue, and what became of it."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

from smtpretry.queues.shelf import Shelf, opened

from . import UNREADABLE

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    from smtpretry.delivery import Delivery
    from smtpretry.queues.stored import Stored

NOT_THERE: Final = 1
"""The exit code where there is no such delivery, or nothing can be done about it any more."""

_LAST: Final = datetime.max.replace(tzinfo=UTC, microsecond=0).timestamp()  # `expires=timedelta.max` is later
_MOST: Final = 2**31 - 1
_STATES: Final = ("waiting", "due", "working", "ended")


def add_to(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the parser's."""
    queue = commands.add_parser(
        "queue",
        help="look into a durable queue",
        description="Look into a durable queue, and act on what waits in it. Messages are not shown unless asked for.",
        epilog="Exit codes: 0, 1 where there is no such delivery, 2 where the queue cannot be read.",
    )
    queue.add_argument("where", metavar="QUEUE", help="sqlite:mail.db, or postgresql://host/database")
    what = queue.add_subparsers(required=True, metavar="ACTION")
    listing = what.add_parser("list", help="the deliveries, those that are due first")
    listing.add_argument("--state", choices=_STATES, help="only those")
    listing.add_argument("--limit", type=_number, default=100, metavar="N", help="at most so many; 100")
    listing.add_argument("--to", metavar="PATTERN", help="only those to such an address, as '*@example.com'")
    listing.set_defaults(act=_list)
    show = what.add_parser("show", help="the story of one")
    show.add_argument("--message", action="store_true", help="with the message")
    show.set_defaults(act=_show)
    retry = what.add_parser("retry", help="have some that wait tried now, also where its server is left alone")
    retry.set_defaults(act=_retry)
    drop = what.add_parser("drop", help="take some that wait out of the queue, for good")
    drop.set_defaults(act=_drop)
    show.add_argument("id", metavar="ID", help="the name of the delivery")
    for one in (retry, drop):
        one.add_argument("ids", metavar="ID", nargs="+", help="the names of the deliveries")
    stats = what.add_parser("stats", help="how many there are, since when they are due, and what their servers said")
    stats.set_defaults(act=_stats)
    for one in (listing, show, retry, drop, stats):
        one.add_argument("--json", action="store_true", help="for machines")
    queue.set_defaults(run=_queue)


def _number(said: str) -> int:
    if said.isdecimal() and 0 < (number := int(said)) <= _MOST:
        return number
    msg = f"{said!r} is no number from 1 to {_MOST}"
    raise argparse.ArgumentTypeError(msg)


def _queue(options: argparse.Namespace) -> int:
    act: Callable[[Shelf, argparse.Namespace], Awaitable[int]] = options.act

    async def run() -> int:
        async with opened(options.where) as shelf:
            return await act(shelf, options)

    try:
        return asyncio.run(run())
    except BrokenPipeError:
        raise
    except (OSError, ValueError, ImportError) as error:
        print(str(error).strip(), file=sys.stderr)
        return UNREADABLE


async def _list(shelf: Shelf, options: argparse.Namespace) -> int:
    for one in await shelf.find(state=options.state, limit=options.limit, to=options.to):
        facts = _facts(one)
        print(json.dumps(facts) if options.json else "  ".join(_columns(facts)))
    return 0


async def _show(shelf: Shelf, options: argparse.Namespace) -> int:
    one = await shelf.get(options.id)
    if one is None:
        return _missing(options.id)
    if options.json:
        facts = _facts(one) | {"delivery": one.delivery.to_dict()}
        if not options.message:
            del facts["delivery"]["message"]
        print(json.dumps(facts))
        return 0
    print("\n".join(_story(one)))
    if options.message:
        print()
        print(one.delivery.message.decode(errors="replace") or "The message is gone: the delivery has ended.")
    return 0


async def _retry(shelf: Shelf, options: argparse.Namespace) -> int:
    return await _act(shelf.retry, options, "to be tried now")


async def _drop(shelf: Shelf, options: argparse.Namespace) -> int:
    return await _act(shelf.drop, options, "dropped")


async def _act(act: Callable[[str], Awaitable[bool]], options: argparse.Namespace, what: str) -> int:
    """Do it to each; the code of the worst."""
    code = 0
    for name in options.ids:
        if await act(name):
            print(json.dumps({"id": name, "done": what}) if options.json else f"{name}: {what}")
        else:
            code = _missing(name, "waits")
    return code


async def _stats(shelf: Shelf, options: argparse.Namespace) -> int:
    progress, servers = await shelf.progress(), await shelf.left_alone()
    counts = {state: getattr(progress, state) for state in (*_STATES, "late")}
    said = {name: f"{pause.stage.value}: {pause.reply}" if pause.stage else "" for name, pause in servers.items()}
    if options.json:
        print(json.dumps(counts | {"left_alone": said}))
        return 0
    print(progress)
    for name, pause in servers.items():
        print(f"{name} is left alone until {_iso(pause.until)}: {said[name]}")
    return 0


def _missing(name: str, what: str = "is in the queue") -> int:
    print(f"{name}: no delivery of that name {what}", file=sys.stderr)
    return NOT_THERE


def _facts(one: Stored) -> dict[str, Any]:
    delivery = one.delivery
    return {
        "id": delivery.id,
        "state": one.state,
        "sender": delivery.sender,
        "recipients": len(delivery.outcomes),
        "accepted": len(delivery.accepted),
        "refused": len(delivery.refused),
        "uncertain": len(delivery.uncertain),
        "pending": len(delivery.pending),
        "to": [*delivery.outcomes],
        "attempts": max((outcome.attempts for outcome in delivery.outcomes.values()), default=0),
        "next_at": None if one.due is None else _iso(one.due),
        "last": _last(delivery),
    }


def _columns(facts: dict[str, Any]) -> Iterator[str]:
    yield f"{facts['id']:<32}"
    yield f"{facts['state']:<7}"
    yield f"{facts['next_at'] or '-':<25}"
    yield f"{facts['accepted']}/{facts['recipients']} accepted"
    yield f"{facts['attempts']} tried"
    yield facts["last"] or "-"


def _last(delivery: Delivery) -> str | None:
    """What was said last to those who are pending, else to anybody."""
    steps = [step for attempt in delivery.attempts for step in attempt.steps]
    pending = [step for step in steps if not {*delivery.pending}.isdisjoint(step.recipients)]
    last = (pending or steps)[-1:]
    return str(last[0].reply).partition("\n")[0] if last else None


def _story(one: Stored) -> Iterator[str]:
    delivery = one.delivery
    yield f"{delivery.id}: {one.state}" + ("" if one.due is None else f", next try {_iso(one.due)}")
    yield f"    from {delivery.sender or '<>'}"
    for name, at in (("handed over", delivery.submitted_at), ("expires", delivery.expires_at)):
        if at is not None:
            yield f"    {name} {_iso(at)}"
    for who, outcome in delivery.outcomes.items():
        said = f": {outcome.reply}" if outcome.reply else ""
        yield f"    {who}: {outcome.status.value}, {outcome.attempts} tried{said}"
    for attempt in delivery.attempts:
        yield f"  {_iso(attempt.at)}"
        for step in attempt.steps:
            yield f"    {step} ({', '.join(step.recipients)})"
    yield f"  {delivery.story(time.time())}"


def _iso(at: float) -> str:
    return datetime.fromtimestamp(min(at, _LAST), UTC).isoformat(" ", "seconds") if at else "now"
