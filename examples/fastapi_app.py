"""A FastAPI application with one client for as long as it runs: it answers at once, and sends in the background.

Start it with `uvicorn --app-dir examples fastapi_app:app` (needs fastapi, uvicorn and email-validator). Then

    curl --json '{"email": "bob@example.com"}' localhost:8000/sign-up    answers 202, and a welcome is on its way;
    curl localhost:8000/health                                           tells the client's state, and counts the mails.

SMTP_HOST (localhost) and SMTP_PORT (25; on 465 TLS comes first) name the mail server, SMTP_USERNAME and SMTP_PASSWORD
log in where it asks for it, MAIL_FROM (app@localhost) is the sender. A mail that still waits when the application stops
is logged, and kept as a file in the directory MAIL_UNSENT (unsent).
"""

import asyncio
import logging
import os
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from email.message import EmailMessage
from pathlib import Path
from typing import Annotated

import aiosmtplib
from fastapi import Body, FastAPI
from pydantic import EmailStr

from smtpretry import ClientClosed, Delivery, RetryingSMTP, RetryPolicy, delivery_of

POLICY = RetryPolicy()  # an hour of patience, for nobody waits for the answer
TLS_PORT = 465
log, env = logging.getLogger(__name__), os.environ.get


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Hold the client open; at the end it wakes the sends that wait, and the task group awaits them all."""
    port = int(env("SMTP_PORT", "25"))
    client = aiosmtplib.SMTP(hostname=env("SMTP_HOST", "localhost"), port=port, use_tls=port == TLS_PORT)
    smtp = RetryingSMTP(client, POLICY, username=env("SMTP_USERNAME"), password=env("SMTP_PASSWORD"))
    async with asyncio.TaskGroup() as sends, smtp:
        app.state.smtp, app.state.sends, app.state.mails = smtp, sends, Counter(on_the_way=0, sent=0, failed=0)
        yield


app = FastAPI(lifespan=lifespan)


@app.post("/sign-up", status_code=202)
async def sign_up(email: Annotated[EmailStr, Body(embed=True)]) -> dict[str, str]:
    """Answer at once. The task group holds the send: it is neither garbage-collected nor forgotten."""
    message = EmailMessage()
    message["From"], message["To"], message["Subject"] = env("MAIL_FROM", "app@localhost"), email, "Welcome"
    message.set_content("Good to have you here.")
    app.state.sends.create_task(send(app.state.smtp, message, app.state.mails))
    return {"mail": "on its way"}


@app.get("/health")
async def health() -> dict[str, bool | int]:
    """Tell whether there is a connection now (none is needed to send), and what became of the mails so far."""
    return {"connected": app.state.smtp.is_connected, **app.state.mails}


async def send(smtp: RetryingSMTP, message: EmailMessage, mails: Counter[str]) -> None:
    """Send it, however long that takes, and count it. An exception would end the task group, and the application."""
    mails["on_the_way"] += 1
    try:
        delivery = await smtp.deliver(message)
        missed = [*delivery.refused, *delivery.uncertain]
        for who in missed:
            log.error("mail %s failed for %s: %s", delivery.id, who, delivery.outcomes[who].reply)
        mails["failed" if missed else "sent"] += 1
    except (ClientClosed, asyncio.CancelledError) as error:
        keep(delivery_of(error))
    except Exception:
        log.exception("a mail failed")
        mails["failed"] += 1
    finally:
        mails["on_the_way"] -= 1


def keep(delivery: Delivery | None) -> None:
    """Write down what the application stops before; `smtp.deliver(bytes, sender=..., recipients=...)` sends it."""
    if delivery:
        log.warning("mail %s from %s is not sent to %s", delivery.id, delivery.sender, ", ".join(delivery.pending))
        path = Path(env("MAIL_UNSENT", "unsent"), f"{delivery.id}.eml")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(delivery.message)
