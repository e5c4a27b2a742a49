"""``send``: send one message from standard input, and tell the story as it goes."""

from __future__ import annotations

import argparse
import asyncio
import email
import getpass
import os
import sys
import warnings
from dataclasses import replace
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any

import aiosmtplib

from smtpretry import log
from smtpretry.client import RetryingSMTP
from smtpretry.envelope import prepare
from smtpretry.outcome import Status
from smtpretry.policy import RetryPolicy
from smtpretry.replies.rule import WAITING

from . import UNREADABLE, unheard

if TYPE_CHECKING:
    from collections.abc import Callable

    from smtpretry.delivery import Delivery
    from smtpretry.outcome import Outcome, Step

_TLS: dict[str, dict[str, Any]] = {
    "auto": {},
    "starttls": {"start_tls": True},
    "implicit": {"use_tls": True},
    "never": {"start_tls": False},
}
_STYLES = {Status.ACCEPTED: "green", Status.REFUSED: "red"}


def add_to(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the parser's."""
    send = commands.add_parser(
        "send",
        help="send a message from standard input",
        description="Send the message on standard input (a .eml file), with retries, and tell what happens. The exit "
        "code is 1 where somebody has not got it.",
    )
    send.add_argument("--host", default="localhost", help="the server; default: localhost")
    send.add_argument("--port", type=int, help="default: 25, with --tls starttls 587, with implicit 465")
    send.add_argument("--tls", choices=tuple(_TLS), default="auto", help="default: STARTTLS where it is offered")
    send.add_argument("--username", help="log in; the password is in SMTP_PASSWORD, or asked for")
    send.add_argument("--sender", help="default: the message's Sender or From")
    send.add_argument(
        "--to", action="append", metavar="ADDRESS", help="a recipient; default: the message's To, Cc and Bcc"
    )
    send.add_argument("--give-up-after", type=_seconds, default="3600", metavar="SECONDS", help="default: an hour")
    send.set_defaults(run=_send)


def _seconds(said: str) -> timedelta:
    try:
        return timedelta(seconds=float(said))
    except (ValueError, OverflowError):
        msg = f"{said!r} is no number of seconds"
        raise argparse.ArgumentTypeError(msg) from None


def _send(options: argparse.Namespace) -> int:
    say = partial(_say, _voice())
    try:
        message = email.message_from_bytes(sys.stdin.buffer.read())
        delivery = prepare(message, sender=options.sender, recipients=options.to)
        policy = RetryPolicy(give_up_after=options.give_up_after)
        smtp = RetryingSMTP(_client(options), policy, username=options.username, password=_password(options))
    except ValueError as error:
        print(error, file=sys.stderr)
        return UNREADABLE
    try:
        with log.besides_the_story():
            asyncio.run(_tell(smtp, delivery, say))
    finally:  # after Ctrl-C, too
        for who, outcome in delivery.outcomes.items():
            say(f"{who}: {_end(delivery, outcome)}", _STYLES.get(outcome.status, "yellow"))
    if delivery.cure:
        say(delivery.cure, "bold")
    return 0 if len(delivery.accepted) == len(delivery.outcomes) else 1


def _client(options: argparse.Namespace) -> aiosmtplib.SMTP:
    return aiosmtplib.SMTP(hostname=options.host, port=options.port, **_TLS[options.tls])


def _password(options: argparse.Namespace) -> str | None:
    if options.username is None:
        return None
    if (password := os.environ.get("SMTP_PASSWORD")) is not None:
        return password
    try:
        with warnings.catch_warnings(action="error", category=getpass.GetPassWarning):  # standard input is the message
            return getpass.getpass()
    except (EOFError, getpass.GetPassWarning):
        msg = "there is no terminal to ask for the password: set SMTP_PASSWORD"
        raise ValueError(msg) from None


async def _tell(smtp: RetryingSMTP, delivery: Delivery, say: Callable[[str, str], None]) -> None:
    """Make one attempt after the other, and say what each has brought."""
    async with smtp:
        while True:
            await smtp.attempt(delivery)
            for step in delivery.attempts[-1].steps:
                say(_line(delivery, step), "")
            if (when := delivery.next_at) is None:
                return
            seconds = max(0.0, when - smtp.policy.clock())
            say(f"attempt {len(delivery.attempts) + 1} in {seconds:.0f} s: {', '.join(delivery.due(when))}", "dim")
            await asyncio.sleep(seconds)


def _line(delivery: Delivery, step: Step) -> str:
    """What was said, and what is done about it: nothing more, where the policy has given up since."""
    concerned = [delivery.outcomes[who] for who in step.recipients]
    ended = [one.status is not Status.PENDING and _why(delivery, one) is step for one in concerned]
    if step.action in WAITING and ended and all(ended):
        return f"{replace(step, action=None, wait=0.0)} -> given up"
    return str(step)


def _end(delivery: Delivery, outcome: Outcome) -> str:
    """What became of a recipient, and the reply that says why."""
    if outcome.status is Status.PENDING and outcome.uncertain:
        return "uncertain: broken off before the server's answer"
    end = outcome.status.value.lower()
    if outcome.status is Status.PENDING:
        end = "not sent"
    elif outcome.status is Status.REFUSED and (step := _why(delivery, outcome)) and step.action in WAITING:
        end = "given up"
    return f"{end}: {outcome.reply}" if outcome.reply else end


def _why(delivery: Delivery, outcome: Outcome) -> Step | None:
    """The step that had the last word about a recipient."""
    steps = (step for attempt in reversed(delivery.attempts) for step in reversed(attempt.steps))
    return next((step for step in steps if (step.stage, step.reply) == (outcome.stage, outcome.reply)), None)


def _say(voice: Callable[[str, str], None], line: str, style: str) -> None:
    """Say a line; the message is sent all the same where nobody hears of it."""
    try:
        voice(line, style)
    except (OSError, SystemExit) as error:  # SystemExit is what rich makes of a reader that has gone
        unheard(error)


def _voice() -> Callable[[str, str], None]:
    """How to say a line in a style: with rich, where that is installed."""
    try:
        from rich.console import Console  # noqa: PLC0415 - where it is there
    except ImportError:
        return lambda line, _: print(line, flush=True)
    return partial(_in_colour, Console(highlight=False, soft_wrap=True))


def _in_colour(console: Any, line: str, style: str) -> None:  # noqa: ANN401 - rich's
    console.print(line, style=style, markup=False)
