"""A script that sends mails with smtplib, and the two lines that make it patient.

Start it with `python examples/smtplib_script.py bob@example.com ann@example.com`. Where the server is busy, greylists
or cannot be reached, `send` is called again, for up to an hour; what is refused for good comes out as smtplib raises
it. One recipient for each call: a call that is repeated offers the mail to all of its recipients.

SMTP_HOST (localhost) and SMTP_PORT (25) name the mail server.
"""

import os
import smtplib
import sys
from email.message import EmailMessage

import smtpretry  # <-- the first line


@smtpretry.retry  # <-- and the second
def send(recipient: str) -> None:
    """Send a mail to one recipient."""
    message = EmailMessage()
    message["From"], message["To"], message["Subject"] = "app@example.com", recipient, "Your order"
    message["Message-ID"] = f"<order-of-{recipient.partition('@')[0]}@example.com>"  # the same each time
    message.set_content("It is on its way.")
    with smtplib.SMTP(os.environ.get("SMTP_HOST", "localhost"), int(os.environ.get("SMTP_PORT", "25"))) as smtp:
        smtp.send_message(message)


if __name__ == "__main__":
    for who in sys.argv[1:]:
        send(who)
        print(f"sent to {who}")
