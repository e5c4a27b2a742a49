"""A Flask application that sends mails with Flask-Mail, and the two lines that make it patient.

Start it with `flask --app examples/flask_app.py run` (needs flask-mail). Then

    curl -F email=bob@example.com localhost:5000/orders

gets 200 when the customer's server has the mail, within half a minute or so, and 502 where it does not. With
Flask-Mailman it is the same two lines, above a function that makes the message and sends it: a message keeps its
connection, and after a 421 that is of no use.

SMTP_HOST (localhost) and SMTP_PORT (25) name the mail server.
"""

import os
import smtplib

from flask import Flask, Response, request
from flask_mail import Mail, Message

import smtpretry  # <-- the first line

app = Flask(__name__)
app.config["MAIL_SERVER"] = os.environ.get("SMTP_HOST", "localhost")
app.config["MAIL_PORT"] = int(os.environ.get("SMTP_PORT", "25"))
mail = Mail(app)


@smtpretry.retry(policy=smtpretry.RetryPolicy.interactive())  # <-- and the second
def send(message: Message) -> None:
    """Send a mail to its one recipient."""
    mail.send(message)


@app.post("/orders")
def order() -> Response:
    """Confirm an order."""
    try:
        send(Message("Your order", [request.form["email"]], "It is on its way.", sender="shop@example.com"))
    except (smtplib.SMTPException, OSError) as error:
        return Response(f"not sent: {error}\n", status=502)
    return Response("sent\n")
