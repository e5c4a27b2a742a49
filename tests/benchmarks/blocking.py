"""How many messages a second go out from blocking code, through `Blocking`, against the same client in async code."""

from __future__ import annotations

import asyncio
import functools
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import aiosmtplib

from smtpretry import Blocking, RetryingSMTP

from .harness import Table, letter, ratio
from .sink import HOST, sink

if TYPE_CHECKING:
    from collections.abc import Callable
    from email.message import EmailMessage

SHARE = 0.9  # of the rate of async code, where the server takes any time to answer
HANDED_OVER = 200  # microseconds: what a call may cost beside the send, which shows where the server takes none
CASES = ((1, 0.0), (1, 0.001), (8, 0.0), (8, 0.001), (8, 0.02))  # senders at a time, and seconds before each reply
ROUNDS, QUICK_ROUNDS = 15, 3
MESSAGES, QUICK_MESSAGES = 200, 40  # for each round


def in_async_code(make: Callable[[], aiosmtplib.SMTP], message: EmailMessage, senders: int, share: int) -> float:
    """The seconds that so many tasks take which send one message after the other, from when each has sent one."""

    async def race() -> float:
        async with RetryingSMTP(make, max_connections=senders) as smtp:

            async def work(number: int) -> None:
                for _ in range(number):
                    await smtp.send_message(message)

            await asyncio.gather(*[work(1) for _ in range(senders)])
            began = time.perf_counter()
            await asyncio.gather(*[work(share) for _ in range(senders)])
            return time.perf_counter() - began

    return asyncio.run(race())


def in_threads(make: Callable[[], aiosmtplib.SMTP], message: EmailMessage, senders: int, share: int) -> float:
    """The same with threads."""
    with Blocking(make, max_connections=senders) as smtp, ThreadPoolExecutor(senders) as threads:

        def work(number: int) -> None:
            for _ in range(number):
                smtp.send_message(message)

        list(threads.map(work, [1] * senders))
        began = time.perf_counter()
        list(threads.map(work, [share] * senders))
        return time.perf_counter() - began


def run(*, quick: bool) -> list[Table]:
    table = Table(
        "Messages a second from blocking code",
        "1 KB to one recipient, in the clear, over loopback. N threads that send one message after the other through one "
        "`Blocking`, against N tasks through one `RetryingSMTP`, both with N connections, open before the clock starts. "
        "They take turns; ratios are medians of the rounds, ± their standard error.",
        ("N", "ms before each reply", "async: messages/s", "Blocking: messages/s", "ratio", "±"),
    )
    message, messages = letter("ann@example.com"), QUICK_MESSAGES if quick else MESSAGES
    for senders, delay in CASES:
        with sink(delay=delay) as port:
            where: dict[str, Any] = {"hostname": HOST, "port": port, "local_hostname": "client.example"}
            make, share = functools.partial(aiosmtplib.SMTP, **where), messages // senders
            usual, ours = list[float](), list[float]()
            for _ in range(QUICK_ROUNDS if quick else ROUNDS):
                usual.append(in_async_code(make, message, senders, share))
                ours.append(in_threads(make, message, senders, share))
        rates = [share * senders / statistics.median(each) for each in (usual, ours)]
        figure, error = ratio(usual, ours)
        table.rows.append((senders, delay * 1000, *rates, figure, error))
        what = f"{senders} at a time, {delay * 1000:g} ms before each reply"
        if delay:
            table.targets[f"{what}: at least {SHARE:g} of async ({figure:.2f})"] = figure >= SHARE
        else:
            cost = 1e6 * (1 / rates[1] - 1 / rates[0])
            table.targets[f"{what}: at most {HANDED_OVER} µs for the hand-over ({cost:.0f})"] = cost <= HANDED_OVER
    return [table]
