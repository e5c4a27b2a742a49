"""``serve``: a scripted SMTP server for tests in any language. It takes every message, and prints it."""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import signal
import ssl
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import UNREADABLE, unheard

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from smtpretry.testing import ReceivedMessage, ScriptedServer
    from smtpretry.testing.scripts import Script


def add_to(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the parser's."""
    serve = commands.add_parser(
        "serve",
        help="be an SMTP server that answers as told, for tests",
        description="Be an SMTP server on 127.0.0.1 that takes every message and prints it, but answers as told. "
        "Verbs: CONNECT EHLO HELO STARTTLS AUTH MAIL RCPT DATA END_OF_DATA RSET QUIT. "
        "Ctrl-C ends it; the exit code is 1 where a --once was not reached.",
    )
    serve.add_argument("--port", type=int, default=0, help="default: a free one, which is printed")
    for option, times, help_ in (
        ("--on", None, "answer so, each time: 'RCPT bob@* 450 4.2.0 later', or 'MAIL 421 4.3.2 busy'"),
        ("--once", 1, "the same, but the first time only"),
    ):
        serve.add_argument(
            option,
            dest="scripts",
            action="append",
            default=[],
            type=_script(times),
            metavar="'VERB [PATTERN] REPLY'",
            help=help_,
        )
    serve.add_argument("--auth", type=_login, metavar="USER:PASSWORD", help="require this log-in")
    serve.add_argument(
        "--tls",
        nargs="?",
        const=True,
        default=False,
        choices=("required", "implicit"),
        help="offer STARTTLS; required: refuse mail without it; implicit: TLS from the start",
    )
    serve.add_argument("--ca", type=Path, metavar="FILE", help="write there what clients are to trust, as PEM")
    serve.add_argument("--max-rate", type=_rate, metavar="MESSAGES/SECONDS", help="such as 14/1; 454 beyond it")
    serve.add_argument("--json", action="store_true", help="one JSON object a line")
    serve.set_defaults(run=_serve)


def _script(times: int | None) -> Callable[[str], tuple[str, str, str, int | None]]:
    def script(said: str) -> tuple[str, str, str, int | None]:
        if found := re.fullmatch(r"(\w+)\s+(?:(\S+)\s+)??(\d{3}\b.*)", said.strip(), re.DOTALL):
            return found[1], found[2] or "*", found[3].replace("\\n", "\n"), times
        msg = f"{said!r} is no verb, pattern and reply, such as 'RCPT bob@* 450 4.2.0 later'"
        raise argparse.ArgumentTypeError(msg)

    return script


def _login(said: str) -> tuple[str, str]:
    user, colon, password = said.partition(":")
    if not (user and colon):
        msg = "a user and a password, such as app:secret"
        raise argparse.ArgumentTypeError(msg)
    return user, password


def _rate(said: str) -> tuple[int, float]:
    try:
        messages, _, seconds = said.partition("/")
        return int(messages), float(seconds or 1)
    except ValueError:
        msg = f"{said!r} is no number of messages and of seconds, such as 14/1"
        raise argparse.ArgumentTypeError(msg) from None


def _serve(options: argparse.Namespace) -> int:
    try:
        from smtpretry.testing import ScriptedServer  # noqa: PLC0415 - it needs an extra

        server = ScriptedServer(port=options.port, tls=options.tls, auth=options.auth, max_rate=options.max_rate)
        server.on_script = None if options.json else _tell_script
        for verb, pattern, reply, times in options.scripts:
            server.on(verb, pattern, reply, times=times)
        if options.ca:
            options.ca.write_text(_authority(server), encoding="ascii")
        return asyncio.run(_until_stopped(server, as_json=options.json))
    except (ImportError, ValueError, OverflowError, OSError) as error:
        print(error, file=sys.stderr)
        return UNREADABLE


async def _until_stopped(server: ScriptedServer, *, as_json: bool) -> int:
    stopped, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stopped.set)
    server.messages = _Told(_told_as_json if as_json else _told)
    await server.start()
    where = {"event": "listening", "host": server.hostname, "port": server.port}
    print(json.dumps(where) if as_json else f"listening on {server.hostname}:{server.port}", flush=True)
    await stopped.wait()
    await server.stop()
    try:
        server.verify()
    except AssertionError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


class _Told(list["ReceivedMessage"]):
    """The messages that a server took; each is told when it comes."""

    def __init__(self, tell: Callable[[int, ReceivedMessage], str]) -> None:
        super().__init__()
        self._tell = tell

    def append(self, message: ReceivedMessage) -> None:
        """Print it, too."""
        super().append(message)
        _say(self._tell(len(self), message))


def _say(line: str) -> None:
    """Print it; the client is served all the same where nobody reads that."""
    try:
        print(line, flush=True)
    except OSError as error:
        unheard(error)


def _tell_script(script: Script, subjects: Sequence[str]) -> None:
    reply = (script.reply or b"").decode(errors="backslashreplace").strip()
    _say(f"{' '.join([script.verb, *subjects]).strip()}: {reply}")


def _told(number: int, message: ReceivedMessage) -> str:
    about = ["over TLS" if message.tls else "in the clear", f"on connection {message.connection}"]
    if message.authenticated is not None:
        about.append(f"logged in as {message.authenticated}")
    head = f"message {number}: from <{message.sender}> to {', '.join(message.recipients)} ({', '.join(about)})"
    return "\n".join([head, *(f"    {line}" for line in _text(message).splitlines())])


def _told_as_json(number: int, message: ReceivedMessage) -> str:
    facts: dict[str, Any] = {
        "event": "message",
        "number": number,
        "sender": message.sender,
        "recipients": message.recipients,
        "options": message.options,
        "authenticated": message.authenticated,
        "tls": message.tls,
        "connection": message.connection,
        "content": _text(message),
    }
    return json.dumps(facts, ensure_ascii=False)


def _text(message: ReceivedMessage) -> str:
    return message.content.decode(errors="backslashreplace")


def _authority(server: ScriptedServer) -> str:
    return "".join(map(ssl.DER_cert_to_PEM_cert, server.tls_context.get_ca_certs(binary_form=True)))
