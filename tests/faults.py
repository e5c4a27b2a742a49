"""Every fault at every place of a transaction: the matrix, how one cell of it is run, and what must be true afterwards.

A cell is one message to three recipients, sent by one client to a scripted server that fails at one place in one way,
once or for ever. The server is the witness: what it took is compared with what the client reports. `test_faults.py`
enumerates the cells, `reliability.py` counts them.

Not in the matrix, because no client can know better:

*   A server that lies: it takes the message and says 451, or says 250 and drops it. The reply is all that there is.
*   A second reply in a packet of its own, while the client waits for the first: it *is* the reply, as far as anybody can
    tell. In the same packet as a reply (the matrix has that) it can be told, and between two commands it is thrown away.
    After a refused body it is the one way to lose a mail; after any other command the client falls out of step by one
    reply, and notices at DATA, whose 354 is like no other reply (`test_hostile.py` shows it).
*   The same inside a body that went out in one write: a 250 that comes before the dot was read counts as the answer to
    it. The matrix has the case where the server takes the message after all.
"""

from __future__ import annotations

import asyncio
import re
import socket
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal

import aiosmtplib
import tenacity
import virtual

from smtpretry import NO_REPLY, Delivery, RetryingSMTP, RetryPolicy, Status, UncertainDelivery
from smtpretry.testing import ReceivedMessage, ScriptedServer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from aiosmtplib import SMTPResponse

    from smtpretry.testing import Script

Mode = Literal["resend", "raise"]
MODES: tuple[Mode, ...] = ("resend", "raise")

SENDER = "app@example.com"
RECIPIENTS = ("ann@example.com", "bob@example.com", "carol@example.com")
STRANGER = "nobody@example.com"  # whom `probe` finds refused
FRIEND = "dave@example.com"  # whom `probe` finds accepted
NAME = "<three@example.com>"
SMALL = b"Subject: three\r\nMessage-ID: <three@example.com>\r\n\r\n.hello\r\n"
LARGE = SMALL + (b"x" * 988 + b"\r\n") * 100  # in more than one write
HUGE = SMALL + (b"x" * 988 + b"\r\n") * 2000  # more than the kernel takes while the server does not read

LATER = "451 4.3.0 Try again"
NEVER = "554 5.0.0 No"
BYE = "421 4.3.0 Closing"  # no word of why
GIVE_UP_AFTER = timedelta(minutes=10)
PATIENCE = 1800.0  # virtual seconds in which a delivery that gives up after ten minutes has certainly ended
MANY = 400  # commands

_UNCLEAN = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


# --- The matrix -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fault:
    """What the server does in place of, or with, its reply.

    Attributes:
        kind: what the client can know of it: "none" (nothing is wrong), "lost" (no valid reply), or the reply.
        how: for `fail_at`; "" for `on`.
        reply: for `on`.
        close: how the connection ends after it.
        acts: whether the server did what it was asked before.
        delay: seconds before the reply.
    """

    name: str
    kind: Literal["none", "lost", "421", "4xx", "5xx"]
    how: str = ""
    reply: str = ""
    close: Literal["fin", "rst"] | bool | None = None
    acts: bool = False
    delay: float = 90.0

    def install(self, server: ScriptedServer, verb: str, pattern: str, times: int | None) -> Script:
        """Put it into the server."""
        if not self.how:
            return server.on(verb, pattern, self.reply, times=times, close=self.close, optional=True)
        return server.fail_at(
            verb,
            self.how,
            pattern,
            act=self.acts,
            times=times,
            close=self.close or False,
            delay=self.delay,
            optional=True,
        )


def _both(name: str, how: str, close: Literal["fin"] | None = None) -> Iterator[Fault]:
    yield Fault(f"{name} before", "lost", how, close=close)
    yield Fault(f"{name} after", "lost", how, close=close, acts=True)


FAULTS: tuple[Fault, ...] = (
    *_both("FIN", "fin"),
    *_both("RST", "rst"),
    *_both("stall", "stall"),
    *_both("garbage", "garbage"),
    *_both("garbage and FIN", "garbage", "fin"),
    *_both("half a reply", "half"),
    *_both("half a reply and FIN", "half", "fin"),
    Fault("one-byte pieces", "none", "bytewise", acts=True),
    Fault("slow", "none", "late", acts=True, delay=50),
    Fault("late", "lost", "late", acts=True),
    Fault("unasked line after", "lost", "unasked", acts=True),
    Fault("unasked line before", "lost", "unasked_before", acts=True),
    Fault("421", "421", reply=BYE),
    Fault("421 and open", "421", reply=BYE, close=False),
    Fault("4xx", "4xx", reply=LATER),
    Fault("4xx and FIN", "4xx", reply=LATER, close="fin"),
    Fault("5xx", "5xx", reply=NEVER),
    Fault("5xx and FIN", "5xx", reply=NEVER, close="fin"),
)
_WHOLE = ("bytewise", "late", "unasked", "unasked_before")


@dataclass(frozen=True)
class Place:
    """Where it happens.

    Attributes:
        session: "clear", or "tls": STARTTLS, and 530 to MAIL before AUTH.
        mechanism: what AUTH the server offers there: LOGIN has two challenges, PLAIN none.
        skip: how often it passes before.
        refusal: what the server says to DATA, as long as the fault lasts, so that RSET follows.
    """

    verb: str
    pattern: str = "*"
    session: Literal["clear", "tls"] = "clear"
    mechanism: str = "LOGIN"
    large: bool = False
    skip: int = 0
    refusal: str = ""

    def __str__(self) -> str:
        """For the name of a test."""
        words = [self.session, self.verb, *self.pattern.split("@")[:1], str(self.skip + 1) if self.skip else ""]
        words += [self.mechanism if self.mechanism != "LOGIN" else "", "large" if self.large else "", self.refusal[:3]]
        return "-".join(word for word in words if word not in ("", "*"))

    def takes(self, fault: Fault) -> bool:
        """Whether the fault makes sense here."""
        if self.verb == "BODY":
            # There is no reply of the server's own here: nothing to do before it, and nothing to cut or to send late.
            # What is said in the middle of a body ends the connection, or it is the lie of the module's docstring.
            if fault.how in _WHOLE:
                return fault.how in ("late", "unasked")
            return not fault.acts and (
                fault.how != "" or fault.close == "fin" or (fault.reply == BYE and fault.close is None)
            )
        if self.verb == "STARTTLS" and fault.how not in ("", *_WHOLE):
            return not fault.acts  # 220 has been said, and the handshake is what fails
        if self.verb == "CONNECT":
            return not fault.acts or fault.how in _WHOLE  # nothing was asked
        return True


def _places(session: Literal["clear", "tls"]) -> Iterator[Place]:
    yield Place("CONNECT", session=session)
    yield Place("EHLO", session=session)
    if session == "tls":
        yield Place("STARTTLS", session=session)
        yield Place("EHLO", session=session, skip=1)
        yield Place("AUTH", session=session)
        yield Place("AUTH", session=session, mechanism="PLAIN")
        yield Place("CHALLENGE", session=session)
        yield Place("CHALLENGE", session=session, mechanism="CRAM-MD5")
    yield Place("MAIL", session=session)
    for recipient in RECIPIENTS:
        yield Place("RCPT", recipient, session=session)
    yield Place("DATA", session=session)
    for large in (False, True):
        yield Place("BODY", session=session, large=large)
        yield Place("END_OF_DATA", session=session, large=large)
    for refusal in (LATER, NEVER):
        yield Place("RSET", session=session, refusal=refusal)
    yield Place("QUIT", session=session)


PLACES: tuple[Place, ...] = (*_places("clear"), *_places("tls"))
_BEFORE_MAIL = ("CONNECT", "EHLO", "STARTTLS", "AUTH", "CHALLENGE")


@dataclass(frozen=True)
class Cell:
    """One run.

    Attributes:
        used: whether the client has sent a message before, so that the connection is used, or has to be made anew.
    """

    place: Place
    fault: Fault
    mode: Mode
    ever: bool
    used: bool

    def __str__(self) -> str:
        """One line, for a report."""
        times = "for ever" if self.ever else "once"
        return f"{self.place}: {self.fault.name} {times}, {self.mode}, {'used' if self.used else 'new'} client"

    @property
    def dot_is_out(self) -> bool:
        """Whether the client can have sent the final dot, and no valid reply came to it."""
        at_the_dot = self.place.verb == "END_OF_DATA" or (self.place.verb == "BODY" and not self.place.large)
        return at_the_dot and self.fault.kind == "lost"

    def expected(self, recipient: str) -> tuple[set[Status], int | None]:  # noqa: C901, PLR0911 - a table
        """What may have become of a recipient, and the code of the reply that says so (None: whatever)."""
        place, fault = self.place, self.fault
        if place.verb == "QUIT":
            return {Status.ACCEPTED}, 250
        if place.verb == "RSET":  # a fault there changes nothing
            if place.refusal == NEVER:
                return {Status.REFUSED}, 554
            return ({Status.REFUSED}, 451) if self.ever else ({Status.ACCEPTED}, 250)
        if place.verb == "RCPT" and recipient != place.pattern:
            return {Status.ACCEPTED}, 250
        if fault.kind == "none":
            return {Status.ACCEPTED}, 250
        if place.verb == "STARTTLS" and fault.how == "unasked":
            return {Status.ACCEPTED}, 250  # what came in the clear behind 220 is thrown away (RFC 3207 §4.2)
        if place.verb == "BODY" and fault.how == "unasked" and not place.large:
            return {Status.ACCEPTED}, 250  # see the module's docstring
        if self.dot_is_out:
            if fault.how.startswith("unasked") and self.mode == "raise":
                return {Status.UNCERTAIN, Status.ACCEPTED}, None  # "more than one reply" is an honest answer, too
            return ({Status.UNCERTAIN}, NO_REPLY) if self.ever or self.mode == "raise" else ({Status.ACCEPTED}, 250)
        if fault.kind == "5xx":
            return {Status.REFUSED}, 554
        if not self.ever:
            return {Status.ACCEPTED}, 250
        code = {"421": 421, "4xx": 451, "lost": NO_REPLY}[fault.kind]
        return {Status.REFUSED}, code


def cells(place: Place, *, all_of_them: bool = False) -> Iterator[Cell]:
    """Yield the cells at a place: each fault in both modes, once and for ever, with a new client and a used one.

    The tests are to be quick: of these eight combinations they try four, which hold all pairs; and two where TLS lies
    under what was tried in the clear as well.
    """
    for fault in FAULTS:
        if place.takes(fault):
            for mode in MODES:
                for ever in (False, True):
                    for used in (False, True):
                        pair = used == ((mode == "raise") ^ ever ^ (place.session == "tls"))
                        again = place.session == "tls" and place.verb not in _BEFORE_MAIL
                        if all_of_them or (pair and (not again or used)):
                            yield Cell(place, fault, mode, ever, used)


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


def server_for(place: Place) -> ScriptedServer:
    """Return a server for the session of a place."""
    if place.session == "clear":
        server = ScriptedServer()
    else:
        server = ScriptedServer(tls=True, auth=("app", "secret"), mechanisms=[place.mechanism])
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
    script = cell.fault.install(server, place.verb, place.pattern, times)
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
    return not _UNCLEAN.search(text)


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
    async with server_for(cell.place) as server:
        if message is HUGE:
            take_little(server)
        smtp = client_for(server, cell.mode)
        if cell.used:
            await smtp.sendmail(SENDER, [FRIEND], b"Subject: before\r\n\r\n")
            if cell.place.verb in _BEFORE_MAIL:
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
