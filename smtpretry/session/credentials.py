"""What to log in with. The only room that knows credentials."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

from aiosmtplib.auth import auth_login_encode, auth_plain_encode, auth_xoauth2_encode

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    import aiosmtplib

_SHORTEST_SECRET = 4  # characters; a shorter one would be found in any text


class Credentials:
    """What to log in with. Shows nothing of it."""

    def __init__(
        self,
        username: str | bytes | None = None,
        password: str | bytes | None = None,
        oauth_token_generator: Callable[[], Awaitable[str]] | None = None,
    ) -> None:
        if password is not None and oauth_token_generator is not None:
            msg = "password and oauth_token_generator exclude each other: which one shall log in?"
            raise ValueError(msg)
        if username is None and (password is not None or oauth_token_generator is not None):
            msg = "a password or a token generator needs a username="
            raise ValueError(msg)
        if username is not None and password is None and oauth_token_generator is None:
            msg = "a username needs a password= or an oauth_token_generator="
            raise ValueError(msg)
        for name, value in (("username", username), ("password", password)):
            if value is not None and not isinstance(value, (str, bytes)):
                msg = f"{name} is str or bytes, not {type(value).__name__}"
                raise TypeError(msg)
        if oauth_token_generator is not None and not callable(oauth_token_generator):
            msg = "oauth_token_generator is a coroutine function that returns a token"
            raise TypeError(msg)
        self.username, self.password, self.oauth_token_generator = username, password, oauth_token_generator

    @classmethod
    def of(cls, client: aiosmtplib.SMTP) -> Credentials:
        """What the client itself was given."""
        username, password = client._login_username, client._login_password  # noqa: SLF001 - see Connection
        generator = client._oauth_token_generator  # noqa: SLF001
        if username is not None and generator is None and password is None:
            password = ""  # as aiosmtplib does
        return cls(username, password, generator)

    def __bool__(self) -> bool:
        return self.username is not None

    @property
    def token(self) -> bool:
        """Whether a token logs in, not a password."""
        return self.oauth_token_generator is not None

    async def token_for_now(self) -> str | bytes:
        """Ask the generator. Raises TypeError where it is none, and whatever it raises itself."""
        asked = self.oauth_token_generator() if self.oauth_token_generator else None
        token: object = await asked if inspect.isawaitable(asked) else None
        if not isinstance(token, (str, bytes)):
            msg = "oauth_token_generator is to be a coroutine function that returns a token, a str"
            raise TypeError(msg)
        return token

    def forms(self, secret: str | bytes) -> list[str]:
        """In which forms the secret goes over the line."""
        username = self.username or ""
        forms = [
            auth_plain_encode(username, secret),
            *auth_login_encode(b"", secret),
            auth_xoauth2_encode(username, secret),
        ]
        plain = secret if isinstance(secret, bytes) else secret.encode()
        return [form.decode(errors="replace") for form in (*forms, plain) if len(form) >= _SHORTEST_SECRET]
