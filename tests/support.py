"""What the tests of the core share: names, messages, a client on a scripted server, and time that costs none."""

from __future__ import annotations

import functools
import ssl
from contextlib import asynccontextmanager
from email.message import EmailMessage
from typing import TYPE_CHECKING, Any

import virtual

from smtpretry import RetryingSMTP, RetryPolicy
from smtpretry.testing import ScriptedServer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine
    from pathlib import Path

APP, ANN, BOB, CAT, DAN, EVE = (f"{name}@example.com" for name in ("app", "ann", "bob", "cat", "dan", "eve"))
BODY = (
    b"Subject: hello\r\nMessage-ID: <1@example.com>\r\nDate: Mon, 01 Jan 2024 00:00:00 +0000\r\n\r\n.dots\r\n..more\r\n"
)
USER, PASSWORD = "app-user", "pa55-Wort-never-shown"
GREYLISTED = "450 4.2.0 Greylisted"
LOG_IN = "530 5.7.0 Authentication required"


def virtually(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run a test on a loop of its own whose waits take no time."""

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        virtual.run(test(*args, **kwargs))

    return run


def patient(**settings: Any) -> RetryPolicy:
    """Return a policy that lives in the time of the virtual loop."""
    return RetryPolicy(**({"clock": virtual.clock} | settings))


def once(**settings: Any) -> RetryPolicy:
    """Return a policy that makes a single attempt."""
    return patient(max_attempts=1, **settings)


@asynccontextmanager
async def talk(
    policy: RetryPolicy | None = None,
    *,
    client: dict[str, Any] | None = None,
    credentials: dict[str, Any] | None = None,
    cls: type[ScriptedServer] = ScriptedServer,
    **server: Any,
) -> AsyncIterator[tuple[ScriptedServer, RetryingSMTP]]:
    """Start a server and a client for it, and verify the server's scripts at the end."""
    async with (
        cls(**server) as running,
        RetryingSMTP(running.client(**client or {}), policy or patient(), **credentials or {}) as smtp,
    ):
        yield running, smtp


def letter(*recipients: str, **headers: str) -> EmailMessage:
    """Return a message object without Message-ID and Date."""
    message = EmailMessage()
    message["From"], message["To"], message["Subject"] = APP, ", ".join(recipients or (ANN,)), "hello"
    for name, value in headers.items():
        message[name.replace("_", "-")] = value
    message.set_content("How are you?\n")
    return message


def transactions(server: ScriptedServer) -> list[list[str]]:
    """Return the recipients that were offered, for each MAIL that the server saw."""
    offered: list[list[str]] = []
    for command in server.commands:
        verb, _, argument = command.partition(" ")
        if verb == "MAIL":
            offered.append([])
        elif verb == "RCPT":
            offered[-1].append(argument.partition("<")[2].partition(">")[0])
    return offered


def ca_bundle(server: ScriptedServer, folder: Path) -> str:
    """Write the authorities that the server's clients trust to a file, and return its name."""
    authorities = server.tls_context.get_ca_certs(binary_form=True)
    file = folder / "authorities.pem"
    file.write_text("".join(map(ssl.DER_cert_to_PEM_cert, authorities)), encoding="ascii")
    return str(file)
