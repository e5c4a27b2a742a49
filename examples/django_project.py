"""A Django project in one file whose mails are sent with retries, by one line of its settings.

Start it with `gunicorn --chdir examples --workers 2 --threads 8 django_project:application` (needs django, gunicorn).
Then

    curl -F email=bob@example.com localhost:8000/orders

gets 200 when the customer's server has the mail, within half a minute or so, and 502 where it does not. Each worker has
a client of its own, whose connections all of its threads share.

SMTP_HOST (localhost) and SMTP_PORT (25) name the mail server.
"""

import os
import smtplib

from django.conf import settings
from django.core.mail import send_mail
from django.core.wsgi import get_wsgi_application
from django.http import HttpRequest, HttpResponse
from django.urls import path
from django.views.decorators.http import require_POST

settings.configure(
    EMAIL_BACKEND="smtpretry.django.EmailBackend",  # <-- the line
    EMAIL_HOST=os.environ.get("SMTP_HOST", "localhost"),
    EMAIL_PORT=int(os.environ.get("SMTP_PORT", "25")),
    ROOT_URLCONF=__name__,
    ALLOWED_HOSTS=["127.0.0.1", "localhost"],
)


@require_POST
def order(request: HttpRequest) -> HttpResponse:
    """Confirm an order."""
    try:
        send_mail("Your order", "It is on its way.", "shop@example.com", [request.POST["email"]])
    except (smtplib.SMTPException, OSError) as error:
        return HttpResponse(f"not sent: {error}\n", status=502)
    return HttpResponse("sent\n")


urlpatterns = [path("orders", order)]
application = get_wsgi_application()
