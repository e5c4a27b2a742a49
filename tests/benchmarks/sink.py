"""The server that the clients are measured against: it takes everything, and costs as little as a server in Python can.

What it does not take, it knows by the recipient: RCPT for grey… gets 450; later… is taken at RCPT, and gets 451 after the
final dot. NOOP answers how many refusals there have been.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import signal
import ssl
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from multiprocessing.connection import Connection

    import trustme

HOST = "127.0.0.1"
REPLIES = {
    b"MAIL": b"250 2.1.0 Ok\r\n",
    b"RCPT": b"250 2.1.5 Ok\r\n",
    b"DATA": b"354 Go ahead\r\n",
    b"RSET": b"250 2.0.0 Ok\r\n",
    b"AUTH": b"235 2.7.0 Welcome\r\n",
    b"STAR": b"220 2.0.0 Go ahead\r\n",
    b"QUIT": b"221 2.0.0 Bye\r\n",
}
GREYLISTED = b"450 4.2.0 Greylisted, try again later\r\n"
TAKEN, LATER = b"250 2.0.0 Ok: queued\r\n", b"451 4.3.0 Try again later\r\n"


class Sink(asyncio.Protocol):
    """One connection."""

    refusals = 0  # of all connections

    def __init__(self, delay: float, tls: ssl.SSLContext | None) -> None:
        self.delay, self.tls = delay, tls
        self.encrypted = self.handshake = self.in_body = self.later = False
        self.buffer = bytearray()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self.say(b"220 sink\r\n")

    def say(self, replies: bytes) -> None:
        if self.delay:
            asyncio.get_running_loop().call_later(self.delay, self.transport.write, replies)
        else:
            self.transport.write(replies)

    def data_received(self, data: bytes) -> None:
        before = len(self.buffer)
        self.buffer += data
        replies = b""
        while not self.handshake:  # what comes before start_tls() has returned waits for the encrypted transport
            end = self.buffer.find(b"\r\n.\r\n", max(0, before - 4)) if self.in_body else self.buffer.find(b"\n")
            if end < 0:
                break
            if self.in_body:
                del self.buffer[: end + 5]
                replies += self.refuse(LATER) if self.later else TAKEN
                self.in_body = self.later = False
            else:
                line = bytes(self.buffer[: end + 1])
                del self.buffer[: end + 1]
                replies += self.answer(line)
            before = 0
        if replies:
            self.say(replies)

    def answer(self, line: bytes) -> bytes:
        verb = line[:4].upper()
        if verb == b"RCPT":
            self.later |= b":<later" in line
            if b":<grey" in line:
                return self.refuse(GREYLISTED)
        elif verb == b"DATA":
            self.in_body = True
            self.buffer[:0] = b"\r\n"  # so that a dot in the first line of the body is after a line end, too
        elif verb == b"EHLO":
            offer = b"AUTH PLAIN" if self.encrypted else b"STARTTLS" if self.tls else b"HELP"
            return b"250-sink\r\n250-SIZE 33554432\r\n250-8BITMIME\r\n250-PIPELINING\r\n250 " + offer + b"\r\n"
        elif verb == b"NOOP":
            return b"250 %d\r\n" % Sink.refusals
        elif verb == b"STAR":
            self.transport.pause_reading()
            self.handshake = True
            asyncio.get_running_loop().create_task(self.encrypt())
        elif verb == b"QUIT":
            asyncio.get_running_loop().call_later(self.delay, self.transport.close)
        return REPLIES[verb]

    def refuse(self, reply: bytes) -> bytes:
        Sink.refusals += 1
        return reply

    async def encrypt(self) -> None:
        loop = asyncio.get_running_loop()
        with contextlib.suppress(OSError):  # the client's trouble, which it will tell
            self.transport = await loop.start_tls(self.transport, self, self.tls, server_side=True)
            self.encrypted, self.handshake = True, False
            self.data_received(b"")


async def serve(pipe: Connection, delay: float, tls: ssl.SSLContext | None) -> None:
    loop, over = asyncio.get_running_loop(), asyncio.Event()
    server = await loop.create_server(lambda: Sink(delay, tls), HOST, 0, backlog=1024)
    pipe.send(server.sockets[0].getsockname()[1])
    loop.add_reader(pipe.fileno(), over.set)
    await over.wait()
    server.close()


def run(pipe: Connection, delay: float, certificate: trustme.LeafCert | None) -> None:
    """The process: it says its port through the pipe, and ends when nobody holds the other end any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for that process
    tls = None
    if certificate is not None:
        tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        certificate.configure_cert(tls)
    asyncio.run(serve(pipe, delay, tls))


@contextlib.contextmanager
def sink(*, delay: float = 0.0, authority: trustme.CA | None = None) -> Iterator[int]:
    """Start a server in a process of its own and give its port.

    Args:
        delay: seconds before each reply, as a network has it; what was pipelined is answered at once after it.
        authority: offer STARTTLS, and AUTH PLAIN after it, with a certificate of this authority.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    certificate = authority.issue_cert(HOST) if authority else None
    process = context.Process(target=run, args=(theirs, delay, certificate), daemon=True)
    process.start()
    theirs.close()  # so that the end of one process is the end of the pipe for the other
    try:
        yield ours.recv()
    finally:
        ours.close()
        process.join()
