"""What a scripted server is told, and what it has seen: `Scenario`."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol

from smtpretry.replies.stage import Stage

from .scripts import FAULTS, WHOLE, ReceivedMessage, Script, wire

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Iterable

FAILURE: Final = b"451 4.3.0 Temporary failure\r\n"


class Session(Protocol):
    """A connection of a client's."""

    welcome: bool

    def hang_up(self, reply: bytes, *, close: bool | str) -> None:
        """Say `reply` and close, now, whatever the client is doing."""

    def drop(self) -> asyncio.Task[None]:
        """End it at once, whatever is on its way; return what is left to wait for."""


class Scenario:
    """The settings, the scripts and the records of a `ScriptedServer`, which explains the arguments."""

    def __init__(
        self,
        *,
        tls: bool | Literal["required", "implicit"] = False,
        auth: tuple[str, str] | Mapping[str, str] | None = None,
        token: str | None = None,
        tokens: Iterable[str] | None = None,
        auth_required: bool | None = None,
        auth_requires_tls: bool = False,
        mechanisms: Iterable[str] = ("PLAIN", "LOGIN"),
        max_recipients: int | None = None,
        max_connections: int | None = None,
        max_rate: tuple[int, float] | None = None,
        size_limit: int | None = 2**25,
        eightbitmime: bool = True,
        smtputf8: bool = True,
        pipelining: bool = True,
        extensions: Iterable[str] = (),
        port: int = 0,
    ) -> None:
        """Nothing happens before `start`; see the class for the arguments."""
        if tls not in {True, False, "required", "implicit"}:
            msg = f'tls is True, False, "required" or "implicit", not {tls!r}'
            raise ValueError(msg)
        for name, given in (("tokens", tokens), ("mechanisms", mechanisms), ("extensions", extensions)):
            if isinstance(given, str):
                msg = f"{name} is a list, such as [{given!r}], not {given!r}"
                raise TypeError(msg)
        if not (auth is None or isinstance(auth, Mapping) or (isinstance(auth, tuple) and len(auth) == 2)):  # noqa: PLR2004
            msg = f'auth is a user and a password, such as ("app", "secret"), or a mapping of them, not {auth!r}'
            raise TypeError(msg)
        offered = list(mechanisms) if auth else []
        if unknown := set(offered) - {"PLAIN", "LOGIN", "CRAM-MD5"}:
            msg = f"unknown mechanisms: {', '.join(sorted(unknown))}"
            raise ValueError(msg)
        if max_rate is not None and not (max_rate[0] >= 1 and max_rate[1] > 0):
            msg = f"max_rate is a number of messages and of seconds, such as (14, 1), not {max_rate!r}"
            raise ValueError(msg)
        self.tls = tls
        self.credentials: dict[str, str] = dict([auth] if isinstance(auth, tuple) else auth or {})
        self.tokens: set[str] = {*(tokens or ()), *(() if token is None else (token,))}
        self.mechanisms = offered if token is None and tokens is None else [*offered, "XOAUTH2"]
        self.auth_required = bool(self.mechanisms) if auth_required is None else auth_required
        self.auth_requires_tls = auth_requires_tls
        self.max_recipients = max_recipients
        self.max_connections = max_connections
        self.max_rate = max_rate
        self.size_limit = size_limit
        self.eightbitmime = eightbitmime
        self.smtputf8 = smtputf8
        self.pipelining = pipelining
        self.extensions = list(extensions)
        self.port = port

        self.messages: list[ReceivedMessage] = []  # in the order in which they came
        self.commands: list[str] = []  # the lines that came, without what AUTH carries
        self.connections = 0  # how many there have been
        self.scripts: list[Script] = []
        self.errors: list[Exception] = []  # what went wrong inside the server
        self.on_script: Callable[[Script, list[str]], object] | None = None  # called for each that is reached
        self.listening = False
        self.sessions = set[Session]()
        self._taken = deque[float]()  # when the latest messages were taken

    # What it is to do

    def on(
        self,
        verb: str | Stage,
        pattern: str | bytes | None = "*",
        reply: str | bytes | None = "",
        *,
        times: int | None = None,
        close: bool | Literal["fin", "rst"] | None = None,
        accepted: bool | None = None,
        optional: bool = False,
    ) -> Script:
        """Answer so, in place of whatever the server would say; the first script that matches and isn't used up wins.

        ``on("MAIL", "451 4.3.0 later")``, or with a pattern: ``on("RCPT", "bob@*", "550 5.1.1 who?")``.

        Args:
            verb: a `Stage`, or CONNECT (the banner), EHLO, HELO, STARTTLS, AUTH, CHALLENGE (a 334 of AUTH), MAIL, RCPT,
                DATA (in place of 354), BODY (after the first line of the body), END_OF_DATA (after the dot), RSET,
                NOOP, VRFY, QUIT.
            pattern: like a file name's, in any case: the address at MAIL and RCPT, any recipient at DATA, BODY and
                END_OF_DATA, the mechanism at AUTH and CHALLENGE, the client's name at EHLO.
            reply: further lines of it follow after a line feed. Bytes are sent as they are, right or wrong. None says
                nothing, and closes.
            times: how often; None for ever. One that was reached less often is an error at the end of ``async with``.
            close: close the connection after it: True or "fin" in good order, "rst" by a reset; None: after 421.
            accepted: whether the server does what the command asks, whatever it says of it: at END_OF_DATA, whether it
                takes the message. None: where the reply is 2xx or 3xx.
            optional: it need not be reached.

        Raises:
            ValueError: a verb or a reply that does not exist.
            TypeError: a reply that is neither str nor bytes.
        """
        if reply == "":  # without a pattern
            pattern, reply = "*", pattern
        said = None if reply is None else wire(reply)
        if said is None and not close:
            msg = "nothing to say: give a reply, or close=True, or see fail_at"
            raise ValueError(msg)
        positive = said is not None and said[:1] in {b"2", b"3"}
        if close is None:
            close = said is not None and said.startswith(b"421")
        return self._add(
            verb,
            pattern,
            how="say",
            reply=b"" if said is None else said,
            act=positive if accepted is None else accepted,
            close=close,
            times=times,
            optional=optional,
        )

    def fail_at(
        self,
        verb: str | Stage,
        how: str,
        pattern: str = "*",
        *,
        act: bool | None = None,
        reply: str | bytes | None = None,
        times: int | None = None,
        close: bool | Literal["fin", "rst"] = False,
        delay: float = 90.0,
        optional: bool = False,
    ) -> Script:
        """Break the connection or the protocol there; verbs, patterns and `times` are those of `on`.

        Args:
            verb: where.
            how: "fin", "rst": the connection ends without a reply.
                "stall": no reply, ever; nothing more is read.
                "garbage": a line that is no SMTP, in place of the reply.
                "half": half of the reply, then silence (or the end, with `close`).
                "bytewise": the reply in pieces of one byte.
                "late": the reply after `delay` seconds of the event loop's time.
                "unasked", "unasked_before": one more 250 in the same packet, after or before the reply.
                "noise": a blank line and a line that is no reply behind it, in the same packet.
            pattern: whom it concerns.
            act: whether the server does what the command asks before it fails (STARTTLS: it says 220, and the handshake
                is what fails). None: where the whole reply arrives ("bytewise", "late", "unasked", "unasked_before").
            reply: the reply that is broken; None: the server's own where it acts, else a 451.
            times: how often; None for ever.
            close: close the connection afterwards: True or "fin" in good order, "rst" by a reset.
            delay: for "late"; the default is more than aiosmtplib waits for a reply (60).
            optional: it need not be reached.

        Raises:
            ValueError: a verb, a fault or a reply that does not exist.
        """
        if pattern in FAULTS and how not in FAULTS:  # in the order that `on` has
            how, pattern = pattern, how
        act = how in WHOLE if act is None else act
        return self._add(
            verb,
            pattern,
            how=how,
            reply=wire(reply) if reply is not None else None if act else FAILURE,
            act=act,
            close=close or (how if how in {"fin", "rst"} else ""),
            times=times,
            optional=optional,
            delay=delay if how == "late" else 0.0,
        )

    def _add(
        self,
        verb: str | Stage,
        pattern: object,
        *,
        close: bool | str,
        **rest: Any,  # noqa: ANN401 - the other fields of a Script
    ) -> Script:
        if not isinstance(pattern, str):
            msg = f"a pattern is a str, not {pattern!r}"
            raise TypeError(msg)
        name = verb.value if isinstance(verb, Stage) else str(verb).upper()
        script = Script(verb=name, pattern=pattern, close="fin" if close is True else close or "", **rest)
        self.scripts.append(script)
        return script

    def clear(self) -> None:
        """Forget all scripts, those too that were not reached."""
        self.scripts.clear()

    def take(self, verb: str, subjects: Iterable[str], *, faults_only: bool = False) -> Script | None:
        """Return the script for this place, and count it as reached."""
        for script in self.scripts:
            if script.matches(verb, subjects) and not (faults_only and script.how == "say"):
                script.used += 1
                if self.on_script is not None:
                    self.on_script(script, [*subjects])
                return script
        return None

    def admit(self, now: float) -> bool:
        """Whether `max_rate` lets one more message in; one that is let in counts."""
        if self.max_rate is None:
            return True
        messages, seconds = self.max_rate
        while self._taken and self._taken[0] <= now - seconds:
            self._taken.popleft()
        if len(self._taken) >= messages:
            return False
        self._taken.append(now)
        return True

    # What it has seen

    @property
    def mailboxes(self) -> dict[str, list[ReceivedMessage]]:
        """What each recipient got: every message that the server took for that address."""
        boxes: dict[str, list[ReceivedMessage]] = {}
        for message in self.messages:
            for recipient in message.recipients:
                boxes.setdefault(recipient, []).append(message)
        return boxes

    def received(self, recipient: str) -> list[ReceivedMessage]:
        """Return what this recipient got."""
        return self.mailboxes.get(recipient, [])

    @property
    def verbs(self) -> list[str]:
        """The verbs of `commands`."""
        return [command.partition(" ")[0].upper() for command in self.commands]

    def verify(self) -> None:
        """Raise what went wrong inside the server, or AssertionError where a script was not reached often enough."""
        if self.errors:
            raise self.errors[0]
        missing = [str(one) for one in self.scripts if one.times and one.used < one.times and not one.optional]
        if missing:
            msg = f"scripts that were not reached: {'; '.join(missing)}. The server saw: {', '.join(self.commands)}"
            raise AssertionError(msg)
