"""A message through Gmail or Microsoft 365, logged in by OAuth, with a fresh token where the server refuses one.

    python examples/oauth.py google KEY.json me@example.com bob@example.com
    python examples/oauth.py microsoft APP.json me@example.com bob@example.com
    python examples/oauth.py

google needs `pip install google-auth requests`; KEY.json is that of a service account that may act for the user, or of
an authorised user, for the scope https://mail.google.com/. microsoft needs `pip install msal`; APP.json has the
"authority" (https://login.microsoftonline.com/TENANT), "client_id" and "client_credential" of an app that may send from
the user's mailbox (SMTP.SendAsApp). Without arguments it rehearses with a local server that refuses the first token.
The extra `testing` is needed too.

A token generator is asked at each log-in, and once more where the server has refused the token; it cannot tell which.
So each call fetches a token: the one at hand may be the one that was refused, and that is never sent again.
"""

# ruff: noqa: PLC0415 - what one provider needs is imported there
# mypy: no-disallow-untyped-calls, no-warn-return-any

from __future__ import annotations

import argparse
import asyncio
import functools
import json
from email.message import EmailMessage
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiosmtplib

from smtpretry import RetryingSMTP, RetryPolicy
from smtpretry.testing import ScriptedServer

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

SECONDS = 10  # for each request to the provider; google-auth allows two minutes, msal any time


def google(key: dict[str, Any], user: str) -> Callable[[], str]:
    """Return what fetches a token from Google."""
    from google.auth.transport.requests import Request
    from google.oauth2 import credentials, service_account

    scopes = ["https://mail.google.com/"]
    if key.get("type") == "service_account":
        holder = service_account.Credentials.from_service_account_info(key, scopes=scopes, subject=user)
    else:
        holder = credentials.Credentials.from_authorized_user_info(key, scopes)

    def fetch() -> str:
        holder.refresh(functools.partial(Request(), timeout=SECONDS))  # even while the token is valid
        return holder.token

    return fetch


def microsoft(app: dict[str, Any], _user: str) -> Callable[[], str]:
    """Return what fetches a token from Microsoft."""
    import msal  # type: ignore[import-untyped]

    holder = msal.ConfidentialClientApplication(**app, timeout=SECONDS)

    def fetch() -> str:
        holder.remove_tokens_for_client()  # or msal gives the one that it has
        answer = holder.acquire_token_for_client(["https://outlook.office365.com/.default"])
        if "access_token" not in answer:
            message = f"Microsoft gives no token: {answer.get('error')}: {answer.get('error_description')}"
            raise RuntimeError(message)
        return answer["access_token"]

    return fetch


async def send(client: aiosmtplib.SMTP, user: str, fetch: Callable[[], str], recipients: Sequence[str]) -> None:
    """Send a message, and print each reply that decided something."""
    message = EmailMessage()
    message["From"], message["To"], message["Subject"] = user, ", ".join(recipients), "Sent with a token"
    message.set_content("It needed no password.")
    get_token = functools.partial(asyncio.to_thread, fetch)  # both libraries block
    policy = RetryPolicy.interactive()
    async with RetryingSMTP(client, policy, username=user, oauth_token_generator=get_token) as smtp:
        delivery = await smtp.deliver(message)
    print(*[step for attempt in delivery.attempts for step in attempt.steps], sep="\n")
    print(f"accepted: {delivery.accepted}, refused: {list(delivery.refused)}")


async def rehearse() -> None:
    """Send a message through a server that takes the second token only."""
    tokens = iter(["revoked", "fresh"])
    async with ScriptedServer(tls=True, token="fresh") as server:
        await send(server.client(), "me@example.com", tokens.__next__, ["bob@example.com"])


def main(arguments: Sequence[str] | None = None) -> None:
    """Send through the provider that is named, or rehearse."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers()
    parser.set_defaults(provider=None)
    for provider, hostname in ((google, "smtp.gmail.com"), (microsoft, "smtp.office365.com")):
        command = commands.add_parser(provider.__name__)
        command.set_defaults(provider=provider, hostname=hostname)
        command.add_argument("key", type=Path)
        command.add_argument("user")
        command.add_argument("recipients", nargs="+")
    options = parser.parse_args(arguments)
    if options.provider is None:
        asyncio.run(rehearse())
        return
    try:
        fetch = options.provider(json.loads(options.key.read_text()), options.user)
    except (ImportError, OSError, TypeError, ValueError) as error:
        parser.error(str(error))
    client = aiosmtplib.SMTP(hostname=options.hostname, port=587, start_tls=True)
    asyncio.run(send(client, options.user, fetch, options.recipients))


if __name__ == "__main__":
    main()
