"""What a send costs where nothing goes wrong, beside the bare client's own."""

from __future__ import annotations

import asyncio
import contextlib
import statistics
import sys
from collections import Counter
from typing import TYPE_CHECKING, Any

import aiosmtplib

from smtpretry import RetryingSMTP

from .harness import Table, in_a_process, letter, race, ratio
from .sink import HOST, sink

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from email.message import EmailMessage
    from types import FrameType

CASES = {  # recipients, bytes, sends in a block, and the share of the bare client's CPU time that it may take
    "1 KB, one recipient": (1, 1024, 32, 0.6),
    "100 KB, one recipient": (1, 100 * 1024, 8, 0.3),
    "1 KB, 50 recipients": (50, 1024, 4, 0.3),
}
BARE = "aiosmtplib.SMTP"
Contenders = dict[str, "Callable[[], Awaitable[Any]]"]


def client(port: int) -> aiosmtplib.SMTP:
    return aiosmtplib.SMTP(hostname=HOST, port=port, local_hostname="client.example")


@contextlib.asynccontextmanager
async def clients(port: int, message: EmailMessage) -> AsyncIterator[Contenders]:
    """The same message, sent over open connections: by aiosmtplib and by smtpretry."""
    async with (
        client(port) as bare,
        client(port) as again,
        RetryingSMTP(client(port)) as smtp,
        RetryingSMTP(client(port), on_step=lambda *_: None) as watched,
    ):
        yield {
            BARE: lambda: bare.send_message(message),
            "the same, another one": lambda: again.send_message(message),
            "smtpretry": lambda: smtp.send_message(message),
            "smtpretry, with a hook": lambda: watched.send_message(message),
        }


@contextlib.asynccontextmanager
async def all_clients(port: int, message: EmailMessage) -> AsyncIterator[Contenders]:
    """And by the wrappers around aiosmtplib."""
    import stamina  # noqa: PLC0415 - the other process stays small
    from reliability import retrying  # noqa: PLC0415

    async with clients(port, message) as sends, client(port) as inside, client(port) as stamped:

        async def with_stamina() -> None:
            async for attempt in stamina.retry_context(on=aiosmtplib.SMTPException):
                with attempt:
                    await stamped.send_message(message)

        yield sends | {
            "tenacity around it": lambda: retrying()(inside.send_message, message),
            "stamina around it": with_stamina,
        }


async def calls(send: Callable[[], Awaitable[Any]]) -> Counter[str]:
    """The calls of Python functions in one send, in all and into what retries. A resumed coroutine counts again."""
    seen: Counter[str] = Counter()

    def note(frame: FrameType, event: str, _: object) -> None:
        if event == "call":
            name = frame.f_code.co_filename.replace("\\", "/")
            seen["all"] += 1
            seen["retrying"] += "/tenacity/" in name or "/stamina/" in name or name.endswith("/smtpretry/rules.py")

    await send()
    sys.setprofile(note)
    try:
        await send()
    finally:
        sys.setprofile(None)
    return seen


async def measure(port: int, contenders: Callable[..., Any], where: str, rounds: int) -> tuple[Table, Table]:
    times = Table(
        f"Overhead of a send that succeeds at once, in {where}",
        "`send_message` over an open connection, in the clear over loopback; each contender has a connection of its own. "
        f"Ratios are medians over {rounds} rounds in which all take turns, ± their standard error; the second bare client "
        "shows how far to believe them. How often Python looks for garbage, which costs the bare client more, "
        "depends on what else the program holds.",
        ("message", "sent by", "CPU µs", "CPU ratio", "±", "wall µs", "wall ratio", "±"),
    )
    count = Table(
        "What it calls",
        "Calls of Python functions, and resumptions of coroutines, in one such send: the same in every run, on any machine.",
        ("message", "sent by", "calls", "ratio", "calls into tenacity, stamina or the rules"),
    )
    for case, (recipients, size, block, limit) in CASES.items():
        message = letter(*(f"user{number}@example.com" for number in range(recipients)), size=size)
        async with contenders(port, message) as sends:
            costs = await race(sends, rounds=rounds, block=block)
            called = {name: await calls(send) for name, send in sends.items()}
        for name, mine in costs.items():
            cpu, wall = (
                ratio([cost[which] for cost in mine], [cost[which] for cost in costs[BARE]]) for which in (0, 1)
            )
            middle = [statistics.median(cost[which] for cost in mine) * 1e6 for which in (0, 1)]
            times.rows.append((case, name, middle[0], *cpu, middle[1], *wall))
            figures = called[name]
            count.rows.append((case, name, figures["all"], figures["all"] / called[BARE]["all"], figures["retrying"]))
            if name == "smtpretry":
                what = f"{case}: at most {limit:g} of the bare client's CPU time ({cpu[0]:.3f})"
                if contenders is clients:
                    times.targets[what] = cpu[0] <= limit
                built = figures["retrying"]
                count.targets[f"{case}: nothing of the retry machinery is touched ({built} calls)"] = built == 0
    return times, count


def run(*, quick: bool) -> list[Table]:
    rounds = 4 if quick else 100
    with sink() as port:
        small, _ = in_a_process(_measured, port, clients, "a program that imports nothing else", rounds)
        large, calls = in_a_process(_measured, port, all_clients, "a larger one", rounds)
    return [small, large, calls]


def _measured(port: int, contenders: Callable[..., Any], where: str, rounds: int) -> tuple[Table, Table]:
    return asyncio.run(measure(port, contenders, where, rounds))
