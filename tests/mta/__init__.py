"""Real mail servers for the tests, on loopback: Postfix, with postgrey and Dovecot beside it; Exim; and aiosmtpd.

Everything lives in temporary directories and none of it touches the system's own configuration. Each set-up that a test
wants is one `Service`: one more `smtpd` of the same Postfix, or an Exim or an aiosmtpd of its own, on a port of its own,
with settings of its own. Nothing leaves the machine: what a server accepts, for any domain, goes into a maildir.
"""

from .aiosmtpd import Aiosmtpd
from .exim import Exim
from .helpers import Dovecot, Helper, Postgrey
from .postfix import Postfix
from .server import (
    HOME,
    PASSWORD,
    PATIENCE,
    USERNAME,
    MailServer,
    Server,
    Service,
    free_ports,
    require,
    wait_until,
    workplace,
)

__all__ = [
    "HOME",
    "PASSWORD",
    "PATIENCE",
    "USERNAME",
    "Aiosmtpd",
    "Dovecot",
    "Exim",
    "Helper",
    "MailServer",
    "Postfix",
    "Postgrey",
    "Server",
    "Service",
    "free_ports",
    "require",
    "wait_until",
    "workplace",
]
