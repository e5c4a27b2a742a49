"""What a message, a recipient and a decision cost, and whether that grows with how many there are."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import math
import statistics
import timeit
import tracemalloc

import aiosmtplib

from smtpretry import DEFAULT_RULES, Action, Reply, RetryingSMTP, RetryPolicy, Rule, Stage

from .harness import SENDER, Table, race, ratio
from .memory import BARE, OURS, SIZE, waiting
from .sink import HOST, sink

WAITING = (100, 10_000, 100_000)
RECIPIENTS = (1, 100, 1_000)
RULES = (1, 2, 4, 8)  # times as many as the default ones
GROWTH = 1.25  # what a figure may grow by, where it is not to grow: it is measured, on a machine that does other things
REPLIES = {
    "busy": (Reply.parse("421 4.3.2 Service not available, closing connection"), Stage.MAIL),
    "greylisted": (Reply.parse("450 4.2.0 <bob@example.com>: Recipient address rejected: Greylisted"), Stage.RCPT),
    "matched by no row": (Reply.parse("451 4.3.0 Try again"), Stage.RCPT),
}


def with_waiting(sizes: tuple[int, ...]) -> Table:
    table = Table(
        "With the number of waiting sends",
        f"`send_message`, {SIZE:,} bytes each, one RetryingSMTP, a process for each number; beside it {BARE}. CPU time for "
        "each until it waits; of a send that succeeds while the others wait; and for each when all are cancelled.",
        ("sent by", "waiting", "CPU µs each", "bytes each", "CPU µs of another", "CPU µs to cancel"),
    )
    with sink() as port:
        found = {name: [waiting(name, port, number) for number in sizes] for name in (BARE, OURS)}
    for name, each in found.items():
        for number, one in zip(sizes, each, strict=True):
            table.rows.append((name, number, one.cpu * 1e6, one.memory, one.newcomer * 1e6, one.cancelling * 1e6))
    for what, field in {
        "CPU time": "cpu",
        "another send": "newcomer",
        "cancelling": "cancelling",
        "memory": "memory",
    }.items():
        base = -2 if what == "memory" else 0  # that of a hundred drowns in that of the process
        theirs, ours = (getattr(each[-1], field) / (getattr(each[base], field) or math.inf) for each in found.values())
        flat(table, f"{what} with {sizes[-1]:,} against {sizes[base]:,}", ours, theirs)
    return table


def flat(table: Table, what: str, growth: float, unavoidable: float = 1.0) -> None:
    """Where the asleep tasks of asyncio grow as well, for their timers and their garbage, that much is not our own."""
    aim = GROWTH * max(1.0, unavoidable)
    table.targets[f"{what}: at most {aim:.3g} times ({growth:.2f})"] = growth <= aim


class EnoughError(Exception):
    """Raised in place of a wait."""


async def enough(_: float) -> None:
    raise EnoughError


async def refused(smtp: RetryingSMTP, recipients: list[str], message: bytes) -> None:
    """One pass in which nobody is taken."""
    with contextlib.suppress(EnoughError):
        await smtp.sendmail(SENDER, recipients, message)


async def held(client: aiosmtplib.SMTP, recipients: list[str], message: bytes) -> int:
    """The bytes that Python has allocated for a send that waits for its second attempt."""
    waits = asyncio.Event()

    async def sleep(_: float) -> None:
        waits.set()
        await asyncio.Event().wait()

    async with RetryingSMTP(client, RetryPolicy(sleep=sleep)) as smtp:
        await smtp.sendmail(SENDER, "ann@example.com", message)
        gc.collect()
        tracemalloc.start()
        send = asyncio.ensure_future(smtp.sendmail(SENDER, recipients, message))
        await waits.wait()
        gc.collect()
        allocated, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        send.cancel()
        await asyncio.wait({send})
    return allocated


async def per_recipient(port: int, *, rounds: int) -> Table:
    table = Table(
        "With the number of recipients",
        f"`sendmail`, {SIZE:,} bytes, over an open connection. CPU time for each recipient of a message that is taken, "
        "beside the bare client's; of one that is greylisted for all of them, until it waits; and the bytes that Python "
        "has allocated while it does.",
        ("recipients", "CPU µs each", "aiosmtplib.SMTP", "ratio", "greylisted: CPU µs each", "bytes each"),
    )
    message = (
        b"Message-ID: <1@example.com>\r\nDate: Mon, 01 Jan 2024 00:00:00 +0000\r\n\r\n".ljust(SIZE - 2, b".") + b"\r\n"
    )

    def client() -> aiosmtplib.SMTP:
        return aiosmtplib.SMTP(hostname=HOST, port=port, local_hostname="client.example")

    for number in RECIPIENTS:
        taken, grey = ([f"{name}{n}@example.com" for n in range(number)] for name in ("user", "grey"))
        async with (
            client() as bare,
            RetryingSMTP(client()) as smtp,
            RetryingSMTP(client(), RetryPolicy(sleep=enough)) as impatient,
        ):
            costs = await race(
                {
                    "bare": functools.partial(bare.sendmail, SENDER, taken, message),
                    "ours": functools.partial(smtp.sendmail, SENDER, taken, message),
                    "grey": functools.partial(refused, impatient, grey, message),
                },
                rounds=rounds,
                block=max(1, 50 // number),
            )
        cpu = {name: statistics.median(cost.cpu for cost in each) / number * 1e6 for name, each in costs.items()}
        figure, _ = ratio([cost.cpu for cost in costs["ours"]], [cost.cpu for cost in costs["bare"]])
        each = await held(client(), grey, message) / number
        table.rows.append((number, cpu["ours"], cpu["bare"], figure, cpu["grey"], each))
    few, many = table.rows[-2:]
    for column, what in ((1, "CPU time"), (4, "CPU time where all are greylisted"), (5, "memory")):
        flat(table, f"{what} with {RECIPIENTS[-1]:,} against {RECIPIENTS[-2]:,}", many[column] / few[column])
    return table


def per_decision(*, calls: int) -> Table:
    table = Table(
        "Of a decision, with the number of rules",
        "`RetryPolicy.decide`, no I/O: with the default rules alone, and with rules of one's own in front that do not match.",
        ("reply", "rules", "CPU µs", "ns a rule"),
    )
    for name, (reply, stage) in REPLIES.items():
        found = []
        for times in RULES:
            own = tuple(
                Rule(code=range(400, 600), text=f"word {n} of my own", action=Action.FAIL)
                for n in range((times - 1) * len(DEFAULT_RULES))
            )
            policy = RetryPolicy((*own, *DEFAULT_RULES))
            found.append(min(timeit.repeat(lambda: policy.decide(reply, stage), number=calls, repeat=5)) / calls)  # noqa: B023
            table.rows.append((name, len(policy.rules), found[-1] * 1e6, found[-1] / len(policy.rules) * 1e9))
        first, last = found[1] - found[0], (found[-1] - found[0]) / (RULES[-1] - 1)
        flat(table, f"{name}: a rule more with {RULES[-1]} times as many against twice", last / first)
    return table


def run(*, quick: bool) -> list[Table]:
    with sink() as port:
        recipients = asyncio.run(per_recipient(port, rounds=2 if quick else 20))
    return [with_waiting((20, 200, 400) if quick else WAITING), recipients, per_decision(calls=10 if quick else 2_000)]
