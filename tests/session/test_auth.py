"""AUTH: which mechanism, what each challenge gets, what a session does that has lost its log-in, and what is hidden."""

from __future__ import annotations

import asyncio
import base64
import errno
import hmac
import logging
import re
import socket
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import aiosmtplib
import google.auth.transport.requests
import httpx
import pytest
import requests
import virtual
from support import ANN, APP, BOB, BODY, LOG_IN, PASSWORD, USER, once, patient, talk, virtually
from test_login import everything_of

from smtpretry import RetryingSMTP
from smtpretry.session.redactor import Redactor
from smtpretry.testing import no_wait

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

MINE: dict[str, Any] = {"username": USER, "password": PASSWORD}
AUTH: dict[str, Any] = {"auth": (USER, PASSWORD)}


def coded(text: str) -> bytes:
    """As it goes over the line."""
    return base64.b64encode(text.encode())


PLAIN = coded(f"\0{USER}\0{PASSWORD}")


class Asking:
    """A server whose AUTH goes as told: for each line that it gets, what it says."""

    def __init__(self, offers: str, *answers: tuple[bytes, bytes]) -> None:
        self.offers, self.answers = offers, list(answers)
        self.heard = list[bytes]()
        self.unexpected = list[tuple[bytes, bytes]]()
        self.mails = 0
        self.in_auth = False

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Talk to one client."""
        writer.write(b"220 hello\r\n")
        body = False
        while raw := await reader.readline():
            line, said = raw.rstrip(b"\r\n"), b"250 ok"
            if body:
                body, said = line != b".", b"250 ok" if line == b"." else b""
                self.mails += not body
            elif line.startswith(b"EHLO"):
                said = b"250-hello\r\n250 AUTH " + self.offers.encode()
            elif line == b"DATA":
                body, said = True, b"354 go on"
            elif line.startswith(b"AUTH") or self.in_auth:
                said = self.answer(line)
            elif line == b"QUIT":
                said = b"221 bye"
            if said:
                writer.write(said + b"\r\n")
        writer.close()

    def answer(self, line: bytes) -> bytes:
        """Say what is due."""
        self.heard.append(line)
        expected, said = self.answers.pop(0) if self.answers else (b"nothing", b"535 5.7.8 too much")
        if expected != line:
            self.unexpected.append((expected, line))
        self.in_auth = said.strip().startswith(b"334")
        return said

    @asynccontextmanager
    async def client(self, **mine: Any) -> AsyncIterator[RetryingSMTP]:
        """Listen, and yield a client that logs in."""
        server = await asyncio.start_server(self.serve, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        one = aiosmtplib.SMTP(hostname="127.0.0.1", port=port, local_hostname="client.example", **(mine or MINE))
        async with RetryingSMTP(one, once()) as smtp:
            yield smtp
        server.close()


CRAM = coded("<1@x>")
DIGEST = base64.b64encode(f"{USER} ".encode() + hmac.new(PASSWORD.encode(), b"<1@x>", "md5").hexdigest().encode())
NAME, WORD = coded(USER), coded(PASSWORD)
OK = b"235 2.7.0 welcome"
DIALOGUES: dict[str, tuple[str, list[tuple[bytes, bytes]]]] = {
    "user name again": (
        "LOGIN",
        [(b"AUTH LOGIN " + NAME, b"334 VXNlcm5hbWU6"), (NAME, b"334 UGFzc3dvcmQ6"), (WORD, OK)],
    ),
    "as Microsoft spells it": (
        "LOGIN",
        [(b"AUTH LOGIN " + NAME, b"334 " + coded("User Name\0")), (NAME, b"334 " + coded("Password\0")), (WORD, OK)],
    ),
    "not encoded": (
        "LOGIN",
        [(b"AUTH LOGIN " + NAME, b"334 Username:"), (NAME, b"334 Password:"), (WORD, OK)],
    ),
    "password for user": (
        "LOGIN",
        [(b"AUTH LOGIN " + NAME, b"334 " + coded(f"Password for user {USER}:")), (WORD, OK)],
    ),
    "no prompt": ("LOGIN", [(b"AUTH LOGIN " + NAME, b"334"), (WORD, OK)]),
    "another prompt": ("LOGIN", [(b"AUTH LOGIN " + NAME, b"334 " + coded("?")), (WORD, OK)]),
    "PLAIN asks again": ("PLAIN", [(b"AUTH PLAIN " + PLAIN, b"334 "), (PLAIN, OK)]),
    "CRAM-MD5": ("CRAM-MD5", [(b"AUTH CRAM-MD5", b"334 " + CRAM), (DIGEST, OK)]),
    "blank lines": ("LOGIN", [(b"AUTH LOGIN " + NAME, b"\r\n334 UGFzc3dvcmQ6\r\n"), (WORD, b"\r\n" + OK)]),
    "PLAIN fails": (
        "PLAIN LOGIN",
        [(b"AUTH PLAIN " + PLAIN, b"504 5.5.4 no"), (b"AUTH LOGIN " + NAME, b"334 x"), (WORD, OK)],
    ),
    "CRAM-MD5 over hashes": (
        "PLAIN CRAM-MD5",
        [(b"AUTH CRAM-MD5", b"334 " + CRAM), (DIGEST, b"535 5.7.8 no"), (b"AUTH PLAIN " + PLAIN, OK)],
    ),
    "cancelled, then the next": (
        "CRAM-MD5 PLAIN",
        [(b"AUTH CRAM-MD5", b"334 "), (b"*", b"501 5.7.0 cancelled"), (b"AUTH PLAIN " + PLAIN, OK)],
    ),
}


@pytest.mark.parametrize("what", DIALOGUES)
@virtually
async def test_each_challenge_gets_what_it_asks_for(what: str) -> None:
    """LOGIN answers what the prompt asks for, a server that asks twice is answered twice, and the log-in succeeds."""
    offers, answers = DIALOGUES[what]
    server = Asking(offers, *answers)
    async with server.client() as smtp:
        delivery = await smtp.deliver(BODY, sender=APP, recipients=[ANN])
    assert server.unexpected == []
    assert delivery.accepted == [ANN]
    assert server.mails == 1


REFUSALS: dict[str, tuple[str, list[tuple[bytes, bytes]], int]] = {
    "LOGIN asks for ever": (
        "LOGIN",
        [(b"AUTH LOGIN " + NAME, b"334 VXNlcm5hbWU6"), (NAME, b"334 VXNlcm5hbWU6"), (b"*", b"501 5.7.0 cancelled")],
        501,
    ),
    "LOGIN wants a third thing": (
        "LOGIN",
        [(b"AUTH LOGIN " + NAME, b"334 UGFzc3dvcmQ6"), (WORD, b"334 " + coded("PIN")), (b"*", b"535 5.7.8 cancelled")],
        535,
    ),
    "PLAIN asks something": ("PLAIN", [(b"AUTH PLAIN " + PLAIN, b"334 YWJj"), (b"*", b"501 5.5.2 cancelled")], 501),
    "334 to everything": ("PLAIN", [(b"AUTH PLAIN " + PLAIN, b"334 YWJj"), (b"*", b"334 YWJj")], 334),
    "all fail": (
        "PLAIN LOGIN",
        [(b"AUTH PLAIN " + PLAIN, b"502 5.5.1 no"), (b"AUTH LOGIN " + NAME, b"534 5.7.9 no")],
        534,
    ),
    "PLAIN judges": ("PLAIN LOGIN", [(b"AUTH PLAIN " + PLAIN, b"535 5.7.8 wrong")], 535),
    "LOGIN judges": (
        "LOGIN PLAIN",
        [(b"AUTH PLAIN " + PLAIN, b"504 no"), (b"AUTH LOGIN " + NAME, b"334 x"), (WORD, b"535 no")],
        535,
    ),
}


@pytest.mark.parametrize("what", REFUSALS)
@virtually
async def test_a_challenge_without_an_answer_is_a_refusal(what: str) -> None:
    """What cannot be answered is cancelled with `*` (RFC 4954 §4), and is a refusal at once; so is a 535."""
    offers, answers, code = REFUSALS[what]
    server = Asking(offers, *answers)
    async with server.client() as smtp:
        with pytest.raises(aiosmtplib.SMTPAuthenticationError) as caught:
            await smtp.sendmail(APP, [ANN], BODY)
    assert caught.value.code == code
    assert server.unexpected == []
    assert server.answers == []
    assert len(caught.value.delivery.attempts) == 1


@pytest.mark.parametrize("code", [500, 501, 502, 503, 504, 534])
@pytest.mark.parametrize("tls", [False, True])
@virtually
async def test_a_mechanism_that_does_not_work_gives_way_to_the_next(code: int, *, tls: bool) -> None:
    """An offered mechanism that the server refuses is passed over, and comes last on the next connection."""
    async with talk(once(), **AUTH, tls=tls, credentials=MINE) as (server, smtp):
        server.on("AUTH", f"{code} 5.7.9 not this one", times=1)
        for number in (1, 2):
            assert (await smtp.deliver(BODY, sender=APP, recipients=[ANN])).accepted == [ANN]
            assert server.verbs.count("AUTH") == 1 + number
            await smtp.quit()


# A session that loses its log-in


@pytest.mark.parametrize("verb", ["MAIL", "RCPT", "DATA", "END_OF_DATA"])
@pytest.mark.parametrize("reply", [LOG_IN, "530 Not logged in", "550 5.7.1 Authentication required"])
@virtually
async def test_a_session_that_loses_its_log_in_logs_in_again(verb: str, reply: str) -> None:
    """A 530 on a session that was logged in and has carried mail is answered by AUTH, each time that mail went between."""
    async with talk(once(), **AUTH, credentials=MINE) as (server, smtp):
        for number in range(4):
            if number:
                server.on(verb, reply, times=1)
                server.on("AUTH", "235 2.7.0 welcome back", times=1, accepted=False)
            assert (await smtp.deliver(BODY, sender=APP, recipients=[ANN])).accepted == [ANN]
            assert server.verbs.count("AUTH") == 1 + number
        assert (server.connections, len(server.messages)) == (1, 4)


@virtually
async def test_where_auth_comes_once_a_session_another_one_logs_in() -> None:
    """A server that wants a log-in again, and takes none on the same session (503), gets it on a new one."""
    async with talk(once(), **AUTH, credentials=MINE) as (server, smtp):
        await smtp.deliver(BODY, sender=APP, recipients=[ANN])
        server.on("MAIL", LOG_IN, times=1)
        server.on("AUTH", "503 5.5.1 Error: already authenticated", times=1)
        assert (await smtp.deliver(BODY, sender=APP, recipients=[ANN])).accepted == [ANN]
        assert server.connections == 2


@pytest.mark.parametrize(
    "reply",
    ["503 5.5.1 Error: already authenticated", "403 4.5.1 Error: already authenticated", "530 Already logged in"],
)
@virtually
async def test_a_session_that_is_logged_in_already_needs_no_log_in(reply: str) -> None:
    """By a proxy, its address or its certificate: the mail goes, after one AUTH that was not needed."""
    async with talk(once(), **AUTH, auth_required=False, client=MINE) as (server, smtp):
        server.on("AUTH", reply)
        assert (await smtp.deliver(BODY, sender=APP, recipients=[ANN])).accepted == [ANN]
        assert (server.connections, server.verbs.count("AUTH")) == (1, 1)


@pytest.mark.parametrize(
    "reply", ["535 5.7.8 User is already logged in elsewhere", "454 4.7.0 Already logged in from another address"]
)
@virtually
async def test_an_account_that_is_logged_in_elsewhere_is_not_logged_in_here(reply: str) -> None:
    """It is a refusal of AUTH, with the reply as its reason; nothing is sent."""
    async with talk(once(), **AUTH, auth_required=False, client=MINE) as (server, smtp):
        server.on("AUTH", reply)
        delivery = await smtp.deliver(BODY, sender=APP, recipients=[ANN])
        assert str(delivery.refused[ANN]) == reply
        assert "MAIL" not in server.verbs


@virtually
async def test_who_says_so_and_wants_a_log_in_gets_no_second_one() -> None:
    """A server that contradicts itself has refused the message."""
    async with talk(patient(), **AUTH, auth_required=False, credentials=MINE) as (server, smtp):
        server.on("AUTH", "503 5.5.1 Error: already authenticated")
        server.on("MAIL", LOG_IN)
        delivery = await smtp.deliver(BODY, sender=APP, recipients=[ANN])
        assert delivery.refused[ANN].code == 530
        assert (server.connections, server.verbs.count("AUTH")) == (1, 1)


@pytest.mark.parametrize("verb", ["MAIL", "RCPT", "DATA", "END_OF_DATA"])
@virtually
async def test_530_for_ever_ends(verb: str) -> None:
    """A server that wants a log-in for ever gets one on the old session and one on a new one, and no more."""
    async with talk(patient(), **AUTH, credentials=MINE) as (server, smtp):
        await smtp.deliver(BODY, sender=APP, recipients=[ANN])
        server.on(verb, LOG_IN)
        delivery = await smtp.deliver(BODY, sender=APP, recipients=[ANN])
        assert [reply.code for reply in delivery.refused.values()] == [530]
        assert server.connections <= 2
        assert server.verbs.count("AUTH") <= 3
        assert len(server.messages) == 1


# The generator of tokens


@pytest.mark.parametrize(
    "error",
    [
        *(ConnectionError("no network"), ConnectionResetError("no network"), TimeoutError("no network")),
        *(socket.gaierror(-2, "no network"), OSError(errno.ENETUNREACH, "no network")),
    ],
    ids=repr,
)
@virtually
async def test_a_generator_without_a_network_is_waited_for(error: OSError) -> None:
    """A token that cannot be fetched now is like a busy server: the send goes on, and the log says why."""
    errors = [error]

    async def generator() -> str:
        if errors:
            raise errors.pop()
        return "good"

    mine = {"username": USER, "oauth_token_generator": generator}
    async with talk(patient(), token="good", credentials=mine) as (_, smtp):
        delivery = await smtp.deliver(BODY, sender=APP, recipients=[ANN])
        assert delivery.accepted == [ANN]
        assert len(delivery.attempts) == 2
        assert "no network" in str(delivery.attempts[0].steps[-1].reply)


async def by_httpx(url: str) -> Any:
    async with httpx.AsyncClient(timeout=0.2) as client:
        return await client.post(url)


async def by_requests(url: str) -> Any:
    return await asyncio.to_thread(requests.post, url, timeout=0.2)


async def by_google(url: str) -> Any:
    return await asyncio.to_thread(google.auth.transport.requests.Request(), url, timeout=0.2)


@pytest.mark.parametrize("answers", [False, True], ids=["nobody there", "no answer"])
@pytest.mark.parametrize("ask", [by_httpx, by_requests, by_google])
def test_http_clients_without_a_network_are_waited_for(ask: Callable[[str], Any], answers: bool) -> None:
    """However an HTTP client wraps it, a token endpoint that cannot be reached is no end of the send."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url, asked = f"http://127.0.0.1:{listener.getsockname()[1]}/token", 0
        if not answers:
            listener.close()

        async def generator() -> str:
            nonlocal asked
            asked += 1
            return "good" if asked > 1 else await ask(url)

        async def scenario() -> None:
            mine = {"username": USER, "oauth_token_generator": generator}
            async with talk(no_wait(), token="good", credentials=mine) as (_, smtp):
                assert (await smtp.deliver(BODY, sender=APP, recipients=[ANN])).accepted == [ANN]

        asyncio.run(scenario())
        assert asked == 2


@pytest.mark.parametrize("error", [KeyError("cause"), FileNotFoundError(2, "cause"), RuntimeError("cause")], ids=repr)
@virtually
async def test_a_generator_that_is_broken_fails_that_send_alone(error: Exception) -> None:
    """Any other error is the caller's, at once, and the next send works."""
    errors = [error]

    async def generator() -> str:
        if errors:
            raise errors.pop()
        return "good"

    mine = {"username": USER, "oauth_token_generator": generator}
    async with talk(patient(), token="good", credentials=mine) as (_, smtp):
        with pytest.raises(type(error), match="cause") as caught:
            await smtp.sendmail(APP, [ANN], BODY)
        assert caught.value.delivery.pending == [ANN]  # type: ignore[attr-defined]
        assert (await smtp.deliver(BODY, sender=APP, recipients=[BOB])).accepted == [BOB]


# What is hidden

WAYS: dict[str, Callable[[str], str]] = {
    "as it is": lambda secret: secret,
    "cut short": lambda secret: secret[:13],
    "its end": lambda secret: secret[-9:],
    "capitals": str.upper,
    "wrapped": lambda secret: "\n".join(secret[start : start + 6] for start in range(0, len(secret), 6)),
    "wrapped with a status": lambda secret: "\n5.7.8 ".join(
        secret[start : start + 5] for start in range(0, len(secret), 5)
    ),
    "%-encoded": lambda secret: "".join(f"%{byte:02X}" for byte in secret.encode()),
    "partly %-encoded": lambda secret: secret.replace("=", "%3D").replace("a", "%61").replace("n", "%6e"),
    "quoted-printable": lambda secret: "".join(f"={byte:02X}" for byte in secret.encode()),
    "as a literal": lambda secret: "".join(f"\\x{byte:02x}" for byte in secret.encode()),
    "as in a page": lambda secret: "".join(f"&#x{byte:02x};" for byte in secret.encode()),
    "spaced out": " ".join,
    "in quotes": lambda secret: f'"{secret}"',
    "dotted": ".".join,
}
FORMS = {
    "password": PASSWORD,
    "its base64": coded(PASSWORD).decode(),
    "PLAIN": PLAIN.decode(),
    "XOAUTH2": coded(f"user={USER}\1auth=Bearer {PASSWORD}\1\1").decode(),
    "in hex": PASSWORD.encode().hex(),
    "within other base64": coded(f"{USER}:{PASSWORD}").decode()[-24:],
    "within more base64": coded(f"{USER}: {PASSWORD}").decode()[-24:],
}


def in_a_row(text: str, secret: str) -> set[str]:
    """Return what a text shows of a secret, eight letters and digits in a row."""
    bare = ["".join(char for char in each.casefold() if char.isalnum()) for each in (text, secret)]
    return {bare[1][start : start + 8] for start in range(len(bare[1]) - 7)} & {
        bare[0][start : start + 8] for start in range(len(bare[0]) - 7)
    }


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("code", [500, 535, 454, 235])
def test_nothing_that_was_sent_is_shown(code: int, form: str, way: str, caplog: pytest.LogCaptureFixture) -> None:
    """However a server writes what it was sent, no log, exception, step or note shows eight characters of it."""
    caplog.set_level(logging.DEBUG)
    logging.getLogger("mail.log").setLevel(logging.CRITICAL)  # aiosmtpd's: the other side
    quoted = WAYS[way](FORMS[form])

    async def generator() -> str:
        return PASSWORD

    async def scenario() -> str:
        mine: dict[str, Any] = {"username": USER, "oauth_token_generator": generator} if form == "XOAUTH2" else MINE
        settings: dict[str, Any] = {"token": PASSWORD} if form == "XOAUTH2" else AUTH
        async with talk(patient(max_attempts=2), **settings, client=mine) as (server, smtp):
            server.on("AUTH", f'{code} 5.7.8 Command unrecognized: "AUTH {quoted}"', accepted=code == 235)
            delivery = await smtp.deliver(BODY, sender=APP, recipients=[ANN])
            caught: BaseException | None = None
            try:
                await smtp.sendmail(APP, [ANN], BODY)
            except aiosmtplib.SMTPException as error:
                caught = error
            steps = [step for attempt in delivery.attempts for step in attempt.steps]
            return everything_of(caught, delivery, delivery.story(0), *steps)

    shown = virtual.run(scenario()) + caplog.text
    decoded = unquote(re.sub(r"=([0-9A-F]{2})|\\+x([0-9a-f]{2})|&#x([0-9a-f]{2});", r"%\1\2\3", shown))
    assert "Command unrecognized" in shown
    assert not in_a_row(decoded, FORMS[form])
    assert quoted not in shown


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("5.7.8 Error: authentication failed", "5.7.8 Error: authentication failed"),
        (
            "no such user ann@example.com, see https://example.com/help",
            "no such user [...], see https://example.com/help",
        ),
        ("wrong: hunter-22-x!", "wrong: [...]!"),
        ("wrong: HUNTER 22", "wrong: [...]"),
        ("%%%", "%%%"),
        ("\u0130\u00df", "\u0130\u00df"),
    ],
)
def test_only_what_repeats_the_secret_is_hidden(text: str, shown: str) -> None:
    """The rest of a refusal says what it said."""
    assert Redactor(["hunter-22-x"], ["ann@example.com"]).redact(text) == shown


@pytest.mark.parametrize("secret", ["ab", "", "!!", "\u00e9"])
def test_a_secret_that_is_in_any_text_hides_none(secret: str) -> None:
    """What is too short to be known by changes nothing."""
    assert Redactor([secret]).redact("a refusal, ab and \u00e9!!") == "a refusal, ab and \u00e9!!"


@pytest.mark.parametrize("secret", ["a%41b%42c%43d", "x=41y=42z=43", "\\x41\\x42\\x43\\x44"])
def test_a_secret_that_looks_encoded_is_hidden(secret: str) -> None:
    """A password may have in it what stands for another character elsewhere."""
    assert Redactor([secret]).redact(f"not {secret}, please") == "not [...], please"


@virtually
async def test_the_answer_to_a_challenge_is_not_shown() -> None:
    """With it and the challenge, a password can be tried out at home."""
    said = b'535 5.7.8 not "' + DIGEST + b'", which is ' + base64.b64decode(DIGEST)
    async with Asking("CRAM-MD5", (b"AUTH CRAM-MD5", b"334 " + CRAM), (DIGEST, said)).client() as smtp:
        delivery = await smtp.deliver(BODY, sender=APP, recipients=[ANN])
    shown = everything_of(None, delivery, delivery.story(0))
    assert not in_a_row(shown, DIGEST.decode())
    assert not in_a_row(shown, base64.b64decode(DIGEST).decode().partition(" ")[2])


@virtually
async def test_a_password_of_other_bytes_than_utf_8() -> None:
    """What an environment variable holds arrives byte for byte; what nothing can hold is told without being shown."""
    password = b"geheim\xe4".decode(errors="surrogateescape")
    said = b"AUTH PLAIN " + base64.b64encode(b"\0%b\0geheim\xe4" % USER.encode()), OK
    server = Asking("PLAIN", said)
    async with server.client(username=USER, password=password) as smtp:
        assert (await smtp.deliver(BODY, sender=APP, recipients=[ANN])).accepted == [ANN]
    assert server.unexpected == []
    with pytest.raises(ValueError, match="password has a character") as caught:
        RetryingSMTP(aiosmtplib.SMTP(), username=USER, password="geheim\ud800")
    assert "geheim" not in str(caught.value)


def test_a_secret_of_punctuation_is_hidden() -> None:
    """A password without a letter or digit is hidden as it is."""
    assert Redactor(["?!?!+"]).redact("not ?!?!+, please") == "not [...], please"
