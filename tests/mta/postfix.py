"""A private Postfix: one port per service."""

from __future__ import annotations

import mailbox
import os
import re
import shutil
import signal
import stat
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from .server import HOME, MailServer, count_mails, free_ports, run, wait_until

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .server import Service


class Postfix(MailServer):
    """Postfix with one port per service, and a maildir per recipient."""

    program = "postfix"
    out_of_step = ("improper command pipelining", "non-SMTP command")

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
        self._ports = dict(zip((service.name for service in services), free_ports(len(services)), strict=True))
        self._configuration = directory / "etc"
        for path, owner in ((self._configuration, "root"), (directory / "data", "postfix"), (self._mail, "nobody")):
            path.mkdir()
            shutil.chown(path, owner)
        self._queue.mkdir()
        entries = "".join(self._entry(service) for service in services)
        (self._configuration / "main.cf").write_text(self._MAIN.format(directory=directory, home=HOME))
        (self._configuration / "master.cf").write_text(self._MASTER + entries)
        (directory / "mailboxes").write_text("".join(f"{address} {address}/\n" for address in mailboxes))
        (directory / "certificate.pem").write_bytes(certificate)

    def start(self) -> None:
        """Start Postfix, which returns when its ports are open."""
        if self.log.exists():
            # Where a kill has left half a file in the queue, postsuper says so there, as the user postfix.
            self.log.chmod(0o666)
        self._control("start")

    def stop(self) -> None:
        """Stop Postfix and the processes that it started."""
        self._control("stop")

    def kill(self) -> None:
        """Kill it with all of its processes, as the end of its machine would; `start` starts it again."""
        os.killpg(int((self._queue / "pid" / "master.pid").read_text()), signal.SIGKILL)

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
        return count_mails(self._mail / recipient, message_id)

    def acceptances(self, recipient: str) -> Counter[str]:
        """Count how often it accepted each message for a recipient.

        Where it was killed it may itself deliver a message again; that has the same Received header.
        """
        wait_until(self._idle, "Postfix to deliver what it has accepted")
        mails = mailbox.Maildir(self._mail / recipient)
        return Counter(message_id for message_id, _ in {(mail["Message-ID"], mail["Received"]) for mail in mails})

    def _entry(self, service: Service) -> str:
        """Return the lines of master.cf; the service's settings are of main.cf."""
        options = "".join(f"  -o {{ {key} = {value} }}\n" for key, value in service.settings.items())
        processes, port = "1" if service.program == "postscreen" else "-", self.port(service.name)
        return (
            f"127.0.0.1:{port} inet n - n - {processes} {service.program}\n  -o syslog_name={service.name}\n{options}"
        )

    def _logged(self, service: str) -> list[str]:
        lines = self.log.read_text(errors="replace").splitlines()
        return [line.partition(mark)[2] for line in lines if (mark := f" {service}/") in line]

    def _idle(self) -> bool:
        queues = (self._queue / name for name in ("incoming", "active", "deferred"))
        files = (Path(folder, name) for queue in queues for folder, _, names in os.walk(queue) for name in names)
        return not any(map(_is_whole, files))

    def _control(self, verb: str) -> None:
        done = run("postfix", "-c", str(self._configuration), verb)
        if done.returncode:
            log = self.log.read_text() if self.log.exists() else ""
            message = f"postfix {verb}: {done.stderr}{log}"
            raise RuntimeError(message)


def _is_whole(file: Path) -> bool:
    """Whether a queue file is that of an accepted message: until all of it has come, its mode is 0600."""
    try:
        return bool(file.stat().st_mode & stat.S_IXUSR)
    except FileNotFoundError:  # delivered meanwhile
        return False
