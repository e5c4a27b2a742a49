"""A relay that limits its clients: by the rate, the number of connections, and the messages on each of them.

It counts as the real ones do, and says what they say.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import signal
import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from multiprocessing.connection import Connection

HOST = "127.0.0.1"
VERBS = {b"EHLO": b"250 relay", b"RSET": b"250 2.0.0 Ok", b"RCPT": b"250 2.1.5 Ok", b"DATA": b"354 Go ahead"}
CROWDED = b"421 4.7.0 Error: too many connections from 127.0.0.1"


@dataclass(frozen=True)
class Limits:
    """What a relay allows, and what it says where that is exceeded.

    Attributes:
        number: messages in any `period`, or the burst of a bucket.
        period: seconds.
        refusal: the reply to MAIL above that; after a 421 it hangs up.
        drip: tokens that drip into the bucket in a second; None for a window of `period`.
        connections: how many there may be.
        lingers: seconds that a connection counts after its end.
        messages: how many a connection may carry.
        used_up: the reply to MAIL above that; after a 421 it hangs up.
    """

    number: int = 1_000_000
    period: float = 1.0
    refusal: bytes = b"454 Throttling failure: Maximum sending rate exceeded."
    drip: float | None = None
    connections: int = 1000
    lingers: float = 0.0
    messages: int = 1_000_000
    used_up: bytes = b"421 4.7.0 Too many messages in this session, closing connection"


@dataclass
class Seen:
    """What became of the messages: how many were taken, refused for the rate and for other reasons, and connections."""

    taken: int = 0
    too_fast: int = 0
    refused: int = 0
    connections: int = 0


class Relay:
    """What all connections share."""

    def __init__(self, limits: Limits) -> None:
        self.limits, self.seen = limits, Seen()
        self.open = 0
        self.times = deque[float]()  # of a window
        self.tokens, self.at = float(limits.number), time.monotonic()

    def left(self) -> None:
        """A connection has ended."""
        self.open -= 1

    def takes(self) -> bool:
        """Whether the rate allows one more message, which counts then."""
        limits, now = self.limits, time.monotonic()
        if limits.drip is not None:
            self.tokens = min(limits.number, self.tokens + (now - self.at) * limits.drip)
            self.at = now
            taken = self.tokens >= 1
            self.tokens -= taken
            return taken
        while self.times and self.times[0] <= now - limits.period:
            self.times.popleft()
        if len(self.times) >= limits.number:
            return False
        self.times.append(now)
        return True


class Session(asyncio.Protocol):
    """One connection."""

    def __init__(self, relay: Relay) -> None:
        self.relay = relay
        self.carried, self.in_body, self.buffer = 0, False, b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self.relay.open += 1
        self.relay.seen.connections += 1
        if self.relay.open > self.relay.limits.connections:
            self.relay.seen.refused += 1
            self.say(CROWDED)
        else:
            self.say(b"220 relay")

    def connection_lost(self, _: Exception | None) -> None:
        asyncio.get_running_loop().call_later(self.relay.limits.lingers, self.relay.left)

    def say(self, reply: bytes) -> None:
        self.transport.write(reply + b"\r\n")
        if reply[:3] in (b"421", b"221"):
            self.transport.close()

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        while not self.transport.is_closing():
            line, end, rest = self.buffer.partition(b"\r\n.\r\n" if self.in_body else b"\r\n")
            if not end:
                break
            self.buffer = rest
            self.say(self.body() if self.in_body else self.answer(line[:4].upper()))

    def answer(self, verb: bytes) -> bytes:
        if verb == b"MAIL":
            return self.mail()
        if verb == b"DATA":
            self.in_body = True
            self.buffer = b"\r\n" + self.buffer  # a dot in the first line is after a line end, too
        return VERBS.get(verb, b"221 2.0.0 Bye")

    def mail(self) -> bytes:
        if self.carried >= self.relay.limits.messages:
            self.relay.seen.refused += 1
            return self.relay.limits.used_up
        if not self.relay.takes():
            self.relay.seen.too_fast += 1
            return self.relay.limits.refusal
        return b"250 2.1.0 Ok"

    def body(self) -> bytes:
        self.in_body = False
        self.carried += 1
        self.relay.seen.taken += 1
        return b"250 2.0.0 Ok: queued"


async def serve(pipe: Connection, limits: Limits) -> None:
    loop, over, relay = asyncio.get_running_loop(), asyncio.Event(), Relay(limits)
    server = await loop.create_server(lambda: Session(relay), HOST, 0, backlog=1024)
    pipe.send(server.sockets[0].getsockname()[1])
    loop.add_reader(pipe.fileno(), over.set)  # any word ends it
    await over.wait()
    server.close()
    pipe.send(relay.seen)


def run(pipe: Connection, limits: Limits) -> None:
    """The process: it says its port, and when nobody needs it any more, what it has seen."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the other process
    asyncio.run(serve(pipe, limits))


@dataclass
class Running:
    """A relay in a process of its own: its port, and what it has seen, once it has ended."""

    port: int
    seen: Seen


@contextlib.contextmanager
def relay(limits: Limits) -> Iterator[Running]:
    """Start a relay in a process of its own."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=run, args=(theirs, limits), daemon=True)
    process.start()
    theirs.close()  # so that the end of one process is the end of the pipe for the other
    running = Running(ours.recv(), Seen())
    try:
        yield running
    finally:
        ours.send("end")
        running.seen = ours.recv()
        process.join()
