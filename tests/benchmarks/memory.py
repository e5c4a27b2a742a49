"""How much memory a send holds while it waits: against the recipe, and against the bytes of the message."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import time
import tracemalloc
from typing import TYPE_CHECKING, Any, NamedTuple

import aiosmtplib
import stamina
import tenacity
from reliability import retrying

from smtpretry import RetryingSMTP, RetryPolicy

from .harness import SENDER, Table, in_a_process, letter, resident
from .sink import HOST, sink

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from email.message import EmailMessage

    Send = Callable[[EmailMessage], Awaitable[Any]]

SIZE, LARGE = 1024, 1024 * 1024  # bytes of a message
ALLOWED = 3 * 1024  # bytes more than those of the message
BATCH = 50  # sends that begin at once: as many connections, where each has its own
AN_HOUR = tenacity.wait_fixed(3600)
OURS = "smtpretry: send_message"
RECIPE = "tenacity around aiosmtplib.send"
BARE = "a task that holds the bytes, asleep"
LIGHT = (BARE, OURS, "smtpretry: sendmail")
WAYS = (*LIGHT, RECIPE, "stamina around aiosmtplib.send")


class Waiting(NamedTuple):
    """What a number of waiting sends cost.

    Attributes:
        cpu: seconds of CPU time for each, from its beginning until it waits.
        memory: bytes for each.
        message: the bytes of the message itself.
        newcomer: seconds of CPU time for a send that succeeds while all of these wait.
        cancelling: seconds of CPU time for each, when all are cancelled.
    """

    cpu: float
    memory: float
    message: float
    newcomer: float
    cancelling: float


@contextlib.asynccontextmanager
async def way(name: str, port: int) -> AsyncIterator[Send]:
    """How it is sent: a function that takes a message object, which nobody else holds."""
    where: dict[str, Any] = {"hostname": HOST, "port": port, "local_hostname": "client.example"}
    if name == BARE:
        lock = asyncio.Lock()

        async def hold(message: bytes, recipient: str) -> None:
            async with lock:
                await client.mail(SENDER)
                with contextlib.suppress(aiosmtplib.SMTPRecipientRefused):
                    await client.rcpt(recipient)
                await client.rset()
            if recipient.startswith("grey"):
                await asyncio.sleep(3600)
                await client.data(message)

        async with aiosmtplib.SMTP(**where) as client:
            yield lambda message: hold(message.as_bytes(), str(message["To"]))
    elif name.startswith("smtpretry"):
        async with RetryingSMTP(aiosmtplib.SMTP(**where), RetryPolicy(wait=AN_HOUR, give_up_after=None)) as smtp:
            if name == OURS:
                yield smtp.send_message
            else:
                yield lambda message: smtp.sendmail(SENDER, str(message["To"]), message.as_bytes())
    elif name == RECIPE:
        yield lambda message: retrying(wait=AN_HOUR)(aiosmtplib.send, message, **where)
    else:
        stamina.instrumentation.set_on_retry_hooks([])  # they log

        @stamina.retry(on=aiosmtplib.SMTPException, wait_initial=3600, wait_max=3600, wait_jitter=0, timeout=None)
        async def send(message: EmailMessage) -> None:
            await aiosmtplib.send(message, **where)

        yield send


class Begun(NamedTuple):
    """Sends that wait; for each, the seconds of CPU time until it did, and the bytes of its message."""

    tasks: list[asyncio.Task[Any]]
    cpu: float
    message: float


async def begin(send: Send, number: int, witness: aiosmtplib.SMTP) -> Begun:
    """Let so many more sends wait; the server tells the witness how many it has refused."""
    tasks: list[asyncio.Task[Any]] = []
    cpu = length = 0.0
    refused = int((await witness.noop()).message)
    while len(tasks) < number:
        batch = [letter(f"grey{n}@example.com", size=SIZE) for n in range(min(BATCH, number - len(tasks)))]
        length += sum(len(one.as_bytes()) for one in batch)
        began = time.process_time()
        tasks.extend([asyncio.ensure_future(send(batch.pop())) for _ in range(len(batch))])
        while int((await witness.noop()).message) < refused + len(tasks):  # noqa: ASYNC110 - it is in another process
            await asyncio.sleep(0.005)
        cpu += time.process_time() - began
    await asyncio.sleep(0.1)  # the last refusal is to arrive
    if ended := [task for task in tasks if task.done()]:
        msg = f"some sends do not wait, such as {ended[0]}"
        raise RuntimeError(msg)
    return Begun(tasks, cpu / number, length / number)


async def wait(name: str, port: int, number: int, *, traced: bool) -> Waiting:
    """Let so many sends wait, and count."""
    async with way(name, port) as send, aiosmtplib.SMTP(hostname=HOST, port=port) as witness:
        warm = await begin(send, 2 * BATCH, witness)  # what is loaded and made once
        if traced:
            tracemalloc.start()
        before = memory(traced=traced)
        begun = await begin(send, number, witness)
        held = (memory(traced=traced) - before) / number
        batch = [letter("ann@example.com", size=SIZE) for _ in range(BATCH)]
        began = time.process_time()
        while batch:
            await send(batch.pop())
        newcomer = (time.process_time() - began) / BATCH
        began = time.process_time()
        for task in begun.tasks:
            task.cancel()
        await asyncio.wait(begun.tasks)
        cancelling = (time.process_time() - began) / number
        for task in warm.tasks:
            task.cancel()
        await asyncio.wait(warm.tasks)
        return Waiting(begun.cpu, held, begun.message, newcomer, cancelling)


def memory(*, traced: bool) -> int:
    """The bytes that this process holds now, or of these what Python has allocated."""
    gc.collect()
    return tracemalloc.get_traced_memory()[0] if traced else resident()


def waiting(name: str, port: int, number: int, *, traced: bool = False) -> Waiting:
    """The same, in a process that has done nothing else."""
    return in_a_process(_wait, name, port, number, traced)


def _wait(name: str, port: int, number: int, traced: bool) -> Waiting:
    return asyncio.run(wait(name, port, number, traced=traced))


def per_send(number: int) -> Table:
    table = Table(
        "Memory of a send that waits",
        f"{number:,} sends of {SIZE:,} bytes (a tenth, where the message object is held) that a greylisting server has "
        "refused once, in a process for each way; nobody else holds the message object. Bytes for each send: of what "
        "Python has allocated, with a tenth of the sends, and growth of the resident memory.",
        ("sent by", "allocated", "beyond the message", "of the recipe's", "resident"),
    )
    with sink() as port:
        allocated = {name: waiting(name, port, number // 10, traced=True) for name in WAYS}
        grown = {name: waiting(name, port, number // (1 if name in LIGHT else 10)).memory for name in WAYS}
    for name, one in allocated.items():
        beyond = one.memory - one.message
        table.rows.append((name, one.memory, beyond, one.memory / allocated[RECIPE].memory, grown[name]))
        if name.startswith("smtpretry"):
            table.targets[f"{name}: at most {ALLOWED:,} bytes more than the message ({beyond:,.0f})"] = (
                beyond <= ALLOWED
            )
    return table


async def copies(port: int, attempts: int, recipients: list[str]) -> float:
    """How often the bytes of one message are held, after so many attempts, while it waits for the next."""
    now, naps, waits = 0.0, 0, asyncio.Event()

    async def sleep(seconds: float) -> None:
        nonlocal now, naps
        now, naps = now + seconds, naps + 1
        if naps == attempts:
            waits.set()
            await asyncio.Event().wait()

    policy = RetryPolicy(wait=AN_HOUR, give_up_after=None, sleep=sleep, clock=lambda: now)
    async with RetryingSMTP(aiosmtplib.SMTP(hostname=HOST, port=port), policy) as smtp:
        await smtp.sendmail(SENDER, "ann@example.com", b"\r\n")
        gc.collect()
        tracemalloc.start()
        send = asyncio.ensure_future(smtp.send_message(letter(*recipients, size=LARGE)))
        await waits.wait()
        gc.collect()
        held, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        send.cancel()
        await asyncio.wait({send})
    return held / LARGE, peak / LARGE


def of_one_message() -> Table:
    table = Table(
        "How many times the bytes of one message are held",
        f"One message of {LARGE:,} bytes; the server refuses it after the final dot each time. What Python has allocated "
        "while the send waits, and at most before, in messages.",
        ("attempts", "recipients", "held", "at most"),
    )
    with sink() as port:
        asyncio.run(copies(port, 1, ["later@example.com"]))  # the first refusal compiles the patterns, once
        for attempts, number in ((1, 1), (5, 1), (1, 100), (5, 100)):
            held, peak = asyncio.run(copies(port, attempts, [f"later{n}@example.com" for n in range(number)]))
            table.rows.append((attempts, number, held, peak))
    most = max(row[2] for row in table.rows)
    table.targets[f"one copy, and a tenth for the rest ({most:.2f})"] = most <= 1.1
    return table


def run(*, quick: bool) -> list[Table]:
    return [per_send(200 if quick else 20_000), of_one_message()]
