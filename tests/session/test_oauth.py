"""The OAuth example with google-auth and msal themselves: their tokens come from a token endpoint on this machine."""

from __future__ import annotations

import asyncio
import base64
import http.server
import json
import logging
import re
import ssl
import threading
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

import google.auth.exceptions
import google.auth.jwt
import oauth
import pytest
import trustme
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from support import APP, BOB

from smtpretry.testing import ScriptedServer, no_wait

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

FIRST, SECOND = TOKENS = tuple(f"{name}-{'t0ken' * 300}" for name in ("first", "second"))  # as long as real ones
SECRET = "s3cret-of-the-application"
PROVIDERS = ("service account", "authorised user", "microsoft")


class TokenEndpoint(http.server.ThreadingHTTPServer):
    """A token endpoint (RFC 6749 §3.2) that gives each of the tokens once, for an hour, or answers as it is told."""

    def __init__(self, context: ssl.SSLContext) -> None:
        super().__init__(("127.0.0.1", 0), TokenRequest)
        self.socket = context.wrap_socket(self.socket, server_side=True)
        self.uri = f"https://localhost:{self.server_port}/tenant"
        self.forms: list[dict[str, str]] = []
        self.answers: list[tuple[int, dict[str, Any]] | None] = [  # None: silence
            (200, {"access_token": token, "token_type": "Bearer", "expires_in": 3600}) for token in TOKENS
        ]
        self.over = threading.Event()


class TokenRequest(http.server.BaseHTTPRequestHandler):
    server: TokenEndpoint

    def do_GET(self) -> None:  # the metadata that msal begins with (OpenID Connect Discovery §4)
        uri = self.server.uri
        self.answer(200, {"issuer": uri, "authorization_endpoint": uri, "token_endpoint": uri})

    def do_POST(self) -> None:
        form = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
        self.server.forms.append({name: value for name, [value] in form.items()})
        answer = self.server.answers.pop(0)
        if answer is None:
            self.server.over.wait()
        else:
            self.answer(*answer)

    def answer(self, status: int, content: dict[str, Any]) -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(content).encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def endpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TokenEndpoint]:
    """Run a token endpoint whose certificate is trusted."""
    authority, context = trustme.CA(), ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("localhost").configure_cert(context)
    authority.cert_pem.write_to_path(tmp_path / "authority.pem")
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "authority.pem"))
    with TokenEndpoint(context) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.over.set()
        server.shutdown()
        thread.join()


@pytest.fixture
def fetch(provider: str, endpoint: TokenEndpoint, monkeypatch: pytest.MonkeyPatch) -> Callable[[], str]:
    """Give what the example fetches its tokens with."""
    if provider == "microsoft":
        app = {"authority": endpoint.uri, "client_id": "app", "client_credential": SECRET, "instance_discovery": False}
        return oauth.microsoft(app, APP)
    if provider == "authorised user":
        monkeypatch.setattr("google.oauth2.credentials._GOOGLE_OAUTH2_TOKEN_ENDPOINT", endpoint.uri)
        return oauth.google({"refresh_token": "refresh", "client_id": "app", "client_secret": SECRET}, APP)
    private_key = rsa.generate_private_key(65537, 2048).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    key = {"client_email": "app@project.test", "token_uri": endpoint.uri, "private_key": private_key.decode()}
    return oauth.google({"type": "service_account", **key}, APP)


async def send(server: ScriptedServer, fetch: Callable[[], str]) -> None:
    """Send a message through this server as the example does."""
    async with server:
        await oauth.send(server.client(), APP, fetch, [BOB])


@pytest.mark.parametrize("provider", PROVIDERS)
def test_a_refused_token_is_followed_by_a_fresh_one(
    fetch: Callable[[], str],
    endpoint: TokenEndpoint,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Though the refused token is valid for an hour, the next is another, and the mail goes out: two log-ins in all."""
    caplog.set_level(logging.DEBUG)
    caplog.set_level(logging.CRITICAL, "mail.log")  # the server's
    server = ScriptedServer(tls=True, token=SECOND)
    asyncio.run(send(server, fetch))
    assert [mail.authenticated for mail in server.received(BOB)] == [APP]
    assert server.verbs.count("AUTH") == len(endpoint.forms) == 2
    shown = caplog.text + "".join(capsys.readouterr())
    assert "AUTH: 535" in shown
    for secret in (*TOKENS, SECRET):
        assert secret not in shown
        assert base64.b64encode(secret.encode()).decode() not in shown


@pytest.mark.parametrize("provider", PROVIDERS)
def test_a_token_is_asked_for_the_one_mailbox_and_for_mail_alone(
    provider: str, fetch: Callable[[], str], endpoint: TokenEndpoint
) -> None:
    """The token endpoint is asked for what sending needs, and for nothing else."""
    assert fetch() == FIRST
    [form] = endpoint.forms
    if provider == "service account":
        form |= google.auth.jwt.decode(form["assertion"], verify=False)
        assert form["sub"] == APP
    wanted = "https://outlook.office365.com/.default" if provider == "microsoft" else "https://mail.google.com/"
    assert form["scope"] == wanted


@pytest.mark.parametrize("provider", PROVIDERS)
def test_a_refusal_of_the_token_endpoint_reaches_the_caller(
    fetch: Callable[[], str], endpoint: TokenEndpoint, caplog: pytest.LogCaptureFixture
) -> None:
    """What the provider says against it is in the exception; no log-in was tried, and the delivery can be taken up again."""
    endpoint.answers = [(400, {"error": "invalid_grant", "error_description": "The secret has expired."})]
    server = ScriptedServer(tls=True, token=SECOND)
    errors = (google.auth.exceptions.RefreshError, RuntimeError)
    with pytest.raises(errors, match=r"invalid_grant: The secret has expired") as caught:
        asyncio.run(send(server, fetch))
    assert caught.value.delivery.pending == [BOB]
    assert "AUTH" not in server.verbs
    assert SECRET not in f"{caught.getrepr(showlocals=False)}{caplog.text}"


@pytest.mark.parametrize("provider", PROVIDERS)
def test_a_token_endpoint_that_is_silent_is_asked_again(
    provider: str,
    endpoint: TokenEndpoint,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The example's own limit ends the wait for the token endpoint, the story says that it was that, and the mail goes."""
    monkeypatch.setattr(oauth, "SECONDS", 0.5)
    monkeypatch.setattr(oauth.RetryPolicy, "interactive", no_wait)
    endpoint.answers.insert(0, None)
    server = ScriptedServer(tls=True, token=FIRST)
    asyncio.run(send(server, request.getfixturevalue("fetch")))
    assert [mail.authenticated for mail in server.received(BOB)] == [APP]
    assert re.search(r"AUTH: no reply \(oauth_token_generator raised .*timed out.*RECONNECT", capsys.readouterr().out)


def test_without_arguments_it_rehearses(capsys: pytest.CaptureFixture[str]) -> None:
    """The rehearsal shows a token that is refused, another that is accepted, and a mail that arrives."""
    oauth.main([])
    assert "535 5.7.8 Username and Password not accepted -> REFRESH_TOKEN\nAUTH: 235" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("provider", "content", "why"),
    [
        ("google", None, "No such file"),
        ("google", "{}", "missing fields .*refresh_token"),
        ("google", '{"type": "service_account"}', "missing fields .*client_email"),
        ("microsoft", "{}", "client_id"),
        ("microsoft", "not JSON", "Expecting value"),
    ],
)
def test_a_key_that_cannot_be_used_is_refused_at_once(
    provider: str, content: str | None, why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A wrong file ends the command with the reason, before anything is sent."""
    key = tmp_path / "key.json"
    if content is not None:
        key.write_text(content)
    with pytest.raises(SystemExit, match="2"):
        oauth.main([provider, str(key), APP, BOB])
    assert re.search(why, capsys.readouterr().err)
