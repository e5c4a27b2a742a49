"""Whether an engine loses nothing: `check_engine` kills, stops and confuses its workers, and counts what has arrived.

Everything is real: the workers are processes, the signals are the system's, and each worker sends to a `ScriptedServer`
of its own, by which a pass in progress is known, and held up at the place where its worker is to be killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

import aiosmtplib
import tenacity
from aiosmtplib.typing import Default

from smtpretry.client import RetryingSMTP
from smtpretry.delivery import Delivery
from smtpretry.envelope import prepare
from smtpretry.policy import RetryPolicy

from .server import ScriptedServer

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from contextlib import AbstractAsyncContextManager
    from types import TracebackType

    from smtpretry.attempt import Save
    from smtpretry.queues.engine import Engine
    from smtpretry.session.connection import Timeout

    MakeEngine = Callable[[], AbstractAsyncContextManager[Engine]]

_POLICY: Final = RetryPolicy(wait=tenacity.wait_fixed(1))
_SENDER: Final = "app@example.com"
_RAISES: Final = "raises"  # the recipient of the delivery that raises in the worker
_FEWEST: Final = 2  # workers
_POLL: Final = 0.05  # seconds
_PACE: Final = 0.1  # seconds between two deliveries
_LARGE: Final = 10_000_000  # bytes
_HELD: Final = 0.5  # seconds that a pass is held up until its worker is killed, or stopped and answered
_PLACES: Final = (  # where a worker is killed, and whether the server has taken the message by then
    ("RCPT", False),
    ("DATA", False),
    ("END_OF_DATA", True),
    ("BODY", False),
    ("END_OF_DATA", False),
)


@dataclass
class EngineReport:
    """What `check_engine` saw. A mail is one message for one recipient."""

    mails: int = 0
    lost: list[str] = field(default_factory=list)  # recipients who never got it
    twice: list[str] = field(default_factory=list)  # recipients who got it twice
    excused: list[str] = field(default_factory=list)  # those of them whose worker was killed when the server had it
    interrupted: int = 0  # passes
    recovery: list[float] = field(default_factory=list)  # seconds from a kill until what it interrupted had arrived

    def __str__(self) -> str:
        """One line: mails, lost, twice, interrupted passes, seconds to recovery."""
        seconds = f"{min(self.recovery):.1f} to {max(self.recovery):.1f}" if self.recovery else "no"
        return (
            f"{self.mails} mails: {len(self.lost)} lost, {len(self.twice)} twice "
            f"({len(self.excused)} of them killed between the server's 250 and the save), "
            f"{self.interrupted} interrupted passes, {seconds} seconds to recovery"
        )


async def check_engine(
    make_engine: MakeEngine, *, deliveries: int = 200, kills: int = 5, workers: int = 2, patience: float = 60.0
) -> EngineReport:
    """Send through an engine, while its workers are killed, stopped, torn down and given jobs that raise.

    Of the deliveries, some are greylisted, one is refused, one is submitted twice, one has 10 MB, and one raises in the
    worker. Workers are killed (SIGKILL) in mid-pass, at five places in turn; one is stopped (SIGSTOP) in mid-pass until
    another has taken over, and goes on then (SIGCONT); one is ended by SIGTERM; and the event loop of one is torn down.

    Args:
        make_engine: makes the engine, as an async context manager which opens and closes it. It is called in each
            process: a function of a module, or a functools.partial of one. Workers should be taken for dead after a
            few seconds.
        deliveries: how many there are in all; each kill, and each of the seven other cases, needs one.
        kills: how many workers are killed.
        workers: how many there are at a time, at least two.
        patience: seconds that the engine gets for each recovery, and for the rest at the end.

    It needs a POSIX system, for its signals.

    Returns:
        The figures; print it.

    Raises:
        AssertionError: a mail was lost, or came twice, except where the worker was killed between the server's 250 and
            the save, or a promise of `Engine` was broken; the message says which.
        TimeoutError: a case did not come about: no worker tried, or none recovered.
        ValueError: fewer than two workers.
    """
    if workers < _FEWEST:
        msg = f"workers is at least {_FEWEST}, for one has to take over from another, not {workers}"
        raise ValueError(msg)
    async with _Trial(make_engine, workers, patience) as trial:
        return await trial.run(deliveries, kills)


class _Trial:
    """The servers, a worker process for each, and the engine that submits."""

    def __init__(self, make_engine: MakeEngine, workers: int, patience: float) -> None:
        self.make_engine, self.patience = make_engine, patience
        self.servers = [ScriptedServer() for _ in range(workers)]
        self.processes = list[SpawnProcess]()
        self.sent = dict[str, Delivery]()  # by recipient
        self.report = EngineReport()
        self.open = contextlib.AsyncExitStack()

    async def __aenter__(self) -> Self:
        async with contextlib.AsyncExitStack() as stack:
            self.ended = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "ended"
            self.ended.touch()
            self.engine = await stack.enter_async_context(self.make_engine())
            for server in self.servers:
                await stack.enter_async_context(server)
            stack.callback(self._kill_all)
            self.processes = [self._start(server) for server in self.servers]
            supervisor = asyncio.create_task(self._supervise())
            stack.callback(supervisor.cancel)
            self.open = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.open.__aexit__(kind, error, traceback)

    async def run(self, deliveries: int, kills: int) -> EngineReport:
        """Each case has a delivery of its own, among many that nothing happens to."""
        cases: list[Callable[[], Awaitable[None]]] = [
            *(partial(self.killed, f"killed{number}", *_PLACES[number % len(_PLACES)]) for number in range(kills)),
            *(self.stopped, self.terminated, self.torn_down),
            *(self.submitted_twice, self.large, self.raises, self.refused),
        ]
        traffic = asyncio.create_task(self.traffic(deliveries - len(cases)))
        try:
            for case in cases:
                await case()
            await traffic
        finally:
            traffic.cancel()
        with contextlib.suppress(TimeoutError):
            await self.until(lambda: not self.missing(), "the rest")
        await asyncio.sleep(max(self.report.recovery, default=1.0))  # what comes now, comes twice
        return self.judge()

    def judge(self) -> EngineReport:
        """Count, and compare the bytes."""
        report, arrived = self.report, self.arrived()
        report.mails, report.lost = len(self.sent), self.missing()
        report.twice = [who for who, times in arrived.items() if times > 1]
        _expect(not report.lost, f"lost: {report.lost}; {report}")
        unexcused = set(report.twice) - set(report.excused)
        _expect(not unexcused, f"twice, without a reason: {unexcused}; {report}")
        for message in (message for server in self.servers for message in server.messages):
            changed = [who for who in message.recipients if message.content != self.sent[who].message]
            _expect(not changed, f"other bytes than were submitted: {changed}")
        return report

    # The cases

    async def killed(self, who: str, place: str, taken: bool) -> None:  # noqa: FBT001
        """SIGKILL in mid-pass; where the server has taken the message by then, it has to come again."""
        worker = await self.hold(who, place, "stall", act=taken)
        self.report.excused += [_address(who)] if taken else []
        await asyncio.sleep(_HELD)  # others have come to wait behind it
        worker.kill()
        await self.recovery(who, already=int(taken))

    async def stopped(self) -> None:
        """SIGSTOP in mid-pass until another worker has taken over, then SIGCONT: it sends no more."""
        worker = await self.hold("stopped", "RCPT", "late", delay=_HELD)
        os.kill(worker.pid or 0, signal.SIGSTOP)
        await self.recovery("stopped")
        os.kill(worker.pid or 0, signal.SIGCONT)

    async def terminated(self) -> None:
        """SIGTERM: the worker ends its pass, or gives it back, and ends in good order."""
        worker = await self.hold("terminated", "RCPT", "late", delay=_HELD)
        worker.terminate()
        await self.recovery("terminated")
        await self.until(lambda: not worker.is_alive(), "a worker to end after SIGTERM")
        _expect(worker.exitcode == 0, f"a worker that got SIGTERM ended with {worker.exitcode}")

    async def torn_down(self) -> None:
        """The event loop ends in mid-pass, with all of its tasks."""
        worker = await self.hold("torn", "RCPT", "stall")
        os.kill(worker.pid or 0, signal.SIGUSR1)
        await self.recovery("torn")

    async def submitted_twice(self) -> None:
        """The same delivery submitted twice at once, and once more when it has arrived."""
        delivery = self.prepare("twice")
        await asyncio.gather(self.engine.submit(delivery), self.engine.submit(delivery))
        await self.until(lambda: self.arrived()[_address("twice")], "what was submitted twice")
        await self.engine.submit(delivery)

    async def large(self) -> None:
        """A message of 10 MB."""
        await self.submit("large", size=_LARGE)

    async def raises(self) -> None:
        """The first attempt of each worker raises."""
        await self.submit(_RAISES)

    async def refused(self) -> None:
        """The application is told of a refusal."""
        for server in self.servers:
            server.on("RCPT", "refused@*", "550 5.1.1 No such user", optional=True)
        delivery = self.prepare("refused")
        del self.sent[_address("refused")]
        await self.engine.submit(delivery)
        await self.until(lambda: delivery.id in self.ended.read_text(), "on_end to be called for a refused recipient")

    # What they are made of

    async def hold(self, who: str, place: str, how: str, **script: Any) -> SpawnProcess:  # noqa: ANN401
        """Submit a delivery, and return the worker whose pass is held up at the place."""
        scripts = [server.fail_at(place, how, f"{who}@*", times=1, optional=True, **script) for server in self.servers]
        await self.submit(who)
        await self.until(lambda: any(script.used for script in scripts), f"a worker to try {who}")
        self.report.interrupted += 1
        for server, unused in zip(self.servers, scripts, strict=True):
            server.scripts.remove(unused)
        return self.processes[[script.used for script in scripts].index(1)]

    async def recovery(self, who: str, already: int = 0) -> None:
        """Wait until it has arrived, and take the time."""
        began = time.monotonic()
        await self.until(lambda: self.arrived()[_address(who)] > already, f"{who} to arrive after all")
        self.report.recovery.append(time.monotonic() - began)

    async def traffic(self, deliveries: int) -> None:
        """Submit what nothing happens to; one in ten has a second recipient, who is greylisted."""
        for number in range(deliveries):
            also = [f"grey{number}"] if number % 10 == 0 else []
            for server in self.servers:
                for who in also:
                    server.on("RCPT", f"{who}@*", "450 4.2.0 Greylisted for 1 second", times=1, optional=True)
            await self.submit(f"user{number}", *also)
            await asyncio.sleep(_PACE)

    async def submit(self, *whom: str, size: int = 0) -> None:
        await self.engine.submit(self.prepare(*whom, size=size))

    def prepare(self, *whom: str, size: int = 0) -> Delivery:
        body = b"Subject: conformance\r\n\r\n" + b".a line of a message\r\n" * (1 + size // 22)
        delivery = prepare(body, sender=_SENDER, recipients=[_address(who) for who in whom])
        self.sent |= dict.fromkeys(delivery.recipients, delivery)
        return delivery

    def arrived(self) -> Counter[str]:
        return Counter(who for server in self.servers for message in server.messages for who in message.recipients)

    def missing(self) -> list[str]:
        arrived = self.arrived()
        return [who for who in self.sent if who not in arrived]

    async def until(self, condition: Callable[[], object], what: str) -> None:
        deadline = time.monotonic() + self.patience
        while not condition():
            if time.monotonic() > deadline:
                msg = f"waited {self.patience:g} s for {what}"
                raise TimeoutError(msg)
            await asyncio.sleep(_POLL)

    # The workers

    def _start(self, server: ScriptedServer) -> SpawnProcess:
        context = multiprocessing.get_context("spawn")
        worker = context.Process(target=_work, args=(self.make_engine, server.port, self.ended), daemon=True)
        worker.start()
        return worker

    async def _supervise(self) -> None:
        """Replace a worker that has ended, as every service manager does."""
        while True:
            for number, (worker, server) in enumerate(zip(self.processes, self.servers, strict=True)):
                if not worker.is_alive():
                    self.processes[number] = self._start(server)
            await asyncio.sleep(_POLL)

    def _kill_all(self) -> None:
        for worker in self.processes:
            worker.kill()
            worker.join()


class _Unsteady(RetryingSMTP):
    """A client whose first attempt at one delivery raises."""

    raised = False

    async def attempt(
        self, delivery: Delivery, save: Save | None = None, *, timeout: Timeout = Default.token
    ) -> Delivery:
        if not self.raised and _address(_RAISES) in delivery.outcomes:
            self.raised = True
            msg = "this job was to raise"
            raise RuntimeError(msg)
        return await super().attempt(delivery, save, timeout=timeout)


def _work(make_engine: MakeEngine, port: int, ended: Path) -> None:
    """Be a worker, in a process of its own."""

    async def on_end(delivery: Delivery) -> None:
        with ended.open("a") as lines:
            lines.write(f"{delivery.id}\n")

    async def run() -> None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, sys.exit, 1)  # which tears the loop down
        client = aiosmtplib.SMTP(hostname="127.0.0.1", port=port, local_hostname="worker.example", start_tls=False)
        async with make_engine() as engine, _Unsteady(client, _POLICY) as smtp:
            await engine.work(smtp, on_end=on_end)

    asyncio.run(run())


def _address(who: str) -> str:
    return f"{who}@example.com"


def _expect(promise: bool, otherwise: str) -> None:  # noqa: FBT001
    if not promise:
        raise AssertionError(otherwise)
