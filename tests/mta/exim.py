"""A private Exim: one service, and all that it says and hears in its log."""

from __future__ import annotations

import os
import re
import shutil
from typing import TYPE_CHECKING

from mirakuru import PidExecutor

from .server import (
    ENVIRONMENT,
    HOME,
    PASSWORD,
    PATH,
    PATIENCE,
    USERNAME,
    MailServer,
    count_mails,
    free_ports,
    run,
    wait_until,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from .server import Service


class Exim(MailServer):
    """Exim with one service, and a maildir per recipient.

    The service's settings are main options of Exim's configuration, but for `acl_smtp_...`, the statements of that ACL
    (of acl_smtp_rcpt: what comes before the usual ones), and `server_condition`, which says when a password is right.
    They may say THIS_PORT, RIGHT_PASSWORD, ONCE (true the first time that it is asked) and AGAIN (likewise).
    """

    program = "exim4"
    remedy = "Debian has it in Postfix's place; .ci/run shows how to take it out of its package, for SMTPRETRY_EXIM"
    out_of_step = ("SMTP protocol synchronization error", "SMTP syntax error", "unrecognized command")

    _MAIN = """\
THIS_PORT = {port}
ONCE = ${{run{{/bin/mkdir $spool_directory/once}}{{yes}}{{no}}}}
AGAIN = ${{run{{/bin/mkdir $spool_directory/again}}{{yes}}{{no}}}}
RIGHT_PASSWORD = ${{if and{{{{eq{{$auth2}}{{{username}}}}}{{eq{{$auth3}}{{{password}}}}}}}}}

primary_hostname = mx.{home}
exim_path = {binary}
exim_user = nobody
exim_group = nogroup
deliver_drop_privilege = yes
keep_environment =
spool_directory = {directory}/spool
log_file_path = {directory}/%slog
pid_file_path = {directory}/pid
log_selector = +pipelining +smtp_syntax_error
local_interfaces = 127.0.0.1
daemon_smtp_ports = THIS_PORT
tls_certificate = {directory}/certificate.pem
{options}
begin acl
{acls}
begin routers
mailboxes:
  driver = accept
  address_data = ${{lookup{{$local_part@$domain}}lsearch{{{directory}/mailboxes}}{{$value}}fail}}
  transport = maildirs

begin transports
maildirs:
  driver = appendfile
  maildir_format
  directory = {directory}/mail/$address_data

begin authenticators
plain:
  driver = plaintext
  public_name = PLAIN
  server_prompts = :
  server_advertise_condition = ${{if def:tls_in_cipher}}
  server_condition = {server_condition}
  server_set_id = $auth2
"""
    _RCPT = f"""
  accept authenticated = *
  require message = relay not permitted
          domains = {HOME}
  require verify = recipient"""

    def __init__(self, directory: Path, service: Service, mailboxes: Sequence[str], certificate: bytes) -> None:
        """Take the service that it offers, the addresses that it knows, and the certificate with its key."""
        super().__init__(directory)
        [self._port] = free_ports(1)
        self._spool, self._mail, self._configuration = directory / "spool", directory / "mail", directory / "exim.conf"
        for path in (directory, self._spool, self._mail):
            path.mkdir(exist_ok=True)
            shutil.chown(path, "nobody", "nogroup")
        self._configuration.write_text(self._configure(service.settings))
        (directory / "mailboxes").write_text("".join(f"{address}: {address}\n" for address in mailboxes))
        (directory / "certificate.pem").write_bytes(certificate)

    @classmethod
    def binary(cls) -> str | None:
        """Return what SMTPRETRY_EXIM names, or else the exim4 or exim on PATH."""
        names = [name] if (name := os.environ.get("SMTPRETRY_EXIM")) else ["exim4", "exim"]
        return next(filter(None, (shutil.which(name, path=PATH) for name in names)), None)

    @classmethod
    def unavailable(cls) -> str | None:
        """Say so too where it does not run, for want of a library or of the user that it was built for."""
        if reason := super().unavailable():
            return reason
        tried = run(cls.binary(), "-C", "/dev/null", "-bV")
        return f"exim4 not started: {tried.stderr.strip()}: {cls.remedy}" if tried.returncode else None

    def start(self) -> None:
        """Start it; it listens when this returns."""
        with self.log.open("wb") as log:
            process = PidExecutor(
                [self.binary(), "-C", str(self._configuration), "-bdf", "-d-all+receive"],
                str(self.directory / "pid"),
                envvars=ENVIRONMENT,
                stderr=log.fileno(),
                timeout=PATIENCE,
                sleep=0.02,
            )
            self._process = process.start()

    def stop(self) -> None:
        """End it with the processes that serve who is connected."""
        self._process.kill()

    def port(self, _service: str) -> int:
        """Return the port of its service."""
        return self._port

    def replies(self, _service: str) -> list[str]:
        """Return every reply that it has sent, as its own log has it."""
        return re.findall(r"^ *\d+ (?:SMTP[|>]>|      ) (\d{3}[ -].*)$", self.log.read_text(), re.MULTILINE)

    def copies(self, recipient: str, message_id: str) -> int:
        """Count the copies of a message in a recipient's mailbox, once nothing is on its way any more."""
        wait_until(self._idle, "Exim to deliver what it has accepted")
        return count_mails(self._mail / recipient, message_id)

    def pipelined(self) -> list[bool]:
        """Tell of each message that it took, in order, whether commands came ahead of the answers (its log's "L")."""
        marks = re.findall(r" <= .*? P=\S+(?: (L\S*))? ", self.log.read_text())
        return [bool(mark) and not mark.endswith("-") for mark in marks]

    def _configure(self, settings: Mapping[str, str]) -> str:
        acls = {"acl_smtp_rcpt": "", "acl_smtp_data": ""}
        acls |= {name: value for name, value in settings.items() if name.startswith("acl_smtp_")}
        options = {name: value for name, value in settings.items() if name not in {*acls, "server_condition"}}
        options |= {name: name for name in acls}
        acls["acl_smtp_rcpt"] += self._RCPT
        return self._MAIN.format(
            home=HOME,
            username=USERNAME,
            password=PASSWORD,
            binary=self.binary(),
            directory=self.directory,
            port=self._port,
            options="".join(f"{name} = {value}\n" for name, value in options.items()),
            acls="".join(f"{name}:\n  {statements}\n  accept\n\n" for name, statements in acls.items()),
            server_condition=settings.get("server_condition", "RIGHT_PASSWORD"),
        )

    def _idle(self) -> bool:
        return not any(files for _, _, files in os.walk(self._spool / "input"))
