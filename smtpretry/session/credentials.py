"""What to log in with, and what is said to do it (RFC 4954). No other module knows credentials."""

from __future__ import annotations

import base64
import binascii
import hmac
import inspect
from typing import TYPE_CHECKING, Final

from smtpretry.replies.patterns import compiled

from .redactor import Redactor

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Generator, Iterator

    import aiosmtplib

    # Yields the initial response (None for none), then an answer to each challenge. It ends where it has none.
    Dialogue = Generator[bytes | None, bytes, None]

_NO_CHARACTER = "[\ud800-\udc7f\udd00-\udfff]"
_PASSWORD_PROMPTS = (b"pass", b"kennwort", b"secret", b"token")
_USERNAME_PROMPTS = (b"user", b"name", b"log", b"mail", b"account", b"benutzer")


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
            if isinstance(value, str) and compiled(_NO_CHARACTER).search(value):
                msg = f"{name} has a character that no encoding can write"
                raise ValueError(msg)
        if oauth_token_generator is not None and not callable(oauth_token_generator):
            msg = "oauth_token_generator is a coroutine function that returns a token"
            raise TypeError(msg)
        self.username, self.password, self.oauth_token_generator = username, password, oauth_token_generator

    @classmethod
    def of(cls, client: aiosmtplib.SMTP) -> Credentials:
        """What the client itself was given. It has no public name for it."""
        username, password = client._login_username, client._login_password  # noqa: SLF001
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

    def mechanisms(self, *, encrypted: bool) -> tuple[str, ...]:
        """Which to try, in this order: in the clear one first that does not show the password."""
        if self.token:
            return ("xoauth2",)
        return ("plain", "login", "cram-md5") if encrypted else ("cram-md5", "plain", "login")

    def dialogue(self, secret: str | bytes, mechanism: str) -> Dialogue:
        """What a mechanism says."""
        return _DIALOGUES[mechanism](_bytes(self.username or ""), _bytes(secret))

    async def secret(self) -> str | bytes:
        """The password, or the token that the generator gives now.

        Raises:
            TypeError: it is no generator of tokens.
            Whatever it raises itself.
        """
        if self.oauth_token_generator is None:
            return self.password or ""
        asked = self.oauth_token_generator()
        token: object = await asked if inspect.isawaitable(asked) else None
        if not isinstance(token, (str, bytes)):
            msg = "oauth_token_generator is to be a coroutine function that returns a token, a str"
            raise TypeError(msg)
        return token

    def redactor(self, secret: str | bytes) -> Redactor:
        """What hides the secret, in every form in which it goes over the line."""
        name, key = _bytes(self.username or ""), _bytes(secret)
        sent = (
            *(key, key.hex().encode(), *_in_base64(key)),
            *(base64.b64encode(_initial(way, name, key)) for way in _INITIAL),
        )
        return Redactor(
            (form.decode(errors="replace") for form in sent),
            (form.decode(errors="replace") for form in (name, base64.b64encode(name))),
        )


def _bytes(text: str | bytes) -> bytes:
    """As UTF-8; bytes that were none, such as those of an environment variable, come back as they were."""
    return text if isinstance(text, bytes) else text.encode(errors="surrogateescape")


def _in_base64(text: bytes) -> Iterator[bytes]:
    """How a text looks within something in base64, wherever it begins."""
    for shift in range(3):
        yield base64.b64encode(bytes(shift) + text)[-(-shift * 4 // 3) :]


_INITIAL: Final = {"plain": b"\0%b\0%b", "xoauth2": b"user=%b\1auth=Bearer %b\1\1"}


def _initial(mechanism: str, username: bytes, secret: bytes) -> bytes:
    return _INITIAL[mechanism] % (username, secret)


def _plain(username: bytes, password: bytes) -> Dialogue:
    """RFC 4616; a server that has not read the initial response asks for it with an empty challenge."""
    response = _initial("plain", username, password)
    if not (yield response):
        yield response


def _login(username: bytes, password: bytes) -> Dialogue:
    """draft-murchison-sasl-login: what a prompt asks for, once again where it is the user name.

    A prompt that says neither is for the password, as the second of two.
    """
    prompt, names = (yield username), 1
    while any(word in prompt.lower() for word in _USERNAME_PROMPTS) and not _asks_for_password(prompt):
        if names > 1:
            return
        prompt, names = (yield username), names + 1
    yield password


def _asks_for_password(prompt: bytes) -> bool:
    return any(word in prompt.lower() for word in _PASSWORD_PROMPTS)


def _cram_md5(username: bytes, password: bytes) -> Dialogue:
    """RFC 2195."""
    challenge = yield None
    if challenge:
        yield username + b" " + hmac.new(password, challenge, "md5").hexdigest().encode()


def _xoauth2(username: bytes, token: bytes) -> Dialogue:
    """Google's: a refusal is a challenge that says why, and waits for an empty response before the reply."""
    response = _initial("xoauth2", username, token)
    challenge = yield response
    yield b"" if challenge else response


_DIALOGUES: Final[dict[str, Callable[[bytes, bytes], Dialogue]]] = {
    "plain": _plain,
    "login": _login,
    "cram-md5": _cram_md5,
    "xoauth2": _xoauth2,
}


def challenge_of(text: str) -> bytes:
    """What a 334 asks, which some servers do not encode."""
    try:
        return base64.b64decode(text.strip(), validate=True)
    except (binascii.Error, ValueError):
        return text.encode(errors="surrogateescape")
