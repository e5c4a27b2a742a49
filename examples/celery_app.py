"""A Celery task that sends a mail: one pass, and while somebody is pending, the same again later. No worker waits.

Start a worker with `celery --workdir examples -A celery_app worker` (needs celery, and a broker). In the application,
`celery_app.send(message)` hands it a mail.

The delivery travels in the task: the same bytes each time, to those alone who are pending, until the policy's
`give_up_after`, counted from the first pass. In the end the task returns what became of each recipient, or raises
aiosmtplib.SMTPException, which tells the story, where nobody has the mail.

A worker process that dies loses no mail (acks_late, reject_on_worker_lost): the task runs again, and whom the server
had accepted in the pass that broke off gets the same bytes and Message-ID twice. For at most once, leave both out.

A task that waits longer than the broker likes runs twice: Redis and SQS hand it out again after `visibility_timeout`
(by default 60 and 30 minutes), RabbitMQ after `consumer_timeout` (30). So none waits more than LONGEST, and what has to
wait longer is put off again then, without a connection. Keep those settings well above it.

CELERY_BROKER_URL names the broker (RabbitMQ on localhost), CELERY_RESULT_BACKEND where results go, if anywhere,
SMTP_HOST (localhost) and SMTP_PORT (25) the mail server; SMTP_USERNAME and SMTP_PASSWORD log in where it asks.
"""

import asyncio
import os
import threading
from collections.abc import Sequence
from email.message import Message
from typing import Any

import aiosmtplib
from celery import Celery, Task
from celery.result import AsyncResult

from smtpretry import Delivery, RetryingSMTP, RetryPolicy, prepare

LONGEST = 15 * 60  # seconds that a task waits at once
POLICY = RetryPolicy()

app = Celery("celery_app")


class Discreet(Task):
    """A task whose arguments, the mail among them, are in no log and no event of Celery's."""

    def apply_async(self, *args: object, **options: object) -> AsyncResult:
        """Send the task; `delay` and `retry` go this way too."""
        return super().apply_async(*args, **options | {"argsrepr": "(...)", "kwargsrepr": "{...}"})


class Local(threading.local):
    """One client for each thread, whose event loops follow each other: it remembers when a server wants to rest."""

    def __init__(self) -> None:
        env = os.environ.get
        self.smtp = RetryingSMTP(
            aiosmtplib.SMTP(hostname=env("SMTP_HOST", "localhost"), port=int(env("SMTP_PORT", "25"))),
            POLICY,
            username=env("SMTP_USERNAME"),
            password=env("SMTP_PASSWORD"),
        )


local = Local()


async def one_pass(delivery: Delivery) -> Delivery:
    """Make one pass, with a connection of its own."""
    async with local.smtp as smtp:
        return await smtp.attempt(delivery)


@app.task(base=Discreet, bind=True, max_retries=None, acks_late=True, reject_on_worker_lost=True)
def deliver(self: Task, data: dict[str, Any]) -> dict[str, Any]:
    """Make one pass, and come again when the next is due."""
    delivery = asyncio.run(one_pass(Delivery.from_dict(data)))
    now = POLICY.clock()
    if delivery.next_at is not None:
        raise self.retry(args=[delivery.to_dict()], countdown=min(max(0.0, delivery.next_at - now), LONGEST))
    if not delivery.accepted:
        raise aiosmtplib.SMTPException(delivery.story(now))
    return {
        "accepted": delivery.accepted,
        "refused": {who: str(reply) for who, reply in delivery.refused.items()},
        "uncertain": delivery.uncertain,
    }


def send(message: Message, sender: str | None = None, recipients: Sequence[str] | None = None) -> AsyncResult:
    """Hand a mail to the workers, in a task that has the delivery's id."""
    delivery = prepare(message, sender=sender, recipients=recipients)
    return deliver.apply_async([delivery.to_dict()], task_id=delivery.id)
