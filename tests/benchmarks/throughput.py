"""How many messages go out in a second, against `aiosmtplib.send` for each; and how that grows with connections."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import ssl
import statistics
import time
from typing import TYPE_CHECKING, Any

import aiosmtplib
import trustme

from smtpretry import RetryingSMTP

from .harness import Cost, Table, letter, race, ratio
from .sink import HOST, sink

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

CASES = {"in the clear": 2.0, "STARTTLS and AUTH": 5.0}  # how many times faster it is to be
DELAY = 0.02  # seconds before each reply
ROUND_TRIPS = {1: 1.9, 50: 20.0}  # recipients, and how many times faster it is to be over such a network
CONNECTIONS = (1, 2, 4, 8, 16)
SHARE = 0.9  # of N times one connection's rate
BARE, SMTPRETRY = "aiosmtplib.SMTP", "smtpretry"
USUAL = "aiosmtplib.send for each"
LEAN = "aiosmtplib.send, one TLS context"
AT_ONCE = 8  # messages, where there is no network
OURS = f"RetryingSMTP, {AT_ONCE} connections"


def eight(send: Callable[[], Awaitable[object]]) -> Callable[[], Awaitable[object]]:
    return lambda: asyncio.gather(*[send() for _ in range(AT_ONCE)])


async def at_once(port: int, authority: trustme.CA | None, *, rounds: int) -> dict[str, list[float]]:
    """The seconds that eight messages take, which are sent at once."""
    where: dict[str, Any] = {"hostname": HOST, "port": port}
    given, made, login = {}, {}, {}
    message = letter("ann@example.com")
    with contextlib.ExitStack() as stack:
        if authority:
            login = {"username": "app", "password": "secret"}
            given = {"tls_context": ssl.create_default_context()}
            authority.configure_trust(given["tls_context"])
            made = {"cert_bundle": stack.enter_context(authority.cert_pem.tempfile())}
        contenders = {USUAL: lambda: aiosmtplib.send(message, **where, **made, **login)}
        if authority:
            contenders[LEAN] = lambda: aiosmtplib.send(message, **where, **given, **login)
        async with (
            aiosmtplib.SMTP(**where, **given, **login) as client,
            RetryingSMTP(aiosmtplib.SMTP(**where, **given), **login) as one,
            RetryingSMTP(lambda: aiosmtplib.SMTP(**where, **given), max_connections=AT_ONCE, **login) as smtp,
        ):
            contenders["one aiosmtplib.SMTP"] = lambda: client.send_message(message)
            contenders["RetryingSMTP, one connection"] = lambda: one.send_message(message)
            contenders[OURS] = lambda: smtp.send_message(message)
            costs = await race({name: eight(send) for name, send in contenders.items()}, rounds=rounds, block=1)
    return {name: [cost.wall for cost in each] for name, each in costs.items()}


def against_the_usual(*, rounds: int) -> Table:
    table = Table(
        f"Messages a second, {AT_ONCE} at once",
        "1 KB to one recipient, over loopback. `aiosmtplib.send` connects for each message, looks its own host name up for "
        "each, and makes a TLS context each time that it needs one, where none is given. Ratios are medians of rounds in which all take turns, ± their standard error.",
        ("connection", "sent with", "messages/s", "ratio", "±"),
    )
    for case, aim in CASES.items():
        authority = trustme.CA() if case == "STARTTLS and AUTH" else None
        with sink(authority=authority) as port:
            times = asyncio.run(at_once(port, authority, rounds=rounds))
        for name, mine in times.items():
            table.rows.append((case, name, AT_ONCE / statistics.median(mine), *ratio(times[USUAL], mine)))
        figure, _ = ratio(times[USUAL], times[OURS])
        table.targets[f"{case}: {OURS} at least {aim:g} times as fast as {USUAL} ({figure:.2f})"] = figure >= aim
    return table


async def rate(send: Callable[[], Awaitable[object]], tasks: int, messages: int) -> float:
    """Messages a second with so many tasks that each send one after the other, from when each has sent one."""

    async def work(number: int) -> None:
        for _ in range(number):
            await send()

    await asyncio.gather(*[work(1) for _ in range(tasks)])
    began = time.perf_counter()
    await asyncio.gather(*[work(messages) for _ in range(tasks)])
    return tasks * messages / (time.perf_counter() - began)


async def over_a_network(table: Table, port: int, *, messages: int, most: int) -> None:
    message = letter("ann@example.com")
    where: dict[str, Any] = {"hostname": HOST, "port": port, "local_hostname": "client.example"}
    alone = 0.0
    for number in (number for number in CONNECTIONS if number <= most):
        async with RetryingSMTP(lambda: aiosmtplib.SMTP(**where), max_connections=number) as smtp:
            ours = await rate(functools.partial(smtp.send_message, message), number, messages)
        usual = await rate(functools.partial(aiosmtplib.send, message, **where), number, messages)
        alone = alone or ours
        table.rows.append((number, ours, ours / alone, usual, usual / alone))
        if number > 1:
            what = f"{number} connections: at least {SHARE:g} x {number} times the rate of one ({ours / alone:.2f})"
            table.targets[what] = ours >= SHARE * number * alone


def with_connections(*, quick: bool) -> Table:
    table = Table(
        "Messages a second over a network, with N connections",
        f"1 KB to one recipient, in the clear; the server answers after {DELAY * 1000:g} ms. N tasks send one message after "
        "the other through one RetryingSMTP with `max_connections=N`, open before the clock starts; beside it, N tasks with "
        "`aiosmtplib.send` for each message.",
        ("N", "smtpretry: messages/s", "x one connection", "aiosmtplib.send: messages/s", "x one connection"),
    )
    with sink(delay=DELAY) as port:
        asyncio.run(over_a_network(table, port, messages=4 if quick else 40, most=4 if quick else max(CONNECTIONS)))
    return table


async def one_at_a_time(port: int, recipients: int, *, rounds: int) -> dict[str, list[Cost]]:
    message = letter(*(f"user{number}@example.com" for number in range(recipients)))
    where: dict[str, Any] = {"hostname": HOST, "port": port, "local_hostname": "client.example"}
    async with aiosmtplib.SMTP(**where) as bare, RetryingSMTP(aiosmtplib.SMTP(**where)) as smtp:
        contenders = {BARE: lambda: bare.send_message(message), SMTPRETRY: lambda: smtp.send_message(message)}
        return await race(contenders, rounds=rounds, block=1)


def over_one_connection(*, rounds: int) -> Table:
    table = Table(
        "Messages a second over a network, over one connection",
        f"1 KB, in the clear, one after the other; the server answers after {DELAY * 1000:g} ms, and offers PIPELINING.",
        ("recipients", "sent with", "messages/s", "ratio", "±"),
    )
    for recipients, aim in ROUND_TRIPS.items():
        with sink(delay=DELAY) as port:
            costs = asyncio.run(one_at_a_time(port, recipients, rounds=rounds))
        times = {name: [cost.wall for cost in each] for name, each in costs.items()}
        for name, mine in times.items():
            table.rows.append((recipients, name, 1 / statistics.median(mine), *ratio(times[BARE], mine)))
        figure, _ = ratio(times[BARE], times[SMTPRETRY])
        table.targets[
            f"over one connection, recipients: {recipients}: at least {aim:g} times as fast ({figure:.2f})"
        ] = figure >= aim
    return table


def run(*, quick: bool) -> list[Table]:
    return [
        against_the_usual(rounds=4 if quick else 100),
        with_connections(quick=quick),
        over_one_connection(rounds=4 if quick else 20),
    ]
