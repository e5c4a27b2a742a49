"""A message on its way through a server that says 450, then 530, then 250.

Run it with `python examples/quickstart.py` (needs the extra `testing`). It starts a mail server on a free port of
127.0.0.1 which greylists for two seconds, then wants a log-in; sends a message through it; and prints what happened.
"""

import asyncio
from email.message import EmailMessage

from smtpretry import Delivery, RetryingSMTP
from smtpretry.testing import ScriptedServer


async def main() -> None:
    """Send one message and print its timeline."""
    message = EmailMessage()
    message["From"] = "app@example.com"
    message["To"] = "bob@example.com"
    message["Subject"] = "Your order is on its way"
    message.set_content("It will be with you on Friday.")

    async with ScriptedServer(tls=True, auth=("app", "secret"), auth_required=False) as server:
        server.on("RCPT", "bob@*", "450 4.2.0 <bob@example.com>: Greylisted, try again in 2 seconds", times=1)
        server.on("MAIL", "250 2.1.0 Ok", times=1)
        server.on("MAIL", "530 5.7.0 Authentication required", times=1)

        async with RetryingSMTP(server.client(start_tls=False), username="app", password="secret") as smtp:
            delivery = await smtp.deliver(message)

        show(delivery)
        [received] = server.messages
        how = "over TLS" if received.tls else "in the clear"
        print(f"The server has {received.message['Subject']!r}, sent {how} by {received.authenticated!r}.")


def show(delivery: Delivery) -> None:
    """Print the story of a delivery: each reply that decided something, what was done about it, and the outcome."""
    for number, attempt in enumerate(delivery.attempts, 1):
        print(f"attempt {number}")
        for step in attempt.steps:
            print(f"  {delivery.elapsed(step.at):5.1f} s  {step.stage.value:12} {step.reply}")
            if step.action is not None:
                print(f"{'':24}-> {step.action.value}" + (f", wait {step.wait:g} s" if step.wait else ", at once"))
    for recipient, outcome in delivery.outcomes.items():
        print(f"{recipient}: {outcome.status.value}")


if __name__ == "__main__":
    asyncio.run(main())
