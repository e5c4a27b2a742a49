"""A FastAPI application with one client for as long as it runs: it answers at once, and sends in the background.

Start it with `uvicorn --app-dir examples fastapi_app:app` (needs fastapi, uvicorn, email-validator, prometheus-client).
Then

    curl --json '{"email": "bob@example.com"}' localhost:8000/sign-up    answers 202, and a welcome is on its way;
    curl localhost:8000/health                                           tells how the client is doing;
    curl localhost:8000/metrics                                          is for Prometheus; dashboard.json shows it.

SMTP_HOST (localhost) and SMTP_PORT (25; on 465 TLS comes first) name the mail server, SMTP_USERNAME and SMTP_PASSWORD
log in where it asks for it, MAIL_FROM (app@localhost) is the sender. A mail that still waits when the application stops
is logged, and kept as a file in the directory MAIL_UNSENT (unsent).
"""

import asyncio
import logging
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict
from email.message import EmailMessage
from pathlib import Path
from typing import Annotated, Any

import aiosmtplib
from fastapi import Body, FastAPI, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import EmailStr

from smtpretry import ClientClosed, Delivery, RetryingSMTP, RetryPolicy, delivery_of, instrumentation

POLICY = RetryPolicy()  # an hour of patience, for nobody waits for the answer
TLS_PORT = 465
log, env = logging.getLogger(__name__), os.environ.get


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Hold the client open; at the end it wakes the sends that wait, and the task group awaits them all."""
    port = int(env("SMTP_PORT", "25"))
    client = aiosmtplib.SMTP(hostname=env("SMTP_HOST", "localhost"), port=port, use_tls=port == TLS_PORT)
    username, password, hook = env("SMTP_USERNAME"), env("SMTP_PASSWORD"), instrumentation.prometheus()
    smtp = RetryingSMTP(client, POLICY, username=username, password=password, on_step=hook)
    async with asyncio.TaskGroup() as sends, smtp:
        app.state.smtp, app.state.sends = smtp, sends
        yield


app = FastAPI(lifespan=lifespan)


@app.post("/sign-up", status_code=202)
async def sign_up(email: Annotated[EmailStr, Body(embed=True)]) -> dict[str, str]:
    """Answer at once. The task group holds the send: it is neither garbage-collected nor forgotten."""
    message = EmailMessage()
    message["From"], message["To"], message["Subject"] = env("MAIL_FROM", "app@localhost"), email, "Welcome"
    message.set_content("Good to have you here.")
    app.state.sends.create_task(send(app.state.smtp, message))
    return {"mail": "on its way"}


@app.get("/health")
async def health() -> dict[str, Any]:
    """Tell how many mails wait and what became of the others, and until when and why the mail server is left alone."""
    return asdict(app.state.smtp.stats())


@app.get("/metrics")
async def metrics() -> Response:
    """Tell Prometheus what the hook has counted."""
    return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)


async def send(smtp: RetryingSMTP, message: EmailMessage) -> None:
    """Send it, however long that takes. An exception would end the task group, and the application."""
    try:
        delivery = await smtp.deliver(message)
        for who in [*delivery.refused, *delivery.uncertain]:
            log.error("mail %s failed for %s: %s", delivery.id, who, delivery.outcomes[who].reply)
    except (ClientClosed, asyncio.CancelledError) as error:
        keep(delivery_of(error))
    except Exception:
        log.exception("a mail failed")


def keep(delivery: Delivery | None) -> None:
    """Write down what the application stops before; `smtp.deliver(bytes, sender=..., recipients=...)` sends it."""
    if delivery:
        log.warning("mail %s from %s is not sent to %s", delivery.id, delivery.sender, ", ".join(delivery.pending))
        path = Path(env("MAIL_UNSENT", "unsent"), f"{delivery.id}.eml")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(delivery.message)
