"""How a struggling server is treated, and how long a mail then takes: in virtual time, against what others do.

The mail servers' schedules are simulated, from what their documentation or source says they do by default:

    Postfix     the age of the message, at least 300 s and at most 4000 s, and then the next of the queue runs, which come
                every 300 s (minimal_backoff_time, maximal_backoff_time, queue_run_delay); over all phases of these
    Exim        15 minutes for two hours, then an hour that grows by 1.5 (its default retry rule, F,2h,15m; G,16h,1h,1.5),
                with a queue runner that is always there in time
    Haraka      2^(n+5) s after the nth failure
    OpenSMTPD   400 n² s after the message came (scheduler_ramqueue.c, BACKOFF_TRANSFER)
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
import statistics
from itertools import accumulate, chain, count, repeat
from typing import TYPE_CHECKING, Any, NamedTuple

import aiosmtplib
import stamina
import tenacity
import virtual
from reliability import retrying

from smtpretry import RetryingSMTP, RetryPolicy
from smtpretry.testing import ScriptedServer

from .harness import Table, letter

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
    from email.message import EmailMessage

    Send = Callable[[EmailMessage], Awaitable[Any]]

MINUTE = 60.0
BUSY = "421 4.3.2 Service not available, closing connection"
WINDOWS = (60, 300, 900)  # seconds that a greylisting server refuses for
EVERY_WINDOW = range(60, 901, 10)
LATE = 0.05  # of the window, where the server names it
PHASES = 60  # of Postfix's queue runs
OURS, HINTED = "smtpretry", "smtpretry, told the delay"
RECIPE, PATIENT, STAMINA = "tenacity, 1 s and doubling", "tenacity, 60 s and doubling", "stamina"


@contextlib.asynccontextmanager
async def way(name: str, server: ScriptedServer) -> AsyncIterator[Send]:
    """How it is sent: a function that takes a message object."""
    where: dict[str, Any] = {"hostname": server.hostname, "port": server.port, "local_hostname": "client.example"}
    if name in (OURS, HINTED):
        async with RetryingSMTP(server.client(), RetryPolicy(clock=virtual.clock)) as smtp:
            yield smtp.send_message
    elif name == STAMINA:
        stamina.instrumentation.set_on_retry_hooks([])  # they log
        yield lambda message: stamina.retry(on=aiosmtplib.SMTPException)(aiosmtplib.send)(message, **where)
    else:
        waits = {} if name == PATIENT else {"wait": tenacity.wait_exponential(multiplier=1, max=60)}
        yield lambda message: retrying(**waits)(aiosmtplib.send, message, **where)


async def a_minute_of_421(name: str, many: int) -> tuple[int, int, list[float]]:
    """Return the connections while it refused, the commands in all, and how long after the minute each mail was in."""
    loop = asyncio.get_running_loop()
    refused, late = 0, list[float]()
    async with ScriptedServer() as server:

        def recover() -> None:
            nonlocal refused
            refused = server.connections
            server.clear()

        async def one(number: int) -> None:
            with contextlib.suppress(aiosmtplib.SMTPException):
                await send(letter(f"user{number}@example.com"))
                late.append(loop.time() - MINUTE)

        server.on("CONNECT", BUSY)
        loop.call_later(MINUTE, recover)
        async with way(name, server) as send:
            await asyncio.gather(*[one(number) for number in range(many)])
        await asyncio.sleep(max(0, MINUTE + 1 - loop.time()))
        return refused, len(server.commands), late


def when_it_is_busy(*, many: int) -> Table:
    table = Table(
        f"{many} sends to a server that says 421",
        f"Each connection is closed with 421 for a minute; {many} sends begin at once. What the server saw, and how long "
        "after the minute the mails were in, in seconds of virtual time. tenacity tries five times, stamina by its defaults.",
        ("sent by", "connections refused", "commands in all", "mails in", "half of them after s", "all after s"),
    )
    random.seed(0)  # tenacity's jitter draws from it
    found = {name: virtual.run(a_minute_of_421(name, many)) for name in (OURS, PATIENT, RECIPE, STAMINA)}
    for name, (refused, commands, ends) in found.items():
        late = (statistics.median(ends), max(ends)) if ends else (None, None)
        table.rows.append((name, refused, commands, len(ends), *late))
    refused, commands, ends = found.pop(OURS)
    table.targets[f"all mails in ({len(ends)})"] = len(ends) == many
    table.targets[f"fewer wasted connections than any other ({refused})"] = refused < min(
        one[0] for one in found.values()
    )
    others = min(one[1] for one in found.values() if len(one[2]) == many)
    table.targets[f"fewer commands than any other that gets all of them in ({commands:,})"] = commands < others
    return table


class Course(NamedTuple):
    """The seconds at which a mail was offered, and whether it was taken the last time."""

    attempts: list[float]
    taken: bool


def until(attempts: Iterable[float], window: float) -> Course:
    """What a schedule makes of a server that greylists for so long."""
    course = []
    for attempt in attempts:
        course.append(attempt)
        if attempt >= window:
            break
    return Course(course, taken=True)


def postfix(phase: float) -> Iterator[float]:
    now = 0.0
    while True:
        yield now
        due = now + min(max(now, 300), 4000)
        now = phase + math.ceil((due - phase) / 300) * 300


SCHEDULES: dict[str, Callable[[float], Iterable[float]]] = {  # given a number from 0 to 1, the seconds of the attempts
    "Postfix": lambda phase: postfix(phase * 300),
    "Exim": lambda _: accumulate(chain(repeat(900.0, 8), (3600 * 1.5**n for n in count())), initial=0.0),
    "Haraka": lambda _: accumulate((2.0 ** (n + 5) for n in count(1)), initial=0.0),
    "OpenSMTPD": lambda _: (400.0 * n * n for n in count()),
}


class Clocked(list[str]):
    """The commands of a server, and when it saw a RCPT."""

    def __init__(self) -> None:
        super().__init__()
        self.offers: list[float] = []

    def append(self, command: str) -> None:
        super().append(command)
        if command.startswith("RCPT"):
            self.offers.append(asyncio.get_running_loop().time())


async def greylisted(name: str, window: float) -> Course:
    """Send one mail to a server that greylists for so many seconds, and names them where `name` is to be told."""
    async with ScriptedServer() as server:
        server.on(
            "RCPT", f"450 4.2.0 Greylisted for {window:.0f} seconds" if name == HINTED else "450 4.2.0 Greylisted"
        )
        server.commands = commands = Clocked()
        asyncio.get_running_loop().call_later(window, server.clear)
        taken = False
        async with way(name, server) as send:
            with contextlib.suppress(aiosmtplib.SMTPException):
                await send(letter("ann@example.com"))
                taken = True
        return Course(commands.offers, taken)


def courses(name: str, window: float, draws: int) -> list[Course]:
    """What becomes of a mail, in all the ways that chance has."""
    if name in SCHEDULES:
        return [until(SCHEDULES[name](draw / PHASES), window) for draw in range(PHASES)]
    random.seed(0)
    return [virtual.run(greylisted(name, window)) for _ in range(draws if name == OURS else 1)]


WAYS = (HINTED, OURS, *SCHEDULES, PATIENT, RECIPE, STAMINA)


def when_it_greylists(*, draws: int) -> Table:
    table = Table(
        "Greylisting",
        "One mail. Attempts that were refused, and how many seconds after the window had opened it was in: the means, over "
        f"{PHASES} phases of Postfix's queue runs and {draws} draws of smtpretry's jitter. Postfix, Exim, Haraka and "
        "OpenSMTPD by their schedules, the others against a server in virtual time; waits without jitter can meet the "
        "window's very end, as Exim's and the patient tenacity's do.",
        ("sent by", *(f"{window} s: {what}" for window in WINDOWS for what in ("refused", "late s"))),
    )
    figures: dict[str, list[tuple[float, float | None]]] = {}
    for name in WAYS:
        figures[name] = []
        for window in WINDOWS:
            found = courses(name, window, draws)
            late = [course.attempts[-1] - window for course in found if course.taken]
            refused = statistics.mean(len(course.attempts) - course.taken for course in found)
            figures[name].append((refused, statistics.mean(late) if len(late) == len(found) else None))
        table.rows.append(
            (name, *(cell if cell is not None else "never in" for pair in figures[name] for cell in pair))
        )
    for n, window in enumerate(WINDOWS):
        refused, late = figures[HINTED][n]
        table.targets[
            f"{window} s, named by the server: one refused attempt, at most {LATE:.0%} late ({refused:.3g}, {late:.1f} s)"
        ] = refused == 1 and late is not None and late <= LATE * window
    return table


def over_all(attempts: list[list[float]]) -> tuple[float, float]:
    """Refused attempts, and seconds late, over every window: the means."""
    found = [(until(one, window), window) for one in attempts for window in EVERY_WINDOW]
    return (
        statistics.mean(len(course.attempts) - 1 for course, _ in found),
        statistics.mean(course.attempts[-1] - window for course, window in found),
    )


def fixed(wait: int) -> list[list[float]]:
    """When a policy with `wait=tenacity.wait_fixed(wait)` tries."""
    return [[float(at) for at in range(0, EVERY_WINDOW[-1] + wait + 1, wait)]]


def at_equal_delay(*, draws: int) -> Table:
    table = Table(
        "Greylisting, at equal delay",
        f"The same, the server naming nothing, over all windows from {EVERY_WINDOW[0]} to {EVERY_WINDOW[-1]} s; and the fewest "
        "refused attempts of smtpretry with one fixed `wait=` that is no later than the other's schedule. Nothing refuses "
        "fewer than one.",
        ("sent by", "refused", "late s", "smtpretry, no later: refused", "late s", "wait_fixed"),
    )
    mine = [(*over_all(fixed(wait)), wait) for wait in range(EVERY_WINDOW[0], EVERY_WINDOW[-1] + 1, 5)]
    ours = over_all([course.attempts for course in courses(OURS, 2 * EVERY_WINDOW[-1], draws)])
    table.rows.append((f"{OURS}, by default", *ours, None, None, None))
    for name in SCHEDULES:
        refused, late = over_all([course.attempts for course in courses(name, EVERY_WINDOW[-1], draws)])
        fewest, my_late, wait = min(one for one in mine if one[1] <= late)
        table.rows.append((name, refused, late, fewest, my_late, wait))
        what = f"no more than {name} ({fewest:.2f} against {refused:.2f})"
        table.targets[what] = fewest < refused or fewest == refused == 1
    return table


def run(*, quick: bool) -> list[Table]:
    draws = 2 if quick else 20
    return [when_it_is_busy(many=20 if quick else 500), when_it_greylists(draws=draws), at_equal_delay(draws=draws)]
