"""Real mail servers for the tests, on loopback: one private Postfix, with postgrey and Dovecot beside it, and aiosmtpd.

Everything lives in temporary directories and none of it touches the system's own configuration. Each set-up that a test
wants is one `Service`: one more `smtpd` of the same Postfix, or an aiosmtpd, on a port of its own, with settings of its
own. Nothing leaves the machine: what a server accepts, for any domain, goes into a maildir.
"""

from __future__ import annotations

import contextlib
import logging
import mailbox
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import tempfile
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from email.utils import getaddresses
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from aiosmtpd.controller import Controller
from aiosmtpd.handlers import Mailbox
from aiosmtpd.smtp import AuthResult, LoginPassword
from mirakuru import UnixSocketExecutor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

HOME = "home.test"  # the domain that Postfix holds its own; any other is a relay to it
USERNAME, PASSWORD = "app", "not a real password"
PATIENCE = 20.0  # seconds that a server gets to do what takes it well under one

_PATH = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin", "/usr/local/sbin"))
_ENVIRONMENT = {**os.environ, "PATH": _PATH}


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


@dataclass(frozen=True, kw_only=True)
class Service:
    """One port of a server: its name, who answers there, and the settings that are its own."""

    name: str
    program: str = "smtpd"  # or "postscreen", of the Postfix; or "aiosmtpd"
    settings: Mapping[str, Any] = field(default_factory=dict)  # of main.cf, or arguments of aiosmtpd's SMTP

    def entry(self, port: int) -> str:
        """Return its lines of master.cf."""
        options = "".join(f"  -o {{ {key} = {value} }}\n" for key, value in self.settings.items())
        processes = "1" if self.program == "postscreen" else "-"
        return f"127.0.0.1:{port} inet n - n - {processes} {self.program}\n  -o syslog_name={self.name}\n{options}"


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [taken.getsockname()[1] for taken in sockets]


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        env=_ENVIRONMENT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


class Server(ABC):
    """A server in a directory of its own, running for as long as its `with` block."""

    program: ClassVar[str]

    @classmethod
    def unavailable(cls) -> str | None:
        """Say why it cannot be run here, or None where it can."""
        if shutil.which(cls.program, path=_PATH) is None:
            return f"{cls.program} not installed: on Debian, apt-get install postfix postgrey dovecot-core"
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


class Postfix(Server):
    """Postfix with one port per service, and a maildir per recipient."""

    program = "postfix"

    _MAIN = """\
compatibility_level = 3.6
queue_directory = {directory}/queue
data_directory = {directory}/data
maillog_file = {directory}/log
maillog_file_prefixes = {directory}
myhostname = mx.{home}
mydestination =
mynetworks =
inet_interfaces = 127.0.0.1
inet_protocols = ipv4
smtpd_peername_lookup = no
smtpd_error_sleep_time = 0
smtpd_relay_restrictions = permit_sasl_authenticated, reject_unauth_destination
smtpd_tls_security_level = may
smtpd_tls_chain_files = {directory}/certificate.pem
smtpd_tls_auth_only = yes
smtpd_sasl_type = dovecot
smtpd_sasl_path = private/dovecot
smtpd_milters =
default_transport = virtual
virtual_mailbox_domains = {home}
virtual_mailbox_base = {directory}/mail
virtual_mailbox_maps = texthash:{directory}/mailboxes
virtual_uid_maps = static:65534
virtual_gid_maps = static:65534
anvil_rate_time_unit = 2s
service_throttle_time = 1s
postscreen_greet_wait = 1s
postscreen_pipelining_enable = yes
# every session is written down whole, each line under the name of its service
debug_peer_list = 127.0.0.1
debug_peer_level = 1
"""
    _MASTER = """\
smtpd      pass       - - n - - smtpd
cleanup    unix       n - n - 0 cleanup
qmgr       unix       n - n 300 1 qmgr
rewrite    unix       - - n - - trivial-rewrite
bounce     unix       - - n - 0 bounce
defer      unix       - - n - 0 bounce
trace      unix       - - n - 0 bounce
error      unix       - - n - - error
retry      unix       - - n - - error
virtual    unix       - n n - - virtual
proxymap   unix       - - n - - proxymap
anvil      unix       - - n - 1 anvil
tlsmgr     unix       - - n 1000? 1 tlsmgr
tlsproxy   unix       - - n - 0 tlsproxy
postlog    unix-dgram n - n - 1 postlogd
"""

    def __init__(
        self, directory: Path, services: Sequence[Service], mailboxes: Sequence[str], certificate: bytes
    ) -> None:
        """Take the services that it offers, the addresses that it knows, and the certificate with its key."""
        super().__init__(directory)
        self.sockets = directory / "queue" / "private"  # what its settings call unix:private
        self._queue = directory / "queue"
        self._mail = directory / "mail"
        self._ports = dict(zip((service.name for service in services), _free_ports(len(services)), strict=True))
        self._configuration = directory / "etc"
        for path, owner in ((self._configuration, "root"), (directory / "data", "postfix"), (self._mail, "nobody")):
            path.mkdir()
            shutil.chown(path, owner)
        self._queue.mkdir()
        entries = "".join(service.entry(self.port(service.name)) for service in services)
        (self._configuration / "main.cf").write_text(self._MAIN.format(directory=directory, home=HOME))
        (self._configuration / "master.cf").write_text(self._MASTER + entries)
        (directory / "mailboxes").write_text("".join(f"{address} {address}/\n" for address in mailboxes))
        (directory / "certificate.pem").write_bytes(certificate)

    def start(self) -> None:
        """Start Postfix, which returns when its ports are open."""
        self._control("start")

    def stop(self) -> None:
        """Stop Postfix and the processes that it started."""
        self._control("stop")

    def port(self, service: str) -> int:
        """Return the port of a service."""
        return self._ports[service]

    def replies(self, service: str) -> list[str]:
        """Return every reply that a service has sent, as its own log has it."""
        said = re.compile(r"(?:smtpd\[\d+\]: > \S+: |postscreen\[\d+\]: NOQUEUE: reject: .*?: )(\d{3}[ -].*)")
        return [match[1] for line in self._logged(service) if (match := said.match(line))]

    def has_logged(self, service: str, text: str) -> bool:
        """Tell whether the log of a service has that text."""
        return any(text in line for line in self._logged(service))

    def copies(self, recipient: str, message_id: str) -> int:
        """Count the copies of a message in a recipient's mailbox, once nothing is on its way any more."""
        wait_until(self._idle, "Postfix to deliver what it has accepted")
        maildir = self._mail / recipient
        mails = mailbox.Maildir(maildir, create=False) if maildir.exists() else ()
        return sum(mail["Message-ID"] == message_id for mail in mails)

    def _logged(self, service: str) -> list[str]:
        lines = self.log.read_text(errors="replace").splitlines()
        return [line.partition(mark)[2] for line in lines if (mark := f" {service}/") in line]

    def _idle(self) -> bool:
        queues = (self._queue / name for name in ("incoming", "active", "deferred"))
        return not any(files for queue in queues for _, _, files in os.walk(queue))

    def _control(self, verb: str) -> None:
        done = _run("postfix", "-c", str(self._configuration), verb)
        if done.returncode:
            log = self.log.read_text() if self.log.exists() else ""
            message = f"postfix {verb}: {done.stderr}{log}"
            raise RuntimeError(message)


class Aiosmtpd(Server):
    """aiosmtpd with one service, in a thread of its own, and one maildir for everybody."""

    program = "aiosmtpd"

    def __init__(self, directory: Path, service: Service, certificate: bytes) -> None:
        """Take the service that it offers, and the certificate with its key."""
        super().__init__(directory)
        (directory / "certificate.pem").write_bytes(certificate)
        tls_context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        tls_context.load_cert_chain(directory / "certificate.pem")
        [self._port] = _free_ports(1)
        self._controller = Controller(
            Mailbox(directory / "mail"),
            "127.0.0.1",
            self._port,
            tls_context=tls_context,
            authenticator=self._authenticate,
            **service.settings,
        )
        self._logger, self._handler = logging.getLogger("mail.log"), logging.FileHandler(self.log)

    def start(self) -> None:
        """Start its thread, and write down every session whole."""
        self._logger.setLevel(logging.DEBUG)
        self._logger.addHandler(self._handler)
        self._controller.start()

    def stop(self) -> None:
        """End its thread."""
        self._controller.stop()
        self._logger.removeHandler(self._handler)
        self._logger.setLevel(logging.NOTSET)
        self._handler.close()

    def port(self, _service: str) -> int:
        """Return the port of its service."""
        return self._port

    def replies(self, _service: str) -> list[str]:
        """Return every reply that it has sent, as its own log has it."""
        return re.findall(r" << b'(\d{3}[ -].*)'$", self.log.read_text(), re.MULTILINE)

    def copies(self, recipient: str, message_id: str) -> int:
        """Count the copies of a message that came for a recipient."""
        mails = mailbox.Maildir(self.directory / "mail", create=False)
        came_for = [getaddresses([mail["X-RcptTo"]]) for mail in mails if mail["Message-ID"] == message_id]
        return sum(("", recipient) in recipients for recipients in came_for)

    @staticmethod
    def _authenticate(
        _server: object, _session: object, _envelope: object, _mechanism: str, data: object
    ) -> AuthResult:
        known = LoginPassword(USERNAME.encode(), PASSWORD.encode())
        return AuthResult(success=data == known, handled=False)


class Helper(Server):
    """A server that Postfix asks, as unix:private/NAME in its settings; a child process of the tests."""

    def __init__(self, postfix: Postfix, name: str) -> None:
        """Stand beside that Postfix, under a name that no other helper has."""
        super().__init__(postfix.directory.parent / name)
        self.socket = postfix.sockets / name

    @abstractmethod
    def command(self) -> list[str]:
        """Return the command that runs it in the foreground."""

    def start(self) -> None:
        """Start it, and wait until it listens. What it says goes to the standard error of the tests."""
        process = UnixSocketExecutor(
            self.command(), str(self.socket), envvars=_ENVIRONMENT, stdout=None, timeout=PATIENCE, sleep=0.02
        )
        self._process = process.start()

    def stop(self) -> None:
        """End it with all of its processes, by force, for some stay to serve who is connected."""
        self._process.kill()


class Postgrey(Helper):
    """A greylist: it knows a triplet of client, sender and recipient after two seconds."""

    program = "postgrey"

    def __init__(self, postfix: Postfix, name: str = "postgrey", *options: str) -> None:
        """Take further options of postgrey's command line."""
        super().__init__(postfix, name)
        self._options = options
        shutil.chown(self.directory, "postfix")

    def command(self) -> list[str]:
        """Return postgrey's command line."""
        return [
            "postgrey",
            f"--unix={self.socket}",
            "--user=postfix",
            "--group=postfix",
            f"--dbdir={self.directory}",
            "--delay=2",
            "--auto-whitelist-clients=0",
            "--whitelist-clients=/dev/null",
            "--whitelist-recipients=/dev/null",
            *self._options,
        ]


class Dovecot(Helper):
    """The keeper of the password: SASL for Postfix, and nothing else of Dovecot."""

    program = "dovecot"

    _CONFIGURATION = """\
base_dir = {directory}/run
state_dir = {directory}/state
log_path = /dev/stderr
protocols =
ssl = no
disable_plaintext_auth = no
auth_mechanisms = plain login
auth_failure_delay = 0
passdb {{
  driver = passwd-file
  args = {directory}/passwords
}}
service auth {{
  unix_listener {socket} {{
    user = postfix
    mode = 0600
  }}
}}
service anvil {{
  unix_listener anvil-auth-penalty {{
    mode = 0
  }}
}}
"""

    @classmethod
    def unavailable(cls) -> str | None:
        """Say so too where it is not the Dovecot whose configuration language is spoken here."""
        if reason := super().unavailable():
            return reason
        version = _run("dovecot", "--version").stdout.split()[0]
        return None if version.startswith("2.3.") else f"dovecot not started: it is {version}, the tests configure 2.3"

    def __init__(self, postfix: Postfix) -> None:
        """Write its configuration and its one password."""
        super().__init__(postfix, "dovecot")
        self._configuration = self.directory / "dovecot.conf"
        self._configuration.write_text(self._CONFIGURATION.format(directory=self.directory, socket=self.socket))
        (self.directory / "passwords").write_text(f"{USERNAME}:{{PLAIN}}{PASSWORD}\n")

    def command(self) -> list[str]:
        """Return Dovecot's command line."""
        return ["dovecot", "-F", "-c", str(self._configuration)]
