"""One mail transaction (RFC 5321 §3.3): MAIL, RCPT, DATA and the message; also ahead of the answers (RFC 2920)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

import aiosmtplib
from aiosmtplib.typing import Default

from smtpretry.esmtp import commands
from smtpretry.replies.reply import NO_REPLY, Reply, Said
from smtpretry.replies.stage import Stage
from smtpretry.verdict import Answer, fits

from .connection import Connection, Failed, Timeout
from .line import LEADING_DOT

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from smtpretry.delivery import Delivery
    from smtpretry.verdict import Judge

DOT_TIMEOUT: Final = 600.0
"""Seconds that a server gets to answer the final dot: it may take them to filter the message (RFC 5321 §4.5.3.2.6)."""

_AHEAD = 100  # commands in one write: a server takes at least so many recipients (RFC 5321 §4.5.3.1.8)
_CHUNK = 64 * 1024  # bytes; what is no longer than this goes out in one write, final dot and all


class Command(NamedTuple):
    """One command, and the recipient of a RCPT."""

    stage: Stage
    line: bytes
    recipient: str | None = None


_DATA = Command(Stage.DATA, b"DATA\r\n")


class Transaction:
    """Says what is due, and tells a `Judge` what was answered: `envelope`, then `body` where the server waits for it.

    Attributes:
        in_doubt: whether the final dot may be out, and no answer has come: the message may have been taken.
        left_out: the ESMTP parameters that were not sent, for the server does not offer their extension.
    """

    def __init__(self, connection: Connection, delivery: Delivery, timeout: Timeout = Default.token) -> None:
        self.connection = connection
        self.delivery = delivery
        self.timeout = timeout
        self.in_doubt = False
        self.left_out: tuple[str, ...] = ()

    async def envelope(self, judge: Judge, *, ahead: bool) -> None:
        """MAIL, RCPT for each of the group, and DATA, as long as the judge goes on.

        Sent ahead, the first transaction of a connection waits for the first recipient's answer: servers count
        refusals, and a pipeline behind a refused MAIL is full of them.
        """
        pipelining = self.connection.needs.pipelining
        ahead = ahead and pipelining.allowed and self.connection.client.supports_extension("pipelining")
        for window in self._windows(self._commands(judge), ahead=ahead):
            answers = await self._say(window)
            if len(window) > 1 and not fits([command.stage for command in window], answers):
                judge.lose_step(answers)
                if judge.verdict.out_of_step:
                    pipelining.lose_step()
                return
            for answer in answers:
                judge.hear(answer)
            if not judge.goes_on:
                break
        if judge.data_is_due:
            for answer in await self._say([_DATA]):
                judge.hear(answer)
        if judge.dot_is_due:
            await self._say([Command(Stage.END_OF_DATA, b".\r\n")])
        if pipelining.is_in_doubt and self.connection.is_open:
            pipelining.go_well(ahead=ahead)

    async def body(self) -> Answer:
        """Send the message, and return what came to it.

        A failure with a reply means that the message was not taken. A failure at END_OF_DATA without a reply means that
        nobody knows (RFC 1047).
        """
        body = self.delivery.message
        if body.startswith(b".") or b"\n." in body:
            body = LEADING_DOT.sub(b"..", body)
        body += b".\r\n"
        try:
            accepted = await self._send(body)
        except Failed as failed:
            said = Said(self._stage, failed.said.reply, failed.said.error)
            self.in_doubt = self.in_doubt and said.reply.code == NO_REPLY
            return Answer(said.stage, said, final=failed.final)
        self.in_doubt = False
        return Answer(Stage.END_OF_DATA, success=Said(Stage.END_OF_DATA, accepted))

    def _commands(self, judge: Judge) -> list[Command]:
        """MAIL and each RCPT; none where nobody can be offered. What the server cannot do for one is an answer, too."""
        said = commands(self.delivery, judge.case.group, self.connection.client.esmtp_extensions)
        if said.obstacle is not None:
            raise Failed.without_reply(Stage.MAIL, aiosmtplib.SMTPNotSupported(said.obstacle), final=True)
        self.left_out = said.left_out
        for who, why in said.impossible.items():
            unsaid = Said(Stage.RCPT, Reply(NO_REPLY, text=why), aiosmtplib.SMTPNotSupported(why))
            judge.hear(Answer(Stage.RCPT, unsaid, recipient=who, final=why))
        rcpts = [Command(Stage.RCPT, line + b"\r\n", who) for who, line in said.rcpts.items()]
        return [Command(Stage.MAIL, said.mail + b"\r\n"), *rcpts] if rcpts else []

    def _windows(self, commands: list[Command], *, ahead: bool) -> Iterator[list[Command]]:
        """The commands that go out together."""
        if not ahead or not commands:
            yield from ([command] for command in commands)
            return
        if not self.connection.carried:
            yield commands[:2]
            del commands[:2]
        commands.append(_DATA)
        for start in range(0, len(commands), _AHEAD):
            yield commands[start : start + _AHEAD]

    async def _say(self, commands: Sequence[Command]) -> list[Answer]:
        """Send them in one write, and read the answers in their order; nothing comes after a silence."""
        answers: list[Answer] = []
        try:
            self.connection.send(b"".join([command.line for command in commands]), len(commands))
            for command in commands:
                reply = self.connection.take() or await self.connection.receive(command.stage, self.timeout)
                answers.append(self._answer(command, *reply))
        except Failed as failed:
            command = commands[len(answers)]
            answers.append(Answer(command.stage, failed.said, recipient=command.recipient, final=failed.final))
        return answers

    def _answer(self, command: Command, code: int, message: str) -> Answer:
        try:
            self.connection.check(command.stage, code, message, 3 if command.stage is Stage.DATA else 2)
        except Failed as failed:
            if failed.said.reply.code == NO_REPLY:
                raise
            return Answer(command.stage, failed.said, recipient=command.recipient, final=failed.final)
        return Answer(command.stage, recipient=command.recipient)

    async def _send(self, body: bytes) -> Reply:
        """Send the body, the final dot when all else has gone; return the answer that accepts the message.

        What the server says meanwhile is taken at once. It may refuse in the middle and hang up: then what it said
        counts, not the broken pipe that follows.
        """
        for start in range(0, len(body), _CHUNK):
            sent = self.connection.send(body[start : start + _CHUNK], replies=not start)
            self.in_doubt = sent and start + _CHUNK >= len(body)
            if not self.in_doubt and not await self.connection.drain(self.timeout):
                break
        timeout = self._dot_timeout if self.in_doubt else self.timeout
        code, message = await self.connection.receive(self._stage, timeout)
        if not self.in_doubt:
            self.connection.abort()  # refused in the middle of the body, and all that follows is body to the server
        self.connection.check(self._stage, code, message, expect=2 if self.in_doubt else None)
        return self.connection.reply(code, message)

    @property
    def _stage(self) -> Stage:
        return Stage.END_OF_DATA if self.in_doubt else Stage.DATA

    @property
    def _dot_timeout(self) -> Timeout:
        limit = self.connection.seconds(self.timeout)
        return limit if self.timeout is not Default.token or limit is None else max(DOT_TIMEOUT, limit)
