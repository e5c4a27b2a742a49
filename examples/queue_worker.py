"""A worker: it sends what was handed over to the queue, when it is due.

Start it with `python examples/queue_worker.py`, as often as you like; Ctrl-C stops one. It needs the extra
`procrastinate`, and what sends to it the extra `testing` as well. From an empty database on::

    createdb mail
    export DATABASE_URL=postgresql:///mail
    python examples/queue_worker.py    # makes procrastinate's tables, where there are none
    python examples/queue_send.py      # in another terminal
"""

import asyncio

from queue_app import app, client, engine, policy

from smtpretry import Delivery, RetryingSMTP


async def main() -> None:
    """Work until stopped."""
    async with app.open_async(), RetryingSMTP(client(), policy) as smtp:
        if not await app.check_connection_async():
            await app.schema_manager.apply_schema_async()
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
