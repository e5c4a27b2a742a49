"""An application that does not wait for greylisting: it hands the message over to the queue, and a worker sends it.

Run it with `python examples/queue_send.py`, while `examples/queue_worker.py` runs. It starts a
mail server on port 2525 of 127.0.0.1 (SMTP_PORT) which greylists for five seconds, where the application waits for no
more than two.
"""

import asyncio
import sys
import time
from email.message import EmailMessage

from queue_app import PORT, client, open_queue, policy

from smtpretry import RetryingSMTP
from smtpretry.testing import ScriptedServer


async def main() -> None:
    """Send one message, and wait until it has arrived."""
    message = EmailMessage()
    message["From"] = "app@example.com"
    message["To"] = "ann@example.com, bob@example.com"
    message["Subject"] = "Your order is on its way"
    message.set_content("It will be with you on Friday.")

    async with open_queue() as engine, ScriptedServer(port=PORT) as server:
        server.on("RCPT", "bob@*", "450 4.2.0 <bob@example.com>: Greylisted, try again in 5 seconds", times=1)

        began = time.monotonic()
        async with RetryingSMTP(client(), policy, defer=engine, max_wait=2) as smtp:
            errors, response = await smtp.send_message(message)
        print(f"send_message returned after {time.monotonic() - began:.1f} s: errors {errors}, {response!r}")

        async with asyncio.timeout(30):
            while not server.received("bob@example.com"):  # noqa: ASYNC110 - its own server
                await asyncio.sleep(0.1)
        print(f"all have it after {time.monotonic() - began:.1f} s")
        for recipient, messages in server.mailboxes.items():
            print(f"{recipient} has it {len(messages)} time(s)")


if __name__ == "__main__":
    try:
        asyncio.run(main())
    except TimeoutError:
        sys.exit("Nothing has come from the queue: is examples/queue_worker.py running?")
