"""Two mail servers, of which the first one fails for a while, and what each message's delivery tells of them.

Run it with `python examples/failover.py` (needs the extra `testing`). It starts two mail servers on free ports of
127.0.0.1. The first one takes a message, then says 421 for some seconds, then works again. What is pending meanwhile
goes to the second one, but for a greylisted recipient. Each line is a reply, with the server that said it.
"""

import asyncio
from email.message import EmailMessage

import tenacity

from smtpretry import Delivery, Failover, RetryingSMTP, RetryPolicy
from smtpretry.testing import ScriptedServer


def letter(recipient: str) -> EmailMessage:
    """Write a message."""
    message = EmailMessage()
    message["From"], message["To"], message["Subject"] = "app@example.com", recipient, "Your order"
    message.set_content("It will be with you on Friday.")
    return message


async def main() -> None:
    """Send five messages, and print which server said what."""
    policy = RetryPolicy(wait=tenacity.wait_fixed(2))  # leave a server in trouble alone for so long, in seconds
    async with ScriptedServer() as first, ScriptedServer() as second:
        names = {f"{server.hostname}:{server.port}": name for server, name in ((first, "first"), (second, "second"))}
        async with Failover(RetryingSMTP(first.client(), policy), RetryingSMTP(second.client(), policy)) as smtp:
            deliveries = [await smtp.deliver(letter("ann@example.com"))]

            first.on("RCPT", "bob@*", "450 4.2.0 Greylisted, try again in 1 second", times=1)
            greylisted = asyncio.ensure_future(smtp.deliver(letter("bob@example.com")))
            await asyncio.sleep(0.5)

            first.on("MAIL", "421 4.3.2 Shutting down", times=1)
            first.on("CONNECT", "421 4.3.2 Starting up", times=3)
            deliveries += [await smtp.deliver(letter(f"{name}@example.com")) for name in ("cat", "dan")]
            deliveries += [await greylisted]

            deliveries += [await smtp.deliver(letter("eve@example.com"))]
        for delivery in deliveries:
            show(delivery, names)
        print(f"The first server has {len(first.messages)} messages, the second one has {len(second.messages)}.")


def show(delivery: Delivery, names: dict[str, str]) -> None:
    """Print the story of a delivery."""
    print(*delivery.recipients)
    for attempt in delivery.attempts:
        for step in attempt.steps:
            print(f"  {delivery.elapsed(step.at):4.1f} s  {names[attempt.server]:6}  {step}")


if __name__ == "__main__":
    asyncio.run(main())
