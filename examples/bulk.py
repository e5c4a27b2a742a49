"""Two thousand messages through four connections, to a server that greylists one in ten, with a progress bar.

Run it with `python examples/bulk.py` (needs rich, and the extra `testing`). It starts the mail server on a free port of
127.0.0.1; a message is written when it can be sent, and the greylisted ones wait for two seconds in nobody's way.
"""

import asyncio
from collections.abc import Iterator
from email.message import EmailMessage

from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn

from smtpretry import Delivery, RetryingSMTP, prepare
from smtpretry.testing import ScriptedServer

MESSAGES = 2000


def newsletters(under_way: set[Delivery]) -> Iterator[Delivery]:
    """Write them one by one, as they are asked for."""
    for number in range(MESSAGES):
        message = EmailMessage()
        message["From"], message["To"] = "news@example.com", f"reader-{number}@example.com"
        message["Subject"] = "What is new"
        message.set_content(f"Dear reader number {number}, nothing is.")
        delivery = prepare(message)
        under_way.add(delivery)
        yield delivery


async def main() -> None:
    """Send them all."""
    columns = (
        SpinnerColumn(),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[accepted]} accepted, {task.fields[waiting]} waiting, {task.fields[refused]} refused;"),
        TextColumn("{task.fields[rate]:.0f} a second"),
    )
    counts, rate = dict.fromkeys(("accepted", "waiting", "refused"), 0), 0.0
    under_way = set[Delivery]()
    async with ScriptedServer() as server:
        server.on("RCPT", "reader-*7@*", "450 4.2.0 Greylisted, try again in 2 seconds", times=MESSAGES // 10)
        server.on("RCPT", "reader-1000@*", "550 5.1.1 No such reader")
        async with RetryingSMTP(server.client, max_connections=4) as smtp:
            with Progress(*columns) as progress:
                bar = progress.add_task("", total=MESSAGES, **counts, rate=rate)
                async for delivery in smtp.send_many(newsletters(under_way)):
                    under_way.remove(delivery)
                    counts["accepted"] += len(delivery.accepted)
                    counts["refused"] += len(delivery.refused)
                    counts["waiting"] = sum(bool(other.attempts) for other in under_way)
                    rate = progress.tasks[bar].speed or rate
                    progress.update(bar, advance=1, **counts, rate=rate)
        print(f"The server has {len(server.messages)} messages, over {server.connections} connections.")


if __name__ == "__main__":
    asyncio.run(main())
