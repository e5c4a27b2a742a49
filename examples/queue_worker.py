"""A worker: it sends what was handed over to the queue, when it is due.

Start it with `python examples/queue_worker.py`, as often as you like; Ctrl-C stops one. It needs nothing but smtpretry;
what sends to it needs the extra `testing`. The queue is a file, or a PostgreSQL database that DATABASE_URL names::

    python examples/queue_worker.py
    python examples/queue_send.py      # in another terminal
    python -m smtpretry queue sqlite:/tmp/mail.db list
"""

import asyncio

from queue_app import client, open_queue, policy

from smtpretry import Delivery, RetryingSMTP


async def main() -> None:
    """Work until stopped."""
    async with open_queue() as engine, RetryingSMTP(client(), policy) as smtp:
        print("The worker is ready.", flush=True)
        await engine.work(smtp, on_end=tell)


async def tell(delivery: Delivery) -> None:
    """Tell whom it concerns that somebody did not get it. An application writes it down, or sends `delivery.dsn()`."""
    for recipient, reply in delivery.refused.items():
        print(f"{recipient}: {reply}", flush=True)
    for recipient in delivery.uncertain:
        print(f"{recipient}: may have it, or not", flush=True)


if __name__ == "__main__":
    asyncio.run(main())
