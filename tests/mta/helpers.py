"""The servers that Postfix asks: a greylist, and the keeper of the password."""

from __future__ import annotations

import shutil
from abc import abstractmethod
from typing import TYPE_CHECKING

from mirakuru import UnixSocketExecutor

from .server import ENVIRONMENT, PASSWORD, PATIENCE, USERNAME, Server, run

if TYPE_CHECKING:
    from .postfix import Postfix


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
            self.command(), str(self.socket), envvars=ENVIRONMENT, stdout=None, timeout=PATIENCE, sleep=0.02
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
        version = run("dovecot", "--version").stdout.split()[0]
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
