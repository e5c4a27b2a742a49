"""fastapi-mail writes the messages, smtpretry sends them: `RetryingFastMail`, to copy into an application.

Run it with `python examples/fastapi_mail_client.py` (needs fastapi-mail 1.6.8 or later, and the extra `testing`). It
starts a mail server on a free port of 127.0.0.1 which wants a log-in, greylists Bob for two seconds and knows no Eve;
sends three messages in one call; and prints what was not accepted, and what the server has.
"""

import asyncio
from email.message import Message

import aiosmtplib
from fastapi_mail import ConnectionConfig, FastMail, MessageSchema, MessageType, NameEmail
from fastapi_mail.errors import ConnectionErrors
from fastapi_mail.fastmail import email_dispatched
from pydantic import SecretStr

from smtpretry import Delivery, RetryingSMTP, RetryPolicy
from smtpretry.testing import ScriptedServer


class NotAccepted(aiosmtplib.SMTPException, ConnectionErrors):
    """Somebody was not accepted: who, and why, is in `delivery`. The `except` clauses of both libraries catch it."""

    def __init__(self, delivery: Delivery) -> None:
        missed = [f"{who}: {delivery.outcomes[who].reply}" for who in (*delivery.refused, *delivery.uncertain)]
        self.expression = "; ".join(filter(None, [*missed, delivery.cure]))
        self.delivery = delivery
        super().__init__(self.expression)


class RetryingFastMail(FastMail):
    """FastMail, with every message sent through one client: hold `async with mail.smtp:` while the application runs."""

    def __init__(self, config: ConnectionConfig, policy: RetryPolicy | None = None) -> None:
        super().__init__(config)
        client = aiosmtplib.SMTP(
            hostname=config.MAIL_SERVER,
            port=config.MAIL_PORT,
            timeout=config.TIMEOUT,
            use_tls=config.MAIL_SSL_TLS,
            start_tls=config.MAIL_STARTTLS,
            validate_certs=config.VALIDATE_CERTS,
            cert_bundle=config.CERT_BUNDLE,
            local_hostname=config.LOCAL_HOSTNAME,
        )
        self.smtp = RetryingSMTP(
            client,
            policy or RetryPolicy(),
            username=config.MAIL_USERNAME if config.USE_CREDENTIALS else None,
            password=config.MAIL_PASSWORD.get_secret_value() if config.USE_CREDENTIALS else None,
        )

    async def send_message(
        self, message: MessageSchema | list[MessageSchema], *templates: str | None, **named: str | None
    ) -> None:
        """Send one message, or each of a list, whatever becomes of the others.

        Raises `NotAccepted` (or `ClientClosed`) for one message; for a list, at its end, an ExceptionGroup of these.
        Limit its time by the policy: a list that is cancelled does not tell what became of each message.
        """
        written = await self.get_message(message, *templates, **named)
        if not isinstance(written, list):
            await self._send(written)
            return
        ends = await asyncio.gather(*map(self._send, written), return_exceptions=True)
        if failures := [end for end in ends if end is not None]:
            msg = f"{len(failures)} of {len(ends)} messages were not accepted for everybody"
            raise BaseExceptionGroup(msg, failures)

    async def _send(self, message: Message) -> None:
        delivery = None if self.config.SUPPRESS_SEND else await self.smtp.deliver(message)
        if delivery is None or delivery.accepted:
            email_dispatched.send(message)
        if delivery and (delivery.refused or delivery.uncertain):
            raise NotAccepted(delivery)


async def main() -> None:
    """Send a list of three messages, and print what happened."""
    async with ScriptedServer(auth=("app", "secret")) as server:
        server.on("RCPT", "bob@*", "450 4.2.0 <bob@example.com>: Greylisted, try again in 2 seconds", times=1)
        server.on("RCPT", "eve@*", "550 5.1.1 <eve@example.com>: User unknown")
        config = ConnectionConfig(
            MAIL_SERVER=server.hostname,
            MAIL_PORT=server.port,
            MAIL_USERNAME="app",
            MAIL_PASSWORD=SecretStr("secret"),
            MAIL_FROM="app@example.com",
            MAIL_STARTTLS=False,
            MAIL_SSL_TLS=False,
        )
        mail = RetryingFastMail(config)
        async with mail.smtp:
            try:
                await mail.send_message([welcome("ann"), welcome("bob"), welcome("cat", "eve")])
            except* NotAccepted as group:
                print("Not accepted:", *group.exceptions, sep="\n  ")
        for received in server.messages:
            print(f"The server has {received.message['Subject']!r} for {', '.join(received.recipients)}.")


def welcome(*names: str) -> MessageSchema:
    """Return a message to these people at example.com."""
    return MessageSchema(
        recipients=[NameEmail(name=name.title(), email=f"{name}@example.com") for name in names],
        subject=f"Welcome, {' and '.join(map(str.title, names))}",
        body="Good to have you here.",
        subtype=MessageType.plain,
    )


if __name__ == "__main__":
    asyncio.run(main())
