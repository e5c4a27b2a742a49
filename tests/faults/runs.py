"""How one cell of the matrix is run, and what must be true afterwards."""

from __future__ import annotations

import asyncio
import re
import socket
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import aiosmtplib
import tenacity
import virtual

from smtpretry import Delivery, RetryingSMTP, RetryPolicy, Status, UncertainDelivery
from smtpretry.testing import ReceivedMessage, ScriptedServer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from aiosmtplib import SMTPResponse

    from smtpretry.testing import Script

from .matrix import (
    BEFORE_MAIL,
    FRIEND,
    GIVE_UP_AFTER,
    HUGE,
    LARGE,
    MANY,
    NAME,
    PATIENCE,
    RECIPIENTS,
    SENDER,
    SMALL,
    STRANGER,
    UNCLEAN,
    Cell,
    Mode,
    Place,
)

# --- The server's side ------------------------------------------------------------------------------------------------


class Taken(list[ReceivedMessage]):
    """The messages that a server took, each noted among its commands too: so that it shows what was offered after."""

    def __init__(self, server: ScriptedServer) -> None:
        super().__init__(server.messages)
        self.server = server

    def append(self, message: ReceivedMessage) -> None:
        """Take it."""
        super().append(message)
        self.server.commands.append(f"(took {name_of(message)} for {', '.join(message.recipients)})")


def name_of(message: ReceivedMessage) -> str:
    """Return its Message-ID; quicker than by parsing it."""
    found = re.search(rb"(?im)^Message-ID: *(\S+)", message.content)
    return found[1].decode() if found else ""


def copies(server: ScriptedServer, recipient: str, name: str = NAME) -> int:
    """How many copies of a message the server took for a recipient."""
    return sum(recipient in message.recipients and name_of(message) == name for message in server.messages)


def server_for(place: Place, *, ahead: bool = True) -> ScriptedServer:
    """Return a server for the session of a place."""
    if place.session == "clear":
        server = ScriptedServer(pipelining=ahead)
    else:
        server = ScriptedServer(tls=True, auth=("app", "secret"), mechanisms=[place.mechanism], pipelining=ahead)
    server.messages = Taken(server)
    return server


def take_little(server: ScriptedServer) -> None:
    """Let the kernel keep little of what is sent and not read: else a body of megabytes is away at once."""
    loop = asyncio.get_running_loop()
    connect = loop.create_connection

    async def connect_with_little(*args: Any, **options: Any) -> tuple[asyncio.Transport, asyncio.BaseProtocol]:
        transport, protocol = await connect(*args, **options)
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 128 * 1024)
        return transport, protocol

    loop.create_connection = connect_with_little  # type: ignore[assignment,method-assign]
    assert server._server is not None
    server._server.sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 256 * 1024)


def install(cell: Cell, server: ScriptedServer) -> Script:
    """Put the fault of a cell into the server."""
    place, times = cell.place, None if cell.ever else 1
    if place.skip:
        server.fail_at(place.verb, "bytewise", times=place.skip, optional=True)
    script = cell.fault.install(server, place, times)
    if place.refusal:
        server.on("DATA", place.refusal, times=times, optional=True)
    return script


# --- The client's side ------------------------------------------------------------------------------------------------


class Watched(RetryingSMTP):
    """A client that keeps the deliveries it makes, so that they can be compared with what the caller gets."""

    deliveries: list[Delivery]

    def __init__(self, *args: Any, **options: Any) -> None:
        """As RetryingSMTP."""
        super().__init__(*args, **options)
        self.deliveries = []

    async def attempt(self, delivery: Delivery, **options: Any) -> Delivery:
        """As RetryingSMTP's, and keep it."""
        if delivery not in self.deliveries:
            self.deliveries.append(delivery)
        return await super().attempt(delivery, **options)


def policy(mode: Mode = "resend", **options: Any) -> RetryPolicy:
    """Return the default policy on the virtual clock, without jitter, and with less patience: it saves time."""
    defaults: dict[str, Any] = {
        "wait": tenacity.wait_exponential(multiplier=60, max=900),
        "give_up_after": GIVE_UP_AFTER,
    }
    return RetryPolicy(**(defaults | {"on_uncertain": mode, "clock": virtual.clock} | options))


def client_for(server: ScriptedServer, mode: Mode = "resend", **options: Any) -> Watched:
    """Return a client for a server, with credentials where there is something to log in with."""
    if server.credentials:
        options = {"username": "app", "password": "secret"} | options
    return Watched(server.client(timeout=60), policy(mode), **options)


async def probe(smtp: RetryingSMTP, server: ScriptedServer) -> list[str]:
    """Send two messages: one that is refused, and one that arrives. Return what is wrong with a client that is not well.

    A client that is out of step by a reply, that holds its lock or that thinks a dead connection alive, fails at this.
    """
    problems = list[str]()
    script = server.on("RCPT", STRANGER, "550 5.1.1 No such user", optional=True)
    before = len(server.received(FRIEND))
    try:
        async with asyncio.timeout(PATIENCE):
            refused = await smtp.deliver(b"Subject: refused\r\n\r\n", sender=SENDER, recipients=[STRANGER])
            arrived = await smtp.deliver(b"Subject: arrives\r\n\r\n", sender=SENDER, recipients=[FRIEND])
    except Exception as error:  # noqa: BLE001 - whatever it is, it is reported
        return [f"the next send does not work: {error!r}"]
    reply = refused.refused.get(STRANGER)
    if reply is None or (reply.code, reply.text) != (550, "No such user"):
        problems.append(f"the next send reports {refused.outcomes[STRANGER]} where the server said 550")
    if arrived.accepted != [FRIEND] or len(server.received(FRIEND)) != before + 1:
        problems.append(f"the next mail: {arrived.outcomes[FRIEND]}, and {len(server.received(FRIEND))} arrived")
    server.scripts.remove(script)
    return problems


# --- The judgement ----------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """What happened in a cell."""

    cell: Cell
    injected: int = 0  # how often the fault was reached
    copies: dict[str, int] = field(default_factory=dict)
    reported: dict[str, str] = field(default_factory=dict)  # "accepted", "failed" or "uncertain", as the caller sees it
    problems: list[str] = field(default_factory=list)

    @property
    def lost(self) -> int:
        """How many mails the caller has to take for delivered, and nobody has."""
        return sum(self.reported.get(who) == "accepted" and not n for who, n in self.copies.items())

    @property
    def twice(self) -> int:
        """How many mails arrived more than once."""
        return sum(n > 1 for n in self.copies.values())

    @property
    def wrong(self) -> int:
        """How many mails the caller has to take for refused, and they arrived."""
        return sum(self.reported.get(who) == "failed" and n > 0 for who, n in self.copies.items())

    @property
    def given_up(self) -> int:
        """How many mails did not arrive, although the server would have taken them, then or later."""
        return sum(not n and self.cell.expected(who)[0] == {Status.ACCEPTED} for who, n in self.copies.items())

    def __str__(self) -> str:
        """For a report."""
        return f"{self.cell}: " + "; ".join(self.problems)


def clean(text: str) -> bool:
    """Whether it is one line that no terminal minds."""
    return not UNCLEAN.search(text)


def disagreements(  # noqa: C901, PLR0912 - one after the other
    delivery: Delivery, result: tuple[dict[str, SMTPResponse], str] | None, error: BaseException | None
) -> Iterator[str]:
    """Compare what `send_message` returned or raised with the delivery."""
    failed = {who for who, one in delivery.outcomes.items() if one.status in (Status.REFUSED, Status.UNCERTAIN)}
    if delivery.pending:
        yield f"without an end: {delivery.pending}"
    if result is not None:
        errors, response = result
        if not delivery.accepted:
            yield "returned, and nobody was accepted"
        if set(errors) != failed:
            yield f"returned errors for {sorted(errors)}, where {sorted(failed)} failed"
        for who, said in errors.items():
            reply = delivery.outcomes[who].reply
            if reply is None or (reply.code, reply.message) != tuple(said):
                yield f"returned {said} for {who}, where the delivery has {reply}"
        if response != delivery.response or not response:
            yield f"returned {response!r}, where the server said {delivery.response!r}"
    elif error is None or delivery.accepted:
        yield f"raised {error!r}, and accepted are {delivery.accepted}"
    else:
        if not isinstance(error, aiosmtplib.SMTPException):
            yield f"raised {error!r}, which aiosmtplib does not"
        if isinstance(error, UncertainDelivery) != bool(delivery.uncertain):
            yield f"raised {error!r}, and uncertain are {delivery.uncertain}"
        if getattr(error, "delivery", None) is not delivery:
            yield f"{error!r} does not carry its delivery"
        notes = getattr(error, "__notes__", [])
        if len(notes) != 1 or not all(clean(note) for note in notes):
            yield f"notes: {notes}"


def broken_promises(cell: Cell, delivery: Delivery, server: ScriptedServer) -> Iterator[str]:
    """Compare the delivery with what the server did."""
    for who, outcome in delivery.outcomes.items():
        n, (statuses, code) = copies(server, who), cell.expected(who)
        if outcome.status is Status.ACCEPTED and n == 0:
            yield f"{who} is lost in silence"
        if outcome.status is Status.REFUSED and n > 0:
            yield f"{who} is reported refused, and has {n}"
        if outcome.status in (Status.REFUSED, Status.UNCERTAIN) and outcome.reply is None:
            yield f"{who} has no reply that says why"
        if n > 1 and (cell.mode == "raise" or not outcome.uncertain):
            yield f"{who} has it {n} times"
        if outcome.uncertain and not cell.dot_is_out:
            yield f"{who} is uncertain without a cause"
        if outcome.status not in statuses:
            yield f"{who} is {outcome.status.value} ({outcome.reply}), not {' or '.join(s.value for s in statuses)}"
        elif code is not None and outcome.reply is not None and outcome.reply.code != code:
            yield f"{who} is {outcome.status.value} by {outcome.reply}, where the server said {code}"
    contents = {
        message.content for message in server.messages if message.message["Message-ID"] == "<three@example.com>"
    }
    if len(contents) > 1:
        yield "not every attempt sent the same bytes"


def offered_again(cell: Cell, commands: list[str]) -> Iterator[str]:
    """Find who was offered the message after it was accepted: everybody whom the server took it from in certainty."""
    if cell.dot_is_out:
        return
    have = set[str]()
    for command in commands:
        if command.startswith(f"(took {NAME}"):
            have.update(who for who in RECIPIENTS if who in command)
        elif command.startswith("RCPT") and any(f"<{who}>" in command for who in have):
            yield f"{command} came after it was accepted"


async def run(cell: Cell) -> Run:
    """Run a cell with our client."""
    seen = Run(cell)
    loop = asyncio.get_running_loop()
    message = SMALL if not cell.place.large else HUGE if cell.place.verb == "BODY" else LARGE
    async with server_for(cell.place, ahead=cell.ahead) as server:
        if message is HUGE:
            take_little(server)
        smtp = client_for(server, cell.mode)
        if cell.used:
            await smtp.sendmail(SENDER, [FRIEND], b"Subject: before\r\n\r\n")
            if cell.place.verb in BEFORE_MAIL:
                server.disconnect()
        script = install(cell, server)
        result: tuple[dict[str, SMTPResponse], str] | None = None
        error: BaseException | None = None
        began, commands = loop.time(), len(server.commands)
        try:
            async with asyncio.timeout(PATIENCE):
                result = await smtp.sendmail(SENDER, list(RECIPIENTS), message)
                if cell.place.verb == "QUIT":
                    await smtp.aclose()
                    await smtp.__aenter__()
        except Exception as caught:  # noqa: BLE001 - it is judged
            error = caught
        delivery = smtp.deliveries[-1]
        seen.injected = script.used
        if not script.used:
            seen.problems.append("the fault was not reached")
        if len(server.commands) - commands > MANY:
            seen.problems.append(f"{len(server.commands) - commands} commands")
        if loop.time() - began > PATIENCE:
            seen.problems.append(f"it took {loop.time() - began:.0f} s")
        server.clear()
        if cell.place.verb in ("AUTH", "CHALLENGE") and cell.fault.kind == "5xx":
            await asyncio.sleep(15)  # a refused password is not sent again on the same connection
        seen.problems += [
            *broken_promises(cell, delivery, server),
            *disagreements(delivery, result, error),
            *offered_again(cell, server.commands),
            *await probe(smtp, server),
        ]
        await smtp.aclose()
        seen.copies = {who: copies(server, who) for who in RECIPIENTS}
        names = {Status.ACCEPTED: "accepted", Status.REFUSED: "failed", Status.UNCERTAIN: "uncertain"}
        seen.reported = {who: names.get(one.status, "pending") for who, one in delivery.outcomes.items()}
    return seen
