"""What every server of the tests has in common: a directory, ports, and a start and a stop."""

from __future__ import annotations

import contextlib
import itertools
import mailbox
import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

HOME = "home.test"  # the domain that Postfix and Exim hold their own; any other is a relay to it
USERNAME, PASSWORD = "app", "not a real password"
PATIENCE = 20.0  # seconds that a server gets to do what takes it well under one

PATH = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin", "/usr/local/sbin"))
ENVIRONMENT = {**os.environ, "PATH": PATH}


def wait_until(condition: Callable[[], object], what: str) -> None:
    """Poll the condition until it holds, and say what was waited for if it never does."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > deadline:
            message = f"waited {PATIENCE:.0f} s for {what}"
            raise TimeoutError(message)
        time.sleep(0.02)


@contextlib.contextmanager
def workplace() -> Iterator[Path]:
    """Make a directory for the servers, that their own users can reach, for as long as the block runs.

    Within, SIGTERM ends the tests as Ctrl-C does, so that the servers are stopped.
    """
    with tempfile.TemporaryDirectory(prefix="mta-") as name:
        Path(name).chmod(0o755)
        handler = signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            yield Path(name)
        finally:
            signal.signal(signal.SIGTERM, handler)


def require(server: type[Server]) -> None:
    """Skip the test, by the server's name, where the server cannot run; fail it where it was promised to run."""
    if reason := server.unavailable():
        if os.environ.get("SMTPRETRY_REQUIRE_MTA") == "1":
            pytest.fail(reason)
        pytest.skip(reason)


@dataclass(frozen=True, kw_only=True)
class Service:
    """One port of a server: its name, who answers there, and the settings that are its own."""

    name: str
    program: str = "smtpd"  # or "postscreen", of the Postfix; or "exim", or "aiosmtpd"
    settings: Mapping[str, Any] = field(default_factory=dict)  # as the server's class understands them


def count_mails(maildir: Path, message_id: str) -> int:
    """Count the copies of a message in a maildir, which need not exist."""
    mails = mailbox.Maildir(maildir, create=False) if maildir.exists() else ()
    return sum(mail["Message-ID"] == message_id for mail in mails)


def free_ports(count: int) -> list[int]:
    """Find ports on which nobody listens, and of which no other test gets one before a server of this one's does.

    They lie below those that the system gives out by itself; of two processes that run tests each has its own.
    """
    process = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    step = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    ports = range(10000 + process, lowest, step)
    return list(itertools.islice(filter(_is_free, random.sample(ports, len(ports))), count))


def _is_free(port: int) -> bool:
    try:
        socket.create_server(("127.0.0.1", port)).close()
    except OSError:
        return False
    return True


def run(*command: str) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, and capture what it says."""
    return subprocess.run(
        command,
        env=ENVIRONMENT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


class Server(ABC):
    """A server in a directory of its own, running for as long as its `with` block."""

    program: ClassVar[str]
    remedy: ClassVar[str] = "on Debian, apt-get install postfix postgrey dovecot-core"

    @classmethod
    def binary(cls) -> str | None:
        """Return the path of its program, or None where there is none."""
        return shutil.which(cls.program, path=PATH)

    @classmethod
    def unavailable(cls) -> str | None:
        """Say why it cannot be run here, or None where it can."""
        if cls.binary() is None:
            return f"{cls.program} not installed: {cls.remedy}"
        if os.geteuid() != 0:
            return f"{cls.program} not started: only root can start the mail servers"
        return None

    def __init__(self, directory: Path) -> None:
        """Take a directory that does not exist yet."""
        self.directory = directory
        self.log = directory / "log"
        directory.mkdir()

    @abstractmethod
    def start(self) -> None:
        """Start the server; it answers when this returns."""

    @abstractmethod
    def stop(self) -> None:
        """Stop the server; nothing of it runs when this returns."""

    def __enter__(self) -> Self:
        """Start it."""
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop it."""
        self.stop()


class MailServer(Server):
    """A server that takes mail, on a port for each of its services."""

    out_of_step: ClassVar[tuple[str, ...]] = ()  # what its log says of a client that sent what was not asked for

    @abstractmethod
    def port(self, service: str) -> int:
        """Return the port of a service."""

    @abstractmethod
    def replies(self, service: str) -> list[str]:
        """Return every reply that a service has sent, as its own log has it."""

    @abstractmethod
    def copies(self, recipient: str, message_id: str) -> int:
        """Count the copies of a message that came for a recipient, once nothing is on its way any more."""

    def has_logged(self, _service: str, text: str) -> bool:
        """Tell whether the log of a service has that text."""
        return text in self.log.read_text(errors="replace")
