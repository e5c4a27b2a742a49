"""What is written fast is what the standard library writes, byte for byte."""

from __future__ import annotations

import email
import email.policy
import random
from datetime import UTC, datetime
from email.header import Header
from email.headerregistry import Address
from email.message import EmailMessage, Message
from email.mime.multipart import MIMEMultipart
from email.mime.text import MIMEText
from typing import Any

import pytest

from smtpretry.flatten import _addresses, _as_the_library_does, _line, flatten

POLICIES = [
    email.policy.SMTP.clone(cte_type="7bit"),
    email.policy.SMTPUTF8.clone(cte_type="7bit"),
    email.policy.SMTP,
    email.policy.compat32.clone(mangle_from_=False),
    email.policy.compat32.clone(mangle_from_=False, cte_type="7bit"),
    email.policy.compat32.clone(mangle_from_=False, cte_type="7bit", linesep="\r\n"),
]
WORDS = """Hello, world; (x) "q" <a@x> =?utf-8?q?J=C3=B6rg=2C?= =?x Grüße From From: . .. a@x:b = % \t   -- --b --b-- é
Sehr-langes-Wort-ohne-jeden-Zwischenraum-das-nicht-in-eine-Zeile-passt-und-deshalb-nicht-gefaltet-werden-kann
https://example.com/?q=%20&x=1 'x' \\ [1] ; : , @ \x0b \x7f 漢字""".split(" ")  # noqa: SIM905 - with empty ones
PEOPLE = [
    "ann@example.com",
    "Ann <ann@example.com>",
    '"Doe, John" <j@x.example>',
    "=?utf-8?q?Doe=2C_J?= <j@x.example>",
    "bob@x.example (Bob)",
    "Jörg <j@x.example>",
    "Group: a@x.example, b@x.example;",
    "a@x.example; b@x.example",
    "undisclosed-recipients:;",
    "jörg@bücher.example",
    "",
]
TYPES = ["text/plain", "TEXT/Plain; charset=us-ascii", "multipart/mixed; boundary=b", "message/rfc822", "text", "x"]
TYPES += [
    'multipart/alternative; boundary="b c"',
    "multipart/signed; boundary=b",
    "multipart/digest",
    "multipart/mixed",
]


class Some:
    """Messages of every make, from a seed."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)  # noqa: S311 - the same every time
        self.pick = self.random.choice

    def words(self, most: int = 20, end: str = " ") -> str:
        return end.join(self.random.choices(WORDS, k=self.random.randrange(most)))

    def text(self) -> str:
        return "".join(
            self.words() + self.pick(["\n", "\n", "\r\n", "\r", ""]) for _ in range(self.random.randrange(6))
        )

    def message(self, depth: int = 2) -> Message:
        return self.pick([self.modern, self.modern, self.mime, self.parsed, self.parsed, self.bare])(depth)

    def headers(self, message: Message) -> None:
        header = {
            "Subject": self.words,
            "X-Text": self.words,
            "subject-of-a-very-long-name-that-takes-much-of-the-line": lambda: self.words(4),
            "From": lambda: self.pick(PEOPLE),
            "Bcc": lambda: "eve@example.com",
            "To": lambda: ", ".join(self.random.choices(PEOPLE, k=3)),
            "Cc": lambda: (
                Address("Jörg", "j", "x.example") if isinstance(message, EmailMessage) else Header("Jörg <j@x>")
            ),
            "Date": lambda: datetime.fromtimestamp(self.random.randrange(10**9), UTC),
            "Message-ID": lambda: f"<{self.random.random()}@example.com>",
            "Content-Disposition": lambda: self.pick(
                ["inline", "attachment; filename=x", 'attachment; filename="ü x"']
            ),
        }
        for name in self.random.sample(list(header), self.random.randrange(1, 8)):
            value: Any = header[name]()
            if isinstance(value, datetime) and not isinstance(message, EmailMessage):
                value = str(value)
            try:
                message[self.pick([name, name, name.upper()])] = value
            except Exception:  # noqa: BLE001, S112 - what cannot be set is not to be written
                continue

    def modern(self, depth: int) -> Message:
        message = EmailMessage()
        self.headers(message)
        del message["Content-Disposition"]
        message.set_content(self.text(), charset="utf-8", cte=self.pick([None, "8bit", "base64", "quoted-printable"]))
        if depth and self.random.random() < 0.4:
            message.add_alternative(f"<p>{self.words()}</p>", subtype="html")
        if depth and self.random.random() < 0.5:
            name = self.pick(["x.bin", "ü, x.bin", "a" * 90])
            message.add_attachment(self.random.randbytes(self.random.randrange(300)), "image", "png", filename=name)
        if depth and self.random.random() < 0.2:
            inner = self.message(0)
            if isinstance(inner, EmailMessage):
                message.add_attachment(inner)
        return message

    def mime(self, depth: int) -> Message:
        if depth and self.random.random() < 0.5:
            message: Message = MIMEMultipart(self.pick(["mixed", "related", "signed"]))
            for _ in range(self.random.randrange(3)):
                message.attach(self.message(depth - 1))
            message.preamble = self.pick([None, "one\ntwo", "ü", ""])
            message.epilogue = self.pick([None, "one\ntwo\n", "", "\n"])
        else:
            charset, text = self.pick(["utf-8", "us-ascii", "iso-8859-1"]), self.text()
            message = MIMEText(text.encode(charset, "ignore").decode(charset), "plain", charset)
        self.headers(message)
        return message

    def bare(self, _depth: int) -> Message:
        message = self.pick([Message, EmailMessage])()
        self.headers(message)
        if self.random.random() < 0.5:
            message["Content-Type"] = self.pick(TYPES)
        message.set_payload(self.pick([None, "", self.text(), "plain\nlines\n", [], "b\udce4r"]))
        return message

    def parsed(self, depth: int) -> Message:
        lines = [f"{self.pick(['Subject', 'To', 'X', 'From', 'Bcc'])}:{self.pick([' ', '', '  '])}{self.words()}"]
        lines += [f"{self.pick([' ', chr(9)])}{self.words()}"] * self.random.randrange(2)
        lines += ["MIME-Version: 1.0", f"Content-Type: {self.pick(TYPES)}"][: self.random.randrange(3)]
        body = "\n--b\n".join([self.text() for _ in range(1 + depth)]) + self.pick(["\n--b--\n", ""])
        raw = "\n".join([*lines, "", body]).encode(self.pick(["utf-8", "latin-1"]), "replace")
        policy: Any = self.pick([email.policy.default, email.policy.SMTP, email.policy.compat32])
        return email.message_from_bytes(raw, policy=policy)


def written(write: Any, seed: int, policy: Any) -> bytes | str:
    """What comes out, or which error; the message is made anew, for writing may change it."""
    message = Some(seed).message()
    random.seed(seed)
    try:
        return write(message, policy)
    except Exception as error:  # noqa: BLE001 - whatever it is, both raise the same
        return repr(error)


@pytest.mark.parametrize("policy", range(len(POLICIES)))
@pytest.mark.parametrize("block", range(4))
def test_the_same_bytes_as_the_standard_library(block: int, policy: int) -> None:
    """Of thousands of messages, whole and broken, each is written as `email.generator` writes it, or fails alike."""
    for seed in range(block * 500, block * 500 + 500):
        expected = written(_as_the_library_does, seed, POLICIES[policy])
        assert written(flatten, seed, POLICIES[policy]) == expected, seed


def people(some: random.Random) -> str:
    """A list of addresses: nearly always plain, of any length, now and then with something else in it."""
    count, longest = some.choice([1, 1, 2, 3, 10, 60]), some.choice([3, 9, 30, 70])
    found = list[str]()
    for _ in range(count):
        local = "u" * some.randrange(1, longest) + some.choice(["", ".x", "+x", "o'x", "-", "_"])
        mailbox = f"{local}@{some.choice(HOSTS)}"
        name = " ".join(some.choices(["Ann", "van-der", "O'Neill", "x_1"], k=some.randrange(1, 4)))
        found.append(some.choice([mailbox, mailbox, f"{name} <{mailbox}>"]))
    if some.random() < 0.1:
        found.insert(
            some.randrange(count),
            some.choice([*PEOPLE, *ODD, "a@x.example (x)", "A. B. <a@x.example>", "<a@x.example>", " a @x.example"]),
        )
    return some.choice([", ", ", ", ", ", ",", ",  "]).join(found)


ODD = [
    "=?us-ascii?q?Ann?= <a@x.example>",
    "=?us-ascii?q?Ann?= =?us-ascii?q?Ann?= <a@x.example>",
    "=?us-ascii?q?a?=@x.example",
]
HOSTS = ["example.com", "x.example", "localhost", f"{'long-' * 9}name.example"]


@pytest.mark.parametrize("name", ["To", "Cc", "From", "Reply-To", "Resent-To", "Sender", "TO", "To" * 30])
@pytest.mark.parametrize("policy", POLICIES[:3])
def test_lists_of_addresses_are_folded_as_the_standard_library_does(policy: Any, name: str) -> None:
    """Lists of every length come out the same, with lines of each length up to the longest, and few are left to it."""
    lengths, fast, count, some = set[int](), 0, 500, random.Random(name)  # noqa: S311
    for _ in range(count):
        message = EmailMessage()
        try:
            message[name] = people(some)
        except Exception:  # noqa: BLE001, S112 - Sender takes one
            continue
        value = message[name]
        written = _line(name, value, 76, b"\r\n") or _addresses(value, policy)
        if written is not None:
            assert written == policy.fold_binary(name, value)
            fast += 1
            lengths |= {len(line) for line in written.split(b"\r\n")}
    if name not in ("Sender", "To" * 30):
        assert lengths >= set(range(60, 79))
        assert fast > count // 3
