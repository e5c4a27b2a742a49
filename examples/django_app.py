"""A Django project in one file: an async view that sends a mail, and answers with what became of it.

Start it with `uvicorn --app-dir examples django_app:application` (needs django and uvicorn). Then

    curl -F email=bob@example.com -F text='Two, please.' -F drawing=@README.md localhost:8000/orders

gets, within half a minute or so,

    200  the customer's server has the mail, or may have it (UNCERTAIN);
    502  it does not, and another request would not help, or would send the others a second one;
    503  nobody has it, and the server wants it later: after Retry-After.

The sender of the envelope, who hears of bounces, is Django's from_email, also where headers={"From": ...} shows
somebody else: `smtp.deliver` is given both ends of the envelope, as Django's own backend gives them.

A 202 would be a promise, to be kept also where this process ends: celery_app.py is for that. One client serves the
process, for under ASGI all async views run in one event loop; under WSGI each has its own, so use `smtpretry.send`.

SMTP_HOST (localhost) and SMTP_PORT (25) name the mail server, SMTP_USERNAME and SMTP_PASSWORD log in where it asks.
"""

import asyncio
import math
import os
from collections.abc import Awaitable, Callable
from typing import Any

import aiosmtplib
from django import forms
from django.conf import settings
from django.core.asgi import get_asgi_application
from django.core.mail import EmailMessage
from django.http import HttpRequest, JsonResponse
from django.urls import path
from django.views.decorators.http import require_POST

from smtpretry import Delivery, RetryingSMTP, RetryPolicy

BOUNCES, SHOP, ORDERS = "bounces@example.com", "The shop <shop@example.com>", "orders@example.com"
env = os.environ.get
smtp = RetryingSMTP(
    aiosmtplib.SMTP(hostname=env("SMTP_HOST", "localhost"), port=int(env("SMTP_PORT", "25")), timeout=10),
    RetryPolicy.interactive(),
    username=env("SMTP_USERNAME"),
    password=env("SMTP_PASSWORD"),
)
under_way: set[asyncio.Task[Delivery]] = set()


class Order(forms.Form):
    """What a customer fills in."""

    email = forms.EmailField()
    text = forms.CharField()
    drawing = forms.FileField(required=False)


@require_POST
async def order(request: HttpRequest) -> JsonResponse:
    """Send the customer a copy of the order, and the shop another, in Bcc."""
    form = Order(request.POST, request.FILES)
    if not form.is_valid():
        return JsonResponse(form.errors, status=400)
    customer, drawing = form.cleaned_data["email"], form.cleaned_data["drawing"]
    text = form.cleaned_data["text"]
    mail = EmailMessage("Your order", text, BOUNCES, [customer], bcc=[ORDERS], headers={"From": SHOP})
    if drawing:
        mail.attach(drawing.name, drawing.read(), drawing.content_type)
    envelope = {"sender": mail.from_email, "recipients": mail.recipients()}
    sending = asyncio.create_task(smtp.deliver(mail.message(), **envelope))
    under_way.add(sending)
    sending.add_done_callback(under_way.discard)
    return answer(customer, await asyncio.shield(sending))  # where the customer hangs up, Django cancels the view alone


def answer(customer: str, delivery: Delivery) -> JsonResponse:
    """Tell what became of the customer's mail, and nothing of the others."""
    outcome, refusal = delivery.outcomes[customer], delivery.refused.get(customer)
    body = {"status": outcome.status.value, "reply": str(outcome.reply)}
    if refusal is None:
        return JsonResponse(body)
    if refusal.is_permanent or delivery.accepted or delivery.uncertain:
        return JsonResponse(body, status=502)
    return JsonResponse(body, status=503, headers={"Retry-After": math.ceil(refusal.retry_after or 60)})


async def application(scope: dict[str, Any], receive: Callable[[], Awaitable[Any]], send: Callable[..., Any]) -> None:
    """Django, and around it the client's life in ASGI's lifespan, of which Django knows nothing.

    A server without lifespan loses no mail by it, only the QUIT: the client's connection closes after idle seconds.
    """
    if scope["type"] == "lifespan":
        await receive()
        async with smtp:
            await send({"type": "lifespan.startup.complete"})
            await receive()
            await asyncio.gather(*under_way, return_exceptions=True)  # half a minute at most
        await send({"type": "lifespan.shutdown.complete"})
    else:
        await django(scope, receive, send)


urlpatterns = [path("orders", order)]
settings.configure(ROOT_URLCONF=__name__, ALLOWED_HOSTS=["127.0.0.1", "localhost"])
django = get_asgi_application()
