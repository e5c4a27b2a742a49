"""The places, the faults, the cells, and what may come of each."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Literal

from smtpretry import NO_REPLY, Status

if TYPE_CHECKING:
    from collections.abc import Iterator

    from smtpretry.testing import Script, ScriptedServer

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
WHAT = "502 5.5.2 Command not recognized"  # as what stands in between says it that cannot follow a pipeline
BYE = "421 4.3.0 Closing"  # no word of why
GIVE_UP_AFTER = timedelta(minutes=30)
PATIENCE = 5400.0  # virtual seconds in which a delivery that gives up after half an hour has certainly ended
MANY = 400  # commands

UNCLEAN = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


@dataclass(frozen=True)
class Fault:
    """What the server does in place of, or with, its reply.

    Attributes:
        kind: what the client can know of it: "none" (nothing is wrong), "lost" (no valid reply), or the reply.
        how: for `fail_at`; "" for `on`.
        reply: for `on`.
        close: how the connection ends after it.
        acts: whether the server did what it was asked before.
        delay: how long before the reply, as a share of what the client waits for it.
    """

    name: str
    kind: Literal["none", "lost", "421", "4xx", "5xx"]
    how: str = ""
    reply: str | bytes = ""
    close: Literal["fin", "rst"] | bool | None = None
    acts: bool = False
    delay: float = 1.5

    def install(self, server: ScriptedServer, place: Place, times: int | None) -> Script:
        """Put it into the server."""
        if not self.how:
            return server.on(place.verb, place.pattern, self.reply, times=times, close=self.close, optional=True)
        return server.fail_at(
            place.verb,
            self.how,
            place.pattern,
            act=self.acts,
            times=times,
            close=self.close or False,
            delay=self.delay * place.timeout,
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
    Fault("half a refusal", "4xx", "half"),
    Fault("half a success", "lost", "half", acts=True),
    Fault("half a refusal and FIN", "4xx", "half", close="fin"),
    Fault("half a success and FIN", "lost", "half", close="fin", acts=True),
    Fault("one-byte pieces", "none", "bytewise", acts=True),
    Fault("slow", "none", "late", acts=True, delay=0.8),
    Fault("late", "lost", "late", acts=True),
    Fault("unasked line after", "lost", "unasked", acts=True),
    Fault("unasked line before", "lost", "unasked_before", acts=True),
    Fault("noise after", "none", "noise", acts=True),
    Fault("221", "lost", reply="221 2.0.0 Idle timeout", close="fin"),
    Fault("421", "421", reply=BYE),
    Fault("421 and open", "421", reply=BYE, close=False),
    Fault("4xx", "4xx", reply=LATER),
    Fault("4xx and FIN", "4xx", reply=LATER, close="fin"),
    Fault("4xx without its line end, and FIN", "4xx", reply=LATER.encode(), close="fin"),
    Fault("5xx", "5xx", reply=NEVER),
    Fault("5xx and FIN", "5xx", reply=NEVER, close="fin"),
    Fault("5xx without its line end, and FIN", "5xx", reply=NEVER.encode(), close="fin"),
    Fault("not understood", "5xx", reply=WHAT),
)
_WHOLE = ("bytewise", "late", "unasked", "unasked_before", "noise")


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

    @property
    def timeout(self) -> float:
        """How many seconds the client waits for the reply."""
        return 600 if self.verb == "END_OF_DATA" or (self.verb == "BODY" and not self.large) else 60

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
        if fault.reply == WHAT:
            return self.verb in ("RCPT", "DATA")
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
BEFORE_MAIL = ("CONNECT", "EHLO", "STARTTLS", "AUTH", "CHALLENGE")


@dataclass(frozen=True)
class Cell:
    """One run.

    Attributes:
        used: whether the client has sent a message before, so that the connection is used, or has to be made anew.
        ahead: whether the server offers PIPELINING, so that commands are sent ahead of the answers.
    """

    place: Place
    fault: Fault
    mode: Mode
    ever: bool
    used: bool
    ahead: bool

    def __str__(self) -> str:
        """One line, for a report."""
        times = "for ever" if self.ever else "once"
        how = f"{'used' if self.used else 'new'} client{', ahead' if self.ahead else ''}"
        return f"{self.place}: {self.fault.name} {times}, {self.mode}, {how}"

    @property
    def dot_is_out(self) -> bool:
        """Whether the client can have sent the final dot, and no valid reply came to it."""
        at_the_dot = self.place.verb == "END_OF_DATA" or (self.place.verb == "BODY" and not self.place.large)
        return at_the_dot and self.fault.kind == "lost"

    def expected(self, recipient: str) -> tuple[set[Status], int | None]:  # noqa: C901, PLR0911, PLR0912 - a table
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
            if fault.how.startswith("unasked"):
                return {Status.ACCEPTED}, 250  # two replies that agree
            return ({Status.UNCERTAIN}, NO_REPLY) if self.ever or self.mode == "raise" else ({Status.ACCEPTED}, 250)
        if fault.kind == "5xx" and fault.close and place.verb in ("MAIL", "RCPT") and self.ahead and not self.ever:
            return {Status.REFUSED, Status.ACCEPTED}, None  # cut off in the midst of the answers, it is offered again
        if fault.reply == WHAT:
            return ({Status.ACCEPTED}, 250) if self.ahead and not self.ever else ({Status.REFUSED}, 502)
        if fault.kind == "5xx":
            return {Status.REFUSED}, 554
        if not self.ever:
            return {Status.ACCEPTED}, 250
        code = {"421": 421, "4xx": 451, "lost": NO_REPLY}[fault.kind]
        return {Status.REFUSED}, code


def cells(place: Place, *, all_of_them: bool = False) -> Iterator[Cell]:
    """Yield the cells at a place: each fault in both modes, once and for ever, with a new client and a used one, ahead or not.

    The tests are to be quick: of these sixteen combinations they try four, which hold all pairs of the first three; and
    two where TLS lies under what was tried in the clear as well. Commands go ahead in every other one.
    """
    for number, fault in enumerate(FAULTS):
        if place.takes(fault):
            for mode in MODES:
                for ever in (False, True):
                    for used in (False, True):
                        pair = used == ((mode == "raise") ^ ever ^ (place.session == "tls"))
                        again = place.session == "tls" and place.verb not in BEFORE_MAIL
                        if all_of_them or (pair and (not again or used)):
                            turns = (True, False) if all_of_them else ((number + ever) % 2 == 0,)
                            yield from (Cell(place, fault, mode, ever, used, ahead) for ahead in turns)
